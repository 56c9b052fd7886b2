"""Ten optimizer steps of LoNAS's recipe in PyTorch + PEFT, and the gradients of the first micro-batch; and ten of a
sandwich whose students learn the maximal network's distributions, on responses only.

Usage: python make_training.py (after make_llama.py; writes training/ beside itself).
"""

import json
import math
import random
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import PeftModel
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

from elastic import Elastic, group_choices
from make_llama import MODELS

HERE = Path(__file__).parent
ACCUMULATION, MICRO_BATCH, SEQUENCES, EPOCHS, RATE = 2, 3, 30, 2, 3e-3


def forward(model, sequences, given=None):
    """Hugging Face's output for a padded micro-batch, whose loss is the mean over every token but each sequence's first and
    those that are given; and which of the logits' rows predict such a token."""
    width = max(map(len, sequences))
    given = given or [0] * len(sequences)
    ids = torch.tensor([s + [0] * (width - len(s)) for s in sequences])
    mask = torch.tensor([[1] * len(s) + [0] * (width - len(s)) for s in sequences])
    learnt = torch.tensor([[g <= i < len(s) for i in range(width)] for s, g in zip(sequences, given)])
    labels = ids.masked_fill(~learnt, -100)
    return model(input_ids=ids, attention_mask=mask, labels=labels), learnt[:, 1:]


def lora(model):
    return {n.replace("base_model.model.", "").replace(".default", ""): p for n, p in model.named_parameters() if "lora_" in n}


def run(weight_decay):
    spec = MODELS["tiny-tied"]
    base = LlamaForCausalLM.from_pretrained(HERE / "tiny-tied/base", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, HERE / "tiny-tied/supernet", is_trainable=True).eval()
    layers = base.config.num_hidden_layers
    elastic, chooser = Elastic(model, layers), random.Random(5)
    groups = group_choices(layers, spec["ranks"], spec["widths"], spec["ranks"])
    parameters = lora(model)
    optimizer = torch.optim.AdamW(parameters.values(), lr=RATE, betas=(0.9, 0.999), eps=1e-8, weight_decay=weight_decay)
    per_epoch = SEQUENCES // MICRO_BATCH
    log, gradients = [], {}
    for s in range(1, EPOCHS * per_epoch + 1):
        epoch = (s - 1) // per_epoch
        sequences = [[chooser.randrange(3, base.config.vocab_size) for _ in range(chooser.randrange(2, 14))] for _ in range(MICRO_BATCH)]
        choices = [chooser.choice(g) for g in groups]
        rate = 0.5 * RATE * (1 + math.cos(math.pi * (s - epoch) / (EPOCHS * per_epoch)))
        elastic.set(choices)
        loss = forward(model, sequences)[0].loss
        (loss / ACCUMULATION).backward()
        for p in parameters.values():
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        if s == 1:
            gradients = {n: p.grad.clone() * ACCUMULATION for n, p in parameters.items()}
        entry = {"sequences": sequences, "choices": choices, "loss": loss.item(), "learning_rate": rate}
        if s % ACCUMULATION == 0:
            entry["gradient_norm"] = torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0).item()
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            for p in parameters.values():
                p.grad = torch.zeros_like(p)
        log.append(entry)
    return log, gradients, {n: p.detach().clone() for n, p in parameters.items()}


def sandwich():
    """Each batch twice: the maximal network by cross-entropy, then a student by KL(maximal || student) without a gradient
    for the maximal one; both in one optimizer step."""
    spec = MODELS["tiny-tied"]
    base = LlamaForCausalLM.from_pretrained(HERE / "tiny-tied/base", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, HERE / "tiny-tied/supernet", is_trainable=True).eval()
    layers = base.config.num_hidden_layers
    elastic, chooser = Elastic(model, layers), random.Random(6)
    groups = group_choices(layers, spec["ranks"], spec["widths"], spec["ranks"])
    parameters = lora(model)
    optimizer = torch.optim.AdamW(parameters.values(), lr=RATE, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    total = 2 * SEQUENCES // MICRO_BATCH
    log, teacher = [], None
    for s in range(1, total + 1):
        rate = 0.5 * RATE * (1 + math.cos(math.pi * s / total))
        if s % 2 == 1:
            sequences = [[chooser.randrange(3, base.config.vocab_size) for _ in range(chooser.randrange(3, 14))] for _ in range(MICRO_BATCH)]
            given = [chooser.randrange(0, len(s)) for s in sequences]
            elastic.set([g[0] for g in groups])
            output, learnt = forward(model, sequences, given)
            teacher, loss = output.logits.detach(), output.loss
            choices = [g[0] for g in groups]
        else:
            choices = [g[-1] for g in groups] if s % 4 == 2 else [chooser.choice(g) for g in groups]
            elastic.set(choices)
            output, learnt = forward(model, sequences, given)
            shares = [F.log_softmax(logits[:, :-1][learnt], dim=-1) for logits in (output.logits, teacher)]
            loss = F.kl_div(*shares, reduction="batchmean", log_target=True)
        (loss / ACCUMULATION).backward()
        entry = {"sequences": sequences, "given": given, "choices": choices, "loss": loss.item(), "learning_rate": rate}
        if s % ACCUMULATION == 0:
            entry["gradient_norm"] = torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0).item()
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
        log.append(entry)
    return log, {n: p.detach().clone() for n, p in parameters.items()}


def write(out, name, log, final, epochs, decay):
    (out / f"{name}.json").write_text(json.dumps({
        "weight_decay": decay, "accumulation": ACCUMULATION, "micro_batch": MICRO_BATCH, "sequences": SEQUENCES,
        "epochs": epochs, "learning_rate": RATE, "micro_batches": log}) + "\n")
    save_file(final, out / f"{name}.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    out = HERE / "training"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    for name, decay in (("plain", 0.0), ("decay", 0.1)):
        log, gradients, final = run(decay)
        write(out, name, log, final, EPOCHS, decay)
        if decay == 0.0:
            save_file(gradients, out / "gradients.safetensors")
    log, final = sandwich()
    write(out, "sandwich", log, final, 1, 0.0)
