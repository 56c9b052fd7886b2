//! Arbitrary and mutated files: whatever bytes a file has, reading it ends in a value or in an error that names the
//! file. A panic, an endless loop or memory by a file's word would end the test.

use crate::files::Folder;
use crate::golden;
use lonas::artifact::{Base, ModelFolder, TokenizerSource, read_adapter, read_published_adapter};
use lonas::backend::cpu::{Cpu, Dtype};
use lonas::model;
use lonas::model::llama;
use lonas::text::{Tokenizer, VocabularyParts};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use std::collections::BTreeMap;
use std::path::Path;

/// One damage; positions are fractions of the length, in 1/65536.
#[derive(Debug, Clone)]
enum Mutation {
    Flip(u16, u8),
    /// A little-endian number of this many bytes: lengths, offsets and counts are such.
    Number(u16, usize, u64),
    Cut(u16, u16),
    Insert(u16, Vec<u8>),
}

fn mutation() -> impl Strategy<Value = Mutation> {
    let number = prop_oneof![
        Just(0),
        Just(u64::MAX),
        Just(1 << 63),
        Just(1 << 31),
        Just(u64::from(u32::MAX)),
        0..300u64,
        any::<u64>()
    ];
    prop_oneof![
        4 => (any::<u16>(), 0..8u8).prop_map(|(at, bit)| Mutation::Flip(at, bit)),
        4 => (any::<u16>(), prop_oneof![Just(1), Just(4), Just(8)], number)
            .prop_map(|(at, bytes, n)| Mutation::Number(at, bytes, n)),
        1 => (any::<u16>(), any::<u16>()).prop_map(|(from, to)| Mutation::Cut(from, to)),
        2 => (any::<u16>(), prop_oneof![
            prop::collection::vec(any::<u8>(), 1..20),
            // Pieces that stay readable, to get past the parser.
            prop::sample::select(vec!["0", "-1", "1e99", ",", "null", "[]", "\"x\":{},", "99999999999999999999"])
                .prop_map(|s| s.as_bytes().to_vec()),
        ]).prop_map(|(at, bytes)| Mutation::Insert(at, bytes)),
    ]
}

/// Only the first `header` bytes are damaged: what lies behind is numbers, where nothing can go wrong.
fn mutated(whole: &[u8], header: usize, mutations: &[Mutation]) -> Vec<u8> {
    let mut bytes = whole.to_vec();
    for mutation in mutations {
        let length = bytes.len().min(header);
        let place = |at: u16| length * usize::from(at) / 65536;
        match mutation {
            _ if length == 0 => break,
            Mutation::Flip(at, bit) => bytes[place(*at)] ^= 1 << bit,
            Mutation::Number(at, count, number) => {
                let at = place(*at);
                let end = (at + count).min(bytes.len());
                bytes[at..end].copy_from_slice(&number.to_le_bytes()[..end - at]);
            }
            Mutation::Cut(from, to) => {
                let (from, to) = (place(*from.min(to)), place(*from.max(to)));
                bytes.drain(from..to);
            }
            Mutation::Insert(at, piece) => {
                let at = place(*at);
                bytes.splice(at..at, piece.iter().copied());
            }
        }
    }
    bytes
}

/// Opens `folder` with its file `file` first full of arbitrary bytes, then mutated. Whatever is refused is refused with
/// the file's or folder's name; the undamaged folder is opened, and some of the damaged ones are not.
fn attack(folder: &Folder, file: &str, header: usize, open: impl Fn(&Path) -> Result<(), String>) {
    let whole = folder.read(file);
    open(folder.path()).unwrap();
    let refusals = std::cell::Cell::new(0);
    let check = |bytes: Vec<u8>| {
        folder.write(file, bytes);
        if let Err(message) = open(folder.path()) {
            refusals.set(refusals.get() + 1);
            prop_assert!(message.len() < 2000, "a message of {} bytes", message.len());
        }
        Ok(())
    };
    let config = Config { failure_persistence: None, ..Config::default() };
    let mut runner = TestRunner::new(Config { cases: 64, ..config.clone() });
    runner.run(&prop::collection::vec(any::<u8>(), 0..200), check).unwrap();
    // More with PROPTEST_CASES.
    let mut runner = TestRunner::new(config);
    let mutations = prop::collection::vec(mutation(), 1..4);
    runner.run(&mutations, |m| check(mutated(&whole, header, &m))).unwrap();
    assert!(
        refusals.get() > 64,
        "only {} were refused, so the damage did not reach anything",
        refusals.get()
    );
}

