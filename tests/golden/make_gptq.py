"""A tiny LLaMA quantised as GPTQ's and AWQ's tools write it, and the logits of its super-networks; and a sparse one with an
adapter that counts only where the base is not 0. Usage: python make_gptq.py (writes gptq/ and sparse/ beside itself).

Weights are rounded to the nearest quant of their group (no error is passed on, which changes values but no format) and packed
by the formulas of AutoGPTQ's `QuantLinear.pack` and AutoAWQ's `WQLinear_GEMM.from_linear`. The logits are those of transformers
+ PEFT on `scale * (quant - zero)` in f32, cut to sub-networks by `elastic.py`.
"""

import copy
import json
import random
import shutil
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from elastic import Elastic, fill, supernet_groups, three_and_random, group_choices
from make_llama import TARGETS, write_json

HERE = Path(__file__).parent
GPTQ, SPARSE = HERE / "gptq", HERE / "sparse"
SIZES = dict(
    hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, vocab_size=48,
    tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, max_position_embeddings=64, rms_norm_eps=1e-5,
)
RANKS, WIDTHS = [8, 5, 3], [256, 160, 77]
BASES = {
    # The commonest: symmetric, in order.
    "sym-128": dict(bits=4, group=128, sym=True, act_order=False, v2=False),
    "sym-32-act": dict(bits=4, group=32, sym=True, act_order=True, v2=True),
    "asym-64-act": dict(bits=4, group=64, sym=False, act_order=True, v2=False),
    "asym-all": dict(bits=4, group=-1, sym=False, act_order=False, v2=True),
    "sym-8-bits": dict(bits=8, group=128, sym=True, act_order=True, v2=False),
    "awq": dict(bits=4, group=32, sym=False, act_order=False, v2=True, awq=True),
}
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def quantised(weight, spec, groups):
    """`(quants, zeros, scales)` of a weight (out, inp): quants (inp, out), the others (groups, out)."""
    top, count = 2 ** spec["bits"] - 1, int(groups.max()) + 1
    quants = torch.zeros(weight.shape[::-1], dtype=torch.int64)
    zeros = torch.zeros((count, weight.shape[0]), dtype=torch.int64)
    scales = torch.zeros((count, weight.shape[0]), dtype=torch.float16)
    for g in range(count):
        members = weight[:, groups == g]
        low, high = members.amin(1).clamp(max=0), members.amax(1).clamp(min=0)
        if spec["sym"]:
            high = torch.maximum(high, -low)
            low = -high
        scale = ((high - low) / top).half()
        zero = torch.full_like(scale, (top + 1) // 2) if spec["sym"] else (-low / scale.float()).round().clamp(0, top)
        quants[groups == g] = ((members / scale.float()[:, None]).round() + zero[:, None]).clamp(0, top).long().T
        zeros[g], scales[g] = zero.long(), scale
    return quants, zeros, scales


def words(values, bits, order=None):
    """Along the last axis, `32 / bits` values in a word, the first (or `order[0]`-th) in the lowest bits; as int32."""
    per = 32 // bits
    split = values.reshape(*values.shape[:-1], -1, per)[..., order or list(range(per))]
    word = sum(split[..., i] << (bits * i) for i in range(per))
    return torch.where(word >= 2**31, word - 2**32, word).to(torch.int32).contiguous()


def packed(name, quants, zeros, scales, groups, spec):
    bits, mask = spec["bits"], 2 ** spec["bits"] - 1
    stored = zeros if spec["v2"] else (zeros - 1) & mask
    if spec.get("awq"):
        return {f"{name}.qweight": words(quants, 4, AWQ_ORDER), f"{name}.qzeros": words(stored, 4, AWQ_ORDER), f"{name}.scales": scales}
    return {
        f"{name}.qweight": words(quants.T, bits).T.contiguous(), f"{name}.qzeros": words(stored, bits),
        f"{name}.scales": scales, f"{name}.g_idx": groups.to(torch.int32),
    }


def quantisation_config(spec):
    if spec.get("awq"):
        return {"quant_method": "awq", "bits": 4, "group_size": spec["group"], "version": "gemm", "zero_point": True, "modules_to_not_convert": None}
    return {
        "quant_method": "gptq", "bits": spec["bits"], "group_size": spec["group"], "desc_act": spec["act_order"], "sym": spec["sym"],
        "checkpoint_format": "gptq_v2" if spec["v2"] else "gptq", "damp_percent": 0.1, "static_groups": False, "true_sequential": True,
    }


def quantise(base, spec):
    """The folder's tensors; `base` gets the values that they stand for."""
    tensors = {name: value.half() for name, value in base.state_dict().items()}
    orders = {}
    for name, module in base.named_modules():
        if not isinstance(module, torch.nn.Linear) or name == "lm_head":
            continue
        inp = module.in_features
        size = inp if spec["group"] == -1 else spec["group"]
        groups = torch.arange(inp) // size
        if spec["act_order"]:
            # Sorted by what the inputs were, so that all that read the same ones agree.
            reads = {"q_proj": "x", "k_proj": "x", "v_proj": "x", "gate_proj": "y", "up_proj": "y"}.get(name.rsplit(".", 1)[1], name)
            order = orders.setdefault(reads, torch.randperm(inp, generator=torch.Generator().manual_seed(50 + len(orders))))
            groups = groups[torch.argsort(order)]
        quants, zeros, scales = quantised(module.weight, spec, groups)
        values = scales.float()[groups] * (quants - zeros[groups]).float()
        with torch.no_grad():
            module.weight.copy_(values.T)
        del tensors[f"{name}.weight"]
        tensors.update(packed(name, quants, zeros, scales, groups, spec))
    for name in ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"] + [n for n in tensors if "layernorm" in n]:
        base.state_dict()[name].copy_(tensors[name].float())
    return tensors


def adapted(base):
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, lora_dropout=0.1)).eval()
    for i, (_, p) in enumerate(sorted((n, p) for n, p in model.named_parameters() if "lora_" in n)):
        with torch.no_grad():
            p.copy_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(100 + i)))
    return model


