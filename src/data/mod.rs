//! Training and test examples: reading them, turning them into text, choosing an order.
//!
//! Files are those of LLM-Adapters, which LoNAS trains and tests on: a JSON array of
//! `{instruction, input, output, answer}`; for tests also of `{question, choices, answer}`. For classifiers they are GLUE's. Knows no
//! tokenizer: whoever wants tokens passes a function.

mod answer;
mod example;
mod form;
mod judgement;
mod math;
mod question;

pub use answer::Answering;
pub use example::{DataError, Example, read};
pub use form::{Choice, PromptForm};
pub use judgement::{JudgedText, read_judged};
pub use question::{TestItem, read_tests};

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

/// The order in which epoch `epoch` (from 0) visits `n` examples: a shuffle that `seed` and `epoch` decide.
pub fn order(n: usize, epoch: u64, seed: u64) -> Vec<usize> {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    // One stream for each epoch; streams 0 and 1 are dropout's and the sub-networks'.
    random.set_stream(2 + epoch);
    let mut order = (0..n).collect::<Vec<_>>();
    order.shuffle(&mut random);
    order
}

/// Batches among which those of equal lengths are looked for: few enough that a batch is still a matter of chance, many
/// enough that the sequences of one are about equally long.
const WINDOW: usize = 64;

/// The batches of epoch `epoch`, `size` sequences each, of about equal lengths: [`order`], sorted by length within each
/// window of `WINDOW` batches; then the batches are shuffled, so that short ones do not come first. The last batch of
/// the order may be smaller.
pub fn alike_batches(lengths: &[usize], size: usize, epoch: u64, seed: u64) -> Vec<Vec<usize>> {
    let mut order = order(lengths.len(), epoch, seed);
    for window in order.chunks_mut(WINDOW.saturating_mul(size)) {
        window.sort_by_key(|&i| lengths[i]);
    }
    let mut batches = order.chunks(size).map(<[usize]>::to_vec).collect::<Vec<_>>();
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    // From the other end than the orders' streams, below the two that are taken there.
    random.set_stream(u64::MAX - 2 - epoch);
    batches.shuffle(&mut random);
    batches
}

/// Shuffles the examples and takes `held_out` of them away: `(training, held out)`.
pub fn split<T>(mut examples: Vec<T>, held_out: usize, seed: u64) -> (Vec<T>, Vec<T>) {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    random.set_stream(u64::MAX);
    examples.shuffle(&mut random);
    let held_out = examples.split_off(examples.len() - held_out.min(examples.len()));
    (examples, held_out)
}

/// LoNAS's tokenisation of one training text: cut at `cutoff` tokens; closed by `eos` where there is room.
pub fn training_tokens(mut tokens: Vec<u32>, eos: Option<u32>, cutoff: usize) -> Vec<u32> {
    tokens.truncate(cutoff);
    if let Some(eos) = eos.filter(|eos| tokens.len() < cutoff && tokens.last() != Some(eos)) {
        tokens.push(eos);
    }
    tokens
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_order_is_a_permutation_that_seed_and_epoch_decide() {
        let mut sorted = order(100, 3, 7);
        sorted.sort_unstable();
        assert_eq!(sorted, (0..100).collect::<Vec<_>>());
        assert_eq!(order(100, 3, 7), order(100, 3, 7));
        assert_ne!(order(100, 3, 7), order(100, 4, 7));
        assert_ne!(order(100, 3, 7), order(100, 3, 8));
    }

    #[test]
    fn batches_of_like_lengths_have_everything_once_in_an_order_of_chance() {
        let lengths = (0..1003).map(|i| 10 + i * 37 % 200).collect::<Vec<_>>();
        let batches = alike_batches(&lengths, 4, 3, 7);
        assert_eq!(batches.len(), 251);
        assert_eq!(batches.iter().filter(|b| b.len() != 4).map(Vec::len).collect::<Vec<_>>(), [3]);
        let mut all = batches.concat();
        all.sort_unstable();
        assert_eq!(all, (0..1003).collect::<Vec<_>>());
        let spread = |batches: &[Vec<usize>]| {
            let of = |batch: &Vec<usize>| {
                let lengths = batch.iter().map(|&i| lengths[i]);
                lengths.clone().max().unwrap() - lengths.min().unwrap()
            };
            batches.iter().map(of).sum::<usize>() / batches.len()
        };
        let by_chance = order(1003, 3, 7).chunks(4).map(<[usize]>::to_vec).collect::<Vec<_>>();
        assert!(spread(&batches) < 5 && spread(&by_chance) > 80, "{}", spread(&batches));
        // Sorted, every batch but 4 would be at least as long as the one before it.
        let rising = batches.windows(2).filter(|b| lengths[b[0][0]] <= lengths[b[1][0]]).count();
        assert!((90..160).contains(&rising), "{rising}");
        assert_eq!(alike_batches(&lengths, 4, 3, 7), batches);
        assert_ne!(alike_batches(&lengths, 4, 4, 7), batches);
    }

    #[test]
    fn a_split_loses_nothing() {
        for held_out in [0, 1, 9, 10, 50] {
            let (mut train, rest) = split((0..10).collect(), held_out, 1);
            assert_eq!(rest.len(), held_out.min(10));
            train.extend(rest);
            train.sort_unstable();
            assert_eq!(train, (0..10).collect::<Vec<_>>());
        }
    }

    #[test]
    fn a_training_text_is_closed_by_eos_only_where_there_is_room() {
        assert_eq!(training_tokens(vec![5, 6], Some(2), 4), [5, 6, 2]);
        assert_eq!(training_tokens(vec![5, 2], Some(2), 4), [5, 2]);
        assert_eq!(training_tokens(vec![5, 6, 7, 8, 9], Some(2), 4), [5, 6, 7, 8]);
        assert_eq!(training_tokens(vec![5, 6, 7, 8], Some(2), 4), [5, 6, 7, 8]);
        assert_eq!(training_tokens(vec![5], None, 4), [5]);
    }
}
