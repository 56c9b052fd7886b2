//! The arithmetic under a model's forward, once as a trait and once for each kind of machine.
//!
//! A model family is written over [`Backend`] and does not know which one it runs on, nor whether it is being
//! trained. [`mod@reference`] is differentiable, over candle: it trains, and it is the oracle of the others.
//! [`cpu`] is our own buffers and kernels; `cuda`, with the feature of that name, the same for NVIDIA GPUs.
//!
//! One alphabet for shapes: `T` rows (tokens) of the packed batch, `H` hidden, `I` full MLP width, `R` full rank,
//! `N`/`K` query/key-value heads, `D` head size, `V` vocabulary; `o`, `i`, `r` the active sizes of one segment.

mod batch;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
mod draw;
mod error;
mod log_probability;
mod quantise;
pub mod reference;

pub use batch::{AttentionShape, CacheLayout, Segment, Selection, SequenceSpan, Sight, alibi_slopes};
pub use draw::{Draw, Edit, SamplingError};
pub use error::BackendError;
pub use log_probability::{log_normaliser, log_probabilities};

use crate::weights::{HostMatrix, HostVector};
use std::sync::Arc;

/// The operations that a model's forward needs. Those that fuse several have a default in terms of the others.
///
/// Rows are packed: a step's tokens of all sequences stand below each other, `(T, n)`; nothing is padded. Every
/// operation that multiplies by an elastic weight takes the batch's segments, which cover rows `0..T` in order.
///
/// Invariant: a row's result depends on its own sequence and its own segment's sub-network only, never on the rows
/// beside it; on the `cpu` backend bit for bit.
pub trait Backend: Send + Sync + 'static {
    /// Activations `(T, n)`.
    type Rows: Send;
    /// A weight `(out, inp)`, prepared for this machine; every prefix of either axis can be used without a copy.
    type Matrix: Send + Sync;
    /// A norm's weight or a bias.
    type Vector: Send + Sync;
    /// Keys and values of all layers, in blocks.
    type Cache: Send;
    /// Sine and cosine of the angles that a step's rows are rotated by.
    type Angles: Send + Sync;

    /// Takes a base weight to this machine.
    fn matrix(&self, host: HostMatrix) -> Result<Self::Matrix, BackendError>;

    /// Takes an embedding or the vocabulary product `(V, H)` to this machine, which may keep it more precisely.
    fn table(&self, host: HostMatrix) -> Result<Self::Matrix, BackendError> {
        self.matrix(host)
    }

    /// Takes an adapter's A `(R, inp)` and B `(out, R)` to this machine, to stand beside a base weight; where the backend
    /// trains, as variables.
    fn adapter(
        &self,
        a: HostMatrix,
        b: HostMatrix,
        beside: &Self::Matrix,
    ) -> Result<[Self::Matrix; 2], BackendError>;

    fn vector(&self, host: HostVector) -> Result<Self::Vector, BackendError>;

    /// Allocates the whole key-value pool.
    fn cache(&self, layout: CacheLayout) -> Result<Self::Cache, BackendError>;

    /// `(T, H)`: row `t` is row `tokens[t]` of `table (V, H)`. The caller has checked `tokens[t] < V`.
    fn embed(&self, table: &Self::Matrix, tokens: &[u32]) -> Result<Self::Rows, BackendError>;

    /// `x / sqrt(mean(x^2) + eps) * weight` for each row; the mean in f32.
    fn rms_norm(&self, x: &Self::Rows, weight: &Self::Vector, eps: f32) -> Result<Self::Rows, BackendError>;

    /// [`Self::rms_norm`] of each head of `x (T, heads * D)` by itself; `weight (D)`.
    fn head_norm(&self, x: &Self::Rows, weight: &Self::Vector, eps: f32) -> Result<Self::Rows, BackendError>;

    /// `(x - mean(x)) / sqrt(variance(x) + eps) * weight + bias` for each row; mean and variance in f32, of all columns.
    fn layer_norm(
        &self,
        x: &Self::Rows,
        weight: &Self::Vector,
        bias: &Self::Vector,
        eps: f32,
    ) -> Result<Self::Rows, BackendError>;

    /// Each number by itself. Zero stays zero, so columns that a sub-network has not stay so.
    fn activate(&self, x: Self::Rows, activation: Activation) -> Result<Self::Rows, BackendError>;

    /// `(T, n / N)` each: the columns of `x (T, n)` in `N` equal parts.
    fn split<const N: usize>(&self, x: &Self::Rows) -> Result<[Self::Rows; N], BackendError>;

    /// The elastic low-rank product, for each segment with its own `o, i, r` and its own super-adapter:
    /// `y = W[:o,:i] x + b[:o] + s B[:o,:r] (A[:r,:i] x)`. Result `(T, out)`; columns from `o` on are zero.
    fn linear(
        &self,
        x: &Self::Rows,
        linear: &Linear<Self>,
        segments: &[Segment],
    ) -> Result<Self::Rows, BackendError>;

    /// The elastic gated MLP `down(silu(gate(x)) * up(x))`, each of the three an elastic low-rank product. `(T, H)`.
    fn gated_mlp(
        &self,
        x: &Self::Rows,
        mlp: &GatedMlp<Self>,
        segments: &[Segment],
    ) -> Result<Self::Rows, BackendError>;

    /// Several Linears of the same rows, normed first where there is a norm.
    fn linears<const N: usize>(
        &self,
        x: &Self::Rows,
        norm: Option<Norm<'_, Self>>,
        linears: [&Linear<Self>; N],
        segments: &[Segment],
    ) -> Result<[Self::Rows; N], BackendError> {
        let normed = norm.map(|norm| self.rms_norm(x, norm.weight, norm.eps)).transpose()?;
        let x = normed.as_ref().unwrap_or(x);
        let rows = linears.into_iter().map(|linear| self.linear(x, linear, segments));
        let rows = rows.collect::<Result<Vec<_>, _>>()?;
        Ok(rows.try_into().unwrap_or_else(|_| unreachable!("as many rows as Linears")))
    }

    /// `onto + linear(x)`, a Linear and its residual.
    fn linear_onto(
        &self,
        onto: Self::Rows,
        x: &Self::Rows,
        linear: &Linear<Self>,
        segments: &[Segment],
    ) -> Result<Self::Rows, BackendError> {
        self.add(onto, &self.linear(x, linear, segments)?)
    }

    /// `x + gated_mlp(rms_norm(x))`, a normed MLP and its residual.
    fn gated_mlp_onto(
        &self,
        x: Self::Rows,
        norm: Norm<'_, Self>,
        mlp: &GatedMlp<Self>,
        segments: &[Segment],
    ) -> Result<Self::Rows, BackendError> {
        let gated = self.gated_mlp(&self.rms_norm(&x, norm.weight, norm.eps)?, mlp, segments)?;
        self.add(x, &gated)
    }

    /// The angles of rows at these positions, the same in every layer. `inverse_frequencies` has `D / 2` entries,
    /// radians per position.
    fn angles(&self, positions: &[u32], inverse_frequencies: &[f32]) -> Result<Self::Angles, BackendError>;

    /// Rotates each head of `x (T, heads * D)` by its row's angles (RoFormer; the two halves of a head pair up, as in
    /// Hugging Face).
    fn rotary(
        &self,
        x: Self::Rows,
        head_size: usize,
        angles: &Self::Angles,
    ) -> Result<Self::Rows, BackendError>;

    /// Attention with grouped queries. `q (T, N*D)`, `k` and `v (T, K*D)`, result `(T, N*D)`. What a row sees of its sequence,
    /// its `shape` says; of other sequences it sees nothing.
    ///
    /// With a cache, writes this step's keys and values of `layer` into the spans' blocks, and rows see what has been written
    /// there before. A span sees what spans before it have written in the same step, so
    /// sequences with a common beginning can share its blocks. Without one, every span must start at position 0.
    fn attention(
        &self,
        q: &Self::Rows,
        k: &Self::Rows,
        v: &Self::Rows,
        shape: &AttentionShape,
        spans: &[SequenceSpan],
        cache: Option<(&mut Self::Cache, usize)>,
    ) -> Result<Self::Rows, BackendError>;

    /// [`Self::attention`] of queries and keys that are still to be rotated. `kept` says of each span how many key-value
    /// heads its sub-network has, or nothing, where all have all: those beyond are zeros, and so is what they give.
    fn rotary_attention(
        &self,
        [q, k, v]: [Self::Rows; 3],
        angles: &Self::Angles,
        shape: &AttentionShape,
        spans: &[SequenceSpan],
        _kept: &[usize],
        cache: Option<(&mut Self::Cache, usize)>,
    ) -> Result<Self::Rows, BackendError> {
        let rotate = |rows| self.rotary(rows, shape.head_size, angles);
        self.attention(&rotate(q)?, &rotate(k)?, &v, shape, spans, cache)
    }

    /// `x + y`, the residual.
    fn add(&self, x: Self::Rows, y: &Self::Rows) -> Result<Self::Rows, BackendError>;

    /// `(rows.len(), n)`: the chosen rows of `x`, in that order.
    fn select(&self, x: &Self::Rows, rows: &[u32]) -> Result<Self::Rows, BackendError>;

    /// `x head^T`: `(T, V)` from `head (V, H)`.
    fn logits(&self, x: &Self::Rows, head: &Self::Matrix) -> Result<Self::Rows, BackendError>;

    /// Chooses a token from each of the rows `(T, V)` that are named, none twice.
    fn choose(&self, logits: &Self::Rows, draws: &[(u32, Draw)]) -> Result<Vec<Choice>, BackendError> {
        let rows = draws.iter().map(|(row, _)| *row).collect::<Vec<_>>();
        let values = self.host(self.select(logits, &rows)?)?;
        let vocabulary = values.len() / draws.len().max(1);
        let rows = values.chunks_exact(vocabulary.max(1));
        Ok(draws.iter().zip(rows).map(|((_, draw), row)| draw.choose(row)).collect())
    }

    /// For each (row, token) the natural logarithm of the token's probability in that row of `logits (rows, V)`; minus infinity
    /// of a token that has no logit, or one that is not a number.
    fn log_probabilities(
        &self,
        logits: Self::Rows,
        rows: usize,
        tokens: &[(u32, u32)],
    ) -> Result<Vec<f32>, BackendError> {
        Ok(log_probabilities(&self.host(logits)?, rows, tokens))
    }

    /// The rows as row-major f32 in host memory.
    fn host(&self, x: Self::Rows) -> Result<Vec<f32>, BackendError>;

    /// Ends a step of which nobody reads a result, only its keys and values: backends that put work off do it now.
    fn finish(&self) -> Result<(), BackendError> {
        Ok(())
    }

    /// Gives up what a step that failed has put off.
    fn forget(&self) {}

    /// Whether a step asks for memory that can be short, and keeps it for the next ones: then the largest step comes first. What
    /// grows with contexts, not with a step's rows, is taken by this.
    fn keeps_step_memory(&self) -> Result<bool, BackendError> {
        Ok(false)
    }

    /// Bytes that a product with the prefix `[:out, :inp]` has to read; a size beyond the matrix's own means its own.
    fn bytes(&self, matrix: &Self::Matrix, out: usize, inp: usize) -> usize;

    /// In which numbers a product with this matrix multiplies.
    fn arithmetic(&self, matrix: &Self::Matrix) -> Arithmetic;

    /// Bytes of the whole key-value pool.
    fn cache_bytes(&self, cache: &Self::Cache) -> usize;
}

