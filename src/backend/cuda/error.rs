//! What a driver says when it cannot.

use crate::backend::BackendError;
use cudarc::driver::DriverError;
use cudarc::driver::sys::CUresult;

/// The oldest compute capability that the kernels are compiled for.
pub(super) const OLDEST: (i32, i32) = (8, 0);

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
    pub(super) fn driver(call: &'static str) -> impl Fn(DriverError) -> Self {
        move |error| Self::Driver { call, message: message(error) }
    }
}

pub(super) fn message(error: DriverError) -> String {
    let text =
        error.error_string().map_or_else(|_| String::new(), |text| text.to_string_lossy().into_owned());
    format!("{:?} {text}", error.0)
}

pub(super) fn failed(operation: &'static str, bytes: usize, error: DriverError) -> BackendError {
    failed_with(operation, &format!("{bytes} bytes"), error)
}

/// `what` the operation was called with.
pub(super) fn failed_with(operation: &'static str, what: &str, error: DriverError) -> BackendError {
    let message = format!("{what}: {}", message(error));
    match is_fatal(error.0) {
        true => BackendError::Lost { operation, message },
        false => BackendError::Library { operation, message },
    }
}

/// Whether the driver says that the context is of no use any more.
fn is_fatal(error: CUresult) -> bool {
    use CUresult::*;
    matches!(
        error,
        CUDA_ERROR_DEINITIALIZED
            | CUDA_ERROR_DEVICE_UNAVAILABLE
            | CUDA_ERROR_ECC_UNCORRECTABLE
            | CUDA_ERROR_NVLINK_UNCORRECTABLE
            | CUDA_ERROR_CONTAINED
            | CUDA_ERROR_ILLEGAL_ADDRESS
            | CUDA_ERROR_LAUNCH_TIMEOUT
            | CUDA_ERROR_CONTEXT_IS_DESTROYED
            | CUDA_ERROR_ASSERT
            | CUDA_ERROR_HARDWARE_STACK_ERROR
            | CUDA_ERROR_ILLEGAL_INSTRUCTION
            | CUDA_ERROR_MISALIGNED_ADDRESS
            | CUDA_ERROR_INVALID_ADDRESS_SPACE
            | CUDA_ERROR_INVALID_PC
            | CUDA_ERROR_LAUNCH_FAILED
            | CUDA_ERROR_EXTERNAL_DEVICE
            | CUDA_ERROR_UNKNOWN
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_that_is_short_is_not_a_device_that_is_lost() {
        let short = failed("cuGraphLaunch", 0, DriverError(CUresult::CUDA_ERROR_OUT_OF_MEMORY));
        assert!(!short.is_lost());
        let lost = failed("cuMemcpyDtoHAsync", 8, DriverError(CUresult::CUDA_ERROR_ILLEGAL_ADDRESS));
        assert!(lost.is_lost());
        assert!(
            lost.to_string().contains("lost: cuMemcpyDtoHAsync: 8 bytes: CUDA_ERROR_ILLEGAL_ADDRESS"),
            "{lost}"
        );
    }
}
