#!/usr/bin/env python3
"""Tokens a second of LoRA training in PyTorch + PEFT, to set beside `lonas train` on the same examples.

    python3 -m venv VENV && VENV/bin/pip install -r tests/golden/requirements.txt
    VENV/bin/python benches/train_pytorch.py BASE.gguf DATA.json --dtype f32    # see --help
    lonas train --data DATA.json --space models/smollm2-135m-space.json --limit 60 --validation 0 --epochs 1 \\
        --sampling maximal --out DIR

What is trained is what `lonas train --sampling maximal` trains with its defaults: rank 32 on q, k, v, gate, up and down, dropout
0.1, LoNAS's template, micro-batches of 4 sequences, 4 of them in one AdamW step clipped to 1, whole-sequence loss. Micro-batches
are padded to a multiple of 8, as by the authors' collator; padding does not count. Loading is not timed.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

MICRO_BATCH, ACCUMULATION, CUTOFF, RATE, PAD = 4, 4, 256, 3e-4, 20 * " "
PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.  \n\n"
    f"{PAD}### Instruction:\n{PAD}{{instruction}}\n\n{PAD}### Response:\n{PAD}{{output}}"
)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path, help="a GGUF file that transformers reads")
    parser.add_argument("data", type=Path, help="a JSON array of {instruction, output}")
    parser.add_argument("--dtype", choices=["f32", "bf16"], default="f32", help="of the frozen base; adapters are f32")
    parser.add_argument("--limit", type=int, default=60, help="examples")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def sequences(args, tokenizer):
    examples = json.loads(args.data.read_text())[: args.limit]
    encoded = [tokenizer(PROMPT.format(**example))["input_ids"][:CUTOFF] for example in examples]
    eos = tokenizer.eos_token_id
    return [ids + [eos] if len(ids) < CUTOFF and ids[-1] != eos else ids for ids in encoded]


def padded(batch):
    width = -(-max(map(len, batch)) // 8) * 8
    ids = torch.tensor([s + [0] * (width - len(s)) for s in batch])
    mask = torch.tensor([[1] * len(s) + [0] * (width - len(s)) for s in batch])
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def model_of(args):
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    base = AutoModelForCausalLM.from_pretrained(args.base.parent, gguf_file=args.base.name, dtype=dtype)
    targets = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=32, lora_alpha=64, lora_dropout=0.1, target_modules=targets, task_type="CAUSAL_LM")
    return get_peft_model(base, config).train()


def train(model, data, dtype):
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
    start = time.perf_counter()
    for number, first in enumerate(range(0, len(data), MICRO_BATCH), 1):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
            loss = model(**padded(data[first : first + MICRO_BATCH])).loss
        (loss / ACCUMULATION).backward()
        if number % ACCUMULATION == 0:
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return time.perf_counter() - start, loss.item()


if __name__ == "__main__":
    args = arguments()
    torch.manual_seed(42)
    torch.set_num_threads(args.threads)
    data = sequences(args, AutoTokenizer.from_pretrained(args.base.parent, gguf_file=args.base.name))
    model = model_of(args)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    seconds, loss = train(model, data, args.dtype)
    tokens = sum(map(len, data))
    print(f"PyTorch {torch.__version__}, {args.dtype}, {args.threads} threads: {trained} numbers trained on {tokens} tokens "
          f"in {seconds:.1f} s, {tokens / seconds:.1f} tokens/s; last loss {loss:.3f}")
