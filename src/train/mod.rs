//! Training a super-adapter: LoNAS's loop over the reference backend, and recipes beyond it.
//!
//! One random sub-network for each micro-batch, uniform and independent in every group; causal cross-entropy over
//! the whole sequence; gradients of several micro-batches, and so of several sub-networks, in one AdamW step. A recipe
//! may choose other sub-networks, let them learn from the maximal one, and leave prompts out of the loss. Knows tokens,
//! not text; knows neither a terminal nor a clock.
//!
//! Threads split a micro-batch by sequences, each with a graph of its own over the same weights, and their gradients are
//! summed in a fixed order: the products of one micro-batch are too small for threads inside them to pay.

mod adapter;
mod checkpoint;
mod error;
mod log;
mod memory;
mod ranks;
mod recipe;
mod reorder;
mod schedule;
mod sequence;
mod stages;

pub use adapter::fresh_adapter;
pub use checkpoint::Checkpoint;
pub use error::TrainError;
pub use log::{LogLine, TrainingLog};
pub use memory::{MemoryNeed, MemoryPlan};
pub use ranks::order_ranks;
pub use recipe::{Recipe, Sampling};
pub use reorder::{CALIBRATION_SEQUENCES, importance_orders};
pub use sequence::Sequence;

use crate::backend::Selection;
use crate::backend::reference::{AdamW, AdamWOptions, BothWays, Reference};
use crate::model::Batch;
use crate::model::llama::Llama;
use crate::supernet::{HEURISTIC, MAXIMAL, MINIMAL, ModelShape, SearchSpace, SubNetwork};
use rayon::prelude::*;
use schedule::{Schedule, sub_network};
use stages::{OnBatch, Rows, whole_sequences};
use std::sync::Arc;

/// A super-network in training.
pub struct Trainer {
    /// One for each thread; the first has the variables.
    backends: Vec<Reference>,
    /// Without dropout, to validate on.
    plain: Reference,
    model: Llama<Reference>,
    shape: ModelShape,
    space: SearchSpace,
    recipe: Recipe,
    optimizer: AdamW,
    /// Each has something to learn.
    sequences: Vec<Sequence>,
    schedule: Schedule,
    /// Of the batch's first micro-batch, while students are to learn from it.
    teacher: Option<Teacher>,
    /// Whether activations are computed again rather than remembered.
    recompute: bool,
    /// Micro-batches done so far, over all epochs.
    done: u64,
}

/// What the maximal network gave for a micro-batch.
struct Teacher {
    sequences: Vec<Sequence>,
    /// Of each part's last layer. Its logits would be larger by the vocabulary, so a student's pass computes them again,
    /// few rows at a time. It is the pass that the network itself learnt in, with its dropout.
    last: Vec<Rows>,
}

/// What one micro-batch did.
#[derive(Debug, Clone, PartialEq)]
pub struct MicroBatch {
    /// Counted from 1 over the whole training.
    pub number: u64,
    /// Counted from 0.
    pub epoch: u64,
    pub sub_network: SubNetwork,
    /// Mean over `tokens` of the cross-entropy or, where it is `distilled`, of the divergence; nats.
    pub loss: f32,
    /// Whether it learnt the maximal network's distributions in place of the targets.
    pub distilled: bool,
    /// Targets.
    pub tokens: usize,
    /// Tokens that went forward and back, what was only given included.
    pub trained_tokens: usize,
    /// Of this micro-batch; an optimizer step uses its last one's.
    pub learning_rate: f64,
    /// The gradient's norm before clipping, where this micro-batch ended with an optimizer step.
    pub gradient_norm: Option<f64>,
}

/// Validation losses, nats per token.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Validation {
    pub maximal: f64,
    pub heuristic: f64,
    pub minimal: f64,
}

impl Trainer {
    /// `model` must have been loaded on `backend`, made by [`Reference::for_training`] with the recipe's dropout and
    /// seed in the recipe's numbers, with one super-adapter of shape `shape`.
    ///
    /// # Errors
    /// No sequence with something to learn, a recipe that cannot run, or one that ends before anything is learnt.
    pub fn new(
        backend: Reference,
        model: Llama<Reference>,
        shape: ModelShape,
        space: SearchSpace,
        recipe: Recipe,
        mut sequences: Vec<Sequence>,
    ) -> Result<Self, TrainError> {
        sequences.retain(|s| !s.targets().is_empty());
        if sequences.is_empty() {
            return Err(TrainError::NoData);
        }
        recipe.check()?;
        let options = AdamWOptions { weight_decay: recipe.weight_decay, ..AdamWOptions::default() };
        let optimizer = AdamW::new(&backend, options)?;
        let others = 1..recipe.threads as u64;
        let others = others.map(|i| backend.beside(recipe.seed.wrapping_add(i))).collect::<Vec<_>>();
        let plain = Reference::on_one_thread().on(backend.compute().clone());
        let backends = std::iter::once(backend).chain(others).collect();
        let schedule = Schedule::new(&recipe, sequences.iter().map(|s| s.tokens.len()).collect());
        if !schedule.learns(&recipe) {
            let (micro_batches, accumulation) = (schedule.total(), recipe.accumulation);
            return Err(TrainError::NoStep { micro_batches, accumulation });
        }
        Ok(Self {
            backends,
            plain,
            model,
            shape,
            space,
            recipe,
            optimizer,
            sequences,
            schedule,
            teacher: None,
            recompute: false,
            done: 0,
        })
    }

