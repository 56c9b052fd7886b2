//! Row-wise operations with a backward pass of their own: norm, gated activation, rotary, cross-entropy, divergence.
//!
//! candle's own fused versions drop the gradient; composed of its elementwise operations each would be a handful of
//! nodes that write and read all activations once more. The composed twins are in the tests.

use super::loops::{Gate, GateBack, Logits, Shares, log_sum_exp, vectorised};
use super::product::{contiguous, with_values};
use candle_core::{CpuStorage, CustomOp1, CustomOp2, Device, Layout, Result, Shape, Tensor, bail};
use std::ops::Deref;
use std::sync::{Arc, OnceLock};

/// `x / sqrt(mean(x^2) + eps) * weight` for each row of `x (T, H)`; `weight (H)` is frozen.
pub(super) struct RmsNorm {
    pub(super) weight: Tensor,
    pub(super) eps: f32,
}

impl RmsNorm {
    fn scale(&self, row: &[f32]) -> f32 {
        1.0 / (row.iter().map(|x| x * x).sum::<f32>() / row.len() as f32 + self.eps).sqrt()
    }
}

impl CustomOp1 for RmsNorm {
    fn name(&self) -> &'static str {
        "rms norm"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let width = self.weight.elem_count();
        let mut y = contiguous(x, layout)?.to_vec();
        if layout.shape().dims2()?.1 != width {
            bail!("rms norm: x {:?}, weight ({width})", layout.dims());
        }
        with_values(&self.weight, |weight| {
            for row in y.chunks_exact_mut(width) {
                let scale = self.scale(row);
                row.iter_mut().zip(weight).for_each(|(x, w)| *x *= scale * w);
            }
            Ok(())
        })?;
        Ok((CpuStorage::F32(y), layout.shape().clone()))
    }

    /// With `n = 1 / sqrt(mean(x^2) + eps)` and `g = weight dy`: `dx = n g - x n^3 mean(g x)`.
    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let width = self.weight.elem_count();
        let mut dx = with_values(&dy.contiguous()?, |dy| Ok(dy.to_vec()))?;
        with_values(x, |x| {
            with_values(&self.weight, |weight| {
                for (dx, x) in dx.chunks_exact_mut(width).zip(x.chunks_exact(width)) {
                    dx.iter_mut().zip(weight).for_each(|(d, w)| *d *= w);
                    let scale = self.scale(x);
                    let mean = dx.iter().zip(x).map(|(g, x)| g * x).sum::<f32>() / width as f32;
                    let along = scale * scale * scale * mean;
                    dx.iter_mut().zip(x).for_each(|(g, x)| *g = scale * *g - along * x);
                }
                Ok(())
            })
        })?;
        Tensor::from_vec(dx, x.shape(), x.device()).map(Some)
    }
}

/// `silu(gate) * up`, elementwise.
pub(super) struct Gated;

impl CustomOp2 for Gated {
    fn name(&self) -> &'static str {
        "gated"
    }

    fn cpu_fwd(
        &self,
        gate: &CpuStorage,
        gate_layout: &Layout,
        up: &CpuStorage,
        up_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        if gate_layout.shape() != up_layout.shape() {
            bail!("gated: gate {:?}, up {:?}", gate_layout.dims(), up_layout.dims());
        }
        let (gate, up) = (contiguous(gate, gate_layout)?, contiguous(up, up_layout)?);
        let mut y = gate.to_vec();
        vectorised(Gate { gate: &mut y, up });
        Ok((CpuStorage::F32(y), gate_layout.shape().clone()))
    }

    fn bwd(
        &self,
        gate: &Tensor,
        up: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let mut d_gate = with_values(&dy.contiguous()?, |dy| Ok(dy.to_vec()))?;
        let mut d_up = vec![0.0; d_gate.len()];
        with_values(gate, |gate| {
            with_values(up, |up| {
                vectorised(GateBack { gate, up, d_gate: &mut d_gate, d_up: &mut d_up });
                Ok(())
            })
        })?;
        let like = |values| Tensor::from_vec(values, gate.shape(), gate.device()).map(Some);
        Ok((like(d_gate)?, like(d_up)?))
    }
}

/// `(T, D/2)`: (sin, cos) of each row's angles, in host memory and, once asked for, on a device.
#[derive(Clone)]
pub struct Turns(Arc<Angles>);

struct Angles {
    turns: Vec<(f32, f32)>,
    /// Sines and cosines.
    on_device: OnceLock<[Tensor; 2]>,
}

impl Turns {
    pub(super) fn new(turns: Vec<(f32, f32)>) -> Self {
        Self(Arc::new(Angles { turns, on_device: OnceLock::new() }))
    }

    /// Sines and cosines `(T, 1, D/2)`, taken to the device once for all layers.
    pub(super) fn on(&self, device: &Device, half: usize) -> Result<&[Tensor; 2]> {
        if let Some(tensors) = self.0.on_device.get() {
            return Ok(tensors);
        }
        let rows = self.len() / half.max(1);
        let (sines, cosines): (Vec<_>, Vec<_>) = self.iter().copied().unzip();
        let tensor = |values| Tensor::from_vec(values, (rows, 1, half), device);
        let tensors = [tensor(sines)?, tensor(cosines)?];
        Ok(self.0.on_device.get_or_init(|| tensors))
    }
}

impl Deref for Turns {
    type Target = [(f32, f32)];

    fn deref(&self) -> &Self::Target {
        &self.0.turns
    }
}

/// Turns the pair `(d, d + D/2)` of each head of each row by the row's angle `d`.
#[derive(Clone)]
pub(super) struct Rotary {
    pub(super) turns: Turns,
    pub(super) head_size: usize,
}

