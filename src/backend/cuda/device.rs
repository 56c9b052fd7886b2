//! One GPU: its context, its stream, and the kernels of `kernels/*.cu`.
#![allow(unsafe_code)]

use super::arena::Place;
use super::error::{DeviceError, OLDEST, failed, failed_with};
use super::few::MOST_SHRINKS;
use super::kernel::{Argument, Grid, Kernel, Launch, Tape};
use super::step::{Counts, Step};
use crate::backend::BackendError;
use cudarc::driver::{
    CudaContext, CudaFunction, CudaGraph, CudaModule, CudaSlice, CudaStream, DevicePtr, DeviceRepr,
    DriverError, result, sys,
};
use cudarc::nvrtc::Ptx;
use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Machine code for sm_80 and sm_90a and PTX for the rest, see build.rs.
static FATBIN: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/kernels.fatbin"));

/// The only compute capability that the code for sm_90a runs on: with `wgmma`, and with the waits that programmatic dependent
/// launches need. Others run that for sm_80, newer ones translated, which has neither.
const HOPPER: (i32, i32) = (9, 0);

/// Numbers of `Counters` in kernels/few_rows.cu.
const COUNTERS: usize = 2 + MOST_SHRINKS;
/// Rows times key-value heads that one launch of `attend` in kernels/attend_few.cu counts the chunks of.
pub(super) const CHUNK_COUNTERS: usize = 1 << 16;

/// A GPU. One stream: what is started on it runs in that order.
pub(super) struct Device {
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    functions: Vec<CudaFunction>,
    name: String,
    /// Bytes that a block may have.
    most_shared: usize,
    multiprocessors: usize,
    /// Whether kernels begin while the last blocks of the one before run, see kernels/common.cuh.
    overlaps: bool,
    wgmma: bool,
    narrow: bool,
    _module: Arc<CudaModule>,
    step: Mutex<Step>,
    /// Tables that stay from step to step, and what is in them.
    kept: Mutex<HashMap<u64, Kept>>,
    /// `Counters` of kernels/few_rows.cu: zero before and after every launch.
    counters: CudaSlice<u32>,
    /// Those of `attend` in kernels/attend_few.cu, likewise.
    chunk_counters: CudaSlice<u32>,
    /// Whether activations have memory of their own each, which the emulator watches the bounds of.
    apart: bool,
}

/// How a GPU is used: tests try what is not the rule.
#[derive(Debug, Clone, Copy)]
pub(super) struct How {
    /// Activations have memory of their own each.
    pub(super) apart: bool,
    /// Where it has `wgmma`, with it.
    pub(super) wgmma: bool,
    /// Small weights have kernels of their own.
    pub(super) narrow: bool,
}

impl How {
    pub(super) const RULE: Self = Self { apart: false, wgmma: true, narrow: true };
}

/// Bytes, and where they are on the device.
type Kept = (Vec<u8>, CudaSlice<u8>);

/// Recorded kernels.
pub(super) struct Graph(CudaGraph);

// SAFETY: a graph may be used from any thread, by one at a time; the step that has it is behind a lock.
unsafe impl Send for Graph {}

/// Device memory that outlives the kernels on the tape that read it.
pub(super) struct Buffer {
    memory: Option<CudaSlice<u8>>,
    pub(super) address: u64,
    pub(super) bytes: usize,
    device: Arc<Device>,
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let Some(memory) = self.memory.take() {
            self.device.step().retire(memory);
        }
    }
}

/// Memory for a step's activations: in the arena, or of its own.
pub(super) enum Room {
    Place(Place, Arc<Device>),
    Apart(Buffer),
}

impl Room {
    pub(super) fn address(&self) -> u64 {
        match self {
            Self::Place(place, _) => place.address,
            Self::Apart(buffer) => buffer.address,
        }
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        if let Self::Place(place, device) = self {
            // Kernels run in the order of the tape: whoever takes the place next comes after those that use it now.
            device.step().arena.give_back(*place);
        }
    }
}

/// More tables than any model has Linears; beyond it, those of models that are gone make room.
const MOST_KEPT: usize = 1 << 14;

