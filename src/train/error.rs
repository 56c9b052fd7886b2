//! What can stop a training.

use super::Recipe;
use crate::backend::BackendError;
use crate::model::llama::LoadError;
use std::path::PathBuf;

/// Why training failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrainError {
    #[error("no training example has at least two tokens")]
    NoData,
    #[error("a recipe needs at least one epoch, one sequence and one micro-batch, got {recipe:?}")]
    Recipe { recipe: Recipe },
    #[error("micro-batch {micro_batch}: the loss is {loss}; a lower learning rate may help")]
    Diverged { micro_batch: u64, loss: f32 },
    #[error("{}: {reason}", path.display())]
    Checkpoint { path: PathBuf, reason: String },
    #[error(
        "{} belongs to another training ({what} differs): give another --out, or remove it to start over",
        path.display()
    )]
    OtherTraining { path: PathBuf, what: &'static str },
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: std::io::Error },
    #[error(transparent)]
    Backend(#[from] BackendError),
    #[error(transparent)]
    Load(#[from] LoadError),
}
