//! The CPU backend: packed weights, fused low-rank products, a paged key-value pool. Activations are f32 between operations;
//! products round them where the weight's form asks for it.
//!
//! Invariant: every output number is accumulated in one fixed order, whatever rows, segments, chunks or threads ran
//! beside it. So a row's result is the same bit for bit alone, in a mixed batch, and however its prompt was cut.

mod ahead;
mod ask;
mod attention;
mod choose;
mod group;
mod inputs;
mod kernel;
mod limits;
mod matrix;
mod memory;
mod multiply;
mod pack;
mod plan;
mod product;
mod rotary;
#[cfg(test)]
mod row_tests;
mod rows;
mod shared;
mod team;
#[cfg(test)]
mod tests;
mod tile;
mod vector;

pub(super) use kernel::{Loops, vectorised};
pub(super) use rows::exp;

pub use attention::{KvDtype, PagedCache};
pub use limits::{Limits, LimitsMeter};
pub use matrix::{Dtype, Matrix};
pub use rotary::Angles;
pub use rows::Rows;

use super::{
    Activation, Arithmetic, AttentionShape, Backend, BackendError, CacheLayout, Choice, Draw, GatedMlp,
    Linear, Norm, Segment, SequenceSpan,
};
use crate::weights::{HostData, HostMatrix, HostVector};
use ahead::Order;
use inputs::Form;
use kernel::Kernel;
use memory::Memory;
use pack::Packing;
use product::Scratch;
use rows::Pool;
use shared::Shared;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use team::Team;

/// Our own kernels on this machine's processor.
pub struct Cpu {
    dtype: Dtype,
    kv: KvDtype,
    threads: usize,
    kernel: Kernel,
    team: Team,
    memory: Memory,
    order: Order,
    scratch: Mutex<Scratch>,
    pool: Arc<Pool>,
}

impl Cpu {
    /// `threads` 0 takes all cores. The key-value pool is f32, see [`Self::with_kv`].
    pub fn new(dtype: Dtype, threads: usize) -> Self {
        let cores = || std::thread::available_parallelism().map_or(1, usize::from);
        let threads = if threads == 0 { cores() } else { threads };
        Self {
            dtype,
            kv: KvDtype::F32,
            threads,
            kernel: Kernel::detect(),
            team: Team::new(threads),
            memory: Memory::default(),
            order: Order::default(),
            scratch: Mutex::default(),
            pool: Arc::default(),
        }
    }

    /// With key-value pools that keep their numbers so.
    #[must_use]
    pub fn with_kv(self, kv: KvDtype) -> Self {
        Self { kv, ..self }
    }

    /// The instruction set in use, for messages.
    pub fn instructions(&self) -> &'static str {
        self.kernel.name()
    }

    pub fn threads(&self) -> usize {
        self.threads
    }

    #[cfg(test)]
    fn with_kernel(dtype: Dtype, threads: usize, kernel: Kernel) -> Self {
        let mut cpu = Self::new(dtype, threads);
        cpu.kernel = kernel;
        cpu
    }

    /// Runs `work` for each of `0..count`, on all threads.
    fn each(&self, count: usize, work: impl Fn(usize) + Sync) {
        self.team.each(count, work);
    }

    fn packing(&self) -> Packing<'_> {
        Packing { memory: &self.memory, team: &self.team, bf16_products: self.kernel == Kernel::Avx512Bf16 }
    }

    /// Rows whose numbers have no meaning yet; the caller writes all.
    fn rows(&self, rows: usize, width: usize) -> Rows {
        self.pool.rows(rows, width)
    }

    fn scratch(&self) -> MutexGuard<'_, Scratch> {
        // Whatever a panic has left in it, each operation fills anew what it reads.
        self.scratch.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Rows that a thread takes at a time where each is done by itself.
const ROWS: usize = 16;

impl Backend for Cpu {
    type Rows = Rows;
    type Matrix = Matrix;
    type Vector = Vec<f32>;
    type Cache = PagedCache;
    type Angles = Angles;

    fn matrix(&self, host: HostMatrix) -> Result<Matrix, BackendError> {
        self.packing().pack(&host, self.dtype)
    }

    /// Half a byte is too coarse for an embedding, unless the file has it so.
    fn table(&self, host: HostMatrix) -> Result<Matrix, BackendError> {
        let in_blocks = matches!(host.data, HostData::Blocks(_));
        let dtype = match self.dtype {
            Dtype::Q4 if in_blocks => Dtype::Auto,
            Dtype::Q4 => Dtype::Int8,
            dtype => dtype,
        };
        self.packing().pack(&host, dtype)
    }

