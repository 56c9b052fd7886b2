//! The backend for NVIDIA GPUs: our own kernels (`kernels/*.cu`), started through the driver.
//!
//! Adapters and what products take are bf16, weights bf16 or blocks that become it, every sum is f32, and so is what is added to: the residual. A row's
//! result does not depend on the rows beside it: each lane of a warp takes the same inputs in the same order always.
//!
//! Operations only write down what is to be done (`step`); it is done when somebody wants a result.
#![allow(unsafe_code)]

mod arena;
mod attention;
mod batch;
mod contexts;
mod device;
mod error;
mod few;
mod kernel;
mod limits;
mod many;
mod measure;
mod product;
mod rows;
mod sample;
mod step;
#[cfg(test)]
mod tests;
mod weights;

pub use attention::Cache;
pub use error::DeviceError;
pub use limits::{Limits, LimitsMeter};
pub use measure::{LayerSizes, Measured, OperationFigure, operations};
pub use rows::{Angles, Rows};
pub use step::Counts;
pub use weights::{Dtype, Matrix, Vector};

use super::{
    Activation, Arithmetic, AttentionShape, Backend, BackendError, CacheLayout, Choice, Draw, GatedMlp,
    Linear, Norm, Segment, SequenceSpan,
};
use crate::weights::{HostData, HostMatrix, HostVector};
use device::{Device, How};
use kernel::{Argument, Grid, Kernel, int};
use rows::Form;
use std::sync::Arc;

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

/// One GPU. Its clones share the stream, and what is written down for it.
#[derive(Clone)]
pub struct Cuda {
    device: Arc<Device>,
    dtype: Dtype,
    kv: KvDtype,
}

impl std::fmt::Debug for Cuda {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cuda").field("name", &self.device.name()).field("kv", &self.kv).finish()
    }
}

impl Cuda {
    /// Base weights are bf16, see [`Self::with_dtype`].
    ///
    /// # Errors
    /// No driver, no such GPU, or one that is too old.
    pub fn open(ordinal: usize) -> Result<Self, DeviceError> {
        Self::open_as(ordinal, How::RULE)
    }

    /// With memory of their own for all activations: slow, and the emulator sees whatever goes beyond it.
    #[cfg(test)]
    fn apart(ordinal: usize) -> Result<Self, DeviceError> {
        Self::open_as(ordinal, How { apart: true, ..How::RULE })
    }

    /// The same with the kernels that other GPUs than Hopper's take.
    #[cfg(test)]
    fn apart_without_wgmma(ordinal: usize) -> Result<Self, DeviceError> {
        Self::open_as(ordinal, How { apart: true, wgmma: false, ..How::RULE })
    }

    fn open_as(ordinal: usize, how: How) -> Result<Self, DeviceError> {
        let device = Arc::new(Device::open(ordinal, how)?);
        Ok(Self { device, dtype: Dtype::Bf16, kv: KvDtype::default() })
    }

    /// With base weights that are kept so.
    #[must_use]
    pub fn with_dtype(self, dtype: Dtype) -> Self {
        Self { dtype, ..self }
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

    /// What has been asked of the driver so far.
    pub fn counts(&self) -> Counts {
        self.device.counts()
    }
}

fn unfit(operation: &'static str, expected: &str, got: String) -> BackendError {
    BackendError::Shape { operation, expected: expected.into(), got }
}

fn check_norm(norm: &'static str, x: &Rows, vector: &Vector) -> Result<(), BackendError> {
    if vector.len() == x.width {
        return Ok(());
    }
    Err(unfit(norm, &format!("a vector of {}", x.width), vector.len().to_string()))
}

/// In the form that products take.
fn rms_norm(cuda: &Cuda, x: &Rows, norm: Norm<'_, Cuda>) -> Result<Rows, BackendError> {
    check_norm("rms_norm", x, norm.weight)?;
    let x = x.read_as(&cuda.device, Form::F32)?;
    let y = Rows::new(&cuda.device, x.length, x.width, Form::Bf16)?;
    let weight = Argument::Address(norm.weight.address());
    let arguments =
        [x.argument(), weight, y.argument(), int(x.stride), int(x.width), Argument::Float(norm.eps)];
    // SAFETY: the arguments of `rms_norm`, of one size.
    unsafe { cuda.device.push(Kernel::RmsNorm, Grid::by_row(x.length, x.width), &arguments) };
    Ok(y)
}

impl Backend for Cuda {
    type Rows = Rows;
    type Matrix = Matrix;
    type Vector = Vector;
    type Cache = Cache;
    type Angles = Angles;

