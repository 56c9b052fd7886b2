//! Model families: each one's forward, written once over [`Backend`](crate::backend::Backend).
//!
//! Above this floor the backend's type is erased: the engine holds a boxed [`Executor`].

pub mod llama;

use crate::backend::{Arithmetic, BackendError, Segment, SequenceSpan};

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

    /// Bytes that the step has to read from memory: each weight once, at the largest prefix that a segment of the batch
    /// keeps of it, the vocabulary product and the adapters among them, and the cached keys and values of each sequence.
    /// Activations, norms and the embeddings of the step's tokens are left out. 0 for a stand-in without weights.
    fn traffic(&self, _batch: &Batch) -> usize {
        0
    }

    /// What the step has to multiply: the products of all Linears, base and adapter, and attention.
    fn multiply_adds(&self, _batch: &Batch) -> MultiplyAdds {
        MultiplyAdds::default()
    }

    /// Bytes of all weights, base and adapters.
    fn weight_bytes(&self) -> usize {
        0
    }
}

/// Multiply-adds by the numbers that they multiply.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MultiplyAdds {
    pub f32: usize,
    pub bf16: usize,
    pub int8: usize,
}

impl MultiplyAdds {
    pub fn add(&mut self, arithmetic: Arithmetic, count: usize) {
        match arithmetic {
            Arithmetic::F32 => self.f32 += count,
            Arithmetic::Bf16 => self.bf16 += count,
            Arithmetic::Int8 => self.int8 += count,
        }
    }

    pub fn total(&self) -> usize {
        self.f32 + self.bf16 + self.int8
    }
}

impl std::ops::AddAssign for MultiplyAdds {
    fn add_assign(&mut self, other: Self) {
        self.f32 += other.f32;
        self.bf16 += other.bf16;
        self.int8 += other.int8;
    }
}
