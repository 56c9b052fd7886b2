//! Hugging Face folders: config.json, one or several safetensors files.

use super::base::{BaseConfig, TokenizerSource};
use super::config::{MAX_LABELS, read_config};
use super::gptq::{self, Quantisation};
use super::labels::CLASSIFIER;
use super::tokenizer_files;
use super::{ArtifactError, read_json};
use crate::weights::{Bf16Values, HostData, HostMatrix, HostVector};
use half::{bf16, f16};
use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors};
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
    /// How Linears without a `weight` are packed.
    quantisation: Option<Quantisation>,
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

    /// A tensor's number format and bytes.
    fn tensor(&self, name: &str, shape: &[usize]) -> Result<(Dtype, &[u8]), ArtifactError> {
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
        Ok((tensor.dtype(), tensor.data()))
    }

    fn not_supported(&self, name: &str, got: Dtype) -> ArtifactError {
        ArtifactError::TensorType { path: self.path.clone(), tensor: name.into(), got: format!("{got:?}") }
    }

    /// A tensor of 32-bit words.
    fn words(&self, name: &str, shape: &[usize]) -> Result<&[[u8; 4]], ArtifactError> {
        match self.tensor(name, shape)? {
            (Dtype::I32 | Dtype::U32, bytes) => Ok(bytes.as_chunks().0),
            (other, _) => Err(self.not_supported(name, other)),
        }
    }

    pub(super) fn matrix(&self, name: &str, shape: &[usize]) -> Result<HostData, ArtifactError> {
        let (dtype, bytes) = self.tensor(name, shape)?;
        self.numbers(name, dtype, bytes)
    }

    /// One of `count` blocks of `rows` rows each, of which the tensor consists.
    fn block_of_rows(
        &self,
        name: &str,
        (block, count): (usize, usize),
        [rows, columns]: [usize; 2],
    ) -> Result<HostData, ArtifactError> {
        let (dtype, bytes) = self.tensor(name, &[rows.saturating_mul(count), columns])?;
        let length = bytes.len() / count;
        self.numbers(name, dtype, &bytes[block * length..(block + 1) * length])
    }

    fn numbers(&self, name: &str, dtype: Dtype, bytes: &[u8]) -> Result<HostData, ArtifactError> {
        let two = |b: &[u8]| [b[0], b[1]];
        match dtype {
            Dtype::F32 => {
                let four = |b: &[u8]| f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
                Ok(HostData::F32(bytes.chunks_exact(4).map(four).collect()))
            }
            Dtype::F16 => {
                let widen = |b: &[u8]| f16::from_le_bytes(two(b)).to_f32();
                Ok(HostData::F32(bytes.chunks_exact(2).map(widen).collect()))
            }
            Dtype::BF16 => Ok(HostData::Bf16(self.bf16(bytes))),
            other => Err(self.not_supported(name, other)),
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
        let names = match (index.exists(), single.exists()) {
            (true, _) => shards(path, &index)?,
            (false, false) => vec![gptq::tensor_file(path)?.unwrap_or(single)],
            (false, true) => vec![single],
        };
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
        let mut config = read_config(&path.join("config.json"))?;
        let quantisation = Quantisation::of_folder(path)?;
        let folder = Self { path: path.into(), files, places, quantisation };
        if let Some(classifier) = config.classifier.take() {
            let rows = folder.rows(CLASSIFIER)?.filter(|rows| (1..=MAX_LABELS).contains(rows));
            config.classifier = Some(rows.map_or(classifier.clone(), |rows| classifier.counted(rows)));
        }
        for end in tokenizer_files::end_tokens(path)? {
            if !config.eos_tokens.contains(&end) {
                config.eos_tokens.push(end);
            }
        }
        Ok((folder, config, tokenizer_files::tokenizer(path)?))
    }

    /// How many rows a tensor has, if it is there.
    fn rows(&self, name: &str) -> Result<Option<usize>, ArtifactError> {
        let Ok((file, stored)) = self.file(name) else { return Ok(None) };
        let tensors = file.tensors()?;
        Ok(tensors.tensor(&stored).ok().and_then(|tensor| tensor.shape().first().copied()))
    }

    pub(super) fn matrix(
        &self,
        name: &str,
        rows: usize,
        columns: usize,
    ) -> Result<HostMatrix, ArtifactError> {
        if let Some((quantisation, linear)) = self.packed(name) {
            return quantisation.matrix(self, linear, rows, columns);
        }
        let data = match fused(name).filter(|(fused, _)| !self.has(name) && self.has(fused)) {
            Some((fused, block)) => {
                let (file, stored) = self.file(&fused)?;
                file.block_of_rows(&stored, (block, QKV.len()), [rows, columns])?
            }
            None => {
                let (file, stored) = self.file(name)?;
                file.matrix(&stored, &[rows, columns])?
            }
        };
        Ok(HostMatrix { name: name.into(), rows, columns, data })
    }

    /// Which group each column of a packed Linear is in, where they need not be in order.
    pub(super) fn column_groups(
        &self,
        name: &str,
        columns: usize,
    ) -> Result<Option<Vec<usize>>, ArtifactError> {
        let Some((quantisation, linear)) = self.packed(name) else { return Ok(None) };
        quantisation.groups_by_column(self, linear, columns)
    }

    /// How the Linear is packed whose weight has that name, and its own name; `None` where the weight itself is there.
    fn packed<'a>(&self, name: &'a str) -> Option<(&Quantisation, &'a str)> {
        let (quantisation, linear) = (self.quantisation.as_ref()?, name.strip_suffix(".weight")?);
        let parts = ["qweight", "qzeros", "scales"].map(|part| format!("{linear}.{part}"));
        let packed = !self.has(name) && parts.iter().any(|part| self.has(part));
        packed.then_some((quantisation, linear))
    }

    pub(super) fn has(&self, tensor: &str) -> bool {
        self.file(tensor).is_ok()
    }

    /// The file that has a tensor, or the folder; for messages.
    pub(super) fn path_of(&self, tensor: &str) -> &Path {
        self.file(tensor).map_or(&self.path, |(file, _)| &file.path)
    }

    /// A tensor of 32-bit words.
    pub(super) fn words(&self, name: &str, shape: &[usize]) -> Result<&[[u8; 4]], ArtifactError> {
        let (file, stored) = self.file(name)?;
        file.words(&stored, shape)
    }

    /// A tensor of floating-point numbers, row-major.
    pub(super) fn numbers(&self, name: &str, shape: &[usize; 2]) -> Result<Vec<f32>, ArtifactError> {
        let (file, stored) = self.file(name)?;
        let data = file.matrix(&stored, shape)?;
        Ok(HostMatrix { name: name.into(), rows: shape[0], columns: shape[1], data }.into_f32())
    }

    pub(super) fn vector(&self, name: &str, length: usize) -> Result<HostVector, ArtifactError> {
        let (file, stored) = self.file(name)?;
        let data = file.matrix(&stored, &[length])?;
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

    /// The file that has a tensor, and the tensor's name there.
    fn file(&self, name: &str) -> Result<(&SafetensorsFile, String), ArtifactError> {
        let missing = || ArtifactError::MissingTensor { path: self.path.clone(), tensor: name.into() };
        let found = stored_names(name).find_map(|name| Some((&self.files[*self.places.get(&name)?], name)));
        found.ok_or_else(missing)
    }
}