    fn matrix(&self, host: HostMatrix) -> Result<Matrix, BackendError> {
        Matrix::upload(&self.device, host, self.dtype)
    }

    /// Half a byte is too coarse for an embedding, unless the file has it so.
    fn table(&self, host: HostMatrix) -> Result<Matrix, BackendError> {
        let in_blocks = matches!(host.data, HostData::Blocks(_));
        let dtype = match self.dtype {
            Dtype::Int4 if in_blocks => Dtype::Auto,
            Dtype::Int4 => Dtype::Int8,
            dtype => dtype,
        };
        Matrix::upload(&self.device, host, dtype)
    }

    fn adapter(&self, a: HostMatrix, b: HostMatrix, beside: &Matrix) -> Result<[Matrix; 2], BackendError> {
        if (a.columns, b.rows, a.rows) != (beside.columns, beside.rows, b.columns) {
            let got = format!("A ({}, {}) and B ({}, {})", a.rows, a.columns, b.rows, b.columns);
            return Err(unfit(
                "adapter",
                &format!("A (R, {}) and B ({}, R)", beside.columns, beside.rows),
                got,
            ));
        }
        Ok([Matrix::upload_bf16(&self.device, a)?, Matrix::upload_bf16(&self.device, b)?])
    }

    fn vector(&self, host: HostVector) -> Result<Vector, BackendError> {
        Vector::upload(&self.device, host)
    }

    fn cache(&self, layout: CacheLayout) -> Result<Cache, BackendError> {
        Cache::new(&self.device, layout, self.kv)
    }

    fn embed(&self, table: &Matrix, tokens: &[u32]) -> Result<Rows, BackendError> {
        if let Some(token) = tokens.iter().find(|&&token| token as usize >= table.rows) {
            return Err(unfit("embed", &format!("a token of {}", table.rows), token.to_string()));
        }
        let y = Rows::new(&self.device, tokens.len(), table.columns, Form::F32)?;
        let at = Argument::Address(self.device.stage(tokens)?);
        let view = table.view();
        let arguments = [Argument::Struct(&view), at, y.argument(), int(y.stride), int(y.width)];
        // SAFETY: the arguments of `embed`; tokens lie within the table, as checked.
        unsafe { self.device.push(Kernel::Embed, Grid::by_row(y.length, y.width), &arguments) };
        Ok(y)
    }

    fn rms_norm(&self, x: &Rows, weight: &Vector, eps: f32) -> Result<Rows, BackendError> {
        rms_norm(self, x, Norm { weight, eps })
    }

    fn head_norm(&self, x: &Rows, weight: &Vector, eps: f32) -> Result<Rows, BackendError> {
        let size = weight.len();
        if size == 0 || !x.width.is_multiple_of(size) {
            return Err(unfit("head_norm", &format!("columns in heads of {size}"), x.width.to_string()));
        }
        let x = x.read_as(&self.device, Form::F32)?;
        let y = Rows::new(&self.device, x.length, x.width, Form::F32)?;
        let (weight, sizes) = (Argument::Address(weight.address()), [int(x.stride), int(x.width), int(size)]);
        let [stride, width, size] = sizes;
        let arguments = [x.argument(), weight, y.argument(), stride, width, size, Argument::Float(eps)];
        // SAFETY: the arguments of `head_norm`; both have rows of one width and stride, in whole heads, as checked.
        unsafe { self.device.push(Kernel::HeadNorm, Grid::by_row(y.length, y.width), &arguments) };
        Ok(y)
    }

