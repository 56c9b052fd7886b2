//! Activations, and what is done to each row by itself.

use super::kernel::Loops;
use crate::backend::Activation;
use std::sync::{Arc, Mutex, PoisonError};

/// `(T, width)` row-major f32.
#[derive(Debug)]
pub struct Rows {
    width: usize,
    values: Vec<f32>,
    /// Where the memory goes when these rows are dropped.
    home: Option<Arc<Pool>>,
}

/// Memory of dropped rows, for the next ones: a step makes hundreds of them, all of a few sizes, and asking the system
/// for it and clearing it would cost more than what is computed in some.
#[derive(Debug, Default)]
pub(super) struct Pool {
    free: Mutex<Vec<Vec<f32>>>,
}

/// As many rows as live at the same time, and a few.
const POOLED: usize = 16;

impl Pool {
    /// Rows with whatever numbers are left in them; the caller writes all.
    pub(super) fn rows(self: &Arc<Self>, rows: usize, width: usize) -> Rows {
        let length = rows * width;
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let large_enough = free.iter().enumerate().filter(|(_, v)| v.len() >= length);
        let best = large_enough.min_by_key(|(_, v)| v.len()).map(|(i, _)| i);
        let mut values =
            best.or_else(|| free.len().checked_sub(1)).map_or(Vec::new(), |i| free.swap_remove(i));
        drop(free);
        values.resize(length, 0.0);
        Rows { width, values, home: Some(Arc::clone(self)) }
    }
}

impl Drop for Rows {
    fn drop(&mut self) {
        let Some(pool) = self.home.as_ref().filter(|_| self.values.capacity() > 0) else { return };
        let mut free = pool.free.lock().unwrap_or_else(PoisonError::into_inner);
        if free.len() < POOLED {
            free.push(std::mem::take(&mut self.values));
        }
    }
}

impl PartialEq for Rows {
    fn eq(&self, other: &Self) -> bool {
        (self.width, &self.values) == (other.width, &other.values)
    }
}

impl Rows {
    pub fn zeros(rows: usize, width: usize) -> Self {
        Self::new(width, vec![0.0; rows * width])
    }

    /// From row-major values; `values.len()` is a multiple of `width`.
    pub fn new(width: usize, values: Vec<f32>) -> Self {
        debug_assert!(values.len().is_multiple_of(width));
        Self { width, values, home: None }
    }

    pub fn len(&self) -> usize {
        self.values.len() / self.width
    }

    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }

    pub fn width(&self) -> usize {
        self.width
    }

    pub fn values(&self) -> &[f32] {
        &self.values
    }

    pub(super) fn values_mut(&mut self) -> &mut [f32] {
        &mut self.values
    }

    pub(super) fn into_values(mut self) -> Vec<f32> {
        std::mem::take(&mut self.values)
    }

    pub fn row(&self, row: usize) -> &[f32] {
        &self.values[row * self.width..(row + 1) * self.width]
    }

    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = &mut [f32]> {
        self.values.chunks_exact_mut(self.width)
    }
}

/// `x / sqrt(mean(x^2) + eps) * weight` in place.
pub(super) struct Normalise<'a> {
    pub(super) x: &'a mut [f32],
    pub(super) weight: &'a [f32],
    pub(super) eps: f32,
}

impl Loops for Normalise<'_> {
    #[inline(always)]
    fn run(self) {
        let Self { x, weight, eps } = self;
        let mean_square = dot(x, x) / x.len() as f32;
        let scale = 1.0 / (mean_square + eps).sqrt();
        for (x, w) in x.iter_mut().zip(weight) {
            *x *= scale * w;
        }
    }
}

/// `(x - mean(x)) / sqrt(variance(x) + eps) * weight + bias` in place.
pub(super) struct NormaliseLayer<'a> {
    pub(super) x: &'a mut [f32],
    pub(super) weight: &'a [f32],
    pub(super) bias: &'a [f32],
    pub(super) eps: f32,
}

impl Loops for NormaliseLayer<'_> {
    #[inline(always)]
    fn run(self) {
        let Self { x, weight, bias, eps } = self;
        let mean = sum(x) / x.len() as f32;
        x.iter_mut().for_each(|x| *x -= mean);
        let scale = 1.0 / (dot(x, x) / x.len() as f32 + eps).sqrt();
        for ((x, w), b) in x.iter_mut().zip(weight).zip(bias) {
            *x = *x * scale * w + b;
        }
    }
}

/// An [`Activation`] of each number, in place.
pub(super) struct Activate<'a> {
    pub(super) x: &'a mut [f32],
    pub(super) activation: Activation,
}

