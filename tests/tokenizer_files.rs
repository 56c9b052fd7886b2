//! What lies beside a tokenizer.json, against transformers; and the tokens that end a text.

use crate::files::{Folder, assert_names};
use crate::golden;
use lonas::artifact::{Base, TokenizerSource};
use lonas::text::{ChatTemplate, Message, TextError, Tokenizer};
use serde_json::{Value, json};
use std::collections::BTreeMap;

#[derive(serde::Deserialize)]
struct Golden {
    /// The name of its tokenizer.json.
    tokenizer: String,
    files: BTreeMap<String, String>,
    /// One message, `hi`, as its template writes it.
    chat: Option<String>,
    texts: Vec<Text>,
}

#[derive(serde::Deserialize)]
struct Text {
    text: String,
    ids: Vec<u32>,
    decoded: String,
    /// Without special tokens.
    plain: String,
}

/// A base with these files beside its tokenizer.json.
fn base(tokenizer: &str, files: &BTreeMap<String, String>) -> Folder {
    let folder = Folder::copy_of("tiny-tied/base");
    let own = golden::path("tokenizer").join(format!("{tokenizer}.json"));
    folder.write("tokenizer.json", std::fs::read(own).unwrap());
    files.iter().for_each(|(name, text)| folder.write(name, text));
    folder
}

fn open(folder: &Folder) -> (Tokenizer, Option<String>) {
    let source = Base::open(folder.path()).unwrap().tokenizer;
    let TokenizerSource::HuggingFace { tokenizer_json, chat_template, bos, eos, added } = source else {
        panic!("a folder")
    };
    let opened = Tokenizer::from_files(&tokenizer_json, added, bos.as_deref(), eos.as_deref());
    (opened.unwrap(), chat_template)
}

#[test]
fn a_folders_texts_tokens_and_conversations_are_those_of_transformers() {
    let all: BTreeMap<String, Golden> = golden::json("tokenizer_files.json");
    assert_eq!(all.len(), 8);
    for (name, Golden { tokenizer, files, chat, texts }) in all {
        let (tokenizer, template) = open(&base(&tokenizer, &files));
        for Text { text, ids, decoded, plain } in texts {
            assert_eq!(tokenizer.encode(&text, true).unwrap(), ids, "{name} {text:?}");
            assert_eq!(tokenizer.decode_whole(&ids, false).unwrap(), decoded, "{name} {text:?}");
            assert_eq!(tokenizer.decode_whole(&ids, true).unwrap(), plain, "{name} {text:?}");
        }
        assert_eq!(template.is_some(), chat.is_some(), "{name}");
        let (Some(chat), Some(template)) = (chat, template) else { continue };
        let token = |id: Option<u32>| id.and_then(|id| tokenizer.token_text(id)).unwrap_or_default();
        let template = ChatTemplate::new(&template, &token(tokenizer.bos()), &token(tokenizer.eos()));
        let message = Message { role: "user".into(), content: "hi".into() };
        assert_eq!(template.unwrap().render(&[message], false).unwrap(), chat, "{name}");
    }
}

#[test]
fn a_text_that_goes_to_tokens_and_back_does_not_grow() {
    let (tokenizer, _) = open(&base("byte-fallback", &BTreeMap::new()));
    for text in ["the cat", " the  rat", "日本語 🙂"] {
        let tokens = tokenizer.encode(text, false).unwrap();
        assert_eq!(tokenizer.decode_whole(&tokens, false).unwrap(), text);
    }
}

/// The library takes it on trust that a token has as many characters as are to go, and an empty one has none.
#[test]
fn a_decoder_that_takes_from_the_ends_of_tokens_is_refused_when_it_is_asked() {
    let folder = base("byte-fallback", &BTreeMap::new());
    folder.edit_json("tokenizer.json", |j| {
        j["decoder"] = json!({"type": "Sequence", "decoders": [{"type": "Strip", "content": "a", "start": 0, "stop": 9}]});
    });
    let (tokenizer, _) = open(&folder);
    let tokens = tokenizer.encode("the cat", true).unwrap();
    let error = tokenizer.decode_whole(&tokens, false).unwrap_err();
    assert!(matches!(error, TextError::Decode { .. }), "{error}");
    assert_eq!(tokenizer.decode(&tokens, true), " the cat");
}

#[test]
fn tokens_of_generation_config_end_a_text_too() {
    let folder = Folder::copy_of("tiny-tied/base");
    let ends = || Base::open(folder.path()).map(|base| base.config.eos_tokens).map_err(|e| e.to_string());
    let own = ends().unwrap();
    let write =
        |ends: Value| folder.write("generation_config.json", json!({"eos_token_id": ends}).to_string());
    write(json!([own[0], 40, 41]));
    assert_eq!(ends().unwrap(), [own.clone(), vec![40, 41]].concat());
    write(json!(7));
    assert_eq!(ends().unwrap(), [own.clone(), vec![7]].concat());
    write(Value::Null);
    assert_eq!(ends().unwrap(), own);
    for wrong in [json!([1, "x"]), json!(-1), json!({})] {
        write(wrong);
        assert_names(&ends().unwrap_err(), &["generation_config.json", "eos_token_id", "a token id"]);
    }
}

#[test]
fn tokenizer_files_that_say_nonsense_are_refused_by_name() {
    for (file, text, named) in [
        ("tokenizer_config.json", r#"{"added_tokens_decoder": {"x": {}}}"#, "added_tokens_decoder"),
        (
            "tokenizer_config.json",
            r#"{"added_tokens_decoder": {"5": {"content": 3}}}"#,
            "added_tokens_decoder",
        ),
        ("special_tokens_map.json", "{", ""),
    ] {
        let folder = base("byte-level", &BTreeMap::from([(file.to_string(), text.to_string())]));
        let error = Base::open(folder.path()).unwrap_err().to_string();
        assert_names(&error, &[file, named]);
    }
}
