//! GGUF files in every supported number format, against gguf-py's and transformers' reading of the same files.

use crate::golden::{self, distance, push};
use lonas::artifact::{Base, TokenizerSource};
use lonas::backend::cpu::{Cpu, Dtype};
use lonas::backend::reference::Reference;
use lonas::backend::{Backend, Selection};
use lonas::model;
use lonas::model::llama::{self, LlamaExecutor};
use lonas::model::{Batch, Executor, Orders};
use lonas::text::{Tokenizer, VocabularyParts};
use lonas::weights::HostData;
use std::sync::Arc;

const FILES: [&str; 4] = ["plain", "k", "llama3", "linear"];

/// What the generator wrote, in its own words.
#[derive(serde::Deserialize)]
struct Facts {
    tokens: Vec<String>,
    types: Vec<i32>,
    merges: Vec<String>,
    formats: Vec<String>,
    hidden: usize,
    heads: usize,
    kv_heads: usize,
    head: usize,
    inner: usize,
    tied: bool,
    sequence: Vec<u32>,
}

fn open(name: &str) -> (Base, Facts) {
    let base = Base::open(&golden::path("gguf").join(format!("{name}.gguf"))).unwrap();
    (base, golden::json(&format!("gguf/{name}.json")))
}

/// Every tensor of a LLaMA with this configuration: name, rows, columns; a vector has one row.
fn tensors_of(base: &Base) -> Vec<(String, usize, usize)> {
    let linears = model::model_shape(&base.config, None).linears;
    let (vocabulary, hidden) = (base.config.vocabulary, base.config.hidden);
    let mut tensors = vec![("model.embed_tokens.weight".to_string(), vocabulary, hidden)];
    let untied = |name: &str| !base.config.tied_embeddings || name != "lm_head";
    let linears = linears.into_iter().filter(|l| untied(&l.name));
    tensors.extend(linears.map(|l| (format!("{}.weight", l.name), l.out, l.inp)));
    tensors.push(("model.norm.weight".to_string(), 1, hidden));
    for layer in 0..base.config.layers {
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            tensors.push((format!("model.layers.{layer}.{norm}.weight"), 1, hidden));
        }
    }
    tensors
}

#[test]
fn every_format_has_the_values_and_row_order_of_gguf_and_transformers() {
    for name in FILES {
        let (base, _) = open(name);
        let mut golden = golden::tensors(&format!("gguf/{name}.safetensors"));
        golden.remove("logits");
        for (tensor, rows, columns) in tensors_of(&base) {
            let values = match tensor.contains("norm") {
                true => base.vector(&tensor, columns).unwrap().data,
                false => base.matrix(&tensor, rows, columns).unwrap().to_f32(),
            };
            let expected = golden.remove(&tensor).unwrap();
            assert!(values == expected, "{name} {tensor}: off by {}", distance(&values, &expected));
        }
        assert!(golden.is_empty(), "{name}: never read: {:?}", golden.keys());
    }
}

#[test]
fn what_the_file_has_in_few_bits_stays_in_few_bits() {
    let (base, facts) = open("plain");
    for (layer, format) in facts.formats.iter().enumerate() {
        let name = format!("model.layers.{layer}.self_attn.q_proj.weight");
        let matrix = base.matrix(&name, facts.heads * facts.head, facts.hidden).unwrap();
        let kept = match (format.as_str(), &matrix.data) {
            ("F32" | "F16", HostData::F32(_)) | ("BF16", HostData::Bf16(_)) => true,
            ("Q8_0" | "Q4_0", HostData::Blocks(blocks)) => blocks.minimums.is_none(),
            ("Q4_1", HostData::Blocks(blocks)) => blocks.minimums.is_some(),
            _ => false,
        };
        assert!(kept, "{format} became {:?}", matrix.data);
    }
}

#[test]
fn the_header_says_what_was_written() {
    for name in FILES {
        let (base, facts) = open(name);
        let config = &base.config;
        assert_eq!(
            (config.layers, config.hidden, config.intermediate),
            (facts.formats.len(), facts.hidden, facts.inner)
        );
        assert_eq!(
            (config.query_heads, config.kv_heads, config.head_size),
            (facts.heads, facts.kv_heads, facts.head)
        );
        assert_eq!((config.vocabulary, config.max_positions), (facts.tokens.len(), 128));
        assert_eq!((config.rope_theta, config.norm_eps), (5000.0, 3e-5));
        assert_eq!(config.tied_embeddings, facts.tied);
        let end = if name == "plain" { 1 } else { 0 };
        assert_eq!((config.bos_token, config.eos_tokens.as_slice()), (Some(0), [end].as_slice()));

        let TokenizerSource::Gguf(vocabulary) = &base.tokenizer else { panic!("no vocabulary") };
        assert_eq!(vocabulary.model, "gpt2");
        assert_eq!(
            (&vocabulary.tokens, &vocabulary.merges, &vocabulary.token_types),
            (&facts.tokens, &facts.merges, &facts.types)
        );
        assert_eq!((vocabulary.bos, vocabulary.eos), (Some(0), Some(end)));
        assert_eq!(vocabulary.add_bos, name == "plain");
        assert_eq!(vocabulary.chat_template.is_some(), name == "plain");
    }
}

