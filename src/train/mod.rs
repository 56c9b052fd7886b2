//! Training a super-adapter: LoNAS's loop over the reference backend.
//!
//! One random sub-network for each micro-batch, uniform and independent in every group; causal cross-entropy over
//! the whole sequence; gradients of several micro-batches, and so of several sub-networks, in one AdamW step. Knows
//! tokens, not text; knows neither a terminal nor a clock.
//!
//! Threads split a micro-batch by sequences, each with a graph of its own over the same weights, and their gradients are
//! summed in a fixed order: the products of one micro-batch are too small for threads inside them to pay.

mod adapter;
mod checkpoint;
mod error;
mod log;
mod memory;
mod recipe;
mod reorder;
mod stages;

pub use adapter::fresh_adapter;
pub use checkpoint::Checkpoint;
pub use error::TrainError;
pub use log::{LogLine, TrainingLog};
pub use memory::{MemoryNeed, MemoryPlan};
pub use recipe::Recipe;
pub use reorder::{CALIBRATION_SEQUENCES, importance_orders};

use crate::backend::Selection;
use crate::backend::reference::{AdamW, AdamWOptions, Reference};
use crate::data;
use crate::model::Batch;
use crate::model::llama::Llama;
use crate::supernet::{HEURISTIC, MAXIMAL, MINIMAL, ModelShape, SearchSpace, SubNetwork};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use stages::{OnBatch, whole_sequences};
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
    /// Token sequences, each at least two tokens long.
    sequences: Vec<Vec<u32>>,
    /// Whether activations are computed again rather than remembered.
    recompute: bool,
    /// Micro-batches done so far, over all epochs.
    done: u64,
}

/// What one micro-batch did.
#[derive(Debug, Clone, PartialEq)]
pub struct MicroBatch {
    /// Counted from 1 over the whole training.
    pub number: u64,
    /// Counted from 0.
    pub epoch: u64,
    pub sub_network: SubNetwork,
    /// Mean cross-entropy, nats per token.
    pub loss: f32,
    pub tokens: usize,
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
    /// No sequence of at least two tokens, or a recipe that cannot run.
    pub fn new(
        backend: Reference,
        model: Llama<Reference>,
        shape: ModelShape,
        space: SearchSpace,
        recipe: Recipe,
        mut sequences: Vec<Vec<u32>>,
    ) -> Result<Self, TrainError> {
        sequences.retain(|s| s.len() >= 2);
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
        let recompute = false;
        Ok(Self { backends, plain, model, shape, space, recipe, optimizer, sequences, recompute, done: 0 })
    }

    /// Gradient checkpointing: whether of each layer only its input is remembered and the rest computed again for the
    /// gradient, which takes a third more time and little memory. It changes no number, so it is no part of the recipe.
    pub fn checkpoint_gradients(&mut self, recompute: bool) {
        self.recompute = recompute;
    }

    /// Micro-batches of the whole training.
    pub fn total(&self) -> u64 {
        (self.recipe.epochs * self.per_epoch()) as u64
    }

    /// Micro-batches done.
    pub fn done(&self) -> u64 {
        self.done
    }

    /// The adapters' tensors as they are now.
    pub fn optimizer(&self) -> &AdamW {
        &self.optimizer
    }

    /// Runs the next micro-batch with a random sub-network.
    pub fn step(&mut self) -> Result<MicroBatch, TrainError> {
        let number = self.done + 1;
        let mut random = ChaCha8Rng::seed_from_u64(self.recipe.seed);
        random.set_stream(1);
        random.set_word_pos(u128::from(number) << 20);
        let sub_network = self.space.pick(|_, choices| random.random_range(0..choices));
        let epoch = (number - 1) / self.per_epoch() as u64;
        let order = data::order(self.sequences.len(), epoch, self.recipe.seed);
        let within = (number - 1) as usize % self.per_epoch();
        let chosen = order.chunks(self.recipe.micro_batch).nth(within).unwrap_or_default();
        let sequences = chosen.iter().map(|&i| self.sequences[i].clone()).collect::<Vec<_>>();
        self.step_on(&sequences, sub_network)
    }

