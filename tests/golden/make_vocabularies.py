"""Two small tokenizers of LLaMA's kinds, in GGUF's words and as tokenizer.json, and what Hugging Face's library makes of texts with them.

Usage: python make_vocabularies.py (writes vocabularies.json beside itself, and vocabulary.gguf with the first one and a model's sizes).

`llama` is that of LLaMA 1 and 2: sentencepiece's tokens with scores, bytes for what is none of them, a space in front; its merges are
those that transformers lists for such a vocabulary. `llama-bpe` is that of LLaMA 3: byte-level BPE that takes whole words first.
"""

import json
from pathlib import Path

import gguf
import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import generate_merges

CORPUS = ["the cat sat on the mat and the rat ran", "naïve café, 12 cats\n", "the theatre, that thing there", "aaaa aaa   banana"] * 4
TEXTS = [
    "", "the cat", " the  rat", "cats & dogs\n\tnaïve", "日本語 🙂", "12345 café", "<s>the</s> end", "theatre there", "aaaaaaa anana", "   ", "e\u0301 \u00a0x",
    "the [X] cat[X]s", "<|begin_of_text|>the<|eot_id|>\n\n cat's CAT'S  ", "▁the <0x41> <unk>", "thethat\r\n\r\n 1", "CAT\nCAT", "a" * 40,
]
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def learnt(tokenizer, size, **more):
    """Tokens and merges that a training finds, in its order."""
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=size, show_progress=False, **more))
    model = json.loads(tokenizer.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].get), [tuple(pair) for pair in model["merges"]]


def llama(prefix):
    steps = [normalizers.Prepend("▁")] if prefix else []
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    normal, _ = learnt(trained, 90)
    special = ["<unk>", "<s>", "</s>"]
    bytes_ = [f"<0x{b:02X}>" for b in range(256)]
    tokens = [*special, *bytes_, *normal, "[X]", "[PAD]"]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(normal), USER_DEFINED, UNUSED]
    # The letters come first here and have no place in the order.
    scores = [0.0] * 259 + [-float(i) for i in range(len(normal))] + [0.0, 0.0]
    vocabulary = {t: i for i, t in enumerate(tokens)}
    merges = generate_merges(vocabulary, {t: scores[vocabulary[t]] for t in normal}, skip_tokens=[t for t in tokens if t not in normal])
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special])
    tokenizer.add_tokens([AddedToken("[X]", normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])
    parts = {"model": "llama", "pre": "default", "tokens": tokens, "token_types": types, "scores": scores, "merges": [],
             "bos": 1, "eos": 2, "unknown": 0, "add_bos": True, "add_space_prefix": prefix}
    return tokenizer, parts


def llama_bpe():
    cuts = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(LLAMA3), "isolated", invert=False), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = cuts
    tokens, merges = learnt(trained, 300, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    # A word that no merges make: it is taken whole all the same.
    tokens.append("CAT")
    special = ["<|begin_of_text|>", "<|eot_id|>"]
    ids = {t: i for i, t in enumerate([*tokens, *special])}
    tokenizer = Tokenizer(models.BPE({t: ids[t] for t in tokens}, merges, ignore_merges=True))
    tokenizer.pre_tokenizer = cuts
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special])
    begin = special[0]
    template = processors.TemplateProcessing(single=f"{begin} $A", pair=f"{begin} $A $B", special_tokens=[(begin, ids[begin])])
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    parts = {"model": "gpt2", "pre": "llama-bpe", "tokens": [*tokens, *special], "token_types": [NORMAL] * len(tokens) + [CONTROL] * 2, "scores": [],
             "merges": [" ".join(pair) for pair in merges], "bos": ids[begin], "eos": ids[special[1]], "unknown": None, "add_bos": True,
             "add_space_prefix": False}
    return tokenizer, parts


def golden(tokenizer, parts):
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    texts = []
    for text in TEXTS:
        ids, plain = fast.encode(text), fast.encode(text, add_special_tokens=False)
        texts.append({"text": text, "ids": ids, "plain": plain, "decoded": fast.decode(ids)})
    return {"tokenizer": json.loads(tokenizer.to_str()), "parts": parts, "texts": texts}


def write_file(parts, path):
    """What a file need not say is left out."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(4)
    writer.add_block_count(1)
    writer.add_feed_forward_length(4)
    writer.add_head_count(2)
    writer.add_tokenizer_model(parts["model"])
    writer.add_token_list(parts["tokens"])
    writer.add_token_types(parts["token_types"])
    writer.add_token_scores(parts["scores"])
    writer.add_bos_token_id(parts["bos"])
    writer.add_eos_token_id(parts["eos"])
    writer.add_eot_token_id(5)
    writer.add_unk_token_id(parts["unknown"])
    writer.add_tensor("token_embd.weight", np.zeros((len(parts["tokens"]), 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    all_ = {"llama": golden(*llama(True)), "llama, no space in front": golden(*llama(False)), "llama-bpe": golden(*llama_bpe())}
    (Path(__file__).parent / "vocabularies.json").write_text(json.dumps(all_, ensure_ascii=False) + "\n")
    write_file(all_["llama"]["parts"], Path(__file__).parent / "vocabulary.gguf")
