#!/usr/bin/env python3
"""What the parts of a super-network are worth: four measurements of what may be left out, and of how to choose it.

    python importance.py MODEL_FOLDER BASE_FOLDER GGUF_FILE TRAINING_JSON... --part depth|seeds|ranks|heads
        [--items N] [--threads N] [--out FILE]

MODEL_FOLDER is models/smollm2-135m-commonsense or one like it, BASE_FOLDER/GGUF_FILE its base, TRAINING_JSON the two files ARC-Easy.json
and ARC-Challenge.json, of which 400 and 200 questions were kept from its training (see its README). Needs torch, transformers, gguf, safetensors.

    depth    each attention, MLP and layer left out alone; those that cost least together, against a uniform width of as many MACs
    seeds    widths by layer from errors that are measured once, without a search, against the uniform width of as many MACs
    ranks    the first ranks as trained, and in bases where they are the best: for the matrix, for its outputs; and in a random one
    heads    one key-value group left out with the queries that read it: the last in the base's order, in falling importance, in reverse

Losses are `answer/whole`: nats a token of the right answer, and of question and answer together. Where two networks are compared, the standard
error paired by question stands behind. What is chosen is chosen by other questions than are measured. f32 on the processor.
"""

import argparse
import json
import math
import random
import re
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

HELD_OUT, FOR_CHOOSING = (400, 200), 64  # of both files; of all together, those never measured
DEFAULT_ITEMS = {"depth": (32, 72), "seeds": (48, 96), "ranks": (32, 64), "heads": (24, 64)}  # to choose by, to measure
DIVERGENCE_ITEMS = 20  # fewer, as each layer takes a run of its own
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")  # whose ranks are elastic; down_proj keeps all
KINDS = {"layer": (*ATTENTION, "o_proj", *MLP, "down_proj"), "attention": (*ATTENTION, "o_proj"), "MLP": (*MLP, "down_proj")}
RANKS, SEED_RANK, SEED_WIDTHS = (24, 16, 8, 4), 24, (1152, 960, 768, 576)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_folder", type=Path)
    parser.add_argument("base_folder", type=Path)
    parser.add_argument("gguf_file", help="its name in BASE_FOLDER")
    parser.add_argument("training_json", type=Path, nargs=len(HELD_OUT))
    parser.add_argument("--part", choices=list(DEFAULT_ITEMS), required=True)
    parser.add_argument("--items", type=int, help="questions to measure, and to choose by at most")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="a file to add the tables to")
    return parser.parse_args()


def question_and_answer(item):
    """The short form, in which the super-network was trained."""
    body, labels = item["instruction"].rsplit("\n\nAnswer format:", 1)
    question, options = body.rsplit("\n\n", 1)
    labels = labels.strip().split("/")
    texts = re.fullmatch(" ".join(f"{label.capitalize()}:(.*?)" for label in labels), options.strip(), re.DOTALL).groups()
    return f"Question: {question.split('question:', 1)[1].strip()}\nAnswer:", f" {texts[labels.index(item['answer'])].strip()}"


def questions(args):
    """Tokens of questions and answers: held out, to choose by and to measure, and as many that were trained on."""
    tokenizer = AutoTokenizer.from_pretrained(args.base_folder, gguf_file=args.gguf_file)
    random.seed(7)
    held_out, trained_on = [], []
    for file, count in zip(args.training_json, HELD_OUT):
        items = json.loads(file.read_text())
        places = list(range(len(items)))
        random.shuffle(places)
        kept = set(places[:count])
        held_out += [items[i] for i in sorted(kept)]
        trained_on += [item for i, item in enumerate(items) if i not in kept]
    for items in (held_out, trained_on):
        random.Random(0).shuffle(items)
    choosing, measured = DEFAULT_ITEMS[args.part]
    measured = args.items or measured
    parts = {"choosing": held_out[: min(choosing, measured)], "measured": held_out[FOR_CHOOSING:][:measured], "trained_on": trained_on[:measured]}
    encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
    return SimpleNamespace(**{name: [tuple(map(encode, question_and_answer(item))) for item in part] for name, part in parts.items()})


def batches(tokens, size=24):
    """Questions of like length together, padded on the right, where nothing of the question sees it."""
    places, made = sorted(range(len(tokens)), key=lambda i: sum(map(len, tokens[i]))), []
    for chunk in (places[start : start + size] for start in range(0, len(places), size)):
        ids = pad_sequence([torch.tensor(tokens[i][0] + tokens[i][1]) for i in chunk], batch_first=True, padding_value=-1)
        asked = torch.tensor([[len(tokens[i][0])] for i in chunk])
        answer = (ids >= 0) & (torch.arange(ids.shape[1]) >= asked)
        made.append(SimpleNamespace(ids=ids.clamp(min=0), valid=ids >= 0, answer=answer, places=torch.tensor(chunk)))
    return made


