//! `lonas train`

mod card;
mod device;
mod folder;
mod plan;

use super::device::DeviceArg;
use super::open::BaseArg;
use super::{Failure, progress::Progress};
use crate::artifact::TensorType;
use crate::backend::reference::Reference;
use crate::data::PromptForm;
use crate::model::llama::{self, SuperAdapter};
use crate::train::{Checkpoint, LogLine, Trainer, TrainingLog};
use clap::Args;
use plan::Plan;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Train a super-adapter with LoNAS's recipe.
///
/// Writes a model folder that `lonas serve` takes as it is. Run again with the same arguments after an interruption,
/// it goes on from the last checkpoint.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  lonas train --data train.json --space space.json --out models/mine --reorder"
)]
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

    /// Times that each training example is seen.
    #[arg(long, default_value_t = 6)]
    epochs: usize,

    /// Sequences in one micro-batch, which shares one random sub-network.
    #[arg(long, default_value_t = 4)]
    micro_batch: usize,

    /// Micro-batches in one optimizer step.
    #[arg(long, default_value_t = 4)]
    accumulation: usize,

    /// At the start; it falls along a cosine to zero.
    #[arg(long, default_value_t = 3e-4)]
    learning_rate: f64,

    /// AdamW's.
    #[arg(long, default_value_t = 0.0)]
    weight_decay: f64,

    /// Dropout of the adapters' input.
    #[arg(long, default_value_t = 0.1)]
    dropout: f64,

    /// Decides the split, the order, the sub-networks, the dropout and the fresh adapter.
    #[arg(long, default_value_t = 42)]
    seed: u64,

    /// Threads; 0 takes all cores.
    #[arg(long, env = "LONAS_THREADS", default_value_t = 0)]
    threads: usize,

    /// Remember only each layer's input for the backward pass and compute the rest again: about a third slower, in
    /// less than half the memory. The result is the same bit for bit.
    #[arg(long)]
    gradient_checkpointing: bool,

    /// Where to train: `auto` (the first GPU if there is one that can be used, else the processor), `cpu`, `cuda` or
    /// `cuda:N`. On a GPU the base is rounded to bf16, so a training stays on the kind of device it began on.
    #[arg(long, env = "LONAS_DEVICE", default_value = "auto")]
    device: DeviceArg,

    /// Number format of the written adapter.
    #[arg(long, value_enum, default_value_t = AdapterType::Bf16)]
    adapter_type: AdapterType,

    /// Train anew where --out holds a finished super-network, and replace all of it.
    #[arg(long)]
    overwrite: bool,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum AdapterType {
    F32,
    Bf16,
}

impl From<AdapterType> for TensorType {
    fn from(adapter_type: AdapterType) -> Self {
        match adapter_type {
            AdapterType::F32 => Self::F32,
            AdapterType::Bf16 => Self::Bf16,
        }
    }
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Form {
    /// LoNAS's instruction template, byte for byte.
    Lonas,
    /// `Question: ...` and `Answer: ` with the right option's text; suits small models.
    Short,
}

impl Form {
    fn name(self) -> &'static str {
        match self {
            Self::Lonas => "LoNAS's instruction template",
            Self::Short => "`Question: ...` and `Answer: ` with the right option's text",
        }
    }
}

impl From<Form> for PromptForm {
    fn from(form: Form) -> Self {
        match form {
            Form::Lonas => Self::Lonas,
            Form::Short => Self::Short,
        }
    }
}

