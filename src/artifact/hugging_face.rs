//! Hugging Face folders: config.json, one or several safetensors files, the tokenizer's files.

use super::base::{BaseConfig, TokenizerSource, even_share};
use super::{ArtifactError, read_json};
use crate::weights::{Bf16Values, HostData, HostMatrix, HostVector};
use half::{bf16, f16};
use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Model cards are a few pages; what is longer is none.
const MAX_CARD_BYTES: u64 = 1 << 20;

#[derive(Debug)]
pub(super) struct HuggingFaceFolder {
    path: PathBuf,
    files: Vec<SafetensorsFile>,
    /// Tensor name to the index of its file.
    places: BTreeMap<String, usize>,
}

/// A mapped safetensors file, its header checked.
#[derive(Debug)]
pub(super) struct SafetensorsFile {
    path: PathBuf,
    map: Arc<Mmap>,
}

impl SafetensorsFile {
    pub(super) fn open(path: &Path) -> Result<Self, ArtifactError> {
        let io = |source| ArtifactError::Io { path: path.into(), source };
        let file = std::fs::File::open(path).map_err(io)?;
        #[expect(unsafe_code, reason = "a memory map")]
        // SAFETY: as for GGUF files: read only, and what we write ourselves is renamed, never truncated in place.
        let map = unsafe { Mmap::map(&file) }.map_err(io)?;
        let file = Self { path: path.into(), map: Arc::new(map) };
        file.tensors()?;
        Ok(file)
    }

    /// The header is parsed anew each time, which borrows nothing across calls and costs microseconds.
    pub(super) fn tensors(&self) -> Result<SafeTensors<'_>, ArtifactError> {
        let wrong = |e| ArtifactError::wrong(&self.path, format!("not a safetensors file: {e}"));
        SafeTensors::deserialize(&self.map).map_err(wrong)
    }

    pub(super) fn matrix(&self, name: &str, shape: &[usize]) -> Result<HostData, ArtifactError> {
        let missing = || ArtifactError::MissingTensor { path: self.path.clone(), tensor: name.into() };
        let tensors = self.tensors()?;
        let tensor = tensors.tensor(name).map_err(|_| missing())?;
        if tensor.shape() != shape {
            return Err(ArtifactError::TensorShape {
                path: self.path.clone(),
                tensor: name.into(),
                expected: shape.to_vec(),
                got: tensor.shape().to_vec(),
            });
        }
        let bytes = tensor.data();
        let two = |b: &[u8]| [b[0], b[1]];
        match tensor.dtype() {
            Dtype::F32 => {
                let four = |b: &[u8]| f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
                Ok(HostData::F32(bytes.chunks_exact(4).map(four).collect()))
            }
            Dtype::F16 => {
                let widen = |b: &[u8]| f16::from_le_bytes(two(b)).to_f32();
                Ok(HostData::F32(bytes.chunks_exact(2).map(widen).collect()))
            }
            Dtype::BF16 => Ok(HostData::Bf16(self.bf16(bytes))),
            other => Err(ArtifactError::TensorType {
                path: self.path.clone(),
                tensor: name.into(),
                got: format!("{other:?}"),
            }),
        }
    }
}

impl SafetensorsFile {
    /// Where they lie, if they can be read there as they are.
    fn bf16(&self, bytes: &[u8]) -> Bf16Values {
        let start = bytes.as_ptr() as usize - self.map.as_ptr() as usize;
        let mapped = MappedBf16 { map: Arc::clone(&self.map), range: start..start + bytes.len() };
        if cfg!(target_endian = "little") && mapped.values().is_some() {
            return Bf16Values::Kept(Arc::new(mapped));
        }
        bytes.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]])).collect()
    }
}

/// A tensor in a mapped file.
struct MappedBf16 {
    map: Arc<Mmap>,
    /// Of the file's bytes.
    range: Range<usize>,
}

impl MappedBf16 {
    /// Unless they begin at an odd address.
    fn values(&self) -> Option<&[bf16]> {
        bytemuck::try_cast_slice(&self.map[self.range.clone()]).ok()
    }
}

impl AsRef<[bf16]> for MappedBf16 {
    fn as_ref(&self) -> &[bf16] {
        self.values().unwrap_or_default()
    }
}

impl Drop for MappedBf16 {
    /// What has been read need not stay in memory beside what was made of it.
    fn drop(&mut self) {
        #[cfg(unix)]
        {
            #[expect(unsafe_code, reason = "memmap2 cannot know that the map is read only")]
            // SAFETY: pages of a map that nobody writes to are read from the file again when they are needed.
            let _ = unsafe {
                let dropped = memmap2::UncheckedAdvice::DontNeed;
                self.map.unchecked_advise_range(dropped, self.range.start, self.range.len())
            };
        }
    }
}

