"""What transformers makes of a folder's tokenizer files, and of its tokens when they become text again.

Usage: python make_tokenizer_files.py (writes tokenizer_files.json beside itself; reads tokenizer/, see make_tokenizer.py).
"""

import json
import shutil
import tempfile
from pathlib import Path

from transformers import PreTrainedTokenizerFast

HERE = Path(__file__).parent
TEXTS = ["the cat", " the  rat", "<s>the</s> end", "naïve\n日本", "the [X]cat [Y] x", "the cat's mat, sat ting!"]
USER = [{"role": "user", "content": "hi"}]
TEMPLATE = "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}{{ eos_token }}"
NAMED = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": TEMPLATE}]
PLAIN = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE}
MAP = {"bos_token": {"content": "<s>", "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}, "eos_token": "</s>"}


def token(content, **flags):
    return {"content": content, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": False, **flags}


ADDED = {"331": token("[Y]", special=True), "330": token("[X]", lstrip=True), "1": token("<s>", special=True), "2": token("</s>", special=True)}
FOLDERS = {
    "plain": ("byte-fallback", {"tokenizer_config.json": PLAIN}),
    "byte level": ("byte-level", {"tokenizer_config.json": PLAIN}),
    "named templates": ("byte-fallback", {"tokenizer_config.json": {**PLAIN, "chat_template": NAMED}}),
    "a template of its own": ("byte-fallback", {"tokenizer_config.json": {**PLAIN, "chat_template": "config"}, "chat_template.jinja": TEMPLATE}),
    "a map": ("byte-fallback", {"tokenizer_config.json": {"chat_template": TEMPLATE}, "special_tokens_map.json": MAP}),
    "a map before the config": ("byte-fallback", {"tokenizer_config.json": {**PLAIN, "bos_token": "the"}, "special_tokens_map.json": MAP}),
    "a map that does not count": (
        "byte-fallback",
        {"tokenizer_config.json": {**PLAIN, "added_tokens_decoder": ADDED}, "special_tokens_map.json": {"bos_token": "</s>", "eos_token": "<s>"}},
    ),
    "word piece": ("word-piece", {"tokenizer_config.json": {}}),
}


def folder(name, files):
    with tempfile.TemporaryDirectory() as path:
        shutil.copy(HERE / "tokenizer" / f"{name}.json", Path(path) / "tokenizer.json")
        files = {file: text if isinstance(text, str) else json.dumps(text) for file, text in files.items()}
        for file, text in files.items():
            (Path(path) / file).write_text(text)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
        texts = []
        for text in TEXTS:
            ids = tokenizer.encode(text)
            texts.append({"text": text, "ids": ids, "decoded": tokenizer.decode(ids), "plain": tokenizer.decode(ids, skip_special_tokens=True)})
        chat = tokenizer.apply_chat_template(USER, tokenize=False) if tokenizer.chat_template else None
        return {"tokenizer": name, "files": files, "chat": chat, "texts": texts}


if __name__ == "__main__":
    folders = {name: folder(*parts) for name, parts in FOLDERS.items()}
    (HERE / "tokenizer_files.json").write_text(json.dumps(folders, ensure_ascii=False, indent=1) + "\n")
