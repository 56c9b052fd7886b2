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

/// Scores every text; texts that stand together and share a sub-network share a segment, and where they have the same
/// context it is computed once: as much of it as fills whole blocks of the pool, so blocks of one position share most.
/// `progress` is told how many are done. A text that does not fit the executor's pool is an error.
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

/// How many of its first positions a text takes from the one before it. The last context token stays its own, since
/// its logits say how likely the continuation's first token is.
fn shared(before: Option<&Text>, text: &Text, block_size: usize) -> usize {
    let context = &text.tokens[..text.context];
    let same = |b: &&Text| b.selection == text.selection && &b.tokens[..b.context] == context;
    before.filter(same).map_or(0, |_| (text.context - 1) / block_size * block_size)
}

/// How many of the first texts go into one step: within its budget and the pool, but at least one.
fn fitting(executor: &dyn Executor, texts: &[Text]) -> Result<usize, BackendError> {
    let (mut tokens, mut blocks, mut count) = (0, 0, 0);
    for (i, text) in texts.iter().enumerate() {
        let before = i.checked_sub(1).map(|i| &texts[i]);
        let own = text.tokens.len() - shared(before, text, executor.block_size());
        tokens += own;
        blocks += own.div_ceil(executor.block_size());
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
    let (mut next_block, mut blocks_before, block_size) = (0, Vec::new(), executor.block_size());
    for (i, text) in texts.iter().enumerate() {
        let start = shared(i.checked_sub(1).map(|i| &texts[i]), text, block_size);
        let first = batch.tokens.len();
        let rows = first..first + text.tokens.len() - start;
        let own = rows.len().div_ceil(block_size) as u32;
        let mut blocks: Vec<u32> = std::mem::take(&mut blocks_before);
        blocks.truncate(start / block_size);
        blocks.extend(next_block..next_block + own);
        next_block += own;
        batch.tokens.extend(&text.tokens[start..]);
        batch.positions.extend(start as u32..text.tokens.len() as u32);
        let predicting = text.context - 1 - start..text.tokens.len() - 1 - start;
        batch.outputs.extend(predicting.map(|r| (first + r) as u32));
        batch.spans.push(SequenceSpan { rows: rows.clone(), start, blocks: blocks.clone() });
        blocks_before = blocks;
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