    fn adapter(&self, a: HostMatrix, b: HostMatrix, beside: &Matrix) -> Result<[Matrix; 2], BackendError> {
        self.packing().pack_adapter([&a, &b], beside, self.dtype)
    }

    fn vector(&self, host: HostVector) -> Result<Vec<f32>, BackendError> {
        Ok(host.data)
    }

    fn cache(&self, layout: CacheLayout) -> Result<PagedCache, BackendError> {
        PagedCache::new(layout, self.kv)
    }

    fn embed(&self, table: &Matrix, tokens: &[u32]) -> Result<Rows, BackendError> {
        let mut rows = self.rows(tokens.len(), table.columns());
        for (row, &token) in rows.iter_mut().zip(tokens) {
            if token as usize >= table.rows() {
                let (expected, got) = (format!("tokens below {}", table.rows()), token.to_string());
                return Err(BackendError::Shape { operation: "embed", expected, got });
            }
            table.unpack_row(token as usize, row);
        }
        Ok(rows)
    }

    fn rms_norm(&self, x: &Rows, weight: &Vec<f32>, eps: f32) -> Result<Rows, BackendError> {
        expect("rms norm", "columns", x.width(), weight.len())?;
        let mut normed = self.rows(x.len(), x.width());
        for (i, row) in normed.iter_mut().enumerate() {
            row.copy_from_slice(x.row(i));
            self.kernel.vectorised(rows::Normalise { x: row, weight, eps });
        }
        Ok(normed)
    }

    fn head_norm(&self, x: &Rows, weight: &Vec<f32>, eps: f32) -> Result<Rows, BackendError> {
        let size = weight.len().max(1);
        expect("head norm", "columns in whole heads", x.width() / size * size, x.width())?;
        let mut normed = self.rows(x.len(), x.width());
        normed.values_mut().copy_from_slice(x.values());
        for head in normed.values_mut().chunks_exact_mut(size) {
            self.kernel.vectorised(rows::Normalise { x: head, weight, eps });
        }
        Ok(normed)
    }

    fn layer_norm(
        &self,
        x: &Rows,
        weight: &Vec<f32>,
        bias: &Vec<f32>,
        eps: f32,
    ) -> Result<Rows, BackendError> {
        expect("layer norm", "columns", x.width(), weight.len())?;
        expect("layer norm", "columns", x.width(), bias.len())?;
        let mut normed = self.rows(x.len(), x.width());
        for (i, row) in normed.iter_mut().enumerate() {
            row.copy_from_slice(x.row(i));
            self.kernel.vectorised(rows::NormaliseLayer { x: row, weight, bias, eps });
        }
        Ok(normed)
    }

    fn activate(&self, mut x: Rows, activation: Activation) -> Result<Rows, BackendError> {
        let (rows, width) = (x.len(), x.width());
        let shared = Shared::new(x.values_mut());
        self.each(rows.div_ceil(ROWS), |chunk| {
            let (first, end) = (chunk * ROWS, ((chunk + 1) * ROWS).min(rows));
            #[expect(unsafe_code, reason = "threads that write parts of their own")]
            // SAFETY: chunks of rows do not overlap, and each is done once.
            let x = unsafe { shared.part(first * width..end * width) };
            self.kernel.vectorised(rows::Activate { x, activation });
        });
        Ok(x)
    }

    fn split<const N: usize>(&self, x: &Rows) -> Result<[Rows; N], BackendError> {
        expect("split", "columns", x.width() / N.max(1) * N, x.width())?;
        let width = x.width() / N;
        Ok(std::array::from_fn(|part| {
            let mut rows = self.rows(x.len(), width);
            for (i, row) in rows.iter_mut().enumerate() {
                row.copy_from_slice(&x.row(i)[part * width..(part + 1) * width]);
            }
            rows
        }))
    }

    fn linear(&self, x: &Rows, linear: &Linear<Self>, segments: &[Segment]) -> Result<Rows, BackendError> {
        let [y] = product::linears(self, x, None, [linear], segments)?;
        Ok(y)
    }

    fn linears<const N: usize>(
        &self,
        x: &Rows,
        norm: Option<Norm<'_, Self>>,
        linears: [&Linear<Self>; N],
        segments: &[Segment],
    ) -> Result<[Rows; N], BackendError> {
        norm.map_or(Ok(()), |norm| expect("rms norm", "columns", x.width(), norm.weight.len()))?;
        product::linears(self, x, norm, linears, segments)
    }