def load(args):
    """A network is a list of layers, a layer its tensors by name. A sub-network has smaller tensors, or lacks some."""
    base = AutoModelForCausalLM.from_pretrained(args.base_folder, gguf_file=args.gguf_file, dtype=torch.float32)
    tensors, config, layers = base.state_dict(), base.config, [{} for _ in base.model.layers]
    for name, tensor in (tensors | load_file(args.model_folder / "adapter_model.safetensors")).items():
        if found := re.fullmatch(r"(?:base_model\.model\.)?model\.layers\.(\d+)\.(?:self_attn\.|mlp\.)?(.+)\.weight", name):
            layers[int(found[1])][found[2]] = tensor.float()
    supernet = json.loads((args.model_folder / "supernet.json").read_text())
    groups = {int(group["members"][0].split(".")[2]): (number, group) for number, group in enumerate(supernet["groups"]) if group["kind"] == "width"}
    layers = cut(layers, channels=[torch.tensor(supernet["orders"][str(groups[place][0])]) for place in range(len(layers))])
    head_size = config.hidden_size // config.num_attention_heads
    angles = torch.outer(torch.arange(512), config.rope_parameters["rope_theta"] ** (-torch.arange(0, head_size, 2) / head_size)).repeat(1, 2)
    return SimpleNamespace(
        layers=layers, widths=groups[0][1]["choices"], scale=supernet["scale"], groups=config.num_key_value_heads, head_size=head_size,
        embedding=tensors["model.embed_tokens.weight"], norm=tensors["model.norm.weight"], head=tensors["lm_head.weight"],
        epsilon=config.rms_norm_eps, cos=angles.cos(), sin=angles.sin(),
    )


def cut(layers, rank=None, channels=None):
    """The first ranks of what is elastic in them, and by layer these channels of the MLP, which may be all in another order."""
    made = [dict(layer) for layer in layers]
    for layer, which in zip(made, channels or [slice(None)] * len(layers)):
        for name in (*ATTENTION, *MLP):
            layer[f"{name}.lora_A"], layer[f"{name}.lora_B"] = layer[f"{name}.lora_A"][:rank], layer[f"{name}.lora_B"][:, :rank]
        for name in MLP:
            layer[name], layer[f"{name}.lora_B"] = layer[name][which], layer[f"{name}.lora_B"][which]
        layer["down_proj"], layer["down_proj.lora_A"] = layer["down_proj"][:, which], layer["down_proj.lora_A"][:, which]
    return made


def with_widths(layers, widths):
    return cut(layers, channels=[slice(width) for width in widths])


def merged(model, layers):
    """With the adapters added to the Linears."""
    added = lambda layer, name: model.scale * (layer[f"{name}.lora_B"] @ layer[f"{name}.lora_A"]) if f"{name}.lora_A" in layer else 0
    return [{name: tensor + added(layer, name) for name, tensor in layer.items() if ".lora" not in name} for layer in layers]


def macs(model, layers):
    """Multiplications a token in all Linears, adapters and the head; what attention does with keys and values comes on top."""
    return model.head.numel() + sum(tensor.numel() for layer in layers for tensor in layer.values() if tensor.dim() == 2)


def normed(model, hidden, weight):
    return F.rms_norm(hidden, weight.shape, weight, model.epsilon)


