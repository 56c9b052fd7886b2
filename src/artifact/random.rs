//! A base model of random weights, as a Hugging Face folder: what needs a model's sizes but not its answers can be tried before
//! there is a model.

use super::base::BaseConfig;
use super::hugging_face::read_config;
use super::{ArtifactError, readable_by_all, write_whole};
use half::bf16;
use rand::{RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;
use safetensors::Dtype;
use safetensors::tensor::{View, serialize_to_file};
use serde_json::{Map, Value, json};
use std::borrow::Cow;
use std::cell::RefCell;
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

/// Reads a config.json alone; there need not be any weights.
pub fn read_base_config(path: &Path) -> Result<BaseConfig, ArtifactError> {
    read_config(path)
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
    let vocabulary = read_config(config)?.vocabulary;
    let io = |source| ArtifactError::Io { path: config.into(), source };
    let text = std::fs::read(config).map_err(io)?;
    let io = |source| ArtifactError::Io { path: folder.into(), source };
    std::fs::create_dir_all(folder).map_err(io)?;

    let path = folder.join("model.safetensors");
    let mut done = 0;
    let drawn = RefCell::new(|| {
        done += 1;
        progress(done);
    });
    let views = tensors.iter().zip(seed..).map(|(tensor, seed)| {
        let drawn = &drawn as &RefCell<dyn FnMut()>;
        (tensor.name.as_str(), Drawn { shape: &tensor.shape, seed, drawn })
    });
    let metadata = Some([("format".to_owned(), "pt".to_owned())].into());
    serialize_to_file(views, metadata, &path).map_err(|e| ArtifactError::wrong(&path, e.to_string()))?;
    readable_by_all(&path)?;
    write_whole(&folder.join("tokenizer.json"), tokenizer(vocabulary).to_string().as_bytes())?;
    write_whole(&folder.join("config.json"), &text)
}

/// A tensor whose numbers come into being when they are written.
struct Drawn<'a> {
    shape: &'a [usize],
    seed: u64,
    /// Told when they have.
    drawn: &'a RefCell<dyn FnMut() + 'a>,
}

impl View for Drawn<'_> {
    fn dtype(&self) -> Dtype {
        Dtype::BF16
    }

    fn shape(&self) -> &[usize] {
        self.shape
    }

    fn data_len(&self) -> usize {
        2 * self.shape.iter().product::<usize>()
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let mut bytes = vec![0; self.data_len()];
        if self.shape.len() == 1 {
            bytes.as_chunks_mut::<2>().0.fill(bf16::ONE.to_le_bytes());
        } else {
            ChaCha8Rng::seed_from_u64(self.seed).fill_bytes(&mut bytes);
            // Even numbers in -a..a have a deviation of a / sqrt(3).
            let step = DEVIATION * 3f32.sqrt() / 32768.0;
            for pair in bytes.as_chunks_mut::<2>().0 {
                *pair = bf16::from_f32(f32::from(i16::from_le_bytes(*pair)) * step).to_le_bytes();
            }
        }
        (self.drawn.borrow_mut())();
        bytes.into()
    }
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
