//! The file with an adapter's tensors, of either kind.

use crate::artifact::ArtifactError;
use crate::artifact::hugging_face::SafetensorsFile;
use crate::artifact::torch::TorchFile;
use crate::weights::HostData;
use std::path::{Path, PathBuf};

pub(super) const SAFETENSORS: &str = "adapter_model.safetensors";
/// As PEFT wrote by default before version 0.7.
const TORCH: &str = "adapter_model.bin";

pub(super) struct TensorFile {
    path: PathBuf,
    kind: Kind,
}

enum Kind {
    Safetensors(SafetensorsFile),
    Torch(TorchFile),
}

impl TensorFile {
    /// The safetensors file, if there is one, as PEFT chooses.
    pub(super) fn in_folder(folder: &Path) -> Result<Self, ArtifactError> {
        let (path, torch) = (folder.join(SAFETENSORS), folder.join(TORCH));
        if !path.exists() && torch.exists() {
            return Ok(Self { kind: Kind::Torch(TorchFile::open(&torch)?), path: torch });
        }
        Ok(Self { kind: Kind::Safetensors(SafetensorsFile::open(&path)?), path })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Names and shapes of all tensors.
    pub(super) fn shapes(&self) -> Result<Vec<(String, Vec<usize>)>, ArtifactError> {
        Ok(match &self.kind {
            Kind::Safetensors(file) => {
                file.tensors()?.iter().map(|(name, view)| (name.to_string(), view.shape().to_vec())).collect()
            }
            Kind::Torch(file) => file.shapes().map(|(name, shape)| (name.to_string(), shape)).collect(),
        })
    }

    /// The values of a tensor that is to have this shape, row-major.
    pub(super) fn values(&self, name: &str, shape: &[usize]) -> Result<HostData, ArtifactError> {
        match &self.kind {
            Kind::Safetensors(file) => file.matrix(name, shape),
            Kind::Torch(file) => file.values(name, shape),
        }
    }
}
