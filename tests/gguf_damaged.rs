//! Damaged and hostile GGUF files: each is refused by an error that names the file and the tensor or key.

use crate::files::{Folder, assert_names};
use lonas::artifact::Base;
use lonas::backend::cpu::{Cpu, Dtype};
use lonas::model::{Orders, llama};

const FILE: &str = "plain.gguf";
const Q: &str = "blk.0.attn_q.weight";
/// Of a value type: u32, f32, a text, a list.
const U32: u32 = 4;
const F32: u32 = 6;
const TEXT: u32 = 8;
const LIST: u32 = 9;

fn load(folder: &Folder) -> Result<(), String> {
    let base = Base::open(&folder.file(FILE)).map_err(|e| e.to_string())?;
    let loaded = llama::load(&Cpu::new(Dtype::Auto, 1), &base, Vec::new(), &Orders::default());
    loaded.map(|_| ()).map_err(|e| e.to_string())
}

#[track_caller]
fn refused(damage: impl FnOnce(&mut Vec<u8>)) -> String {
    let folder = Folder::copy_of("gguf");
    load(&folder).unwrap();
    let mut bytes = folder.read(FILE);
    damage(&mut bytes);
    folder.write(FILE, bytes);
    let message = load(&folder).unwrap_err();
    assert_names(&message, &[FILE]);
    message
}

/// Where the bytes after a key's or a tensor's name begin.
fn after(bytes: &[u8], name: &str) -> usize {
    let entry = [&(name.len() as u64).to_le_bytes(), name.as_bytes()].concat();
    bytes.windows(entry.len()).position(|w| w == entry).unwrap() + entry.len()
}

/// Overwrites the value of a key, its type included; the new one must be as long as the old one.
fn set(bytes: &mut [u8], key: &str, kind: u32, value: &[u8]) {
    let at = after(bytes, key);
    bytes[at..at + 4].copy_from_slice(&kind.to_le_bytes());
    bytes[at + 4..at + 4 + value.len()].copy_from_slice(value);
}

/// A key's u32.
#[track_caller]
fn with(key: &str, value: u32) -> String {
    refused(|b| set(b, key, U32, &value.to_le_bytes()))
}

/// Overwrites part of a matrix's entry: its dimensions at 4 and 12 (innermost first), its number format at 20, its offset
/// at 24.
#[track_caller]
fn with_tensor(at: usize, value: &[u8]) -> String {
    refused(|b| {
        let at = after(b, Q) + at;
        b[at..at + value.len()].copy_from_slice(value);
    })
}

/// LLaMA 3's way to stretch positions is a tensor; what it names here is another one.
#[test]
fn rotary_factors_of_another_shape_are_refused() {
    let message = refused(|b| {
        let at = after(b, "token_embd.weight");
        b[at - 17..at].copy_from_slice(b"rope_freqs.weight");
    });
    assert_names(&message, &["rope_freqs.weight", "expected shape [4]"]);
}

#[test]
fn a_header_with_impossible_sizes_is_refused_by_key() {
    assert_names(&with("llama.block_count", 0), &["num_hidden_layers", "0 is out of range"]);
    assert_names(&with("llama.block_count", 1_000_000_000), &["num_hidden_layers", "out of range"]);
    assert_names(&with("llama.block_count", 7), &["there is no tensor", "model.layers.6."]);
    assert_names(&with("llama.embedding_length", 0), &["hidden_size", "0 is out of range"]);
    assert_names(&with("llama.embedding_length", u32::MAX), &["hidden_size", "out of range"]);
    assert_names(&with("llama.embedding_length", 64), &["model.embed_tokens.weight", "expected shape"]);
    assert_names(&with("llama.feed_forward_length", 0), &["intermediate_size", "0 is out of range"]);
    assert_names(&with("llama.attention.head_count", 0), &["num_attention_heads", "0 is out of range"]);
    assert_names(&with("llama.attention.head_count", 3), &["num_key_value_heads", "2 does not divide 3"]);
    assert_names(&with("llama.attention.head_count_kv", 0), &["num_key_value_heads", "0 is out of range"]);
    assert_names(&with("llama.attention.key_length", 16), &["llama.rope.dimension_count", "8 of 16"]);
    assert_names(&with("llama.context_length", 0), &["max_position_embeddings", "0 is out of range"]);
    for bad in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        let message = refused(|b| set(b, "llama.rope.freq_base", F32, &bad.to_le_bytes()));
        assert_names(&message, &["rope_theta", "out of range"]);
    }
    // Another type than the key has.
    let message = refused(|b| set(b, "llama.block_count", F32, &6f32.to_le_bytes()));
    assert_names(&message, &["`llama.block_count`", "a whole number, got 6"]);
    let message = refused(|b| set(b, "llama.rope.freq_base", U32, &5u32.to_le_bytes()));
    assert_names(&message, &["`llama.rope.freq_base`", "a number, got 5"]);
    let message = refused(|b| {
        let at = after(b, "general.architecture") + 4 + 8;
        b[at..at + 5].copy_from_slice(b"qwen2");
    });
    assert_names(&message, &["general.architecture", "`qwen2` is not supported"]);
    let message = refused(|b| {
        let at = after(b, "llama.block_count") - 1;
        b[at] = b'x';
    });
    assert_names(&message, &["llama.block_count", "missing"]);
}

