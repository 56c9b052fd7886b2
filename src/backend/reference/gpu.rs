//! Kernels of our own for a training on a GPU, `kernels/train.cu`: one where candle's operations would be a handful, each
//! of which reads and writes all activations and, for broadcasts, takes its strides to the device first.
//!
//! What they compute stands in `composed`, which is also what a processor runs. Tensors are f32, contiguous and on one
//! device unless it is said otherwise.
#![cfg_attr(feature = "cuda-train", allow(unsafe_code))]
#![cfg_attr(not(feature = "cuda-train"), expect(dead_code, reason = "for a GPU only"))]

use super::dropout::Mask;
use candle_core::{Result, Shape, Tensor};

#[cfg(feature = "cuda-train")]
use device::Device;

/// Without the feature there is none.
#[cfg(not(feature = "cuda-train"))]
enum Device {}

/// A GPU on which a tensor lies.
pub(super) struct Gpu(Device);

/// A kernel's scalar argument.
enum Scalar {
    Count(u64),
    Whole(i32),
    Bits(u32),
    Number(f32),
}

/// Blocks and threads.
#[derive(Clone, Copy)]
enum Grid {
    /// Threads that go over so many elements.
    Elements(usize),
    /// A warp for each of so many rows.
    Warps(usize),
    /// So many blocks of so many threads.
    Blocks(usize, u32),
}

/// Threads of a block that goes over elements or a row of activations, as in kernels/train.cu.
const ROW_THREADS: u32 = 256;
/// Of one that goes over a row of logits.
const VOCABULARY_THREADS: u32 = 512;

impl Gpu {
    pub(super) fn of(x: &Tensor) -> Option<Self> {
        #[cfg(feature = "cuda-train")]
        if let candle_core::Device::Cuda(cuda) = x.device() {
            return Some(Self(Device(cuda.clone())));
        }
        let _ = x;
        None
    }

    /// `drop(x)`.
    pub(super) fn dropped(&self, x: &Tensor, mask: Mask) -> Result<Tensor> {
        let count = x.elem_count();
        self.one("train_dropped", Grid::Elements(count), &[x], x.shape(), &of_mask(count, mask))
    }

    /// `base + factor adapted`; `base` is bf16.
    pub(super) fn added(&self, base: &Tensor, adapted: &Tensor, factor: f32) -> Result<Tensor> {
        let count = adapted.elem_count();
        let scalars = [Scalar::Count(count as u64), Scalar::Number(factor)];
        self.one("train_added", Grid::Elements(count), &[base, adapted], adapted.shape(), &scalars)
    }

    /// `base + drop(through)`; `base` is bf16.
    pub(super) fn added_dropped(&self, base: &Tensor, through: &Tensor, mask: Mask) -> Result<Tensor> {
        let count = through.elem_count();
        let (grid, scalars) = (Grid::Elements(count), of_mask(count, mask));
        self.one("train_added_dropped", grid, &[base, through], through.shape(), &scalars)
    }

    pub(super) fn gated(&self, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
        let count = gate.elem_count();
        let scalars = [Scalar::Count(count as u64)];
        self.one("train_gated", Grid::Elements(count), &[gate, up], gate.shape(), &scalars)
    }

    pub(super) fn gated_back(&self, gate: &Tensor, up: &Tensor, dy: &Tensor) -> Result<[Tensor; 2]> {
        let count = gate.elem_count();
        let (grid, scalars) = (Grid::Elements(count), [Scalar::Count(count as u64)]);
        self.run("train_gated_back", grid, &[gate, up, dy], [gate.shape(), gate.shape()], &scalars)
    }

    /// `x (T, heads head_size)`, `sines` and `cosines (T, 1, head_size / 2)`; `direction` is 1 or -1.
    pub(super) fn turned(
        &self,
        x: &Tensor,
        sines: &Tensor,
        cosines: &Tensor,
        head_size: usize,
        direction: f32,
    ) -> Result<Tensor> {
        let (pairs, heads) = (x.elem_count() / 2, x.dim(1)? / head_size);
        let scalars = [
            Scalar::Count(pairs as u64),
            Scalar::Whole(heads as i32),
            Scalar::Whole((head_size / 2) as i32),
            Scalar::Number(direction),
        ];
        self.one("train_turned", Grid::Elements(pairs), &[x, sines, cosines], x.shape(), &scalars)
    }

    pub(super) fn rms_norm(&self, x: &Tensor, weight: &Tensor, eps: f32) -> Result<Tensor> {
        let (rows, width) = x.dims2()?;
        let scalars = [Scalar::Whole(width as i32), Scalar::Number(eps)];
        self.one("train_rms_norm", Grid::Blocks(rows, ROW_THREADS), &[x, weight], x.shape(), &scalars)
    }

