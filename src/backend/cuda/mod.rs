//! The backend for NVIDIA GPUs: our own kernels (`kernels/*.cu`), started through the driver.
//!
//! Weights and adapters are bf16 in device memory, every sum is f32, and so are the activations between kernels. A row's
//! result does not depend on the rows beside it: each lane of a warp takes the same inputs in the same order always.
#![allow(unsafe_code)]

mod attention;
mod batch;
mod device;
mod limits;
#[cfg(test)]
mod tests;
mod weights;

pub use attention::Cache;
pub use device::DeviceError;
pub use limits::{Limits, LimitsMeter};
pub use weights::{Matrix, Vector};

use super::{
    Arithmetic, AttentionShape, Backend, BackendError, CacheLayout, GatedMlp, Linear, Segment, SequenceSpan,
};
use crate::weights::{HostMatrix, HostVector};
use batch::{LinearBatch, height};
use cudarc::driver::CudaSlice;
use device::{Argument, Device, Grid, Kernel};
use std::sync::Arc;

/// Threads, and outputs, of a block of kernels/low_rank.cu.
const PRODUCT_THREADS: usize = 256;
const BLOCK_OUTPUTS: usize = 16;
/// Bytes of shared memory for one row's inputs there.
const STAGE_BYTES: usize = 512 * size_of::<f32>();

/// How keys and values are kept in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum KvDtype {
    F32,
    #[default]
    Bf16,
}

impl KvDtype {
    fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
        }
    }
}

/// One GPU.
#[derive(Clone)]
pub struct Cuda {
    device: Arc<Device>,
    kv: KvDtype,
}

impl std::fmt::Debug for Cuda {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cuda").field("name", &self.device.name()).field("kv", &self.kv).finish()
    }
}

impl Cuda {
    /// # Errors
    /// No driver, no such GPU, or one that is too old.
    pub fn open(ordinal: usize) -> Result<Self, DeviceError> {
        Ok(Self { device: Arc::new(Device::open(ordinal)?), kv: KvDtype::default() })
    }

    #[must_use]
    pub fn with_kv(self, kv: KvDtype) -> Self {
        Self { kv, ..self }
    }

    /// The GPU's name.
    pub fn name(&self) -> &str {
        self.device.name()
    }

    /// Bytes of device memory that are free and that there are.
    ///
    /// # Errors
    /// The driver's.
    pub fn memory(&self) -> Result<(usize, usize), DeviceError> {
        self.device.memory()
    }

    fn room(&self, length: usize, width: usize) -> Result<Rows, BackendError> {
        Ok(Rows { length, width, values: self.device.room("activations", length * width)? })
    }

    /// Adds to `onto`, or makes new rows.
    fn product(
        &self,
        x: &Rows,
        linear: &Linear<Self>,
        segments: &[Segment],
        onto: Option<Rows>,
    ) -> Result<Rows, BackendError> {
        let device = &*self.device;
        let weight = &*linear.weight;
        if let Some(bias) = linear.bias.as_ref().filter(|bias| bias.len() != weight.rows) {
            return Err(unfit("linear", format!("a bias of {}", weight.rows), bias.len().to_string()));
        }
        let batch = LinearBatch::new(device, linear, x.length, x.width, segments)?;
        let shrunk = self.room(x.length, batch.rank)?;
        let (sizes, adapters) = (batch.sizes(device), batch.adapters(device));
        let (rows, shared) = (1 << batch.height, STAGE_BYTES << batch.height);
        if batch.rank > 0 {
            let blocks = (batch.rank.div_ceil(BLOCK_OUTPUTS), batch.tile_count);
            let arguments = [
                x.argument(device),
                int(x.width),
                batch.tiles(device),
                sizes,
                adapters,
                shrunk.argument(device),
                int(batch.rank),
            ];
            let grid = Grid { shared, ..Grid::new(blocks, PRODUCT_THREADS) };
            // SAFETY: the arguments of `shrink`; tiles and sizes lie within the rows and matrices, as `LinearBatch` has checked.
            unsafe {
                device.launch(Kernel::Shrink(batch.height), grid, &arguments)?;
            }
        }
        let (y, adds) = match onto {
            Some(rows) => (rows, 1),
            None => (self.room(x.length, weight.rows)?, 0),
        };
        let bias = linear.bias.as_ref().map_or(Argument::Address(0), |bias| bias.argument(device));
        let arguments = [
            x.argument(device),
            int(x.width),
            weight.argument(device),
            int(weight.stride),
            bias,
            int(weight.rows),
            int(weight.columns),
            int(x.length),
            sizes,
            adapters,
            shrunk.argument(device),
            int(batch.rank),
            y.argument(device),
            Argument::Int(adds),
        ];
        let blocks = (weight.rows.div_ceil(BLOCK_OUTPUTS), x.length.div_ceil(rows));
        let grid = Grid { shared, ..Grid::new(blocks, PRODUCT_THREADS) };
        // SAFETY: as above, of `expand`; `y` has room for every row's outputs.
        unsafe {
            device.launch(Kernel::Expand(batch.height), grid, &arguments)?;
        }
        Ok(y)
    }
}

