//! Model families: each one's forward, written once over [`Backend`](crate::backend::Backend).
//!
//! Above this floor the backend's type is erased: the engine holds a boxed [`Executor`].

pub mod llama;

use crate::backend::{BackendError, Segment, SequenceSpan};

/// One step: packed rows of several sequences, each in its own sub-network.
#[derive(Debug, Clone, Default)]
pub struct Batch {
    /// `(T)`
    pub tokens: Vec<u32>,
    /// `(T)` position of each token in its sequence.
    pub positions: Vec<u32>,
    /// Cover rows `0..T` in order.
    pub segments: Vec<Segment>,
    /// Cover rows `0..T` in order, each within one segment.
    pub spans: Vec<SequenceSpan>,
    /// Rows whose logits are wanted, ascending.
    pub outputs: Vec<u32>,
}

/// Logits of the rows that a [`Batch`] asked for.
#[derive(Debug, Clone, Default)]
pub struct Logits {
    /// `(outputs, V)` row-major.
    pub values: Vec<f32>,
    /// `V`
    pub vocabulary: usize,
}

impl Logits {
    /// The logits `(V)` of the `i`-th wanted row.
    pub fn row(&self, i: usize) -> &[f32] {
        &self.values[i * self.vocabulary..(i + 1) * self.vocabulary]
    }
}

/// A loaded model with its key-value pool, its backend's type erased.
pub trait Executor: Send {
    /// Computes one step and writes its keys and values into the pool.
    ///
    /// # Errors
    /// A token outside the vocabulary, spans that leave the pool, or a failure below. The pool's other blocks are
    /// untouched, so other sequences can go on.
    fn forward(&mut self, batch: &Batch) -> Result<Logits, BackendError>;

    /// `V`
    fn vocabulary(&self) -> usize;

    /// Blocks in the key-value pool.
    fn blocks(&self) -> usize;

    /// Positions in one block.
    fn block_size(&self) -> usize;
}