    fn layer_norm(&self, x: &Rows, weight: &Vector, bias: &Vector, eps: f32) -> Result<Rows, BackendError> {
        check_norm("layer_norm", x, weight)?;
        check_norm("layer_norm", x, bias)?;
        let x = x.read_as(&self.device, Form::F32)?;
        let form = |form| Rows::new(&self.device, x.length, x.width, form);
        let (y, rounded) = (form(Form::F32)?, form(Form::Bf16)?);
        let [weight, bias] = [weight, bias].map(|vector| Argument::Address(vector.address()));
        let (stride, width, eps) = (int(x.stride), int(x.width), Argument::Float(eps));
        let arguments = [x.argument(), weight, bias, y.argument(), rounded.argument(), stride, width, eps];
        // SAFETY: the arguments of `layer_norm`, of one size.
        unsafe { self.device.push(Kernel::LayerNorm, Grid::by_row(x.length, x.width), &arguments) };
        Ok(y.with_rounded(rounded))
    }

    /// In the form that products take.
    fn activate(&self, x: Rows, activation: Activation) -> Result<Rows, BackendError> {
        let x = x.read_as(&self.device, Form::F32)?;
        let y = Rows::new(&self.device, x.length, x.width, Form::Bf16)?;
        // As kernels/rows.cu numbers them.
        let number = match activation {
            Activation::Gelu => 0,
            Activation::GeluTanh => 1,
            Activation::Tanh => 2,
            Activation::Relu => 3,
        };
        let [count, width, stride] = y.each();
        let arguments = [x.argument(), y.argument(), count, width, stride, Argument::Int(number)];
        // SAFETY: the arguments of `activate`; rows of one length and stride.
        unsafe { self.device.push(Kernel::Activate, Grid::each(y.numbers()), &arguments) };
        Ok(y)
    }

    /// Nothing is copied: each part is columns of `x`, which attention reads where they stand.
    fn split<const N: usize>(&self, x: &Rows) -> Result<[Rows; N], BackendError> {
        if N == 0 || !x.width.is_multiple_of(N) {
            return Err(unfit("split", &format!("columns in {N} equal parts"), x.width.to_string()));
        }
        let width = x.width / N;
        let converted = if x.form == Form::F32 { None } else { Some(x.converted(&self.device, Form::F32)?) };
        let x = converted.as_ref().unwrap_or(x);
        Ok(std::array::from_fn(|i| x.part(i * width, width)))
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
        self.linear(&product::gate_up(self, x, None, mlp, segments)?, &mlp.down, segments)
    }

    fn gated_mlp_onto(
        &self,
        x: Rows,
        norm: Norm<'_, Self>,
        mlp: &GatedMlp<Self>,
        segments: &[Segment],
    ) -> Result<Rows, BackendError> {
        let gated = product::gate_up(self, &x, Some(norm), mlp, segments)?;
        product::linear_onto(self, x, &gated, &mlp.down, segments)
    }

    fn angles(&self, positions: &[u32], inverse_frequencies: &[f32]) -> Result<Angles, BackendError> {
        Ok(Angles::new(positions, inverse_frequencies))
    }

    fn rotary(&self, x: Rows, head_size: usize, angles: &Angles) -> Result<Rows, BackendError> {
        check_rotary(&x, head_size, angles)?;
        let x = x.into_form(&self.device, Form::F32)?;
        let arguments =
            [x.argument(), int(x.stride), angles.staged(&self.device)?, int(x.width), int(angles.half)];
        // SAFETY: the arguments of `rotary`, of sizes that fit, as checked.
        unsafe { self.device.push(Kernel::Rotary, Grid::by_row(x.length, x.width / 2), &arguments) };
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
        let are_as_they_should = [q, k, v].iter().all(|rows| rows.form == Form::F32) && k.stride == v.stride;
        if are_as_they_should {
            let step = attention::Step { q, k, v, angles: None, shape, spans };
            return attention::attention(self, &step, cache);
        }
        let read = |rows| Rows::read_as(rows, &self.device, Form::F32);
        let (q, k, v) = (&*read(q)?, &*read(k)?, &*read(v)?);
        attention::attention(self, &attention::Step { q, k, v, angles: None, shape, spans }, cache)
    }

