"""Tiny BERT super-networks that classify, and the logits of thirteen sub-networks each. Usage: python make_bert.py (writes beside itself).

Prefixes by LoNAS's rules on every Linear of the encoder, those without an adapter too: heads are cut from query, key and value (and
so from the columns of attention.output.dense), channels from intermediate.dense (and the columns of output.dense). Everything else
is transformers' BertForSequenceClassification under PEFT, which also writes the adapters and their heads.
"""

import json
import random
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from safetensors.torch import save_file
from transformers import BertConfig, BertForSequenceClassification

from elastic import fill, three_and_random

HERE = Path(__file__).parent
LAYERS = 2
SELF, QKV = "attention.self.", ["query", "key", "value"]
SCALE = 2.0

BASES = {
    # As bert-base-uncased is published: old names of the norms' tensors, no classifier; and as an encoder alone, no `bert.` in front.
    "tiny-bert": dict(
        config=dict(hidden_size=40, intermediate_size=61, num_attention_heads=5, vocab_size=97, max_position_embeddings=32, hidden_act="gelu"),
        dtype=torch.float32, old=True,
    ),
    "tiny-bert-relu": dict(
        config=dict(hidden_size=36, intermediate_size=50, num_attention_heads=3, vocab_size=71, max_position_embeddings=24, hidden_act="relu", type_vocab_size=3,
                    id2label={"0": "entailment", "1": "neutral", "2": "contradiction"}, label2id={"entailment": 0, "neutral": 1, "contradiction": 2}),
        dtype=torch.bfloat16, old=False,
    ),
}

# Super-network: its base, what has adapters, what is saved whole beside the classifier (None: the base has one), its choices by layer.
NETS = {
    "tiny-bert": dict(
        base="tiny-bert", labels=2, seed=100, targets=["query", "value"], saved=[],
        heads=[[40, 24, 8], [40, 32, 16]], ranks=[8, 4, 2], widths=[[61, 43, 5], [61, 60, 17]],
    ),
    "tiny-bert-three": dict(
        base="tiny-bert", labels=3, seed=300, targets=["query", "key", "attention.output.dense", "intermediate.dense"], saved=["pooler"],
        heads=[[40, 8], [40, 16, 8]], ranks=[8, 5], widths=[[61, 31], [61, 33, 2]],
    ),
    # The base's own head; MLP channels in another order than the base's.
    "tiny-bert-relu": dict(
        base="tiny-bert-relu", labels=3, seed=500, targets=["value", "output.dense", "intermediate.dense"], saved=None,
        heads=[[36, 24, 12], [36, 12]], ranks=[8, 7, 1], widths=[[50, 37, 33, 3], [50, 49]], ordered=True,
    ),
}


def write_json(path, value):
    path.write_text(json.dumps(value) + "\n")


def base_config(name):
    return BertConfig(num_hidden_layers=LAYERS, **BASES[name]["config"])


def base_model(name, labels):
    """The base with a fresh head of so many labels, unless the base has one of that size already."""
    config = base_config(name)
    config.num_labels = labels
    model = BertForSequenceClassification._from_config(config, attn_implementation="eager").to(torch.float32)
    fill(model, seed=1, std=0.3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(BASES[name]["dtype"]).float())
    return model.eval()


def write_base(name):
    folder = HERE / name / "base"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    base_config(name).save_pretrained(folder)
    tensors = base_model(name, base_config(name).num_labels).state_dict()
    if BASES[name]["old"]:
        tensors = {k: v for k, v in tensors.items() if not k.startswith("classifier.")}
        old = lambda k: k.removeprefix("bert.").replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        tensors = {old(k): v for k, v in tensors.items()}
    save_file({k: v.to(BASES[name]["dtype"]).contiguous() for k, v in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})


def is_target(module, spec):
    return any(module == t or module.endswith("." + t) for t in spec["targets"])


def group_choices(spec):
    """Heads, ranks, widths, each layer by layer: LoNAS's order."""
    return spec["heads"] + [spec["ranks"]] * LAYERS + spec["widths"]


def groups(spec):
    def tensors(layer, modules, parts):
        path = f"bert.encoder.layer.{layer}."
        names = [(m, p) for m in modules for p in parts if p == "" or is_target(m, spec)]
        return [f"{path}{m}.{p}.weight" if p else f"{path}{m}.weight" for m, p in names]

    qkv = [SELF + m for m in QKV]
    ranked = [m for m in qkv + ["intermediate.dense"] if is_target(m, spec)]
    heads = [
        {"kind": "heads", "choices": spec["heads"][l], "members": tensors(l, qkv, ["", "lora_B"]), "followers": tensors(l, ["attention.output.dense"], ["", "lora_A"])}
        for l in range(LAYERS)
    ]
    ranks = [
        {"kind": "rank", "choices": spec["ranks"], "members": tensors(l, ranked, ["lora_A"]), "followers": tensors(l, ranked, ["lora_B"])}
        for l in range(LAYERS)
    ]
    widths = [
        {"kind": "width", "choices": spec["widths"][l], "members": tensors(l, ["intermediate.dense"], ["", "lora_B"]), "followers": tensors(l, ["output.dense"], ["", "lora_A"])}
        for l in range(LAYERS)
    ]
    return heads + ranks + widths