    /// Runs the next micro-batch on these sequences with this sub-network, and an optimizer step if it fills the
    /// accumulation window.
    pub fn step_on(
        &mut self,
        sequences: &[Vec<u32>],
        sub_network: SubNetwork,
    ) -> Result<MicroBatch, TrainError> {
        let number = self.done + 1;
        let parts = parts(sequences, self.backends.len());
        let run = |(part, backend): (&Vec<&[u32]>, &Reference)| {
            backend.start_dropout(number);
            let (batch, targets) = self.batch(part, &sub_network);
            let stages =
                OnBatch { pass: self.model.pass(backend, &batch)?, batch: &batch, targets: &targets };
            let (loss, gradients) = backend.loss_and_gradients(&stages, self.recompute)?;
            Ok((loss, targets.len(), gradients))
        };
        let done = parts.par_iter().zip(&self.backends).map(run).collect::<Result<Vec<_>, TrainError>>()?;
        let tokens = done.iter().map(|(_, tokens, _)| tokens).sum::<usize>();
        let share = |of_part: usize| of_part as f64 / tokens as f64;
        let value =
            done.iter().map(|(loss, of_part, _)| f64::from(*loss) * share(*of_part)).sum::<f64>() as f32;
        if !value.is_finite() {
            let (what, value) = ("loss", f64::from(value));
            return Err(TrainError::Diverged { micro_batch: number, what, value });
        }
        for (_, of_part, gradients) in &done {
            self.optimizer.accumulate(gradients, share(*of_part) / self.recipe.accumulation as f64)?;
        }
        let learning_rate = self.recipe.learning_rate_at(number, self.per_epoch());
        let full = number.is_multiple_of(self.recipe.accumulation as u64);
        let gradient_norm = match full {
            true => {
                let norm = self.optimizer.gradient_norm();
                if !norm.is_finite() {
                    let (what, value) = ("gradient's norm", norm);
                    return Err(TrainError::Diverged { micro_batch: number, what, value });
                }
                self.optimizer.step(learning_rate, norm, self.recipe.max_norm)?;
                Some(norm)
            }
            false => None,
        };
        self.done = number;
        let epoch = (number - 1) / self.per_epoch() as u64;
        Ok(MicroBatch { number, epoch, sub_network, loss: value, tokens, learning_rate, gradient_norm })
    }

    /// Mean loss over `sequences`, each token counted once, of the three sub-networks that always exist.
    pub fn validate(&self, sequences: &[Vec<u32>]) -> Result<Validation, TrainError> {
        let mean = |sub_network: SubNetwork| -> Result<f64, TrainError> {
            let of_chunk = |chunk: &[Vec<u32>]| {
                let chunk = chunk.iter().map(Vec::as_slice).collect::<Vec<_>>();
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
    pub fn loss_of(&self, sequences: &[Vec<u32>], sub_network: &SubNetwork) -> Result<f32, TrainError> {
        let sequences = sequences.iter().map(Vec::as_slice).collect::<Vec<_>>();
        Ok(self.loss(&sequences, sub_network)?.0)
    }

    fn per_epoch(&self) -> usize {
        self.recipe.micro_batches_per_epoch(self.sequences.len())
    }

    /// The mean cross-entropy of every next token, without dropout, and how many there are.
    fn loss(&self, sequences: &[&[u32]], sub_network: &SubNetwork) -> Result<(f32, usize), TrainError> {
        let (batch, targets) = self.batch(sequences, sub_network);
        let stages =
            OnBatch { pass: self.model.pass(&self.plain, &batch)?, batch: &batch, targets: &targets };
        Ok((self.plain.loss(&stages)?, targets.len()))
    }

    fn batch(&self, sequences: &[&[u32]], sub_network: &SubNetwork) -> (Batch, Vec<u32>) {
        let shape = Arc::new(self.space.resolve(&self.shape, sub_network));
        whole_sequences(sequences, Selection { adapter: 0, subnetwork: 0, shape })
    }
}

/// Sequences in at most `count` parts of about equally many tokens, none of them empty: the longest first, each to the
/// part that has the fewest.
fn parts(sequences: &[Vec<u32>], count: usize) -> Vec<Vec<&[u32]>> {
    let mut longest_first = sequences.iter().map(Vec::as_slice).collect::<Vec<_>>();
    longest_first.sort_by_key(|s| std::cmp::Reverse(s.len()));
    let mut parts = vec![Vec::new(); count.clamp(1, sequences.len().max(1))];
    for sequence in longest_first {
        let tokens = |part: &Vec<&[u32]>| part.iter().map(|s| s.len()).sum::<usize>();
        if let Some(lightest) = parts.iter_mut().min_by_key(|part| tokens(part)) {
            lightest.push(sequence);
        }
    }
    parts
}

/// The catalog's names in the order of [`Validation`]'s fields.
pub const VALIDATED: [&str; 3] = [MAXIMAL, HEURISTIC, MINIMAL];
