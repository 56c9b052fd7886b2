//! Weights on their way from a file to a backend: plain numbers in host memory, as precise as the file has them.
//!
//! `artifact` makes them, `backend` takes them, and neither knows the other; so they stand below both.

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

/// A norm's weight or a bias in host memory, `(n)`.
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
    /// Row `i` of the result is row `order[i]` of `self`; exact for every kind of data.
    ///
    /// `order` is a permutation of `0..rows`.
    pub fn permute_rows(self, order: &[usize]) -> Self {
        let data = match &self.data {
            HostData::F32(values) => HostData::F32(gather_rows(values, self.columns, order)),
            HostData::Bf16(values) => HostData::Bf16(gather_rows(values, self.columns, order)),
            HostData::Blocks { quants, scales, minimums } => {
                let blocks = self.columns / BLOCK;
                HostData::Blocks {
                    quants: gather_rows(quants, self.columns, order),
                    scales: gather_rows(scales, blocks, order),
                    minimums: minimums.as_ref().map(|m| gather_rows(m, blocks, order)),
                }
            }
        };
        Self { data, ..self }
    }

    /// Column `i` of the result is column `order[i]` of `self`. Blocks run along a row, so blocks become f32.
    ///
    /// `order` is a permutation of `0..columns`.
    pub fn permute_columns(self, order: &[usize]) -> Self {
        let data = match &self.data {
            HostData::Bf16(values) => HostData::Bf16(gather_columns(values, self.columns, order)),
            _ => HostData::F32(gather_columns(&self.to_f32(), self.columns, order)),
        };
        Self { data, ..self }
    }

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

fn gather_rows<T: Copy>(values: &[T], columns: usize, order: &[usize]) -> Vec<T> {
    order.iter().flat_map(|&row| &values[row * columns..(row + 1) * columns]).copied().collect()
}

fn gather_columns<T: Copy>(values: &[T], columns: usize, order: &[usize]) -> Vec<T> {
    values.chunks_exact(columns).flat_map(|row| order.iter().map(|&column| row[column])).collect()
}
