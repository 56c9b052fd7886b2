//! The product with a frozen weight, `x W^T`, whose backward pass computes the gradient of `x` alone.
//!
//! candle's own product always computes both gradients; for a frozen weight that is a third of the arithmetic of a
//! training step and a gradient buffer as large as the base model, for nothing.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Storage, Tensor, bail};

struct FrozenProduct {
    /// `(out, inp)`, possibly a prefix of a larger matrix.
    weight: Tensor,
}

/// `x (T, inp)` times `weight (out, inp)` transposed: `(T, out)`.
pub(super) fn product(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    x.contiguous()?.apply_op1(FrozenProduct { weight: weight.clone() })
}

impl CustomOp1 for FrozenProduct {
    fn name(&self) -> &'static str {
        "frozen product"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (rows, inp) = layout.shape().dims2()?;
        let transposed = self.weight.t()?;
        let (weight, weight_layout) = transposed.storage_and_layout();
        let Storage::Cpu(weight) = &*weight else { bail!("frozen product: the weight is not on the cpu") };
        let (weight_inp, out) = weight_layout.shape().dims2()?;
        if weight_inp != inp {
            bail!("frozen product: x has {inp} columns, the weight {weight_inp}");
        }
        let y = x.matmul(weight, (1, rows, out, inp), layout, weight_layout)?;
        Ok((y, Shape::from((rows, out))))
    }

    fn bwd(&self, _x: &Tensor, _y: &Tensor, y_gradient: &Tensor) -> Result<Option<Tensor>> {
        y_gradient.matmul(&self.weight).map(Some)
    }
}
