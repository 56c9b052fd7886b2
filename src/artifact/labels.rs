//! What a classifier's outputs are called and mean, where several super-adapters of one base have a head of their own.

use super::ArtifactError;
use super::adapter::read_adapter_head;
use super::base::{Activation, BaseConfig, ClassifierConfig};
use super::config::{MAX_LABELS, read_outputs};
use std::path::Path;

/// The weight whose rows are the outputs.
pub(super) const CLASSIFIER: &str = "classifier.weight";

/// What a config.json says of a classifier's outputs.
#[derive(Debug, Default)]
pub(super) struct StatedOutputs {
    pub(super) labels: Option<Vec<String>>,
    /// `problem_type`
    pub(super) problem: Option<String>,
}

/// `LABEL_0` and on, as transformers calls what nobody has named.
pub(super) fn numbered_labels(count: usize) -> Vec<String> {
    (0..count).map(|i| format!("LABEL_{i}")).collect()
}

impl ClassifierConfig {
    /// `otherwise` labels where none are stated. One output without a `problem_type` is a number, as in transformers.
    pub(super) fn of(outputs: &StatedOutputs, otherwise: usize) -> Self {
        let labels = outputs.labels.clone().unwrap_or_else(|| numbered_labels(otherwise));
        let regression = outputs.problem.as_ref().map_or(labels.len() == 1, |p| p == "regression");
        let multi_label = outputs.problem.as_ref().is_some_and(|p| p == "multi_label_classification");
        let (stated, token_types, activation) = (outputs.labels.is_some(), 0, Activation::Gelu);
        Self { labels, stated, regression, multi_label, token_types, activation }
    }

    /// The same with as many labels as a head has rows, unless they are stated.
    pub(super) fn counted(self, rows: usize) -> Self {
        if self.stated || rows == self.labels.len() {
            return self;
        }
        let regression = self.regression || (rows == 1 && !self.multi_label);
        Self { labels: numbered_labels(rows), regression, ..self }
    }
}

impl BaseConfig {
    /// The base's configuration with the classifier of the super-adapter in `folder`: as many labels as its head has rows, with the
    /// names and the `problem_type` of a config.json beside it, else the base's if those are as many, else numbers. Unchanged where
    /// the adapter has no head of its own.
    ///
    /// # Errors
    /// What is wrong with a file; labels that are not as many as the head has rows.
    pub fn with_head_of(&self, folder: &Path) -> Result<Self, ArtifactError> {
        let Some(base) = &self.classifier else { return Ok(self.clone()) };
        let file = folder.join("config.json");
        let stated = if file.exists() { read_outputs(&file)? } else { StatedOutputs::default() };
        let head = read_adapter_head(folder)?;
        let rows = head.get(CLASSIFIER).and_then(|tensor| tensor.shape.first().copied());
        let rows = rows.unwrap_or(base.labels.len());
        if rows == 0 || rows > MAX_LABELS {
            let reason = format!("tensor `{CLASSIFIER}`: {rows} rows, expected 1 to {MAX_LABELS}");
            return Err(ArtifactError::wrong(folder, reason));
        }
        if let Some(labels) = stated.labels.as_ref().filter(|labels| labels.len() != rows) {
            let reason = format!("{} labels, but `{CLASSIFIER}` has {rows} rows", labels.len());
            return Err(ArtifactError::field(&file, "id2label", reason));
        }
        let as_many = rows == base.labels.len();
        let labels = stated.labels.or_else(|| as_many.then(|| base.labels.clone()));
        let inherits = as_many && stated.problem.is_none();
        let mut own = ClassifierConfig::of(&StatedOutputs { labels, problem: stated.problem }, rows);
        (own.token_types, own.activation) = (base.token_types, base.activation);
        if inherits {
            (own.regression, own.multi_label) = (base.regression, base.multi_label);
        }
        Ok(Self { classifier: Some(own), ..self.clone() })
    }
}
