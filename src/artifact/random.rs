//! A base model of random weights, as a Hugging Face folder: what needs a model's sizes but not its answers can be tried before
//! there is a model.

use super::config::read_base_config;
use super::{ArtifactError, NumberFormat, OutTensor, SafetensorsWriter, write_whole};
use rand::{RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Map, Value, json};
use std::path::Path;

/// The standard deviation that LLaMA's weights begin their training with (`initializer_range`).
const DEVIATION: f32 = 0.02;

/// One tensor of a base.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BaseTensor {
    /// Its Hugging Face name.
    pub name: String,
    pub shape: Vec<usize>,
}

/// Writes a copy of `config`, `model.safetensors` in bf16 and a tokenizer of single bytes into `folder`. Matrices are drawn
/// evenly around zero, vectors (the norms' weights) are ones. One tensor is in memory at a time; `progress` is told how many
/// are done.
///
/// # Errors
/// A folder that cannot be written, or no room; then `model.safetensors` is not there.
pub fn write_random_base(
    folder: &Path,
    config: &Path,
    tensors: &[BaseTensor],
    seed: u64,
    mut progress: impl FnMut(u64),
) -> Result<(), ArtifactError> {
    let vocabulary = read_base_config(config)?.vocabulary;
    let io = |source| ArtifactError::Io { path: config.into(), source };
    let text = std::fs::read(config).map_err(io)?;
    let io = |source| ArtifactError::Io { path: folder.into(), source };
    std::fs::create_dir_all(folder).map_err(io)?;

    let out = |tensor: &BaseTensor| {
        let BaseTensor { name, shape } = tensor.clone();
        OutTensor { name, shape, format: NumberFormat::Bf16 }
    };
    let path = folder.join("model.safetensors");
    let mut file = SafetensorsWriter::create(&path, tensors.iter().map(out).collect())?;
    for ((tensor, seed), done) in tensors.iter().zip(seed..).zip(1..) {
        file.tensor(&numbers(&tensor.shape, seed))?;
        progress(done);
    }
    file.finish()?;
    write_whole(&folder.join("tokenizer.json"), tokenizer(vocabulary).to_string().as_bytes())?;
    write_whole(&folder.join("config.json"), &text)
}

/// A matrix's are drawn, a vector's are ones.
fn numbers(shape: &[usize], seed: u64) -> Vec<f32> {
    let count = shape.iter().product();
    if shape.len() == 1 {
        return vec![1.0; count];
    }
    let mut bytes = vec![0; 2 * count];
    ChaCha8Rng::seed_from_u64(seed).fill_bytes(&mut bytes);
    // Even numbers in -a..a have a deviation of a / sqrt(3).
    let step = DEVIATION * 3f32.sqrt() / 32768.0;
    let number = |pair: &[u8; 2]| f32::from(i16::from_le_bytes(*pair)) * step;
    bytes.as_chunks::<2>().0.iter().map(number).collect()
}

/// Byte-level BPE without merges: the first 256 tokens are the bytes, the others have names that no text contains.
fn tokenizer(vocabulary: usize) -> Value {
    let token = |(id, byte): (usize, Option<char>)| {
        (byte.map_or_else(|| format!("\u{0120}<{id}>"), String::from), id.into())
    };
    let bytes = byte_level_alphabet().into_iter().map(Some).chain(std::iter::repeat(None));
    let vocab = (0..vocabulary).zip(bytes).map(token).collect::<Map<String, Value>>();
    let byte_level =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [],
        "normalizer": null,
        "pre_tokenizer": byte_level,
        "post_processor": null,
        "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocab, "merges": [],
        },
    })
}

/// GPT-2's character for each byte: itself where it can be seen, else one from 256 on.
fn byte_level_alphabet() -> Vec<char> {
    let seen = |b: u8| matches!(b, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..);
    let mut others = 0x100u32..;
    let mut character =
        |b: u8| if seen(b) { Some(char::from(b)) } else { others.next().and_then(char::from_u32) };
    (0..=u8::MAX).filter_map(&mut character).collect()
}