def save_supernet(model, folder, name, base):
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = f"tests/golden/{base}"
    if name == "sparse":
        config["sparse_adapter"] = True
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))
    supernet = {
        "version": 1, "name": name, "base": {"source": {"path": f"tests/golden/{base}"}}, "scale": 2.0,
        "groups": supernet_groups(1, RANKS, WIDTHS, RANKS),
    }
    write_json(folder / "supernet.json", supernet)


def logits_of(model, tokens, cases, elastic):
    tensors = {}
    for name, choices in cases:
        elastic.set(choices)
        for i, sequence in enumerate(tokens):
            with torch.no_grad():
                tensors[f"{name}/{i}"] = model(torch.tensor([sequence])).logits[0].contiguous()
    return tensors


def masked_forward(elastic, name, module):
    """SQFT's SparsePEFT: `s B A` where the base is not 0, cut to the sub-network."""

    def forward(x):
        o, i, r = elastic.sizes[name]
        weight, s = module.base_layer.weight[:o, :i], module.scaling["default"]
        delta = module.lora_B["default"].weight[:o, :r] @ module.lora_A["default"].weight[:r, :i] * s
        return torch.nn.functional.linear(x, weight + delta * (weight != 0))

    return forward


def make_sparse(dense, tokens, cases):
    """Half of each weight is 0, the smallest of each row (as Wanda with inputs of one size)."""
    shutil.rmtree(SPARSE, ignore_errors=True)
    base = copy.deepcopy(dense)
    for name, module in base.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            weight = module.weight.detach()
            cut = weight.abs().argsort(1)[:, : weight.shape[1] // 2]
            with torch.no_grad():
                module.weight.scatter_(1, cut, 0.0)
    base.to(torch.bfloat16).save_pretrained(SPARSE / "base")
    (SPARSE / "base" / "generation_config.json").unlink(missing_ok=True)
    base = LlamaForCausalLM.from_pretrained(SPARSE / "base", dtype=torch.float32).eval()
    plain = {f"base/{i}": base(torch.tensor([t])).logits[0].detach() for i, t in enumerate(tokens)}
    model = adapted(base)
    save_supernet(model, SPARSE / "supernet", "sparse", "sparse/base")
    elastic = Elastic(model, 1)
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            module.forward = masked_forward(elastic, name, module)
    tensors = logits_of(model, tokens, cases, elastic)
    save_file({**tensors, **plain}, SPARSE / "logits.safetensors")
    write_json(SPARSE / "cases.json", {"tokens": tokens, "cases": [{"name": n, "choices": c} for n, c in cases]})


def main():
    shutil.rmtree(GPTQ, ignore_errors=True)
    chooser = random.Random("gptq")
    tokens = [[chooser.randrange(3, SIZES["vocab_size"]) for _ in range(n)] for n in (19, 1, 7)]
    cases = three_and_random(group_choices(1, RANKS, WIDTHS, RANKS), 2, chooser)
    dense = LlamaForCausalLM(LlamaConfig(**SIZES)).to(torch.float32).eval()
    fill(dense, seed=1, std=0.2)
    for name, spec in BASES.items():
        base, folder = copy.deepcopy(dense), GPTQ / name
        folder.mkdir(parents=True)
        with torch.no_grad():
            tensors = quantise(base, spec)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        config = {**base.config.to_dict(), "architectures": ["LlamaForCausalLM"], "quantization_config": quantisation_config(spec)}
        write_json(folder / "config.json", config)
        model = adapted(base)
        if name == "sym-128":
            save_supernet(model, GPTQ / "supernet", "gptq", "gptq/sym-128")
        save_file(logits_of(model, tokens, cases, Elastic(model, 1)), folder / "logits.safetensors")
    write_json(GPTQ / "cases.json", {"tokens": tokens, "cases": [{"name": n, "choices": c} for n, c in cases]})
    # All-rank sub-networks of every width, which a merged base serves.
    widths = [(f"width-{w}", [RANKS[0], w, RANKS[0]]) for w in WIDTHS[1:]]
    make_sparse(dense, tokens, cases + widths)
    for file in [*GPTQ.rglob("*.safetensors"), *SPARSE.rglob("*.safetensors")]:
        file.chmod(0o644)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