impl Loops for Activate<'_> {
    #[inline(always)]
    fn run(self) {
        let Self { x, activation } = self;
        match activation {
            Activation::Gelu => x.iter_mut().for_each(|x| *x = gelu(*x)),
            Activation::GeluTanh => x.iter_mut().for_each(|x| *x = gelu_tanh(*x)),
            Activation::Tanh => x.iter_mut().for_each(|x| *x = tanh(*x)),
            Activation::Relu => x.iter_mut().for_each(|x| *x = x.max(0.0)),
        }
    }
}

/// Lanes that one sum is spread over, so that it fills vector registers; fixed, because the order of a sum is part of
/// its result.
const LANES: usize = 16;

/// The scalar product of two vectors of equal length.
#[inline(always)]
pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0f32; LANES];
    let (a_chunks, b_chunks) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let rest: f32 = a_chunks.remainder().iter().zip(b_chunks.remainder()).map(|(x, y)| x * y).sum();
    for (x, y) in a_chunks.zip(b_chunks) {
        for lane in 0..LANES {
            sums[lane] += x[lane] * y[lane];
        }
    }
    sums.iter().sum::<f32>() + rest
}

/// The sum of all numbers.
#[inline(always)]
fn sum(x: &[f32]) -> f32 {
    let mut sums = [0.0f32; LANES];
    let chunks = x.chunks_exact(LANES);
    let rest: f32 = chunks.remainder().iter().sum();
    for x in chunks {
        for lane in 0..LANES {
            sums[lane] += x[lane];
        }
    }
    sums.iter().sum::<f32>() + rest
}

/// `e^x` to within 2 units in the last place, without branches, so that loops over it become vector code (Cody and
/// Waite's reduction by ln 2, then a polynomial of degree 6 for the rest).
#[inline(always)]
pub(in crate::backend) fn exp(x: f32) -> f32 {
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    // Adding and taking away 1.5 * 2^23 rounds to a whole number; `round` would be a library call without SSE 4.1.
    const ROUND: f32 = 12_582_912.0;
    let x = x.clamp(-87.0, 88.0);
    let rounded = x * std::f32::consts::LOG2_E + ROUND;
    let n = rounded - ROUND;
    let r = x - n * LN2_HIGH - n * LN2_LOW;
    let p = 1.987_569_1e-4;
    let p = p * r + 1.398_199_9e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_6e-2;
    let p = p * r + 1.666_666_5e-1;
    let p = p * r + 0.5;
    let p = p * r * r + r + 1.0;
    // The lowest bits of `rounded` are n. A cast to an integer has to look for what fits none, number by number.
    p * f32::from_bits((rounded.to_bits() << 23).wrapping_add(1.0f32.to_bits()))
}

/// `x / (1 + e^-x)`
#[inline(always)]
pub(super) fn silu(x: f32) -> f32 {
    x / (1.0 + exp(-x))
}

/// `(e^2x - 1) / (e^2x + 1)`; near zero, where that cancels, an odd polynomial (its Taylor series to x^9).
#[inline(always)]
fn tanh(x: f32) -> f32 {
    let t = exp(2.0 * x);
    let far = (t - 1.0) / (t + 1.0);
    let s = x * x;
    let near = x * (1.0 + s * (-1.0 / 3.0 + s * (2.0 / 15.0 + s * (-17.0 / 315.0 + s * (62.0 / 2835.0)))));
    if x.abs() < 0.25 { near } else { far }
}

#[inline(always)]
fn gelu_tanh(x: f32) -> f32 {
    const ROOT: f32 = 0.797_884_6; // sqrt(2 / pi)
    0.5 * x * (1.0 + tanh(ROOT * (x + 0.044_715 * x * x * x)))
}

#[inline(always)]
fn gelu(x: f32) -> f32 {
    0.5 * x * (1.0 + erf(x * std::f32::consts::FRAC_1_SQRT_2))
}

/// The error function to within 2e-7 (Abramowitz and Stegun 7.1.26 reaches 1.5e-7 in exact arithmetic; near zero, where its sum
/// cancels, the Taylor series to x^9).
#[inline(always)]
fn erf(x: f32) -> f32 {
    let a = x.abs();
    let t = 1.0 / (1.0 + 0.327_591_1 * a);
    let p = t * (0.254_829_6 + t * (-0.284_496_74 + t * (1.421_413_7 + t * (-1.453_152 + t * 1.061_405_4))));
    let far = (1.0 - p * exp(-a * a)).copysign(x);
    let s = x * x;
    let series = 1.0 + s * (-1.0 / 3.0 + s * (0.1 + s * (-1.0 / 42.0 + s * (1.0 / 216.0))));
    let near = x * std::f32::consts::FRAC_2_SQRT_PI * series;
    if a < 0.4 { near } else { far }
}
