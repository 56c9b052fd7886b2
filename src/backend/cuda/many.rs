//! Products of many rows: kernels/shrink_many.cu, then kernels/many_rows.cu, or on Hopper kernels/many_rows_wgmma.cu.
#![allow(unsafe_code)]

use super::batch::{self, SegmentRow};
use super::device::Device;
use super::kernel::{Argument, Grid, Kernel, int, pair};
use super::rows::{Form, Rows};
use super::weights::Format;
use super::{Cuda, Matrix, unfit};
use crate::backend::{BackendError, Linear};
use std::sync::Arc;

/// The highest rank that a shrink takes.
pub(super) const MOST_RANK: usize = 256;
/// What ranks are padded to.
const RANKS: usize = 16;
/// Linears of a launch: `MOST_SHRINKS` and `MOST_PRODUCTS`.
const MOST_LINEARS: usize = 3;

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

/// With `wgmma`, each with what a wave of its tiles, one for each multiprocessor, costs beside one of the other's. A wave costs
/// about as much where it is not full: on an H100 with LLaMA-7B's 4096 by 4096 (`o`) and 256 rows, 32 large tiles took 56 to 60 us
/// (with 384 threads that all copy), two full waves at 2048 rows 125; 64 small ones, at 64 rows, 24. Over 11008 inputs (`down`) it is
/// 133 and 55.
const WGMMA_EXPANDS: [(Tile, usize); 2] =
    [(tile(Kernel::ExpandManyWgmma256, 128, 256, 384), 5), (tile(Kernel::ExpandManyWgmma64, 64, 64, 128), 2)];
const WGMMA_GATE_UPS: [(Tile, usize); 2] =
    [(tile(Kernel::GateUpManyWgmma256, 128, 128, 384), 5), (tile(Kernel::GateUpManyWgmma64, 64, 32, 128), 2)];

impl Tile {
    /// How many there are of Linears that have so many outputs.
    fn count(&self, rows: usize, outputs: &[usize]) -> usize {
        rows.div_ceil(self.rows) * outputs.iter().map(|outputs| outputs.div_ceil(self.outputs)).sum::<usize>()
    }

    fn grid(&self, blocks: [usize; 3]) -> Grid {
        Grid { shared: self.kernel.shared_bytes(), ..Grid::new(blocks, self.threads) }
    }
}

/// The largest tile of which there is one for each multiprocessor, else the smallest.
fn fitting<'a>(device: &Device, tiles: &'a [Tile], rows: usize, outputs: &[usize]) -> &'a Tile {
    let fits = |tile: &&Tile| {
        tile.count(rows, outputs) >= device.multiprocessors() && device.has_room_for(tile.kernel)
    };
    tiles.iter().find(fits).unwrap_or(&tiles[tiles.len() - 1])
}

/// The tile whose waves cost least together; of equals, the larger.
fn cheapest<'a>(device: &Device, tiles: &'a [(Tile, usize); 2], rows: usize, outputs: &[usize]) -> &'a Tile {
    let [large, small] = tiles
        .each_ref()
        .map(|(tile, wave)| tile.count(rows, outputs).div_ceil(device.multiprocessors().max(1)) * wave);
    let (tile, _) = &tiles[usize::from(small < large)];
    tile
}

/// One Linear of a product: what the kernels are given of it.
pub(super) struct Many {
    out: usize,
    inp: usize,
    /// `Factor` of kernels/many_rows.cuh.
    factor: [u64; FACTOR_WORDS],
    shrunk: Option<Rows>,
    /// A weight that was not bf16, as it is.
    _unpacked: Option<Rows>,
}

const FACTOR_WORDS: usize = 6;

impl Many {
    /// All rows take the whole of a weight.
    pub(super) fn whole(device: &Arc<Device>, weight: &Matrix) -> Result<Self, BackendError> {
        let unpacked = unpacked(device, weight)?;
        let (values, stride) =
            unpacked.as_ref().map_or((weight.address(), weight.stride), |rows| (rows.address(), rows.stride));
        let factor = [values, 0, 0, 0, 0, pair(stride, 0)];
        Ok(Self { out: weight.rows, inp: weight.columns, factor, shrunk: None, _unpacked: unpacked })
    }

