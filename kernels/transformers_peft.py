"""What transformers + PEFT do with LLaMA-7B on the same GPU: bf16 random weights, a rank-32 adapter on the modules LoNAS adapts,
one sequence. Prefill of 2048 tokens, and greedy decoding from a context of 128 tokens with a static cache and without."""

import sys
import time
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

SHAPE = Path(__file__).parent.parent / "benches/shapes/llama-7b/config.json"
MODULES = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
CONTEXT, STEPS, PROMPT, ROUNDS = 128, 64, 2048, 3


def seconds(run):
    best = float("inf")
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return best


def main():
    config = LlamaConfig.from_json_file(SHAPE)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    print(torch.cuda.get_device_name(), "torch", torch.__version__, "transformers", transformers.__version__)
    for adapter in [False, True]:
        if adapter:
            model = get_peft_model(model, LoraConfig(r=32, lora_alpha=64, target_modules=MODULES)).to("cuda")
        model.eval()
        prompt = torch.randint(config.vocab_size, (1, PROMPT), device="cuda")
        with torch.inference_mode():
            model(input_ids=prompt, logits_to_keep=1)
            prefill = seconds(lambda: model(input_ids=prompt, logits_to_keep=1))

            def generate(steps):
                return model.generate(input_ids=prompt[:, :CONTEXT], attention_mask=torch.ones_like(prompt[:, :CONTEXT]),
                                      max_new_tokens=steps, min_new_tokens=steps, do_sample=False)

            generate(4)
            decode = (seconds(lambda: generate(STEPS + 1)) - seconds(lambda: generate(1))) / STEPS
        print(f"adapter {'yes' if adapter else 'no':<4} prefill {PROMPT / prefill:8.0f} tok/s   decode {1 / decode:7.1f} tok/s", flush=True)


sys.exit(main())
