//! The reference backend: candle tensors, every operation differentiable. In f32; on a GPU with frozen weights in bf16.
//!
//! It trains, and it is the oracle for the other backends, so every operation is written to be read. candle's fused
//! norm, softmax, rotary and attention operations drop the gradient without an error and are not used. What dominates
//! a training step is an operation of our own with its backward pass beside it (`elastic`, `fused`; where that code
//! cannot run, `composed`); everything else is composed.

mod attention;
mod composed;
mod compute;
mod dropout;
mod elastic;
mod fused;
mod gpu;
mod gradients;
mod loops;
mod product;
#[cfg(test)]
mod tests;
mod training;

pub use compute::{Compute, ComputeError};
pub use gradients::{BothWays, Gradients, Stages};
pub use training::{AdamW, AdamWOptions, AdamWState, NamedTensor};

use super::{
    Activation, Adapter, Arithmetic, AttentionShape, Backend, BackendError, CacheLayout, GatedMlp, Linear,
    Segment, SequenceSpan, Sight,
};
use crate::supernet::ActiveLinear;
use crate::weights::{HostMatrix, HostVector};
use attention::{PagedCache, attend, attend_padded};
use candle_core::{D, DType, Device, Tensor, Var};
use dropout::{Mask, Position};
use elastic::{Elastic, Frozen};
use fused::{Gated, RmsNorm, Rotary, Turns};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// candle, on the processor or a GPU.
pub struct Reference {
    compute: Compute,
    /// That one product may use.
    threads: usize,
    training: Option<Training>,
    /// Present while inputs are being measured.
    measured: Option<Measured>,
}

/// What is measured of the inputs of some Linears.
struct Measured {
    linears: BTreeSet<usize>,
    products: Mutex<InputProducts>,
}

/// By Linear, `(C, C)`: of each two of its inputs the sum, over all rows, of the product of what they were.
pub type InputProducts = BTreeMap<usize, Tensor>;

/// What only a backend that trains has.
struct Training {
    /// Of dropping an element of an adapter's input.
    probability: f64,
    seed: u64,
    state: Mutex<TrainingState>,
}

struct TrainingState {
    position: Position,
    /// Every adapter tensor that was loaded, in loading order.
    variables: Vec<(String, Var)>,
}

impl Reference {
    /// For inference: no variable, no dropout.
    pub fn new() -> Self {
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        Self { compute: Compute::cpu(), threads, training: None, measured: None }
    }

    /// For inference beside a training's threads.
    pub fn on_one_thread() -> Self {
        Self { threads: 1, ..Self::new() }
    }

    /// The same on another device or in other numbers; before anything is loaded.
    pub fn on(self, compute: Compute) -> Self {
        Self { compute, ..self }
    }

    pub fn compute(&self) -> &Compute {
        &self.compute
    }

    /// For inference that also measures how strongly the inputs of some Linears are used, each and each two together; see
    /// [`Self::take_input_products`].
    pub fn measuring_inputs(linears: impl IntoIterator<Item = usize>) -> Self {
        let measured = Measured { linears: linears.into_iter().collect(), products: Mutex::default() };
        Self { measured: Some(measured), ..Self::new() }
    }

    /// What was measured since it was last taken, which then begins anew: a matrix for each of those Linears that has run.
    pub fn take_input_products(&self) -> InputProducts {
        self.measured.as_ref().map(|m| std::mem::take(&mut *lock(&m.products))).unwrap_or_default()
    }

    /// `products * (weight^T weight)`, elementwise, row-major `(C, C)`: of each two inputs what they add to the outputs together,
    /// of `weight (out, C)`.
    pub fn weigh_input_products(
        &self,
        products: &Tensor,
        weight: &HostMatrix,
    ) -> Result<Vec<f32>, BackendError> {
        let weighed = || {
            let weight = self.tensor(weight, DType::F32)?;
            (products * weight.t()?.matmul(&weight)?)?.flatten_all()?.to_vec1()
        };
        named("input products", weighed())
    }

    /// For training: adapters become variables; their input is dropped out with probability `dropout` in `[0, 1)`.
    /// Its products use one thread: a training runs several of these side by side, see [`Self::beside`].
    pub fn for_training(dropout: f64, seed: u64) -> Self {
        let state = TrainingState { position: Position::of(seed, 0), variables: Vec::new() };
        let training = Training { probability: dropout, seed, state: Mutex::new(state) };
        Self { compute: Compute::cpu(), threads: 1, training: Some(training), measured: None }
    }

