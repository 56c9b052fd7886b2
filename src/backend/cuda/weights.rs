//! Weights in device memory: bf16, or blocks of 32 with 8 or 4 bits a number, which kernels turn into bf16.

use super::device::{Buffer, Device, Shared};
use super::kernel::pair;
use crate::backend::{BackendError, quantise};
use crate::weights::{BLOCK, Blocks, HostData, HostMatrix, HostVector};
use half::{bf16, f16};
use rayon::prelude::*;
use std::sync::Arc;

/// Numbers that a lane loads at once: rows begin at a multiple of them.
pub(super) const LOAD: usize = 8;

/// What rows in blocks are padded to: so that the scales of a row's pair of blocks lie at a multiple of four bytes.
const PADDED: usize = 2 * BLOCK;

/// Rows that a thread cuts into blocks at a time.
const ROWS_AT_ONCE: usize = 64;

/// How base weights are kept in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Dtype {
    /// As the file has them, where that is one of the others; else bf16.
    #[default]
    Auto,
    Bf16,
    /// One byte a weight, a scale for each block of 32.
    Int8,
    /// Half a byte a weight, a scale and a minimum for each block of 32; embeddings one byte.
    Int4,
}

/// The format of a matrix: `Format` of kernels/formats.cuh.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    Bf16,
    Int8,
    Int4,
}

/// A weight `(rows, columns)`, row-major: a prefix of either axis is read where it stands.
pub struct Matrix {
    pub(super) rows: usize,
    pub(super) columns: usize,
    /// From one row to the next, in numbers; what lies between a row's end and the next one is zero, in whole blocks.
    pub(super) stride: usize,
    pub(super) format: Format,
    values: Buffer,
    /// Of blocks: scales, or scales and minimums, in f16.
    scales: Option<Buffer>,
}

impl Matrix {
    pub(super) fn upload(device: &Arc<Device>, host: HostMatrix, dtype: Dtype) -> Result<Self, BackendError> {
        let packed = match (dtype, &host.data) {
            (Dtype::Bf16, _) | (Dtype::Auto, HostData::F32(_) | HostData::Bf16(_)) => None,
            // A prefix of the columns must be a prefix of a row, so blocks across an order are cut anew.
            (_, HostData::Blocks(blocks)) if blocks.places.is_some() => Some(rounded(&host, Dtype::Int8)),
            (Dtype::Auto, HostData::Blocks(blocks)) => packed(blocks, host.columns),
            (Dtype::Int4, HostData::Blocks(blocks)) if is_halves(blocks).is_some() => {
                packed(blocks, host.columns)
            }
            (dtype, _) => Some(rounded(&host, dtype)),
        };
        match packed {
            Some(packed) => Self::upload_blocks(device, &host, &packed),
            None => Self::upload_bf16(device, host),
        }
    }

    pub(super) fn upload_bf16(device: &Arc<Device>, host: HostMatrix) -> Result<Self, BackendError> {
        let (rows, columns, stride) = (host.rows, host.columns, host.columns.next_multiple_of(LOAD));
        let name = host.name.clone();
        let values = match host.data {
            HostData::Bf16(values) => values,
            _ => host.to_f32().into_iter().map(bf16::from_f32).collect(),
        };
        let padded = if stride == columns {
            values
        } else {
            let mut padded = vec![bf16::ZERO; rows * stride];
            for (to, from) in padded.chunks_exact_mut(stride).zip(values.chunks_exact(columns.max(1))) {
                to[..columns].copy_from_slice(from);
            }
            padded.into()
        };
        let values = device.upload(&format!("`{name}`"), &padded)?;
        Ok(Self { rows, columns, stride, format: Format::Bf16, values, scales: None })
    }

    fn upload_blocks(device: &Arc<Device>, host: &HostMatrix, packed: &Packed) -> Result<Self, BackendError> {
        let what = format!("`{}`", host.name);
        Ok(Self {
            rows: host.rows,
            columns: host.columns,
            stride: host.columns.next_multiple_of(PADDED),
            format: packed.format,
            values: device.upload(&what, &packed.values)?,
            scales: Some(device.upload(&what, &packed.scales)?),
        })
    }

    pub(super) fn address(&self) -> u64 {
        self.values.address
    }

    /// 0 for bf16.
    pub(super) fn scales(&self) -> u64 {
        self.scales.as_ref().map_or(0, |scales| scales.address)
    }

    /// `Matrix` of kernels/formats.cuh.
    pub(super) fn view(&self) -> [u64; 3] {
        [self.address(), self.scales(), pair(self.stride, self.format as usize)]
    }