    fn linear_onto(
        &self,
        onto: Rows,
        x: &Rows,
        linear: &Linear<Self>,
        segments: &[Segment],
    ) -> Result<Rows, BackendError> {
        product::linear_onto(self, onto, x, linear, segments)
    }

    fn gated_mlp(&self, x: &Rows, mlp: &GatedMlp<Self>, segments: &[Segment]) -> Result<Rows, BackendError> {
        product::gated_mlp(self, None, Some(x), None, mlp, segments)
    }

    fn gated_mlp_onto(
        &self,
        x: Rows,
        norm: Norm<'_, Self>,
        mlp: &GatedMlp<Self>,
        segments: &[Segment],
    ) -> Result<Rows, BackendError> {
        expect("rms norm", "columns", x.width(), norm.weight.len())?;
        product::gated_mlp(self, Some(x), None, Some(norm), mlp, segments)
    }

    fn angles(&self, positions: &[u32], inverse_frequencies: &[f32]) -> Result<Angles, BackendError> {
        Ok(Angles::new(positions, inverse_frequencies))
    }

    fn rotary(&self, mut x: Rows, head_size: usize, angles: &Angles) -> Result<Rows, BackendError> {
        expect("rotary", "positions", x.len(), angles.rows())?;
        expect("rotary", "frequencies", head_size / 2, angles.half())?;
        rotary::rotate(self, &mut x, angles);
        Ok(x)
    }

    fn attention(
        &self,
        q: &Rows,
        k: &Rows,
        v: &Rows,
        shape: &AttentionShape,
        spans: &[SequenceSpan],
        cache: Option<(&mut PagedCache, usize)>,
    ) -> Result<Rows, BackendError> {
        attention::attention(self, q, k, v, shape, spans, &[], cache)
    }

    fn rotary_attention(
        &self,
        [q, k, v]: [Rows; 3],
        angles: &Angles,
        shape: &AttentionShape,
        spans: &[SequenceSpan],
        kept: &[usize],
        cache: Option<(&mut PagedCache, usize)>,
    ) -> Result<Rows, BackendError> {
        let rotate = |rows| self.rotary(rows, shape.head_size, angles);
        attention::attention(self, &rotate(q)?, &rotate(k)?, &v, shape, spans, kept, cache)
    }

    fn add(&self, mut x: Rows, y: &Rows) -> Result<Rows, BackendError> {
        expect("add", "numbers", x.values().len(), y.values().len())?;
        x.values_mut().iter_mut().zip(y.values()).for_each(|(x, y)| *x += y);
        Ok(x)
    }

    fn select(&self, x: &Rows, rows: &[u32]) -> Result<Rows, BackendError> {
        let mut selected = self.rows(rows.len(), x.width());
        for (to, &from) in selected.iter_mut().zip(rows) {
            if from as usize >= x.len() {
                let (expected, got) = (format!("rows below {}", x.len()), from.to_string());
                return Err(BackendError::Shape { operation: "select", expected, got });
            }
            to.copy_from_slice(x.row(from as usize));
        }
        Ok(selected)
    }

    fn logits(&self, x: &Rows, head: &Matrix) -> Result<Rows, BackendError> {
        expect("logits", "columns", head.columns(), x.width())?;
        product::plain(self, x, head)
    }

    fn choose(&self, logits: &Rows, draws: &[(u32, Draw)]) -> Result<Vec<Choice>, BackendError> {
        choose::choose(self, logits, draws)
    }

    fn host(&self, x: Rows) -> Result<Vec<f32>, BackendError> {
        Ok(x.into_values())
    }

    fn bytes(&self, matrix: &Matrix, out: usize, inp: usize) -> usize {
        matrix.prefix_bytes(out, inp)
    }

    fn arithmetic(&self, matrix: &Matrix) -> Arithmetic {
        match Form::of(matrix) {
            Form::Quants => Arithmetic::Int8,
            Form::Bf16 => Arithmetic::Bf16,
            Form::F32 => Arithmetic::F32,
        }
    }

    fn cache_bytes(&self, cache: &PagedCache) -> usize {
        cache.bytes()
    }
}

/// A count that must be another, else the operation does not fit.
fn expect(operation: &'static str, what: &str, expected: usize, got: usize) -> Result<(), BackendError> {
    if expected == got {
        return Ok(());
    }
    let (expected, got) = (format!("{expected} {what}"), got.to_string());
    Err(BackendError::Shape { operation, expected, got })
}
