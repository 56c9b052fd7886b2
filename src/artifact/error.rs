//! What can be wrong with a file.

use crate::supernet::SpaceError;
use std::path::{Path, PathBuf};

/// A file that cannot be used. The message names the file and the tensor or field, what was expected and what found.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ArtifactError {
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: std::io::Error },
    /// Something stands where a file or folder was to be written.
    #[error("{}: there is something already", path.display())]
    Exists { path: PathBuf },
    /// Somebody else has it, see [`super::FolderLock`].
    #[error("{}: another process is writing to it", path.display())]
    Busy { path: PathBuf },
    /// Damaged, truncated, hostile, or simply not what it should be.
    #[error("{}: {reason}", path.display())]
    Wrong { path: PathBuf, reason: String },
    #[error("{}: there is no tensor `{tensor}`", path.display())]
    MissingTensor { path: PathBuf, tensor: String },
    #[error("{}: tensor `{tensor}`: expected shape {expected:?}, got {got:?}", path.display())]
    TensorShape { path: PathBuf, tensor: String, expected: Vec<usize>, got: Vec<usize> },
    #[error("{}: tensor `{tensor}`: number format {got} is not supported", path.display())]
    TensorType { path: PathBuf, tensor: String, got: String },
    #[error("{}: field `{field}`: {reason}", path.display())]
    Field { path: PathBuf, field: String, reason: String },
    #[error("{}: {source}", path.display())]
    Space { path: PathBuf, source: SpaceError },
    #[error("{}: sha256 is {got}, expected {expected}", path.display())]
    Digest { path: PathBuf, expected: String, got: String },
    #[error("cannot fetch {what}: {reason}")]
    Fetch { what: String, reason: String },
}

impl ArtifactError {
    pub(super) fn wrong(path: &Path, reason: impl Into<String>) -> Self {
        Self::Wrong { path: path.to_path_buf(), reason: reason.into() }
    }

    pub(super) fn field(path: &Path, field: &str, reason: impl Into<String>) -> Self {
        Self::Field { path: path.to_path_buf(), field: field.into(), reason: reason.into() }
    }
}
