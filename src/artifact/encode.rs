//! Numbers as files have them: f32 values to bytes, piece by piece, so that a large tensor is never held twice.

use super::ArtifactError;
use super::whole::WholeFile;
use crate::weights::BLOCK;
use half::{bf16, f16};
use std::path::Path;

/// The number format of a written tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NumberFormat {
    F32,
    F16,
    Bf16,
    /// ggml's blocks of 32: an f16 scale, then 32 quants `-127..=127`. Rows are whole blocks.
    Q8_0,
}

impl NumberFormat {
    /// As messages and model cards say it.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::Q8_0 => "q8_0",
        }
    }

    /// Bytes of `values` numbers; of Q8_0 a multiple of 32.
    pub(super) fn bytes(self, values: usize) -> usize {
        match self {
            Self::F32 => 4 * values,
            Self::F16 | Self::Bf16 => 2 * values,
            Self::Q8_0 => values / BLOCK * (2 + BLOCK),
        }
    }
}

/// A tensor that is to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutTensor {
    pub name: String,
    /// Outermost first.
    pub shape: Vec<usize>,
    pub format: NumberFormat,
}

impl OutTensor {
    pub(super) fn bytes(&self) -> usize {
        self.format.bytes(self.shape.iter().product())
    }
}

/// Values that are turned into bytes at once: a megabyte or less, and whole blocks.
const PIECE: usize = 1 << 18;

/// Appends a tensor's values to `file`.
///
/// # Errors
/// Values of another number than the shape says, a value that the format cannot hold, a write that fails.
pub(super) fn append(
    file: &mut WholeFile,
    path: &Path,
    tensor: &OutTensor,
    values: &[f32],
) -> Result<(), ArtifactError> {
    let wrong = |reason| ArtifactError::wrong(path, format!("tensor `{}`: {reason}", tensor.name));
    let expected = tensor.shape.iter().product::<usize>();
    if values.len() != expected {
        return Err(wrong(format!("expected {expected} values, got {}", values.len())));
    }
    if let Some(value) = values.iter().find(|v| !v.is_finite()) {
        return Err(wrong(format!("{value} is among its values")));
    }
    let largest = values.iter().fold(0f32, |m, v| m.max(v.abs()));
    // What becomes an f16.
    let half = match tensor.format {
        NumberFormat::F16 => largest,
        NumberFormat::Q8_0 => largest / 127.0,
        NumberFormat::F32 | NumberFormat::Bf16 => 0.0,
    };
    if f16::from_f32(half).is_infinite() {
        let format = tensor.format.name();
        return Err(wrong(format!("{largest} is too large for {format}; bf16 and f32 can hold it")));
    }
    let mut bytes = Vec::with_capacity(tensor.format.bytes(PIECE.min(expected)));
    for piece in values.chunks(PIECE) {
        bytes.clear();
        encode(tensor.format, piece, &mut bytes);
        file.write(&bytes)?;
    }
    Ok(())
}

fn encode(format: NumberFormat, values: &[f32], bytes: &mut Vec<u8>) {
    match format {
        NumberFormat::F32 => bytes.extend(values.iter().flat_map(|v| v.to_le_bytes())),
        NumberFormat::F16 => bytes.extend(values.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes())),
        NumberFormat::Bf16 => bytes.extend(values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes())),
        NumberFormat::Q8_0 => values.chunks_exact(BLOCK).for_each(|block| block_of_bytes(block, bytes)),
    }
}

/// ggml's `quantize_row_q8_0_ref`: the scale is the largest absolute value over 127; quants are taken by the scale before
/// it becomes an f16.
fn block_of_bytes(block: &[f32], bytes: &mut Vec<u8>) {
    let scale = block.iter().fold(0f32, |m, v| m.max(v.abs())) / 127.0;
    let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
    bytes.extend(f16::from_f32(scale).to_le_bytes());
    bytes.extend(block.iter().map(|v| (v * inverse).round() as i8 as u8));
}