impl HuggingFaceFolder {
    pub(super) fn open(path: &Path) -> Result<(Self, BaseConfig, TokenizerSource), ArtifactError> {
        let (single, index) = (path.join("model.safetensors"), path.join("model.safetensors.index.json"));
        let names: Vec<PathBuf> = if index.exists() { shards(path, &index)? } else { vec![single] };
        let files = names.iter().map(|n| SafetensorsFile::open(n)).collect::<Result<Vec<_>, _>>()?;
        let mut places = BTreeMap::new();
        for (i, file) in files.iter().enumerate() {
            for name in file.tensors()?.names() {
                if places.insert(name.to_string(), i).is_some() {
                    let reason = format!("tensor `{name}` stands in another file too");
                    return Err(ArtifactError::wrong(&file.path, reason));
                }
            }
        }
        let config = read_config(&path.join("config.json"))?;
        Ok((Self { path: path.into(), files, places }, config, tokenizer(path)?))
    }

    pub(super) fn matrix(
        &self,
        name: &str,
        rows: usize,
        columns: usize,
    ) -> Result<HostMatrix, ArtifactError> {
        let data = self.file(name)?.matrix(name, &[rows, columns])?;
        Ok(HostMatrix { name: name.into(), rows, columns, data })
    }

    pub(super) fn vector(&self, name: &str, length: usize) -> Result<HostVector, ArtifactError> {
        let data = self.file(name)?.matrix(name, &[length])?;
        let matrix = HostMatrix { name: name.into(), rows: 1, columns: length, data };
        Ok(HostVector { data: matrix.to_f32(), name: matrix.name })
    }

    /// `license` in the YAML between two `---` with which the README.md of a model begins.
    pub(super) fn licence(&self) -> Option<String> {
        let file = std::fs::File::open(self.path.join("README.md")).ok()?;
        let mut text = String::new();
        file.take(MAX_CARD_BYTES).read_to_string(&mut text).ok()?;
        let (head, _) = text.strip_prefix("---\n")?.split_once("\n---")?;
        let licence = head.lines().find_map(|line| line.strip_prefix("license:"))?;
        Some(licence.trim().trim_matches(['"', '\'']).to_string()).filter(|l| !l.is_empty())
    }

    pub(super) fn files(&self) -> Vec<PathBuf> {
        self.files.iter().map(|f| f.path.clone()).collect()
    }

    fn file(&self, name: &str) -> Result<&SafetensorsFile, ArtifactError> {
        let missing = || ArtifactError::MissingTensor { path: self.path.clone(), tensor: name.into() };
        self.places.get(name).map(|&i| &self.files[i]).ok_or_else(missing)
    }
}

/// The files that an index names; each must lie in the folder itself.
fn shards(folder: &Path, index: &Path) -> Result<Vec<PathBuf>, ArtifactError> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let Index { weight_map } = read_json(index)?;
    let names = weight_map.into_values().collect::<BTreeSet<_>>();
    let path = |name: String| {
        let plain = Path::new(&name).file_name().is_some_and(|f| f.to_string_lossy() == name);
        let refuse = || ArtifactError::field(index, "weight_map", format!("{name:?} is not a file name"));
        if plain { Ok(folder.join(&name)) } else { Err(refuse()) }
    };
    names.into_iter().map(path).collect()
}

pub(super) fn read_config(path: &Path) -> Result<BaseConfig, ArtifactError> {
    let json: Value = read_json(path)?;
    let fields = Fields { path, json: &json };
    let family = fields.text("model_type")?.unwrap_or_default();
    if family != "llama" {
        let reason = format!("{family:?} is not supported; supported: llama");
        return Err(ArtifactError::field(path, "model_type", reason));
    }
    for field in ["quantization_config", "sliding_window"] {
        if fields.get(field).is_some() {
            return Err(ArtifactError::field(path, field, "not supported"));
        }
    }
    if let Some(activation) = fields.text("hidden_act")?.filter(|a| a != "silu" && a != "swish") {
        return Err(ArtifactError::field(path, "hidden_act", format!("`{activation}` is not supported")));
    }
    let (hidden, query_heads) = (fields.size("hidden_size")?, fields.size("num_attention_heads")?);
    let config = BaseConfig {
        family,
        hidden,
        intermediate: fields.size("intermediate_size")?,
        layers: fields.size("num_hidden_layers")?,
        query_heads,
        kv_heads: fields.size_or("num_key_value_heads", query_heads)?,
        head_size: match fields.get("head_dim") {
            Some(_) => fields.size("head_dim")?,
            None => even_share(path, hidden, query_heads)?,
        },
        vocabulary: fields.size("vocab_size")?,
        max_positions: fields.size_or("max_position_embeddings", 2048)?,
        rms_eps: fields.float("rms_norm_eps")?.unwrap_or(1e-6),
        rope_theta: fields.rope_theta()?,
        tied_embeddings: fields.flag("tie_word_embeddings")?,
        attention_bias: fields.flag("attention_bias")?,
        mlp_bias: fields.flag("mlp_bias")?,
        bos_token: fields.tokens("bos_token_id")?.first().copied(),
        eos_tokens: fields.tokens("eos_token_id")?,
    };
    config.checked(path)
}

