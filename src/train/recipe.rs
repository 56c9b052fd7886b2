//! LoNAS's recipe as numbers (reference: the authors' run scripts and NNCF's `StageLRScheduler`), and what goes beyond it.

use super::TrainError;
use serde::{Deserialize, Serialize};
use std::fmt;

/// Which sub-networks are trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Sampling {
    /// Each micro-batch another one, uniform and independent in every group, as in LoNAS.
    #[default]
    Random,
    /// Each batch of sequences is several micro-batches: the maximal network sees it, then students do, the minimal
    /// sub-network and random ones (Yu and Huang 2019, "Universally Slimmable Networks"). A single student is the minimal one
    /// and a random one in turn.
    Sandwich,
    /// Only the maximal network: plain LoRA, the ceiling.
    Maximal,
}

/// Everything that decides the outcome of a training, beside base, data and search space.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Recipe {
    /// Times that every sequence is seen, where `max_tokens` does not say when to end.
    pub epochs: usize,
    /// Sequences that share one sub-network and one forward.
    pub micro_batch: usize,
    /// Micro-batches that share one optimizer step.
    pub accumulation: usize,
    pub learning_rate: f64,
    pub weight_decay: f64,
    /// The gradient of all adapters together is clipped to this norm.
    pub max_norm: f64,
    /// Dropout of the adapters' input.
    pub dropout: f64,
    pub seed: u64,
    /// Whether the frozen weights are rounded to bf16 and multiplied so, as on a GPU; else all is f32.
    #[serde(default)]
    pub bf16_base: bool,
    /// Threads that share a micro-batch: each draws the dropout of its own sequences, and they decide the order of sums.
    pub threads: usize,
    #[serde(default)]
    pub sampling: Sampling,
    /// Students in a sandwich.
    #[serde(default = "one")]
    pub students: usize,
    /// Whether a sandwich's student learns the maximal network's distributions over the vocabulary in place of the
    /// targets. Without a second forward, what it learns from is what that network's own training pass gave, its dropout
    /// included.
    #[serde(default)]
    pub distill: bool,
    /// Whether the loss is over the responses only and prompts are context.
    #[serde(default)]
    pub response_only: bool,
    /// Whether the sequences of a micro-batch are of about equal lengths.
    #[serde(default)]
    pub length_buckets: bool,
    /// Ends the training, in place of `epochs`: with the optimizer step that reaches so many tokens, those of every pass
    /// counted.
    #[serde(default)]
    pub max_tokens: Option<u64>,
}

fn one() -> usize {
    1
}

/// Authors have two or three, and the count of micro-batches must not overflow.
const MOST_STUDENTS: usize = 64;

/// The count of micro-batches must not overflow.
const MOST_EPOCHS: usize = 1_000_000;

/// More would take centuries, and the count of micro-batches must not overflow.
const MOST_TOKENS: u64 = 1_000_000_000_000_000;

impl Default for Recipe {
    /// What LoNAS used for language models; epochs as for commonsense on LLaMA-7B.
    fn default() -> Self {
        Self {
            epochs: 6,
            micro_batch: 4,
            accumulation: 4,
            learning_rate: 3e-4,
            weight_decay: 0.0,
            max_norm: 1.0,
            dropout: 0.1,
            seed: 42,
            bf16_base: false,
            threads: 1,
            sampling: Sampling::Random,
            students: 1,
            distill: false,
            response_only: false,
            length_buckets: false,
            max_tokens: None,
        }
    }
}

impl Recipe {
    /// What did best where it was measured; see the README's "Training beyond LoNAS".
    pub fn best() -> Self {
        Self {
            sampling: Sampling::Sandwich,
            distill: true,
            length_buckets: true,
            learning_rate: 1e-3,
            ..Self::default()
        }
    }

    /// Micro-batches that see the same sequences, one after the other.
    pub fn passes(&self) -> u64 {
        if self.sampling == Sampling::Sandwich { (self.students as u64).saturating_add(1) } else { 1 }
    }

    /// Which pass over its sequences micro-batch `number`, counted from 1, is: 0, or that of a student, counted from 1.
    pub fn pass(&self, number: u64) -> u64 {
        (number - 1) % self.passes()
    }

    /// Whether micro-batch `number` sees the sequences of the one before it with a smaller sub-network.
    pub fn is_student(&self, number: u64) -> bool {
        self.pass(number) > 0
    }

