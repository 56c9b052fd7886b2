//! Model families: each one's forward, written once over [`Backend`].
//!
//! Above this floor the backend's type is erased: the engine holds a boxed [`Executor`].

pub mod bert;
pub mod bloom;
mod causal;
mod classifier;
mod demand;
mod layer_norm;
mod layout;
pub mod llama;
mod load;
pub mod mpt;
mod open;
mod orders;
mod shape;

pub use causal::{CausalExecutor, CausalModel};
pub use classifier::{Classifier, TextBatch};
pub use layout::{ChannelAxis, Layout};
pub use load::{LoadError, SuperAdapter};
pub use open::{Adapters, classifier, executor};
pub use orders::Orders;
pub use shape::{GroupTemplate, TemplateError, base_tensors, model_shape, search_space};

use crate::backend::{
    Arithmetic, AttentionShape, Backend, BackendError, Choice, Draw, Linear, Segment, Selection,
    SequenceSpan, log_probabilities,
};

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

impl Batch {
    /// By span, how many key-value heads its sub-network has of those that `keys` writes; empty where all have all.
    fn kept_heads<B: Backend>(&self, keys: &Linear<B>, shape: &AttentionShape) -> Vec<usize> {
        let heads = |segment: &Segment| segment.selection.shape.linears[keys.index].out / shape.head_size;
        if self.segments.iter().all(|segment| heads(segment) == shape.kv_heads) {
            return Vec::new();
        }
        self.spans_with_segments().map(|(_, segment)| heads(segment)).collect()
    }

    /// Each span with the segment that it is in.
    fn spans_with_segments(&self) -> impl Iterator<Item = (&SequenceSpan, &Segment)> {
        let mut segments = self.segments.iter().peekable();
        self.spans.iter().filter_map(move |span| {
            while segments.next_if(|segment| segment.rows.end <= span.rows.start).is_some() {}
            Some((span, *segments.peek()?))
        })
    }
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

/// What became of the rows that a [`Batch`] asked for: logits, or the token that was chosen from them.
#[derive(Debug, Clone, Default)]
pub struct Outputs {
    /// Of the rows from which nothing was drawn.
    pub logits: Logits,
    /// By wanted row: the token, or which of the logits.
    pub rows: Vec<Output>,
}

/// What became of one row.
#[derive(Debug, Clone, Copy)]
pub enum Output {
    Logits(usize),
    Token(Choice),
}

impl Outputs {
    /// The token that was drawn from the `i`-th wanted row; `None` where its logits were left.
    pub fn token(&self, i: usize) -> Option<Choice> {
        match self.rows[i] {
            Output::Token(choice) => Some(choice),
            Output::Logits(_) => None,
        }
    }

    /// The logits `(V)` of the `i`-th wanted row; `None` where a token was drawn from them.
    pub fn logits(&self, i: usize) -> Option<&[f32]> {
        match self.rows[i] {
            Output::Logits(row) => Some(self.logits.row(row)),
            Output::Token(_) => None,
        }
    }

    /// `count` wanted rows, of which some were drawn from; where the others' logits are.
    pub fn arranged(count: usize, drawn: impl Iterator<Item = (usize, Choice)>, logits: Logits) -> Self {
        let mut tokens = vec![None; count];
        drawn.for_each(|(row, choice)| tokens[row] = Some(choice));
        let mut next = 0;
        let output = |choice: Option<Choice>| {
            choice.map_or_else(
                || {
                    next += 1;
                    Output::Logits(next - 1)
                },
                Output::Token,
            )
        };
        Self { rows: tokens.into_iter().map(output).collect(), logits }
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

    /// [`Self::forward`], and draws from some of the wanted rows (by their place in `batch.outputs`, ascending), whose logits
    /// then need not leave the machine that has them.
    ///
    /// # Errors
    /// Those of `forward`.
    fn sample(&mut self, batch: &Batch, draws: &[(u32, Draw)]) -> Result<Outputs, BackendError> {
        let all = self.forward(batch)?;
        let count = batch.outputs.len();
        let drawn = |i: usize| draws.iter().any(|(row, _)| *row as usize == i);
        let left = (0..count).filter(|&i| !drawn(i)).flat_map(|i| all.row(i)).copied().collect();
        let tokens = draws.iter().map(|(row, draw)| (*row as usize, draw.choose(all.row(*row as usize))));
        Ok(Outputs::arranged(count, tokens, Logits { values: left, vocabulary: all.vocabulary }))
    }

    /// [`Self::forward`], and of each (wanted row, token) the natural logarithm of the token's probability there: rows by their place
    /// in `batch.outputs`. Minus infinity of a token outside the vocabulary.
    ///
    /// # Errors
    /// Those of `forward`.
    fn log_probabilities(&mut self, batch: &Batch, tokens: &[(u32, u32)]) -> Result<Vec<f32>, BackendError> {
        Ok(log_probabilities(&self.forward(batch)?.values, batch.outputs.len(), tokens))
    }

    /// Gets memory for steps of up to `rows` tokens, where it has to be asked for: what serves then never lacks it. Writes into
    /// the pool's first blocks, so it comes before anything else.
    ///
    /// # Errors
    /// There is not enough.
    fn prepare(&mut self, _rows: usize, _selection: &Selection) -> Result<(), BackendError> {
        Ok(())
    }

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
