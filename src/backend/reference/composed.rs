//! The operations of `elastic` and `fused` once more, composed of candle's tensor operations: for any device it runs on.
//!
//! Left to candle's own way back, a product with a frozen weight would cost a gradient of that weight, as large as the
//! weight, that nobody wants. So each operation still has a way back of its own: its forward is computed without a graph
//! and attached to its operands as one node.

use super::elastic::{Elastic, Frozen, Mask};
use super::fused::{CrossEntropy, Divergence, Gated, RmsNorm, Rotary};
use candle_core::backend::BackendStorage;
use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, CustomOp2, CustomOp3, D, DType, Device, Layout, Result, Shape,
    Storage, Tensor, bail,
};
use std::sync::{Mutex, PoisonError};

/// An operation and the way back through it.
pub(super) trait Composed: Send + Sync + 'static {
    const NAME: &'static str;

    /// Takes what it has in host memory to the device, once for both ways.
    fn take_to(&mut self, _device: &Device) -> Result<()> {
        Ok(())
    }

    /// `operands` have no graph.
    fn forward(&self, operands: &[Tensor]) -> Result<Tensor>;

    /// The gradient of each operand from that of the result, `dy`.
    fn backward(&self, operands: &[Tensor], dy: &Tensor) -> Result<Vec<Tensor>>;
}

/// Runs an operation on one, two or three operands.
pub(super) fn run<C: Composed>(mut operation: C, operands: &[&Tensor]) -> Result<Tensor> {
    let detached = operands.iter().map(|operand| operand.detach()).collect::<Vec<_>>();
    if let Some(first) = operands.first() {
        operation.take_to(first.device())?;
    }
    let result = Mutex::new(Some(operation.forward(&detached)?));
    let attached = Attached { operation, result };
    match operands {
        [x] => x.apply_op1(attached),
        [x, y] => x.apply_op2(y, attached),
        [x, y, z] => x.apply_op3(y, z, attached),
        _ => bail!("{}: {} operands", C::NAME, operands.len()),
    }
}

/// A node of candle's graph whose result is there before candle asks for it.
struct Attached<C> {
    operation: C,
    /// Until it has been asked for. candle wants storage of its own: a copy, which reads and writes little beside the
    /// product that made it.
    result: Mutex<Option<Tensor>>,
}

impl<C: Composed> Attached<C> {
    /// The result's storage, by `get`.
    fn copied<S: BackendStorage>(&self, get: impl Fn(&Storage) -> Option<&S>) -> Result<(S, Shape)> {
        let result = self.result.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(result) = result else { bail!("{}: its result was asked for twice", C::NAME) };
        let result =
            if result.layout().start_offset() == 0 { result.contiguous()? } else { result.copy()? };
        let (storage, layout) = result.storage_and_layout();
        let Some(storage) = get(&storage) else { bail!("{}: its result is on another device", C::NAME) };
        Ok((storage.try_clone(layout)?, layout.shape().clone()))
    }

    fn cpu(&self) -> Result<(CpuStorage, Shape)> {
        self.copied(|storage| if let Storage::Cpu(storage) = storage { Some(storage) } else { None })
    }

    fn cuda(&self) -> Result<(CudaStorage, Shape)> {
        self.copied(|storage| if let Storage::Cuda(storage) = storage { Some(storage) } else { None })
    }

    fn way_back<const N: usize>(&self, operands: [&Tensor; N], dy: &Tensor) -> Result<[Option<Tensor>; N]> {
        let operands = operands.map(Tensor::detach);
        let mut gradients = self.operation.backward(&operands, &dy.contiguous()?)?.into_iter();
        Ok(std::array::from_fn(|_| gradients.next()))
    }
}

impl<C: Composed> CustomOp1 for Attached<C> {
    fn name(&self) -> &'static str {
        C::NAME
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        self.cpu()
    }

    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        self.cuda()
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let [dx] = self.way_back([x], dy)?;
        Ok(dx)
    }
}

impl<C: Composed> CustomOp2 for Attached<C> {
    fn name(&self) -> &'static str {
        C::NAME
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        self.cpu()
    }

    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.cuda()
    }

    fn bwd(
        &self,
        x: &Tensor,
        y: &Tensor,
        _: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        Ok(self.way_back([x, y], dy)?.into())
    }
}

impl<C: Composed> CustomOp3 for Attached<C> {
    fn name(&self) -> &'static str {
        C::NAME
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.cpu()
    }

    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.cuda()
    }

    fn bwd(
        &self,
        x: &Tensor,
        y: &Tensor,
        z: &Tensor,
        _: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        Ok(self.way_back([x, y, z], dy)?.into())
    }
}

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
    if weight.dtype() == DType::F32 {
        return x.matmul(weight);
    }
    x.to_dtype(weight.dtype())?.matmul(weight)?.to_dtype(DType::F32)
}

impl Frozen {
    fn active(&self) -> Result<Tensor> {
        prefix(&self.weight, self.out, self.inp)
    }
}

impl Composed for Frozen {
    const NAME: &'static str = "frozen product";

    fn forward(&self, operands: &[Tensor]) -> Result<Tensor> {
        times(&operands[0], &self.active()?.t()?)
    }

    fn backward(&self, _: &[Tensor], dy: &Tensor) -> Result<Vec<Tensor>> {
        Ok(vec![times(dy, &self.active()?)?])
    }
}

impl Mask {
    fn through(&self, x: &Tensor) -> Result<Tensor> {
        let Some(keep) = &self.on_device else { bail!("a mask that is not on the device") };
        x.mul(&keep.reshape(x.shape())?.to_dtype(DType::F32)?)? * f64::from(self.scale)
    }
}