impl Device {
    pub(super) fn open(ordinal: usize, how: How) -> Result<Self, DeviceError> {
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
        // The default stream cannot be recorded.
        let stream = context.new_stream().map_err(DeviceError::driver("cuStreamCreate"))?;
        let module = context
            .load_module(Ptx::from_binary(FATBIN.to_vec()))
            .map_err(DeviceError::driver("cuModuleLoadData"))?;
        let function = |name: &&str| module.load_function(name);
        let functions = Kernel::NAMES.iter().map(function).collect::<Result<_, _>>();
        let functions: Vec<CudaFunction> = functions.map_err(DeviceError::driver("cuModuleGetFunction"))?;
        let most_shared = attribute(
            &context,
            sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN,
        )?;
        let multiprocessors =
            attribute(&context, sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        allow_shared_memory(&functions, most_shared)?;
        let zeros = |count| stream.alloc_zeros(count).map_err(DeviceError::driver("cuMemAlloc"));
        let (counters, chunk_counters) = (zeros(COUNTERS)?, zeros(CHUNK_COUNTERS)?);
        let (step, kept) = (Mutex::default(), Mutex::default());
        Ok(Self {
            context,
            stream,
            functions,
            name,
            most_shared,
            multiprocessors,
            overlaps: capability == HOPPER,
            wgmma: capability == HOPPER && how.wgmma,
            narrow: capability == HOPPER && how.narrow,
            _module: module,
            step,
            kept,
            counters,
            chunk_counters,
            apart: how.apart,
        })
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn multiprocessors(&self) -> usize {
        self.multiprocessors
    }

    /// Whether kernels/many_rows_wgmma.cu runs on it.
    pub(super) fn has_wgmma(&self) -> bool {
        self.wgmma
    }

    /// Whether kernels/few_narrow.cu pays on it, which asks for weights before the kernel before has ended, if it has the room.
    pub(super) fn has_narrow(&self) -> bool {
        self.narrow && self.has_room_for(Kernel::NarrowLinearFew)
    }

    /// Whether a block may have as much shared memory as this kernel takes.
    pub(super) fn has_room_for(&self, kernel: Kernel) -> bool {
        kernel.shared_bytes() + kernel.static_bytes() <= self.most_shared
    }

    /// Bytes that are free and that there are.
    pub(super) fn memory(&self) -> Result<(usize, usize), DeviceError> {
        self.context.mem_get_info().map_err(DeviceError::driver("cuMemGetInfo"))
    }

    pub(super) fn counts(&self) -> Counts {
        self.step().counts
    }

    fn step(&self) -> MutexGuard<'_, Step> {
        // A panic within is a bug, and leaves at worst a tape that fails as a whole.
        self.step.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes a kernel onto the tape.
    ///
    /// # Safety
    /// The arguments are those of the kernel in `kernels/*.cu`, in number, order and type, and their buffers are as large
    /// as it says.
    pub(super) unsafe fn push(&self, kernel: Kernel, grid: Grid, arguments: &[Argument<'_>]) {
        self.step().push(self, kernel, grid, arguments);
    }

    /// Puts bytes into the step's table; where they will be when the tape runs.
    pub(super) fn stage<T: bytemuck::NoUninit>(&self, values: &[T]) -> Result<u64, BackendError> {
        self.step().stage(self, bytemuck::cast_slice(values))
    }

    /// The same, once in a step for the same owner, whose values stay the same.
    pub(super) fn stage_once<T: bytemuck::NoUninit>(
        &self,
        owner: u64,
        values: &[T],
    ) -> Result<u64, BackendError> {
        self.step().stage_once(self, owner, bytemuck::cast_slice(values))
    }

    /// The same, unless the owner's last values of this step were the same.
    pub(super) fn stage_changed<T: bytemuck::NoUninit>(
        &self,
        owner: u64,
        values: &[T],
    ) -> Result<u64, BackendError> {
        self.step().stage_changed(self, owner, bytemuck::cast_slice(values))
    }

    /// Starts all that is on the tape.
    pub(super) fn run(&self) -> Result<(), BackendError> {
        self.step().run(self)
    }

    /// Starts nothing of this step before it is run.
    pub(super) fn hold(&self) {
        self.step().hold();
    }

    /// Empties the tape without starting it.
    pub(super) fn forget(&self) {
        self.step().forget();
    }

    /// Until all that was started is done.
    pub(super) fn wait(&self) -> Result<(), BackendError> {
        self.stream.synchronize().map_err(|error| failed("cuStreamSynchronize", 0, error))
    }

    pub(super) fn counters(&self) -> Argument<'static> {
        Argument::Address(self.address(&self.counters))
    }

    pub(super) fn chunk_counters(&self) -> Argument<'static> {
        Argument::Address(self.address(&self.chunk_counters))
    }

    /// Driver memory for `length` values, whatever they are.
    pub(super) fn room<T: DeviceRepr>(
        &self,
        what: &str,
        length: usize,
    ) -> Result<CudaSlice<T>, BackendError> {
        // SAFETY: kernels write before they read, which the emulator checks.
        let room = unsafe { self.stream.alloc::<T>(length.max(1)) };
        room.map_err(|error| self.no_room(error, what, length * size_of::<T>()))
    }

    /// Where memory begins.
    pub(super) fn address<T>(&self, buffer: &CudaSlice<T>) -> u64 {
        buffer.device_ptr(&self.stream).0
    }

    /// What calls the driver directly has to be on a thread that this GPU is current on.
    fn bind(&self) -> Result<(), BackendError> {
        self.context.bind_to_thread().map_err(|error| failed("cuCtxSetCurrent", 0, error))
    }

    pub(super) fn upload_to(&self, address: u64, bytes: &[u8]) -> Result<(), BackendError> {
        self.bind()?;
        // SAFETY: whoever calls has so much room there; the host's bytes are copied before the call returns.
        let copied = unsafe { result::memcpy_htod_async(address, bytes, self.stream.cu_stream()) };
        copied.map_err(|error| failed("cuMemcpyHtoD", bytes.len(), error))
    }

    /// Uploads a table, unless the last one of this `key` was the same; where it is.
    pub(super) fn keep(&self, key: u64, what: &str, bytes: &[u8]) -> Result<u64, BackendError> {
        // A panic in here cannot leave a table half-changed.
        let mut all = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, memory)) = all.get(&key).filter(|(kept, _)| kept == bytes) {
            return Ok(self.address(memory));
        }
        if all.len() >= MOST_KEPT {
            let mut step = self.step();
            all.drain().for_each(|(_, (_, memory))| step.retire(memory));
        }
        let memory = self.room(what, bytes.len())?;
        let address = self.address(&memory);
        self.upload_to(address, bytes)?;
        if let Some((_, old)) = all.insert(key, (bytes.to_vec(), memory)) {
            self.step().retire(old);
        }
        Ok(address)
    }

    /// Runs the tape, and reads values.
    pub(super) fn download<T: bytemuck::Pod>(
        &self,
        address: u64,
        length: usize,
    ) -> Result<Vec<T>, BackendError> {
        self.run()?;
        self.bind()?;
        let mut to = vec![T::zeroed(); length];
        let bytes = size_of_val(to.as_slice());
        // SAFETY: whoever calls has so much there; `to` stays until the stream has been waited for.
        let copied = unsafe { result::memcpy_dtoh_async(&mut to, address, self.stream.cu_stream()) };
        let waited = self.wait();
        copied.map_err(|error| failed("cuMemcpyDtoH", bytes, error))?;
        waited.map(|()| to)
    }

    /// Starts each kernel.
    pub(super) fn start(&self, tape: &Tape) -> Result<(), BackendError> {
        self.bind()?;
        for launch in tape.iter() {
            self.start_one(&launch).map_err(|error| {
                let what = format!("{} with {:?}", Kernel::NAMES[launch.kernel], launch.grid);
                failed_with("cuLaunchKernelEx", &what, error)
            })?;
        }
        Ok(())
    }

    fn start_one(&self, launch: &Launch<'_>) -> Result<(), DriverError> {
        let ([x, y, z], grid) = (launch.grid.blocks.map(|n| n as u32), launch.grid);
        let pointer = |&word: &&u64| std::ptr::from_ref(word).cast_mut().cast::<c_void>();
        let mut arguments = launch.arguments.iter().map(pointer).collect::<Vec<_>>();
        let mut overlaps = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let config = sys::CUlaunchConfig {
            gridDimX: x,
            gridDimY: y,
            gridDimZ: z,
            blockDimX: grid.threads as u32,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: grid.shared as u32,
            hStream: self.stream.cu_stream(),
            attrs: &raw mut overlaps,
            numAttrs: u32::from(self.overlaps),
        };
        let function = self.functions[launch.kernel].cu_function();
        // SAFETY: who wrote it onto the tape has promised that the arguments are the kernel's; the driver reads them and the
        // attribute only. Every kernel waits for the one before it, before it reads what that one writes.
        unsafe {
            sys::cuLaunchKernelEx(&raw const config, function, arguments.as_mut_ptr(), std::ptr::null_mut())
        }
        .result()
    }

    /// Records the tape's kernels.
    pub(super) fn graph(&self, tape: &Tape) -> Result<Graph, BackendError> {
        let failed = |call| move |error| failed(call, 0, error);
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        self.stream.begin_capture(mode).map_err(failed("cuStreamBeginCapture"))?;
        let started = self.start(tape);
        let graph = self.stream.end_capture(sys::CUgraphInstantiate_flags(0));
        started?;
        let graph = graph.map_err(failed("cuStreamEndCapture"))?;
        graph.map(Graph).ok_or_else(|| BackendError::Library {
            operation: "cuStreamEndCapture",
            message: format!("no graph of {} kernels", tape.launches()),
        })
    }

    pub(super) fn start_graph(&self, graph: &Graph) -> Result<(), BackendError> {
        graph.0.launch().map_err(|error| failed("cuGraphLaunch", 0, error))
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

/// What holds on to the device.
pub(super) trait Shared {
    /// Memory that stays until the kernels that are on the tape when it is dropped have run.
    fn buffer(&self, what: &str, bytes: usize) -> Result<Buffer, BackendError>;

    /// The same with these values in it.
    fn upload<T: bytemuck::NoUninit>(&self, what: &str, values: &[T]) -> Result<Buffer, BackendError>;

    /// Memory for a step's activations.
    fn activations(&self, bytes: usize) -> Result<Room, BackendError>;
}

impl Shared for Arc<Device> {
    fn buffer(&self, what: &str, bytes: usize) -> Result<Buffer, BackendError> {
        let memory = self.room(what, bytes)?;
        Ok(Buffer { address: self.address(&memory), memory: Some(memory), bytes, device: Self::clone(self) })
    }

    fn upload<T: bytemuck::NoUninit>(&self, what: &str, values: &[T]) -> Result<Buffer, BackendError> {
        let buffer = self.buffer(what, size_of_val(values))?;
        if !values.is_empty() {
            self.upload_to(buffer.address, bytemuck::cast_slice(values))?;
        }
        Ok(buffer)
    }

    fn activations(&self, bytes: usize) -> Result<Room, BackendError> {
        if self.apart {
            return self.buffer("activations", bytes).map(Room::Apart);
        }
        let place = self.step().take(self, bytes)?;
        Ok(Room::Place(place, Self::clone(self)))
    }
}

fn attribute(context: &CudaContext, attribute: sys::CUdevice_attribute) -> Result<usize, DeviceError> {
    let value = context.attribute(attribute).map_err(DeviceError::driver("cuDeviceGetAttribute"))?;
    Ok(usize::try_from(value).unwrap_or(0))
}

/// More than 48 KiB have to be asked for.
fn allow_shared_memory(functions: &[CudaFunction], most: usize) -> Result<(), DeviceError> {
    let attribute = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
    let carveout = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT;
    for (kernel, function) in Kernel::ALL.iter().zip(functions) {
        let bytes = kernel.shared_bytes();
        let set = |attribute, value| {
            function.set_attribute(attribute, value).map_err(DeviceError::driver("cuFuncSetAttribute"))
        };
        if bytes > 0 && bytes + kernel.static_bytes() <= most {
            set(attribute, bytes as i32)?;
        }
        if kernel.attends_few() || kernel.multiplies_narrow() {
            // All that a multiprocessor has: it decides how many blocks read at the same time, also of kernels that follow each other.
            set(carveout, 100)?;
        }
    }
    Ok(())
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
