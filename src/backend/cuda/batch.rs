//! What a step's rows need to know of their sub-networks, as the kernels read it.

use super::device::Device;
use super::{Cuda, Matrix, unfit};
use crate::backend::{Adapter, BackendError, Linear, Segment};

/// `SegmentRow` of kernels/common.cuh.
#[derive(Debug, Clone, Copy, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub(super) struct SegmentRow {
    pub(super) out: i32,
    pub(super) inp: i32,
    rank: i32,
    adapter: i32,
}

impl SegmentRow {
    /// The super-adapter that takes part.
    pub(super) fn super_adapter(&self) -> Option<i32> {
        (self.rank > 0).then_some(self.adapter)
    }
}

/// Where a Linear's bias lies; 0 for none.
///
/// # Errors
/// One of another length than there are outputs.
pub(super) fn bias(linear: &Linear<Cuda>) -> Result<u64, BackendError> {
    let rows = linear.weight.rows;
    match &linear.bias {
        Some(bias) if bias.len() != rows => {
            Err(unfit("linear", &format!("a bias of {rows}"), bias.len().to_string()))
        }
        bias => Ok(bias.as_ref().map_or(0, super::Vector::address)),
    }
}

/// A first row and a count, at most `most`, of rows that share a super-adapter; over all rows.
pub(super) fn tiles(sizes: &[SegmentRow], most: usize) -> Vec<[i32; 2]> {
    let mut tiles: Vec<[i32; 2]> = Vec::new();
    for (row, size) in sizes.iter().enumerate() {
        match tiles.last_mut() {
            Some([_, count]) if sizes[row - 1].adapter == size.adapter && (*count as usize) < most => {
                *count += 1;
            }
            _ => tiles.push([row as i32, 1]),
        }
    }
    tiles
}

/// `AdapterEntry` of kernels/common.cuh.
#[derive(Debug, Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct AdapterEntry {
    a: u64,
    b: u64,
    a_stride: i32,
    b_stride: i32,
    scale: f32,
    rank: i32,
}

/// The super-adapters of a Linear, in a table that stays on the device.
///
/// # Errors
/// The driver's.
pub(super) fn adapters(device: &Device, linear: &Linear<Cuda>) -> Result<u64, BackendError> {
    let entry = |adapter: &Option<Adapter<Cuda>>| {
        adapter.as_ref().map_or_else(bytemuck::Zeroable::zeroed, |Adapter { a, b, scale }| AdapterEntry {
            a: a.address(),
            b: b.address(),
            a_stride: a.stride as i32,
            b_stride: b.stride as i32,
            scale: *scale,
            rank: a.rows as i32,
        })
    };
    let entries = linear.adapters.iter().map(entry).collect::<Vec<_>>();
    device.keep(linear.weight.address(), "the table of super-adapters", bytemuck::cast_slice(&entries))
}

/// The largest rank of a Linear's super-adapters; 0 without any.
pub(super) fn most_rank(linear: &Linear<Cuda>) -> usize {
    linear.adapters.iter().flatten().map(|adapter| adapter.a.rows).max().unwrap_or(0)
}

/// Every row's sizes in one Linear.
///
/// # Errors
/// Segments that do not cover the rows in order, or sizes and super-adapters that the Linear does not have.
pub(super) fn sizes(
    linear: &Linear<Cuda>,
    rows: usize,
    width: usize,
    segments: &[Segment],
) -> Result<Vec<SegmentRow>, BackendError> {
    let mut sizes = Vec::with_capacity(rows);
    for segment in segments {
        let size = size(linear, width, segment)?;
        if segment.rows.start != sizes.len() || segment.rows.end > rows {
            return Err(unfit(
                "linear",
                "segments over all rows in order",
                format!("{:?} of {rows}", segment.rows),
            ));
        }
        sizes.resize(segment.rows.end.max(sizes.len()), size);
    }
    if sizes.len() != rows {
        return Err(unfit("linear", "segments over all rows", format!("{} of {rows}", sizes.len())));
    }
    Ok(sizes)
}

/// The sizes of one segment's rows.
fn size(linear: &Linear<Cuda>, width: usize, segment: &Segment) -> Result<SegmentRow, BackendError> {
    let (selection, weight): (_, &Matrix) = (&segment.selection, &linear.weight);
    let active = selection.shape.linears.get(linear.index).copied();
    let active = active
        .ok_or_else(|| unfit("linear", "a shape with this Linear", format!("index {}", linear.index)))?;
    // Where there is no super-adapter of this number, only the base is left.
    let adapter = linear.adapters.get(selection.adapter).and_then(Option::as_ref);
    let (out, inp) = (weight.rows, weight.columns.min(width));
    let rank = adapter.map_or(0, |adapter| adapter.a.rows);
    if active.out > out || active.inp > inp || adapter.is_some() && active.rank > rank {
        return Err(unfit("linear", &format!("at most ({out}, {inp}) of rank {rank}"), active.to_string()));
    }
    let (rank, adapter) = adapter.map_or((0, 0), |_| (active.rank as i32, selection.adapter as i32));
    Ok(SegmentRow { out: active.out as i32, inp: active.inp as i32, rank, adapter })
}
