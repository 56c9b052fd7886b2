//! What each micro-batch sees: its sequences and its sub-network.
//!
//! Recipe, seed and number decide all of it, so a training that goes on after a kill has nothing of this to remember.

use super::{Recipe, Sampling};
use crate::data;
use crate::supernet::{SearchSpace, SubNetwork};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// The micro-batches of a whole training, counted from 1.
pub(super) struct Schedule {
    /// Tokens of each sequence.
    lengths: Vec<usize>,
    per_epoch: u64,
    total: u64,
    /// The epoch that was asked for last, and its batches of sequences.
    epoch: Option<(u64, Vec<Vec<usize>>)>,
}

impl Schedule {
    /// At least one sequence, and a recipe that has been checked.
    pub(super) fn new(recipe: &Recipe, lengths: Vec<usize>) -> Self {
        let per_epoch = recipe.micro_batches_per_epoch(lengths.len()) as u64;
        let total = recipe.epochs as u64 * per_epoch;
        let mut schedule = Self { lengths, per_epoch, total, epoch: None };
        if let Some(tokens) = recipe.max_tokens {
            schedule.total = schedule.reaching(tokens, recipe);
        }
        schedule
    }

    pub(super) fn total(&self) -> u64 {
        self.total
    }

    pub(super) fn per_epoch(&self) -> u64 {
        self.per_epoch
    }

    /// Whether there is an optimizer step with a rate above 0, which falls to 0 by the end of a first epoch.
    pub(super) fn learns(&self, recipe: &Recipe) -> bool {
        let first = recipe.accumulation as u64;
        first <= self.total && recipe.learning_rate_at(first, self.per_epoch, self.total) > 0.0
    }

    /// From 0.
    pub(super) fn epoch_of(&self, number: u64) -> u64 {
        (number - 1) / self.per_epoch
    }

    /// The sequences of micro-batch `number`. A student sees those of the micro-batch before it.
    pub(super) fn sequences(&mut self, recipe: &Recipe, number: u64) -> &[usize] {
        let epoch = self.epoch_of(number);
        if self.epoch.as_ref().is_none_or(|(of, _)| *of != epoch) {
            let Recipe { micro_batch, seed, length_buckets, .. } = *recipe;
            let batches = if length_buckets {
                data::alike_batches(&self.lengths, micro_batch, epoch, seed)
            } else {
                let order = data::order(self.lengths.len(), epoch, seed);
                order.chunks(micro_batch).map(<[usize]>::to_vec).collect()
            };
            self.epoch = Some((epoch, batches));
        }
        let batch = (number - 1) % self.per_epoch / recipe.passes();
        self.epoch.as_ref().and_then(|(_, batches)| batches.get(batch as usize)).map_or(&[], Vec::as_slice)
    }

    /// The micro-batch with whose optimizer step so many tokens have been trained.
    fn reaching(&mut self, tokens: u64, recipe: &Recipe) -> u64 {
        let of_epoch = self.lengths.iter().sum::<usize>() as u64 * recipe.passes();
        let epochs = tokens.saturating_sub(1) / of_epoch;
        let (mut number, mut trained) = (epochs * self.per_epoch, epochs * of_epoch);
        while trained < tokens {
            number += 1;
            let sequences = self.sequences(recipe, number).to_vec();
            trained += sequences.iter().map(|&i| self.lengths[i] as u64).sum::<u64>();
        }
        number.next_multiple_of(recipe.accumulation as u64)
    }
}

