//! Operations that go by rows or numbers: norm, gated activation, rotary, softmax.

use super::Composed;
use crate::backend::reference::fused::{Gated, RmsNorm, Rotary};
use crate::backend::reference::gpu::Gpu;
use candle_core::{D, Result, Tensor, bail};

impl RmsNorm {
    /// `1 / sqrt(mean(x^2) + eps)`: `(T, 1)`.
    fn scales(&self, x: &Tensor) -> Result<Tensor> {
        (x.sqr()?.mean_keepdim(D::Minus1)? + f64::from(self.eps))?.sqrt()?.recip()
    }
}

impl Composed for RmsNorm {
    const NAME: &'static str = "rms norm";

    fn forward(&self, operands: &[Tensor]) -> Result<Tensor> {
        let x = &operands[0];
        if let Some(gpu) = Gpu::of(x) {
            return gpu.rms_norm(x, &self.weight, self.eps);
        }
        x.broadcast_mul(&self.scales(x)?)?.broadcast_mul(&self.weight)
    }

    fn backward(&self, operands: &[Tensor], dy: &Tensor) -> Result<Vec<Tensor>> {
        let x = &operands[0];
        if let Some(gpu) = Gpu::of(x) {
            return Ok(vec![gpu.rms_norm_back(x, &self.weight, dy, self.eps)?]);
        }
        let n = self.scales(x)?;
        let g = dy.broadcast_mul(&self.weight)?;
        let along = (g.mul(x)?.mean_keepdim(D::Minus1)? * n.powf(3.0)?)?;
        Ok(vec![(g.broadcast_mul(&n)? - x.broadcast_mul(&along)?)?])
    }
}

fn sigmoids(x: &Tensor) -> Result<Tensor> {
    (x.neg()?.exp()? + 1.0)?.recip()
}

impl Composed for Gated {
    const NAME: &'static str = "gated";

    fn forward(&self, operands: &[Tensor]) -> Result<Tensor> {
        let (gate, up) = (&operands[0], &operands[1]);
        if let Some(gpu) = Gpu::of(gate) {
            return gpu.gated(gate, up);
        }
        gate.silu()?.mul(up)
    }

    fn backward(&self, operands: &[Tensor], dy: &Tensor) -> Result<Vec<Tensor>> {
        let (gate, up) = (&operands[0], &operands[1]);
        if let Some(gpu) = Gpu::of(gate) {
            return Ok(gpu.gated_back(gate, up, dy)?.into());
        }
        let s = sigmoids(gate)?;
        let silu = (gate * &s)?;
        // s (1 + g (1 - s)) = s + g s (1 - s)
        let slope = (&s + (&silu * (1.0 - &s)?)?)?;
        Ok(vec![((dy * up)? * slope)?, (dy * silu)?])
    }
}

impl Rotary {
    /// Forward, or back.
    fn turned(&self, x: &Tensor, forward: bool) -> Result<Tensor> {
        let (rows, width) = x.dims2()?;
        let half = self.head_size / 2;
        if half == 0 || self.turns.len() != rows * half || !width.is_multiple_of(self.head_size) {
            bail!("rotary: x {:?}, heads of {}, {} turns", x.dims(), self.head_size, self.turns.len());
        }
        let [sin, cos] = self.turns.on(x.device(), half)?;
        if let Some(gpu) = Gpu::of(x) {
            return gpu.turned(x, sin, cos, self.head_size, if forward { 1.0 } else { -1.0 });
        }
        let heads = x.reshape((rows, width / self.head_size, self.head_size))?;
        let (a, b) = (heads.narrow(2, 0, half)?, heads.narrow(2, half, half)?);
        let (a, b) = if forward { (a, b) } else { (b, a) };
        // The way back turns by the same angle the other way, which is the same with the halves exchanged.
        let first = (a.broadcast_mul(cos)? - b.broadcast_mul(sin)?)?;
        let second = (b.broadcast_mul(cos)? + a.broadcast_mul(sin)?)?;
        let (first, second) = if forward { (first, second) } else { (second, first) };
        Tensor::cat(&[first, second], 2)?.reshape((rows, width))
    }
}

impl Composed for Rotary {
    const NAME: &'static str = "rotary";

    fn forward(&self, operands: &[Tensor]) -> Result<Tensor> {
        self.turned(&operands[0], true)
    }

    fn backward(&self, _: &[Tensor], dy: &Tensor) -> Result<Vec<Tensor>> {
        Ok(vec![self.turned(dy, false)?])
    }
}

/// `softmax(factor x + bias)` over the last axis of `x (heads, rows, positions)`.
pub(in crate::backend::reference) struct Softmax {
    /// `(biases, rows, positions)`, minus infinity where nothing is seen; head `h` has that of `h % biases`.
    pub(in crate::backend::reference) bias: Tensor,
    pub(in crate::backend::reference) factor: f32,
}

impl Softmax {
    fn shares(&self, x: &Tensor) -> Result<Tensor> {
        let (heads, rows, positions) = x.dims3()?;
        let biases = self.bias.dim(0)?;
        let scores = (x * f64::from(self.factor))?.reshape((heads / biases, biases, rows, positions))?;
        let scores = scores.broadcast_add(&self.bias)?.reshape((heads, rows, positions))?;
        let exponentials = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?)?.exp()?;
        exponentials.broadcast_div(&exponentials.sum_keepdim(D::Minus1)?)
    }
}

impl Composed for Softmax {
    const NAME: &'static str = "softmax";

    fn forward(&self, operands: &[Tensor]) -> Result<Tensor> {
        let x = &operands[0];
        match Gpu::of(x) {
            Some(gpu) => gpu.softmax(x, &self.bias, self.factor),
            None => self.shares(x),
        }
    }

    /// With `y` the shares: `factor y (dy - sum(y dy))`.
    fn backward(&self, operands: &[Tensor], dy: &Tensor) -> Result<Vec<Tensor>> {
        let x = &operands[0];
        if let Some(gpu) = Gpu::of(x) {
            return Ok(vec![gpu.softmax_back(x, &self.bias, dy, self.factor)?]);
        }
        let y = self.shares(x)?;
        let along = (&y * dy)?.sum_keepdim(D::Minus1)?;
        Ok(vec![(y.mul(&dy.broadcast_sub(&along)?)? * f64::from(self.factor))?])
    }
}
