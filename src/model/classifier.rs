//! What models that classify whole texts have in common.

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
