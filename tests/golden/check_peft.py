"""Loads a super-adapter that lonas wrote into Python PEFT, unchanged, and compares logits.

Usage: python check_peft.py BASE_FOLDER ADAPTER_FOLDER [LOGITS]

BASE_FOLDER is a Hugging Face folder. LOGITS, a safetensors file, has `tokens` (n, i32 or i64) and `logits` (n, V), the
maximal sub-network's as lonas computes them; without it the script only shows that the adapter loads and acts.
"""

import sys

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import LlamaForCausalLM


def main(base_folder, adapter_folder, logits_file=None):
    torch.set_num_threads(1)
    base = LlamaForCausalLM.from_pretrained(base_folder, dtype=torch.float32).eval()
    expected = load_file(logits_file) if logits_file else {}
    tokens = expected.get("tokens", torch.arange(3, 15)).long().unsqueeze(0)
    with torch.no_grad():
        plain = base(tokens).logits[0]
        model = PeftModel.from_pretrained(base, adapter_folder).eval()
        adapted = model(tokens).logits[0]
    lora = [n for n, _ in model.named_parameters() if "lora_" in n]
    saved = load_file(f"{adapter_folder}/adapter_model.safetensors")
    in_memory = {n.replace(".default", "") for n in lora}
    assert in_memory == set(saved), in_memory ^ set(saved)
    print(f"{len(lora)} adapter tensors, task {model.peft_config['default'].task_type}, {type(model).__name__}")
    print("the adapter moves logits by up to", (adapted - plain).abs().max().item())
    if expected:
        off = (adapted - expected["logits"]).abs().max().item()
        print("PEFT and lonas differ by up to", off)
        assert off < 1e-4


if __name__ == "__main__":
    main(*sys.argv[1:])
