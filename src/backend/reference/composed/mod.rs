//! The operations of `elastic` and `fused` once more, composed of candle's tensor operations: for any device it runs on. On a
//! GPU, kernels of our own stand for what would be a handful of candle's; see `gpu`.
//!
//! Left to candle's own way back, a product with a frozen weight would cost a gradient of that weight, as large as the
//! weight, that nobody wants. So each operation still has a way back of its own: its forward is computed without a graph
//! and attached to its operands as one node.

mod losses;
mod products;
mod rows;

pub(super) use rows::Softmax;

use candle_core::backend::BackendStorage;
use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, CustomOp2, CustomOp3, Layout, Result, Shape, Storage, Tensor, bail,
};
use std::sync::{Mutex, PoisonError};

/// An operation and the way back through it.
pub(super) trait Composed: Send + Sync + 'static {
    const NAME: &'static str;

    /// `operands` have no graph.
    fn forward(&self, operands: &[Tensor]) -> Result<Tensor>;

    /// The gradient of each operand from that of the result, `dy`.
    fn backward(&self, operands: &[Tensor], dy: &Tensor) -> Result<Vec<Tensor>>;
}

/// Runs an operation on one, two or three operands.
pub(super) fn run<C: Composed>(operation: C, operands: &[&Tensor]) -> Result<Tensor> {
    let detached = operands.iter().map(|operand| operand.detach()).collect::<Vec<_>>();
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
