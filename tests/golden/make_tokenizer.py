"""Four small tokenizer.json files and what Hugging Face's own library makes of texts with them.

Usage: python make_tokenizer.py (writes tokenizer/ beside itself).

`byte-level.json` is GPT-2's kind, with gaps between its ids; `byte-fallback.json` is LLaMA's kind: `▁` for spaces,
`<0x0A>` for bytes, a beginning of sequence added by its post-processor; `word-piece.json` is BERT's kind, saved as a training
leaves it, with padding and truncation; `word-piece-old.json` the same with the post-processor of older files. `pairs.json` has texts
and pairs as transformers encodes and cuts them.
"""

import json
import shutil
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

OUT = Path(__file__).parent / "tokenizer"
CORPUS = ["the cat sat on the mat and the rat ran", "naïve café, 12 cats\n", "the theatre, that thing there"] * 4
TEXTS = [
    "", "the cat", " the  rat", "cats & dogs\n\tnaïve", "日本語 🙂", "12 café", "<s>the</s> end", "theatre ", "\u00a0x", "e\u0301",
]
SPECIAL = ["<s>", "</s>"]


def byte_level():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=290, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    state = json.loads(tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    state["model"]["vocab"] = {t: i if i < 270 else i + 37 for t, i in vocabulary.items()}
    return Tokenizer.from_str(json.dumps(state))


def byte_fallback():
    bytes_ = [f"<0x{b:02X}>" for b in range(256)]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=["<unk>", *SPECIAL, *bytes_], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    state = json.loads(tokenizer.to_str())
    # The bytes are ordinary tokens of the model, not special ones.
    state["added_tokens"] = [t for t in state["added_tokens"] if not t["content"].startswith("<0x")]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    start = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", start)])
    return tokenizer


def word_piece():
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    # Its trainer would number tokens otherwise each time.
    letters = sorted(set("".join(CORPUS).lower()) - set(" \n"))
    pieces = ["the", "cat", "sat", "##tre", "mat", "##ing"]
    vocabulary = special + letters + ["##" + letter for letter in letters if letter.isalnum()] + pieces
    tokenizer = Tokenizer(models.WordPiece({t: i for i, t in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(special)
    ends = [(t, tokenizer.token_to_id(t)) for t in special[2:]]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends)
    tokenizer.enable_padding(length=40, pad_token="[PAD]")
    tokenizer.enable_truncation(9)
    return tokenizer


def word_piece_old():
    tokenizer = word_piece()
    tokenizer.post_processor = processors.BertProcessing(*[(t, tokenizer.token_to_id(t)) for t in ("[SEP]", "[CLS]")])
    return tokenizer


def pairs(name):
    """Each text alone and with the next, whole and cut."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(OUT / f"{name}.json"))
    cases = []
    for text, pair in zip(TEXTS, [None, *TEXTS]):
        for most, left, special in [(None, False, True), (None, False, False), (7, False, True), (7, True, True), (4, False, True), (3, True, False)]:
            for second in [None] if pair is None else [None, pair]:
                tokenizer.truncation_side = "left" if left else "right"
                cut = {} if most is None else {"truncation": True, "max_length": most}
                # As lists: a single call takes an empty second text for none.
                seconds = None if second is None else [second]
                got = tokenizer([text], seconds, add_special_tokens=special, return_token_type_ids=True, **cut)
                cases.append({"text": text, "pair": second, "most": most, "left": left, "special": special,
                              "ids": got["input_ids"][0], "types": got["token_type_ids"][0]})
    return cases


if __name__ == "__main__":
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    cases = {}
    for name, tokenizer in (("byte-level", byte_level()), ("byte-fallback", byte_fallback())):
        tokenizer.save(str(OUT / f"{name}.json"), pretty=False)
        encode = lambda text, special: tokenizer.encode(text, add_special_tokens=special).ids
        cases[name] = {
            "last_id": max(tokenizer.get_vocab().values()),
            "start": tokenizer.token_to_id("<s>"), "end": tokenizer.token_to_id("</s>"),
            "texts": [
                {"text": t, "ids": encode(t, True), "plain": encode(t, False), "decoded": tokenizer.decode(encode(t, True), skip_special_tokens=True)}
                for t in TEXTS
            ],
        }
    word_piece().save(str(OUT / "word-piece.json"), pretty=False)
    word_piece_old().save(str(OUT / "word-piece-old.json"), pretty=False)
    all_pairs = {name: pairs(name) for name in ("byte-level", "byte-fallback", "word-piece", "word-piece-old")}
    (OUT / "pairs.json").write_text(json.dumps(all_pairs, ensure_ascii=False) + "\n")
    (OUT / "cases.json").write_text(json.dumps(cases, ensure_ascii=False) + "\n")
