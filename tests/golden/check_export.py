"""Loads exports with transformers and PEFT, unchanged, and compares logits.

Usage: python check_export.py LONAS [MODEL_FOLDER SUBNETWORK...]

LONAS is the program. First the tiny super-networks beside this file, against PyTorch's explicit prefixes (elastic.py):
each sub-network of one width as a folder, and random ranks at full width as a PEFT adapter. Then sub-networks of
MODEL_FOLDER, a super-network on a GGUF base, against what `lonas serve --dtype f32` says of the same texts; there PyTorch
computes in f64, so that what is measured is how `lonas` rounds, not how both do.
"""

import json
import math
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from check_llama_cpp import LONAS_PORT, PROMPTS, Server, ask
from elastic import Elastic

HERE = Path(__file__).parent
NETS = [("tiny-tied", "tiny-tied"), ("tiny-untied-bf16",) * 2, ("tiny-bias-headdim",) * 2, ("tiny-tied", "tiny-tied-ordered")]
MOST = 1e-4


def export(lonas, model, name, kind, out):
    command = [lonas, "export", model, "--subnetwork", name, "--format", kind, "--dtype", "f32", "--out", out]
    ran = subprocess.run(command, capture_output=True, text=True)
    return None if ran.returncode == 0 else ran.stderr


def logits(model, tokens):
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0]


def load(folder, dtype=torch.float32, **more):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **more).eval()


def tiny(lonas, base, net, folder):
    model, base = folder / "model", HERE / base / "base"
    shutil.copytree(HERE / net / "supernet", model)
    cases = json.loads((HERE / net / "cases.json").read_text())
    supernet = json.loads((model / "supernet.json").read_text())
    supernet["base"] = {"source": {"path": str(base)}}
    (model / "supernet.json").write_text(json.dumps(supernet))
    choose = random.Random(net)
    ranks = {"name": "ranks", "choices": [g["choices"][0] if g["kind"] == "width" else choose.choice(g["choices"]) for g in supernet["groups"]]}
    (model / "catalog.json").write_text(json.dumps([*cases["cases"], ranks]))
    golden, held, worst = load_file(HERE / net / "logits.safetensors"), 0, 0.0
    for case in cases["cases"]:
        refused = export(lonas, model, case["name"], "hf", folder / case["name"])
        if refused:
            assert "GGUF" in refused, refused
            continue
        held += 1
        plain = load(folder / case["name"])
        for i, tokens in enumerate(cases["tokens"]):
            worst = max(worst, (logits(plain, tokens) - golden[f"{case['name']}/{i}"]).abs().max().item())
    assert export(lonas, model, "ranks", "peft", folder / "ranks") is None
    # The super-adapter in the base's own order: at full width the order does not matter.
    elastic = PeftModel.from_pretrained(load(base), HERE / net / "supernet").eval()
    Elastic(elastic, len(supernet["groups"]) // 3).set(ranks["choices"])
    adapted = PeftModel.from_pretrained(load(base), folder / "ranks").eval()
    off = max((logits(adapted, t) - logits(elastic, t)).abs().max().item() for t in cases["tokens"])
    print(f"{net}: {held} folders differ from PyTorch by up to {worst:.2e}, a PEFT adapter of ranks {ranks['choices']} by {off:.2e}")
    assert worst < MOST and off < MOST


def served(name, subnetwork, prompt):
    body = {"model": name, "elastic": {"subnetwork": subnetwork}, "prompt": prompt, "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True}
    return ask(LONAS_PORT, "/v1/completions", body)["choices"][0]["logprobs"]["token_logprobs"]


def compared(model, tokenizer, name, subnetwork):
    """The largest difference of a log probability of PROMPTS' tokens."""
    worst = 0.0
    for prompt in PROMPTS:
        tokens = tokenizer(prompt)["input_ids"]
        assert tokens == ask(LONAS_PORT, "/tokenize", {"model": name, "prompt": prompt})["tokens"], prompt
        ours = served(name, subnetwork, prompt)[1 : len(tokens)]
        theirs = torch.log_softmax(logits(model, tokens), -1)
        theirs = [theirs[i, token].item() for i, token in enumerate(tokens[1:])]
        assert len(ours) == len(theirs) and all(map(math.isfinite, ours))
        worst = max(worst, *(abs(a - b) for a, b in zip(ours, theirs)))
    return worst


def large(lonas, model, subnetworks, folder):
    supernet = json.loads(Path(model, "supernet.json").read_text())
    name = supernet["name"]
    shown = json.loads(subprocess.run([lonas, "inspect", model, "--json"], check=True, capture_output=True).stdout)
    choices = {s["name"]: s["choices"] for s in shown["sub_networks"]}
    tokenizer = None
    with Server([lonas, "serve", model, "--dtype", "f32", "--port", str(LONAS_PORT)], LONAS_PORT):
        for subnetwork in subnetworks:
            out = folder / subnetwork
            refused = export(lonas, model, subnetwork, "hf", out)
            if refused:
                print(f"{subnetwork}: refused: {refused.strip()}")
                continue
            tokenizer = AutoTokenizer.from_pretrained(out)
            chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True)
            off = compared(load(out, torch.float64), tokenizer, name, subnetwork)
            print(f"{subnetwork} as a folder ({type(tokenizer).__name__}): log probabilities differ by up to {off:.2e}; chat {chat!r:.60}")
            assert off < MOST
        for subnetwork in subnetworks:
            refused = export(lonas, model, subnetwork, "peft", folder / f"{subnetwork}-peft")
            if refused:
                print(f"{subnetwork} as an adapter: refused: {refused.strip()}")
                continue
            package = supernet["base"]["source"]["pypi"]
            file = Path.home() / f".cache/lonas/{package['package']}-{package['version']}" / Path(package["file"]).name
            base = load(file.parent, gguf_file=file.name).double()
            off = compared(PeftModel.from_pretrained(base, folder / f"{subnetwork}-peft").eval(), tokenizer, name, subnetwork)
            print(f"{subnetwork} as an adapter, ranks {sorted(set(choices[subnetwork]))}: log probabilities differ by up to {off:.2e}")
            assert off < MOST


def main(lonas, model=None, *subnetworks):
    torch.set_num_threads(2)
    logging.disable_progress_bar()
    for base, net in NETS:
        with tempfile.TemporaryDirectory() as folder:
            tiny(lonas, base, net, Path(folder))
    if model:
        with tempfile.TemporaryDirectory() as folder:
            large(lonas, model, subnetworks, Path(folder))
    print("all checks passed")


if __name__ == "__main__":
    main(*sys.argv[1:])