impl Elastic {
    fn masked(&self, x: &Tensor) -> Result<Tensor> {
        self.dropout.as_ref().map_or_else(|| Ok(x.clone()), |mask| mask.through(x))
    }
}

impl Composed for Elastic {
    const NAME: &'static str = "elastic product";

    fn take_to(&mut self, device: &Device) -> Result<()> {
        if let Some(mask) = &mut self.dropout {
            let bytes = std::mem::take(&mut mask.keep).into_iter().map(u8::from).collect::<Vec<_>>();
            let length = bytes.len();
            mask.on_device = Some(Tensor::from_vec(bytes, length, device)?);
        }
        Ok(())
    }

    fn forward(&self, operands: &[Tensor]) -> Result<Tensor> {
        let Frozen { out, inp, .. } = self.frozen;
        let [x, a, b] = operands else { bail!("elastic product: {} operands", operands.len()) };
        let a = prefix(a, self.rank, inp)?;
        let b = prefix(b, out, self.rank)?;
        let shrunk = self.masked(x)?.matmul(&a.t()?)?;
        let adapted = (shrunk.matmul(&b.t()?)? * f64::from(self.scale))?;
        times(x, &self.frozen.active()?.t()?)? + adapted
    }

    fn backward(&self, operands: &[Tensor], dy: &Tensor) -> Result<Vec<Tensor>> {
        let Frozen { out, inp, .. } = self.frozen;
        let [x, full_a, full_b] = operands else { bail!("elastic product: {} operands", operands.len()) };
        let a = prefix(full_a, self.rank, inp)?;
        let b = prefix(full_b, out, self.rank)?;
        let dropped = self.masked(x)?;
        let scaled = (dy * f64::from(self.scale))?;
        let dshrunk = scaled.matmul(&b)?;
        let db = scaled.t()?.matmul(&dropped.matmul(&a.t()?)?)?;
        let da = dshrunk.t()?.matmul(&dropped)?;
        let through = self.masked(&dshrunk.matmul(&a)?)?;
        let dx = (times(dy, &self.frozen.active()?)? + through)?;
        Ok(vec![dx, padded(&da, full_a)?, padded(&db, full_b)?])
    }
}

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
        x.broadcast_mul(&self.scales(x)?)?.broadcast_mul(&self.weight)
    }

    fn backward(&self, operands: &[Tensor], dy: &Tensor) -> Result<Vec<Tensor>> {
        let (x, n) = (&operands[0], self.scales(&operands[0])?);
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
        operands[0].silu()?.mul(&operands[1])
    }

    fn backward(&self, operands: &[Tensor], dy: &Tensor) -> Result<Vec<Tensor>> {
        let (gate, up) = (&operands[0], &operands[1]);
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

/// `(n, 1)`: the logarithm of each row's sum of exponentials.
fn log_sums(logits: &Tensor) -> Result<Tensor> {
    let most = logits.max_keepdim(D::Minus1)?;
    most.clone() + logits.broadcast_sub(&most)?.exp()?.sum_keepdim(D::Minus1)?.log()?
}

impl CrossEntropy {
    /// `(n, 1)`: the targets, and the logarithm of each row's sum of exponentials.
    fn columns(&self, logits: &Tensor) -> Result<(Tensor, Tensor)> {
        let (rows, width) = logits.dims2()?;
        if rows == 0 || rows != self.targets.len() || self.targets.iter().any(|&t| t as usize >= width) {
            bail!("cross entropy: logits {:?}, {} targets", logits.dims(), self.targets.len());
        }
        let targets = Tensor::from_slice(&self.targets, (rows, 1), logits.device())?;
        Ok((targets, log_sums(logits)?))
    }
}

impl Composed for CrossEntropy {
    const NAME: &'static str = "cross entropy";

    fn forward(&self, operands: &[Tensor]) -> Result<Tensor> {
        let (targets, totals) = self.columns(&operands[0])?;
        (totals - operands[0].gather(&targets, 1)?)?.sum_all()? / self.count as f64
    }

    fn backward(&self, operands: &[Tensor], dy: &Tensor) -> Result<Vec<Tensor>> {
        let (targets, totals) = self.columns(&operands[0])?;
        let weight = (dy / self.count as f64)?;
        let shares = operands[0].broadcast_sub(&totals)?.exp()?.broadcast_mul(&weight)?;
        let taken = weight.neg()?.broadcast_as(targets.shape())?.contiguous()?;
        Ok(vec![shares.scatter_add(&targets, &taken, 1)?])
    }
}

impl Divergence {
    /// `(n, V)`: the logarithms of the shares that the teacher and these logits give.
    fn log_shares(&self, logits: &Tensor) -> Result<(Tensor, Tensor)> {
        if logits.shape() != self.teacher.shape() {
            bail!("divergence: logits {:?}, the teacher's {:?}", logits.dims(), self.teacher.dims());
        }
        let of = |logits: &Tensor| logits.broadcast_sub(&log_sums(logits)?);
        Ok((of(&self.teacher)?, of(logits)?))
    }
}

impl Composed for Divergence {
    const NAME: &'static str = "divergence";

    fn forward(&self, operands: &[Tensor]) -> Result<Tensor> {
        let (teacher, student) = self.log_shares(&operands[0])?;
        teacher.exp()?.mul(&(teacher - student)?)?.sum_all()? / self.count as f64
    }

    fn backward(&self, operands: &[Tensor], dy: &Tensor) -> Result<Vec<Tensor>> {
        let (teacher, student) = self.log_shares(&operands[0])?;
        let weight = (dy / self.count as f64)?;
        Ok(vec![(student.exp()? - teacher.exp()?)?.broadcast_mul(&weight)?])
    }
}