    pub(super) fn rms_norm_back(&self, x: &Tensor, weight: &Tensor, dy: &Tensor, eps: f32) -> Result<Tensor> {
        let (rows, width) = x.dims2()?;
        let (grid, scalars) =
            (Grid::Blocks(rows, ROW_THREADS), [Scalar::Whole(width as i32), Scalar::Number(eps)]);
        self.one("train_rms_norm_back", grid, &[x, weight, dy], x.shape(), &scalars)
    }

    /// `x (heads, rows, positions)`, `bias (biases, rows, positions)`.
    pub(super) fn softmax(&self, x: &Tensor, bias: &Tensor, factor: f32) -> Result<Tensor> {
        let (all, scalars) = of_scores(x, bias, factor)?;
        self.one("train_softmax", Grid::Warps(all), &[x, bias], x.shape(), &scalars)
    }

    pub(super) fn softmax_back(&self, x: &Tensor, bias: &Tensor, dy: &Tensor, factor: f32) -> Result<Tensor> {
        let (all, scalars) = of_scores(x, bias, factor)?;
        self.one("train_softmax_back", Grid::Warps(all), &[x, bias, dy], x.shape(), &scalars)
    }

    /// `(n)`: each row's cross-entropy, of `logits (n, V)` and u32 targets.
    pub(super) fn cross_entropy(&self, logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
        self.by_row("train_cross_entropy", logits, &[logits, targets])
    }

    /// `dy` is a scalar.
    pub(super) fn cross_entropy_back(
        &self,
        logits: &Tensor,
        targets: &Tensor,
        dy: &Tensor,
        count: usize,
    ) -> Result<Tensor> {
        self.by_cell("train_cross_entropy_back", logits, &[logits, targets, dy], count)
    }

    /// `(n)`: each row's divergence, of two `(n, V)`.
    pub(super) fn divergence(&self, teacher: &Tensor, logits: &Tensor) -> Result<Tensor> {
        self.by_row("train_divergence", logits, &[teacher, logits])
    }

    /// `dy` is a scalar.
    pub(super) fn divergence_back(
        &self,
        teacher: &Tensor,
        logits: &Tensor,
        dy: &Tensor,
        count: usize,
    ) -> Result<Tensor> {
        self.by_cell("train_divergence_back", logits, &[teacher, logits, dy], count)
    }

    fn by_row(&self, name: &'static str, logits: &Tensor, inputs: &[&Tensor]) -> Result<Tensor> {
        let (rows, width) = logits.dims2()?;
        let (grid, scalars) = (Grid::Blocks(rows, VOCABULARY_THREADS), [Scalar::Whole(width as i32)]);
        self.one(name, grid, inputs, &Shape::from(rows), &scalars)
    }

    fn by_cell(
        &self,
        name: &'static str,
        logits: &Tensor,
        inputs: &[&Tensor],
        count: usize,
    ) -> Result<Tensor> {
        let (rows, width) = logits.dims2()?;
        let scalars = [Scalar::Whole(width as i32), Scalar::Number(count as f32)];
        self.one(name, Grid::Blocks(rows, VOCABULARY_THREADS), inputs, logits.shape(), &scalars)
    }

    fn one(
        &self,
        name: &'static str,
        grid: Grid,
        inputs: &[&Tensor],
        output: &Shape,
        scalars: &[Scalar],
    ) -> Result<Tensor> {
        let [output] = self.run(name, grid, inputs, [output], scalars)?;
        Ok(output)
    }

    /// Starts a kernel whose arguments are its inputs, its outputs, which are new, and its scalars.
    fn run<const N: usize>(
        &self,
        name: &'static str,
        grid: Grid,
        inputs: &[&Tensor],
        outputs: [&Shape; N],
        scalars: &[Scalar],
    ) -> Result<[Tensor; N]> {
        #[cfg(feature = "cuda-train")]
        return self.0.run(name, grid, inputs, outputs, scalars);
        #[cfg(not(feature = "cuda-train"))]
        {
            let _ = (name, grid, inputs, outputs, scalars);
            match self.0 {}
        }
    }
}

fn of_mask(count: usize, mask: Mask) -> [Scalar; 5] {
    let Mask { key, first, threshold, scale } = mask;
    let (count, key, first) = (Scalar::Count(count as u64), Scalar::Count(key), Scalar::Count(first));
    [count, key, first, Scalar::Bits(threshold), Scalar::Number(scale)]
}