    /// Gradient checkpointing: whether of each layer only its input is remembered and the rest computed again for the
    /// gradient, which takes a third more time and little memory. It changes no number, so it is no part of the recipe.
    pub fn checkpoint_gradients(&mut self, recompute: bool) {
        self.recompute = recompute;
    }

    /// Micro-batches of the whole training.
    pub fn total(&self) -> u64 {
        self.schedule.total()
    }

    /// Micro-batches done.
    pub fn done(&self) -> u64 {
        self.done
    }

    /// The adapters' tensors as they are now.
    pub fn optimizer(&self) -> &AdamW {
        &self.optimizer
    }

    /// Runs the next micro-batch with the sub-network that it has by the recipe.
    pub fn step(&mut self) -> Result<MicroBatch, TrainError> {
        let number = self.done + 1;
        let sub_network = sub_network(&self.recipe, &self.space, number);
        let chosen = self.schedule.sequences(&self.recipe, number);
        let sequences = chosen.iter().map(|&i| self.sequences[i].clone()).collect::<Vec<_>>();
        self.step_on(&sequences, sub_network)
    }

    /// Runs the next micro-batch on these sequences with this sub-network, and an optimizer step if it fills the
    /// accumulation window.
    ///
    /// # Errors
    /// By the recipe it is a student, and the micro-batch before it was on other sequences. A loss or a gradient that is
    /// no number.
    pub fn step_on(
        &mut self,
        sequences: &[Sequence],
        sub_network: SubNetwork,
    ) -> Result<MicroBatch, TrainError> {
        let number = self.done + 1;
        let teacher = self.teacher_of(number, sequences)?;
        let done = self.both_ways(number, sequences, &sub_network, teacher.as_ref())?;
        let tokens = done.iter().map(|part| part.targets).sum::<usize>();
        let share = |part: &Part| part.targets as f64 / tokens as f64;
        let loss = done.iter().map(|p| f64::from(p.both_ways.loss) * share(p)).sum::<f64>() as f32;
        if !loss.is_finite() {
            let (what, value) = ("loss", f64::from(loss));
            return Err(TrainError::Diverged { micro_batch: number, what, value });
        }
        for part in &done {
            let weight = share(part) / self.recipe.accumulation as f64;
            self.optimizer.accumulate(&part.both_ways.gradients, weight)?;
        }
        let learning_rate =
            self.recipe.learning_rate_at(number, self.schedule.per_epoch(), self.schedule.total());
        let gradient_norm = self.step_if_full(number, learning_rate)?;
        self.done = number;
        let distilled = teacher.is_some();
        let trained_tokens = done.iter().map(|part| part.tokens).sum();
        if !self.recipe.distill || !self.recipe.is_student(number + 1) {
            self.teacher = None;
        } else if teacher.is_some() {
            self.teacher = teacher;
        } else {
            let last = done.into_iter().map(|part| part.both_ways.last).collect();
            self.teacher = Some(Teacher { sequences: sequences.to_vec(), last });
        }
        let epoch = self.schedule.epoch_of(number);
        Ok(MicroBatch {
            number,
            epoch,
            sub_network,
            loss,
            distilled,
            tokens,
            trained_tokens,
            learning_rate,
            gradient_norm,
        })
    }

    /// What micro-batch `number` is to learn from, where it is a student.
    fn teacher_of(&mut self, number: u64, sequences: &[Sequence]) -> Result<Option<Teacher>, TrainError> {
        if !self.recipe.distill || !self.recipe.is_student(number) {
            return Ok(None);
        }
        let teacher = self.teacher.take().filter(|teacher| teacher.sequences == sequences);
        teacher.ok_or(TrainError::NoTeacher { micro_batch: number }).map(Some)
    }

