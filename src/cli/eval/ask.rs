//! Items to an executor, outcomes back: many items under many sub-networks, mixed in one batch.

use super::protocol::Protocol;
use super::task::{Ask, Right, Work};
use crate::backend::Selection;
use crate::cli::Failure;
use crate::data::Choice;
use crate::evaluate::{Item, Outcome, Prompt, Scored, Text, WholeText, classify, generate, score};
use crate::model::{Classifier, Executor};
use crate::text::{EncodedText, Tokenizer};
use std::collections::VecDeque;

/// An item under one sub-network: its place among the asks, and the sub-network's among the selections.
pub(super) type Pair = (usize, usize);

/// A loaded model, of either kind.
pub(super) enum Asked {
    Continues(Box<dyn Executor>),
    Classifies(Box<dyn Classifier>),
}

/// What asking needs beside the model.
pub(super) struct Asking<'a> {
    pub(super) tokenizer: &'a Tokenizer,
    pub(super) protocol: Protocol,
    pub(super) selections: &'a [Selection],
    /// Tokens that end a text.
    pub(super) ends: Vec<u32>,
    pub(super) alone: Option<Alone>,
}

/// Without mixed batches, to compare speeds with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Alone {
    /// A question with all its options in a step.
    Question,
    /// A question with one of its options in a step.
    Text,
}

impl Asking<'_> {
    /// Computes `pairs` and gives `done` what is ready after each step, by place in `pairs`.
    pub(super) fn ask(
        &self,
        model: &mut Asked,
        asks: &[Ask],
        pairs: &[Pair],
        mut done: impl FnMut(Vec<(usize, Outcome)>) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let together = if self.alone.is_some() { 1 } else { pairs.len().max(1) };
        for (number, some) in pairs.chunks(together).enumerate() {
            let first = number * together;
            let mut done = |outcomes: Vec<(usize, Outcome)>| {
                done(outcomes.into_iter().map(|(i, outcome)| (first + i, outcome)).collect())
            };
            // A task's items all want the same.
            match (&mut *model, asks.first().map(|ask| &ask.work)) {
                (Asked::Classifies(classifier), _) => {
                    self.classes(&mut **classifier, asks, some, &mut done)?;
                }
                (Asked::Continues(executor), Some(Work::Continue { .. })) => {
                    self.generations(&mut **executor, asks, some, &mut done)?;
                }
                (Asked::Continues(executor), _) => {
                    self.likelihoods(&mut **executor, asks, some, &mut done)?;
                }
            }
        }
        Ok(())
    }

    fn classes(
        &self,
        classifier: &mut dyn Classifier,
        asks: &[Ask],
        pairs: &[Pair],
        done: &mut dyn FnMut(Vec<(usize, Outcome)>) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let of_pairs = pairs.iter().filter_map(|&(ask, selection)| match &asks[ask].work {
            Work::Classify { text, right } => Some((text, *right, &self.selections[selection])),
            _ => None,
        });
        let (mut texts, mut rights) = (Vec::new(), Vec::new());
        for (EncodedText { tokens, token_types }, right, selection) in of_pairs {
            let (tokens, token_types) = (tokens.clone(), token_types.clone());
            texts.push(WholeText { tokens, token_types, selection: selection.clone() });
            rights.push(right);
        }
        let mut rights = rights.into_iter().enumerate();
        classify(classifier, &texts, |step| {
            let outcome = |logits: Vec<f32>| {
                let (i, right) = rights.next()?;
                Some((
                    i,
                    match right {
                        Right::Class(correct) => Outcome::Class { logits, correct },
                        Right::Number(right) => Outcome::Number { said: *logits.first()?, right },
                    },
                ))
            };
            done(step.into_iter().filter_map(outcome).collect())
        })
    }

    fn likelihoods(
        &self,
        executor: &mut dyn Executor,
        asks: &[Ask],
        pairs: &[Pair],
        done: &mut dyn FnMut(Vec<(usize, Outcome)>) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let texts =
            pairs.iter().flat_map(|&(ask, selection)| texts(&asks[ask].work, &self.selections[selection]));
        let texts = texts.collect::<Vec<_>>();
        let (mut scored, mut next) = (VecDeque::new(), 0);
        let mut take = |step: Vec<Scored>| {
            scored.extend(step);
            let mut ready = Vec::new();
            // Texts come in the order of the pairs, so whatever is whole is at the front.
            while let Some(&(ask, _)) = pairs.get(next) {
                let wanted = match &asks[ask].work {
                    Work::Options(item) => item.options.len(),
                    _ => 1,
                };
                if scored.len() < wanted {
                    break;
                }
                ready.push((next, outcome(&asks[ask].work, &scored.drain(..wanted).collect::<Vec<_>>())));
                next += 1;
            }
            done(ready)
        };
        let together = if self.alone == Some(Alone::Text) { 1 } else { texts.len().max(1) };
        texts.chunks(together).try_for_each(|texts| score(executor, texts, &mut take))
    }

    fn generations(
        &self,
        executor: &mut dyn Executor,
        asks: &[Ask],
        pairs: &[Pair],
        done: &mut dyn FnMut(Vec<(usize, Outcome)>) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let prompts = pairs.iter().filter_map(|&(ask, selection)| match &asks[ask].work {
            Work::Continue { prompt, .. } => {
                Some(Prompt { tokens: prompt.clone(), selection: self.selections[selection].clone() })
            }
            _ => None,
        });
        let decoding = self.protocol.decoding(self.stop_tokens());
        generate(executor, &prompts.collect::<Vec<_>>(), &decoding, |i, tokens| {
            let Work::Continue { choice, .. } = &asks[pairs[i].0].work else { return Ok(()) };
            done(vec![(i, self.answer(choice, &tokens))])
        })
    }

    /// Where only the first line counts, whatever ends a line ends a text.
    fn stop_tokens(&self) -> Vec<u32> {
        let mut stop = self.ends.clone();
        if self.protocol.form.is_one_line() {
            let vocabulary = 0..self.tokenizer.vocabulary() as u32;
            stop.extend(vocabulary.filter(|&token| self.tokenizer.token_bytes(token).contains(&b'\n')));
        }
        stop.sort_unstable();
        stop.dedup();
        stop
    }

    fn answer(&self, choice: &Choice, tokens: &[u32]) -> Outcome {
        let text = self.tokenizer.decode(tokens, true);
        let chosen = self.protocol.form.chosen(choice, &text);
        Outcome::Generation { text, chosen, correct: choice.correct }
    }
}