#[test]
fn an_alignment_that_nothing_can_be_aligned_to_is_refused() {
    // The name is as long as that of the number of layers, so that one can become the other.
    let aligned = |alignment: u32| {
        refused(|b| {
            let at = after(b, "llama.block_count");
            b[at - 17..at].copy_from_slice(b"general.alignment");
            set(b, "general.alignment", U32, &alignment.to_le_bytes());
        })
    };
    assert_names(&aligned(0), &["general.alignment", "got 0"]);
    assert_names(&aligned(u32::MAX), &["general.alignment", "got 4294967295"]);
    // With one that is fine, what is missed is the key that was overwritten.
    assert_names(&aligned(64), &["llama.block_count", "missing"]);
}

#[test]
fn lengths_that_lie_are_refused() {
    let number = |at: usize, n: u64| refused(|b| b[at..at + 8].copy_from_slice(&n.to_le_bytes()));
    for lie in [u64::MAX, 1 << 62, 1 << 40, 1 << 30] {
        // The number of tensors, of keys, the length of the first key.
        for at in [8, 16, 24] {
            assert_names(&number(at, lie), &["not a GGUF file"]);
        }
        let message = refused(|b| {
            let at = after(b, "tokenizer.ggml.tokens") + 8;
            b[at..at + 8].copy_from_slice(&lie.to_le_bytes());
        });
        assert_names(&message, &["not a GGUF file"]);
    }
    assert_names(&refused(|b| b[4] = 1), &["version 1 is not supported"]);
    assert_names(&refused(|b| b[0] = b'X'), &["does not begin with GGUF"]);
    let message = refused(|b| set(b, "llama.block_count", 13, &[]));
    assert_names(&message, &["there is no value type 13"]);
    let message = refused(|b| set(b, "tokenizer.ggml.tokens", TEXT, &[]));
    assert_names(&message, &["not a GGUF file"]);
}

#[test]
fn lists_within_lists_do_not_exhaust_the_stack() {
    let mut bytes =
        [b"GGUF".as_slice(), &3u32.to_le_bytes(), &0u64.to_le_bytes(), &1u64.to_le_bytes()].concat();
    bytes.extend([&1u64.to_le_bytes(), b"k".as_slice(), &LIST.to_le_bytes()].concat());
    for _ in 0..1_000_000 {
        bytes.extend([LIST.to_le_bytes().as_slice(), &1u64.to_le_bytes()].concat());
    }
    assert_names(&refused(|b| *b = bytes), &["its lists nest more than"]);
}

#[test]
fn a_list_of_millions_of_single_bytes_is_refused() {
    let count = 5_000_000u64;
    let mut bytes =
        [b"GGUF".as_slice(), &3u32.to_le_bytes(), &0u64.to_le_bytes(), &1u64.to_le_bytes()].concat();
    bytes.extend([&1u64.to_le_bytes(), b"k".as_slice(), &LIST.to_le_bytes(), &0u32.to_le_bytes()].concat());
    bytes.extend(count.to_le_bytes());
    bytes.extend(vec![0; count as usize]);
    assert_names(&refused(|b| *b = bytes), &["more than 4194304 values"]);
}

#[test]
fn a_tensor_that_is_not_where_or_what_it_should_be_is_refused_by_name() {
    let q = "model.layers.0.self_attn.q_proj.weight";
    assert_names(&with_tensor(4, &31u64.to_le_bytes()), &[q, "expected shape [32, 32], got [32, 31]"]);
    assert_names(&with_tensor(12, &u64::MAX.to_le_bytes()), &[q, "expected shape [32, 32]"]);
    // Q5_K, and a number that ggml has not given out.
    assert_names(&with_tensor(20, &13u32.to_le_bytes()), &[q, "ggml type 13 is not supported"]);
    assert_names(&with_tensor(20, &9999u32.to_le_bytes()), &[q, "ggml type 9999 is not supported"]);
    // Q4_K wants rows of 256.
    assert_names(&with_tensor(20, &12u32.to_le_bytes()), &[q, "rows of 32", "blocks of 256"]);
    for offset in [u64::MAX, u64::MAX - 4096, i64::MAX as u64, 1 << 40, 98_304] {
        assert_names(&with_tensor(24, &offset.to_le_bytes()), &[q, "leave the file"]);
    }
    assert_names(&with_tensor(0, &5u32.to_le_bytes()), &["`blk.0.attn_q.weight` has 5 dimensions"]);
    let message = refused(|b| {
        let at = after(b, Q) - 1;
        b[at] = b'x';
    });
    assert_names(&message, &["there is no tensor", q]);
    let message = refused(|b| {
        let at = after(b, "blk.1.attn_q.weight");
        b[at - Q.len()..at].copy_from_slice(Q.as_bytes());
    });
    assert_names(&message, &["tensor `blk.0.attn_q.weight` stands there twice"]);
}

#[test]
fn a_file_cut_anywhere_is_refused() {
    let folder = Folder::copy_of("gguf");
    let whole = folder.read(FILE);
    for length in (0..whole.len()).step_by(whole.len() / 150).chain([whole.len() - 1]) {
        folder.write(FILE, &whole[..length]);
        let message = load(&folder).unwrap_err();
        assert_names(&message, &[FILE]);
    }
}