def attended(model, layer, hidden):
    """What the heads give, before o_proj."""
    x = normed(model, hidden, layer["input_layernorm"])
    q, k, v = (F.linear(x, layer[name]).unflatten(-1, (-1, model.head_size)).transpose(1, 2) for name in ATTENTION)
    cos, sin, half = model.cos[: x.shape[1]], model.sin[: x.shape[1]], model.head_size // 2
    q, k = (heads * cos + torch.cat([-heads[..., half:], heads[..., :half]], -1) * sin for heads in (q, k))
    k, v = (heads.repeat_interleave(q.shape[1] // k.shape[1], 1) for heads in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


def flows(model, layers, batch):
    """Layer by layer: what attention reads, what the heads give, what the MLP reads, what its channels give, and the layer's output."""
    hidden = F.embedding(batch.ids, model.embedding)
    for place, layer in enumerate(merged(model, layers)):
        flow = SimpleNamespace(input=hidden)
        if "o_proj" in layer:
            flow.heads = attended(model, layer, hidden)
            hidden = hidden + F.linear(flow.heads, layer["o_proj"])
        flow.between = hidden
        if "down_proj" in layer:
            x = normed(model, hidden, layer["post_attention_layernorm"])
            flow.channels = F.silu(F.linear(x, layer["gate_proj"])) * F.linear(x, layer["up_proj"])
            hidden = hidden + F.linear(flow.channels, layer["down_proj"])
        flow.output = hidden
        yield place, layer, flow


def log_probabilities(model, layers, batch):
    """Of each next token, by 256 tokens, as each token has a number for every word of the vocabulary."""
    for *_, flow in flows(model, layers, batch):
        hidden = flow.output
    x = normed(model, hidden[:, :-1][batch.valid[:, 1:]], model.norm)
    return (F.linear(part, model.head).log_softmax(-1) for part in x.split(256))


def measure(model, layers, asked):
    """By question: nats and number of the answer's tokens, then of all."""
    losses, layers = torch.zeros(sum(len(batch.places) for batch in asked), 4), merged(model, layers)
    for batch in asked:
        predicted, answer = batch.valid[:, 1:], batch.answer[:, 1:]
        parts = zip(log_probabilities(model, layers, batch), batch.ids[:, 1:][predicted].split(256))
        nats = torch.zeros(predicted.shape)
        nats[predicted] = torch.cat([F.nll_loss(part, right, reduction="none") for part, right in parts])
        losses[batch.places] = torch.stack([(nats * answer).sum(1), answer.sum(1).float(), nats.sum(1), predicted.sum(1).float()], 1)
    return losses


def said(losses):
    answer, answer_tokens, whole, tokens = losses.sum(0).tolist()
    return f"{answer / answer_tokens:.3f}/{whole / tokens:.3f}"


def more(losses, than):
    """By how much more, with the standard error of a ratio of two sums over the same questions."""
    parts = []
    for nats, tokens in ((0, 1), (2, 3)):
        difference, count = losses[:, nats] - than[:, nats], losses[:, tokens]
        mean = difference.sum() / count.sum()
        parts.append(f"{mean:+.3f} ± {(difference - mean * count).norm() / count.sum():.3f}")
    return " / ".join(parts)


def row(*cells):
    return f"| {' | '.join(map(str, cells))} |"


def header(*names):
    return row(*names) + "\n|" + "---|" * len(names)


def without(layers, kind, places):
    left = lambda layer: {name: tensor for name, tensor in layer.items() if name.split(".")[0] not in KINDS[kind]}
    return [left(layer) if place in places else layer for place, layer in enumerate(layers)]


def depth(model, data):
    layers, choosing, measured = model.layers, batches(data.choosing), batches(data.measured)
    maximal, full, whole, alone = macs(model, layers), model.widths[0], measure(model, layers, choosing), {kind: [] for kind in KINDS}
    yield f"### Depth, one left out ({len(data.choosing)} questions; nothing left out: {said(whole)})\n"
    yield header("of layer", *(f"without {kind}" for kind in KINDS))
    for place in range(len(layers)):
        losses = [measure(model, without(layers, kind, [place]), choosing) for kind in KINDS]
        for kind, loss in zip(KINDS, losses):
            alone[kind].append(loss[:, 2].sum().item())
        yield row(place, *(more(loss, whole) for loss in losses))
    yield (f"\n### Depth, several left out ({len(data.measured)} questions; nothing left out: {said(measure(model, layers, measured))}): "
           f"those that alone cost the {len(data.choosing)} others least\n")
    yield header("left out", "of layers", "MACs saved", "answer/whole", "uniform width", "answer/whole", "left out more than uniform")
    uniform = lambda width: with_widths(layers, [width] * len(layers))
    for kind in KINDS:
        for count in (1, 2, 4, 6, 8) if kind == "layer" else (2, 4, 8):
            places = sorted(range(len(layers)), key=lambda place: alone[kind][place])[:count]
            shallow = without(layers, kind, places)
            saved = maximal - macs(model, shallow)
            # A width between the choices is a prefix too, and then the MACs are the same to half a channel in each layer.
            width = full - round(saved / (maximal - macs(model, uniform(full - 1))))
            losses, other = measure(model, shallow, measured), measure(model, uniform(width), measured)
            yield row(f"{count} {kind}", " ".join(map(str, places)), f"{100 * saved / maximal:.1f} %", said(losses), width, said(other), more(losses, other))


def removed_errors(model, asked):
    """By layer and width: the square of what the cut channels add to the layer's output, relative to the output's, summed over tokens."""
    errors = torch.zeros(len(model.layers), len(model.widths))
    for batch in asked:
        for place, layer, flow in flows(model, model.layers, batch):
            values, size, removed = flow.channels[batch.valid], flow.output[batch.valid].pow(2).sum(1), 0
            for choice, (wider, width) in enumerate(zip(model.widths, model.widths[1:]), 1):
                removed = removed + F.linear(values[:, width:wider], layer["down_proj"][:, width:wider])
                errors[place, choice] += (removed.pow(2).sum(1) / size).sum()
    return errors


def divergences(model, asked):
    """By layer: the Kullback-Leibler divergence a token from the maximal network, when only this layer's MLP has the least width."""
    layers, sums, tokens = model.layers, torch.zeros(len(model.layers)), 0
    for batch in asked:
        maximal = list(log_probabilities(model, layers, batch))
        tokens += sum(map(len, maximal))
        for place in range(len(layers)):
            narrow = layers[:place] + with_widths(layers[place : place + 1], model.widths[-1:]) + layers[place + 1 :]
            parts = zip(log_probabilities(model, narrow, batch), maximal)
            sums[place] += sum(F.kl_div(part, right, log_target=True, reduction="sum") for part, right in parts)
    return sums / tokens


def allocation(errors, widths, total):
    """The widths by layer with the least sum of errors of all that are `total` together: for each sum over the layers so far, the best goes on."""
    best = {0: (0.0, [])}
    for layer in errors.tolist():
        following = {}
        for used, (error, chosen) in best.items():
            for width, added in zip(widths, layer):
                if used + width <= total and error + added < following.get(used + width, (math.inf,))[0]:
                    following[used + width] = (error + added, chosen + [width])
        best = following
    return best[total][1]


def seeds(model, data):
    few, widths, unit = data.choosing[:DIVERGENCE_ITEMS], model.widths, math.gcd(*model.widths)
    errors, divergence, measured = removed_errors(model, batches(data.choosing)), divergences(model, batches(few)), batches(data.measured)
    # The divergence says what a layer's least width costs, the error how much of that the widths between cost.
    methods = {"error": errors, "divergence": divergence[:, None] * errors / errors[:, -1:]}
    yield (f"### Seeds, rank {SEED_RANK} ({len(data.measured)} questions; errors by {len(data.choosing)} others, divergences by {len(few)} of those)\n\n"
           f"Divergence when layer 0, 1, ... alone has width {widths[-1]}: {' '.join(f'{d:.3f}' for d in divergence.tolist())}\n")
    yield header("mean width", "MACs", "widths by", f"widths / {unit}", "answer/whole", "more than uniform")
    layers = cut(model.layers, SEED_RANK)
    for target in SEED_WIDTHS:
        allocations = {"uniform": [target] * len(layers)} | {name: allocation(e, widths, target * len(layers)) for name, e in methods.items()}
        for name, chosen in allocations.items():
            network = with_widths(layers, chosen)
            losses = measure(model, network, measured)
            uniform = losses if name == "uniform" else uniform
            share, units = 100 * macs(model, network) / macs(model, model.layers), " ".join(str(width // unit) for width in chosen)
            yield row(target, f"{share:.1f} %", name, units, said(losses), "" if name == "uniform" else more(losses, uniform))


def principal(b, a, covariance):
    """The first ranks are nearest to B A x for the x of this covariance: the principal components of the outputs."""
    q_b, r_b = torch.linalg.qr(b)
    u = q_b @ torch.linalg.eigh(r_b @ (a @ covariance @ a.T) @ r_b.T)[1].flip(1)
    return u, u.T @ b @ a


def mixed(b, a, covariance):
    """Ranks in no order, as where all were trained at once."""
    turn = torch.linalg.qr(torch.randn(len(a), len(a), dtype=torch.float64))[0]
    return b @ turn.T, turn @ a


def in_basis(layers, change, sums):
    """The same matrices B A from other B and A."""
    made = [dict(layer) for layer in layers]
    for layer, (attention, mlp) in zip(made, sums):
        for name in (*ATTENTION, *MLP):
            b, a = change(layer[f"{name}.lora_B"].double(), layer[f"{name}.lora_A"].double(), (mlp if name in MLP else attention).double())
            layer[f"{name}.lora_B"], layer[f"{name}.lora_A"] = b.float(), a.float()
    return made


def ranks(model, data):
    sums = [[0, 0] for _ in model.layers]  # of x xᵀ over tokens, where x is what attention reads and what the MLP reads
    for batch in batches(data.choosing):
        for place, layer, flow in flows(model, model.layers, batch):
            for number, (x, norm) in enumerate(((flow.input, "input_layernorm"), (flow.between, "post_attention_layernorm"))):
                x = normed(model, x[batch.valid], layer[norm])
                sums[place][number] = sums[place][number] + x.T @ x
    torch.manual_seed(1)
    # The singular values of a matrix are the principal components of its outputs for inputs that vary alike in all directions.
    by_matrix = lambda b, a, covariance: principal(b, a, torch.eye(len(covariance), dtype=torch.float64))
    changes = {"singular values": by_matrix, "activations": principal, "mixed": mixed}
    bases = {"as trained": model.layers} | {name: in_basis(model.layers, change, sums) for name, change in changes.items()}
    for kind, tokens in (("questions trained on", data.trained_on), ("held-out questions", data.measured)):
        asked = batches(tokens)
        every, none = (said(measure(model, cut(model.layers, rank), asked)) for rank in (None, 0))
        yield (f"### Ranks of q, k, v, gate and up ({len(tokens)} {kind}; activations by {len(data.choosing)} others, held out)\n\n"
               f"With all ranks {every}, with none but down's {none}.\n")
        yield header("basis", *(f"first {rank}, more than as trained" for rank in RANKS))
        for name, layers in bases.items():
            losses = [measure(model, cut(layers, rank), asked) for rank in RANKS]
            trained = losses if name == "as trained" else trained
            yield row(name, *(said(l) if name == "as trained" else f"{said(l)}, {more(l, t)}" for l, t in zip(losses, trained)))
        yield ""


def falling_importance(products):
    """Last the group without which the output changes least, before it the one that costs least to leave out with it, and so on."""
    gone = []
    while len(gone) < len(products):
        rest = [group for group in range(len(products)) if group not in gone]
        gone.append(min(rest, key=lambda group: products[gone + [group]][:, gone + [group]].sum().item()))
    return gone[::-1]


def scores(model, layers, asked):
    """Sums over tokens of products of what two groups add to attention's output; and relative to the residual's square, to compare layers by."""
    raw, relative = torch.zeros(2, len(layers), model.groups, model.groups)
    for batch in asked:
        for place, layer, flow in flows(model, layers, batch):
            parts = zip(flow.heads[batch.valid].chunk(model.groups, 1), layer["o_proj"].chunk(model.groups, 1))
            added = torch.stack([F.linear(heads, columns) for heads, columns in parts])
            for sums, x in ((raw, added), (relative, added / flow.between[batch.valid].norm(dim=1)[:, None])):
                sums[place] += torch.einsum("atd,btd->ab", x, x)
    return raw, relative


def with_groups(layer, kept, groups):
    pick = lambda name, axis: torch.cat([layer[name].chunk(groups, axis)[group] for group in sorted(kept)], axis)
    return layer | {name: pick(name, 0) for name in ATTENTION} | {"o_proj": pick("o_proj", 1)}


def heads(model, data):
    measured, places, groups = batches(data.measured), range(len(model.layers)), model.groups
    yield (f"### Heads, {groups - 1} of {groups} key-value groups ({len(data.measured)} questions; scored by {len(data.choosing)} others)\n\n"
           "The cheapest half are the layers where the last group of the order adds least: others for each order.\n")
    yield header("network", "layers cut", "order", "answer/whole", "more than whole", "more than natural")
    base = [{name: tensor for name, tensor in layer.items() if ".lora" not in name} for layer in model.layers]
    for network, layers in (("base", base), ("trained", merged(model, model.layers))):
        raw, relative = scores(model, layers, batches(data.choosing))
        scored, whole = [falling_importance(products) for products in raw], measure(model, layers, measured)
        yield row(network, "none", "", said(whole), "", "")
        orders = {"natural": [list(range(groups))] * len(layers), "scored": scored, "reversed": [order[::-1] for order in scored]}
        for which, count in (("all", len(layers)), ("cheapest half", len(layers) // 2)):
            for name, order in orders.items():
                cheapest = sorted(places, key=lambda p: relative[p, order[p][-1], order[p][-1]].item())[:count]
                narrow = [with_groups(layers[p], order[p][:-1], groups) if p in cheapest else layers[p] for p in places]
                losses = measure(model, narrow, measured)
                natural = losses if name == "natural" else natural
                yield row(network, which, name, said(losses), more(losses, whole), "" if name == "natural" else more(losses, natural))


if __name__ == "__main__":
    args = arguments()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    for line in {"depth": depth, "seeds": seeds, "ranks": ranks, "heads": heads}[args.part](load(args), questions(args)):
        print(line, flush=True)
        if args.out:
            with args.out.open("a") as out:
                print(line, file=out)
