#!/usr/bin/env python3
"""Writes a random rank-32 LoRA for SmolLM2-135M as llama.cpp reads it.

    random_lora.py OUT.gguf

The modules are those that lonas' default super-adapter targets. f16, llama.cpp's usual format for adapters: as many
bytes as lonas' adapter has. What an adapter computes has no influence on how long it takes.
"""

import sys

import gguf
import numpy as np

RANK = 32
LAYERS = 30
HIDDEN, MLP, KEYS = 576, 1536, 192
# By llama.cpp's name: inputs, outputs.
MODULES = {
    "attn_q": (HIDDEN, HIDDEN),
    "attn_k": (HIDDEN, KEYS),
    "attn_v": (HIDDEN, KEYS),
    "ffn_gate": (HIDDEN, MLP),
    "ffn_up": (HIDDEN, MLP),
    "ffn_down": (MLP, HIDDEN),
}


def main() -> None:
    writer = gguf.GGUFWriter(sys.argv[1], "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 2.0 * RANK)
    random = np.random.default_rng(0)
    for layer in range(LAYERS):
        for module, (inputs, outputs) in MODULES.items():
            a = random.standard_normal((RANK, inputs)) * 0.02
            b = random.standard_normal((outputs, RANK)) * 0.002
            name = f"blk.{layer}.{module}.weight"
            writer.add_tensor(f"{name}.lora_a", a.astype(np.float16))
            writer.add_tensor(f"{name}.lora_b", b.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
