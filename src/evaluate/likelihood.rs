//! Log-likelihood of continuations.

use crate::backend::{BackendError, Segment, Selection, SequenceSpan};
use crate::generation::token_logprob;
use crate::model::{Batch, Executor};

/// A text to score: all tokens, of which the first `context` are given. At least one token is given.
#[derive(Debug, Clone)]
pub struct Text {
    pub tokens: Vec<u32>,
    pub context: usize,
    pub selection: Selection,
}

/// What a text scored.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Scored {
    /// Sum of natural-log probabilities of the tokens after the context.
    pub logprob: f64,
    pub tokens: usize,
    /// Whether each of them was the likeliest.
    pub greedy: bool,
}

/// Tokens in one step; as many rows of logits may be wanted.
const STEP_TOKENS: usize = 512;

/// Scores every text; texts that stand together and share a sub-network share a segment. `progress` is told how many
/// are done. A text that does not fit the executor's pool is an error.
pub fn score(
    executor: &mut dyn Executor,
    texts: &[Text],
    mut progress: impl FnMut(usize),
) -> Result<Vec<Scored>, BackendError> {
    let mut scored = Vec::with_capacity(texts.len());
    let mut rest = texts;
    while !rest.is_empty() {
        let count = fitting(executor, rest)?;
        let (now, later) = rest.split_at(count);
        scored.extend(score_step(executor, now)?);
        progress(scored.len());
        rest = later;
    }
    Ok(scored)
}

/// How many of the first texts go into one step: within its budget and the pool, but at least one.
fn fitting(executor: &dyn Executor, texts: &[Text]) -> Result<usize, BackendError> {
    let (mut tokens, mut blocks, mut count) = (0, 0, 0);
    for text in texts {
        tokens += text.tokens.len();
        blocks += text.tokens.len().div_ceil(executor.block_size());
        if blocks > executor.blocks() || (count > 0 && tokens > STEP_TOKENS) {
            break;
        }
        count += 1;
    }
    if count > 0 {
        return Ok(count);
    }
    Err(BackendError::Shape {
        operation: "score",
        expected: format!("at most {} tokens", executor.blocks() * executor.block_size()),
        got: texts.first().map_or(0, |t| t.tokens.len()).to_string(),
    })
}

fn score_step(executor: &mut dyn Executor, texts: &[Text]) -> Result<Vec<Scored>, BackendError> {
    let mut batch = Batch::default();
    let mut next_block = 0;
    for text in texts {
        let first = batch.tokens.len();
        let rows = first..first + text.tokens.len();
        let blocks = text.tokens.len().div_ceil(executor.block_size()) as u32;
        batch.tokens.extend(&text.tokens);
        batch.positions.extend(0..text.tokens.len() as u32);
        batch.outputs.extend((rows.start + text.context - 1..rows.end - 1).map(|r| r as u32));
        let (start, of_text) = (0, (next_block..next_block + blocks).collect());
        batch.spans.push(SequenceSpan { rows: rows.clone(), start, blocks: of_text });
        next_block += blocks;
        match batch.segments.last_mut() {
            Some(segment) if segment.selection == text.selection => segment.rows.end = rows.end,
            _ => batch.segments.push(Segment { rows, selection: text.selection.clone() }),
        }
    }
    let logits = executor.forward(&batch)?;
    let mut row = 0;
    let score = |text: &Text| {
        let mut scored = Scored { logprob: 0.0, tokens: 0, greedy: true };
        for &token in &text.tokens[text.context..] {
            let (logprob, top) = token_logprob(logits.row(row), token, 1);
            scored.logprob += f64::from(logprob);
            scored.tokens += 1;
            scored.greedy &= top.first().is_some_and(|t| t.0 == token);
            row += 1;
        }
        scored
    };
    Ok(texts.iter().map(score).collect())
}
