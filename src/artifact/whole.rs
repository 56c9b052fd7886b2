//! Files and folders that appear whole or not at all: written beside their place under a name of their own, then renamed.

use super::ArtifactError;
use std::fs;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use tempfile::{NamedTempFile, TempDir};

/// A file on its way; gone if it is dropped before [`Self::finish`].
#[derive(Debug)]
pub(super) struct WholeFile {
    path: PathBuf,
    writer: BufWriter<NamedTempFile>,
}

impl WholeFile {
    pub(super) fn create(path: &Path) -> Result<Self, ArtifactError> {
        let temporary = named(path).tempfile_in(parent(path));
        let temporary = temporary.map_err(|source| ArtifactError::Io { path: path.into(), source })?;
        Ok(Self { path: path.into(), writer: BufWriter::with_capacity(1 << 20, temporary) })
    }

    pub(super) fn write(&mut self, bytes: &[u8]) -> Result<(), ArtifactError> {
        let Self { path, writer } = self;
        writer.write_all(bytes).map_err(|source| ArtifactError::Io { path: path.clone(), source })
    }

    pub(super) fn finish(self) -> Result<(), ArtifactError> {
        let Self { path, writer } = self;
        let io = |source| ArtifactError::Io { path: path.clone(), source };
        let temporary = writer.into_inner().map_err(|e| io(e.into_error()))?;
        let file = temporary.persist(&path).map_err(|e| io(e.error))?;
        // A temporary file is private to its owner; what it becomes is as readable as any other file.
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            file.set_permissions(fs::Permissions::from_mode(0o644)).map_err(io)?;
        }
        drop(file);
        Ok(())
    }
}

/// A folder on its way; gone if it is dropped before [`Self::finish`].
#[derive(Debug)]
pub struct WholeFolder {
    path: PathBuf,
    temporary: TempDir,
}

impl WholeFolder {
    /// A folder that will stand at `path`. One that stands there already is replaced if `replace` says so and each of its
    /// files is `ours`, one that such a folder has: nobody else's files are ever removed.
    ///
    /// # Errors
    /// A path that is taken or cannot be written to.
    pub fn create(path: &Path, replace: bool, ours: impl Fn(&str) -> bool) -> Result<Self, ArtifactError> {
        let io = |source| ArtifactError::Io { path: path.into(), source };
        if path.exists() {
            if !replace {
                return Err(ArtifactError::Exists { path: path.into() });
            }
            for entry in fs::read_dir(path).map_err(io)? {
                let entry = entry.map_err(io)?;
                let name = entry.file_name().to_string_lossy().into_owned();
                if !ours(&name) || entry.path().is_dir() {
                    let reason =
                        format!("it holds `{name}`, which no export of this kind wrote; not replaced");
                    return Err(ArtifactError::wrong(path, reason));
                }
            }
        }
        let temporary = named(path).tempdir_in(parent(path)).map_err(io)?;
        Ok(Self { path: path.into(), temporary })
    }

    /// Where the files are to be written.
    pub fn path(&self) -> &Path {
        self.temporary.path()
    }

    pub fn finish(self) -> Result<(), ArtifactError> {
        let Self { path, temporary } = self;
        let io = |source| ArtifactError::Io { path: path.clone(), source };
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            fs::set_permissions(temporary.path(), fs::Permissions::from_mode(0o755)).map_err(io)?;
        }
        if !path.exists() {
            fs::rename(temporary.path(), &path).map_err(io)?;
            drop(temporary.keep());
            return Ok(());
        }
        // No rename replaces a folder that is not empty: the old one steps aside, and back if the new one cannot come.
        let aside = named(&path).tempdir_in(parent(&path)).map_err(io)?;
        let old = aside.path().join("old");
        fs::rename(&path, &old).map_err(io)?;
        if let Err(source) = fs::rename(temporary.path(), &path) {
            fs::rename(&old, &path).map_err(io)?;
            return Err(io(source));
        }
        drop(temporary.keep());
        aside.close().map_err(io)
    }
}

/// Names that say what they were to become, should a process that is killed leave them.
fn named(path: &Path) -> tempfile::Builder<'_, 'static> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(path.file_name().unwrap_or_default()).suffix(".partial");
    builder
}

fn parent(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}
