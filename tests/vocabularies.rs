//! Vocabularies as GGUF files carry them, LLaMA's kinds against Hugging Face's own library; and back again.

use crate::files::{Folder, assert_names};
use crate::golden;
use lonas::artifact::{Base, TokenizerSource};
use lonas::text::{TextError, Tokenizer, VocabularyParts, gguf_tokenizer};
use serde_json::Value;
use std::collections::BTreeMap;

#[derive(serde::Deserialize)]
struct Golden {
    /// tokenizer.json
    tokenizer: Value,
    parts: Parts,
    texts: Vec<Text>,
}

#[derive(Clone, serde::Deserialize)]
struct Parts {
    model: String,
    pre: String,
    tokens: Vec<String>,
    token_types: Vec<i32>,
    scores: Vec<f32>,
    merges: Vec<String>,
    bos: Option<u32>,
    eos: Option<u32>,
    unknown: Option<u32>,
    add_bos: bool,
    add_space_prefix: bool,
}

#[derive(serde::Deserialize)]
struct Text {
    text: String,
    ids: Vec<u32>,
    /// Without what the tokenizer itself adds.
    plain: Vec<u32>,
    /// Of `ids`, special tokens too.
    decoded: String,
}

fn parts(of: &Parts) -> VocabularyParts {
    let of = of.clone();
    VocabularyParts {
        model: of.model,
        pre: of.pre,
        tokens: of.tokens,
        token_types: of.token_types,
        scores: of.scores,
        merges: of.merges,
        bos: of.bos,
        eos: of.eos,
        unknown: of.unknown,
        add_bos: of.add_bos,
        add_eos: false,
        add_space_prefix: of.add_space_prefix,
    }
}

fn all() -> BTreeMap<String, Golden> {
    let all: BTreeMap<String, Golden> = golden::json("vocabularies.json");
    assert_eq!(all.len(), 3);
    all
}

#[track_caller]
fn check(tokenizer: &Tokenizer, texts: &[Text], name: &str) {
    assert!(texts.len() > 10);
    for Text { text, ids, plain, decoded } in texts {
        assert_eq!(&tokenizer.encode(text, true).unwrap(), ids, "{name} {text:?}");
        assert_eq!(&tokenizer.encode(text, false).unwrap(), plain, "{name} {text:?}");
        assert_eq!(&tokenizer.decode_whole(ids, false).unwrap(), decoded, "{name} {text:?}");
    }
}

#[test]
fn llamas_vocabularies_encode_as_hugging_face_does() {
    for (name, golden) in all() {
        check(&Tokenizer::from_vocabulary(parts(&golden.parts)).unwrap(), &golden.texts, &name);
    }
}

#[test]
fn a_file_that_says_nothing_more_is_read_as_llama_cpp_reads_it() {
    let base = Base::open(&golden::path("vocabulary.gguf")).unwrap();
    assert_eq!(base.config.eos_tokens, [2, 5]);
    let TokenizerSource::Gguf(found) = base.tokenizer else { panic!("no vocabulary") };
    let Parts { tokens, token_types, scores, .. } = &all()["llama"].parts;
    assert_eq!((&found.tokens, &found.token_types, &found.scores), (tokens, token_types, scores));
    assert_eq!((found.bos, found.eos, found.unknown), (Some(1), Some(2), Some(0)));
    assert_eq!((found.add_bos, found.add_eos, found.add_space_prefix), (true, false, true));
}

/// As an exported file is opened again, and as a base in GGUF is exported.
#[test]
fn a_tokenizer_is_the_same_after_it_has_been_in_ggufs_words() {
    for (name, golden) in all() {
        let folder = Folder::empty();
        folder.write("tokenizer.json", golden.tokenizer.to_string());
        let text = |id: Option<u32>| id.map(|id| golden.parts.tokens[id as usize].as_str());
        let (bos, eos) = (text(golden.parts.bos), text(golden.parts.eos));
        let rows = golden.parts.tokens.len() + 3;
        let words = gguf_tokenizer(&folder.file("tokenizer.json"), Vec::new(), bos, eos, rows).unwrap();
        assert_eq!((words.tokens.len(), &words.model), (rows, &golden.parts.model));
        let again = Tokenizer::from_vocabulary(words).unwrap();
        check(&again, &golden.texts, &name);
        folder.write("again.json", again.to_json().unwrap());
        check(
            &Tokenizer::from_hugging_face(&folder.file("again.json"), bos, eos).unwrap(),
            &golden.texts,
            &name,
        );
    }
}

#[test]
fn an_end_of_sequence_comes_to_every_text_where_the_vocabulary_says_so() {
    let golden = &all()["llama"];
    let ends = VocabularyParts { add_eos: true, ..parts(&golden.parts) };
    let ends = Tokenizer::from_vocabulary(ends).unwrap();
    for Text { text, ids, .. } in &golden.texts {
        assert_eq!(ends.encode(text, true).unwrap(), [&ids[..], &[2]].concat());
    }
}

#[test]
fn a_vocabulary_of_scores_that_cannot_be_used_is_refused_with_a_reason() {
    let golden = &all()["llama"];
    let refused = |edit: &dyn Fn(&mut VocabularyParts), named: &str| {
        let mut parts = parts(&golden.parts);
        edit(&mut parts);
        let error = Tokenizer::from_vocabulary(parts).err().unwrap();
        assert!(matches!(error, TextError::Vocabulary { .. }), "{error}");
        assert_names(&error.to_string(), &[named]);
    };
    refused(&|p| p.scores.truncate(5), "but 5 scores");
    refused(&|p| p.token_types.clear(), "but 0 kinds of tokens");
    refused(&|p| p.unknown = Some(u32::MAX), "unknown");
    refused(&|p| p.tokens[270] = p.tokens[271].clone(), "the same text");
    refused(&|p| p.tokens[300] = "a".repeat(10_000), "10000 bytes");
    // Every way to cut a row of one letter is a pair.
    refused(
        &|p| {
            p.tokens = (1..=250).map(|n| "a".repeat(n)).collect();
            (p.scores, p.token_types) = (vec![0.0; 250], vec![1; 250]);
            (p.bos, p.eos, p.unknown) = (None, None, None);
        },
        "more ways",
    );
    let mut odd = parts(&golden.parts);
    odd.scores.fill(f32::NAN);
    Tokenizer::from_vocabulary(odd).unwrap().encode("the cat", true).unwrap();
}
