//! What models that classify whole texts have in common.

use super::causal::covered;
use crate::backend::{BackendError, Segment};
use std::ops::Range;

/// Texts to be classified in one step, below each other, each in its own sub-network. Nothing is padded.
#[derive(Debug, Clone, Default)]
pub struct TextBatch {
    /// `(T)`
    pub tokens: Vec<u32>,
    /// `(T)`: 0 in the first text of a pair, 1 in the second.
    pub token_types: Vec<u32>,
    /// Cover rows `0..T` in order.
    pub segments: Vec<Segment>,
    /// The rows of each text or pair; cover `0..T` in order, each within one segment.
    pub texts: Vec<Range<usize>>,
}

impl TextBatch {
    /// The same segments counted in texts, for what is computed once for each. The batch has been checked.
    pub(super) fn segments_of_texts(&self) -> Vec<Segment> {
        let place = |row: usize| self.texts.partition_point(|text| text.start < row);
        let of_texts = |segment: &Segment| Segment {
            rows: place(segment.rows.start)..place(segment.rows.end),
            selection: segment.selection.clone(),
        };
        self.segments.iter().map(of_texts).collect()
    }
}

/// A loaded model that says of a whole text what it is, its backend's type erased.
pub trait Classifier: Send {
    /// By text, one number for each label of its super-adapter, before any softmax.
    ///
    /// # Errors
    /// A token or token type out of range, a text that is empty or longer than [`Self::max_positions`], ranges that do not cover
    /// the batch, a super-adapter that was not loaded, or a failure below.
    fn classify(&mut self, batch: &TextBatch) -> Result<Vec<Vec<f32>>, BackendError>;

    /// Outputs for each text of a super-adapter, by its number in loading order: each has a head of its own, or the base's. `None`
    /// where there is neither.
    fn labels(&self, adapter: usize) -> Option<usize>;

    /// The longest text, in tokens.
    fn max_positions(&self) -> usize;
}

/// What bounds a batch.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bounds {
    pub(super) vocabulary: usize,
    pub(super) token_types: usize,
    pub(super) max_positions: usize,
}

/// What a batch must satisfy before anything is computed.
pub(super) fn check(batch: &TextBatch, bounds: Bounds) -> Result<(), BackendError> {
    let wrong =
        |expected: String, got: String| Err(BackendError::Shape { operation: "classify", expected, got });
    let Bounds { vocabulary, token_types, max_positions } = bounds;
    let rows = batch.tokens.len();
    if let Some(token) = batch.tokens.iter().find(|&&t| t as usize >= vocabulary) {
        return wrong(format!("tokens below {vocabulary}"), token.to_string());
    }
    if let Some(kind) = batch.token_types.iter().find(|&&t| t as usize >= token_types) {
        return wrong(format!("token types below {token_types}"), kind.to_string());
    }
    if rows == 0 || batch.token_types.len() != rows {
        return wrong(format!("{rows} token types, at least one"), batch.token_types.len().to_string());
    }
    let segments = covered(batch.segments.iter().map(|s| &s.rows));
    let texts = covered(batch.texts.iter());
    if segments != Some(rows) || texts != Some(rows) {
        return wrong(
            format!("segments and texts that cover rows 0..{rows} in order"),
            format!("segments to {segments:?}, texts to {texts:?}"),
        );
    }
    if let Some(text) = batch.texts.iter().find(|text| text.len() > max_positions) {
        return wrong(format!("texts of at most {max_positions} tokens"), text.len().to_string());
    }
    let begins = |row: usize| batch.texts.binary_search_by_key(&row, |text| text.start).is_ok();
    if let Some(segment) = batch.segments.iter().find(|segment| !begins(segment.rows.start)) {
        return wrong("segments of whole texts".into(), format!("one from row {}", segment.rows.start));
    }
    Ok(())
}