    /// Rows of these sizes, with a place for what is shrunk of them.
    fn of(device: &Arc<Device>, linear: &Linear<Cuda>, sizes: &[SegmentRow]) -> Result<Self, BackendError> {
        let mut many = Self::whole(device, &linear.weight)?;
        many.factor[1] = batch::bias(linear)?;
        many.factor[2] = device.stage(sizes)?;
        let rank = batch::most_rank(linear).next_multiple_of(RANKS);
        if rank > 0 {
            let shrunk = Rows::new(device, sizes.len(), rank, Form::Bf16)?;
            many.factor[3] = batch::adapters(device, linear)?;
            many.factor[4] = shrunk.address();
            many.factor[5] |= pair(0, shrunk.stride);
            many.shrunk = Some(shrunk);
        }
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

/// Linears of the same rows, which are shrunk for them.
pub(super) fn shrink<const N: usize>(
    device: &Arc<Device>,
    x: &Rows,
    linears: [(&Linear<Cuda>, &[SegmentRow]); N],
) -> Result<[Many; N], BackendError> {
    let many = linears.iter().map(|(linear, sizes)| Many::of(device, linear, sizes));
    let products = many.collect::<Result<Vec<_>, _>>()?;
    let products = <[Many; N]>::try_from(products)
        .map_err(|_| unfit("linear", "as many products as Linears", String::new()))?;
    let shrunk = products.iter().zip(linears).filter_map(|(product, (_, sizes))| {
        product.shrunk.as_ref().map(|shrunk| Shrink { product, shrunk, sizes })
    });
    for some in shrunk.collect::<Vec<_>>().chunks(MOST_LINEARS) {
        launch_shrinks(device, x, some)?;
    }
    Ok(products)
}

/// One Linear of a launch of kernels/shrink_many.cu.
struct Shrink<'a> {
    product: &'a Many,
    shrunk: &'a Rows,
    sizes: &'a [SegmentRow],
}

const SHRINK_WORDS: usize = 5;

fn launch_shrinks(device: &Device, x: &Rows, shrinks: &[Shrink<'_>]) -> Result<(), BackendError> {
    let ranks = shrinks.iter().map(|shrink| shrink.shrunk.width).collect::<Vec<_>>();
    let tile = fitting(device, &SHRINKS, x.length, &ranks);
    let (mut words, mut most_tiles) = ([0; MOST_LINEARS * SHRINK_WORDS], 0);
    for (to, Shrink { product, shrunk, sizes }) in words.chunks_exact_mut(SHRINK_WORDS).zip(shrinks) {
        let tiles = batch::tiles(sizes, tile.rows);
        let [_, _, of_rows, adapters, s, _] = product.factor;
        to.copy_from_slice(&[device.stage(&tiles)?, of_rows, adapters, s, pair(shrunk.stride, tiles.len())]);
        most_tiles = most_tiles.max(tiles.len());
    }
    let most_rank = ranks.iter().copied().max().unwrap_or(0);
    let grid = tile.grid([most_rank.div_ceil(tile.outputs), most_tiles, shrinks.len()]);
    // SAFETY: the arguments of `shrink_many`; tiles and sizes lie within the rows and super-adapters, as `batch` has checked.
    unsafe {
        device.push(tile.kernel, grid, &[x.argument(), int(x.stride), Argument::Struct(&words)]);
    }
    Ok(())
}

/// `y = linear(x)` of each, or added to what is there.
pub(super) fn linears(device: &Device, x: &Rows, products: &[Many], results: &[&Rows], onto: bool) {
    let all = products.iter().zip(results.iter().copied()).collect::<Vec<_>>();
    if device.has_wgmma() {
        all.chunks(MOST_LINEARS).for_each(|some| launch_products(device, x, some, onto));
        return;
    }
    for (product, y) in all {
        let arguments = [
            x.argument(),
            int(x.stride),
            Argument::Struct(&product.factor),
            int(product.out),
            int(product.inp),
            int(x.length),
            y.argument(),
            int(y.stride),
            Argument::Int(i32::from(onto)),
        ];
        let tile = fitting(device, &EXPANDS, x.length, &[product.out]);
        let grid = tile.grid([x.length.div_ceil(tile.rows), product.out.div_ceil(tile.outputs), 1]);
        // SAFETY: the arguments of `expand_many`; sizes lie within weights and super-adapters, as `batch::sizes` has checked,
        // and `y` has room for every row's outputs.
        unsafe { device.push(tile.kernel, grid, &arguments) };
    }
}

/// `Product` of kernels/many_rows_wgmma.cu.
const PRODUCT_WORDS: usize = FACTOR_WORDS + 3;

fn launch_products(device: &Device, x: &Rows, some: &[(&Many, &Rows)], onto: bool) {
    let mut products = [0; MOST_LINEARS * PRODUCT_WORDS];
    for (to, (product, y)) in products.chunks_exact_mut(PRODUCT_WORDS).zip(some) {
        let (factor, result) = to.split_at_mut(FACTOR_WORDS);
        factor.copy_from_slice(&product.factor);
        result.copy_from_slice(&[y.address(), pair(product.out, product.inp), pair(y.stride, 0)]);
    }
    let arguments = [
        x.argument(),
        int(x.stride),
        Argument::Struct(&products),
        int(x.length),
        Argument::Int(i32::from(onto)),
    ];
    let outputs = some.iter().map(|(product, _)| product.out).collect::<Vec<_>>();
    let tile = cheapest(device, &WGMMA_EXPANDS, x.length, &outputs);
    let grid = tile.grid([tile.count(x.length, &outputs), 1, 1]);
    // SAFETY: the arguments of `expand_many_wgmma`, of sizes as above.
    unsafe { device.push(tile.kernel, grid, &arguments) };
}

/// `y = silu(gate(x)) * up(x)`; every row has as many inputs and outputs in both.
pub(super) fn gate_up(device: &Device, x: &Rows, [gate, up]: &[Many; 2], y: &Rows) {
    let arguments = [
        x.argument(),
        int(x.stride),
        Argument::Struct(&gate.factor),
        Argument::Struct(&up.factor),
        int(gate.out),
        int(gate.inp),
        int(x.length),
        y.argument(),
        int(y.stride),
    ];
    let (tile, grid) = if device.has_wgmma() {
        let tile = cheapest(device, &WGMMA_GATE_UPS, x.length, &[gate.out]);
        (tile, tile.grid([tile.count(x.length, &[gate.out]), 1, 1]))
    } else {
        let tile = fitting(device, &GATE_UPS, x.length, &[gate.out]);
        (tile, tile.grid([x.length.div_ceil(tile.rows), gate.out.div_ceil(tile.outputs), 1]))
    };
    // SAFETY: the arguments of `gate_up_many` and `gate_up_many_wgmma`, of sizes as above.
    unsafe { device.push(tile.kernel, grid, &arguments) };
}
