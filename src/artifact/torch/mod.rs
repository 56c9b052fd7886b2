//! Torch's own files of tensors (`adapter_model.bin`): a zip archive with a pickle and the numbers of each storage.
//!
//! Nothing of a pickle is executed (see [`pickle`]). Storages are read where they lie in the mapped file; a tensor is made
//! of its storage's numbers by its own offset, shape and strides, every one of which is checked against the storage first.

mod pickle;

use super::ArtifactError;
use crate::weights::HostData;
use half::{bf16, f16};
use memmap2::Mmap;
use pickle::{Number, PickledTensor};
use std::collections::BTreeMap;
use std::io::{Cursor, Read};
use std::ops::Range;
use std::path::{Path, PathBuf};
use zip::{CompressionMethod, ZipArchive};

/// What a pickle of names and sizes never needs; an adapter's takes about 100 bytes a tensor.
const MAX_PICKLE_BYTES: u64 = 64 << 20;

/// A mapped torch file, its archive and its pickle read.
#[derive(Debug)]
pub(super) struct TorchFile {
    path: PathBuf,
    map: Mmap,
    tensors: BTreeMap<String, PickledTensor>,
    /// Where each storage's bytes lie in the file, by key.
    storages: BTreeMap<String, Range<usize>>,
}

impl TorchFile {
    /// # Errors
    /// A file that is no such archive, a pickle that is anything but a dictionary of tensors, a tensor that leaves its storage,
    /// tensors that are larger together than the file.
    pub(super) fn open(path: &Path) -> Result<Self, ArtifactError> {
        let io = |source| ArtifactError::Io { path: path.into(), source };
        let file = std::fs::File::open(path).map_err(io)?;
        #[expect(unsafe_code, reason = "a memory map")]
        // SAFETY: as for safetensors files: read only, and what we write ourselves is renamed, never truncated in place.
        let map = unsafe { Mmap::map(&file) }.map_err(io)?;
        let wrong = |reason: String| ArtifactError::wrong(path, reason);
        if map.starts_with(&[0x80]) {
            return Err(wrong(
                "this is a bare pickle, as torch wrote before version 1.6; load it there and save it again with a newer torch"
                    .into(),
            ));
        }
        let Archive { pickle, storages } = archive(&map).map_err(wrong)?;
        let mut tensors = BTreeMap::new();
        for (name, tensor) in pickle::tensors(&pickle).map_err(|e| wrong(e.to_string()))? {
            if tensors.insert(name.clone(), tensor).is_some() {
                return Err(wrong(format!("tensor `{name}` stands there twice")));
            }
        }
        let opened = Self { path: path.into(), map, tensors, storages };
        opened.check()?;
        Ok(opened)
    }

    /// Names and shapes.
    pub(super) fn shapes(&self) -> impl Iterator<Item = (&str, Vec<usize>)> {
        let shape = |t: &PickledTensor| t.shape.iter().map(|&n| n as usize).collect();
        self.tensors.iter().map(move |(name, tensor)| (name.as_str(), shape(tensor)))
    }

    /// The values of a tensor that is to have this shape, row-major.
    pub(super) fn values(&self, name: &str, shape: &[usize]) -> Result<HostData, ArtifactError> {
        let missing = || ArtifactError::MissingTensor { path: self.path.clone(), tensor: name.into() };
        let tensor = self.tensors.get(name).ok_or_else(missing)?;
        let got = tensor.shape.iter().map(|&n| n as usize).collect::<Vec<_>>();
        if got != shape {
            let (path, tensor, expected) = (self.path.clone(), name.into(), shape.to_vec());
            return Err(ArtifactError::TensorShape { path, tensor, expected, got });
        }
        let bytes = &self.map[self.storages[&tensor.key].clone()];
        let two = |b: &[u8]| [b[0], b[1]];
        Ok(match tensor.number {
            Number::F32 => {
                HostData::F32(gather(bytes, tensor, |b: &[u8]| f32::from_le_bytes([b[0], b[1], b[2], b[3]])))
            }
            Number::F16 => HostData::F32(gather(bytes, tensor, |b| f16::from_le_bytes(two(b)).to_f32())),
            Number::Bf16 => HostData::Bf16(gather(bytes, tensor, |b| bf16::from_le_bytes(two(b))).into()),
            Number::Other(got) => return Err(self.number_error(name, got)),
        })
    }

    fn number_error(&self, name: &str, got: &str) -> ArtifactError {
        ArtifactError::TensorType { path: self.path.clone(), tensor: name.into(), got: got.into() }
    }

    /// Every tensor lies inside its storage, and all of them together are no larger than the file: strides of zero could
    /// make much of little.
    fn check(&self) -> Result<(), ArtifactError> {
        let mut all = 0u64;
        for (name, tensor) in &self.tensors {
            let wrong = |reason| ArtifactError::wrong(&self.path, format!("tensor `{name}`: {reason}"));
            let bytes = match tensor.number {
                Number::Other(got) => return Err(self.number_error(name, got)),
                number => number.bytes().unwrap_or(1),
            };
            let storage = self.storages.get(&tensor.key);
            let storage = storage.ok_or_else(|| wrong(format!("its storage `{}` is missing", tensor.key)))?;
            let has = (storage.len() / bytes) as u64;
            let (count, end) = extent(tensor).ok_or_else(|| wrong("its sizes overflow".into()))?;
            if end > has {
                let reason = format!("it reaches to number {end} of a storage that has {has}");
                return Err(wrong(reason));
            }
            all = all.saturating_add(count.saturating_mul(bytes as u64));
        }
        if all > self.map.len() as u64 {
            let reason = format!("its tensors have {all} bytes, the file has {}", self.map.len());
            return Err(ArtifactError::wrong(&self.path, reason));
        }
        Ok(())
    }
}