    pub(super) fn prefix_bytes(&self, out: usize, inp: usize) -> usize {
        let (out, inp) = (out.min(self.rows), inp.min(self.columns));
        match self.format {
            Format::Bf16 => out * inp.next_multiple_of(LOAD) * size_of::<bf16>(),
            Format::Int8 => out * inp.div_ceil(BLOCK) * (BLOCK + size_of::<f16>()),
            Format::Int4 => out * inp.div_ceil(BLOCK) * (BLOCK / 2 + 2 * size_of::<f16>()),
        }
    }
}

/// Blocks as the kernels read them.
struct Packed {
    format: Format,
    values: Vec<u8>,
    scales: Vec<f16>,
}

/// Cut into blocks of 8 or 4 bits, by all threads: a model of 7 billion numbers is as many roundings.
fn rounded(host: &HostMatrix, dtype: Dtype) -> Packed {
    let (values, columns) = (host.to_f32(), host.columns);
    let some_rows = |values: &[f32]| match dtype {
        Dtype::Int4 => packed_as(&quantise::to_halves(values, columns), columns, Some(0)),
        _ => packed_as(&quantise::to_bytes(values, columns, None), columns, None),
    };
    let parts = values.par_chunks((ROWS_AT_ONCE * columns).max(1)).map(some_rows).collect::<Vec<_>>();
    Packed {
        format: if dtype == Dtype::Int4 { Format::Int4 } else { Format::Int8 },
        values: parts.iter().map(|part| &part.values[..]).collect::<Vec<_>>().concat(),
        scales: parts.iter().map(|part| &part.scales[..]).collect::<Vec<_>>().concat(),
    }
}

/// What is to be added to quants that four bits hold, so that they begin at 0; `None` where they do not.
fn is_halves(blocks: &Blocks) -> Option<i8> {
    let within = |low, high| blocks.quants.iter().all(|q| (low..=high).contains(q));
    match blocks.minimums {
        Some(_) => within(0, 15).then_some(0),
        None => within(-8, 7).then_some(8),
    }
}

/// `None` where neither format holds them, as bytes with minimums. Rows of `columns` numbers are padded to whole pairs of blocks.
fn packed(blocks: &Blocks, columns: usize) -> Option<Packed> {
    let offset = is_halves(blocks);
    let bytes_with_minimums = offset.is_none() && blocks.minimums.is_some();
    (!bytes_with_minimums).then(|| packed_as(blocks, columns, offset))
}

/// In 4 bits where there is an `offset`, see [`is_halves`]; else in 8, without minimums.
fn packed_as(blocks: &Blocks, columns: usize, offset: Option<i8>) -> Packed {
    let (of_row, stride) = (columns.div_ceil(BLOCK), columns.next_multiple_of(PADDED));
    let quants = padded(&blocks.quants, columns, stride);
    let scales = padded(&blocks.scales, of_row, stride / BLOCK);
    let f16 = |value: f32| f16::from_f32(value);
    match offset {
        None => Packed {
            format: Format::Int8,
            values: quants.map(|q| q as u8).collect(),
            scales: scales.map(f16).collect(),
        },
        Some(offset) => {
            let quants = quants.map(|q| (q + offset) as u8 & 15).collect::<Vec<_>>();
            let minimums = match &blocks.minimums {
                Some(minimums) => padded(minimums, of_row, stride / BLOCK).collect(),
                None => scales.clone().map(|scale| -f32::from(offset) * scale).collect::<Vec<_>>(),
            };
            Packed {
                format: Format::Int4,
                values: quants.chunks_exact(2).map(|two| two[0] | two[1] << 4).collect(),
                scales: scales
                    .zip(minimums)
                    .flat_map(|(scale, minimum)| [f16(scale), f16(minimum)])
                    .collect(),
            }
        }
    }
}

/// Rows of `length` values, with zeros up to `stride`.
fn padded<T: Copy + Default>(
    values: &[T],
    length: usize,
    stride: usize,
) -> impl Iterator<Item = T> + Clone + '_ {
    values
        .chunks(length.max(1))
        .flat_map(move |row| row.iter().copied().chain(std::iter::repeat_n(T::default(), stride - length)))
}

/// A norm's weight or a bias, in f32; zeros up to the next multiple of [`LOAD`].
pub struct Vector {
    length: usize,
    values: Buffer,
}

impl Vector {
    pub(super) fn upload(device: &Arc<Device>, mut host: HostVector) -> Result<Self, BackendError> {
        let length = host.data.len();
        host.data.resize(length.next_multiple_of(LOAD), 0.0);
        Ok(Self { length, values: device.upload(&format!("`{}`", host.name), &host.data)? })
    }

    pub(super) fn len(&self) -> usize {
        self.length
    }

    pub(super) fn address(&self) -> u64 {
        self.values.address
    }
}
