//! What a step's rows need to know of their sub-networks, as the kernels read it.

use super::device::{Argument, Device, Kept};
use super::{Cuda, Matrix};
use crate::backend::{BackendError, Linear, Segment};
use std::sync::Arc;

/// `SegmentRow` of kernels/common.cuh.
#[derive(Debug, Clone, Copy, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct SegmentRow {
    out: i32,
    inp: i32,
    rank: i32,
    adapter: i32,
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
    padding: i32,
}

/// The most rows that one block of threads multiplies at once.
const MOST_ROWS: usize = 8;

/// The logarithm of a tile's height for so many rows: 1, 2, 4 or 8.
pub(super) fn height(rows: usize) -> usize {
    rows.min(MOST_ROWS).next_power_of_two().trailing_zeros() as usize
}

/// Every row's sizes in one Linear, on the device, with the super-adapters it has there.
pub(super) struct LinearBatch {
    table: Arc<Kept>,
    adapters: usize,
    sizes: usize,
    tiles: usize,
    /// Tiles of rows that share a super-adapter.
    pub(super) tile_count: usize,
    /// The logarithm of a tile's height.
    pub(super) height: usize,
    /// The largest active rank.
    pub(super) rank: usize,
}

impl LinearBatch {
    /// # Errors
    /// Segments that do not cover the rows in order, or sizes and super-adapters that the Linear does not have.
    pub(super) fn new(
        device: &Device,
        linear: &Linear<Cuda>,
        rows: usize,
        width: usize,
        segments: &[Segment],
    ) -> Result<Self, BackendError> {
        let height = height(rows);
        let (sizes, tiles) = sizes_and_tiles(linear, rows, width, segments, 1 << height)?;
        let entry = |adapter: &Option<crate::backend::Adapter<Cuda>>| {
            let address = |matrix: &Matrix| device.address(&matrix.values);
            adapter.as_ref().map_or_else(bytemuck::Zeroable::zeroed, |adapter| AdapterEntry {
                a: address(&adapter.a),
                b: address(&adapter.b),
                a_stride: adapter.a.stride as i32,
                b_stride: adapter.b.stride as i32,
                scale: adapter.scale,
                padding: 0,
            })
        };
        let entries = linear.adapters.iter().map(entry).collect::<Vec<_>>();
        // One upload; each part begins at a multiple of 16 bytes.
        let mut bytes: Vec<u8> = Vec::new();
        let mut add = |part: &[u8]| {
            bytes.resize(bytes.len().next_multiple_of(16), 0);
            let start = bytes.len();
            bytes.extend_from_slice(part);
            start
        };
        let (adapters, sizes_at) = (add(bytemuck::cast_slice(&entries)), add(bytemuck::cast_slice(&sizes)));
        let tiles_at = add(bytemuck::cast_slice(&tiles));
        let rank = sizes.iter().map(|size| size.rank).max().unwrap_or(0);
        let key = device.address(&linear.weight.values);
        Ok(Self {
            table: device.keep(key, "a batch's sub-networks", bytes)?,
            adapters,
            sizes: sizes_at,
            tiles: tiles_at,
            tile_count: tiles.len(),
            height,
            rank: rank as usize,
        })
    }

    pub(super) fn adapters(&self, device: &Device) -> Argument {
        device.place(&self.table, self.adapters)
    }

    pub(super) fn sizes(&self, device: &Device) -> Argument {
        device.place(&self.table, self.sizes)
    }

    pub(super) fn tiles(&self, device: &Device) -> Argument {
        device.place(&self.table, self.tiles)
    }
}

/// Every row's sizes, and tiles of at most `most` rows of one super-adapter: the first and how many.
fn sizes_and_tiles(
    linear: &Linear<Cuda>,
    rows: usize,
    width: usize,
    segments: &[Segment],
    most: usize,
) -> Result<(Vec<SegmentRow>, Vec<[i32; 2]>), BackendError> {
    let unfit = |expected: &str, got: String| BackendError::Shape {
        operation: "linear",
        expected: expected.into(),
        got,
    };
    let (mut sizes, mut tiles): (Vec<SegmentRow>, Vec<[i32; 2]>) = (Vec::with_capacity(rows), Vec::new());
    for segment in segments {
        let selection = &segment.selection;
        let active = selection.shape.linears.get(linear.index).copied();
        let active =
            active.ok_or_else(|| unfit("a shape with this Linear", format!("index {}", linear.index)))?;
        let adapter = linear.adapters.get(selection.adapter);
        let adapter = adapter
            .ok_or_else(|| unfit("a loaded super-adapter", format!("number {}", selection.adapter)))?;
        let rank = adapter.as_ref().map_or(0, |adapter| adapter.a.rows);
        let fits = active.out <= linear.weight.rows && active.inp <= linear.weight.columns.min(width);
        if !fits || adapter.is_some() && active.rank > rank {
            let most = format!(
                "at most ({}, {}) of rank {rank}",
                linear.weight.rows,
                linear.weight.columns.min(width)
            );
            return Err(unfit(&most, active.to_string()));
        }
        if segment.rows.start != sizes.len() || segment.rows.end > rows {
            return Err(unfit("segments over all rows in order", format!("{:?} of {rows}", segment.rows)));
        }
        for row in segment.rows.clone() {
            let (row, adapter) = (row as i32, selection.adapter as i32);
            match tiles.last_mut() {
                Some([_, count])
                    if sizes.last().is_some_and(|last| last.adapter == adapter)
                        && (*count as usize) < most =>
                {
                    *count += 1;
                }
                _ => tiles.push([row, 1]),
            }
            let rank = if linear.adapters[selection.adapter].is_some() { active.rank as i32 } else { 0 };
            sizes.push(SegmentRow { out: active.out as i32, inp: active.inp as i32, rank, adapter });
        }
    }
    if sizes.len() != rows {
        return Err(unfit("segments over all rows", format!("{} of {rows}", sizes.len())));
    }
    Ok((sizes, tiles))
}
