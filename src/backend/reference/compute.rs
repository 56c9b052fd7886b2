//! What the reference backend computes on, and in which numbers.
//!
//! On a processor in f32, by operations of our own. On a GPU the frozen weights are bf16 and everything else f32, and the
//! operations are composed of candle's; `Compute::composed` does the same on a processor, where it can be tested.

use super::composed::{Composed, run};
use super::gradients::LOGITS_ROWS;
use candle_core::{CustomOp1, CustomOp2, CustomOp3, DType, Device, Result, Tensor};

/// Where to compute, and how frozen weights are kept there.
#[derive(Debug, Clone)]
pub struct Compute {
    pub(super) device: Device,
    /// Of frozen matrices. Adapters, activations and gradients are f32.
    pub(super) weights: DType,
    /// Whether operations are composed of candle's own, instead of ours for processors.
    pub(super) composed: bool,
}

/// Why a GPU cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ComputeError {
    #[error(
        "this lonas was built to train on processors only; kernels/candle.sh says how to build it with `--features \
         cuda-train`"
    )]
    NotBuilt,
    #[error("there is no NVIDIA driver, or no GPU that it knows: {message}")]
    NoGpu { message: String },
    #[error("there is no GPU number {ordinal}: {message}")]
    NoSuchGpu { ordinal: usize, message: String },
    #[error("GPU number {ordinal}: {message}")]
    Library { ordinal: usize, message: String },
}

impl Compute {
    /// The processor, in f32.
    pub fn cpu() -> Self {
        Self { device: Device::Cpu, weights: DType::F32, composed: false }
    }

    /// The processor, by the operations that a GPU would run: slow, to compare with.
    pub fn composed(bf16_weights: bool) -> Self {
        let weights = if bf16_weights { DType::BF16 } else { DType::F32 };
        Self { device: Device::Cpu, weights, composed: true }
    }

    /// An NVIDIA GPU, with frozen weights in bf16.
    ///
    /// # Errors
    /// That there is none, as far as that can be told.
    pub fn cuda(ordinal: usize) -> std::result::Result<Self, ComputeError> {
        if !cfg!(feature = "cuda-train") {
            return Err(ComputeError::NotBuilt);
        }
        // candle's usual stream is another one for each thread, and what one thread has computed the next one reads: the
        // threads that add up gradients and publish values are not the one that runs the graph.
        let device =
            Device::new_cuda_with_stream(ordinal).map_err(|error| classified(ordinal, error.to_string()))?;
        one_stream_only(&device);
        keep_freed_memory(&device).map_err(|message| ComputeError::Library { ordinal, message })?;
        Ok(Self { device, weights: DType::BF16, composed: true })
    }

    /// Whether frozen weights are rounded to bf16.
    pub fn rounds_weights(&self) -> bool {
        self.weights == DType::BF16
    }

    /// Whether operations are composed of candle's own.
    pub fn is_composed(&self) -> bool {
        self.composed
    }

    /// Rows whose logits exist at the same time. A GPU is through with few before the next kernels have been started.
    pub fn logits_rows(&self) -> usize {
        if self.is_gpu() { 8 * LOGITS_ROWS } else { LOGITS_ROWS }
    }

    pub fn is_gpu(&self) -> bool {
        !self.device.is_cpu()
    }

    /// Bytes of the GPU that are free, and all that it has, where it is one that says so.
    pub fn memory(&self) -> Option<(usize, usize)> {
        #[cfg(feature = "cuda-train")]
        if let Device::Cuda(cuda) = &self.device {
            // What is being freed is free when all that was asked for is done; what was freed and kept counts as used.
            self.device.synchronize().ok()?;
            return cuda.cuda_stream().context().mem_get_info().ok();
        }
        None
    }

    pub(super) fn run1<C>(&self, operation: C, x: &Tensor) -> Result<Tensor>
    where
        C: CustomOp1 + Composed,
    {
        let x = x.contiguous()?;
        if self.composed { run(operation, &[&x]) } else { x.apply_op1(operation) }
    }

