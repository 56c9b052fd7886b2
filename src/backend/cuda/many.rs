//! Products of many rows: kernels/shrink_many.cu, then kernels/many_rows.cu.
#![allow(unsafe_code)]

use super::batch::{self, SegmentRow};
use super::device::Device;
use super::kernel::{Argument, Grid, Kernel, int};
use super::rows::{Form, Rows};
use super::weights::Format;
use super::{Cuda, Matrix};
use crate::backend::{BackendError, Linear};
use std::sync::Arc;

/// The highest rank that a shrink takes.
pub(super) const MOST_RANK: usize = 256;
/// What ranks are padded to.
const RANKS: usize = 16;

/// How a kernel cuts its result, and what it is started with.
struct Tile {
    kernel: Kernel,
    rows: usize,
    outputs: usize,
    threads: usize,
}

const fn tile(kernel: Kernel, rows: usize, outputs: usize, threads: usize) -> Tile {
    Tile { kernel, rows, outputs, threads }
}

/// From the largest tile, which reads least, to the smallest, of which there are most.
const EXPANDS: [Tile; 4] = [
    tile(Kernel::ExpandManyWide, 128, 256, 256),
    tile(Kernel::ExpandMany128, 128, 128, 128),
    tile(Kernel::ExpandMany64, 64, 64, 128),
    tile(Kernel::ExpandMany32, 32, 64, 128),
];
const GATE_UPS: [Tile; 3] = [
    tile(Kernel::GateUpManyWide, 128, 128, 256),
    tile(Kernel::GateUpMany128, 128, 64, 128),
    tile(Kernel::GateUpMany64, 64, 32, 128),
];
const SHRINKS: [Tile; 2] = [tile(Kernel::ShrinkMany32, 32, 32, 256), tile(Kernel::ShrinkMany16, 16, 16, 256)];

/// The largest tile of which there is one for each multiprocessor, else the smallest.
fn fitting<'a>(device: &Device, tiles: &'a [Tile], rows: usize, outputs: usize) -> &'a Tile {
    let count = |tile: &Tile| rows.div_ceil(tile.rows) * outputs.div_ceil(tile.outputs);
    let fits = |tile: &&Tile| count(tile) >= device.multiprocessors() && device.has_room_for(tile.kernel);
    tiles.iter().find(fits).unwrap_or(&tiles[tiles.len() - 1])
}

impl Tile {
    fn grid(&self, rows: usize, outputs: usize) -> Grid {
        let blocks = [rows.div_ceil(self.rows), outputs.div_ceil(self.outputs), 1];
        Grid { shared: self.kernel.shared_bytes(), ..Grid::new(blocks, self.threads) }
    }
}

/// One Linear of a product, its rows shrunk: what the kernels are given of it.
pub(super) struct Many {
    out: usize,
    inp: usize,
    /// Weight, its stride, bias, sizes, super-adapters, what is shrunk, its stride.
    arguments: [Argument<'static>; 7],
    _shrunk: Option<Rows>,
    /// A weight that was not bf16, as it is.
    _unpacked: Option<Rows>,
}

impl Many {
    /// All rows take the whole of a weight.
    pub(super) fn whole(device: &Arc<Device>, weight: &Matrix) -> Result<Self, BackendError> {
        let (none, unpacked) = (Argument::Address(0), unpacked(device, weight)?);
        let (values, stride) = unpacked
            .as_ref()
            .map_or((weight.argument(), weight.stride), |rows| (rows.argument(), rows.stride));
        let arguments = [values, int(stride), none, none, none, none, int(0)];
        Ok(Self { out: weight.rows, inp: weight.columns, arguments, _shrunk: None, _unpacked: unpacked })
    }

