//! Weights as the kernels read them.
//!
//! A matrix `(out, inp)` is cut into panels of 32 outputs; within a panel all outputs of input 0 come first, then those
//! of input 1, and so on. A prefix of the outputs is then a prefix of the panels, a prefix of the inputs a prefix
//! within each panel: every sub-network reads contiguous memory and nothing is copied for it.

use super::super::BackendError;
use crate::weights::{BLOCK, HostData, HostMatrix};
use half::bf16;

/// Outputs in one panel: two vector registers of 512 bits.
pub(super) const PANEL: usize = 32;

/// How base weights are kept in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Dtype {
    /// The smallest that loses nothing against the file.
    #[default]
    Auto,
    F32,
    Bf16,
    /// One byte a weight, a scale for each block of 32.
    Int8,
}

/// A packed weight.
#[derive(Debug)]
pub struct Matrix {
    rows: usize,
    columns: usize,
    pub(super) panels: Panels,
}

/// `[panel][input][PANEL]`; lanes beyond the last output are zero.
#[derive(Debug)]
pub(super) enum Panels {
    F32(Vec<f32>),
    Bf16(Vec<bf16>),
    Blocks(BlockPanels),
}

/// `value = scale * quant + minimum`, one scale for [`BLOCK`] consecutive inputs of one output.
#[derive(Debug)]
pub(super) struct BlockPanels {
    /// `[panel][input][PANEL]`
    pub(super) quants: Vec<i8>,
    /// `[panel][block][PANEL]`
    pub(super) scales: Vec<f32>,
    /// `[panel][block][PANEL]`; empty where all are zero.
    pub(super) minimums: Vec<f32>,
}

impl Matrix {
    pub(super) fn pack(host: HostMatrix, dtype: Dtype) -> Result<Self, BackendError> {
        let (rows, columns) = (host.rows, host.columns);
        if rows == 0 || columns == 0 {
            return Err(BackendError::Shape {
                operation: "pack",
                expected: format!("`{}` with rows and columns", host.name),
                got: format!("({rows}, {columns})"),
            });
        }
        let panels = match (dtype, host.data) {
            (Dtype::Auto, HostData::F32(values)) => Panels::F32(pack(&values, rows, columns)),
            (Dtype::Auto | Dtype::Bf16, HostData::Bf16(values)) => Panels::Bf16(pack(&values, rows, columns)),
            (Dtype::Auto | Dtype::Int8, HostData::Blocks { quants, scales, minimums }) => {
                let blocks = columns / BLOCK;
                let minimums = minimums.map_or(Vec::new(), |m| pack(&m, rows, blocks));
                let (quants, scales) = (pack(&quants, rows, columns), pack(&scales, rows, blocks));
                Panels::Blocks(BlockPanels { quants, scales, minimums })
            }
            (dtype, data) => {
                let values = HostMatrix { name: host.name, rows, columns, data }.to_f32();
                match dtype {
                    Dtype::Bf16 => {
                        let rounded = values.into_iter().map(bf16::from_f32).collect::<Vec<_>>();
                        Panels::Bf16(pack(&rounded, rows, columns))
                    }
                    Dtype::Int8 => Panels::Blocks(quantise(&values, rows, columns)),
                    Dtype::Auto | Dtype::F32 => Panels::F32(pack(&values, rows, columns)),
                }
            }
        };
        Ok(Self { rows, columns, panels })
    }

    /// Outputs.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Inputs.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Bytes in memory.
    pub fn bytes(&self) -> usize {
        match &self.panels {
            Panels::F32(values) => values.len() * 4,
            Panels::Bf16(values) => values.len() * 2,
            Panels::Blocks(b) => b.quants.len() + (b.scales.len() + b.minimums.len()) * 4,
        }
    }

    /// Bytes of what holds the prefix `[:rows, :columns]`: whole panels, as the kernels read them.
    pub(super) fn prefix_bytes(&self, rows: usize, columns: usize) -> usize {
        let (rows, columns) = (rows.min(self.rows), columns.min(self.columns));
        let lanes = rows.div_ceil(PANEL) * PANEL;
        match &self.panels {
            Panels::F32(_) => lanes * columns * 4,
            Panels::Bf16(_) => lanes * columns * 2,
            Panels::Blocks(b) => {
                let of_block = if b.minimums.is_empty() { 4 } else { 8 };
                lanes * (columns + columns.div_ceil(BLOCK) * of_block)
            }
        }
    }

    /// Row `row` as f32, for an embedding.
    pub(super) fn unpack_row(&self, row: usize, into: &mut [f32]) {
        let (panel, lane) = (row / PANEL, row % PANEL);
        let at = |input: usize| (panel * self.columns + input) * PANEL + lane;
        for (input, value) in into.iter_mut().enumerate() {
            *value = match &self.panels {
                Panels::F32(values) => values[at(input)],
                Panels::Bf16(values) => values[at(input)].to_f32(),
                Panels::Blocks(b) => {
                    let block = (panel * self.columns.div_ceil(BLOCK) + input / BLOCK) * PANEL + lane;
                    let minimum = b.minimums.get(block).copied().unwrap_or(0.0);
                    b.scales[block] * f32::from(b.quants[at(input)]) + minimum
                }
            };
        }
    }
}

/// `(rows, columns)` row-major to `[panel][column][PANEL]`.
fn pack<T: Copy + Default>(values: &[T], rows: usize, columns: usize) -> Vec<T> {
    let mut packed = vec![T::default(); rows.div_ceil(PANEL) * columns * PANEL];
    for (row, of_row) in values.chunks_exact(columns).enumerate() {
        let panel = &mut packed[row / PANEL * columns * PANEL..];
        for (column, &value) in of_row.iter().enumerate() {
            panel[column * PANEL + row % PANEL] = value;
        }
    }
    packed
}

/// Symmetric, by the largest absolute value of each block; a last block may be shorter.
fn quantise(values: &[f32], rows: usize, columns: usize) -> BlockPanels {
    let blocks = columns.div_ceil(BLOCK);
    let (mut quants, mut scales) = (Vec::with_capacity(values.len()), Vec::with_capacity(rows * blocks));
    for block in values.chunks_exact(columns).flat_map(|row| row.chunks(BLOCK)) {
        let largest = block.iter().fold(0f32, |m, v| m.max(v.abs()));
        let scale = largest / 127.0;
        let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
        quants.extend(block.iter().map(|v| (v * inverse).round() as i8));
        scales.push(scale);
    }
    BlockPanels {
        quants: pack(&quants, rows, columns),
        scales: pack(&scales, rows, blocks),
        minimums: Vec::new(),
    }
}
