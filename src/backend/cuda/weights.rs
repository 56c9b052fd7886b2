//! Weights in device memory.

use super::device::{Buffer, Device, Shared};
use super::kernel::Argument;
use crate::backend::BackendError;
use crate::weights::{HostData, HostMatrix, HostVector};
use half::bf16;
use std::sync::Arc;

/// Numbers that a lane loads at once: rows begin at a multiple of them.
pub(super) const LOAD: usize = 8;

/// A weight `(rows, columns)` in bf16, row-major: a prefix of either axis is read where it stands.
pub struct Matrix {
    pub(super) rows: usize,
    pub(super) columns: usize,
    /// From one row to the next; what lies between a row's end and the next one is zero.
    pub(super) stride: usize,
    values: Buffer,
}

impl Matrix {
    pub(super) fn upload(device: &Arc<Device>, host: HostMatrix) -> Result<Self, BackendError> {
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
            padded
        };
        Ok(Self { rows, columns, stride, values: device.upload(&format!("`{name}`"), &padded)? })
    }

    pub(super) fn address(&self) -> u64 {
        self.values.address
    }

    pub(super) fn argument(&self) -> Argument<'static> {
        Argument::Address(self.values.address)
    }

    pub(super) fn prefix_bytes(&self, out: usize, inp: usize) -> usize {
        out.min(self.rows) * inp.min(self.columns).next_multiple_of(LOAD) * size_of::<bf16>()
    }
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
