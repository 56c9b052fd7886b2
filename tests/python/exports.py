"""Exports of the tiny super-networks, read back by other people's libraries: exports.py LONAS GOLDEN FOLDER.

LONAS is the program, GOLDEN is tests/golden, FOLDER an empty folder to work in. Every sub-network that PyTorch has
computed logits of is exported in every format that can hold it; gguf-py, safetensors and tokenizers read the result, a
LLaMA in numpy computes it.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
from plain_llama import logits
from safetensors import safe_open
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

LONAS, GOLDEN, FOLDER = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
NETS = [
    ("tiny-tied/base", "tiny-tied"),
    ("tiny-untied-bf16/base", "tiny-untied-bf16"),
    ("tiny-bias-headdim/base", "tiny-bias-headdim"),
    ("tiny-tied/base", "tiny-tied-ordered"),
    ("tiny-depth/base", "tiny-depth"),
    ("tiny-heads/base", "tiny-heads"),
    ("tiny-heads/base", "tiny-heads-ordered"),
]
GGUF_NAMES = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj", "token_embd": "model.embed_tokens", "output_norm": "model.norm",
    "output": "lm_head",
}
TEXTS = ["the cat", "<s>a  b</s> c\n", "1234 and", "I've seen"]


def prepare(base, net):
    """A model folder with every golden case in its catalog, on a copy of the base that has a tokenizer."""
    own = FOLDER / net
    shutil.copytree(GOLDEN / base, own / "base")
    shutil.copytree(GOLDEN / net / "supernet", own / "model")
    vocabulary = json.loads((own / "base/config.json").read_text())["vocab_size"]
    texts = ["<pad>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyzĠ", "th", "he"]
    texts += [chr(0x4E00 + i) for i in range(vocabulary - len(texts))]
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(texts)}, [("t", "h"), ("h", "e")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(texts[:3])
    tokenizer.save(str(own / "base/tokenizer.json"))
    (own / "base/tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    supernet = json.loads((own / "model/supernet.json").read_text())
    supernet["base"] = {"source": {"path": str(own / "base")}}
    (own / "model/supernet.json").write_text(json.dumps(supernet))
    cases = json.loads((GOLDEN / net / "cases.json").read_text())
    (own / "model/catalog.json").write_text(json.dumps(cases["cases"]))
    return own, supernet, cases


def export(own, case, kind, *more):
    """Where the export is, or what refused it."""
    out = own / f"{case['name']}-{kind}{'.gguf' if kind == 'gguf' else ''}"
    command = [LONAS, "export", own / "model", "--subnetwork", case["name"], "--format", kind, "--out", out, "--dtype", "f32", *more]
    ran = subprocess.run(command, capture_output=True, text=True)
    return (out, None) if ran.returncode == 0 else (None, ran.stderr)


def of_gguf(path):
    """Tensors under Hugging Face's names and sizes, as gguf-py reads them."""
    reader = gguf.GGUFReader(path)
    architecture = reader.fields["general.architecture"].contents()
    field = lambda name: reader.fields[f"{architecture}.{name}"].contents()
    tensors = {}
    for tensor in reader.tensors:
        parts = tensor.name.split(".")
        layer = f"model.layers.{parts[1]}." if parts[0] == "blk" else ""
        name = f"{layer}{GGUF_NAMES[parts[-2]]}.{parts[-1]}"
        tensors[name] = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(tuple(int(d) for d in reversed(tensor.shape)))
    sizes = {
        "layers": field("block_count"), "heads": field("attention.head_count"), "kv_heads": field("attention.head_count_kv"),
        "head": field("attention.key_length"), "eps": field("attention.layer_norm_rms_epsilon"), "theta": field("rope.freq_base"),
    }
    return reader, architecture, field("feed_forward_length"), tensors, sizes


def of_folder(path, config=None):
    """As above, of a Hugging Face folder of one or several files."""
    tensors = {}
    for name in path.glob("*.safetensors"):
        with safe_open(name, "np") as file:
            tensors.update({key: numbers(file, key, name) for key in file.keys()})
    config = json.loads((config or path / "config.json").read_text())
    heads = config["num_attention_heads"]
    sizes = {
        "layers": config["num_hidden_layers"], "heads": heads, "kv_heads": config["num_key_value_heads"],
        "head": config.get("head_dim") or config["hidden_size"] // heads, "eps": config["rms_norm_eps"], "theta": 10000.0,
    }
    return config, tensors, sizes