fn int(n: usize) -> Argument {
    Argument::Int(n as i32)
}

fn unfit(operation: &'static str, expected: String, got: String) -> BackendError {
    BackendError::Shape { operation, expected, got }
}

/// Activations `(T, n)` in f32, in device memory.
pub struct Rows {
    length: usize,
    width: usize,
    values: CudaSlice<f32>,
}

impl Rows {
    fn len(&self) -> usize {
        self.length
    }

    fn width(&self) -> usize {
        self.width
    }

    fn argument(&self, device: &Device) -> Argument {
        Argument::Address(device.address(&self.values))
    }
}

/// Cosines, then sines, of each row's angles: `(T, D)`.
pub struct Angles {
    rows: usize,
    half: usize,
    values: CudaSlice<f32>,
}

impl Backend for Cuda {
    type Rows = Rows;
    type Matrix = Matrix;
    type Vector = Vector;
    type Cache = Cache;
    type Angles = Angles;

    fn matrix(&self, host: HostMatrix) -> Result<Matrix, BackendError> {
        Matrix::upload(&self.device, host)
    }

    fn adapter(&self, a: HostMatrix, b: HostMatrix, beside: &Matrix) -> Result<[Matrix; 2], BackendError> {
        if (a.columns, b.rows, a.rows) != (beside.columns, beside.rows, b.columns) {
            let got = format!("A ({}, {}) and B ({}, {})", a.rows, a.columns, b.rows, b.columns);
            return Err(unfit(
                "adapter",
                format!("A (R, {}) and B ({}, R)", beside.columns, beside.rows),
                got,
            ));
        }
        Ok([Matrix::upload(&self.device, a)?, Matrix::upload(&self.device, b)?])
    }

    fn vector(&self, host: HostVector) -> Result<Vector, BackendError> {
        Vector::upload(&self.device, &host)
    }

    fn cache(&self, layout: CacheLayout) -> Result<Cache, BackendError> {
        Cache::new(&self.device, layout, self.kv)
    }

    fn embed(&self, table: &Matrix, tokens: &[u32]) -> Result<Rows, BackendError> {
        if let Some(token) = tokens.iter().find(|&&token| token as usize >= table.rows) {
            return Err(unfit("embed", format!("a token of {}", table.rows), token.to_string()));
        }
        let y = self.room(tokens.len(), table.columns)?;
        let tokens = self.device.upload("tokens", tokens)?;
        let device = &*self.device;
        let at = Argument::Address(device.address(&tokens));
        let arguments = [table.argument(device), int(table.stride), at, y.argument(device), int(y.width)];
        // SAFETY: the arguments of `embed`; tokens lie within the table, as checked.
        unsafe { device.launch(Kernel::Embed, Grid::by_row(y.length, y.width), &arguments)? };
        Ok(y)
    }

    fn rms_norm(&self, x: &Rows, weight: &Vector, eps: f32) -> Result<Rows, BackendError> {
        if weight.len() != x.width {
            return Err(unfit("rms_norm", format!("a weight of {}", x.width), weight.len().to_string()));
        }
        let y = self.room(x.length, x.width)?;
        let device = &*self.device;
        let arguments = [
            x.argument(device),
            weight.argument(device),
            y.argument(device),
            int(x.width),
            Argument::Float(eps),
        ];
        // SAFETY: the arguments of `rms_norm`, of one size.
        unsafe { device.launch(Kernel::RmsNorm, Grid::by_row(x.length, x.width), &arguments)? };
        Ok(y)
    }

    fn linear(&self, x: &Rows, linear: &Linear<Self>, segments: &[Segment]) -> Result<Rows, BackendError> {
        self.product(x, linear, segments, None)
    }

    fn linear_onto(
        &self,
        onto: Rows,
        x: &Rows,
        linear: &Linear<Self>,
        segments: &[Segment],
    ) -> Result<Rows, BackendError> {
        if (onto.length, onto.width) != (x.length, linear.weight.rows) {
            let got = format!("({}, {})", onto.length, onto.width);
            return Err(unfit("linear", format!("({}, {})", x.length, linear.weight.rows), got));
        }
        self.product(x, linear, segments, Some(onto))
    }

    fn gated_mlp(&self, x: &Rows, mlp: &GatedMlp<Self>, segments: &[Segment]) -> Result<Rows, BackendError> {
        let gate = self.linear(x, &mlp.gate, segments)?;
        let up = self.linear(x, &mlp.up, segments)?;
        if up.width != gate.width {
            return Err(unfit("gated mlp", format!("an up of {}", gate.width), up.width.to_string()));
        }
        let count = gate.length * gate.width;
        let device = &*self.device;
        let arguments = [gate.argument(device), up.argument(device), Argument::Size(count)];
        // SAFETY: the arguments of `silu_multiply`, of one size.
        unsafe { device.launch(Kernel::SiluMultiply, Grid::each(count), &arguments)? };
        self.linear(&gate, &mlp.down, segments)
    }

