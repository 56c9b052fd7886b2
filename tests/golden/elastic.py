"""Sub-networks in PyTorch, by explicit prefixes: the reference that lonas is compared with.

y = W[:o,:i] x + b[:o] + s * B[:o,:r] (A[:r,:i] x), s = alpha / r_config, on every Linear of a transformers LLaMA that
PEFT has wrapped. Nothing here is lonas's own code; the rules are those of LoNAS (NNCF's elastic width, PEFT's scale).
"""

import json

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear as LoraLinear
from safetensors.torch import save_file

RANK, WIDTH, MLP_RANK = 0, 1, 2


def of_layers(choices, layers):
    """The choices of each layer, which may be the same for all."""
    return choices if isinstance(choices[0], list) else [choices] * layers


def group_choices(layers, rank_choices, width_choices, mlp_rank_choices, head_choices=None):
    """Choices by group in LoNAS's order: ranks of q, k, v; MLP widths; ranks of gate, up; each layer by layer. Then heads, in rows of q."""
    lonas = [rank_choices] * layers + of_layers(width_choices, layers) + [mlp_rank_choices] * layers
    return lonas + (of_layers(head_choices, layers) if head_choices else [])


def supernet_groups(layers, rank_choices, width_choices, mlp_rank_choices, head_choices=None):
    def tensors(layer, modules, parts):
        return [f"model.layers.{layer}.{m}.{p}.weight" if p else f"model.layers.{layer}.{m}.weight" for m in modules for p in parts]

    qkv = [f"self_attn.{p}_proj" for p in "qkv"]
    mlp = ["mlp.gate_proj", "mlp.up_proj"]
    ranks = lambda modules, choices: [
        {"kind": "rank", "choices": choices, "members": tensors(l, modules, ["lora_A"]), "followers": tensors(l, modules, ["lora_B"])}
        for l in range(layers)
    ]
    widths = [
        {"kind": "width", "choices": of_layers(width_choices, layers)[l], "members": tensors(l, mlp, ["", "lora_B"]), "followers": tensors(l, ["mlp.down_proj"], ["", "lora_A"])}
        for l in range(layers)
    ]
    heads = [
        {"kind": "heads", "choices": of_layers(head_choices, layers)[l], "members": tensors(l, qkv, ["", "lora_B"]), "followers": tensors(l, ["self_attn.o_proj"], [""])}
        for l in range(layers if head_choices else 0)
    ]
    return ranks(qkv, rank_choices) + widths + ranks(mlp, mlp_rank_choices) + heads


class Elastic:
    """Replaces the forward of every wrapped Linear of `model` by the prefixes of the sub-network that is set."""

    def __init__(self, model, layers):
        self.layers = layers
        self.sizes = {}
        for name, module in model.named_modules():
            if name.endswith("o_proj") and not isinstance(module, LoraLinear):
                # Without an adapter, but it reads the heads.
                module.forward = lambda x, m=module: F.linear(x, m.weight[:, : x.shape[-1]], m.bias)
            if name.endswith("self_attn"):
                module.forward = self.attention_of(name, module, module.forward)
            if isinstance(module, LoraLinear):
                module.forward = self.forward_of(name, module)
                self.sizes[name] = (module.out_features, module.in_features, module.r["default"])
        self.full = dict(self.sizes)

    def set(self, choices):
        n = self.layers
        self.sizes = dict(self.full)
        for name, (out, inp, rank) in self.full.items():
            layer = int(name.split("layers.")[1].split(".")[0])
            qkv_rank, width, mlp_rank = choices[layer], choices[n + layer], choices[2 * n + layer]
            if name.endswith(("q_proj", "k_proj", "v_proj")):
                rank = qkv_rank
                if len(choices) > 3 * n:
                    # Keys and values keep the share that the queries keep.
                    queries = self.full[name[:-6] + "q_proj"][0]
                    out = out * choices[3 * n + layer] // queries
            elif name.endswith(("gate_proj", "up_proj")):
                out, rank = width, mlp_rank
            elif name.endswith("down_proj"):
                inp = width
            self.sizes[name] = (out, inp, rank)

    def attention_of(self, name, module, attend):
        def forward(hidden_states, **more):
            if self.sizes.get(name + ".q_proj", (1,))[0]:
                return attend(hidden_states, **more)
            # transformers cannot tell the size of no heads; what reads them has nothing but its bias to add.
            bias = module.o_proj.bias
            return torch.zeros_like(hidden_states) + (0 if bias is None else bias), None

        return forward

    def forward_of(self, name, module):
        def forward(x):
            o, i, r = self.sizes[name]
            base, s = module.base_layer, module.scaling["default"]
            bias = None if base.bias is None else base.bias[:o]
            a = module.lora_A["default"].weight[:r, :i]
            b = module.lora_B["default"].weight[:o, :r]
            return F.linear(x, base.weight[:o, :i], bias) + s * F.linear(F.linear(x, a), b)

        return forward


def three_and_random(groups, count, random):
    """maximal, heuristic, minimal and `count` random sub-networks, as (name, choices)."""
    named = [
        ("maximal", [g[0] for g in groups]),
        ("heuristic", [g[(len(g) - 1) // 2] for g in groups]),
        ("minimal", [g[-1] for g in groups]),
    ]
    return named + [(f"random{i}", [random.choice(g) for g in groups]) for i in range(count)]


def fill(model, seed, std):
    """Random weights large enough that a wrong prefix shows in the logits."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        with torch.no_grad():
            if "norm" in name.lower():
                p.copy_(1 + 0.2 * torch.randn(p.shape, generator=generator))
            else:
                p.copy_(std * torch.randn(p.shape, generator=generator))


def save_supernet(out, model, elastic, groups, tokens, chooser):
    """Fills the adapters of `model`, which PEFT has wrapped, and writes them with their search space as OUT/supernet; runs `tokens`
    through the maximal, heuristic, minimal and ten random sub-networks of `groups`, by `elastic(model)`, and writes their logits."""
    for i, (_, p) in enumerate(sorted((n, p) for n, p in model.named_parameters() if "lora_" in n)):
        generator = torch.Generator().manual_seed(100 + i)
        with torch.no_grad():
            p.copy_(0.15 * torch.randn(p.shape, generator=generator))
    folder, base = out / "supernet", f"tests/golden/{out.name}/base"
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    adapter = json.loads((folder / "adapter_config.json").read_text())
    adapter["base_model_name_or_path"] = base
    (folder / "adapter_config.json").write_text(json.dumps(adapter, indent=2))
    supernet = {"version": 1, "name": out.name, "base": {"source": {"path": base}}, "scale": 2.0, "groups": groups}
    (folder / "supernet.json").write_text(json.dumps(supernet) + "\n")

    plain = [model(torch.tensor([t])).logits[0].detach() for t in tokens]
    elastic = elastic(model)
    cases, tensors = [], {}
    for sub, choices in three_and_random([g["choices"] for g in groups], 10, chooser):
        elastic.set(choices)
        for i, t in enumerate(tokens):
            logits = model(torch.tensor([t])).logits[0].detach()
            if sub == "maximal":
                assert torch.allclose(logits, plain[i], atol=2e-4), (logits - plain[i]).abs().max()
            tensors[f"{sub}/{i}"] = logits.contiguous()
        cases.append({"name": sub, "choices": choices})
    save_file(tensors, out / "logits.safetensors")
    (out / "cases.json").write_text(json.dumps({"tokens": tokens, "cases": cases}) + "\n")
