//! GGUF files of the LLaMA family, under Hugging Face's tensor names.
//!
//! The tensors come from a memory map, every range checked against the file. What they are called there and in which order
//! rows stand says `gguf_layout`; here they are put back into Hugging Face's order, which is exact, since blocks run along
//! a row.

use super::base::{BaseConfig, Family, GgufVocabulary, even_share};
use super::error::ArtifactError;
use super::gguf_header::{Header, TensorInfo, Value};
use super::gguf_layout::{ROPE_FACTORS, gguf_name, halves_apart};
use crate::weights::{BLOCK, Blocks, HostData, HostMatrix, HostVector};
use candle_core::quantized::GgmlDType;
use candle_core::quantized::gguf_file::TensorInfo as CandleTensor;
use half::{bf16, f16};
use memmap2::Mmap;
use std::fs::File;
use std::io::Cursor;
use std::path::{Path, PathBuf};

/// Whether a file is a GGUF file with this key in its metadata.
pub fn gguf_has(path: &Path, key: &str) -> bool {
    let header = || Header::parse(path, &map(path).ok()?).ok();
    header().is_some_and(|header| header.metadata.contains_key(key))
}

fn map(path: &Path) -> Result<Mmap, ArtifactError> {
    let io = |source| ArtifactError::Io { path: path.into(), source };
    let file = File::open(path).map_err(io)?;
    #[expect(unsafe_code, reason = "a memory map")]
    // SAFETY: the map is read only; a file that another process truncates meanwhile ends this one with SIGBUS, which
    // no check here could prevent, and bases are written by renaming.
    unsafe { Mmap::map(&file) }.map_err(io)
}

#[derive(Debug)]
pub(super) struct GgufFile {
    path: PathBuf,
    map: Mmap,
    header: Header,
    query_heads: usize,
    kv_heads: usize,
}

impl GgufFile {
    pub(super) fn open(path: &Path) -> Result<(Self, BaseConfig, GgufVocabulary), ArtifactError> {
        let map = map(path)?;
        let header = Header::parse(path, &map)?;
        let metadata = Metadata { path, header: &header };
        let (mut config, vocabulary) = (metadata.config()?, metadata.vocabulary()?);
        let scaling = metadata.rope_scaling()?;
        let (query_heads, kv_heads) = (config.query_heads, config.kv_heads);
        let file = Self { path: path.into(), map, header, query_heads, kv_heads };
        config.rope_factors = file.rope_factors(scaling, config.head_size)?;
        Ok((file, config, vocabulary))
    }

    pub(super) fn matrix(
        &self,
        name: &str,
        rows: usize,
        columns: usize,
    ) -> Result<HostMatrix, ArtifactError> {
        let (format, bytes) = self.tensor(name, &[rows, columns])?;
        let data = self.decode(name, format, bytes, &[rows, columns])?;
        let matrix = HostMatrix { name: name.into(), rows, columns, data };
        let heads = match gguf_name(name).unwrap_or_default() {
            n if n.ends_with("attn_q.weight") => self.query_heads,
            n if n.ends_with("attn_k.weight") => self.kv_heads,
            _ => return Ok(matrix),
        };
        Ok(matrix.permute_rows(&halves_apart(rows, heads)))
    }

    pub(super) fn vector(&self, name: &str, length: usize) -> Result<HostVector, ArtifactError> {
        let (format, bytes) = self.tensor(name, &[length])?;
        let data = self.decode(name, format, bytes, &[length])?;
        let matrix = HostMatrix { name: name.into(), rows: 1, columns: length, data };
        Ok(HostVector { data: matrix.to_f32(), name: matrix.name })
    }

