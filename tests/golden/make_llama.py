"""Tiny super-networks of LLaMA and its kin, and the logits of six sub-networks each (of thirteen for its kin).

Usage: python make_llama.py [NAME ...] (writes beside itself; all without names).
"""

import json
import random
import shutil
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from elastic import Elastic, fill, group_choices, supernet_groups, three_and_random

HERE = Path(__file__).parent
TARGETS = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
COMMON = dict(bos_token_id=1, eos_token_id=2, max_position_embeddings=128, rms_norm_eps=1e-5, rope_theta=10000.0)
MODELS = {
    "tiny-tied": dict(
        config=dict(hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2, vocab_size=97, tie_word_embeddings=True),
        ranks=[8, 6, 4], widths=[80, 61, 40], dtype=torch.float32, shard="10GB",
    ),
    "tiny-untied-bf16": dict(
        config=dict(hidden_size=40, intermediate_size=72, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=131, tie_word_embeddings=False),
        ranks=[8, 5, 3], widths=[72, 64, 35, 17], dtype=torch.bfloat16, shard="30KB",
    ),
    "tiny-bias-headdim": dict(
        config=dict(hidden_size=24, intermediate_size=50, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=3, head_dim=12, vocab_size=67, attention_bias=True, mlp_bias=True, tie_word_embeddings=False),
        ranks=[8, 7, 1], widths=[50, 33, 7], dtype=torch.float32, shard="10GB",
    ),
    # Heads as a group of their own, two queries of 8 for each key-value head.
    "tiny-heads": dict(
        config=dict(hidden_size=30, intermediate_size=40, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=3, head_dim=8, vocab_size=63),
        ranks=[8, 4], widths=[40, 28, 9], heads=[48, 32, 16], dtype=torch.float32, shard="10GB", random=10,
    ),
    # Layers that can go without their MLP, their attention or both.
    "tiny-depth": dict(
        config=dict(hidden_size=24, intermediate_size=40, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=8, vocab_size=57),
        ranks=[8, 5], widths=[[40, 12], [40, 28, 0], [40, 0], [40, 20]], heads=[[32, 16], [32, 16, 0], [32, 0], [32, 0]],
        dtype=torch.float32, shard="10GB", random=8,
        # Two layers less, of one width and of two.
        more={"shallow": [[8, 5, 8, 5], [40, 0, 0, 40], [8, 8, 5, 8], [32, 0, 0, 32]], "uneven": [[5, 8, 8, 8], [12, 28, 0, 20], [8, 8, 5, 5], [32, 32, 0, 32]]},
    ),
    # The same with biases, which stay where everything else is left out.
    "tiny-depth-bias": dict(
        config=dict(hidden_size=24, intermediate_size=33, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=8, vocab_size=51, attention_bias=True, mlp_bias=True),
        ranks=[8, 3], widths=[[33, 17], [33, 0]], heads=[[16, 0], [16, 8, 0]],
        dtype=torch.float32, shard="10GB", random=10,
    ),
    # LLaMA 3.1's rule with the wave lengths of eight pairs on both sides of it and between.
    "tiny-llama3": dict(
        config=dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, vocab_size=61, rope_parameters=dict(rope_type="llama3", rope_theta=500.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)),
        ranks=[8, 5], widths=[48, 36, 20], dtype=torch.float32, shard="10GB", random=10,
    ),
    "tiny-mistral": dict(
        model_type="mistral",
        config=dict(hidden_size=32, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=10, vocab_size=59, sliding_window=7),
        ranks=[8, 4, 2], widths=[40, 32, 13], dtype=torch.float32, shard="10GB", random=10,
    ),
    "tiny-qwen2": dict(
        model_type="qwen2",
        config=dict(hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=57, tie_word_embeddings=True),
        ranks=[8, 6], widths=[40, 24, 9], dtype=torch.float32, shard="10GB", random=10,
    ),
    "tiny-qwen3": dict(
        model_type="qwen3",
        config=dict(hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8, vocab_size=55, rope_parameters=dict(rope_type="linear", rope_theta=10000.0, factor=4.0)),
        ranks=[8, 3], widths=[40, 30, 11], dtype=torch.bfloat16, shard="10GB", random=10,
    ),
}


def write_json(path, value):
    path.write_text(json.dumps(value) + "\n")


def permute(model, orders):
    """Row i of gate, up (base and B) and column i of down (base and A) become row/column order[i]."""
    layers = model.base_model.model.model.layers
    with torch.no_grad():
        for layer, order in orders.items():
            index = torch.tensor(order)
            mlp = layers[layer].mlp
            for linear in (mlp.gate_proj, mlp.up_proj):
                linear.base_layer.weight.copy_(linear.base_layer.weight[index].clone())
                linear.lora_B["default"].weight.copy_(linear.lora_B["default"].weight[index].clone())
                if linear.base_layer.bias is not None:
                    linear.base_layer.bias.copy_(linear.base_layer.bias[index].clone())
            mlp.down_proj.base_layer.weight.copy_(mlp.down_proj.base_layer.weight[:, index].clone())
            mlp.down_proj.lora_A["default"].weight.copy_(mlp.down_proj.lora_A["default"].weight[:, index].clone())