    /// Another one for the same model on another thread, with the dropout of its own that `seed` decides. The variables
    /// stay with the first.
    pub fn beside(&self, seed: u64) -> Self {
        let dropout = self.training.as_ref().map_or(0.0, |t| t.probability);
        Self::for_training(dropout, seed).on(self.compute.clone())
    }

    /// In numbers of this type; rounded before it goes to the device, which need not have room for more.
    fn tensor(&self, host: &HostMatrix, numbers: DType) -> candle_core::Result<Tensor> {
        let values = Tensor::from_vec(host.to_f32(), (host.rows, host.columns), &Device::Cpu)?;
        values.to_dtype(numbers)?.to_device(&self.compute.device)
    }

    /// Which of so many elements stay, by the training's probability; `None` for all of them.
    fn dropout(&self, elements: usize) -> Option<Mask> {
        let training = self.training.as_ref().filter(|training| training.probability > 0.0)?;
        Some(lock(&training.state).position.draw(elements, training.probability))
    }

    /// Starts the dropout of one micro-batch, the same whatever ran before.
    pub fn start_dropout(&self, micro_batch: u64) {
        if let Some(training) = &self.training {
            self.continue_dropout(Some(Position::of(training.seed, micro_batch)));
        }
    }

    /// Where the dropout is, where there is any.
    fn dropout_position(&self) -> Option<Position> {
        self.training.as_ref().map(|training| lock(&training.state).position)
    }

    /// Draws the same masks once more that were drawn after this position.
    fn continue_dropout(&self, position: Option<Position>) {
        if let Some((training, position)) = self.training.as_ref().zip(position) {
            lock(&training.state).position = position;
        }
    }

    /// `W[:o,:i] x + b[:o] + s B[:o,:r] (A[:r,:i] x)` for the rows `x (t, i)` of one segment.
    fn elastic(
        &self,
        x: &Tensor,
        linear: &Linear<Self>,
        active: ActiveLinear,
        adapter: usize,
    ) -> candle_core::Result<Tensor> {
        if let Some(measured) = self.measured.as_ref().filter(|m| m.linears.contains(&linear.index)) {
            measured.add(linear.index, x)?;
        }
        let (weight, threads) = (Tensor::clone(&linear.weight), self.threads);
        if active.is_nothing() {
            // No product, and so nothing to learn.
            let nothing = Tensor::zeros((x.dim(0)?, active.out), DType::F32, x.device())?;
            return match &linear.bias {
                Some(bias) if active.out > 0 => nothing.broadcast_add(&bias.narrow(0, 0, active.out)?),
                _ => Ok(nothing),
            };
        }
        let y = match linear.adapters.get(adapter).and_then(Option::as_ref) {
            Some(Adapter { a, b, scale }) => {
                let dropout = self.dropout(x.elem_count());
                let elastic = Elastic { dropout, ..Elastic::new(weight, active, *scale, threads) };
                self.compute.run3(elastic, x, a, b)?
            }
            None => self.compute.run1(Frozen { weight, out: active.out, inp: active.inp, threads }, x)?,
        };
        match &linear.bias {
            Some(bias) => y.broadcast_add(&bias.narrow(0, 0, active.out)?),
            None => Ok(y),
        }
    }

    /// Runs `compute` on each segment's rows and puts the results below each other, padded with zeros to `width`.
    fn for_each_segment(
        &self,
        x: &Tensor,
        segments: &[Segment],
        width: usize,
        compute: impl Fn(&Tensor, &Segment) -> candle_core::Result<Tensor>,
    ) -> candle_core::Result<Tensor> {
        let padded = |segment: &Segment| {
            let y = compute(&x.narrow(0, segment.rows.start, segment.rows.len())?, segment)?;
            match width - y.dim(1)? {
                0 => Ok(y),
                all if all == width => Tensor::zeros((y.dim(0)?, width), DType::F32, y.device()),
                missing => y.pad_with_zeros(1, 0, missing),
            }
        };
        match segments {
            [only] if only.rows.len() == x.dim(0)? => padded(only),
            _ => Tensor::cat(&segments.iter().map(padded).collect::<candle_core::Result<Vec<_>>>()?, 0),
        }
    }