    /// Forward and back, a part of the sequences on each thread: the same parts for the same sequences, so that each
    /// finds its teacher's.
    fn both_ways(
        &self,
        number: u64,
        sequences: &[Sequence],
        sub_network: &SubNetwork,
        teacher: Option<&Teacher>,
    ) -> Result<Vec<Part>, TrainError> {
        let run = |(index, (part, backend)): (usize, (&Vec<&Sequence>, &Reference))| {
            backend.start_dropout(number);
            let (batch, targets) = self.batch(part, sub_network);
            let pass = self.model.pass(backend, &batch)?;
            let teacher = teacher.and_then(|teacher| teacher.last.get(index));
            let stages = OnBatch { pass, batch: &batch, targets: &targets, teacher };
            let both_ways = backend.loss_and_gradients(&stages, self.recompute)?;
            Ok(Part { both_ways, targets: targets.len(), tokens: batch.tokens.len() })
        };
        let parts = parts(sequences, self.backends.len());
        parts.par_iter().zip(&self.backends).enumerate().map(run).collect()
    }

    /// An optimizer step where `number` is the last micro-batch of a window; the gradient's norm before clipping.
    fn step_if_full(&mut self, number: u64, learning_rate: f64) -> Result<Option<f64>, TrainError> {
        if !number.is_multiple_of(self.recipe.accumulation as u64) {
            return Ok(None);
        }
        let norm = self.optimizer.gradient_norm();
        if !norm.is_finite() {
            return Err(TrainError::Diverged { micro_batch: number, what: "gradient's norm", value: norm });
        }
        self.optimizer.step(learning_rate, norm, self.recipe.max_norm)?;
        Ok(Some(norm))
    }

    /// Mean cross-entropy over the targets of `sequences`, each counted once, of the three sub-networks that always exist.
    pub fn validate(&self, sequences: &[Sequence]) -> Result<Validation, TrainError> {
        let mean = |sub_network: SubNetwork| -> Result<f64, TrainError> {
            let of_chunk = |chunk: &[Sequence]| {
                let chunk = chunk.iter().collect::<Vec<_>>();
                let (loss, tokens) = self.loss(&chunk, &sub_network)?;
                Ok((f64::from(loss) * tokens as f64, tokens))
            };
            // As many at once as in training, which a GPU's memory may be full with.
            let at_once = sequences.chunks(self.recipe.micro_batch * self.backends.len());
            let losses = at_once.map(|chunks| {
                let losses = chunks.par_chunks(self.recipe.micro_batch).map(of_chunk);
                losses.collect::<Result<Vec<_>, TrainError>>()
            });
            let losses = losses.collect::<Result<Vec<_>, _>>()?.concat();
            let count = losses.iter().map(|(_, tokens)| tokens).sum::<usize>();
            Ok(losses.iter().map(|(sum, _)| sum).sum::<f64>() / count.max(1) as f64)
        };
        Ok(Validation {
            maximal: mean(self.space.maximal())?,
            heuristic: mean(self.space.heuristic())?,
            minimal: mean(self.space.minimal())?,
        })
    }

    /// The mean loss of one sub-network over `sequences`, without dropout; nothing is learnt from it.
    pub fn loss_of(&self, sequences: &[Sequence], sub_network: &SubNetwork) -> Result<f32, TrainError> {
        let sequences = sequences.iter().collect::<Vec<_>>();
        Ok(self.loss(&sequences, sub_network)?.0)
    }

    /// The mean cross-entropy of every target, without dropout, and how many there are.
    fn loss(&self, sequences: &[&Sequence], sub_network: &SubNetwork) -> Result<(f32, usize), TrainError> {
        let (batch, targets) = self.batch(sequences, sub_network);
        let pass = self.model.pass(&self.plain, &batch)?;
        let stages = OnBatch { pass, batch: &batch, targets: &targets, teacher: None };
        Ok((self.plain.loss(&stages)?, targets.len()))
    }

    fn batch(&self, sequences: &[&Sequence], sub_network: &SubNetwork) -> (Batch, Vec<u32>) {
        let shape = Arc::new(self.space.resolve(&self.shape, sub_network));
        whole_sequences(sequences, Selection { adapter: 0, subnetwork: 0, shape })
    }
}

/// What one thread did with its part of a micro-batch.
struct Part {
    both_ways: BothWays,
    targets: usize,
    tokens: usize,
}

/// Sequences in at most `count` parts of about equally many tokens, none of them empty: the longest first, each to the
/// part that has the fewest.
fn parts(sequences: &[Sequence], count: usize) -> Vec<Vec<&Sequence>> {
    let mut longest_first = sequences.iter().collect::<Vec<_>>();
    longest_first.sort_by_key(|s| std::cmp::Reverse(s.tokens.len()));
    let mut parts = vec![Vec::new(); count.clamp(1, sequences.len().max(1))];
    for sequence in longest_first {
        let tokens = |part: &Vec<&Sequence>| part.iter().map(|s| s.tokens.len()).sum::<usize>();
        if let Some(lightest) = parts.iter_mut().min_by_key(|part| tokens(part)) {
            lightest.push(sequence);
        }
    }
    parts
}

/// The catalog's names in the order of [`Validation`]'s fields.
pub const VALIDATED: [&str; 3] = [MAXIMAL, HEURISTIC, MINIMAL];