def permute_heads(model, orders, config):
    """Key-value head i, with the queries that read it, becomes head order[i], in q, k, v (base and B) and in the columns of o."""
    head = config.head_dim
    group = config.num_attention_heads // config.num_key_value_heads
    with torch.no_grad():
        for layer, order in orders.items():
            attention = model.base_model.model.model.layers[layer].self_attn
            of = lambda size: torch.tensor([h * size + i for h in order for i in range(size)])
            for linear, size in ((attention.q_proj, head * group), (attention.k_proj, head), (attention.v_proj, head)):
                linear.base_layer.weight.copy_(linear.base_layer.weight[of(size)].clone())
                linear.lora_B["default"].weight.copy_(linear.lora_B["default"].weight[of(size)].clone())
                if linear.base_layer.bias is not None:
                    linear.base_layer.bias.copy_(linear.base_layer.bias[of(size)].clone())
            attention.o_proj.weight.copy_(attention.o_proj.weight[:, of(head * group)].clone())


def make(name, spec, ordered):
    out = HERE / name
    chooser = random.Random(name)
    config = AutoConfig.for_model(spec.get("model_type", "llama"), **(COMMON | spec["config"]))
    if not ordered:
        shutil.rmtree(out, ignore_errors=True)
        base = AutoModelForCausalLM.from_config(config).to(torch.float32)
        fill(base, seed=1, std=0.35)
        base.to(spec["dtype"]).save_pretrained(out / "base", max_shard_size=spec["shard"])
    # Read back, because casting a model to bf16 rounds its rotary frequencies for good.
    base = AutoModelForCausalLM.from_pretrained(out / "base", dtype=torch.float32).eval()
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, lora_dropout=0.1)).eval()
    for i, (_, p) in enumerate(sorted((n, p) for n, p in model.named_parameters() if "lora_" in n)):
        generator = torch.Generator().manual_seed(100 + i)
        with torch.no_grad():
            p.copy_(0.15 * torch.randn(p.shape, generator=generator))
    layers = config.num_hidden_layers
    folder = HERE / (name + "-ordered" if ordered else name) / "supernet"
    if ordered:
        shutil.rmtree(folder.parent, ignore_errors=True)
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    # PEFT writes down where the base was on this machine.
    adapter = json.loads((folder / "adapter_config.json").read_text())
    adapter["base_model_name_or_path"] = f"tests/golden/{name}/base"
    (folder / "adapter_config.json").write_text(json.dumps(adapter, indent=2))
    groups = group_choices(layers, spec["ranks"], spec["widths"], spec["ranks"], spec.get("heads"))
    supernet = {
        "version": 1, "name": folder.parent.name, "base": {"source": {"path": f"tests/golden/{name}/base"}}, "scale": 2.0,
        "groups": supernet_groups(layers, spec["ranks"], spec["widths"], spec["ranks"], spec.get("heads")),
    }
    tokens = [[chooser.randrange(3, config.vocab_size) for _ in range(n)] for n in (23, 1, 9)]
    plain = [model(torch.tensor([t])).logits[0].detach() for t in tokens]
    if ordered:
        orders = {l: chooser.sample(range(config.intermediate_size), config.intermediate_size) for l in range(layers)}
        supernet["orders"] = {str(layers + l): o for l, o in orders.items()}
        permute(model, orders)
        if "heads" in spec:
            heads = {l: chooser.sample(range(config.num_key_value_heads), config.num_key_value_heads) for l in range(layers)}
            supernet["orders"] |= {str(3 * layers + l): o for l, o in heads.items()}
            permute_heads(model, heads, config)
    write_json(folder / "supernet.json", supernet)
    elastic = Elastic(model, layers)
    cases, tensors = [], {}
    more = [(name, sum(choices, [])) for name, choices in spec.get("more", {}).items()]
    for sub, choices in three_and_random(groups, spec.get("random", 3), chooser) + more:
        elastic.set(choices)
        for i, t in enumerate(tokens):
            logits = model(torch.tensor([t])).logits[0].detach()
            if sub == "maximal":
                assert torch.allclose(logits, plain[i], atol=2e-4), (logits - plain[i]).abs().max()
            tensors[f"{sub}/{i}"] = logits.contiguous()
        cases.append({"name": sub, "choices": choices})
    save_file(tensors, folder.parent / "logits.safetensors")
    write_json(folder.parent / "cases.json", {"tokens": tokens, "cases": cases})


if __name__ == "__main__":
    torch.set_num_threads(1)
    names = sys.argv[1:] or [*MODELS, "tiny-tied-ordered", "tiny-heads-ordered"]
    for name in names:
        plain = name.removesuffix("-ordered")
        make(plain, MODELS[plain], ordered=name != plain)
