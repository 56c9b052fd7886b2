//! What one process changes at a time, by the system's advisory locks, which end with the process that has them. Where a file
//! system knows none, it goes without.

use super::ArtifactError;
use std::fs::{self, File, TryLockError};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

/// A folder that only this process writes its results to; free again when this is dropped.
#[derive(Debug)]
pub struct FolderLock {
    path: PathBuf,
    /// Whether the folder was not there before.
    made: bool,
    _file: Option<File>,
}

impl FolderLock {
    /// Takes the folder, which is made if need be. A program that computes for hours does this first, so that a path that
    /// cannot be written to is found before.
    ///
    /// # Errors
    /// A path that cannot be written to, [`ArtifactError::Busy`].
    pub fn take(path: &Path) -> Result<Self, ArtifactError> {
        let io = |source| ArtifactError::Io { path: path.into(), source };
        let made = !path.exists();
        fs::create_dir_all(path).map_err(io)?;
        let mut lock = Self { path: path.into(), made, _file: None };
        // Some systems cannot open a folder.
        if let Ok(file) = File::open(path) {
            if matches!(file.try_lock(), Err(TryLockError::WouldBlock)) {
                lock.made = false;
                return Err(ArtifactError::Busy { path: path.into() });
            }
            lock._file = Some(file);
        }
        tempfile::tempfile_in(path).map_err(io)?;
        Ok(lock)
    }
}

impl Drop for FolderLock {
    fn drop(&mut self) {
        if self.made {
            // Does nothing where something was written.
            let _ = fs::remove_dir(&self.path);
        }
    }
}

/// Waits until no other process has the file, and takes it until what is returned is dropped. For changes that take no time.
pub(super) fn wait_for(path: &Path) -> Result<File, ArtifactError> {
    let file = File::open(path).map_err(|source| ArtifactError::Io { path: path.into(), source })?;
    while matches!(file.lock(), Err(error) if error.kind() == ErrorKind::Interrupted) {}
    Ok(file)
}
