"""Tiny MPT super-networks and the logits of thirteen sub-networks each. Usage: python make_mpt.py (writes beside itself).

transformers' MPT has queries, keys and values in one Linear, `Wqkv`; Shears splits it, so that each has an adapter. Here they are split
in memory; one base is saved as transformers has it, the other as Shears' preprocessing leaves it.
"""

import random
import shutil
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import MptConfig, MptForCausalLM

from elastic import Elastic, fill, save_supernet

HERE = Path(__file__).parent
QKV = ["q_proj", "k_proj", "v_proj"]
# Six heads are no power of two, which ALiBi treats apart.
MODELS = {
    "tiny-mpt": dict(
        config=dict(d_model=36, n_layers=3, n_heads=6, vocab_size=71, expansion_ratio=4), ranks=[8, 6, 3], widths=[144, 113, 72, 31],
        dtype=torch.float32, split=False,
    ),
    "tiny-mpt-split": dict(
        config=dict(d_model=40, n_layers=2, n_heads=4, vocab_size=53, tie_word_embeddings=False), ranks=[8, 7, 1],
        widths=[160, 96, 40], dtype=torch.bfloat16, split=True,
    ),
}


class Apart(nn.Module):
    """In the place of `Wqkv`: the three Linears that now stand beside it."""

    def __init__(self, attention):
        super().__init__()
        self.attention = [attention]  # In a list, so that it is no module of this one.

    def forward(self, x):
        return torch.cat([getattr(self.attention[0], name)(x) for name in QKV], dim=-1)


def split(model):
    for block in model.transformer.blocks:
        weights = block.attn.Wqkv.weight.detach().chunk(3)
        for name, weight in zip(QKV, weights):
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            linear.weight = nn.Parameter(weight.clone())
            setattr(block.attn, name, linear)
        block.attn.Wqkv = Apart(block.attn)


def save_split(folder):
    """As Shears/mpt_process/split_qkv_preprocess.py does."""
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if name.endswith("Wqkv.weight"):
            parts = zip(QKV, tensor.chunk(3))
            tensors.update({name.replace("Wqkv", part): rows.clone() for part, rows in parts})
        else:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


class MptElastic(Elastic):
    """Groups in Shears' order, with MLP widths between: ranks of q, k, v and out, widths, ranks of up and down, each layer by layer."""

    def set(self, choices):
        n = self.layers
        self.sizes = dict(self.full)
        for name, (out, inp, rank) in self.full.items():
            layer = int(name.split(".blocks.")[1].split(".")[0])
            rank = choices[layer] if ".attn." in name else choices[2 * n + layer]
            if name.endswith("up_proj"):
                out = choices[n + layer]
            elif name.endswith("down_proj"):
                inp = choices[n + layer]
            self.sizes[name] = (out, inp, rank)


def groups_of(layers, ranks, widths):
    def path(layer, module):
        return f"transformer.blocks.{layer}.{module}"

    def rank(layer, modules):
        parts = [[f"{path(layer, m)}.lora_{part}.weight" for m in modules] for part in "AB"]
        return {"kind": "rank", "choices": ranks, "members": parts[0], "followers": parts[1]}

    def width(layer):
        up, down = path(layer, "ffn.up_proj"), path(layer, "ffn.down_proj")
        members, followers = [f"{up}.weight", f"{up}.lora_B.weight"], [f"{down}.weight", f"{down}.lora_A.weight"]
        return {"kind": "width", "choices": widths, "members": members, "followers": followers}

    all_layers = range(layers)
    return (
        [rank(l, [f"attn.{m}" for m in [*QKV, "out_proj"]]) for l in all_layers]
        + [width(l) for l in all_layers]
        + [rank(l, ["ffn.up_proj", "ffn.down_proj"]) for l in all_layers]
    )


def make(name, spec):
    out = HERE / name
    chooser = random.Random(name)
    shutil.rmtree(out, ignore_errors=True)
    config = MptConfig(bos_token_id=1, eos_token_id=2, **spec["config"])
    base = MptForCausalLM(config).to(torch.float32)
    fill(base, seed=1, std=0.35)
    base.to(spec["dtype"]).save_pretrained(out / "base")
    base = MptForCausalLM.from_pretrained(out / "base", dtype=torch.float32).eval()
    tokens = [[chooser.randrange(3, config.vocab_size) for _ in range(n)] for n in (23, 1, 9)]
    whole = base(torch.tensor([tokens[0]])).logits.detach()
    split(base)
    assert torch.allclose(base(torch.tensor([tokens[0]])).logits, whole, atol=2e-4)
    if spec["split"]:
        save_split(out / "base")

    targets = [*QKV, "out_proj", "up_proj", "down_proj"]
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM")).eval()
    groups = groups_of(config.n_layers, spec["ranks"], spec["widths"])
    save_supernet(out, model, lambda model: MptElastic(model, config.n_layers), groups, tokens, chooser)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, spec in MODELS.items():
        make(name, spec)
