//! A tiny base that can talk, with two super-adapters on it, as folders on disk.
//!
//! The base is `tests/golden/tiny-tied` with a tokenizer and a chat template beside it. Its 97 tokens are byte-level BPE:
//! three special ones, 74 single bytes (among them those of é, €, 😀), 20 pairs. As for LLaMA, encoding puts `<s>` in
//! front; `</s>` stands between the texts of a pair.

use crate::golden;
use lonas::artifact::{TensorType, read_adapter, write_adapter};
use lonas::weights::HostData;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// The super-adapters' names; the second one's B tensors are the negated ones of the first.
pub(crate) const NAME: &str = "tiny-tied";
pub(crate) const OTHER: &str = "tiny-other";

pub(crate) const VOCABULARY: usize = 97;
/// Prompt and answer together, in tokens.
pub(crate) const CONTEXT: usize = 128;
pub(crate) const BOS: u32 = 1;
pub(crate) const EOS: u32 = 2;
/// The letter x: with a bias of 100, an answer whose every token has text.
pub(crate) const X: u32 = 26;

/// Characters and bytes that are tokens by themselves, from id 3 on.
const CHARACTERS: &str = "abcdefghijklmnopqrstuvwxyz \n0123456789.,:;?!'\"-()<>|_/ABCDEFGHIJ";
const BYTES: [u8; 10] = [0xC3, 0xA9, 0xA8, 0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0x98, 0x80];
const PAIRS: [&str; 20] = [
    "th", "he", "in", "er", "an", "re", "on", "at", "en", "nd", "ti", "es", "or", "te", "of", "ed", "is",
    "it", "al", "ar",
];

/// Roles and contents; refuses a conversation that the assistant begins.
const TEMPLATE: &str = "{{ bos_token }}{% for m in messages %}\
    {% if loop.first and m.role == 'assistant' %}{{ raise_exception('the assistant cannot begin') }}{% endif %}\
    {{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}";

/// The folders; gone when this is dropped.
pub(crate) struct Tiny {
    folder: tempfile::TempDir,
}

impl Tiny {
    pub(crate) fn write() -> Self {
        let tiny = Self { folder: tempfile::tempdir().unwrap() };
        copy(&golden::path("tiny-tied/base"), &tiny.base());
        let texts = [
            ("tokenizer.json", tokenizer().to_string()),
            ("tokenizer_config.json", json!({"bos_token": "<s>", "eos_token": "</s>"}).to_string()),
            ("chat_template.jinja", TEMPLATE.into()),
        ];
        for (name, text) in texts {
            std::fs::write(tiny.base().join(name), text).unwrap();
        }
        for name in [NAME, OTHER] {
            tiny.write_model(name);
        }
        negate(&tiny.model(OTHER));
        tiny
    }

    pub(crate) fn base(&self) -> PathBuf {
        self.folder.path().join("base")
    }

    /// The model folder of that name.
    pub(crate) fn model(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn write_model(&self, name: &str) {
        let folder = self.model(name);
        copy(&golden::path("tiny-tied/supernet"), &folder);
        let file = folder.join("supernet.json");
        let mut supernet: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
        supernet["name"] = name.into();
        supernet["base"]["source"]["path"] = self.base().to_str().unwrap().into();
        std::fs::write(file, supernet.to_string()).unwrap();
    }
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

fn negate(model: &Path) {
    let (config, mut tensors) = read_adapter(model).unwrap();
    for (_, b) in tensors.values_mut() {
        b.data = HostData::F32(b.to_f32().iter().map(|x| -x).collect());
    }
    write_adapter(model, &config, &tensors, TensorType::F32).unwrap();
}

/// tokenizer.json
fn tokenizer() -> Value {
    let special = ["<pad>", "<s>", "</s>"].map(String::from);
    let single = CHARACTERS.bytes().chain(BYTES).map(|b| letter(b).to_string());
    let tokens = special.into_iter().chain(single).chain(PAIRS.map(String::from)).collect::<Vec<_>>();
    assert_eq!(tokens.len(), VOCABULARY);
    let added = (0..3).map(|id: usize| {
        json!({"id": id, "content": tokens[id], "special": true, "single_word": false, "lstrip": false,
               "rstrip": false, "normalized": false})
    });
    let bytes =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let front =
        json!([{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]);
    let pair = json!([front[0], front[1], {"SpecialToken": {"id": "</s>", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}]);
    json!({
        "version": "1.0",
        "added_tokens": added.collect::<Vec<_>>(),
        "pre_tokenizer": bytes,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": front,
            "pair": pair,
            "special_tokens": {
                "<s>": {"id": "<s>", "ids": [BOS], "tokens": ["<s>"]},
                "</s>": {"id": "</s>", "ids": [EOS], "tokens": ["</s>"]},
            },
        },
        "decoder": bytes,
        "model": {
            "type": "BPE",
            "vocab": tokens.iter().zip(0..).map(|(t, id)| (t.clone(), json!(id))).collect::<serde_json::Map<_, _>>(),
            "merges": PAIRS.map(|pair| format!("{} {}", &pair[..1], &pair[1..])),
        },
    })
}

/// How byte-level BPE writes a byte: printable ones as themselves, the others as characters from U+0100 on.
fn letter(byte: u8) -> char {
    let printable = |b: u8| matches!(b, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    if printable(byte) {
        return char::from(byte);
    }
    let before = (0..byte).filter(|&b| !printable(b)).count() as u32;
    char::from_u32(0x100 + before).unwrap()
}