/// Rows in all, and a softmax's scalars.
fn of_scores(x: &Tensor, bias: &Tensor, factor: f32) -> Result<(usize, [Scalar; 5])> {
    let (heads, rows, positions) = x.dims3()?;
    let [rows_of_one, biases, positions] = [rows, bias.dim(0)?, positions].map(|n| Scalar::Whole(n as i32));
    let all = heads * rows;
    Ok((all, [Scalar::Count(all as u64), rows_of_one, biases, positions, Scalar::Number(factor)]))
}

#[cfg(feature = "cuda-train")]
mod device {
    use super::{Grid, ROW_THREADS, Scalar};
    use candle_core::cuda_backend::cudarc::driver::{DevicePtr, LaunchConfig, PushKernelArg};
    use candle_core::cuda_backend::{CudaDevice, CudaStorage, CudaStorageSlice, WrapErr};
    use candle_core::op::BackpropOp;
    use candle_core::{Result, Shape, Storage, Tensor, bail};

    /// Compiled by build.rs; the driver compiles it for the device it finds, once.
    const KERNELS: &str = include_str!(concat!(env!("OUT_DIR"), "/train.ptx"));
    const WARP: usize = 32;
    /// Of a grid over elements: enough to fill a GPU, and then each thread takes several.
    const MOST_BLOCKS: usize = 4096;

    pub(super) struct Device(pub(super) CudaDevice);

    impl Device {
        pub(super) fn run<const N: usize>(
            &self,
            name: &'static str,
            grid: Grid,
            inputs: &[&Tensor],
            outputs: [&Shape; N],
            scalars: &[Scalar],
        ) -> Result<[Tensor; N]> {
            let stream = self.0.cuda_stream();
            let addresses =
                inputs.iter().map(|tensor| self.address(name, tensor)).collect::<Result<Vec<_>>>()?;
            // SAFETY: every kernel writes all of its outputs.
            let fresh = outputs.map(|shape| unsafe { self.0.alloc::<f32>(shape.elem_count()) });
            let mut results = Vec::with_capacity(N);
            for slice in fresh {
                results.push(slice?);
            }
            let of_results = results.iter().map(|slice| slice.device_ptr(&stream).0).collect::<Vec<_>>();
            let function = self.0.get_or_load_custom_func(name, "train", KERNELS)?;
            let mut launch = function.builder();
            addresses.iter().chain(&of_results).for_each(|address| {
                launch.arg(address);
            });
            for scalar in scalars {
                match scalar {
                    Scalar::Count(value) => launch.arg(value),
                    Scalar::Whole(value) => launch.arg(value),
                    Scalar::Bits(value) => launch.arg(value),
                    Scalar::Number(value) => launch.arg(value),
                };
            }
            // SAFETY: the arguments are those that kernels/train.cu declares; what they point to lives until this device's one
            // stream is through with the kernel, since frees are asked for on that stream, too.
            unsafe { launch.launch(config(grid)) }.w()?;
            let mut results = results.into_iter().zip(outputs);
            Ok(std::array::from_fn(|_| {
                let (slice, shape) = results.next().expect("as many results as outputs");
                let storage = CudaStorage::wrap_cuda_slice(slice, self.0.clone());
                Tensor::from_storage(Storage::Cuda(storage), shape.clone(), BackpropOp::none(), false)
            }))
        }

        /// Where a contiguous tensor begins.
        fn address(&self, name: &str, tensor: &Tensor) -> Result<u64> {
            let (storage, layout) = tensor.storage_and_layout();
            let (Storage::Cuda(storage), Some((start, _))) = (&*storage, layout.contiguous_offsets()) else {
                bail!("{name}: not contiguous, or not on the GPU: {layout:?}");
            };
            let stream = self.0.cuda_stream();
            let (base, size) = match &storage.slice {
                CudaStorageSlice::F32(slice) => (slice.device_ptr(&stream).0, 4),
                CudaStorageSlice::U32(slice) => (slice.device_ptr(&stream).0, 4),
                CudaStorageSlice::BF16(slice) => (slice.device_ptr(&stream).0, 2),
                _ => bail!("{name}: of another type: {:?}", tensor.dtype()),
            };
            Ok(base + (start * size) as u64)
        }
    }

    fn config(grid: Grid) -> LaunchConfig {
        let (blocks, threads) = match grid {
            Grid::Elements(count) => {
                (count.div_ceil(ROW_THREADS as usize).clamp(1, MOST_BLOCKS), ROW_THREADS)
            }
            Grid::Warps(rows) => ((rows * WARP).div_ceil(ROW_THREADS as usize), ROW_THREADS),
            Grid::Blocks(blocks, threads) => (blocks, threads),
        };
        LaunchConfig { grid_dim: (blocks as u32, 1, 1), block_dim: (threads, 1, 1), shared_mem_bytes: 0 }
    }
}