    /// What each pair's frequency is divided by: nothing, one number, or that and a tensor's. The tensor has what LLaMA 3's rule gives,
    /// computed when the file was written.
    fn rope_factors(&self, scaling: f32, head_size: usize) -> Result<Vec<f32>, ArtifactError> {
        if !self.header.tensors.contains_key(ROPE_FACTORS) {
            return Ok(if scaling == 1.0 { Vec::new() } else { vec![scaling; head_size / 2] });
        }
        let factors = self.vector(ROPE_FACTORS, head_size / 2)?.data;
        if let Some(wrong) = factors.iter().find(|factor| !positive(**factor)) {
            let reason = format!("tensor `{ROPE_FACTORS}`: expected positive numbers, got {wrong}");
            return Err(ArtifactError::wrong(&self.path, reason));
        }
        Ok(factors.into_iter().map(|factor| factor * scaling).collect())
    }

    /// The metadata in the file's order: each value's bytes, its type included.
    pub(super) fn metadata(&self) -> impl Iterator<Item = (&str, &[u8])> {
        self.header.places.iter().map(|(key, place)| (key.as_str(), &self.map[place.clone()]))
    }

    /// A text of the metadata.
    pub(super) fn text(&self, key: &str) -> Option<&str> {
        match self.header.metadata.get(key) {
            Some(Value::Text(text)) => Some(text),
            _ => None,
        }
    }

    /// The tensor's number format and bytes, all checked.
    fn tensor(&self, name: &str, shape: &[usize]) -> Result<(GgmlDType, &[u8]), ArtifactError> {
        let missing = || ArtifactError::MissingTensor { path: self.path.clone(), tensor: name.into() };
        let info = gguf_name(name).and_then(|n| self.header.tensors.get(&n)).ok_or_else(missing)?;
        let got = info.shape.iter().map(|&d| usize::try_from(d).unwrap_or(usize::MAX)).collect::<Vec<_>>();
        let (path, tensor) = (self.path.clone(), name.to_string());
        if got != shape {
            return Err(ArtifactError::TensorShape { path, tensor, expected: shape.to_vec(), got });
        }
        let Some(format) = number_format(info) else {
            let got = format!("ggml type {}", info.format);
            return Err(ArtifactError::TensorType { path, tensor, got });
        };
        let row = shape.last().copied().unwrap_or(0);
        let (block, block_bytes) = (format.block_size(), format.type_size());
        let wrong = |reason: String| ArtifactError::wrong(&self.path, format!("tensor `{name}`: {reason}"));
        if !row.is_multiple_of(block) {
            return Err(wrong(format!("rows of {row} values do not divide into blocks of {block}")));
        }
        let length = shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d)).map(|n| n / block);
        let length = length.and_then(|n| n.checked_mul(block_bytes));
        let start = usize::try_from(self.header.data.saturating_add(info.offset)).ok();
        let range = start.zip(length).and_then(|(s, n)| Some(s..s.checked_add(n)?));
        let bytes = range.clone().and_then(|r| self.map.get(r));
        let left = || wrong(format!("its bytes {range:?} leave the file ({})", self.map.len()));
        Ok((format, bytes.ok_or_else(left)?))
    }

    fn decode(
        &self,
        name: &str,
        format: GgmlDType,
        bytes: &[u8],
        shape: &[usize],
    ) -> Result<HostData, ArtifactError> {
        let two = |b: &[u8]| [b[0], b[1]];
        let half = |b: &[u8]| f16::from_le_bytes(two(b)).to_f32();
        let data = match format {
            GgmlDType::F32 => {
                let four = |b: &[u8]| f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
                HostData::F32(bytes.chunks_exact(4).map(four).collect())
            }
            GgmlDType::F16 => HostData::F32(bytes.chunks_exact(2).map(half).collect()),
            GgmlDType::BF16 => {
                HostData::Bf16(bytes.chunks_exact(2).map(|b| bf16::from_le_bytes(two(b))).collect())
            }
            GgmlDType::Q8_0 => {
                let quants = bytes.chunks_exact(34).flat_map(|b| b[2..].iter().map(|&q| q as i8));
                let scales = bytes.chunks_exact(34).map(half).collect();
                HostData::Blocks(Blocks { quants: quants.collect(), scales, ..Blocks::default() })
            }
            GgmlDType::Q4_0 => {
                // value = scale * (nibble - 8)
                let quants = bytes.chunks_exact(18).flat_map(|b| nibbles(&b[2..]).map(|q| q - 8));
                let scales = bytes.chunks_exact(18).map(half).collect();
                HostData::Blocks(Blocks { quants: quants.collect(), scales, ..Blocks::default() })
            }
            GgmlDType::Q4_1 => {
                let quants = bytes.chunks_exact(20).flat_map(|b| nibbles(&b[4..])).collect();
                let scales = bytes.chunks_exact(20).map(half).collect();
                let minimums = Some(bytes.chunks_exact(20).map(|b| half(&b[2..])).collect());
                HostData::Blocks(Blocks { quants, scales, minimums, places: None })
            }
            _ => HostData::F32(self.dequantised(name, format, bytes, shape)?),
        };
        let values = shape.iter().product::<usize>();
        debug_assert!(!matches!(&data, HostData::Blocks(b) if b.quants.len() != values));
        Ok(data)
    }

    /// By candle, for the formats whose blocks do not fit [`HostData::Blocks`].
    fn dequantised(
        &self,
        name: &str,
        format: GgmlDType,
        bytes: &[u8],
        shape: &[usize],
    ) -> Result<Vec<f32>, ArtifactError> {
        let device = candle_core::Device::Cpu;
        let tensor = CandleTensor { ggml_dtype: format, shape: shape.into(), offset: 0 };
        let read = || tensor.read(&mut Cursor::new(bytes), 0, &device)?.dequantize(&device);
        let values = read().and_then(|t| t.flatten_all()?.to_vec1());
        values.map_err(|e| ArtifactError::wrong(&self.path, format!("tensor `{name}`: {e}")))
    }
}