/// How many numbers a tensor has, and the place after its last one in the storage; `None` where 64 bits do not hold them.
fn extent(tensor: &PickledTensor) -> Option<(u64, u64)> {
    let count = tensor.shape.iter().try_fold(1u64, |count, &n| count.checked_mul(n))?;
    if count == 0 {
        return Some((0, 0));
    }
    let axes = tensor.shape.iter().zip(&tensor.strides);
    let last = axes.map(|(&n, &stride)| (n - 1).checked_mul(stride));
    let last = last.into_iter().try_fold(tensor.offset, |sum, axis| sum.checked_add(axis?))?;
    Some((count, last.checked_add(1)?))
}

/// The numbers of a tensor that [`TorchFile::check`] has checked, row-major.
fn gather<T>(storage: &[u8], tensor: &PickledTensor, read: impl Fn(&[u8]) -> T) -> Vec<T> {
    let bytes = tensor.number.bytes().unwrap_or(1);
    let count = tensor.shape.iter().product::<u64>() as usize;
    let mut index = vec![0u64; tensor.shape.len()];
    let mut place = tensor.offset;
    let mut values = Vec::with_capacity(count);
    while values.len() < count {
        let start = place as usize * bytes;
        values.push(read(&storage[start..start + bytes]));
        // The next index, the last axis first, and its place.
        for axis in (0..index.len()).rev() {
            index[axis] += 1;
            // Beyond the last number of an axis a place may be any; it is taken back.
            place = place.wrapping_add(tensor.strides[axis]);
            if index[axis] < tensor.shape[axis] {
                break;
            }
            place = place.wrapping_sub(tensor.strides[axis].wrapping_mul(tensor.shape[axis]));
            index[axis] = 0;
        }
    }
    values
}

struct Archive {
    pickle: Vec<u8>,
    storages: BTreeMap<String, Range<usize>>,
}

/// Takes the archive apart: `NAME/data.pkl`, `NAME/data/KEY`, `NAME/byteorder`; torch compresses nothing.
fn archive(map: &[u8]) -> Result<Archive, String> {
    let zip = |e: zip::result::ZipError| format!("not a zip archive as torch writes it: {e}");
    let mut archive = ZipArchive::new(Cursor::new(map)).map_err(zip)?;
    // Each byte is then read once, however many entries the archive claims to have.
    if archive.has_overlapping_files().map_err(zip)? {
        return Err("not a zip archive as torch writes it: entries lie over each other".into());
    }
    let (mut pickle, mut storages) = (None, BTreeMap::new());
    for index in 0..archive.len() {
        let mut entry = archive.by_index(index).map_err(zip)?;
        let name = entry.name().map_err(zip)?.into_owned();
        if entry.compression() != CompressionMethod::Stored {
            return Err(format!("its entry `{name}` is compressed, and torch compresses nothing"));
        }
        // The name of the archive's only folder is the file's own, once.
        let inside = name.split_once('/').map_or(name.as_str(), |(_, inside)| inside);
        let read = |e: std::io::Error| format!("its entry `{name}`: {e}");
        if inside == "data.pkl" {
            if entry.size() > MAX_PICKLE_BYTES {
                return Err(format!("data.pkl has {} bytes, at most {MAX_PICKLE_BYTES}", entry.size()));
            }
            let mut bytes = Vec::new();
            entry.by_ref().take(MAX_PICKLE_BYTES).read_to_end(&mut bytes).map_err(read)?;
            pickle = Some(bytes);
        } else if inside == "byteorder" {
            let mut order = String::new();
            entry.by_ref().take(16).read_to_string(&mut order).map_err(read)?;
            if order != "little" {
                return Err(format!("its numbers are in {order:?} byte order, expected \"little\""));
            }
        } else if let Some(key) = inside.strip_prefix("data/") {
            let size = usize::try_from(entry.size()).ok();
            let start = entry.data_start().and_then(|start| usize::try_from(start).ok());
            let range = start.zip(size).and_then(|(start, size)| Some(start..start.checked_add(size)?));
            let range = range.filter(|range| range.end <= map.len());
            let range = range.ok_or_else(|| format!("its entry `{name}` ends after the file"))?;
            // Compares what is there with the archive's checksum.
            std::io::copy(&mut entry, &mut std::io::sink()).map_err(read)?;
            if storages.insert(key.to_string(), range).is_some() {
                return Err(format!("its entry `{name}` stands there twice"));
            }
        }
    }
    let pickle = pickle.ok_or("there is no data.pkl in it, so it holds no tensors of torch")?;
    Ok(Archive { pickle, storages })
}
