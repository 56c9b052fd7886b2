//! Writes a GGUF file (version 3) tensor by tensor: metadata and places first, from the shapes alone, then values as they
//! come. candle's writer wants all tensors in memory at once and knows no lists as llama.cpp types them.

use super::ArtifactError;
use super::encode::{self, NumberFormat, OutTensor};
use super::whole::WholeFile;
use std::path::{Path, PathBuf};

/// A metadata value as it is written.
#[derive(Debug, Clone, PartialEq)]
pub enum GgufValue {
    U32(u32),
    F32(f32),
    Flag(bool),
    Text(String),
    U32s(Vec<u32>),
    I32s(Vec<i32>),
    F32s(Vec<f32>),
    Texts(Vec<String>),
    /// Type and value, as another GGUF file has them.
    Raw(Vec<u8>),
}

/// A file on its way; gone if it is dropped before [`Self::finish`].
#[derive(Debug)]
pub struct GgufWriter {
    path: PathBuf,
    file: WholeFile,
    tensors: std::vec::IntoIter<OutTensor>,
}

/// The format's own, which a file without `general.alignment` has.
const ALIGNMENT: usize = 32;

impl GgufWriter {
    /// Writes the header of a file with this metadata that will have these tensors, in llama.cpp's names, in this order.
    ///
    /// # Errors
    /// A row that is not whole blocks, a path that cannot be written to.
    pub fn create(
        path: &Path,
        metadata: &[(String, GgufValue)],
        tensors: Vec<OutTensor>,
    ) -> Result<Self, ArtifactError> {
        let mut header = b"GGUF".to_vec();
        header.extend(3u32.to_le_bytes());
        header.extend((tensors.len() as u64).to_le_bytes());
        header.extend((metadata.len() as u64).to_le_bytes());
        for (key, value) in metadata {
            put_text(&mut header, key);
            put_value(&mut header, value);
        }
        let mut offset = 0;
        for tensor in &tensors {
            let row = tensor.shape.last().copied().unwrap_or(0);
            if tensor.format == NumberFormat::Q8_0 && !row.is_multiple_of(crate::weights::BLOCK) {
                let reason = format!("tensor `{}`: rows of {row} are not whole blocks of q8_0", tensor.name);
                return Err(ArtifactError::wrong(path, reason));
            }
            put_text(&mut header, &tensor.name);
            header.extend((tensor.shape.len() as u32).to_le_bytes());
            header.extend(tensor.shape.iter().rev().flat_map(|&d| (d as u64).to_le_bytes()));
            header.extend(ggml_type(tensor.format).to_le_bytes());
            header.extend((offset as u64).to_le_bytes());
            offset += tensor.bytes().next_multiple_of(ALIGNMENT);
        }
        header.resize(header.len().next_multiple_of(ALIGNMENT), 0);
        let mut file = WholeFile::create(path)?;
        file.write(&header)?;
        Ok(Self { path: path.into(), file, tensors: tensors.into_iter() })
    }

    /// The next tensor's values, row-major, the rows of q and k in llama.cpp's order.
    pub fn tensor(&mut self, values: &[f32]) -> Result<(), ArtifactError> {
        let next = self.tensors.next();
        let tensor =
            next.ok_or_else(|| ArtifactError::wrong(&self.path, "a tensor more than was planned"))?;
        encode::append(&mut self.file, &self.path, &tensor, values)?;
        let length = tensor.bytes();
        self.file.write(&[0; ALIGNMENT][..length.next_multiple_of(ALIGNMENT) - length])
    }

    pub fn finish(mut self) -> Result<(), ArtifactError> {
        if let Some(missing) = self.tensors.next() {
            return Err(ArtifactError::MissingTensor { path: self.path, tensor: missing.name });
        }
        self.file.finish()
    }
}

/// ggml's number of a number format.
fn ggml_type(format: NumberFormat) -> u32 {
    match format {
        NumberFormat::F32 => 0,
        NumberFormat::F16 => 1,
        NumberFormat::Q8_0 => 8,
        NumberFormat::Bf16 => 30,
    }
}

fn put_text(bytes: &mut Vec<u8>, text: &str) {
    bytes.extend((text.len() as u64).to_le_bytes());
    bytes.extend(text.as_bytes());
}

fn put_value(bytes: &mut Vec<u8>, value: &GgufValue) {
    const LIST: u32 = 9;
    let kind = |bytes: &mut Vec<u8>, kind: u32| bytes.extend(kind.to_le_bytes());
    let list = |bytes: &mut Vec<u8>, of: u32, length: usize| {
        kind(bytes, LIST);
        kind(bytes, of);
        bytes.extend((length as u64).to_le_bytes());
    };
    match value {
        GgufValue::U32(n) => {
            kind(bytes, 4);
            bytes.extend(n.to_le_bytes());
        }
        GgufValue::F32(x) => {
            kind(bytes, 6);
            bytes.extend(x.to_le_bytes());
        }
        GgufValue::Flag(flag) => {
            kind(bytes, 7);
            bytes.push(u8::from(*flag));
        }
        GgufValue::Text(text) => {
            kind(bytes, 8);
            put_text(bytes, text);
        }
        GgufValue::U32s(values) => {
            list(bytes, 4, values.len());
            bytes.extend(values.iter().flat_map(|n| n.to_le_bytes()));
        }
        GgufValue::I32s(values) => {
            list(bytes, 5, values.len());
            bytes.extend(values.iter().flat_map(|n| n.to_le_bytes()));
        }
        GgufValue::F32s(values) => {
            list(bytes, 6, values.len());
            bytes.extend(values.iter().flat_map(|x| x.to_le_bytes()));
        }
        GgufValue::Texts(texts) => {
            list(bytes, 8, texts.len());
            texts.iter().for_each(|text| put_text(bytes, text));
        }
        GgufValue::Raw(raw) => bytes.extend(raw),
    }
}
