//! Losses of logits.

use super::Composed;
use crate::backend::reference::fused::{CrossEntropy, Divergence};
use crate::backend::reference::gpu::Gpu;
use candle_core::{D, Result, Tensor, bail};

/// `(n, 1)`: the logarithm of each row's sum of exponentials.
fn log_sums(logits: &Tensor) -> Result<Tensor> {
    let most = logits.max_keepdim(D::Minus1)?;
    most.clone() + logits.broadcast_sub(&most)?.exp()?.sum_keepdim(D::Minus1)?.log()?
}

impl CrossEntropy {
    /// `(n, 1)`
    fn column(&self, logits: &Tensor) -> Result<Tensor> {
        let (rows, width) = logits.dims2()?;
        if rows == 0 || rows != self.targets.len() || self.targets.iter().any(|&t| t as usize >= width) {
            bail!("cross entropy: logits {:?}, {} targets", logits.dims(), self.targets.len());
        }
        Tensor::from_slice(&self.targets, (rows, 1), logits.device())
    }
}

impl Composed for CrossEntropy {
    const NAME: &'static str = "cross entropy";

    fn forward(&self, operands: &[Tensor]) -> Result<Tensor> {
        let logits = &operands[0];
        let targets = self.column(logits)?;
        let losses = match Gpu::of(logits) {
            Some(gpu) => gpu.cross_entropy(logits, &targets)?,
            None => (log_sums(logits)? - logits.gather(&targets, 1)?)?,
        };
        losses.sum_all()? / self.count as f64
    }

    fn backward(&self, operands: &[Tensor], dy: &Tensor) -> Result<Vec<Tensor>> {
        let logits = &operands[0];
        let targets = self.column(logits)?;
        if let Some(gpu) = Gpu::of(logits) {
            return Ok(vec![gpu.cross_entropy_back(logits, &targets, dy, self.count)?]);
        }
        let weight = (dy / self.count as f64)?;
        let shares = logits.broadcast_sub(&log_sums(logits)?)?.exp()?.broadcast_mul(&weight)?;
        let taken = weight.neg()?.broadcast_as(targets.shape())?.contiguous()?;
        Ok(vec![shares.scatter_add(&targets, &taken, 1)?])
    }
}

impl Divergence {
    /// `(n, V)`: the logarithms of the shares that the teacher and these logits give.
    fn log_shares(&self, logits: &Tensor) -> Result<(Tensor, Tensor)> {
        let of = |logits: &Tensor| logits.broadcast_sub(&log_sums(logits)?);
        Ok((of(&self.teacher)?, of(logits)?))
    }

    fn same_shape(&self, logits: &Tensor) -> Result<()> {
        if logits.shape() != self.teacher.shape() {
            bail!("divergence: logits {:?}, the teacher's {:?}", logits.dims(), self.teacher.dims());
        }
        Ok(())
    }
}

impl Composed for Divergence {
    const NAME: &'static str = "divergence";

    fn forward(&self, operands: &[Tensor]) -> Result<Tensor> {
        let logits = &operands[0];
        self.same_shape(logits)?;
        let losses = match Gpu::of(logits) {
            Some(gpu) => gpu.divergence(&self.teacher, logits)?,
            None => {
                let (teacher, student) = self.log_shares(logits)?;
                teacher.exp()?.mul(&(teacher - student)?)?
            }
        };
        losses.sum_all()? / self.count as f64
    }

    fn backward(&self, operands: &[Tensor], dy: &Tensor) -> Result<Vec<Tensor>> {
        let logits = &operands[0];
        self.same_shape(logits)?;
        if let Some(gpu) = Gpu::of(logits) {
            return Ok(vec![gpu.divergence_back(&self.teacher, logits, dy, self.count)?]);
        }
        let (teacher, student) = self.log_shares(logits)?;
        let weight = (dy / self.count as f64)?;
        Ok(vec![(student.exp()? - teacher.exp()?)?.broadcast_mul(&weight)?])
    }
}
