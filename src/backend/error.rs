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
}

impl fmt::Display for BackendError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Shape { operation, expected, got } => {
                write!(f, "{operation}: expected {expected}, got {got}")
            }
            Self::Memory { what, bytes } => write!(f, "no memory for {what}: {bytes} bytes"),
            Self::Library { operation, message } => write!(f, "{operation}: {message}"),
        }
    }
}

impl std::error::Error for BackendError {}
