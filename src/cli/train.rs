//! `lonas train`

use super::open::{self, BaseArg};
use super::{Failure, progress::Progress};
use crate::artifact::{
    self, AdapterConfig, AdapterTensors, Base, ModelFolder, NewModelFolder, TensorType, model_digest,
};
use crate::backend::reference::{NamedTensor, Reference};
use crate::data::{self, PromptForm};
use crate::model::llama::{self, GroupTemplate, SuperAdapter};
use crate::plot;
use crate::supernet::{ModelShape, Part, SearchSpace};
use crate::train::{
    CALIBRATION_SEQUENCES, Checkpoint, LogLine, Recipe, Trainer, TrainingLog, importance_orders,
};
use crate::weights::{HostData, HostMatrix};
use clap::Args;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Train a super-adapter with LoNAS's recipe.
///
/// Writes a model folder that `lonas serve` takes as it is. Run again with the same arguments after an interruption,
/// it goes on from the last checkpoint.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  lonas train --data train.json --space space.json --out models/mine --reorder")]
pub(super) struct TrainArgs {
    #[command(flatten)]
    base: BaseArg,

    /// Training examples: JSON arrays of {instruction, input, output, answer}.
    #[arg(long, required = true, num_args = 1.., value_name = "FILE")]
    data: Vec<PathBuf>,

    /// The search space: JSON with rank, alpha, targets and groups. See README, "Your own super-network".
    #[arg(long, value_name = "FILE")]
    space: PathBuf,

    /// The model folder to write.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,

    /// How an example becomes text.
    #[arg(long, value_enum, default_value_t = Form::Lonas)]
    form: Form,

    /// Put the MLP channels in falling importance before training.
    #[arg(long, conflicts_with = "order")]
    reorder: bool,

    /// Reuse the channel order of another model folder, so that both can be served on one copy of the base.
    #[arg(long, value_name = "DIR")]
    order: Option<PathBuf>,

    /// Use the first N training examples only (after shuffling).
    #[arg(long, value_name = "N")]
    limit: Option<usize>,

    /// Longest sequence, in tokens.
    #[arg(long, default_value_t = 256)]
    cutoff: usize,

    /// Examples held out for the validation loss.
    #[arg(long, default_value_t = 120, value_name = "N")]
    validation: usize,

    /// Micro-batches between two validations; 0 validates at the end only.
    #[arg(long, default_value_t = 400, value_name = "N")]
    validate_every: u64,

    /// Minutes between two checkpoints: what an interruption can cost at most.
    #[arg(long, default_value_t = 2.0, value_name = "MINUTES")]
    checkpoint_every: f64,

    #[arg(long, default_value_t = 6)]
    epochs: usize,

    /// Sequences in one micro-batch, which shares one random sub-network.
    #[arg(long, default_value_t = 4)]
    micro_batch: usize,

    /// Micro-batches in one optimizer step.
    #[arg(long, default_value_t = 4)]
    accumulation: usize,

    #[arg(long, default_value_t = 3e-4)]
    learning_rate: f64,

    #[arg(long, default_value_t = 0.0)]
    weight_decay: f64,

    /// Dropout of the adapters' input.
    #[arg(long, default_value_t = 0.1)]
    dropout: f64,

    #[arg(long, default_value_t = 42)]
    seed: u64,

    /// Threads; 0 takes all cores.
    #[arg(long, env = "LONAS_THREADS", default_value_t = 0)]
    threads: usize,

    /// Number format of the written adapter.
    #[arg(long, value_enum, default_value_t = TensorType::Bf16)]
    adapter_type: TensorType,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Form {
    /// LoNAS's instruction template, byte for byte.
    Lonas,
    /// `Question: ...` and `Answer: ` with the right option's text; suits small models.
    Short,
}