impl Rotary {
    /// `direction` is 1, or -1 for the inverse.
    fn turn(&self, x: &mut [f32], width: usize, direction: f32) {
        let half = self.head_size / 2;
        for (row, turns) in x.chunks_exact_mut(width).zip(self.turns.chunks_exact(half)) {
            for head in row.chunks_exact_mut(self.head_size) {
                let (first, second) = head.split_at_mut(half);
                for ((a, b), &(sin, cos)) in first.iter_mut().zip(second).zip(turns) {
                    let sin = sin * direction;
                    (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
                }
            }
        }
    }
}

impl CustomOp1 for Rotary {
    fn name(&self) -> &'static str {
        "rotary"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (rows, width) = layout.shape().dims2()?;
        if self.turns.len() != rows * (self.head_size / 2) || !width.is_multiple_of(self.head_size) {
            bail!("rotary: x {:?}, heads of {}, {} turns", layout.dims(), self.head_size, self.turns.len());
        }
        let mut y = contiguous(x, layout)?.to_vec();
        self.turn(&mut y, width, 1.0);
        Ok((CpuStorage::F32(y), layout.shape().clone()))
    }

    /// A rotation's transpose is the rotation back.
    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let mut dx = with_values(&dy.contiguous()?, |dy| Ok(dy.to_vec()))?;
        self.turn(&mut dx, x.dim(1)?, -1.0);
        Tensor::from_vec(dx, x.shape(), x.device()).map(Some)
    }
}

/// The sum of `-log softmax(logits)[target]` over the rows of `logits (n, V)`, divided by `count`.
pub(super) struct CrossEntropy {
    pub(super) targets: Vec<u32>,
    /// The rows that the mean is over: more than `n` where the others' logits are computed at another time.
    pub(super) count: usize,
}

impl CrossEntropy {
    /// `(target, the row's logits)`
    fn rows<'a>(&'a self, logits: &'a [f32]) -> impl Iterator<Item = (usize, &'a [f32])> {
        let width = logits.len() / self.targets.len();
        self.targets.iter().map(|&t| t as usize).zip(logits.chunks_exact(width))
    }
}

impl CustomOp1 for CrossEntropy {
    fn name(&self) -> &'static str {
        "cross entropy"
    }

    fn cpu_fwd(&self, logits: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (rows, width) = layout.shape().dims2()?;
        if rows == 0 || rows != self.targets.len() || self.targets.iter().any(|&t| t as usize >= width) {
            bail!("cross entropy: logits {:?}, {} targets", layout.dims(), self.targets.len());
        }
        let losses =
            self.rows(contiguous(logits, layout)?).map(|(t, row)| f64::from(log_sum_exp(row) - row[t]));
        let mean = losses.sum::<f64>() / self.count as f64;
        Ok((CpuStorage::F32(vec![mean as f32]), Shape::from(())))
    }

    fn bwd(&self, logits: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let weight = dy.to_scalar::<f32>()? / self.count as f32;
        let gradient = with_values(logits, |logits| {
            let mut gradient = logits.to_vec();
            let width = logits.len() / self.targets.len();
            for (x, &target) in gradient.chunks_exact_mut(width).zip(&self.targets) {
                let total = log_sum_exp(x);
                vectorised(Shares { x, total, weight });
                x[target as usize] -= weight;
            }
            Ok(gradient)
        })?;
        Tensor::from_vec(gradient, logits.shape(), logits.device()).map(Some)
    }
}

/// The sum of `KL(softmax(teacher) || softmax(logits))` over the rows of `logits (n, V)`, divided by `count`: what is lost
/// where the one distribution is taken for the other (Hinton et al. 2015, at a temperature of 1).
pub(super) struct Divergence {
    /// `(n, V)`: frozen logits.
    pub(super) teacher: Tensor,
    /// As in [`CrossEntropy`].
    pub(super) count: usize,
}

impl Divergence {
    /// Runs `work` on each row's logits, the teacher's first.
    fn for_rows(&self, logits: &[f32], mut work: impl FnMut(Logits<'_>, Logits<'_>)) -> Result<()> {
        let width = self.teacher.dim(1)?;
        with_values(&self.teacher, |teacher| {
            for (teacher, row) in teacher.chunks_exact(width).zip(logits.chunks_exact(width)) {
                work(Logits::new(teacher), Logits::new(row));
            }
            Ok(())
        })
    }
}

impl CustomOp1 for Divergence {
    fn name(&self) -> &'static str {
        "divergence"
    }

    fn cpu_fwd(&self, logits: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        if layout.shape() != self.teacher.shape() {
            bail!("divergence: logits {:?}, the teacher's {:?}", layout.dims(), self.teacher.dims());
        }
        let mut sum = 0.0;
        self.for_rows(contiguous(logits, layout)?, |teacher, row| sum += teacher.divergence(row))?;
        Ok((CpuStorage::F32(vec![(sum / self.count as f64) as f32]), Shape::from(())))
    }

    /// The difference of the distributions: `(softmax(logits) - softmax(teacher)) / count`.
    fn bwd(&self, logits: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let weight = dy.to_scalar::<f32>()? / self.count as f32;
        let mut gradient = vec![0.0; logits.elem_count()];
        let mut rows = gradient.chunks_exact_mut(logits.dim(1)?);
        with_values(logits, |logits| {
            self.for_rows(logits, |teacher, row| {
                if let Some(to) = rows.next() {
                    row.difference(teacher, weight, to);
                }
            })
        })?;
        Tensor::from_vec(gradient, logits.shape(), logits.device()).map(Some)
    }
}
