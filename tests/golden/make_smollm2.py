"""Greedy continuations and texts' losses of SmolLM2-135M-Instruct by transformers in f32, and its tokenizer's ids.

Usage: python make_smollm2.py PATH_TO_GGUF (writes smollm2.json beside itself).
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPTS = [
    "The capital of France is", "Once upon a time, there was a", "Water boils at", "def fibonacci(n):\n    ",
    "The three primary colors are", "Question: What gas do plants absorb?\nAnswer:", "Birds build nests",
    "The opposite of hot is", "List three fruits:\n1.", "The sun rises in the", "My favorite season is winter because",
    "import numpy as np\n\n", "A triangle has", "Dear Sir or Madam,\n\n", "The quick brown fox",
]
CHATS = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [{"role": "system", "content": "You answer in one word."}, {"role": "user", "content": "Is the sky blue?"}],
    [{"role": "user", "content": "Name a planet."}, {"role": "assistant", "content": "Mars."}, {"role": "user", "content": "Another one?"}],
    [{"role": "user", "content": "Write a haiku about rain."}],
    [{"role": "user", "content": "Why is 2 + 2 = 4?"}],
]
TEXTS = [
    "Plants make food from sunlight by photosynthesis.", "Question: Which is a mammal?\nAnswer: a whale",
    "Ünïcödé: 日本語のテキスト and emoji 🙂🙃.", "for i in range(10):\n    print(i)\n", "a",
]
UGLY = [
    "", " ", "  two", "tab\tand\nnewline\r\n", "12345 3.14 1,000", "don't we'll I'm", "<|im_start|>user\nhi<|im_end|>", "naïve café",
    "🙂👩‍👩‍👧‍👦", "日本語", "a" * 200, "x  y   z    ", "\u00a0nbsp", "[INST] <s>", "MiXeD CaSe", "\n\n\n", "$%^&*()_+", "١٢٣", "e\u0301", "end ",
]

torch.set_num_threads(1)
gguf = Path(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32).eval()
tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
assert abs(model.config.to_dict().get("rope_parameters", {}).get("rope_theta", 0) - 100000) < 1, model.config
prompts = [("text", tokenizer(p)["input_ids"], p) for p in PROMPTS]
for chat in CHATS:
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    prompts.append((chat, tokenizer(text)["input_ids"], text))
greedy = []
for source, ids, text in prompts:
    tokens, gaps = list(ids), []
    for _ in range(24):
        with torch.no_grad():
            top = model(torch.tensor([tokens])).logits[0, -1].topk(2)
        gaps.append(round((top.values[0] - top.values[1]).item(), 4))
        tokens.append(top.indices[0].item())
    entry = {"text": text, "prompt": ids, "continuation": tokens[len(ids):], "smallest_gap": min(gaps)}
    greedy.append(entry if source == "text" else {"messages": source, **entry})
losses = []
for text in TEXTS:
    ids = tokenizer(text + "<|im_end|>")["input_ids"]
    with torch.no_grad():
        loss = model(torch.tensor([ids]), labels=torch.tensor([ids])).loss.item()
    losses.append({"tokens": ids, "loss": loss})
tokens = [{"text": t, "ids": tokenizer(t)["input_ids"], "decoded": tokenizer.decode(tokenizer(t)["input_ids"], clean_up_tokenization_spaces=False)} for t in TEXTS + UGLY + PROMPTS]
out = Path(__file__).parent / "smollm2.json"
out.write_text(json.dumps({"greedy": greedy, "losses": losses, "tokenizer": tokens}, ensure_ascii=False) + "\n")
print(min(g["smallest_gap"] for g in greedy), [x["loss"] for x in losses])