pub(super) fn run(args: &TrainArgs) -> Result<(), Failure> {
    let cores = || std::thread::available_parallelism().map_or(1, usize::from);
    let threads = if args.threads == 0 { cores() } else { args.threads };
    candle_stays_on_its_thread();
    rayon::ThreadPoolBuilder::new().num_threads(threads).build_global()?;
    let checkpoint_path = args.out.join("checkpoint.safetensors");
    if args.out.join("supernet.json").exists() && !checkpoint_path.exists() && !args.overwrite {
        let out = args.out.display();
        return Err(
            format!("{out} holds a finished super-network; give another --out, or --overwrite").into()
        );
    }
    let plan = plan::plan(args)?;
    std::fs::create_dir_all(&args.out)?;
    let checkpoint = Checkpoint { recipe: plan.recipe.clone(), inputs: plan::digest(&plan) };
    device::check_memory(args, &plan)?;
    let mut trainer = trainer(&plan)?;
    trainer.checkpoint_gradients(args.gradient_checkpointing);
    let log_path = args.out.join("train.jsonl");
    if checkpoint.resume(&checkpoint_path, &mut trainer)? {
        tracing::info!("going on from micro-batch {} of {}", trainer.done(), trainer.total());
    } else if log_path.exists() {
        // Of a training that never came to a checkpoint, or that is being replaced: not this one's.
        std::fs::remove_file(&log_path)?;
    }
    let mut log = TrainingLog::open(&log_path, trainer.done())?;
    tracing::info!(
        "training on {} sequences of {} tokens in all, {} micro-batches",
        plan.sequences.len(),
        plan.sequences.iter().map(Vec::len).sum::<usize>(),
        trainer.total()
    );
    train(args, &plan, &mut trainer, &mut log, |trainer| checkpoint.save(&checkpoint_path, trainer))?;
    folder::write(args, &plan, &trainer, &log)?;
    // The result is whole; what was only needed to get there goes.
    std::fs::remove_file(&checkpoint_path).or_else(|e| match e.kind() {
        std::io::ErrorKind::NotFound => Ok(()),
        _ => Err(e),
    })?;
    tracing::info!("wrote {}; serve it with: lonas serve {}", args.out.display(), args.out.display());
    Ok(())
}

/// The trainer runs one graph on each thread; candle's own threads inside each operation would only get in their way.
fn candle_stays_on_its_thread() {
    for name in ["RAYON_NUM_THREADS", "CANDLE_NUM_THREADS"] {
        #[expect(unsafe_code, reason = "candle reads the number of its threads from the environment only")]
        // SAFETY: no other thread has been started yet.
        unsafe {
            std::env::set_var(name, "1");
        }
    }
}

/// A trainer with a fresh adapter: A by Kaiming's uniform rule, B zero, as PEFT begins.
fn trainer(plan: &Plan) -> Result<Trainer, Failure> {
    let backend = Reference::for_training(plan.recipe.dropout, plan.recipe.seed).on(plan.compute.clone());
    let tensors = crate::train::fresh_adapter(&plan.shape, plan.recipe.seed);
    let adapter = SuperAdapter { shape: plan.shape.clone(), tensors, scale: plan.adapter.scale() as f32 };
    let model = llama::load(&backend, &plan.base, vec![adapter], &plan.orders)?;
    let (shape, space) = (plan.shape.clone(), plan.space.clone());
    Ok(Trainer::new(backend, model, shape, space, plan.recipe.clone(), plan.sequences.clone())?)
}

fn train(
    args: &TrainArgs,
    plan: &Plan,
    trainer: &mut Trainer,
    log: &mut TrainingLog,
    save: impl Fn(&Trainer) -> Result<(), crate::train::TrainError>,
) -> Result<(), Failure> {
    let mut progress = Progress::new("micro-batch", trainer.total(), trainer.done());
    // What is too long for a duration is never.
    let seconds = args.checkpoint_every.max(0.0) * 60.0;
    let interval = Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX);
    let mut saved = Instant::now();
    let mut smooth: Option<f32> = None;
    if log.lines().is_empty() {
        validate(plan, trainer, log)?;
    }
    while trainer.done() < trainer.total() {
        let done = trainer.step()?;
        log.write(LogLine::from(&done))?;
        let mean = smooth.map_or(done.loss, |s| s + 0.02 * (done.loss - s));
        smooth = Some(mean);
        progress.set(done.number, &format!("loss {mean:.3}"));
        let due = args.validate_every > 0 && done.number.is_multiple_of(args.validate_every);
        if due || done.number == trainer.total() {
            validate(plan, trainer, log)?;
        }
        if trainer.between_windows() && saved.elapsed() >= interval {
            save(trainer)?;
            saved = Instant::now();
        }
    }
    progress.finish();
    Ok(())
}

fn validate(plan: &Plan, trainer: &Trainer, log: &mut TrainingLog) -> Result<(), Failure> {
    if plan.validation.is_empty() {
        return Ok(());
    }
    let losses = trainer.validate(&plan.validation)?;
    if ![losses.maximal, losses.heuristic, losses.minimal].iter().all(|loss| loss.is_finite()) {
        return Err(format!("the validation loss is no number: {losses:?}; a lower rate may help").into());
    }
    let micro_batch = trainer.done();
    tracing::info!(
        "validation loss at {micro_batch}: maximal {:.4}, heuristic {:.4}, minimal {:.4}",
        losses.maximal,
        losses.heuristic,
        losses.minimal
    );
    Ok(log.write(LogLine::Validation { micro_batch, losses })?)
}
