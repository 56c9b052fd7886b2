//! What can stop a training.

use crate::artifact::ArtifactError;
use crate::backend::BackendError;
use crate::model::LoadError;
use std::path::PathBuf;

/// Why training failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrainError {
    #[error("no training example has a token to learn")]
    NoData,
    #[error(
        "micro-batch {micro_batch}: a student learns from the maximal network on the same sequences, just before it"
    )]
    NoTeacher { micro_batch: u64 },
    #[error(
        "nothing would be learnt: of {micro_batches} micro-batches, {accumulation} of them an optimizer step, no step has a \
         learning rate above 0; it takes more examples, epochs or tokens, or a smaller --accumulation"
    )]
    NoStep { micro_batches: u64, accumulation: usize },
    #[error("{field}: expected {expected}, got {got}")]
    Recipe { field: &'static str, expected: &'static str, got: String },
    #[error("micro-batch {micro_batch}: the {what} is {value}; a lower learning rate may help")]
    Diverged { micro_batch: u64, what: &'static str, value: f64 },
    #[error("{}: {reason}", path.display())]
    Checkpoint { path: PathBuf, reason: String },
    #[error(
        "{} belongs to another training ({what}): give another --out, or --overwrite to start over",
        path.display()
    )]
    OtherTraining { path: PathBuf, what: String },
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: std::io::Error },
    #[error(transparent)]
    Artifact(#[from] ArtifactError),
    #[error(transparent)]
    Backend(#[from] BackendError),
    #[error(transparent)]
    Load(#[from] LoadError),
}
