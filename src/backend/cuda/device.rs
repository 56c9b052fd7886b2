//! One GPU: its context, its stream, and the kernels of `kernels/*.cu`.
#![allow(unsafe_code)]

use crate::backend::BackendError;
use cudarc::driver::{
    CudaContext, CudaFunction, CudaModule, CudaSlice, CudaStream, DevicePtr, DeviceRepr, DriverError, result,
    sys,
};
use cudarc::nvrtc::Ptx;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

/// Machine code for sm_80 and sm_90a and PTX for the rest, see build.rs.
static FATBIN: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/kernels.fatbin"));

/// The oldest compute capability that the kernels are compiled for.
const OLDEST: (i32, i32) = (8, 0);

/// Why a GPU cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    #[error("no NVIDIA driver: libcuda.so.1 was not found")]
    NoDriver,
    #[error("no GPU {asked}: the driver knows {count}")]
    NoDevice { asked: usize, count: i32 },
    #[error("GPU {ordinal} ({name}) has compute capability {}.{}, and {}.{} is needed", .capability.0, .capability.1, OLDEST.0, OLDEST.1)]
    TooOld { ordinal: usize, name: String, capability: (i32, i32) },
    #[error("{call}: {message}")]
    Driver { call: &'static str, message: String },
}

impl DeviceError {
    fn driver(call: &'static str) -> impl Fn(DriverError) -> Self {
        move |error| Self::Driver { call, message: message(error) }
    }
}

fn message(error: DriverError) -> String {
    let text =
        error.error_string().map_or_else(|_| String::new(), |text| text.to_string_lossy().into_owned());
    format!("{:?} {text}", error.0)
}

/// What [`Device::launch`] starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kernel {
    Embed,
    SelectRows,
    RmsNorm,
    AddRows,
    SiluMultiply,
    Rotary,
    /// Of tiles of 1, 2, 4 or 8 rows, by the logarithm; so `Expand`.
    Shrink(usize),
    Expand(usize),
    StoreF32,
    StoreBf16,
    AttendF32,
    AttendBf16,
    ReadAll,
    MultiplyAdd,
}

impl Kernel {
    const NAMES: [&str; 20] = [
        "embed",
        "select_rows",
        "rms_norm",
        "add_rows",
        "silu_multiply",
        "rotary",
        "store_f32",
        "store_bf16",
        "attend_f32",
        "attend_bf16",
        "shrink_1",
        "shrink_2",
        "shrink_4",
        "shrink_8",
        "expand_1",
        "expand_2",
        "expand_4",
        "expand_8",
        "read_all",
        "multiply_add",
    ];

    fn index(self) -> usize {
        match self {
            Self::Embed => 0,
            Self::SelectRows => 1,
            Self::RmsNorm => 2,
            Self::AddRows => 3,
            Self::SiluMultiply => 4,
            Self::Rotary => 5,
            Self::StoreF32 => 6,
            Self::StoreBf16 => 7,
            Self::AttendF32 => 8,
            Self::AttendBf16 => 9,
            Self::Shrink(log) => 10 + log,
            Self::Expand(log) => 14 + log,
            Self::ReadAll => 18,
            Self::MultiplyAdd => 19,
        }
    }

    fn name(self) -> &'static str {
        Self::NAMES[self.index()]
    }
}

/// How many blocks, threads of each, and bytes of shared memory that the launch gives.
#[derive(Debug, Clone, Copy)]
pub(super) struct Grid {
    pub(super) blocks: (usize, usize),
    pub(super) threads: usize,
    pub(super) shared: usize,
}

impl Grid {
    pub(super) fn new(blocks: (usize, usize), threads: usize) -> Self {
        Self { blocks, threads, shared: 0 }
    }

    /// A thread for each of `count` numbers.
    pub(super) fn each(count: usize) -> Self {
        Self::new((count.div_ceil(256), 1), 256)
    }

    /// A block for each of `rows` rows of `width` numbers.
    pub(super) fn by_row(rows: usize, width: usize) -> Self {
        Self::new((rows, 1), width.next_multiple_of(32).clamp(32, 256))
    }
}

/// A kernel's argument: a number or an address.
#[derive(Debug, Clone, Copy)]
pub(super) enum Argument {
    Int(i32),
    Float(f32),
    Size(usize),
    Address(u64),
}

