//! Files and folders that appear whole or not at all: written beside their place under a name of their own, then renamed.

use super::ArtifactError;
use std::fs;
use std::io::{BufWriter, Write};
use std::path::{Component, Path, PathBuf};
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
    /// Whether a folder that stands there may be replaced.
    replaceable: Option<Replaceable>,
}

/// Whether a folder may be replaced, see [`check_written`].
pub type Replaceable = fn(&Path) -> Result<(), ArtifactError>;

impl WholeFolder {
    /// A folder that will stand at `path`. One that stands there already is replaced if `replaceable` finds nothing against it,
    /// and without that never.
    ///
    /// # Errors
    /// A path that is taken or cannot be written to.
    pub fn create(path: &Path, replaceable: Option<Replaceable>) -> Result<Self, ArtifactError> {
        let io = |source| ArtifactError::Io { path: path.into(), source };
        check_free(path, replaceable)?;
        let temporary = named(path).tempdir_in(parent(path)).map_err(io)?;
        Ok(Self { path: path.into(), temporary, replaceable })
    }

    /// Where the files are to be written.
    pub fn path(&self) -> &Path {
        self.temporary.path()
    }

    /// # Errors
    /// A path that cannot be written to, or that has been taken since [`Self::create`].
    pub fn finish(self) -> Result<(), ArtifactError> {
        let Self { path, temporary, replaceable } = self;
        let io = |source| ArtifactError::Io { path: path.clone(), source };
        // What was written may have taken an hour, in which files can have come.
        check_free(&path, replaceable)?;
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

fn check_free(path: &Path, replaceable: Option<Replaceable>) -> Result<(), ArtifactError> {
    match (path.exists(), replaceable) {
        (false, _) => Ok(()),
        (true, None) => Err(ArtifactError::Exists { path: path.into() }),
        (true, Some(check)) => check(path),
    }
}

/// Whether a program that leaves a model card with these words in one line wrote everything in a folder: there is such a card,
/// and each file is `ours`, by its path. An empty folder holds nothing to lose.
///
/// # Errors
/// What speaks against it.
pub fn check_written(
    folder: &Path,
    words: &[&str],
    ours: impl Fn(&Path) -> bool,
) -> Result<(), ArtifactError> {
    let io = |source| ArtifactError::Io { path: folder.into(), source };
    let entries = fs::read_dir(folder).map_err(io)?.collect::<Result<Vec<_>, _>>().map_err(io)?;
    if let Some(other) = entries.iter().map(fs::DirEntry::path).find(|path| path.is_dir() || !ours(path)) {
        let name = other.file_name().unwrap_or_default().to_string_lossy();
        return Err(kept(folder, &format!("`{name}`, which nothing of this kind wrote")));
    }
    // A card may say anything, and need not be text.
    let card = fs::read(folder.join(MODEL_CARD)).unwrap_or_default();
    let card = String::from_utf8_lossy(&card);
    let says = |line: &str| words.iter().all(|words| line.contains(words));
    if entries.is_empty() || card.lines().any(says) {
        return Ok(());
    }
    Err(kept(folder, &format!("no model card ({MODEL_CARD}) of such a run")))
}

/// A model card's file.
pub const MODEL_CARD: &str = "README.md";

fn kept(folder: &Path, what: &str) -> ArtifactError {
    let reason = format!("it holds {what}; only what an earlier run wrote is replaced");
    ArtifactError::wrong(folder, reason)
}

/// Whether a path where something is to be written lies apart from what is read, each by what it is called: it is none of them, holds
/// none and lies in none, whatever links lead there.
///
/// # Errors
/// The one that it does not lie apart from.
pub fn check_apart(out: &Path, sources: &[(&str, &Path)]) -> Result<(), ArtifactError> {
    let place = place_of(out);
    for (what, source) in sources {
        let source_place = place_of(source);
        let relation = match (place.starts_with(&source_place), source_place.starts_with(&place)) {
            (true, true) => "it is",
            (true, false) => "it lies in",
            (false, true) => "it holds",
            (false, false) => continue,
        };
        let reason = format!("{relation} {what} ({}); write to another place", source.display());
        return Err(ArtifactError::wrong(out, reason));
    }
    Ok(())
}

/// The path without links; what does not exist yet, by the nearest folder that does.
fn place_of(path: &Path) -> PathBuf {
    let mut rest = Vec::new();
    let mut known = path;
    loop {
        let known_or_here = if known.as_os_str().is_empty() { Path::new(".") } else { known };
        if let Ok(mut place) = known_or_here.canonicalize() {
            for part in rest.iter().rev() {
                match part {
                    Component::ParentDir => _ = place.pop(),
                    Component::Normal(name) => place.push(name),
                    _ => {}
                }
            }
            return place;
        }
        let Some(last) = known.components().next_back() else { return path.into() };
        rest.push(last);
        known = known.parent().unwrap_or(Path::new(""));
    }
}

/// Removes what killed processes have left of this file before it was whole. For who alone writes it: what another process is
/// writing would go, too.
///
/// # Errors
/// A folder that cannot be read, a file in it that cannot be removed.
pub fn remove_partial(path: &Path) -> Result<(), ArtifactError> {
    let io = |source| ArtifactError::Io { path: path.into(), source };
    let begins = path.file_name().unwrap_or_default().to_string_lossy();
    for entry in fs::read_dir(parent(path)).map_err(io)? {
        let entry = entry.map_err(io)?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with(&*begins) && name.ends_with(PARTIAL) {
            fs::remove_file(entry.path()).map_err(io)?;
        }
    }
    Ok(())
}

/// What names of unfinished files end in.
const PARTIAL: &str = ".partial";

/// Names that say what they were to become, should a process that is killed leave them.
fn named(path: &Path) -> tempfile::Builder<'_, 'static> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(path.file_name().unwrap_or_default()).suffix(PARTIAL);
    builder
}

fn parent(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}
