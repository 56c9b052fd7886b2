"""Losses, likelihoods, greedy texts and beam search of tiny sub-networks by transformers 4.31, the version that LoNAS's scripts use; and
answers found by the regular expressions of its `run_commonsense.py`.

Usage: python make_eval.py (after ../make_llama.py; writes beside itself).
"""

import json
import random
import re
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent
SCALE, LAYERS, RANKS, WIDTHS = 2.0, 3, [8, 6, 4], [80, 61, 40]
SUB_NETWORKS = {"maximal": 0, "heuristic": 1, "minimal": 2}
NEW_TOKENS, BEAMS = 12, 4


def plain(rank, width):
    """The sub-network as a LLaMA without adapters: W[:o, :i] + s B[:o, :r] A[:r, :i]; down_proj's rank is whole."""
    base = load_file(HERE.parent / "tiny-tied/base/model.safetensors")
    adapter = load_file(HERE.parent / "tiny-tied/supernet/adapter_model.safetensors")
    raw = json.loads((HERE.parent / "tiny-tied/base/config.json").read_text())
    keep = ["hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size", "rms_norm_eps", "max_position_embeddings"]
    config = LlamaConfig(intermediate_size=width, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, **{k: raw[k] for k in keep})
    tensors = {}
    for name, tensor in base.items():
        key = "base_model.model." + name.removesuffix("weight") + "lora_{}.weight"
        a, b = adapter.get(key.format("A")), adapter.get(key.format("B"))
        if a is not None:
            r = 8 if "down_proj" in name else rank
            tensor = tensor + SCALE * b[:, :r] @ a[:r]
        if "gate_proj" in name or "up_proj" in name:
            tensor = tensor[:width]
        if "down_proj" in name:
            tensor = tensor[:, :width]
        tensors[name] = tensor
    model = LlamaForCausalLM(config).eval()
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected and all("inv_freq" in m or m == "lm_head.weight" for m in missing), (missing, unexpected)
    model.tie_weights()
    return model


def logprobs(model, tokens):
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0].double().log_softmax(-1)
    return [logits[i, t].item() for i, t in enumerate(tokens[1:])]


def texts(model, prompts, stop, beams):
    config = GenerationConfig(num_beams=beams, max_new_tokens=NEW_TOKENS, eos_token_id=stop, pad_token_id=0, bos_token_id=1)
    out = []
    for prompt in prompts:
        try:
            ids = model.generate(input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), generation_config=config)
            tokens = ids[0].tolist()[len(prompt):]
            # transformers closes every text that ended with the first of the stop tokens, whichever it was.
            out.append(tokens[:-1] if beams > 1 and tokens[-1] == stop[0] and len(tokens) <= NEW_TOKENS else tokens)
        except ValueError:
            out.append(None)  # More stop tokens among the likeliest than it can take.
    return out


def models():
    chooser = random.Random(11)
    tokens = lambda n: [chooser.randrange(3, 97) for _ in range(n)]
    beginning = tokens(6)
    prompts = [beginning + tokens(chooser.randrange(1, 9)) for _ in range(24)]
    stop = [5, 17, 30, 44, 61, 80]
    questions = [{"context": beginning + tokens(4), "options": [tokens(chooser.randrange(1, 6)) for _ in range(4)]} for _ in range(8)]
    for q in questions[:4]:
        q["options"][2] = q["options"][0] + tokens(2)  # One option begins another.
    sequences = [tokens(n) for n in (2, 9, 40, 17)]
    result = {"prompts": prompts, "stop": stop, "new_tokens": NEW_TOKENS, "beams": BEAMS, "questions": questions, "sequences": sequences, "sub_networks": {}}
    for name, at in SUB_NETWORKS.items():
        model = plain(RANKS[at], WIDTHS[at])
        scored = [[sum(logprobs(model, q["context"] + o)[len(q["context"]) - 1 :]) for o in q["options"]] for q in questions]
        ids = [torch.tensor([s]) for s in sequences]
        with torch.no_grad():
            losses = [model(input_ids=i, labels=i).loss.item() for i in ids]
        greedy, searched = texts(model, prompts, stop, 1), texts(model, prompts, stop, BEAMS)
        ended = sum(t is not None and len(t) < NEW_TOKENS for t in searched)
        print(name, "losses", losses, "beams:", ended, "of", len(prompts), "ended early;", sum(g != s for g, s in zip(greedy, searched)), "differ from greedy")
        result["sub_networks"][name] = {"option_logprobs": scored, "losses": losses, "greedy": greedy, "beam_search": searched}
    return result


# The authors' expressions, by data set.
EXPRESSIONS = {
    "boolq": (r"true|false", ["true", "false"]),
    "piqa": (r"solution1|solution2", ["solution1", "solution2"]),
    "arc": (r"answer1|answer2|answer3|answer4|answer5", ["answer1", "answer2", "answer3", "answer4"]),
    "arc-five": (r"answer1|answer2|answer3|answer4|answer5", ["answer1", "answer2", "answer3", "answer4", "answer5"]),
    "social_i_qa": (r"answer1|answer2|answer3|answer4|answer5", ["answer1", "answer2", "answer3"]),
    "hellaswag": (r"ending1|ending2|ending3|ending4", ["ending1", "ending2", "ending3", "ending4"]),
    "winogrande": (r"option1|option2", ["option1", "option2"]),
}
PARTS = [
    "the correct answer is ", "answer", "Answer1", "answer1", "answer2", "answer3", "answer4", "answer5", "answer6", "answer12", "answer 3", "solution", "solution1", "solution2",
    "solution3", "ending1", "ending4", "ending5", "option1", "option2", "option3", "true", "false", "True", "untrue", "TRUE", "falsetrue", "\n", "\t", " ", ".", ":", "**",
    "é", "🙂", "1", "2", "### Response:", "### Instruction:", "</s>", "<|im_end|>", "answeranswer2", "ans", "wer1", "fal", "se", "\u00a0", "\u2028",
]


def answers():
    chooser = random.Random(4)
    cases = []
    for data_set, (expression, labels) in EXPRESSIONS.items():
        said = ["", " ", "the correct answer is " + labels[0], "the correct answer is " + labels[-1] + "</s>", "\n\n" + labels[1]]
        said += ["".join(chooser.choice(PARTS) for _ in range(chooser.randrange(1, 7))) for _ in range(120)]
        for text in said:
            # As the script has it: what follows the first `### Response:` of prompt and text together, stripped.
            output = ("prompt ### Response:\n" + text).split("### Response:")[1].strip()
            found = re.findall(expression, output)
            chosen = found[0] if found else ""
            cases.append({"labels": labels, "text": text, "chosen": labels.index(chosen) if chosen in labels else None})
    return cases


if __name__ == "__main__":
    torch.set_num_threads(1)
    assert transformers.__version__ == "4.31.0", transformers.__version__
    (HERE / "models.json").write_text(json.dumps(models()) + "\n")
    (HERE / "answers.json").write_text(json.dumps(answers(), ensure_ascii=False) + "\n")