/// Typed access to config.json; `null` counts as absent, as in transformers.
struct Fields<'a> {
    path: &'a Path,
    json: &'a Value,
}

impl Fields<'_> {
    fn get(&self, field: &str) -> Option<&Value> {
        self.json.get(field).filter(|v| !v.is_null())
    }

    fn wrong(&self, field: &str, expected: &str, got: &Value) -> ArtifactError {
        let mut got = got.to_string();
        got.truncate(got.char_indices().nth(80).map_or(got.len(), |(i, _)| i));
        ArtifactError::field(self.path, field, format!("expected {expected}, got {got}"))
    }

    fn text(&self, field: &str) -> Result<Option<String>, ArtifactError> {
        let text = |v: &Value| v.as_str().map(String::from).ok_or_else(|| self.wrong(field, "a string", v));
        self.get(field).map(text).transpose()
    }

    fn size(&self, field: &str) -> Result<usize, ArtifactError> {
        let value = self.get(field).ok_or_else(|| ArtifactError::field(self.path, field, "missing"))?;
        let size = value.as_u64().and_then(|n| usize::try_from(n).ok());
        size.ok_or_else(|| self.wrong(field, "a whole number", value))
    }

    fn size_or(&self, field: &str, default: usize) -> Result<usize, ArtifactError> {
        if self.get(field).is_some() { self.size(field) } else { Ok(default) }
    }

    fn float(&self, field: &str) -> Result<Option<f32>, ArtifactError> {
        let float = |v: &Value| v.as_f64().map(|f| f as f32).ok_or_else(|| self.wrong(field, "a number", v));
        self.get(field).map(float).transpose()
    }

    fn flag(&self, field: &str) -> Result<bool, ArtifactError> {
        let flag = |v: &Value| v.as_bool().ok_or_else(|| self.wrong(field, "true or false", v));
        self.get(field).map_or(Ok(false), flag)
    }

    /// One id or a list of them.
    fn tokens(&self, field: &str) -> Result<Vec<u32>, ArtifactError> {
        let Some(value) = self.get(field) else { return Ok(Vec::new()) };
        let all = value.as_array().map_or(std::slice::from_ref(value), Vec::as_slice);
        let id = |v: &Value| v.as_u64().and_then(|n| u32::try_from(n).ok());
        let ids = all.iter().map(id).collect::<Option<Vec<_>>>();
        ids.ok_or_else(|| self.wrong(field, "a token id or a list of them", value))
    }

    /// `rope_theta`, or transformers 5's `rope_parameters.rope_theta`; any scaling is refused, never ignored.
    fn rope_theta(&self) -> Result<f32, ArtifactError> {
        let mut theta = self.float("rope_theta")?;
        for field in ["rope_scaling", "rope_parameters"] {
            let Some(rope) = self.get(field) else { continue };
            let kind = rope.get("rope_type").or_else(|| rope.get("type"));
            if !rope.is_object() || kind.is_some_and(|kind| kind != "default") {
                return Err(self.wrong(field, "no rope scaling", rope));
            }
            let of_rope = Fields { path: self.path, json: rope };
            theta = theta.or(of_rope.float("rope_theta")?);
        }
        Ok(theta.unwrap_or(10000.0))
    }
}

fn tokenizer(folder: &Path) -> Result<TokenizerSource, ArtifactError> {
    let (config, template) = (folder.join("tokenizer_config.json"), folder.join("chat_template.jinja"));
    let json: Value = if config.exists() { read_json(&config)? } else { Value::Null };
    // A special token is a string or an object with its `content`.
    let special = |field: &str| {
        let value = json.get(field)?;
        value.as_str().or_else(|| value.get("content")?.as_str()).map(String::from)
    };
    let chat_template = if template.exists() {
        let io = |source| ArtifactError::Io { path: template.clone(), source };
        Some(std::fs::read_to_string(&template).map_err(io)?)
    } else {
        json.get("chat_template").and_then(Value::as_str).map(String::from)
    };
    Ok(TokenizerSource::HuggingFace {
        tokenizer_json: folder.join("tokenizer.json"),
        chat_template,
        bos: special("bos_token"),
        eos: special("eos_token"),
    })
}