fn positive(number: f32) -> bool {
    number.is_finite() && number > 0.0
}

/// The number formats that we read, by ggml's numbers.
fn number_format(info: &TensorInfo) -> Option<GgmlDType> {
    Some(match info.format {
        0 => GgmlDType::F32,
        1 => GgmlDType::F16,
        2 => GgmlDType::Q4_0,
        3 => GgmlDType::Q4_1,
        8 => GgmlDType::Q8_0,
        12 => GgmlDType::Q4K,
        14 => GgmlDType::Q6K,
        30 => GgmlDType::BF16,
        _ => return None,
    })
}

/// The 32 values of a block of 16 bytes: all low nibbles, then all high ones.
fn nibbles(bytes: &[u8]) -> impl Iterator<Item = i8> {
    debug_assert_eq!(bytes.len(), BLOCK / 2);
    bytes.iter().map(|b| (b & 15) as i8).chain(bytes.iter().map(|b| (b >> 4) as i8))
}

/// The header's key-value part.
struct Metadata<'a> {
    path: &'a Path,
    header: &'a Header,
}

impl Metadata<'_> {
    fn config(&self) -> Result<BaseConfig, ArtifactError> {
        let family = self.text("general.architecture")?;
        if family != "llama" {
            let reason = format!("`{family}` is not supported; supported: llama");
            return Err(ArtifactError::field(self.path, "general.architecture", reason));
        }
        let (hidden, heads) =
            (self.size("llama.embedding_length")?, self.size("llama.attention.head_count")?);
        let kv_heads = self.size_or("llama.attention.head_count_kv", heads)?;
        let head_size = match self.header.metadata.contains_key("llama.attention.key_length") {
            true => self.size("llama.attention.key_length")?,
            false => even_share(self.path, hidden, heads)?,
        };
        let rotary = self.size_or("llama.rope.dimension_count", head_size)?;
        if rotary != head_size {
            let reason = format!("{rotary} of {head_size}: partly rotated heads are not supported");
            return Err(ArtifactError::field(self.path, "llama.rope.dimension_count", reason));
        }
        let has = |name: &str| self.header.tensors.contains_key(name);
        let config = BaseConfig {
            family: Family::Llama,
            hidden,
            intermediate: self.size("llama.feed_forward_length")?,
            layers: self.size("llama.block_count")?,
            query_heads: heads,
            kv_heads,
            head_size,
            vocabulary: self.items("tokenizer.ggml.tokens")?.len(),
            max_positions: self.size("llama.context_length")?,
            norm_eps: self.float("llama.attention.layer_norm_rms_epsilon")?.unwrap_or(1e-5),
            rope_theta: self.float("llama.rope.freq_base")?.unwrap_or(10000.0),
            tied_embeddings: !has("output.weight"),
            attention_bias: has("blk.0.attn_q.bias"),
            output_bias: has("blk.0.attn_output.bias"),
            mlp_bias: has("blk.0.ffn_gate.bias"),
            bos_token: self.token("tokenizer.ggml.bos_token_id")?,
            eos_tokens: self.end_tokens()?,
            ..BaseConfig::default()
        };
        let config = config.checked(self.path)?;
        if config.attention_bias {
            // llama.cpp interleaves the bias of q and k like their rows; no LLaMA base in GGUF is known to have one.
            return Err(ArtifactError::field(
                self.path,
                "blk.0.attn_q.bias",
                "attention biases are not supported in GGUF",
            ));
        }
        Ok(config)
    }

    /// What all frequencies are divided by. A factor without a type is linear, and an older name of it is known to llama.cpp, too.
    fn rope_scaling(&self) -> Result<f32, ArtifactError> {
        let kind = "llama.rope.scaling.type";
        if self.header.metadata.contains_key(kind) {
            match self.text(kind)?.as_str() {
                "none" => return Ok(1.0),
                "linear" => {}
                other => {
                    let reason = format!("`{other}` rope scaling is not supported; supported: none, linear");
                    return Err(ArtifactError::field(self.path, kind, reason));
                }
            }
        }
        for key in ["llama.rope.scaling.factor", "llama.rope.scale_linear"] {
            match self.float(key)? {
                None => {}
                Some(factor) if positive(factor) => return Ok(factor),
                Some(factor) => {
                    let reason = format!("expected a positive number, got {factor}");
                    return Err(ArtifactError::field(self.path, key, reason));
                }
            }
        }
        Ok(1.0)
    }

    /// Of a text, of a turn, of a message: an instruct model ends with the second what a base model ends with the first.
    fn end_tokens(&self) -> Result<Vec<u32>, ArtifactError> {
        let mut ends = Vec::new();
        for end in ["eos", "eot", "eom"] {
            let token = self.token(&format!("tokenizer.ggml.{end}_token_id"))?;
            ends.extend(token.filter(|token| !ends.contains(token)));
        }
        Ok(ends)
    }

    fn vocabulary(&self) -> Result<GgufVocabulary, ArtifactError> {
        let types = "tokenizer.ggml.token_type";
        let template = "tokenizer.chat_template";
        let scores = "tokenizer.ggml.scores";
        let merges = "tokenizer.ggml.merges";
        let pre = "tokenizer.ggml.pre";
        let has = |key: &str| self.header.metadata.contains_key(key);
        let number = |value: &Value| match value {
            Value::Integer(n) => i32::try_from(*n).ok(),
            _ => None,
        };
        let float = |value: &Value| match value {
            Value::Float(number) => Some(*number as f32),
            _ => None,
        };
        let model = self.text("tokenizer.ggml.model")?;
        let pre = if has(pre) { self.text(pre)? } else { "default".into() };
        let (spm, llama3) = (model == "llama", matches!(pre.as_str(), "llama-bpe" | "llama3" | "llama-v3"));
        Ok(GgufVocabulary {
            model,
            pre,
            tokens: self.texts("tokenizer.ggml.tokens")?,
            token_types: if has(types) { self.list(types, "numbers", number)? } else { Vec::new() },
            scores: if has(scores) { self.list(scores, "numbers", float)? } else { Vec::new() },
            merges: if has(merges) { self.texts(merges)? } else { Vec::new() },
            bos: self.token("tokenizer.ggml.bos_token_id")?,
            eos: self.token("tokenizer.ggml.eos_token_id")?,
            unknown: self.token("tokenizer.ggml.unknown_token_id")?,
            padding: self.token("tokenizer.ggml.padding_token_id")?,
            // What a file does not say is as llama.cpp takes it.
            add_bos: self.flag("tokenizer.ggml.add_bos_token", spm || llama3)?,
            add_eos: self.flag("tokenizer.ggml.add_eos_token", false)?,
            add_space_prefix: self.flag("tokenizer.ggml.add_space_prefix", spm)?,
            chat_template: if has(template) { Some(self.text(template)?) } else { None },
        })
    }

    fn value(&self, key: &str) -> Result<&Value, ArtifactError> {
        let missing = || ArtifactError::field(self.path, key, "missing");
        self.header.metadata.get(key).ok_or_else(missing)
    }

    fn wrong(&self, key: &str, expected: &str, got: &Value) -> ArtifactError {
        ArtifactError::field(self.path, key, format!("expected {expected}, got {}", got.shown()))
    }

    fn text(&self, key: &str) -> Result<String, ArtifactError> {
        match self.value(key)? {
            Value::Text(text) => Ok(text.clone()),
            other => Err(self.wrong(key, "a text", other)),
        }
    }

    fn items(&self, key: &str) -> Result<&[Value], ArtifactError> {
        match self.value(key)? {
            Value::List(values) => Ok(values),
            other => Err(self.wrong(key, "a list", other)),
        }
    }

    fn list<T>(
        &self,
        key: &str,
        of: &str,
        item: impl Fn(&Value) -> Option<T>,
    ) -> Result<Vec<T>, ArtifactError> {
        let wrong = |value| self.wrong(key, &format!("a list of {of}"), value);
        self.items(key)?.iter().map(|v| item(v).ok_or_else(|| wrong(v))).collect()
    }

    fn texts(&self, key: &str) -> Result<Vec<String>, ArtifactError> {
        self.list(key, "texts", |value| match value {
            Value::Text(text) => Some(text.clone()),
            _ => None,
        })
    }

    fn size(&self, key: &str) -> Result<usize, ArtifactError> {
        let value = self.value(key)?;
        let Value::Integer(number) = value else { return Err(self.wrong(key, "a whole number", value)) };
        usize::try_from(*number).map_err(|_| self.wrong(key, "a size", value))
    }

    fn size_or(&self, key: &str, default: usize) -> Result<usize, ArtifactError> {
        if self.header.metadata.contains_key(key) { self.size(key) } else { Ok(default) }
    }

    fn float(&self, key: &str) -> Result<Option<f32>, ArtifactError> {
        match self.header.metadata.get(key) {
            None => Ok(None),
            Some(Value::Float(number)) => Ok(Some(*number as f32)),
            Some(other) => Err(self.wrong(key, "a number", other)),
        }
    }

    fn flag(&self, key: &str, default: bool) -> Result<bool, ArtifactError> {
        match self.header.metadata.get(key) {
            None => Ok(default),
            Some(Value::Flag(flag)) => Ok(*flag),
            Some(other) => Err(self.wrong(key, "true or false", other)),
        }
    }

    fn token(&self, key: &str) -> Result<Option<u32>, ArtifactError> {
        let Some(value) = self.header.metadata.get(key) else { return Ok(None) };
        let token = if let Value::Integer(number) = value { u32::try_from(*number).ok() } else { None };
        token.map(Some).ok_or_else(|| self.wrong(key, "a token id", value))
    }
}