#[test]
fn the_vocabulary_inside_becomes_a_tokenizer() {
    let (base, facts) = open("plain");
    let TokenizerSource::Gguf(v) = base.tokenizer else { panic!("no vocabulary") };
    let (bos, eos, add_bos) = (v.bos, v.eos, v.add_bos);
    let (model, pre, tokens, token_types, merges) = (v.model, v.pre, v.tokens, v.token_types, v.merges);
    let rest = VocabularyParts::default();
    let parts = VocabularyParts { model, pre, tokens, token_types, merges, bos, eos, add_bos, ..rest };
    let tokenizer = Tokenizer::from_vocabulary(parts).unwrap();
    let id = |token: &str| facts.tokens.iter().position(|t| t == token).unwrap() as u32;
    // By the merges: ` the` is one token, `th` is one, `m` and the control token stand for themselves.
    let ids = tokenizer.encode(" the thm<|end|>", true).unwrap();
    assert_eq!(ids, [0, id("Ġthe"), id("Ġ"), id("th"), id("m"), 1]);
    assert_eq!(tokenizer.decode(&ids, true), " the thm");
}

#[test]
fn logits_are_those_of_transformers_reading_the_same_file() {
    fn check<B: Backend>(name: &str, backend: B, most: f32) {
        let (base, facts) = open(name);
        let golden = &golden::tensors(&format!("gguf/{name}.safetensors"))["logits"];
        let model = llama::load(&backend, &base, Vec::new(), &Orders::default()).unwrap();
        let mut executor = LlamaExecutor::new(model, backend, 4, 16).unwrap();
        let shape = Arc::new(model::model_shape(&base.config, None).full());
        let mut batch = Batch::default();
        push(&mut batch, Selection { adapter: 0, subnetwork: 0, shape }, &facts.sequence, 0, &[2, 0, 3]);
        let off = distance(&executor.forward(&batch).unwrap().values, golden);
        assert!(off <= most, "{name}: off by {off}");
    }
    for name in FILES {
        check(name, Reference::new(), 1e-4);
        check(name, Cpu::new(Dtype::F32, 1), 1e-4);
        // The file's own blocks, multiplied with inputs in 8 bits.
        check(name, Cpu::new(Dtype::Auto, 2), 0.1);
    }
}

#[test]
fn factors_of_positions_must_be_positive_and_their_kind_be_known() {
    let folder = tempfile::tempdir().unwrap();
    let refused = |name: &str, change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = std::fs::read(golden::path("gguf").join(format!("{name}.gguf"))).unwrap();
        change(&mut bytes);
        let path = folder.path().join("base.gguf");
        std::fs::write(&path, bytes).unwrap();
        Base::open(&path).unwrap_err().to_string()
    };
    for bad in [0.0f32, -1.0, f32::NAN, f32::INFINITY] {
        // The factors of eight pairs are the last tensor.
        let message = refused("llama3", &|bytes| {
            let at = bytes.len() - 32;
            bytes[at..at + 4].copy_from_slice(&bad.to_le_bytes());
        });
        assert!(message.contains("rope_freqs.weight") && message.contains("positive"), "{message}");
        let message = refused("linear", &|bytes| {
            let key = b"llama.rope.scaling.factor";
            let at = bytes.windows(key.len()).position(|window| window == key).unwrap() + key.len() + 4;
            bytes[at..at + 4].copy_from_slice(&bad.to_le_bytes());
        });
        assert!(message.contains("llama.rope.scaling.factor") && message.contains("positive"), "{message}");
    }
    let message = refused("linear", &|bytes| {
        let at = bytes.windows(6).position(|window| window == b"linear").unwrap();
        bytes[at..at + 6].copy_from_slice(b"yarn!!");
    });
    assert!(message.contains("`yarn!!` rope scaling is not supported"), "{message}");
}
