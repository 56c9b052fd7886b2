//! Weights on their way from a file to a backend.

use half::bf16;

/// A matrix in host memory, row-major.
#[derive(Debug, Clone)]
pub struct HostMatrix {
    /// The tensor's name, for messages and for training checkpoints.
    pub name: String,
    pub rows: usize,
    pub columns: usize,
    pub data: HostData,
}

/// A norm's weight or a bias in host memory.
#[derive(Debug, Clone)]
pub struct HostVector {
    pub name: String,
    pub data: Vec<f32>,
}

/// The values of a [`HostMatrix`], as precise as the file has them.
#[derive(Debug, Clone)]
pub enum HostData {
    F32(Vec<f32>),
    Bf16(Vec<bf16>),
    /// Blocks of 32 consecutive values of one row: `value = scale * quant + minimum`. Holds Q8_0, Q4_0 and Q4_1
    /// exactly; `columns` is a multiple of 32.
    Blocks {
        /// `(rows, columns)`
        quants: Vec<i8>,
        /// `(rows, columns / 32)`
        scales: Vec<f32>,
        /// `(rows, columns / 32)`; `None` means all zero.
        minimums: Option<Vec<f32>>,
    },
}

/// Values that share one scale in [`HostData::Blocks`].
pub const BLOCK: usize = 32;

impl HostMatrix {
    /// All values as f32, row-major.
    pub fn to_f32(&self) -> Vec<f32> {
        match &self.data {
            HostData::F32(values) => values.clone(),
            HostData::Bf16(values) => values.iter().map(|v| v.to_f32()).collect(),
            HostData::Blocks { quants, scales, minimums } => {
                let value = |(i, &q): (usize, &i8)| {
                    let block = i / BLOCK;
                    let minimum = minimums.as_ref().map_or(0.0, |m| m[block]);
                    scales[block] * f32::from(q) + minimum
                };
                quants.iter().enumerate().map(value).collect()
            }
        }
    }
}
