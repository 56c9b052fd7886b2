//! Multiple choice: the option with the highest likelihood is the answer.

use super::likelihood::{Text, score};
use super::outcome::Z;
use crate::backend::{BackendError, Selection};
use crate::model::Executor;

/// A question: the tokens before every option, and those of each option.
#[derive(Debug, Clone)]
pub struct Item {
    pub context: Vec<u32>,
    pub options: Vec<Vec<u32>>,
    pub correct: usize,
}

/// A share of right answers.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct Accuracy {
    pub right: usize,
    pub count: usize,
}

/// What one sub-network scored on one task.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct Score {
    /// By the summed log probability of an option.
    pub accuracy: Accuracy,
    /// By its mean log probability for each token.
    pub accuracy_normalised: Accuracy,
    /// Mean negative log probability of the right options' tokens, nats per token.
    pub answer_loss: f64,
}

impl Accuracy {
    pub fn share(self) -> f64 {
        self.right as f64 / (self.count.max(1)) as f64
    }

    /// Wilson's 95 % interval of the share (Wilson 1927).
    pub fn interval(self) -> (f64, f64) {
        if self.count == 0 {
            return (0.0, 1.0);
        }
        let n = self.count as f64;
        let (p, z2) = (self.share(), Z * Z);
        let centre = (p + z2 / (2.0 * n)) / (1.0 + z2 / n);
        let half = Z * (p * (1.0 - p) / n + z2 / (4.0 * n * n)).sqrt() / (1.0 + z2 / n);
        ((centre - half).max(0.0), (centre + half).min(1.0))
    }
}

/// Scores every item under every sub-network, in mixed batches; one [`Score`] for each selection.
pub fn multiple_choice(
    executor: &mut dyn Executor,
    items: &[Item],
    selections: &[Selection],
    mut progress: impl FnMut(usize),
) -> Result<Vec<Score>, BackendError> {
    let texts = items.iter().flat_map(|item| selections.iter().flat_map(move |s| item.texts(s)));
    let mut scored = Vec::new();
    score(executor, &texts.collect::<Vec<_>>(), |step| {
        scored.extend(step);
        progress(scored.len());
        Ok::<_, BackendError>(())
    })?;
    let mut tallies = vec![Tally::default(); selections.len()];
    let mut rest = scored.as_slice();
    for item in items {
        for tally in &mut tallies {
            let (options, later) = rest.split_at(item.options.len());
            let (logprobs, tokens): (Vec<_>, Vec<_>) =
                options.iter().map(|o| (o.logprob(), o.logprobs.len())).unzip();
            tally.add(&logprobs, &tokens, item.correct);
            rest = later;
        }
    }
    Ok(tallies.into_iter().map(Tally::score).collect())
}

impl Item {
    /// Each option after the context.
    pub fn texts<'a>(&'a self, selection: &'a Selection) -> impl Iterator<Item = Text> + 'a {
        self.options.iter().map(move |option| Text {
            tokens: [self.context.as_slice(), option].concat(),
            context: self.context.len(),
            selection: selection.clone(),
        })
    }
}

/// Answers of one sub-network, counted.
#[derive(Debug, Clone, Default)]
pub(super) struct Tally {
    count: usize,
    right: usize,
    right_normalised: usize,
    loss: f64,
    tokens: usize,
}

impl Tally {
    /// Log probability and number of tokens of each option.
    pub(super) fn add(&mut self, logprobs: &[f64], tokens: &[usize], correct: usize) {
        let each = logprobs.iter().zip(tokens).map(|(logprob, &tokens)| logprob / tokens.max(1) as f64);
        self.count += 1;
        self.right += usize::from(largest(logprobs.iter().copied()) == Some(correct));
        self.right_normalised += usize::from(largest(each) == Some(correct));
        self.loss -= logprobs[correct];
        self.tokens += tokens[correct];
    }

    pub(super) fn score(self) -> Score {
        let accuracy = |right| Accuracy { right, count: self.count };
        Score {
            accuracy: accuracy(self.right),
            accuracy_normalised: accuracy(self.right_normalised),
            answer_loss: self.loss / self.tokens.max(1) as f64,
        }
    }
}