    /// Whether a training can run by it.
    ///
    /// # Errors
    /// A field out of its range, by name.
    pub fn check(&self) -> Result<(), TrainError> {
        let number = |field, value: f64, ok: bool, expected| (field, value.to_string(), ok, expected);
        let count = |field, value: usize| (field, value.to_string(), value > 0, "at least 1");
        let Self { learning_rate, weight_decay, max_norm, dropout, .. } = *self;
        let checks = [
            (
                "epochs",
                self.epochs.to_string(),
                (1..=MOST_EPOCHS).contains(&self.epochs),
                "from 1 to 1000000",
            ),
            count("micro-batch", self.micro_batch),
            count("accumulation", self.accumulation),
            count("threads", self.threads),
            number(
                "learning rate",
                learning_rate,
                learning_rate > 0.0 && learning_rate.is_finite(),
                "above 0",
            ),
            number("weight decay", weight_decay, (0.0..=1.0).contains(&weight_decay), "from 0 to 1"),
            number("max norm", max_norm, max_norm > 0.0, "above 0"),
            number("dropout", dropout, (0.0..1.0).contains(&dropout), "at least 0 and below 1"),
            (
                "accumulation",
                self.accumulation.to_string(),
                (self.accumulation as u64).is_multiple_of(self.passes()),
                "whole batches of a sandwich, where the maximal network and each student are a micro-batch",
            ),
            (
                "students",
                self.students.to_string(),
                self.students == 1 || (2..=MOST_STUDENTS).contains(&self.students) && self.passes() > 1,
                "from 1 to 64, and one without sandwich sampling",
            ),
            (
                "distill",
                self.sampling.to_string(),
                !self.distill || self.sampling == Sampling::Sandwich,
                "sandwich sampling, which has students",
            ),
            (
                "max tokens",
                self.max_tokens.unwrap_or(1).to_string(),
                self.max_tokens.is_none_or(|tokens| (1..=MOST_TOKENS).contains(&tokens)),
                "from 1 to 10^15",
            ),
        ];
        match checks.into_iter().find(|(_, _, ok, _)| !ok) {
            Some((field, got, _, expected)) => Err(TrainError::Recipe { field, expected, got }),
            None => Ok(()),
        }
    }

    /// Micro-batches in one epoch of `sequences` sequences; the last sequences may be fewer than a micro-batch.
    pub fn micro_batches_per_epoch(&self, sequences: usize) -> usize {
        sequences.div_ceil(self.micro_batch) * self.passes() as usize
    }

    /// The learning rate at micro-batch `micro_batch` of `total`, counted from 1 over the whole training: cosine to zero
    /// without warm-up, off by one in each epoch as in NNCF. An optimizer step uses the rate of its last micro-batch.
    pub fn learning_rate_at(&self, micro_batch: u64, per_epoch: u64, total: u64) -> f64 {
        let epoch = (micro_batch - 1) / per_epoch;
        let done = (micro_batch - epoch) as f64 / total as f64;
        0.5 * self.learning_rate * (1.0 + (std::f64::consts::PI * done).cos())
    }
}

impl fmt::Display for Sampling {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Random => "random",
            Self::Sandwich => "sandwich",
            Self::Maximal => "maximal",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_recipe_that_cannot_run_is_refused_by_field() {
        let recipe = Recipe::default();
        recipe.check().unwrap();
        Recipe::best().check().unwrap();
        for (wrong, named) in [
            (Recipe { epochs: 0, ..recipe.clone() }, "epochs"),
            (Recipe { epochs: usize::MAX / 2 + 1, ..recipe.clone() }, "epochs"),
            (Recipe { micro_batch: 0, ..recipe.clone() }, "micro-batch"),
            (Recipe { threads: 0, ..recipe.clone() }, "threads"),
            (Recipe { dropout: 1.0, ..recipe.clone() }, "dropout"),
            (Recipe { dropout: f64::NAN, ..recipe.clone() }, "dropout"),
            (Recipe { learning_rate: f64::NAN, ..recipe.clone() }, "learning rate"),
            (Recipe { learning_rate: -1.0, ..recipe.clone() }, "learning rate"),
            (Recipe { weight_decay: -0.1, ..recipe.clone() }, "weight decay"),
            (Recipe { accumulation: 3, ..Recipe::best() }, "accumulation: expected whole batches"),
            (Recipe { students: 2, ..Recipe::best() }, "accumulation: expected whole batches"),
            (Recipe { students: usize::MAX, ..Recipe::best() }, "accumulation: expected whole batches"),
            (Recipe { students: 0, ..Recipe::best() }, "students: expected from 1 to 64"),
            (Recipe { students: 65, accumulation: 66, ..Recipe::best() }, "students: expected from 1 to 64"),
            (Recipe { students: 3, ..recipe.clone() }, "students: expected from 1 to 64"),
            (Recipe { sampling: Sampling::Random, ..Recipe::best() }, "distill: expected sandwich"),
            (Recipe { max_tokens: Some(0), ..recipe.clone() }, "max tokens"),
            (Recipe { max_tokens: Some(u64::MAX), ..recipe.clone() }, "max tokens"),
        ] {
            let error = wrong.check().unwrap_err().to_string();
            assert!(error.contains(named), "{error}");
        }
    }

    #[test]
    fn the_rate_falls_from_the_first_value_to_nearly_zero() {
        let recipe = Recipe { learning_rate: 1.0, ..Recipe::default() };
        // By hand: total 20, s = 1, e = 0: 0.5 (1 + cos(pi / 20)); s = 11, e = 1: argument 10/20, so exactly a half.
        assert!((recipe.learning_rate_at(1, 10, 20) - 0.993_844_170_297_569).abs() < 1e-12);
        assert!((recipe.learning_rate_at(11, 10, 20) - 0.5).abs() < 1e-12);
        assert!((recipe.learning_rate_at(20, 10, 20) - 0.006_155_829_702_431).abs() < 1e-12);
        // A training that ends by its tokens, within its first epoch, ends at zero.
        assert!(recipe.learning_rate_at(7, 10, 7).abs() < 1e-12);
    }

    #[test]
    fn a_recipe_of_before_there_were_others_is_lonas() {
        let old = r#"{"epochs": 6, "micro_batch": 4, "accumulation": 4, "learning_rate": 3e-4, "weight_decay": 0.0,
            "max_norm": 1.0, "dropout": 0.1, "seed": 42, "threads": 1}"#;
        assert_eq!(serde_json::from_str::<Recipe>(old).unwrap(), Recipe::default());
    }
}
