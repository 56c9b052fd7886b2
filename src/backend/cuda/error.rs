//! What a driver says when it cannot.

use crate::backend::BackendError;
use cudarc::driver::DriverError;

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
    BackendError::Library { operation, message: format!("{bytes} bytes: {}", message(error)) }
}
