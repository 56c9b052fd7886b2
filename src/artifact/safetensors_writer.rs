//! Writes a safetensors file tensor by tensor: the header first, from the shapes alone, then values as they come.

use super::ArtifactError;
use super::encode::{self, NumberFormat, OutTensor};
use super::whole::WholeFile;
use serde_json::{Map, Value, json};
use std::path::{Path, PathBuf};

/// A file on its way; gone if it is dropped before [`Self::finish`].
#[derive(Debug)]
pub struct SafetensorsWriter {
    path: PathBuf,
    file: WholeFile,
    tensors: std::vec::IntoIter<OutTensor>,
}

impl SafetensorsWriter {
    /// Writes the header of a file that will have these tensors, in this order.
    ///
    /// # Errors
    /// A number format that safetensors has not, a path that cannot be written to.
    pub fn create(path: &Path, tensors: Vec<OutTensor>) -> Result<Self, ArtifactError> {
        let mut header = Map::new();
        header.insert("__metadata__".into(), json!({ "format": "pt" }));
        let mut end = 0;
        for tensor in &tensors {
            let format = match tensor.format {
                NumberFormat::F32 => "F32",
                NumberFormat::F16 => "F16",
                NumberFormat::Bf16 => "BF16",
                NumberFormat::Q8_0 => {
                    let (path, tensor) = (path.into(), tensor.name.clone());
                    return Err(ArtifactError::TensorType { path, tensor, got: "q8_0".into() });
                }
            };
            let start = end;
            end += tensor.bytes();
            let entry = json!({ "dtype": format, "shape": tensor.shape, "data_offsets": [start, end] });
            header.insert(tensor.name.clone(), entry);
        }
        let mut header = Value::Object(header).to_string();
        // Spaces up to a multiple of eight, so that the values that follow are aligned.
        header.extend(std::iter::repeat_n(' ', header.len().next_multiple_of(8) - header.len()));
        let mut file = WholeFile::create(path)?;
        file.write(&(header.len() as u64).to_le_bytes())?;
        file.write(header.as_bytes())?;
        Ok(Self { path: path.into(), file, tensors: tensors.into_iter() })
    }

    /// The next tensor's values, row-major.
    pub fn tensor(&mut self, values: &[f32]) -> Result<(), ArtifactError> {
        let next = self.tensors.next();
        let tensor =
            next.ok_or_else(|| ArtifactError::wrong(&self.path, "a tensor more than was planned"))?;
        encode::append(&mut self.file, &self.path, &tensor, values)
    }

    pub fn finish(mut self) -> Result<(), ArtifactError> {
        if let Some(missing) = self.tensors.next() {
            return Err(ArtifactError::MissingTensor { path: self.path, tensor: missing.name });
        }
        self.file.finish()
    }
}
