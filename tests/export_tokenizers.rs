//! Tokenizers in llama.cpp's words, for exported GGUF files.

use crate::files::Folder;
use crate::golden;
use lonas::text::{Tokenizer, VocabularyParts, gguf_tokenizer};
use serde_json::{Value, json};
use tokenizers::AddedToken;

/// A tokenizer.json of which `edit` changes something.
fn tokenizer(name: &str, edit: impl FnOnce(&mut Value)) -> Result<VocabularyParts, String> {
    let folder = Folder::empty();
    let mut json: Value = golden::json(&format!("tokenizer/{name}.json"));
    edit(&mut json);
    folder.write("tokenizer.json", json.to_string());
    gguf_tokenizer(&folder.file("tokenizer.json"), Vec::new(), Some("<s>"), Some("</s>"), 400)
        .map_err(|e| e.to_string())
}

#[test]
fn a_byte_level_tokenizer_becomes_tokens_and_merges() {
    let parts = tokenizer("byte-level", |_| {}).unwrap();
    assert_eq!((parts.model.as_str(), parts.pre.as_str()), ("gpt2", "gpt-2"));
    assert!(parts.scores.is_empty() && !parts.add_eos && !parts.add_bos);
    // Its ids have gaps, and the model has more rows than it has tokens.
    assert_eq!(
        (parts.tokens.len(), parts.tokens[399].as_str(), parts.token_types[399]),
        (400, "[PAD399]", 5)
    );
    assert!(parts.merges.iter().all(|m| m.split(' ').count() == 2) && parts.merges.len() > 20);
    let digits = json!({"type": "Digits", "individual_digits": true});
    let smollm = tokenizer("byte-level", |json| {
        let own = json["pre_tokenizer"].take();
        json["pre_tokenizer"] = json!({"type": "Sequence", "pretokenizers": [digits, own]});
    });
    assert_eq!(smollm.unwrap().pre, "smollm");
}

/// Sentencepiece's own kind: every pair that makes a token is a merge.
fn whole(json: &mut Value) {
    let tokens =
        ["<unk>", "<s>", "</s>", "<0x0A>", "\u{2581}", "a", "b", "c", "ab", "bc", "abc", "\u{2581}a"];
    let vocab = tokens.iter().zip(0..).map(|(t, id)| ((*t).to_string(), json!(id)));
    json["model"]["vocab"] = Value::Object(vocab.collect());
    json["model"]["merges"] = json!(["a b", "b c", "a bc", "ab c", "\u{2581} a"]);
}

#[test]
fn a_sentencepiece_tokenizer_becomes_tokens_and_scores() {
    let parts = tokenizer("byte-fallback", whole).unwrap();
    assert_eq!((parts.model.as_str(), parts.unknown, parts.add_space_prefix), ("llama", Some(0), true));
    assert_eq!((parts.add_bos, parts.bos, parts.eos), (true, Some(1), Some(2)));
    assert_eq!(parts.token_types[..6], [2, 3, 3, 6, 1, 1]);
    // Earlier merges have higher scores; the two that make `abc` count as one.
    assert_eq!(parts.scores[8..12], [-1.0, -2.0, -3.0, -5.0]);
}

#[test]
fn tokens_that_other_files_add_are_the_vocabularys() {
    let added = [("[X]", false), ("[Y]", true)].map(|(text, special)| AddedToken::from(text, special));
    let path = golden::path("tokenizer/byte-level.json");
    let known = Tokenizer::from_files(&path, added.to_vec(), None, Some("[Y]")).unwrap();
    let parts = gguf_tokenizer(&path, added.to_vec(), None, Some("[Y]"), 400).unwrap();
    assert_eq!(parts.eos, known.eos());
    for (text, kind) in [("[X]", 4), ("[Y]", 3)] {
        let [id] = known.encode(text, false).unwrap()[..] else { panic!("{text} is one token") };
        assert_eq!((parts.tokens[id as usize].as_str(), parts.token_types[id as usize]), (text, kind));
    }
}

#[test]
fn a_tokenizer_that_llama_cpp_would_not_compute_is_refused_with_the_reason() {
    let refused = |name, edit: &dyn Fn(&mut Value), named: &str| {
        let error = tokenizer(name, |json| edit(json)).map(|_| ()).unwrap_err();
        crate::files::assert_names(&error, &["tokenizer.json", named]);
    };
    let level = |edit: &dyn Fn(&mut Value), named: &str| refused("byte-level", edit, named);
    level(&|j| j["normalizer"] = json!({"type": "NFC"}), "normalizer");
    level(&|j| j["pre_tokenizer"]["add_prefix_space"] = true.into(), "cuts text");
    level(&|j| j["model"]["ignore_merges"] = true.into(), "cuts text");
    level(&|j| j["model"]["merges"][0] = "x".into(), "");
    level(&|j| j["decoder"] = json!({"type": "Fuse"}), "byte-level");
    let spm = |edit: &dyn Fn(&mut Value), named: &str| {
        refused(
            "byte-fallback",
            &|j| {
                whole(j);
                edit(j);
            },
            named,
        );
    };
    spm(&|j| j["normalizer"] = json!({"type": "NFKC"}), "sentencepiece");
    spm(&|j| j["model"]["ignore_merges"] = true.into(), "whole words");
    spm(
        &|j| j["model"]["merges"] = json!(["a b", "b c", "a bc", "\u{2581} a"]),
        "never joins \"ab\" and \"c\"",
    );
    spm(
        &|j| j["model"]["merges"] = json!(["a bc", "a b", "b c", "ab c", "\u{2581} a"]),
        "\"abc\" do not stand together",
    );
    spm(
        &|j| {
            j["post_processor"]["single"]
                .as_array_mut()
                .unwrap()
                .push(json!({"SpecialToken": {"id": "<s>", "type_id": 0}}));
        },
        "post-processor",
    );
    // Trained by Hugging Face's library, which joins what it has learnt and nothing else.
    refused("byte-fallback", &|_| {}, "sentencepiece");
}
