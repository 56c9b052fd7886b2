//! The elastic low-rank product with its own backward pass, `y = W[:o,:i] x + s B[:o,:r] (A[:r,:i] drop(x))`.
//!
//! Composed of candle's operations it would be a dozen nodes, each with gradient buffers of its own, and a gradient of
//! the frozen `W` that nobody wants. The slow twin is in the tests, which compare values and gradients.

use super::dropout::Mask;
use super::product::{Onto, View, contiguous, multiply, product, with_values};
use crate::supernet::ActiveLinear;
use candle_core::{CpuStorage, CustomOp1, CustomOp3, Layout, Result, Shape, Tensor, bail};

/// `x (T, i)` to `x W[:o,:i]^T (T, o)`: a frozen weight with the part of it that is in use.
pub(super) struct Frozen {
    /// `(out, inp)`, contiguous.
    pub(super) weight: Tensor,
    pub(super) out: usize,
    pub(super) inp: usize,
    pub(super) threads: usize,
}

impl Frozen {
    fn forward(&self, x: &[f32]) -> Result<Vec<f32>> {
        let stride = self.weight.dim(1)?;
        with_values(&self.weight, |weight| {
            let weight = View::prefix(weight, self.out, self.inp, stride).t();
            Ok(product(1.0, View::whole(x, self.inp), weight, self.threads))
        })
    }

    /// The gradient of `x` from that of `y`.
    fn backward(&self, dy: &[f32]) -> Result<Vec<f32>> {
        let stride = self.weight.dim(1)?;
        with_values(&self.weight, |weight| {
            let weight = View::prefix(weight, self.out, self.inp, stride);
            Ok(product(1.0, View::whole(dy, self.out), weight, self.threads))
        })
    }

    fn rows(&self, x: &Layout) -> Result<usize> {
        let (rows, inp) = x.shape().dims2()?;
        let (weight_out, weight_inp) = self.weight.dims2()?;
        if inp != self.inp || self.inp > weight_inp || self.out > weight_out {
            bail!(
                "frozen product: x has {inp} columns, ({}, {}) of {weight_out} x {weight_inp}",
                self.out,
                self.inp
            );
        }
        Ok(rows)
    }
}

impl CustomOp1 for Frozen {
    fn name(&self) -> &'static str {
        "frozen product"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let rows = self.rows(layout)?;
        let y = self.forward(contiguous(x, layout)?)?;
        Ok((CpuStorage::F32(y), Shape::from((rows, self.out))))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let dx = with_values(&dy.contiguous()?, |dy| self.backward(dy))?;
        Tensor::from_vec(dx, x.shape(), x.device()).map(Some)
    }
}

/// The frozen product and the adapter's, of `x (T, i)`, `A (R, inp)` and `B (out, R)`: `(T, o)`.
pub(super) struct Elastic {
    pub(super) frozen: Frozen,
    pub(super) rank: usize,
    /// `alpha / R_config`
    pub(super) scale: f32,
    pub(super) dropout: Option<Mask>,
}

impl Elastic {
    pub(super) fn new(weight: Tensor, active: ActiveLinear, scale: f32, threads: usize) -> Self {
        let ActiveLinear { out, inp, rank } = active;
        Self { frozen: Frozen { weight, out, inp, threads }, rank, scale, dropout: None }
    }

    fn dropped(&self, x: &[f32]) -> Vec<f32> {
        let mut dropped = x.to_vec();
        if let Some(mask) = self.dropout {
            mask.apply(&mut dropped);
        }
        dropped
    }

    /// `A[:r,:i] drop(x)`: `(T, r)`.
    fn shrunk(&self, dropped: &[f32], a: &[f32], a_stride: usize) -> Vec<f32> {
        let Frozen { inp, threads, .. } = self.frozen;
        let a = View::prefix(a, self.rank, inp, a_stride).t();
        product(1.0, View::whole(dropped, inp), a, threads)
    }

    /// Gradients of `x`, `A` and `B`. Those of `A` and `B` are zero outside the active prefix, and there they are
    /// zeros, not absent, because LoNAS's optimizer lets inactive parts decay.
    fn gradients(
        &self,
        x: &[f32],
        a: (&[f32], usize),
        b: (&[f32], usize),
        dy: &[f32],
    ) -> Result<[Vec<f32>; 3]> {
        let Frozen { out, inp, threads, .. } = self.frozen;
        let ((a, a_stride), (b, b_stride), rank) = (a, b, self.rank);
        let dropped = self.dropped(x);
        let shrunk = self.shrunk(&dropped, a, a_stride);
        let dy_view = View::whole(dy, out);

        let mut db = vec![0.0; b.len()];
        multiply(
            (&mut db, b_stride),
            Onto::Fresh,
            self.scale,
            dy_view.t(),
            View::whole(&shrunk, rank),
            threads,
        );
        let b = View::prefix(b, out, rank, b_stride);
        let dshrunk = product(self.scale, dy_view, b, threads);
        let dshrunk = View::whole(&dshrunk, rank);
        let mut da = vec![0.0; a.len()];
        multiply((&mut da, a_stride), Onto::Fresh, 1.0, dshrunk.t(), View::whole(&dropped, inp), threads);

        let mut dx = self.frozen.backward(dy)?;
        let a = View::prefix(a, rank, inp, a_stride);
        match self.dropout {
            None => multiply((&mut dx, inp), Onto::Sum, 1.0, dshrunk, a, threads),
            Some(mask) => {
                let mut through = product(1.0, dshrunk, a, threads);
                mask.apply(&mut through);
                dx.iter_mut().zip(&through).for_each(|(dx, d)| *dx += d);
            }
        }
        Ok([dx, da, db])
    }
}

impl CustomOp3 for Elastic {
    fn name(&self) -> &'static str {
        "elastic product"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        a: &CpuStorage,
        a_layout: &Layout,
        b: &CpuStorage,
        b_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let rows = self.frozen.rows(x_layout)?;
        let Frozen { out, inp, threads, .. } = self.frozen;
        let ((a_rows, a_stride), (b_rows, b_stride)) = (a_layout.shape().dims2()?, b_layout.shape().dims2()?);
        if self.rank > a_rows.min(b_stride) || inp > a_stride || out > b_rows {
            bail!(
                "elastic product: ({out}, {inp}, {}) of A {:?}, B {:?}",
                self.rank,
                a_layout.dims(),
                b_layout.dims()
            );
        }
        let x = contiguous(x, x_layout)?;
        let mut y = self.frozen.forward(x)?;
        let shrunk = self.shrunk(&self.dropped(x), contiguous(a, a_layout)?, a_stride);
        let b = View::prefix(contiguous(b, b_layout)?, out, self.rank, b_stride).t();
        multiply((&mut y, out), Onto::Sum, self.scale, View::whole(&shrunk, self.rank), b, threads);
        Ok((CpuStorage::F32(y), Shape::from((rows, out))))
    }

    fn bwd(
        &self,
        x: &Tensor,
        a: &Tensor,
        b: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (a_stride, b_stride) = (a.dim(1)?, b.dim(1)?);
        let [dx, da, db] = with_values(&dy.contiguous()?, |dy| {
            with_values(x, |x| {
                with_values(a, |a| with_values(b, |b| self.gradients(x, (a, a_stride), (b, b_stride), dy)))
            })
        })?;
        let like =
            |values, tensor: &Tensor| Tensor::from_vec(values, tensor.shape(), tensor.device()).map(Some);
        Ok((like(dx, x)?, like(da, a)?, like(db, b)?))
    }
}