/// A GPU. One stream: what is started on it runs in that order.
pub(super) struct Device {
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    functions: Vec<CudaFunction>,
    name: String,
    _module: Arc<CudaModule>,
    kept: Mutex<HashMap<u64, Arc<Kept>>>,
}

/// Bytes on the device, and what they are.
pub(super) struct Kept {
    bytes: Vec<u8>,
    buffer: CudaSlice<u8>,
}

/// More tables than any model has Linears; beyond it, those of models that are gone make room.
const MOST_KEPT: usize = 1 << 14;

impl Device {
    pub(super) fn open(ordinal: usize) -> Result<Self, DeviceError> {
        // SAFETY: only looks whether the library can be opened; cudarc panics where it cannot and was not asked.
        if !unsafe { sys::is_culib_present() } {
            return Err(DeviceError::NoDriver);
        }
        let count = CudaContext::device_count().or_else(|error| match error.0 {
            sys::CUresult::CUDA_ERROR_NO_DEVICE => Ok(0),
            _ => Err(DeviceError::driver("cuInit")(error)),
        })?;
        if ordinal >= usize::try_from(count).unwrap_or(0) {
            return Err(DeviceError::NoDevice { asked: ordinal, count });
        }
        let context = CudaContext::new(ordinal).map_err(DeviceError::driver("cuDevicePrimaryCtxRetain"))?;
        let name = context.name().map_err(DeviceError::driver("cuDeviceGetName"))?;
        let capability = context.compute_capability().map_err(DeviceError::driver("cuDeviceGetAttribute"))?;
        if capability < OLDEST {
            return Err(DeviceError::TooOld { ordinal, name, capability });
        }
        // SAFETY: everything runs on one stream, so its order is the order of the calls.
        unsafe { context.disable_event_tracking() };
        keep_freed_memory(&context)?;
        let stream = context.default_stream();
        let module = context
            .load_module(Ptx::from_binary(FATBIN.to_vec()))
            .map_err(DeviceError::driver("cuModuleLoadData"))?;
        let function = |name: &&str| module.load_function(name);
        let functions = Kernel::NAMES.iter().map(function).collect::<Result<_, _>>();
        let functions = functions.map_err(DeviceError::driver("cuModuleGetFunction"))?;
        Ok(Self { context, stream, functions, name, _module: module, kept: Mutex::default() })
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn multiprocessors(&self) -> usize {
        let attribute = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        self.context.attribute(attribute).ok().and_then(|count| count.try_into().ok()).unwrap_or(1)
    }

    /// Until all that was started is done.
    pub(super) fn wait(&self) -> Result<(), BackendError> {
        self.stream.synchronize().map_err(|error| failed("cuStreamSynchronize", 0, error))
    }

    /// Bytes that are free and that there are.
    pub(super) fn memory(&self) -> Result<(usize, usize), DeviceError> {
        self.context.mem_get_info().map_err(DeviceError::driver("cuMemGetInfo"))
    }

    /// Room for `length` values, whatever they are.
    pub(super) fn room<T: DeviceRepr>(
        &self,
        what: &str,
        length: usize,
    ) -> Result<CudaSlice<T>, BackendError> {
        // SAFETY: kernels write before they read, which the emulator checks.
        let room = unsafe { self.stream.alloc::<T>(length.max(1)) };
        room.map_err(|error| self.no_room(error, what, length * size_of::<T>()))
    }

    pub(super) fn upload<T: DeviceRepr>(
        &self,
        what: &str,
        values: &[T],
    ) -> Result<CudaSlice<T>, BackendError> {
        let mut room = self.room(what, values.len())?;
        if !values.is_empty() {
            let copied = self.stream.memcpy_htod(values, &mut room);
            copied.map_err(|error| failed("cuMemcpyHtoD", size_of_val(values), error))?;
        }
        Ok(room)
    }

    /// Uploads a table, unless the last one of this `key` was the same: the layers of a step share one, and so do steps
    /// that decode for the same sub-networks.
    pub(super) fn keep(&self, key: u64, what: &str, bytes: Vec<u8>) -> Result<Arc<Kept>, BackendError> {
        // A panic in here cannot leave a table half-changed.
        let mut all = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(kept) = all.get(&key).filter(|kept| kept.bytes == bytes) {
            return Ok(Arc::clone(kept));
        }
        if all.len() >= MOST_KEPT {
            all.clear();
        }
        let kept = Arc::new(Kept { buffer: self.upload(what, &bytes)?, bytes });
        all.insert(key, Arc::clone(&kept));
        Ok(kept)
    }

    /// The first values of a buffer.
    pub(super) fn download<T: DeviceRepr + Clone + Default>(
        &self,
        from: &CudaSlice<T>,
        length: usize,
    ) -> Result<Vec<T>, BackendError> {
        let mut to = vec![T::default(); length];
        let bytes = size_of_val(to.as_slice());
        let copied = self.stream.memcpy_dtoh(&from.slice(0..length), &mut to);
        copied.map_err(|error| failed("cuMemcpyDtoH", bytes, error))?;
        self.stream.synchronize().map_err(|error| failed("cuStreamSynchronize", bytes, error))?;
        Ok(to)
    }

    /// Where a buffer begins, for a kernel that finishes before the buffer is dropped: drops are ordered with the stream.
    pub(super) fn address<T>(&self, buffer: &CudaSlice<T>) -> u64 {
        buffer.device_ptr(&self.stream).0
    }

    /// Where a place in a table lies.
    pub(super) fn place(&self, kept: &Kept, at: usize) -> Argument {
        Argument::Address(self.address(&kept.buffer) + at as u64)
    }

    /// Starts a kernel.
    ///
    /// # Safety
    /// The arguments are those of the kernel in `kernels/*.cu`, in number, order and type, and their buffers are as large
    /// as it says.
    pub(super) unsafe fn launch(
        &self,
        kernel: Kernel,
        grid: Grid,
        arguments: &[Argument],
    ) -> Result<(), BackendError> {
        if grid.blocks.0 == 0 || grid.blocks.1 == 0 {
            return Ok(());
        }
        let mut launch = self.stream.launch_builder(&self.functions[kernel.index()]);
        for argument in arguments {
            use cudarc::driver::PushKernelArg;
            match argument {
                Argument::Int(value) => launch.arg(value),
                Argument::Float(value) => launch.arg(value),
                Argument::Size(value) => launch.arg(value),
                Argument::Address(value) => launch.arg(value),
            };
        }
        let config = cudarc::driver::LaunchConfig {
            grid_dim: (grid.blocks.0 as u32, grid.blocks.1 as u32, 1),
            block_dim: (grid.threads as u32, 1, 1),
            shared_mem_bytes: grid.shared as u32,
        };
        // SAFETY: by contract.
        let launched = unsafe { launch.launch(config) };
        launched.map(|_| ()).map_err(|error| BackendError::Library {
            operation: "cuLaunchKernel",
            message: format!("{} with {grid:?}: {}", kernel.name(), message(error)),
        })
    }

    fn no_room(&self, error: DriverError, what: &str, bytes: usize) -> BackendError {
        if error.0 != sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY {
            return failed("cuMemAlloc", bytes, error);
        }
        let of = self.memory().map_or_else(
            |_| String::new(),
            |(free, total)| format!(" on {} ({} of {} MiB are free)", self.name, free >> 20, total >> 20),
        );
        BackendError::Memory { what: format!("{what}{of}"), bytes }
    }
}

/// Memory that operations give back stays with the driver's pool for the next ones, instead of with the system.
fn keep_freed_memory(context: &CudaContext) -> Result<(), DeviceError> {
    if !context.has_async_alloc() {
        return Ok(());
    }
    let release = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
    let mut most = u64::MAX;
    // SAFETY: the device is the context's, the pool is its own, and this attribute is 64 bits.
    let set = unsafe {
        result::device::get_default_mem_pool(context.cu_device())
            .and_then(|pool| result::mem_pool::set_attribute(pool, release, (&raw mut most).cast()))
    };
    set.map_err(DeviceError::driver("cuMemPoolSetAttribute"))
}

fn failed(operation: &'static str, bytes: usize, error: DriverError) -> BackendError {
    BackendError::Library { operation, message: format!("{bytes} bytes: {}", message(error)) }
}