    fn rotary_attention(
        &self,
        [q, k, v]: [Rows; 3],
        angles: &Angles,
        shape: &AttentionShape,
        spans: &[SequenceSpan],
        _kept: &[usize],
        cache: Option<(&mut Cache, usize)>,
    ) -> Result<Rows, BackendError> {
        let [q, k, v] = [q, k, v].map(|rows| rows.into_form(&self.device, Form::F32));
        let (q, k, v) = (q?, k?, v?);
        check_rotary(&q, shape.head_size, angles)?;
        check_rotary(&k, shape.head_size, angles)?;
        let step = attention::Step { q: &q, k: &k, v: &v, angles: Some(angles), shape, spans };
        attention::attention(self, &step, cache)
    }

    fn add(&self, x: Rows, y: &Rows) -> Result<Rows, BackendError> {
        if (x.length, x.width) != (y.length, y.width) {
            let got = format!("({}, {})", y.length, y.width);
            return Err(unfit("add", &format!("({}, {})", x.length, x.width), got));
        }
        let (x, y) = (x.into_form(&self.device, Form::F32)?, y.read_as(&self.device, Form::F32)?);
        let [count, width, stride] = x.each();
        let arguments = [x.argument(), y.argument(), count, width, stride];
        // SAFETY: the arguments of `add_rows`, of one size.
        unsafe { self.device.push(Kernel::AddRows, Grid::each(x.numbers()), &arguments) };
        Ok(x)
    }

    fn select(&self, x: &Rows, rows: &[u32]) -> Result<Rows, BackendError> {
        if let Some(row) = rows.iter().find(|&&row| row as usize >= x.length) {
            return Err(unfit("select", &format!("a row of {}", x.length), row.to_string()));
        }
        let x = x.read_as(&self.device, x.form)?;
        let y = Rows::new(&self.device, rows.len(), x.width, x.form)?;
        let words = x.stride * x.form.bytes() / size_of::<u32>();
        let at = Argument::Address(self.device.stage(rows)?);
        let arguments = [x.argument(), at, y.argument(), int(words)];
        // SAFETY: the arguments of `select_rows`; the rows are there, as checked.
        unsafe { self.device.push(Kernel::SelectRows, Grid::by_row(y.length, words), &arguments) };
        Ok(y)
    }

    fn logits(&self, x: &Rows, head: &Matrix) -> Result<Rows, BackendError> {
        product::logits(self, x, head)
    }

    fn choose(&self, logits: &Rows, draws: &[(u32, Draw)]) -> Result<Vec<Choice>, BackendError> {
        sample::choose(self, logits, draws)
    }

    fn log_probabilities(
        &self,
        logits: Rows,
        rows: usize,
        tokens: &[(u32, u32)],
    ) -> Result<Vec<f32>, BackendError> {
        sample::log_probabilities(self, &logits, rows, tokens)
    }

    fn host(&self, x: Rows) -> Result<Vec<f32>, BackendError> {
        x.fetch(&self.device)
    }

    fn finish(&self) -> Result<(), BackendError> {
        self.device.run()
    }

    fn forget(&self) {
        self.device.forget();
    }

    fn keeps_step_memory(&self) -> Result<bool, BackendError> {
        attention::take_most(&self.device)?;
        Ok(true)
    }

    fn bytes(&self, matrix: &Matrix, out: usize, inp: usize) -> usize {
        matrix.prefix_bytes(out, inp)
    }

    fn arithmetic(&self, _matrix: &Matrix) -> Arithmetic {
        Arithmetic::Bf16
    }

    fn cache_bytes(&self, cache: &Cache) -> usize {
        cache.bytes()
    }
}

/// Rows that the angles turn.
fn check_rotary(x: &Rows, head_size: usize, angles: &Angles) -> Result<(), BackendError> {
    let fits = head_size == 2 * angles.half && x.length == angles.rows;
    if fits && head_size > 0 && x.width.is_multiple_of(head_size) {
        return Ok(());
    }
    let got = format!("({}, {}) in heads of {head_size}", x.length, x.width);
    Err(unfit("rotary", &format!("{} rows in heads of {}", angles.rows, 2 * angles.half), got))
}