/// The token that was chosen, if one was possible.
pub type Choice = Result<u32, SamplingError>;

/// The numbers that a product multiplies; what it adds up in is wider.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arithmetic {
    F32,
    Bf16,
    Int8,
}

/// A function of one number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Activation {
    /// `x Phi(x)`, `Phi` being the normal distribution's (Hendrycks and Gimpel 2016).
    Gelu,
    /// Its approximation by a hyperbolic tangent: `x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))`.
    GeluTanh,
    Tanh,
    Relu,
}

/// A norm to be done on the way into another operation: [`Backend::rms_norm`]'s `weight (n)` and `eps`.
pub struct Norm<'a, B: Backend + ?Sized> {
    pub weight: &'a B::Vector,
    pub eps: f32,
}

impl<B: Backend + ?Sized> Clone for Norm<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<B: Backend + ?Sized> Copy for Norm<'_, B> {}

/// One Linear of the model: the frozen base weight and the adapter of each loaded super-adapter.
pub struct Linear<B: Backend + ?Sized> {
    /// Its index in the model's `ModelShape`, by which segments look up `o, i, r`.
    pub index: usize,
    /// `W (out, inp)`; shared, because an embedding table can also be the vocabulary product.
    pub weight: Arc<B::Matrix>,
    /// `b (out)`.
    pub bias: Option<B::Vector>,
    /// By super-adapter, in the order in which they were loaded; `None` where one leaves this Linear alone.
    pub adapters: Vec<Option<Adapter<B>>>,
}

/// One Linear's share of a super-adapter.
pub struct Adapter<B: Backend + ?Sized> {
    /// `A (R, inp)`.
    pub a: B::Matrix,
    /// `B (out, R)`.
    pub b: B::Matrix,
    /// `alpha / R_config`: the same for every active rank.
    pub scale: f32,
}

/// The three Linears of a gated MLP.
pub struct GatedMlp<B: Backend + ?Sized> {
    pub gate: Linear<B>,
    pub up: Linear<B>,
    pub down: Linear<B>,
}
