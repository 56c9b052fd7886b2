//! What can go wrong in a backend.

use std::fmt;

/// A failure of one operation, with its name.
#[derive(Debug)]
#[non_exhaustive]
pub enum BackendError {
    /// Shapes that do not fit each other: a bug above this floor, reported instead of a panic.
    Shape { operation: &'static str, expected: String, got: String },
    /// Not enough memory for a pool or a weight.
    Memory { what: String, bytes: usize },
    /// The library below failed.
    Library { operation: &'static str, message: String },
    /// The device below has failed and can compute nothing any more.
    Lost { operation: &'static str, message: String },
}

impl BackendError {
    /// Whether every later step would fail as well.
    pub fn is_lost(&self) -> bool {
        matches!(self, Self::Lost { .. })
    }
}

impl fmt::Display for BackendError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Shape { operation, expected, got } => {
                write!(f, "{operation}: expected {expected}, got {got}")
            }
            Self::Memory { what, bytes } => write!(f, "no memory for {what}: {bytes} bytes"),
            Self::Library { operation, message } => write!(f, "{operation}: {message}"),
            Self::Lost { operation, message } => write!(f, "the device is lost: {operation}: {message}"),
        }
    }
}

impl std::error::Error for BackendError {}
