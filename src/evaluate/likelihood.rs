//! Log-likelihood of continuations.

use super::preamble::Preambles;
use super::step::Step;
use crate::backend::{BackendError, Selection};
use crate::model::Executor;

/// A text to score: all tokens, of which the first `context` are given. At least one token is given.
#[derive(Debug, Clone)]
pub struct Text {
    pub tokens: Vec<u32>,
    pub context: usize,
    pub selection: Selection,
}

/// What a text scored.
#[derive(Debug, Clone, PartialEq)]
pub struct Scored {
    /// Natural-log probabilities of the tokens after the context.
    pub logprobs: Vec<f32>,
}

/// Tokens in one step; as many rows of logits may be wanted.
pub(super) const STEP_TOKENS: usize = 512;

impl Text {
    /// The tokens that something follows.
    pub(super) fn computed(&self) -> &[u32] {
        &self.tokens[..self.tokens.len() - 1]
    }
}

impl Scored {
    /// Sum over the tokens.
    pub fn logprob(&self) -> f64 {
        self.logprobs.iter().copied().map(f64::from).sum()
    }
}

/// Scores every text. `done` is given the results step by step, in the order of the texts. What texts of one sub-network have in
/// common at their beginning is computed once, as far as it fills whole blocks of the pool, so blocks of one position share most;
/// texts that begin alike should stand near each other.
///
/// # Errors
/// A text that does not fit the executor's pool, what fails below, and what `done` says.
pub fn score<E: From<BackendError>>(
    executor: &mut dyn Executor,
    texts: &[Text],
    mut done: impl FnMut(Vec<Scored>) -> Result<(), E>,
) -> Result<(), E> {
    // The logits of the context's last token are wanted of every text, so that one is never a preamble's.
    let sequences = texts.iter().map(|t| (t.computed(), t.context - 1, &t.selection));
    let longest = texts.iter().map(|t| t.computed().len()).max().unwrap_or(0);
    let mut preambles = Preambles::new(executor, sequences, longest);
    let mut rest = texts;
    while let Some(first) = rest.first() {
        let mut step = Step::new(executor, &preambles);
        let count = rest.iter().take_while(|text| step.add(text, &preambles)).count();
        if count == 0 {
            let limit = executor.blocks() * executor.block_size();
            let (expected, got) = (format!("at most {limit} tokens"), first.tokens.len().to_string());
            return Err(BackendError::Shape { operation: "score", expected, got }.into());
        }
        done(step.score(executor, &mut preambles)?)?;
        rest = &rest[count..];
    }
    Ok(())
}
