//! Copies of golden folders that a test may damage.

use crate::golden;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// A copy that vanishes with the test.
pub(crate) struct Folder(tempfile::TempDir);

/// Name to number format, shape, bytes.
pub(crate) type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

impl Folder {
    pub(crate) fn empty() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    /// A copy of `tests/golden/NAME`, which has no folders inside.
    pub(crate) fn copy_of(name: &str) -> Self {
        let folder = Self::empty();
        for entry in std::fs::read_dir(golden::path(name)).unwrap() {
            let entry = entry.unwrap();
            std::fs::copy(entry.path(), folder.file(&entry.file_name().to_string_lossy())).unwrap();
        }
        folder
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }

    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub(crate) fn read(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.file(name)).unwrap()
    }

    pub(crate) fn write(&self, name: &str, contents: impl AsRef<[u8]>) {
        std::fs::write(self.file(name), contents).unwrap();
    }

    pub(crate) fn remove(&self, name: &str) {
        std::fs::remove_file(self.file(name)).unwrap();
    }

    pub(crate) fn edit_json(&self, name: &str, edit: impl FnOnce(&mut serde_json::Value)) {
        let mut json = serde_json::from_slice(&self.read(name)).unwrap();
        edit(&mut json);
        self.write(name, json.to_string());
    }

    pub(crate) fn tensors(&self, name: &str) -> Tensors {
        tensors(&self.file(name))
    }

    pub(crate) fn write_tensors(&self, name: &str, tensors: &Tensors) {
        let views = tensors.iter().map(|(name, (dtype, shape, bytes))| {
            (name, TensorView::new(*dtype, shape.clone(), bytes).unwrap())
        });
        self.write(name, safetensors::serialize(views, None).unwrap());
    }

    pub(crate) fn edit_tensors(&self, name: &str, edit: impl FnOnce(&mut Tensors)) {
        let mut tensors = self.tensors(name);
        edit(&mut tensors);
        self.write_tensors(name, &tensors);
    }
}

/// What a safetensors file has.
pub(crate) fn tensors(path: &Path) -> Tensors {
    let bytes = std::fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let take = |(name, view): (&str, TensorView<'_>)| {
        (name.to_string(), (view.dtype(), view.shape().to_vec(), view.data().to_vec()))
    };
    file.iter().map(take).collect()
}

/// The message must name all of these.
#[track_caller]
pub(crate) fn assert_names(message: &str, words: &[&str]) {
    for word in words {
        assert!(message.contains(word), "`{message}` does not name `{word}`");
    }
    assert!(message.len() < 1000, "a message of {} bytes: {message:.200}", message.len());
}
