//! `lonas train`

mod args;
mod card;
mod device;
mod folder;
mod plan;

pub(super) use args::TrainArgs;

use super::{Failure, progress::Progress};
use crate::artifact::HeadTensors;
use crate::backend::reference::Reference;
use crate::model::{SuperAdapter, llama};
use crate::train::{Checkpoint, LogLine, Sequence, TrainError, Trainer, TrainingLog};
use folder::Output;
use plan::Plan;
use std::time::{Duration, Instant};

pub(super) fn run(args: &TrainArgs) -> Result<(), Failure> {
    let cores = || std::thread::available_parallelism().map_or(1, usize::from);
    let threads = if args.threads == 0 { cores() } else { args.threads };
    candle_stays_on_its_thread();
    keep_freed_memory();
    rayon::ThreadPoolBuilder::new().num_threads(threads).build_global()?;
    plan::check(args)?;
    let output = Output::take(args)?;
    let plan = plan::plan(args)?;
    let checkpoint = Checkpoint { recipe: plan.recipe.clone(), inputs: plan::inputs(&plan)? };
    device::check_memory(args, &plan)?;
    let mut trainer = trainer(&plan)?;
    trainer.checkpoint_gradients(args.gradient_checkpointing);
    if resumed(args, &checkpoint, &output, &mut trainer)? {
        tracing::info!("going on from micro-batch {} of {}", trainer.done(), trainer.total());
    } else {
        // Of a training that never came to a checkpoint, or that is being replaced: not this one's.
        folder::remove(&output.log)?;
    }
    let mut log = TrainingLog::open(&output.log, trainer.done())?;
    tracing::info!(
        "training on {} sequences of {} tokens in all, {} micro-batches; losses are over {}",
        plan.sequences.len(),
        tokens(&plan.sequences),
        trainer.total(),
        if plan.recipe.response_only { "the responses" } else { "whole sequences" }
    );
    train(args, &plan, &mut trainer, &mut log, |trainer| checkpoint.save(&output.checkpoint, trainer))?;
    if let Err(taken) = output.check_free(args) {
        // Nothing that was computed is lost.
        if trainer.between_windows() {
            checkpoint.save(&output.checkpoint, &trainer)?;
        }
        return Err(taken);
    }
    folder::write(args, &plan, &trainer, &log)?;
    // The result is whole; what was only needed to get there goes.
    folder::remove(&output.checkpoint)?;
    tracing::info!("wrote {}; serve it with: lonas serve {}", args.out.display(), args.out.display());
    Ok(())
}

/// Whether the trainer goes on from a checkpoint. One that it cannot go on from is in the way, unless everything is to be replaced.
fn resumed(
    args: &TrainArgs,
    checkpoint: &Checkpoint,
    output: &Output,
    trainer: &mut Trainer,
) -> Result<bool, Failure> {
    match checkpoint.resume(&output.checkpoint, trainer) {
        Err(error @ (TrainError::OtherTraining { .. } | TrainError::Checkpoint { .. })) if args.overwrite => {
            tracing::warn!("starting over: {error}");
            folder::remove(&output.checkpoint)?;
            Ok(false)
        }
        resumed => Ok(resumed?),
    }
}

fn tokens(sequences: &[Sequence]) -> usize {
    sequences.iter().map(|s| s.tokens.len()).sum()
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

/// A micro-batch frees as much memory as the next one asks for. Left to itself, the C library returns it each time, and the
/// system clears it anew: a tenth of a training's time.
fn keep_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    for (option, value) in [
        // Large tensors come from the heap, too, which is never cut down and grows by this much; threads share one, so that what
        // one has freed another can have.
        (libc::M_MMAP_MAX, 0),
        (libc::M_TRIM_THRESHOLD, -1),
        (libc::M_TOP_PAD, 64 << 20),
        (libc::M_ARENA_MAX, 1),
    ] {
        #[expect(unsafe_code, reason = "no safe way to tell the C library's allocator")]
        // SAFETY: takes two numbers and refuses what it does not know, which would only be slower.
        unsafe {
            libc::mallopt(option, value);
        }
    }
}

/// A trainer with a fresh adapter: A by Kaiming's uniform rule, B zero, as PEFT begins.
fn trainer(plan: &Plan) -> Result<Trainer, Failure> {
    let backend = Reference::for_training(plan.recipe.dropout, plan.recipe.seed).on(plan.compute.clone());
    let tensors = crate::train::fresh_adapter(&plan.shape, plan.recipe.seed);
    let (shape, scale) = (plan.shape.clone(), plan.adapter.scale() as f32);
    let adapter =
        SuperAdapter { shape, tensors, head: HeadTensors::new(), scale, sparse: plan.adapter.sparse };
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
        // A divergence is no loss of the text, so a mean of both would say nothing.
        if !done.distilled {
            smooth = Some(smooth.map_or(done.loss, |s| s + 0.02 * (done.loss - s)));
        }
        let said = smooth.map(|mean| format!("loss {mean:.3}")).unwrap_or_default();
        progress.set(done.number, &said);
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