/// What is to be scored of an item.
fn texts(work: &Work, selection: &Selection) -> Vec<Text> {
    match work {
        Work::Options(item) => item.texts(selection).collect(),
        Work::Text { tokens, .. } => {
            vec![Text { tokens: tokens.clone(), context: 1, selection: selection.clone() }]
        }
        Work::Continue { .. } | Work::Classify { .. } => Vec::new(),
    }
}

fn outcome(work: &Work, scored: &[Scored]) -> Outcome {
    if let Work::Options(Item { correct, .. }) = work {
        let logprobs = scored.iter().map(Scored::logprob).collect();
        let tokens = scored.iter().map(|s| s.logprobs.len()).collect();
        return Outcome::Likelihood { logprobs, tokens, correct: *correct };
    }
    let logprobs = scored.first().map_or(&[][..], |s| &s.logprobs);
    let prompt = match work {
        Work::Text { prompt, .. } => *prompt,
        _ => 1,
    };
    // The first token is given and has no log probability.
    let response = &logprobs[(prompt - 1).min(logprobs.len())..];
    let nll = |of: &[f32]| -of.iter().copied().map(f64::from).sum::<f64>();
    Outcome::Loss {
        nll: nll(logprobs),
        tokens: logprobs.len(),
        response_nll: nll(response),
        response_tokens: response.len(),
    }
}
