"""Tiny LLaMA GGUF files in every number format that lonas reads, and their values as gguf and transformers read them.

Usage: python make_gguf.py (writes gguf/ beside itself).

`plain.gguf` has one layer in each of F32, F16, BF16, Q8_0, Q4_0, Q4_1; `k.gguf` one in each of Q4_K and Q6_K, whose
rows need 256 values; `llama3.gguf` has LLaMA 3's factors of positions as a tensor, `linear.gguf` a factor. The golden values are gguf's own `dequantize`, with the rows of q and k put back by transformers.
"""

import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf.quants import dequantize, quantize
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM
from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

OUT = Path(__file__).parent / "gguf"
Type = gguf.GGMLQuantizationType
NAMES = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}
FILES = {
    "plain": dict(hidden=32, heads=4, kv_heads=2, head=8, inner=32, types=[Type.F32, Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q4_1], embedding=Type.Q8_0, tied=False),
    # Heads of 4 although 256 / 2 is 128: a file may say so with key_length.
    "llama3": dict(hidden=32, heads=2, kv_heads=1, head=16, inner=24, types=[Type.F32, Type.F32], embedding=Type.F32, tied=False,
        rope={"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}),
    "linear": dict(hidden=32, heads=2, kv_heads=1, head=16, inner=24, types=[Type.F32, Type.F32], embedding=Type.F32, tied=False,
        rope={"rope_type": "linear", "factor": 3.0}),
    "k": dict(hidden=256, heads=2, kv_heads=1, head=4, inner=8, types=[Type.Q4_K, Type.Q6_K], embedding=Type.Q6_K, tied=True),
}


def byte_alphabet():
    """GPT-2's characters for the 256 bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(others)) for b in range(256)]


def vocabulary(name):
    if name == "k":
        return ["<end>", *"abcdefghijklm", "ab", "abc"], ["a b", "ab c"]
    return ["<|start|>", "<|end|>", *byte_alphabet(), "th", "the", "Ġthe"], ["t h", "th e", "Ġ the"]


def interleaved(rows, heads):
    """llama.cpp's order of the rows of q and k (convert_hf_to_gguf's `permute`)."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def llama3_factors(rope, base, head):
    """What llama.cpp divides frequencies by (convert_hf_to_gguf's LlamaModel.generate_extra_tensors)."""
    factors = []
    for frequency in 1.0 / (base ** (np.arange(0, head, 2, dtype=np.float64) / head)):
        wave, positions = 2 * np.pi / frequency, rope["original_max_position_embeddings"]
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        if wave < positions / high:
            factors.append(1.0)
        elif wave > positions / low:
            factors.append(rope["factor"])
        else:
            smooth = (positions / wave - low) / (high - low)
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(factors, dtype=np.float32)


def k_blocks(random, rows, columns, kind):
    """Random blocks with scales that make weights of common size: gguf cannot quantise to K formats."""
    count = rows * columns // 256
    blocks = random.integers(0, 256, (count, {Type.Q4_K: 144, Type.Q6_K: 210}[kind]), dtype=np.uint8)
    scale = lambda size: random.uniform(0.2 * size, size, count).astype(np.float16).view(np.uint8).reshape(count, 2)
    if kind == Type.Q4_K:
        blocks[:, 0:2], blocks[:, 2:4] = scale(4e-4), scale(4e-3)
    else:
        blocks[:, 208:210] = scale(2e-5)
    return blocks.reshape(rows, -1)


def encoded(random, rows, columns, kind, heads=None):
    """`(what the file has, values in Hugging Face's order)`."""
    if columns % gguf.GGML_QUANT_SIZES[kind][0]:
        kind = Type.F16
    values = random.normal(0, 0.2, (rows, columns)).astype(np.float32)
    values = interleaved(values, heads) if heads else values
    data = k_blocks(random, rows, columns, kind) if kind in (Type.Q4_K, Type.Q6_K) else quantize(values, kind)
    golden = dequantize(data, kind).reshape(rows, columns).astype(np.float32)
    if heads:
        golden = LlamaTensorProcessor()._reverse_permute_weights(golden, heads)
    return data, kind, np.ascontiguousarray(golden)


def make(name, spec):
    random = np.random.default_rng(7)
    tokens, merges = vocabulary(name)
    writer = gguf.GGUFWriter(OUT / f"{name}.gguf", "llama")
    hidden, heads, kv_heads, head, inner = (spec[k] for k in ("hidden", "heads", "kv_heads", "head", "inner"))
    writer.add_block_count(len(spec["types"]))
    writer.add_context_length(128)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(5000.0)
    writer.add_layer_norm_rms_eps(3e-5)
    rope = spec.get("rope")
    if name == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm" if name == "plain" else "gpt-2")
    writer.add_token_list(tokens)
    types = [3 if t.startswith("<") and len(t) > 1 else 1 for t in tokens]
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1 if name == "plain" else 0)
    if name == "plain":
        writer.add_unk_token_id(0)
        writer.add_pad_token_id(1)
        writer.add_add_bos_token(True)
        writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    golden = {}

    def add(ours, theirs, rows, columns, kind, heads=None):
        data, kind, golden[ours] = encoded(random, rows, columns, kind, heads)
        writer.add_tensor(theirs, data, raw_dtype=kind)

    def add_norm(ours, theirs):
        golden[ours] = random.normal(1, 0.1, hidden).astype(np.float32)
        writer.add_tensor(theirs, golden[ours])

    add("model.embed_tokens.weight", "token_embd.weight", len(tokens), hidden, spec["embedding"])
    for layer, kind in enumerate(spec["types"]):
        sizes = {
            "attn_q": (heads * head, hidden, heads), "attn_k": (kv_heads * head, hidden, kv_heads), "attn_v": (kv_heads * head, hidden),
            "attn_output": (hidden, heads * head), "ffn_gate": (inner, hidden), "ffn_up": (inner, hidden), "ffn_down": (hidden, inner),
        }
        for theirs, ours in NAMES.items():
            ours, place = f"model.layers.{layer}.{ours}.weight", f"blk.{layer}.{theirs}.weight"
            if theirs.endswith("norm"):
                add_norm(ours, place)
            else:
                rows, columns, *of = sizes[theirs]
                add(ours, place, rows, columns, kind, *of)
    add_norm("model.norm.weight", "output_norm.weight")
    if not spec["tied"]:
        add("lm_head.weight", "output.weight", len(tokens), hidden, Type.F16)
    if name == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_factors(rope, 5000.0, head))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    # The whole file, read by transformers without us: what a sequence's logits are.
    model = AutoModelForCausalLM.from_pretrained(OUT, gguf_file=f"{name}.gguf", dtype=torch.float32).eval()
    for ours, values in golden.items():
        theirs = model.state_dict()[ours].numpy()
        assert np.array_equal(theirs, values), (ours, np.abs(theirs - values).max())
    sequence = [(7 * i + 3) % len(tokens) for i in range(48 if rope else 12)]
    if rope:
        # transformers does not read these from a GGUF: the same weights under a configuration that says so.
        config = model.config
        config.rope_parameters = {**rope, "rope_theta": 5000.0}
        scaled = AutoModelForCausalLM.from_config(config).eval()
        scaled.load_state_dict(model.state_dict())
        model = scaled
    with torch.no_grad():
        golden["logits"] = model(torch.tensor([sequence])).logits[0].numpy()
    save_file(golden, OUT / f"{name}.safetensors")
    (OUT / f"{name}.safetensors").chmod(0o644)
    facts = {
        "tokens": tokens, "types": types, "merges": merges, "formats": [t.name for t in spec["types"]],
        "hidden": hidden, "heads": heads, "kv_heads": kv_heads, "head": head, "inner": inner, "tied": spec["tied"],
        "sequence": sequence,
    }
    (OUT / f"{name}.json").write_text(json.dumps(facts, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    for name, spec in FILES.items():
        make(name, spec)