/// Where the largest is; of equal ones the first, so that a model that says nothing scores no better than its guess.
pub(super) fn largest(values: impl Iterator<Item = f64>) -> Option<usize> {
    let best = values.enumerate().fold(None, |best: Option<(usize, f64)>, (i, value)| match best {
        Some((_, most)) if value <= most => best,
        _ => Some((i, value)),
    });
    best.map(|(i, _)| i)
}

#[cfg(test)]
mod tests {
    use super::super::likelihood::Scored;
    use super::*;
    use crate::model::{Batch, Logits};
    use crate::supernet::ActiveShape;
    use std::sync::Arc;

    /// After token `t` token `t + 1` has probability 1/2; the other three share the rest.
    struct Successor;

    impl Executor for Successor {
        fn forward(&mut self, batch: &Batch) -> Result<Logits, BackendError> {
            let row = |&r: &u32| {
                let next = (batch.tokens[r as usize] + 1) % 4;
                (0..4).map(move |t| if t == next { 3f32.ln() } else { 0.0 })
            };
            Ok(Logits { values: batch.outputs.iter().flat_map(row).collect(), vocabulary: 4 })
        }

        fn vocabulary(&self) -> usize {
            4
        }

        fn blocks(&self) -> usize {
            4
        }

        fn block_size(&self) -> usize {
            8
        }
    }

    fn selection(subnetwork: u32) -> Selection {
        Selection { adapter: 0, subnetwork, shape: Arc::new(ActiveShape { linears: Vec::new() }) }
    }

    fn all(executor: &mut dyn Executor, texts: &[Text]) -> Result<Vec<Scored>, BackendError> {
        let mut scored = Vec::new();
        score(executor, texts, |step| {
            scored.extend(step);
            Ok::<_, BackendError>(())
        })?;
        Ok(scored)
    }

    #[test]
    fn likelihoods_are_those_of_the_model() {
        let text =
            |tokens: &[u32], context| Text { tokens: tokens.to_vec(), context, selection: selection(0) };
        let texts = vec![text(&[0, 1, 2, 3], 1), text(&[0, 1, 0], 2), text(&[3, 0], 1)];
        let scored = all(&mut Successor, &texts).unwrap();
        let (half, sixth) = (0.5f64.ln(), (1.0 / 6.0f64).ln());
        for (scored, (logprob, tokens)) in scored.iter().zip([(3.0 * half, 3), (sixth, 1), (half, 1)]) {
            assert!((scored.logprob() - logprob).abs() < 1e-6, "{scored:?}");
            assert_eq!(scored.logprobs.len(), tokens);
        }
        let singly = texts.iter().map(|t| all(&mut Successor, std::slice::from_ref(t)).unwrap()[0].clone());
        assert_eq!(singly.collect::<Vec<_>>(), scored, "batching changes nothing");
        // Four blocks of eight; the last token is not computed.
        assert!(all(&mut Successor, &[text(&[0; 33], 1)]).is_ok());
        assert!(all(&mut Successor, &[text(&[0; 34], 1)]).is_err());
        // Nothing to predict, and a token that the model does not have.
        assert_eq!(all(&mut Successor, &[text(&[0], 1)]).unwrap()[0].logprob(), 0.0);
        assert_eq!(all(&mut Successor, &[text(&[0, 9], 1)]).unwrap()[0].logprob(), f64::NEG_INFINITY);
    }

    /// Blocks of one position, and a memory of what was written where: a token may only build on its own beginning.
    struct Remembering {
        written: Vec<u32>,
        computed: usize,
    }

