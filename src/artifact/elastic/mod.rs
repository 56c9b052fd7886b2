//! Search spaces as LoNAS, Shears and SQFT publish them: an NNCF configuration, or SQFT's `elastic_adapter_config.json`.
//!
//! Such a file names modules by paths through the traced model and lists widths; what follows from a cut (the columns of
//! whoever reads the channels, B's columns with A's rows) it leaves to tracing. Here it is derived from the model's shape.
//! Knows no family: a module is found by its path.

mod groups;
mod nncf;
mod node;
mod sqft;

use super::ArtifactError;
use crate::supernet::{Group, ModelShape, SearchSpace};
use jsonc_parser::ParseOptions;
use serde_json::Value;
use std::path::{Path, PathBuf};

/// LoNAS's longest configuration has 77 kB.
const MAX_BYTES: u64 = 16 << 20;

/// A search space as its file has it, its names not yet looked up in a model.
#[derive(Debug)]
pub struct ElasticFile {
    path: PathBuf,
    groups: Vec<NamedGroup>,
    /// Whose columns a group is said to cut, where tracing could not tell: field and name.
    dynamic_inputs: Vec<Name>,
    notes: Vec<String>,
}

/// A group, or one for each layer.
#[derive(Debug)]
struct NamedGroup {
    members: Vec<Name>,
    /// The field with the choices, for messages.
    field: String,
    /// Descending.
    choices: Vec<usize>,
}

/// A module's name and the field in which it stands.
#[derive(Debug)]
struct Name {
    field: String,
    text: String,
}

impl ElasticFile {
    /// Reads a configuration of either kind; which one it is shows in what it contains. Comments and trailing commas are
    /// taken, as NNCF takes them.
    ///
    /// # Errors
    /// What is not JSON (with line and column), a field that is missing, unknown or of the wrong type, elastic dimensions
    /// other than width, groups that NNCF would have to find by itself, weights that were reordered.
    pub fn read(path: &Path) -> Result<Self, ArtifactError> {
        let io = |source| ArtifactError::Io { path: path.into(), source };
        let length = std::fs::metadata(path).map_err(io)?.len();
        if length > MAX_BYTES {
            let reason = format!("{length} bytes, at most {MAX_BYTES} for a search space");
            return Err(ArtifactError::wrong(path, reason));
        }
        let text = std::fs::read_to_string(path).map_err(io)?;
        let value: Value = jsonc_parser::parse_to_serde_value(&text, &LENIENT)
            .map_err(|e| ArtifactError::wrong(path, format!("not JSON: {e}")))?;
        if value.is_array() { sqft::read(path, value) } else { nncf::read(path, value) }
    }

    /// The file that an adapter's folder has of its own: SQFT writes one.
    pub fn beside(adapter: &Path) -> Option<PathBuf> {
        let names = ["elastic_adapter_config.json", "nncf_config.json"];
        names.into_iter().map(|name| adapter.join(name)).find(|path| path.is_file())
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What somebody should know about the file, in whole sentences.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// The elastic groups in a model of this shape, in the file's order, which is how LoNAS numbers them.
    ///
    /// `rank` is the one that the adapter was trained with. An adapter that somebody has cut to fewer ranks already keeps
    /// those choices of a rank that are left to it.
    ///
    /// # Errors
    /// A module that the model does not have, a group of ranks and widths at once or of something that has no elastic width, a
    /// dynamic input that follows no group.
    pub fn groups(&self, shape: &ModelShape, rank: usize) -> Result<Vec<Group>, ArtifactError> {
        groups::groups(self, shape, rank)
    }

    /// [`Self::groups`], checked: choices that fall from the tensors' own sizes, no tensor cut twice, each group whole.
    ///
    /// # Errors
    /// As for `groups`, and what [`SearchSpace::new`] refuses.
    pub fn search_space(&self, shape: &ModelShape, rank: usize) -> Result<SearchSpace, ArtifactError> {
        let wrong = |source| ArtifactError::Space { path: self.path.clone(), source };
        SearchSpace::new(shape, self.groups(shape, rank)?).map_err(wrong)
    }
}

/// JSON with comments and trailing commas, which is what `jstyleson` gives NNCF; nothing else.
const LENIENT: ParseOptions = ParseOptions {
    allow_comments: true,
    allow_trailing_commas: true,
    allow_loose_object_property_names: false,
    allow_missing_commas: false,
    allow_single_quoted_strings: false,
    allow_hexadecimal_numbers: false,
    allow_unary_plus_numbers: false,
    allow_bare_decimal_point_numbers: false,
    allow_non_finite_numbers: false,
    allow_extended_string_escapes: false,
};

/// A value as `T`; an error names the field.
fn typed<T: serde::de::DeserializeOwned>(path: &Path, value: Value) -> Result<T, ArtifactError> {
    serde_path_to_error::deserialize(value).map_err(|e| match e.path().to_string() {
        field if field == "." => ArtifactError::wrong(path, e.inner().to_string()),
        field => ArtifactError::field(path, &field, e.inner().to_string()),
    })
}

/// The choices in falling order, as NNCF sorts them.
fn sorted(choices: &[usize]) -> Vec<usize> {
    let mut choices = choices.to_vec();
    choices.sort_unstable_by(|a, b| b.cmp(a));
    choices
}