    /// An adapter's A or B; where this backend trains, as a variable.
    fn adapter_matrix(&self, host: HostMatrix) -> Result<Tensor, BackendError> {
        let tensor = named("adapter matrix", self.tensor(&host, DType::F32))?;
        let Some(training) = &self.training else { return Ok(tensor) };
        let variable = named("adapter matrix", Var::from_tensor(&tensor))?;
        let tensor = variable.as_tensor().clone();
        lock(&training.state).variables.push((host.name, variable));
        Ok(tensor)
    }
}

impl Default for Reference {
    fn default() -> Self {
        Self::new()
    }
}

/// A panic while one of this backend's locks was held leaves the state valid: it is only ever advanced.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Measured {
    fn add(&self, linear: usize, x: &Tensor) -> candle_core::Result<()> {
        let products = x.t()?.matmul(x)?;
        let mut all = lock(&self.products);
        let sum = match all.remove(&linear) {
            Some(so_far) => (so_far + products)?,
            None => products,
        };
        all.insert(linear, sum);
        Ok(())
    }
}

/// Names the operation in an error that candle gave.
fn named<T>(operation: &'static str, result: candle_core::Result<T>) -> Result<T, BackendError> {
    result.map_err(|e| BackendError::Library { operation, message: e.to_string() })
}

impl Backend for Reference {
    type Rows = Tensor;
    type Matrix = Tensor;
    type Vector = Tensor;
    type Cache = PagedCache;
    type Angles = Turns;

    fn matrix(&self, host: HostMatrix) -> Result<Tensor, BackendError> {
        named("matrix", self.tensor(&host, self.compute.weights))
    }

    fn adapter(&self, a: HostMatrix, b: HostMatrix, _: &Tensor) -> Result<[Tensor; 2], BackendError> {
        Ok([self.adapter_matrix(a)?, self.adapter_matrix(b)?])
    }

    fn vector(&self, host: HostVector) -> Result<Tensor, BackendError> {
        let length = host.data.len();
        named("vector", Tensor::from_vec(host.data, length, &self.compute.device))
    }

    fn cache(&self, layout: CacheLayout) -> Result<PagedCache, BackendError> {
        PagedCache::new(layout)
    }

    fn embed(&self, table: &Tensor, tokens: &[u32]) -> Result<Tensor, BackendError> {
        let rows =
            || table.index_select(&Tensor::new(tokens, &self.compute.device)?, 0)?.to_dtype(DType::F32);
        named("embed", rows())
    }

    fn rms_norm(&self, x: &Tensor, weight: &Tensor, eps: f32) -> Result<Tensor, BackendError> {
        named("rms norm", self.compute.run1(RmsNorm { weight: weight.clone(), eps }, x))
    }

    fn head_norm(&self, x: &Tensor, weight: &Tensor, eps: f32) -> Result<Tensor, BackendError> {
        let normed = || {
            let ((rows, width), size) = (x.dims2()?, weight.dim(0)?);
            let heads = x.reshape((rows * width / size, size))?;
            self.compute.run1(RmsNorm { weight: weight.clone(), eps }, &heads)?.reshape((rows, width))
        };
        named("head norm", normed())
    }

    fn layer_norm(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        eps: f32,
    ) -> Result<Tensor, BackendError> {
        let normed = || {
            let centred = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
            let deviation = (centred.sqr()?.mean_keepdim(D::Minus1)? + f64::from(eps))?.sqrt()?;
            centred.broadcast_div(&deviation)?.broadcast_mul(weight)?.broadcast_add(bias)
        };
        named("layer norm", normed())
    }

    fn activate(&self, x: Tensor, activation: Activation) -> Result<Tensor, BackendError> {
        let active = match activation {
            Activation::Gelu => x.gelu_erf(),
            Activation::GeluTanh => x.gelu(),
            Activation::Tanh => x.tanh(),
            Activation::Relu => x.relu(),
        };
        named("activation", active)
    }

    fn split<const N: usize>(&self, x: &Tensor) -> Result<[Tensor; N], BackendError> {
        let parts = named("split", x.chunk(N, D::Minus1))?;
        let contiguous = parts.iter().map(Tensor::contiguous).collect::<candle_core::Result<Vec<_>>>();
        let parts = named("split", contiguous)?.try_into();
        parts.map_err(|parts: Vec<_>| BackendError::Shape {
            operation: "split",
            expected: format!("{N} parts"),
            got: parts.len().to_string(),
        })
    }