/// The sub-network of micro-batch `number`.
pub(super) fn sub_network(recipe: &Recipe, space: &SearchSpace, number: u64) -> SubNetwork {
    let random = || {
        let mut random = ChaCha8Rng::seed_from_u64(recipe.seed);
        random.set_stream(1);
        random.set_word_pos(u128::from(number) << 20);
        space.pick(|_, choices| random.random_range(0..choices))
    };
    // The first of a batch's students, or the only one of every second batch.
    let batch = (number - 1) / recipe.passes();
    let learns_minimal = recipe.pass(number) == 1 && (recipe.students > 1 || batch.is_multiple_of(2));
    match recipe.sampling {
        Sampling::Random => random(),
        Sampling::Maximal => space.maximal(),
        Sampling::Sandwich if !recipe.is_student(number) => space.maximal(),
        Sampling::Sandwich if learns_minimal => space.minimal(),
        Sampling::Sandwich => random(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(recipe: &Recipe, schedule: &mut Schedule) -> Vec<Vec<usize>> {
        (1..=schedule.total()).map(|number| schedule.sequences(recipe, number).to_vec()).collect()
    }

    #[test]
    fn every_epoch_sees_every_sequence_once_with_each_pass() {
        let lengths = (0..23).map(|i| 3 + i * 7 % 11).collect::<Vec<_>>();
        for (sampling, students) in [(Sampling::Random, 1), (Sampling::Sandwich, 1), (Sampling::Sandwich, 3)]
        {
            for length_buckets in [false, true] {
                let recipe = Recipe { epochs: 3, sampling, students, length_buckets, ..Recipe::default() };
                let passes = if sampling == Sampling::Random { 1 } else { 1 + students };
                let mut schedule = Schedule::new(&recipe, lengths.clone());
                assert_eq!(schedule.total(), 3 * 6 * passes as u64);
                let batches = all(&recipe, &mut schedule);
                for epoch in batches.chunks(6 * passes) {
                    for batch in epoch.chunks(passes) {
                        assert!(batch.iter().all(|b| b == &batch[0]), "a student sees what its teacher saw");
                    }
                    let mut seen = epoch.iter().step_by(passes).flatten().copied().collect::<Vec<_>>();
                    seen.sort_unstable();
                    assert_eq!(seen, (0..23).collect::<Vec<_>>());
                }
                // Whoever begins in the middle sees the same.
                let mut late = Schedule::new(&recipe, lengths.clone());
                assert_eq!(late.sequences(&recipe, 9), batches[8]);
                assert_eq!(late.sequences(&recipe, 1), batches[0]);
            }
        }
    }

    #[test]
    fn a_training_without_a_step_at_a_rate_above_zero_learns_nothing() {
        let learns = |epochs, sequences, max_tokens| {
            let recipe = Recipe { epochs, micro_batch: 1, accumulation: 4, max_tokens, ..Recipe::default() };
            Schedule::new(&recipe, vec![5; sequences]).learns(&recipe)
        };
        // Less than a step; one, but at the end of the first epoch, where the rate is 0; one after that; two.
        assert_eq!(
            [(1, 3), (1, 4), (2, 2), (1, 8)].map(|(e, n)| learns(e, n, None)),
            [false, false, true, true]
        );
        assert_eq!([20, 21].map(|tokens| learns(1, 100, Some(tokens))), [false, true]);
    }

    #[test]
    fn a_training_of_so_many_tokens_ends_with_the_step_that_reaches_them() {
        let lengths = vec![5, 9, 2, 7, 3, 4, 8];
        for sampling in [Sampling::Random, Sampling::Sandwich] {
            for tokens in [1, 30, 38, 39, 76, 77, 200, 1000] {
                let recipe = Recipe {
                    sampling,
                    max_tokens: Some(tokens),
                    micro_batch: 2,
                    accumulation: 2,
                    ..Recipe::default()
                };
                let mut schedule = Schedule::new(&recipe, lengths.clone());
                assert!(schedule.total().is_multiple_of(2));
                let trained = all(&recipe, &mut schedule)
                    .iter()
                    .map(|batch| batch.iter().map(|&i| lengths[i] as u64).sum::<u64>())
                    .collect::<Vec<_>>();
                let before_last_step = trained[..trained.len() - 2].iter().sum::<u64>();
                assert!(trained.iter().sum::<u64>() >= tokens, "{tokens}: {trained:?}");
                assert!(before_last_step < tokens, "{tokens}: {trained:?}");
            }
        }
    }
}