def numbers(file, key, path):
    """numpy has no bf16: its bits are the upper half of an f32's."""
    if file.get_slice(key).get_dtype() != "BF16":
        return file.get_tensor(key)
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    entry = json.loads(raw[8 : 8 + length])[key]
    start, end = (8 + length + offset for offset in entry["data_offsets"])
    return (np.frombuffer(raw[start:end], np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(entry["shape"])


def of_adapter(path, base):
    """The base's tensors with a PEFT adapter added, each module scaled by its own alpha / r, as PEFT does."""
    adapter = json.loads((path / "adapter_config.json").read_text())
    _, tensors, sizes = of_folder(base)
    _, halves, _ = of_folder(path, base / "config.json")
    for key in [k for k in halves if k.endswith("lora_A.weight")]:
        module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        a, b = halves[key], halves[key.replace("lora_A", "lora_B")]
        rank = adapter.get("rank_pattern", {}).get(module, adapter["r"])
        alpha = adapter.get("alpha_pattern", {}).get(module, adapter["lora_alpha"])
        assert a.shape[0] == b.shape[1] == rank, (module, a.shape, b.shape, rank)
        tensors[f"{module}.weight"] = tensors[f"{module}.weight"] + alpha / rank * (b.astype(np.float64) @ a)
    return tensors, sizes


def agree(what, golden, case, cases, tensors, sizes, neighbours):
    for i, tokens in enumerate(cases["tokens"]):
        expected = golden.get_tensor(f"{case['name']}/{i}")
        off = np.abs(logits(tensors, sizes, tokens, neighbours) - expected).max()
        assert off < 1e-4, f"{what} {case['name']} sequence {i}: off by {off}"


def check_gguf(own, case, cases, golden, widths, shares):
    out, refused = export(own, case, "gguf")
    assert out, refused
    reader, architecture, lengths, tensors, sizes = of_gguf(out)
    assert architecture == ("deci" if len(set(widths)) > 1 or len(set(shares)) > 1 else "llama"), architecture
    assert lengths == (widths if len(set(widths)) > 1 else widths[0]), lengths
    for key, whole in (("heads", "num_attention_heads"), ("kv_heads", "num_key_value_heads")):
        heads = [round(share * json.loads((own / "base/config.json").read_text())[whole]) for share in shares]
        assert sizes[key] == (heads if len(set(heads)) > 1 else heads[0]), sizes
    contents = lambda key: reader.fields[key].contents()
    tokenizer = json.loads((own / "base/tokenizer.json").read_text())
    by_id = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    assert contents("tokenizer.ggml.tokens") == by_id
    assert contents("tokenizer.ggml.merges") == ["t h", "h e"]
    assert contents("tokenizer.ggml.token_type")[:4] == [3, 3, 3, 1]
    assert (contents("tokenizer.ggml.pre"), contents("tokenizer.ggml.model")) == ("gpt-2", "gpt2")
    assert (contents("tokenizer.ggml.bos_token_id"), contents("tokenizer.ggml.eos_token_id")) == (1, 2)
    assert contents("lonas.choices") == case["choices"]
    agree("gguf", golden, case, cases, tensors, sizes, neighbours=True)


def check_folder(own, case, cases, golden, widths, shares):
    out, refused = export(own, case, "hf")
    if len(set(shares)) > 1 and len(set(widths)) == 1:
        assert refused and "key-value heads" in refused and "GGUF" in refused, refused
        return
    if len(set(widths)) > 1:
        assert refused and f"{max(widths)} in layers" in refused and "GGUF" in refused, refused
        return
    assert out, refused
    config, tensors, sizes = of_folder(out)
    assert config["intermediate_size"] == widths[0] and config["torch_dtype"] == "float32", config
    agree("hf", golden, case, cases, tensors, sizes, neighbours=False)
    ours, theirs = (Tokenizer.from_file(str(f / "tokenizer.json")) for f in (out, own / "base"))
    assert all(ours.encode(t).ids == theirs.encode(t).ids for t in TEXTS)


def check_adapter(own, case, cases, golden, is_cut):
    out, refused = export(own, case, "peft")
    if is_cut:
        assert refused and ("mlp.gate_proj" in refused or "self_attn.q_proj" in refused) and "group" in refused, refused
        return
    assert out, refused
    agree("peft", golden, case, cases, *of_adapter(out, own / "base"), neighbours=False)


def full_width(own, supernet):
    """PyTorch's cases cut a width wherever they cut a rank; a prefix of the ranks alone is computed here, from the files."""
    groups = supernet["groups"]
    choices = [g["choices"][-1 - i % 2] if g["kind"] == "rank" else g["choices"][0] for i, g in enumerate(groups)]
    case = {"name": "fewer-ranks", "choices": choices}
    catalog = json.loads((own / "model/catalog.json").read_text())
    (own / "model/catalog.json").write_text(json.dumps([*catalog, case]))
    out, refused = export(own, case, "peft")
    assert out, refused
    config, tensors, sizes = of_folder(own / "base")
    _, halves, _ = of_folder(own / "model", own / "base/config.json")
    rank_of = {m.removesuffix(".lora_A.weight"): c for g, c in zip(groups, choices) if g["kind"] == "rank" for m in g["members"]}
    for key in [k for k in halves if k.endswith("lora_A.weight")]:
        module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        r = rank_of.get(module, halves[key].shape[0])
        a, b = halves[key][:r], halves[key.replace("lora_A", "lora_B")][:, :r]
        tensors[f"{module}.weight"] = tensors[f"{module}.weight"] + supernet["scale"] * (b.astype(np.float64) @ a)
    tokens = [3, 5, 8, 4, 9]
    expected = logits(tensors, sizes, tokens, neighbours=False)
    exported = logits(*of_adapter(out, own / "base"), tokens, neighbours=False)
    assert np.abs(exported - expected).max() < 1e-4
    # The same function as a file for llama.cpp, whatever order the super-network's channels have.
    out, refused = export(own, case, "gguf")
    assert out, refused
    _, _, _, tensors, sizes = of_gguf(out)
    assert np.abs(logits(tensors, sizes, tokens, neighbours=True) - expected).max() < 1e-4


def check_formats(own, case):
    """Fewer bits: what gguf-py reads is near what f32 has, by the format's own steps."""
    whole = of_gguf(own / f"{case['name']}-gguf.gguf")[3]
    for dtype, step in [("f16", 2**-11), ("bf16", 2**-8), ("q8_0", 1 / 127)]:
        out = own / f"{dtype}.gguf"
        command = [LONAS, "export", own / "model", "--subnetwork", case["name"], "--format", "gguf", "--out", out, "--dtype", dtype]
        subprocess.run(command, check=True, capture_output=True)
        reader, _, _, tensors, _ = of_gguf(out)
        kinds = {t.tensor_type.name for t in reader.tensors if len(t.shape) > 1}
        # Rows that are not whole blocks of 32 fall back.
        blocks = any(t.shape[0] % 32 == 0 for t in reader.tensors if len(t.shape) > 1)
        assert kinds <= {dtype.upper(), "F16"} and (dtype.upper() in kinds or not blocks), kinds
        for name, values in tensors.items():
            off = np.abs(values - whole[name]).max()
            assert off <= step * np.abs(whole[name]).max(), (dtype, name, off)


def kept_layers(supernet, case):
    """Width and share of the heads of each layer that is not left out; whether anything but ranks is cut."""
    by_kind = lambda kind: [(c, g["choices"][0]) for c, g in zip(case["choices"], supernet["groups"]) if g["kind"] == kind]
    widths, heads = by_kind("width"), by_kind("heads")
    layers = [(width, h / full) for (width, _), (h, full) in zip(widths, heads or [(1, 1)] * len(widths))]
    return [layer for layer in layers if any(layer)], any(c != full for c, full in widths + heads)


def main():
    for base, net in NETS:
        own, supernet, cases = prepare(base, net)
        held = 0
        with safe_open(GOLDEN / net / "logits.safetensors", "np") as golden:
            for case in cases["cases"]:
                layers, is_cut = kept_layers(supernet, case)
                check_adapter(own, case, cases, golden, is_cut)
                if any(share == 0 or width == 0 for width, share in layers):
                    for kind in ("gguf", "hf"):
                        _, refused = export(own, case, kind)
                        assert refused and ("no attention" in refused or "no MLP" in refused), refused
                    continue
                held += 1
                widths, shares = zip(*layers)
                check_gguf(own, case, cases, golden, list(widths), list(shares))
                check_folder(own, case, cases, golden, list(widths), list(shares))
        assert held >= 3, f"{net}: only {held} cases can be exported"
        full_width(own, supernet)
        check_formats(own, cases["cases"][0])
        print(net, "checked")
    print("all checks passed")


main()