    pub(super) fn run2<C>(&self, operation: C, x: &Tensor, y: &Tensor) -> Result<Tensor>
    where
        C: CustomOp2 + Composed,
    {
        let (x, y) = (x.contiguous()?, y.contiguous()?);
        if self.composed { run(operation, &[&x, &y]) } else { x.apply_op2(&y, operation) }
    }

    pub(super) fn run3<C>(&self, operation: C, x: &Tensor, y: &Tensor, z: &Tensor) -> Result<Tensor>
    where
        C: CustomOp3 + Composed,
    {
        let x = x.contiguous()?;
        if self.composed { run(operation, &[&x, y, z]) } else { x.apply_op3(y, z, operation) }
    }
}

/// Without events that would put the work of several streams in order: an event for each operand of each operation.
fn one_stream_only(device: &Device) {
    #[cfg(feature = "cuda-train")]
    if let Device::Cuda(cuda) = device {
        #[expect(unsafe_code, reason = "candle cannot know that there is one stream")]
        // SAFETY: all work on this device goes to its one stream, where it runs in the order in which it was asked for.
        unsafe {
            cuda.disable_event_tracking();
        }
    }
    #[cfg(not(feature = "cuda-train"))]
    let _ = device;
}

/// What is freed stays at hand for the next operation. Left to itself, the driver takes memory back each time that a result is waited
/// for, and mapping it anew costs more than most operations.
fn keep_freed_memory(device: &Device) -> std::result::Result<(), String> {
    #[cfg(feature = "cuda-train")]
    if let Device::Cuda(cuda) = device {
        use candle_core::cuda_backend::cudarc::driver::{result, sys};
        let stream = cuda.cuda_stream();
        if !stream.context().has_async_alloc() {
            return Ok(());
        }
        let release = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        let mut most = u64::MAX;
        #[expect(unsafe_code, reason = "an attribute that neither candle nor cudarc sets")]
        // SAFETY: the device is the context's, the pool is its own, and this attribute is 64 bits.
        let set = unsafe {
            result::device::get_default_mem_pool(stream.context().cu_device())
                .and_then(|pool| result::mem_pool::set_attribute(pool, release, (&raw mut most).cast()))
        };
        return set.map_err(|error| format!("cuMemPoolSetAttribute: {error}"));
    }
    let _ = device;
    Ok(())
}

/// The driver's error codes by their names, which is all that candle passes on.
fn classified(ordinal: usize, message: String) -> ComputeError {
    let says = |codes: &[&str]| codes.iter().any(|code| message.contains(code));
    if says(&["CUDA_ERROR_INVALID_DEVICE"]) {
        ComputeError::NoSuchGpu { ordinal, message }
    } else if says(&["CUDA_ERROR_NO_DEVICE", "CUDA_ERROR_STUB_LIBRARY", "CUDA_ERROR_NOT_INITIALIZED"]) {
        ComputeError::NoGpu { message }
    } else {
        ComputeError::Library { ordinal, message }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_driver_says_becomes_what_is_missing() {
        let of = |code: &str| classified(3, format!("DriverError({code}, \"...\")"));
        assert!(matches!(of("CUDA_ERROR_NO_DEVICE"), ComputeError::NoGpu { .. }));
        assert!(matches!(of("CUDA_ERROR_STUB_LIBRARY"), ComputeError::NoGpu { .. }));
        assert!(matches!(of("CUDA_ERROR_INVALID_DEVICE"), ComputeError::NoSuchGpu { ordinal: 3, .. }));
        let other = of("CUDA_ERROR_OUT_OF_MEMORY");
        assert!(matches!(other, ComputeError::Library { .. }) && other.to_string().contains("OUT_OF_MEMORY"));
    }

    #[cfg(not(feature = "cuda-train"))]
    #[test]
    fn without_the_feature_there_is_no_gpu_and_it_is_said_how_to_build_one() {
        let error = Compute::cuda(0).unwrap_err();
        assert!(matches!(error, ComputeError::NotBuilt) && error.to_string().contains("cuda-train"));
    }
}