class Elastic:
    """Replaces the forward of every Linear of the encoder by the prefixes of the sub-network that is set."""

    def __init__(self, model, spec):
        self.spec, self.sizes = spec, {}
        for name, module in model.named_modules():
            is_linear = isinstance(module, LoraLinear) or (isinstance(module, torch.nn.Linear) and ".lora_" not in name and not name.endswith("base_layer"))
            if is_linear and "encoder.layer." in name:
                module.forward = self.forward_of(name, module)
                self.sizes[name] = (module.out_features, module.in_features)
        assert len(self.sizes) == 6 * LAYERS, self.sizes
        self.full = dict(self.sizes)

    def set(self, choices):
        self.ranks = {}
        for name, (out, inp) in self.full.items():
            layer = int(name.split("encoder.layer.")[1].split(".")[0])
            heads, rank, width = choices[layer], choices[LAYERS + layer], choices[2 * LAYERS + layer]
            self.ranks[name] = 8
            if name.endswith(tuple(QKV)):
                out, self.ranks[name] = heads, rank
            elif name.endswith("attention.output.dense"):
                inp = heads
            elif name.endswith("intermediate.dense"):
                out, self.ranks[name] = width, rank
            elif name.endswith("output.dense"):
                inp = width
            self.sizes[name] = (out, inp)

    def forward_of(self, name, module):
        def forward(x):
            (o, i), r = self.sizes[name], self.ranks[name]
            base = module.base_layer if isinstance(module, LoraLinear) else module
            y = F.linear(x, base.weight[:o, :i], base.bias[:o])
            if base is module:
                return y
            a = module.lora_A["default"].weight[:r, :i]
            b = module.lora_B["default"].weight[:o, :r]
            return y + SCALE * F.linear(F.linear(x, a), b)

        return forward


def permute(model, orders):
    """Row i of intermediate.dense and column i of output.dense, base and adapter, become row and column order[i]."""
    named = dict(model.named_modules())
    with torch.no_grad():
        for layer, order in orders.items():
            index = torch.tensor(order)
            path = f"base_model.model.bert.encoder.layer.{layer}."
            up, down = named[path + "intermediate.dense"], named[path + "output.dense"]
            up.base_layer.weight.copy_(up.base_layer.weight[index].clone())
            up.base_layer.bias.copy_(up.base_layer.bias[index].clone())
            up.lora_B["default"].weight.copy_(up.lora_B["default"].weight[index].clone())
            down.base_layer.weight.copy_(down.base_layer.weight[:, index].clone())
            down.lora_A["default"].weight.copy_(down.lora_A["default"].weight[:, index].clone())


def texts(chooser, config):
    """A text, a pair, a single token, and a pair as long as the positions reach; as (tokens, token types)."""
    token = lambda: chooser.randrange(config.vocab_size)
    pair = lambda a, b: ([token() for _ in range(a + b)], [0] * a + [1] * b)
    return [pair(9, 0), pair(5, 11), pair(1, 0), pair(config.max_position_embeddings - 3, 3)]


def make(name, spec):
    out, chooser = HERE / name, random.Random(name)
    for part in ("supernet", "logits.safetensors", "cases.json"):
        shutil.rmtree(out / part, ignore_errors=True)
    config = base_config(spec["base"])
    model = base_model(spec["base"], spec["labels"])
    kind = {} if spec["saved"] is None else dict(task_type="SEQ_CLS", modules_to_save=spec["saved"])
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=spec["targets"], lora_dropout=0.1, **kind)).eval()
    trained = sorted((n, p) for n, p in model.named_parameters() if "lora_" in n or "modules_to_save" in n)
    for i, (n, p) in enumerate(trained):
        generator = torch.Generator().manual_seed(spec["seed"] + i)
        with torch.no_grad():
            p.copy_((0.15 if "lora_" in n else 0.5) * torch.randn(p.shape, generator=generator))
    folder = out / "supernet"
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    # PEFT writes down where the base was on this machine.
    adapter = json.loads((folder / "adapter_config.json").read_text())
    adapter["base_model_name_or_path"] = f"tests/golden/{spec['base']}/base"
    (folder / "adapter_config.json").write_text(json.dumps(adapter, indent=2))
    supernet = {"version": 1, "name": name, "base": {"source": {"path": f"tests/golden/{spec['base']}/base"}}, "scale": SCALE, "groups": groups(spec)}
    inputs = texts(chooser, config)
    run = lambda tokens, types: model(input_ids=torch.tensor([tokens]), token_type_ids=torch.tensor([types])).logits[0].detach()
    plain = [run(*text) for text in inputs]
    if spec.get("ordered"):
        orders = {l: chooser.sample(range(config.intermediate_size), config.intermediate_size) for l in range(LAYERS)}
        supernet["orders"] = {str(2 * LAYERS + l): order for l, order in orders.items()}
        permute(model, orders)
    write_json(folder / "supernet.json", supernet)
    elastic = Elastic(model, spec)
    cases, tensors = [], {}
    for sub, choices in three_and_random(group_choices(spec), 10, chooser):
        elastic.set(choices)
        for i, text in enumerate(inputs):
            logits = run(*text)
            if sub == "maximal":
                assert torch.allclose(logits, plain[i], atol=2e-5), (logits - plain[i]).abs().max()
            tensors[f"{sub}/{i}"] = logits.contiguous()
        cases.append({"name": sub, "choices": choices})
    spread = torch.stack([torch.cat([tensors[f"{c['name']}/{i}"] for i in range(len(inputs))]) for c in cases]).std(dim=0)
    print(name, "spread over sub-networks", spread.min().item(), spread.max().item())
    save_file(tensors, out / "logits.safetensors")
    write_json(out / "cases.json", {"texts": [{"tokens": tokens, "token_types": types} for tokens, types in inputs], "cases": cases})


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in BASES:
        write_base(name)
    for name, spec in NETS.items():
        make(name, spec)
