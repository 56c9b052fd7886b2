"""Tiny BLOOM super-networks and the logits of thirteen sub-networks each. Usage: python make_bloom.py (writes beside itself)."""

import random
import shutil
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import BloomConfig, BloomForCausalLM

from elastic import Elastic, fill, save_supernet

HERE = Path(__file__).parent
TARGETS = ["query_key_value", "dense_h_to_4h", "dense_4h_to_h"]
# Six heads are no power of two, which ALiBi treats apart; the second model adds to the norm's output and has a head of its own.
MODELS = {
    "tiny-bloom": dict(
        config=dict(hidden_size=36, n_layer=3, n_head=6, vocab_size=71), ranks=[8, 6, 3], widths=[144, 113, 72, 31], dtype=torch.float32
    ),
    "tiny-bloom-post": dict(
        config=dict(hidden_size=40, n_layer=2, n_head=4, vocab_size=53, apply_residual_connection_post_layernorm=True, tie_word_embeddings=False),
        ranks=[8, 7, 1], widths=[160, 128, 40], dtype=torch.bfloat16,
    ),
}


class BloomElastic(Elastic):
    """Groups in LoNAS's order: ranks of query_key_value, MLP widths, ranks of dense_h_to_4h, each layer by layer."""

    def set(self, choices):
        n = self.layers
        self.sizes = dict(self.full)
        for name, (out, inp, rank) in self.full.items():
            layer = int(name.split(".h.")[1].split(".")[0])
            if name.endswith("query_key_value"):
                rank = choices[layer]
            elif name.endswith("dense_h_to_4h"):
                out, rank = choices[n + layer], choices[2 * n + layer]
            elif name.endswith("dense_4h_to_h"):
                inp = choices[n + layer]
            self.sizes[name] = (out, inp, rank)


def groups_of(layers, ranks, widths):
    def group(kind, choices, members, followers):
        return {"kind": kind, "choices": choices, "members": members, "followers": followers}

    def rank(layer, module):
        path = f"transformer.h.{layer}.{module}"
        return group("rank", ranks, [f"{path}.lora_A.weight"], [f"{path}.lora_B.weight"])

    def width(layer):
        up, down = (f"transformer.h.{layer}.mlp.{m}" for m in ("dense_h_to_4h", "dense_4h_to_h"))
        return group("width", widths, [f"{up}.weight", f"{up}.lora_B.weight"], [f"{down}.weight", f"{down}.lora_A.weight"])

    all_layers = range(layers)
    return (
        [rank(l, "self_attention.query_key_value") for l in all_layers]
        + [width(l) for l in all_layers]
        + [rank(l, "mlp.dense_h_to_4h") for l in all_layers]
    )


def make(name, spec):
    out = HERE / name
    chooser = random.Random(name)
    shutil.rmtree(out, ignore_errors=True)
    config = BloomConfig(bos_token_id=1, eos_token_id=2, **spec["config"])
    base = BloomForCausalLM(config).to(torch.float32)
    fill(base, seed=1, std=0.35)
    base.to(spec["dtype"]).save_pretrained(out / "base")
    base = BloomForCausalLM.from_pretrained(out / "base", dtype=torch.float32).eval()
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS)).eval()
    tokens = [[chooser.randrange(3, config.vocab_size) for _ in range(n)] for n in (23, 1, 9)]
    groups = groups_of(config.n_layer, spec["ranks"], spec["widths"])
    save_supernet(out, model, lambda model: BloomElastic(model, config.n_layer), groups, tokens, chooser)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, spec in MODELS.items():
        make(name, spec)