    impl Executor for Remembering {
        fn forward(&mut self, batch: &Batch) -> Result<Logits, BackendError> {
            self.computed += batch.tokens.len();
            let mut rows = Vec::new();
            for span in &batch.spans {
                for (i, &token) in batch.tokens[span.rows.clone()].iter().enumerate() {
                    self.written[span.blocks[span.start + i] as usize] = token;
                    let seen = &span.blocks[..=span.start + i];
                    // Every logit depends on the whole sequence so far.
                    let hash = seen.iter().fold(7u32, |h, &b| (h * 31 + self.written[b as usize] + 1) % 1009);
                    rows.push((0..4).map(|t| ((hash * (t + 3)) % 11) as f32).collect::<Vec<_>>());
                }
            }
            let values = batch.outputs.iter().flat_map(|&r| rows[r as usize].clone()).collect();
            Ok(Logits { values, vocabulary: 4 })
        }

        fn vocabulary(&self) -> usize {
            4
        }

        fn blocks(&self) -> usize {
            self.written.len()
        }

        fn block_size(&self) -> usize {
            1
        }
    }

    #[test]
    fn what_texts_begin_with_is_computed_once_and_changes_nothing() {
        let new = |blocks| Remembering { written: vec![0; blocks], computed: 0 };
        let text =
            |tokens: &[u32], context, id| Text { tokens: tokens.to_vec(), context, selection: selection(id) };
        let texts = [
            text(&[1, 2, 3, 0, 1], 3, 0),
            text(&[1, 2, 3, 2], 3, 0),
            text(&[1, 2, 3, 3, 3, 1], 3, 0),
            text(&[1, 2, 3, 3], 3, 1),
            text(&[1, 2, 1, 3], 3, 1),
            text(&[1, 2, 3, 3, 3, 2], 3, 0),
            text(&[1, 2], 2, 1),
        ];
        let alone = texts.iter().map(|t| all(&mut new(40), std::slice::from_ref(t)).unwrap()[0].clone());
        let alone = alone.collect::<Vec<_>>();
        let mut together = new(40);
        assert_eq!(all(&mut together, &texts).unwrap(), alone);
        // Of sub-network 0: 1 2 3 0, nothing, 3 3, nothing; of 1: 1 2 3, 1, nothing.
        assert_eq!(together.computed, 4 + 2 + 3 + 1);
        // In a pool that holds two texts it takes more steps; the 1 that all begin with stays in it.
        let mut narrow = new(9);
        assert_eq!(all(&mut narrow, &texts).unwrap(), alone);
        assert!(narrow.computed > together.computed);
    }

    #[test]
    fn the_likeliest_option_is_the_answer() {
        // Options after 0: "1 2" (1/4), "3" (1/6): summed the first wins, and by the token too; "2" and "3" are equal.
        let item = |options: &[&[u32]], correct| Item {
            context: vec![0],
            options: options.iter().map(|o| o.to_vec()).collect(),
            correct,
        };
        let items = [item(&[&[3], &[1, 2]], 1), item(&[&[2], &[3]], 1), item(&[&[1, 2, 3], &[3]], 1)];
        let scores = multiple_choice(&mut Successor, &items, &[selection(0), selection(1)], |_| {}).unwrap();
        assert_eq!(scores.len(), 2);
        assert_eq!(scores[0], scores[1]);
        // The third: 1/8 against 1/6 summed, but 1/2 against 1/6 for each token.
        assert_eq!((scores[0].accuracy.right, scores[0].accuracy_normalised.right), (2, 1));
        let loss = -(2.0 * 0.5f64.ln() + 2.0 * (1.0 / 6.0f64).ln()) / 4.0;
        assert!((scores[0].answer_loss - loss).abs() < 1e-6);
    }

    #[test]
    fn wilsons_interval_is_the_textbooks() {
        // Newcombe 1998, table I: 81 of 263 and 0 of 20.
        let (low, high) = Accuracy { right: 81, count: 263 }.interval();
        assert!((low - 0.2553).abs() < 5e-5 && (high - 0.3662).abs() < 5e-5, "{low} {high}");
        let (low, high) = Accuracy { right: 0, count: 20 }.interval();
        assert!(low == 0.0 && (high - 0.1611).abs() < 5e-5, "{high}");
        assert_eq!(Accuracy { right: 0, count: 0 }.interval(), (0.0, 1.0));
    }
}
