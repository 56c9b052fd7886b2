"""Adapters in torch's own file format, beside the same in safetensors. Usage: python make_adapters.py (writes beside itself).

`adapters/f32`, `f16` and `bf16` are the adapter of tiny-tied, saved as PEFT saves without safetensors; `state-dict` is the same as
an OrderedDict of parameters and of views into one storage, `legacy` in the format from before torch 1.6, `cut` as Shears
extracts a sub-adapter from it. `bert` is a tiny classifier's adapter with its head.
"""

import json
import shutil
from collections import OrderedDict
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from safetensors.torch import load_file
from transformers import BertConfig, BertForSequenceClassification, LlamaForCausalLM

HERE = Path(__file__).parent
OUT = HERE / "adapters"
CONFIG, TENSORS = "adapter_config.json", "adapter_model.bin"
# The sub-network whose ranks are cut out, of those whose logits are beside the super-network.
CUT = "random0"


def fresh(name):
    folder = OUT / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def save(name, tensors, **options):
    folder = fresh(name)
    shutil.copy(HERE / "tiny-tied/supernet" / CONFIG, folder)
    torch.save(tensors, folder / TENSORS, **options)


def saved_by_peft():
    """PEFT itself writes the file in f32."""
    base = LlamaForCausalLM.from_pretrained(HERE / "tiny-tied/base", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, HERE / "tiny-tied/supernet")
    folder = fresh("f32")
    model.save_pretrained(folder, safe_serialization=False)
    (folder / "README.md").unlink(missing_ok=True)
    shutil.copy(HERE / "tiny-tied/supernet" / CONFIG, folder)


def state_dict(tensors):
    """As a module's own state: parameters with names of their own, and some that share a storage or are transposed."""
    state = OrderedDict()
    for i, (name, tensor) in enumerate(tensors.items()):
        if i % 3 == 0:
            tensor = torch.nn.Parameter(tensor)
        elif i % 3 == 1:
            tensor = torch.cat([torch.full((2, tensor.shape[1]), 7.0), tensor])[2:]
        else:
            tensor = tensor.t().contiguous().t()
        state[name] = tensor
    state._metadata = OrderedDict([("", {"version": 1})])
    return state


def cut(tensors):
    """Shears' extract_and_save_active_sub_adapter: lora_A[:r], lora_B[:, :r], the configuration as it was."""
    cases = json.loads((HERE / "tiny-tied/cases.json").read_text())["cases"]
    choices = next(case["choices"] for case in cases if case["name"] == CUT)
    layers, out = len(choices) // 3, {}
    for name, tensor in tensors.items():
        layer = int(name.split("layers.")[1].split(".")[0])
        qkv, mlp = choices[layer], choices[2 * layers + layer]
        rank = qkv if "self_attn" in name else mlp if "down_proj" not in name else 8
        out[name] = tensor[:rank].clone() if "lora_A" in name else tensor[:, :rank].clone()
    return out


def bert():
    torch.manual_seed(0)
    config = BertConfig(hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=3, vocab_size=30, max_position_embeddings=16, num_labels=3)
    model = BertForSequenceClassification(config)
    model = get_peft_model(model, LoraConfig(task_type=TaskType.SEQ_CLS, r=4, lora_alpha=8, target_modules=["query", "value"]))
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape))
    for safe in (False, True):
        folder = fresh("bert" if safe else "bert-bin")
        model.save_pretrained(folder, safe_serialization=safe)
        (folder / "README.md").unlink(missing_ok=True)
        config = json.loads((folder / CONFIG).read_text())
        config["base_model_name_or_path"] = "bert-base-uncased"
        (folder / CONFIG).write_text(json.dumps(config, indent=2))


if __name__ == "__main__":
    tensors = load_file(HERE / "tiny-tied/supernet/adapter_model.safetensors")
    saved_by_peft()
    save("f16", {name: tensor.half() for name, tensor in tensors.items()})
    save("bf16", {name: tensor.bfloat16() for name, tensor in tensors.items()})
    save("state-dict", state_dict(tensors))
    save("legacy", tensors, _use_new_zipfile_serialization=False)
    save("cut", cut(tensors))
    bert()