    /// Shrinks the rows.
    pub(super) fn of(
        device: &Arc<Device>,
        linear: &Linear<Cuda>,
        x: &Rows,
        sizes: &[SegmentRow],
    ) -> Result<Self, BackendError> {
        let mut many = Self::whole(device, &linear.weight)?;
        many.arguments[2] = Argument::Address(batch::bias(linear)?);
        many.arguments[3] = Argument::Address(device.stage(sizes)?);
        let rank = batch::most_rank(linear).next_multiple_of(RANKS);
        if rank == 0 {
            return Ok(many);
        }
        many.arguments[4] = Argument::Address(batch::adapters(device, linear)?);
        let shrunk = Rows::new(device, sizes.len(), rank, Form::Bf16)?;
        let tile = fitting(device, &SHRINKS, sizes.len(), rank);
        let tiles = batch::tiles(sizes, tile.rows);
        let table = Argument::Address(device.stage(&tiles)?);
        let [_, _, _, of_rows, adapters, ..] = many.arguments;
        let arguments =
            [x.argument(), int(x.stride), table, of_rows, adapters, shrunk.argument(), int(shrunk.stride)];
        let blocks = [rank.div_ceil(tile.outputs), tiles.len(), 1];
        let grid = Grid { shared: tile.kernel.shared_bytes(), ..Grid::new(blocks, tile.threads) };
        // SAFETY: the arguments of `shrink_many`; tiles and sizes lie within the rows and super-adapters, as `batch` has checked.
        unsafe { device.push(tile.kernel, grid, &arguments) };
        (many.arguments[5], many.arguments[6]) = (shrunk.argument(), int(shrunk.stride));
        many._shrunk = Some(shrunk);
        Ok(many)
    }
}

/// A weight in blocks as bf16, for this product; many rows share the reading and writing of it.
fn unpacked(device: &Arc<Device>, weight: &Matrix) -> Result<Option<Rows>, BackendError> {
    if weight.format == Format::Bf16 {
        return Ok(None);
    }
    let to = Rows::new(device, weight.rows, weight.columns, Form::Bf16)?;
    let view = weight.view();
    let arguments = [Argument::Struct(&view), to.argument(), int(to.stride), int(weight.columns)];
    // SAFETY: the arguments of `unpack_weight`; as many rows and columns.
    unsafe { device.push(Kernel::UnpackWeight, Grid::by_row(weight.rows, to.stride), &arguments) };
    Ok(Some(to))
}

/// `y = linear(x)`, or added to what is there.
pub(super) fn linear(device: &Device, x: &Rows, product: &Many, y: &Rows, onto: bool) {
    let [weight, stride, bias, sizes, adapters, shrunk, of_shrunk] = product.arguments;
    let arguments = [
        x.argument(),
        int(x.stride),
        weight,
        stride,
        bias,
        int(product.out),
        int(product.inp),
        int(x.length),
        sizes,
        adapters,
        shrunk,
        of_shrunk,
        y.argument(),
        int(y.stride),
        Argument::Int(i32::from(onto)),
    ];
    let tile = fitting(device, &EXPANDS, x.length, product.out);
    // SAFETY: the arguments of `expand_many`; sizes lie within weights and super-adapters, as `batch::sizes` has checked, and `y`
    // has room for every row's outputs.
    unsafe { device.push(tile.kernel, tile.grid(x.length, product.out), &arguments) };
}

/// `y = silu(gate(x)) * up(x)`; every row has as many inputs and outputs in both.
pub(super) fn gate_up(device: &Device, x: &Rows, [gate, up]: [&Many; 2], y: &Rows) {
    let mut arguments = vec![x.argument(), int(x.stride), int(gate.out), int(gate.inp), int(x.length)];
    arguments.extend(gate.arguments);
    arguments.extend(up.arguments);
    arguments.extend([y.argument(), int(y.stride)]);
    let tile = fitting(device, &GATE_UPS, x.length, gate.out);
    // SAFETY: as above, of `gate_up_many`.
    unsafe { device.push(tile.kernel, tile.grid(x.length, gate.out), &arguments) };
}