    fn angles(&self, positions: &[u32], inverse_frequencies: &[f32]) -> Result<Angles, BackendError> {
        let (rows, half) = (positions.len(), inverse_frequencies.len());
        let mut angles = Vec::with_capacity(rows * 2 * half);
        for &position in positions {
            let angle = |frequency: &f32| position as f32 * frequency;
            angles.extend(inverse_frequencies.iter().map(|frequency| angle(frequency).cos()));
            angles.extend(inverse_frequencies.iter().map(|frequency| angle(frequency).sin()));
        }
        let values = self.device.upload("angles", &angles)?;
        Ok(Angles { rows, half, values })
    }

    fn rotary(&self, x: Rows, head_size: usize, angles: &Angles) -> Result<Rows, BackendError> {
        let fits = head_size == 2 * angles.half && x.length == angles.rows;
        if !fits || head_size == 0 || !x.width.is_multiple_of(head_size) {
            let got = format!("({}, {}) in heads of {head_size}", x.length, x.width);
            return Err(unfit(
                "rotary",
                format!("{} rows in heads of {}", angles.rows, 2 * angles.half),
                got,
            ));
        }
        let device = &*self.device;
        let by = Argument::Address(device.address(&angles.values));
        let arguments = [x.argument(device), by, int(x.width), int(angles.half)];
        // SAFETY: the arguments of `rotary`, of sizes that fit, as checked.
        unsafe { device.launch(Kernel::Rotary, Grid::by_row(x.length, x.width / 2), &arguments)? };
        Ok(x)
    }

    fn attention(
        &self,
        q: &Rows,
        k: &Rows,
        v: &Rows,
        shape: &AttentionShape,
        spans: &[SequenceSpan],
        cache: Option<(&mut Cache, usize)>,
    ) -> Result<Rows, BackendError> {
        attention::attention(self, &attention::Step { q, k, v, shape, spans }, cache)
    }

    fn add(&self, x: Rows, y: &Rows) -> Result<Rows, BackendError> {
        if (x.length, x.width) != (y.length, y.width) {
            let got = format!("({}, {})", y.length, y.width);
            return Err(unfit("add", format!("({}, {})", x.length, x.width), got));
        }
        let count = x.length * x.width;
        let device = &*self.device;
        let arguments = [x.argument(device), y.argument(device), Argument::Size(count)];
        // SAFETY: the arguments of `add_rows`, of one size.
        unsafe { device.launch(Kernel::AddRows, Grid::each(count), &arguments)? };
        Ok(x)
    }

    fn select(&self, x: &Rows, rows: &[u32]) -> Result<Rows, BackendError> {
        if let Some(row) = rows.iter().find(|&&row| row as usize >= x.length) {
            return Err(unfit("select", format!("a row of {}", x.length), row.to_string()));
        }
        let y = self.room(rows.len(), x.width)?;
        let rows = self.device.upload("rows", rows)?;
        let device = &*self.device;
        let at = Argument::Address(device.address(&rows));
        let arguments = [x.argument(device), at, y.argument(device), int(x.width)];
        // SAFETY: the arguments of `select_rows`; the rows are there, as checked.
        unsafe { device.launch(Kernel::SelectRows, Grid::by_row(y.length, y.width), &arguments)? };
        Ok(y)
    }

    fn logits(&self, x: &Rows, head: &Matrix) -> Result<Rows, BackendError> {
        if head.columns != x.width {
            return Err(unfit("logits", format!("a head of {} columns", x.width), head.columns.to_string()));
        }
        let y = self.room(x.length, head.rows)?;
        let (height, none) = (height(x.length), Argument::Address(0));
        let device = &*self.device;
        let arguments = [
            x.argument(device),
            int(x.width),
            head.argument(device),
            int(head.stride),
            none,
            int(head.rows),
            int(head.columns),
            int(x.length),
            none,
            none,
            none,
            Argument::Int(0),
            y.argument(device),
            Argument::Int(0),
        ];
        let blocks = (head.rows.div_ceil(BLOCK_OUTPUTS), x.length.div_ceil(1 << height));
        let grid = Grid { shared: STAGE_BYTES << height, ..Grid::new(blocks, PRODUCT_THREADS) };
        // SAFETY: the arguments of `expand`, of sizes that fit, as checked; without sizes it reads no adapter.
        unsafe { device.launch(Kernel::Expand(height), grid, &arguments)? };
        Ok(y)
    }

    fn host(&self, x: Rows) -> Result<Vec<f32>, BackendError> {
        self.device.download(&x.values, x.length * x.width)
    }

    fn bytes(&self, matrix: &Matrix, out: usize, inp: usize) -> usize {
        matrix.prefix_bytes(out, inp)
    }

    fn arithmetic(&self, _matrix: &Matrix) -> Arithmetic {
        Arithmetic::F32
    }

    fn cache_bytes(&self, cache: &Cache) -> usize {
        cache.bytes()
    }
}
