//! The reference backend: candle tensors in f32, composed of differentiable operations only.
//!
//! It trains, and it is the oracle for the other backends, so every operation is written to be read. candle's fused
//! norm, softmax, rotary and attention operations drop the gradient without an error and are not used; the frozen
//! products are one operation of our own ([`frozen`]), because candle's product would compute a gradient of the
//! frozen weight too.

mod attention;
mod frozen;
mod training;

pub use training::{AdamW, AdamWOptions, AdamWState, Loss, NamedTensor};

use super::{
    Adapter, AttentionShape, Backend, BackendError, CacheLayout, GatedMlp, Linear, Segment, SequenceSpan,
};
use crate::supernet::ActiveLinear;
use crate::weights::{HostMatrix, HostVector};
use attention::{PagedCache, attend};
use candle_core::{D, Device, Tensor, Var};
use rand::{RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// f32 on candle's CPU device.
pub struct Reference {
    device: Device,
    training: Option<Training>,
    /// Present while MLP channels are being measured.
    channels: Option<Mutex<ChannelSquares>>,
}

/// By the MLP's down Linear: the sum of squares of each channel over all rows, and the number of rows.
pub type ChannelSquares = BTreeMap<usize, (Vec<f64>, usize)>;

/// What only a backend that trains has.
struct Training {
    /// Probability of dropping an element of an adapter's input.
    dropout: f64,
    /// Whether dropout is on; off while validating.
    dropping: AtomicBool,
    state: Mutex<TrainingState>,
}

struct TrainingState {
    random: ChaCha8Rng,
    /// Every adapter tensor that was loaded, in loading order.
    variables: Vec<(String, Var)>,
}

impl Reference {
    /// For inference: no variable, no dropout.
    pub fn new() -> Self {
        Self { device: Device::Cpu, training: None, channels: None }
    }

    /// For inference that also measures how strongly each MLP channel is used; see [`Self::channel_squares`].
    pub fn measuring_channels() -> Self {
        Self { channels: Some(Mutex::default()), ..Self::new() }
    }

    /// What the channels were measured to be since the backend was made.
    pub fn channel_squares(&self) -> ChannelSquares {
        self.channels.as_ref().map(|c| lock(c).clone()).unwrap_or_default()
    }

    /// For training: adapters become variables; their input is dropped out with probability `dropout` in `[0, 1)`.
    pub fn for_training(dropout: f64, seed: u64) -> Self {
        let state = TrainingState { random: ChaCha8Rng::seed_from_u64(seed), variables: Vec::new() };
        let training = Training { dropout, dropping: AtomicBool::new(true), state: Mutex::new(state) };
        Self { device: Device::Cpu, training: Some(training), channels: None }
    }

    /// Runs `compute` with dropout off, as validation does.
    pub fn without_dropout<T>(&self, compute: impl FnOnce() -> T) -> T {
        let switch = |on| {
            if let Some(training) = &self.training {
                training.dropping.store(on, Ordering::Relaxed);
            }
        };
        switch(false);
        let result = compute();
        switch(true);
        result
    }

    fn tensor(&self, host: &HostMatrix) -> candle_core::Result<Tensor> {
        Tensor::from_vec(host.to_f32(), (host.rows, host.columns), &self.device)
    }

    /// Zeroes each element with the training's probability and scales the others up; the identity outside training.
    fn dropout(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let on = |t: &&Training| t.dropout > 0.0 && t.dropping.load(Ordering::Relaxed);
        let Some(training) = self.training.as_ref().filter(on) else { return Ok(x.clone()) };
        // 16 random bits decide an element: p is exact to 1/65536, which no training can see.
        let threshold = (training.dropout * 65536.0).round() as u32;
        let keep = (1.0 / (1.0 - training.dropout)) as f32;
        let mut bits = vec![0u8; x.elem_count() * 2];
        lock(&training.state).random.fill_bytes(&mut bits);
        let mask = bits.chunks_exact(2).map(|b| {
            let drop = u32::from(u16::from_le_bytes([b[0], b[1]])) < threshold;
            if drop { 0.0 } else { keep }
        });
        x.mul(&Tensor::from_vec(mask.collect::<Vec<f32>>(), x.shape(), &self.device)?)
    }

    /// `W[:o,:i] x + b[:o] + s B[:o,:r] (A[:r,:i] x)` for the rows `x (t, i)` of one segment.
    fn elastic(
        &self,
        x: &Tensor,
        linear: &Linear<Self>,
        active: ActiveLinear,
        adapter: usize,
    ) -> candle_core::Result<Tensor> {
        let mut y = frozen::product(x, &prefix(&linear.weight, active.out, active.inp)?)?;
        if let Some(bias) = &linear.bias {
            y = y.broadcast_add(&bias.narrow(0, 0, active.out)?)?;
        }
        if let Some(Adapter { a, b, scale }) = linear.adapters.get(adapter).and_then(Option::as_ref) {
            let a = prefix(a, active.rank, active.inp)?;
            let b = prefix(b, active.out, active.rank)?;
            let shrunk = self.dropout(x)?.matmul(&a.t()?)?;
            let expanded = shrunk.matmul(&b.t()?)?;
            y = (y + (expanded * f64::from(*scale))?)?;
        }
        Ok(y)
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
            let missing = width - y.dim(1)?;
            if missing == 0 { Ok(y) } else { y.pad_with_zeros(1, 0, missing) }
        };
        match segments {
            [only] if only.rows.len() == x.dim(0)? => padded(only),
            _ => Tensor::cat(&segments.iter().map(padded).collect::<candle_core::Result<Vec<_>>>()?, 0),
        }
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

fn add_squares(channels: &Mutex<ChannelSquares>, down: usize, gated: &Tensor) -> candle_core::Result<()> {
    let squares = gated.sqr()?.sum(0)?.to_vec1::<f32>()?;
    let mut channels = lock(channels);
    let (sums, rows) = channels.entry(down).or_insert_with(|| (vec![0.0; squares.len()], 0));
    for (sum, square) in sums.iter_mut().zip(squares) {
        *sum += f64::from(square);
    }
    *rows += gated.dim(0)?;
    Ok(())
}

fn prefix(matrix: &Tensor, rows: usize, columns: usize) -> candle_core::Result<Tensor> {
    matrix.narrow(0, 0, rows)?.narrow(1, 0, columns)
}

/// Names the operation in an error that candle gave.
fn named<T>(operation: &'static str, result: candle_core::Result<T>) -> Result<T, BackendError> {
    result.map_err(|e| BackendError::Library { operation, message: e.to_string() })
}

fn silu(x: &Tensor) -> candle_core::Result<Tensor> {
    x.div(&(x.neg()?.exp()? + 1.0)?)
}

impl Backend for Reference {
    type Rows = Tensor;
    type Matrix = Tensor;
    type Vector = Tensor;
    type Cache = PagedCache;

    fn matrix(&self, host: HostMatrix) -> Result<Tensor, BackendError> {
        named("matrix", self.tensor(&host))
    }

    fn adapter_matrix(&self, host: HostMatrix) -> Result<Tensor, BackendError> {
        let tensor = named("adapter matrix", self.tensor(&host))?;
        let Some(training) = &self.training else { return Ok(tensor) };
        let variable = named("adapter matrix", Var::from_tensor(&tensor))?;
        let tensor = variable.as_tensor().clone();
        lock(&training.state).variables.push((host.name, variable));
        Ok(tensor)
    }

    fn vector(&self, host: HostVector) -> Result<Tensor, BackendError> {
        let length = host.data.len();
        named("vector", Tensor::from_vec(host.data, length, &self.device))
    }

    fn cache(&self, layout: CacheLayout) -> Result<PagedCache, BackendError> {
        PagedCache::new(layout)
    }

    fn embed(&self, table: &Tensor, tokens: &[u32]) -> Result<Tensor, BackendError> {
        let rows = || table.index_select(&Tensor::new(tokens, &self.device)?, 0);
        named("embed", rows())
    }

    fn rms_norm(&self, x: &Tensor, weight: &Tensor, eps: f32) -> Result<Tensor, BackendError> {
        let normalised = || {
            let mean_square = x.sqr()?.mean_keepdim(D::Minus1)?;
            x.broadcast_div(&(mean_square + f64::from(eps))?.sqrt()?)?.broadcast_mul(weight)
        };
        named("rms norm", normalised())
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
                let gated = (silu(&run(x, &mlp.gate)?)? * run(x, &mlp.up)?)?;
                if let Some(channels) = &self.channels {
                    add_squares(channels, mlp.down.index, &gated)?;
                }
                run(&gated, &mlp.down)
            })
        };
        named("gated mlp", product())
    }

    fn rotary(
        &self,
        x: Tensor,
        head_size: usize,
        positions: &[u32],
        inverse_frequencies: &[f32],
    ) -> Result<Tensor, BackendError> {
        let rotated = || {
            let (rows, width) = x.dims2()?;
            let half = head_size / 2;
            let angles =
                positions.iter().flat_map(|&p| inverse_frequencies.iter().map(move |f| p as f32 * f));
            let angles = Tensor::from_vec(angles.collect::<Vec<f32>>(), (rows, 1, half), &self.device)?;
            let (cos, sin) = (angles.cos()?, angles.sin()?);
            let heads = x.reshape((rows, width / head_size, head_size))?;
            let (first, second) = (heads.narrow(2, 0, half)?, heads.narrow(2, half, half)?);
            let turned_first = (first.broadcast_mul(&cos)? - second.broadcast_mul(&sin)?)?;
            let turned_second = (second.broadcast_mul(&cos)? + first.broadcast_mul(&sin)?)?;
            Tensor::cat(&[turned_first, turned_second], 2)?.reshape((rows, width))
        };
        named("rotary", rotated())
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
        let selected = || x.index_select(&Tensor::new(rows, &self.device)?, 0);
        named("select", selected())
    }

    fn logits(&self, x: &Tensor, head: &Tensor) -> Result<Tensor, BackendError> {
        named("logits", frozen::product(x, head))
    }

    fn to_host(&self, x: &Tensor) -> Result<Vec<f32>, BackendError> {
        named("to host", x.flatten_all().and_then(|x| x.to_vec1()))
    }
}