/// Opens and loads a base, every tensor of it.
fn load(path: &Path) -> Result<(), String> {
    let base = Base::open(path).map_err(|e| e.to_string())?;
    llama::load(&Cpu::new(Dtype::Auto, 1), &base, Vec::new(), &BTreeMap::new())
        .map(|_| ())
        .map_err(|e| e.to_string())?;
    let TokenizerSource::Gguf(v) = base.tokenizer else { return Ok(()) };
    let (bos, eos, add_bos) = (v.bos, v.eos, v.add_bos);
    let (model, pre, tokens, token_types, merges) = (v.model, v.pre, v.tokens, v.token_types, v.merges);
    let parts = VocabularyParts { model, pre, tokens, token_types, merges, bos, eos, add_bos };
    let tokenizer = Tokenizer::from_vocabulary(parts).map_err(|e| e.to_string())?;
    tokenizer.encode("the cat <|end|> é", true).map(|_| ()).map_err(|e| e.to_string())
}

#[test]
fn any_gguf_file_is_read_or_refused() {
    for name in ["plain.gguf", "k.gguf"] {
        let folder = Folder::copy_of("gguf");
        // The numbers begin after about 9 kB of names and vocabulary.
        attack(&folder, name, 9000, |path| load(&path.join(name)));
    }
}

#[test]
fn any_safetensors_file_is_read_or_refused() {
    let folder = Folder::copy_of("tiny-bias-headdim/base");
    attack(&folder, "model.safetensors", 3000, load);
    let folder = Folder::copy_of("tiny-bias-headdim/supernet");
    attack(&folder, "adapter_model.safetensors", 3000, |path| {
        read_adapter(path).map(|_| ()).map_err(|e| e.to_string())
    });
}

#[test]
fn any_torch_file_is_read_or_refused() {
    // The archive's directory stands at its end; what its checksums cover is tried in `published::adapters`.
    attack(&Folder::copy_of("adapters/cut"), "adapter_model.bin", usize::MAX, |path| {
        read_published_adapter(path).map(|_| ()).map_err(|e| e.to_string())
    });
}

#[test]
fn any_json_beside_the_tensors_is_read_or_refused() {
    for (name, file) in
        [("tiny-bias-headdim/base", "config.json"), ("tiny-untied-bf16/base", "model.safetensors.index.json")]
    {
        attack(&Folder::copy_of(name), file, usize::MAX, load);
    }
    attack(&Folder::copy_of("tiny-bias-headdim/supernet"), "adapter_config.json", usize::MAX, |path| {
        read_adapter(path).map(|_| ()).map_err(|e| e.to_string())
    });
}

#[test]
fn any_model_folder_is_read_or_refused() {
    let base = Base::open(&golden::path("tiny-tied/base")).unwrap();
    let open = |path: &Path| {
        let folder = ModelFolder::open(path).map_err(|e| e.to_string())?;
        let shape = model::model_shape(&base.config, Some(&folder.adapter_config));
        let space = folder.search_space(&shape).map_err(|e| e.to_string())?;
        folder.catalog(&shape, &space).map(|_| ()).map_err(|e| e.to_string())
    };
    let folder = Folder::copy_of("tiny-tied-ordered/supernet");
    attack(&folder, "supernet.json", usize::MAX, open);

    let folder = Folder::copy_of("tiny-tied-ordered/supernet");
    let opened = ModelFolder::open(folder.path()).unwrap();
    let shape = model::model_shape(&base.config, Some(&opened.adapter_config));
    let space = opened.search_space(&shape).unwrap();
    opened.write_catalog(&opened.catalog(&shape, &space).unwrap()).unwrap();
    attack(&folder, "catalog.json", usize::MAX, open);
}

#[test]
fn any_tokenizer_file_is_read_or_refused() {
    for name in ["byte-level.json", "byte-fallback.json"] {
        attack(&Folder::copy_of("tokenizer"), name, usize::MAX, |path| {
            let tokenizer = Tokenizer::from_hugging_face(&path.join(name), Some("<s>"), Some("</s>"));
            let tokenizer = tokenizer.map_err(|e| e.to_string())?;
            let ids = tokenizer.encode("the cat <s> é🙂", true).map_err(|e| e.to_string())?;
            tokenizer.decode(&ids, false);
            Ok(())
        });
    }
}