/// Under which names a file may have a tensor: its own; without the module that a task's head was put around, as a model without
/// one is saved; and with the two names that a norm's tensors had in TensorFlow (bert-base-uncased still has them).
fn stored_names(name: &str) -> impl Iterator<Item = String> {
    let inner = ["transformer.", "bert."].into_iter().find_map(|outer| name.strip_prefix(outer));
    let names = [Some(name), inner].into_iter().flatten().map(String::from).collect::<Vec<_>>();
    let old = |name: &String| {
        let old = [(".LayerNorm.weight", ".LayerNorm.gamma"), (".LayerNorm.bias", ".LayerNorm.beta")];
        old.into_iter().find_map(|(new, old)| Some(format!("{}{old}", name.strip_suffix(new)?)))
    };
    let old = names.iter().filter_map(old).collect::<Vec<_>>();
    names.into_iter().chain(old)
}

/// Queries, keys and values, as they follow each other in MPT's `Wqkv`.
const QKV: [&str; 3] = ["q_proj", "k_proj", "v_proj"];

/// The tensor whose blocks of rows are queries, keys and values, where `name` may be one of them; and which.
fn fused(name: &str) -> Option<(String, usize)> {
    let (attention, linear) = name.strip_suffix(".weight")?.rsplit_once('.')?;
    let block = QKV.iter().position(|part| *part == linear)?;
    attention.ends_with(".attn").then(|| (format!("{attention}.Wqkv.weight"), block))
}

/// The files that an index names; each must lie in the folder itself.
fn shards(folder: &Path, index: &Path) -> Result<Vec<PathBuf>, ArtifactError> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let Index { weight_map } = read_json(index)?;
    let names = weight_map.into_values().collect::<BTreeSet<_>>();
    names.iter().map(|name| inside(folder, name, index, "weight_map")).collect()
}

/// The file `name` of the folder, where a `field` of the file `said` names it: it must lie in the folder itself.
pub(super) fn inside(folder: &Path, name: &str, said: &Path, field: &str) -> Result<PathBuf, ArtifactError> {
    let plain = Path::new(name).file_name().is_some_and(|f| f.to_string_lossy() == name);
    let refuse = || ArtifactError::field(said, field, format!("{name:?} is not a file name"));
    if plain { Ok(folder.join(name)) } else { Err(refuse()) }
}
