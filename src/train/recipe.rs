//! LoNAS's recipe as numbers (reference: the authors' run scripts and NNCF's `StageLRScheduler`).

use super::TrainError;
use serde::{Deserialize, Serialize};

/// Everything that decides the outcome of a training, beside base, data and search space.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Recipe {
    pub epochs: usize,
    /// Sequences that share one random sub-network and one forward.
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
}

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
        }
    }
}

impl Recipe {
    /// Whether a training can run by it.
    ///
    /// # Errors
    /// A field out of its range, by name.
    pub fn check(&self) -> Result<(), TrainError> {
        let number = |field, value: f64, ok: bool, expected| (field, value.to_string(), ok, expected);
        let count = |field, value: usize| (field, value.to_string(), value > 0, "at least 1");
        let Self { learning_rate, weight_decay, max_norm, dropout, .. } = *self;
        let checks = [
            count("epochs", self.epochs),
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
        ];
        match checks.into_iter().find(|(_, _, ok, _)| !ok) {
            Some((field, got, _, expected)) => Err(TrainError::Recipe { field, expected, got }),
            None => Ok(()),
        }
    }

    /// Micro-batches in one epoch of `sequences` sequences; the last one may be smaller.
    pub fn micro_batches_per_epoch(&self, sequences: usize) -> usize {
        sequences.div_ceil(self.micro_batch)
    }

    /// The learning rate at micro-batch `micro_batch`, counted from 1 over the whole training: cosine to zero without
    /// warm-up, off by one in each epoch as in NNCF. An optimizer step uses the rate of its last micro-batch.
    pub fn learning_rate_at(&self, micro_batch: u64, per_epoch: usize) -> f64 {
        let epoch = (micro_batch - 1) / per_epoch as u64;
        let total = (self.epochs * per_epoch) as f64;
        let done = (micro_batch - epoch) as f64 / total;
        0.5 * self.learning_rate * (1.0 + (std::f64::consts::PI * done).cos())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_recipe_that_cannot_run_is_refused_by_field() {
        let recipe = Recipe::default();
        recipe.check().unwrap();
        for (wrong, named) in [
            (Recipe { epochs: 0, ..recipe.clone() }, "epochs"),
            (Recipe { micro_batch: 0, ..recipe.clone() }, "micro-batch"),
            (Recipe { threads: 0, ..recipe.clone() }, "threads"),
            (Recipe { dropout: 1.0, ..recipe.clone() }, "dropout"),
            (Recipe { dropout: f64::NAN, ..recipe.clone() }, "dropout"),
            (Recipe { learning_rate: f64::NAN, ..recipe.clone() }, "learning rate"),
            (Recipe { learning_rate: -1.0, ..recipe.clone() }, "learning rate"),
            (Recipe { weight_decay: -0.1, ..recipe.clone() }, "weight decay"),
        ] {
            let error = wrong.check().unwrap_err().to_string();
            assert!(error.contains(named), "{error}");
        }
    }

    #[test]
    fn the_rate_falls_from_the_first_value_to_nearly_zero() {
        let recipe = Recipe { epochs: 2, learning_rate: 1.0, ..Recipe::default() };
        // By hand: total 20, s = 1, e = 0: 0.5 (1 + cos(pi / 20)); s = 11, e = 1: argument 10/20, so exactly a half.
        assert!((recipe.learning_rate_at(1, 10) - 0.993_844_170_297_569).abs() < 1e-12);
        assert!((recipe.learning_rate_at(11, 10) - 0.5).abs() < 1e-12);
        assert!((recipe.learning_rate_at(20, 10) - 0.006_155_829_702_431).abs() < 1e-12);
    }
}