    fn linear(
        &self,
        x: &Tensor,
        linear: &Linear<Self>,
        segments: &[Segment],
    ) -> Result<Tensor, BackendError> {
        let product = || {
            let width = linear.weight.dim(0)?;
            self.for_each_segment(x, segments, width, |x, segment| {
                let active = segment.selection.shape.linears[linear.index];
                self.elastic(&x.narrow(1, 0, active.inp)?, linear, active, segment.selection.adapter)
            })
        };
        named("linear", product())
    }

    fn gated_mlp(
        &self,
        x: &Tensor,
        mlp: &GatedMlp<Self>,
        segments: &[Segment],
    ) -> Result<Tensor, BackendError> {
        let product = || {
            let width = mlp.down.weight.dim(0)?;
            self.for_each_segment(x, segments, width, |x, segment| {
                let run = |x: &Tensor, linear: &Linear<Self>| {
                    let active = segment.selection.shape.linears[linear.index];
                    self.elastic(x, linear, active, segment.selection.adapter)
                };
                let (gate, up) = (run(x, &mlp.gate)?, run(x, &mlp.up)?);
                let gated = match gate.elem_count() {
                    0 => gate,
                    _ => self.compute.run2(Gated, &gate, &up)?,
                };
                run(&gated, &mlp.down)
            })
        };
        named("gated mlp", product())
    }

    fn angles(&self, positions: &[u32], inverse_frequencies: &[f32]) -> Result<Turns, BackendError> {
        let turn = |&p: &u32| inverse_frequencies.iter().map(move |f| (p as f32 * f).sin_cos());
        Ok(Turns::new(positions.iter().flat_map(turn).collect()))
    }

    fn rotary(&self, x: Tensor, head_size: usize, angles: &Turns) -> Result<Tensor, BackendError> {
        let rotary = Rotary { turns: angles.clone(), head_size };
        named("rotary", self.compute.run1(rotary, &x))
    }

    fn attention(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        shape: &AttentionShape,
        spans: &[SequenceSpan],
        mut cache: Option<(&mut PagedCache, usize)>,
    ) -> Result<Tensor, BackendError> {
        // A GPU does little between two starts of kernels, so there sequences go together; a processor would only multiply padding.
        let ends_alone = shape.sight != Sight::All;
        if cache.is_none() && ends_alone && spans.len() > 1 && self.compute.is_composed() {
            return named("attention", attend_padded(q, k, v, shape, spans));
        }
        let mut attended = Vec::with_capacity(spans.len());
        for span in spans {
            let rows = |x: &Tensor| x.narrow(0, span.rows.start, span.rows.len());
            let (q, k, v) = named("attention", (|| Ok((rows(q)?, rows(k)?, rows(v)?)))())?;
            let (k, v) = match &mut cache {
                Some((cache, layer)) => cache.extend(*layer, span, &k, &v)?,
                None => (k, v),
            };
            attended.push(named("attention", attend(&q, &k, &v, shape, span.start))?);
        }
        named("attention", Tensor::cat(&attended, 0))
    }

    fn add(&self, x: Tensor, y: &Tensor) -> Result<Tensor, BackendError> {
        named("add", x + y)
    }

    fn select(&self, x: &Tensor, rows: &[u32]) -> Result<Tensor, BackendError> {
        let selected = || x.index_select(&Tensor::new(rows, &self.compute.device)?, 0);
        named("select", selected())
    }

    fn logits(&self, x: &Tensor, head: &Tensor) -> Result<Tensor, BackendError> {
        let product = || {
            let (out, inp) = head.dims2()?;
            self.compute.run1(Frozen { weight: head.clone(), out, inp, threads: self.threads }, x)
        };
        named("logits", product())
    }

    fn host(&self, x: Tensor) -> Result<Vec<f32>, BackendError> {
        named("to host", x.flatten_all().and_then(|x| x.to_vec1()))
    }

    fn bytes(&self, matrix: &Tensor, out: usize, inp: usize) -> usize {
        matrix
            .dims2()
            .map_or(0, |(rows, columns)| rows.min(out) * columns.min(inp) * matrix.dtype().size_in_bytes())
    }

    fn arithmetic(&self, matrix: &Tensor) -> Arithmetic {
        if matrix.dtype() == DType::BF16 { Arithmetic::Bf16 } else { Arithmetic::F32 }
    }

    fn cache_bytes(&self, cache: &PagedCache) -> usize {
        cache.bytes()
    }
}
