//! Products with frozen weights, and with adapters.

use super::Composed;
use crate::backend::reference::dropout::Mask;
use crate::backend::reference::elastic::{Elastic, Frozen};
use crate::backend::reference::gpu::Gpu;
use candle_core::{DType, Result, Tensor, bail};

/// The first rows and columns of a matrix. cuBLAS takes no rows with a gap between them here, so those are copied.
fn prefix(matrix: &Tensor, rows: usize, columns: usize) -> Result<Tensor> {
    matrix.narrow(0, 0, rows)?.narrow(1, 0, columns)?.contiguous()
}

/// With zeros after its rows and columns, as large as `full`.
fn padded(part: &Tensor, full: &Tensor) -> Result<Tensor> {
    let (rows, columns) = full.dims2()?;
    let missing = (rows - part.dim(0)?, columns - part.dim(1)?);
    part.pad_with_zeros(0, 0, missing.0)?.pad_with_zeros(1, 0, missing.1)
}

/// `x weight` in the weight's numbers: x is rounded to them, and so is the result; sums are f32.
fn times(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    x.to_dtype(weight.dtype())?.matmul(weight)
}

/// `base + factor adapted` in f32.
fn added(base: &Tensor, adapted: &Tensor, factor: f32) -> Result<Tensor> {
    match Gpu::of(adapted) {
        Some(gpu) if base.dtype() == DType::BF16 => gpu.added(base, adapted, factor),
        _ => base.to_dtype(DType::F32)? + (adapted * f64::from(factor))?,
    }
}

/// `base + drop(through)` in f32.
fn added_dropped(base: &Tensor, through: &Tensor, mask: Option<Mask>) -> Result<Tensor> {
    match (Gpu::of(through), mask) {
        (_, None) => added(base, through, 1.0),
        (Some(gpu), Some(mask)) if base.dtype() == DType::BF16 => gpu.added_dropped(base, through, mask),
        (_, Some(mask)) => base.to_dtype(DType::F32)? + dropped(through, Some(mask))?,
    }
}

/// `drop(x)`, of `x (T, i)`.
fn dropped(x: &Tensor, mask: Option<Mask>) -> Result<Tensor> {
    match (Gpu::of(x), mask) {
        (_, None) => Ok(x.clone()),
        (Some(gpu), Some(mask)) => gpu.dropped(x, mask),
        (None, Some(mask)) => x.mul(&mask.factors(x.dims2()?, x.device())?),
    }
}

impl Frozen {
    fn active(&self) -> Result<Tensor> {
        prefix(&self.weight, self.out, self.inp)
    }
}

impl Composed for Frozen {
    const NAME: &'static str = "frozen product";

    fn forward(&self, operands: &[Tensor]) -> Result<Tensor> {
        times(&operands[0], &self.active()?.t()?)?.to_dtype(DType::F32)
    }

    fn backward(&self, _: &[Tensor], dy: &Tensor) -> Result<Vec<Tensor>> {
        Ok(vec![times(dy, &self.active()?)?.to_dtype(DType::F32)?])
    }
}

impl Composed for Elastic {
    const NAME: &'static str = "elastic product";

    fn forward(&self, operands: &[Tensor]) -> Result<Tensor> {
        let Frozen { out, inp, .. } = self.frozen;
        let [x, a, b] = operands else { bail!("elastic product: {} operands", operands.len()) };
        let a = prefix(a, self.rank, inp)?;
        let b = prefix(b, out, self.rank)?;
        let adapted = dropped(x, self.dropout)?.matmul(&a.t()?)?.matmul(&b.t()?)?;
        added(&times(x, &self.frozen.active()?.t()?)?, &adapted, self.scale)
    }

    fn backward(&self, operands: &[Tensor], dy: &Tensor) -> Result<Vec<Tensor>> {
        let Frozen { out, inp, .. } = self.frozen;
        let [x, full_a, full_b] = operands else { bail!("elastic product: {} operands", operands.len()) };
        let a = prefix(full_a, self.rank, inp)?;
        let b = prefix(full_b, out, self.rank)?;
        let (dropped, scale) = (dropped(x, self.dropout)?, f64::from(self.scale));
        // Scaled where they are smallest.
        let shrunk = (dropped.matmul(&a.t()?)? * scale)?;
        let dshrunk = (dy.matmul(&b)? * scale)?;
        let db = dy.t()?.matmul(&shrunk)?;
        let da = dshrunk.t()?.matmul(&dropped)?;
        let dx = added_dropped(&times(dy, &self.frozen.active()?)?, &dshrunk.matmul(&a)?, self.dropout)?;
        Ok(vec![dx, padded(&da, full_a)?, padded(&db, full_b)?])
    }
}
