//! Products of few rows: kernels/few_rows.cu, and of small weights kernels/few_narrow.cu; one launch for up to three Linears.
#![allow(unsafe_code)]

use super::batch::{self, SegmentRow};
use super::device::Device;
use super::kernel::{Argument, Grid, Kernel, int, pair};
use super::product::Inputs;
use super::rows::{Form, Rows};
use super::weights::Format;
use super::{Cuda, Matrix};
use crate::backend::{BackendError, Linear};
use std::sync::Arc;

/// Of kernels/few_rows.cu: threads of a block, outputs or ranks of its tile, Linears of a launch.
const FEW_THREADS: usize = 256;
const TILE: usize = 32;
pub(super) const MOST_PARTS: usize = 3;
/// What ranks are padded to there.
const RANKS: usize = TILE;
/// Chunks of inputs that a block shrinks, of those that share a shrink, and shrinks of a launch that may be shared.
const SHRINK_CHUNKS: usize = 4;
pub(super) const MOST_SHRINKS: usize = 4096;
/// Slots of the ring that weights and inputs go through, inputs of a slot, and bytes of a row of them.
const STAGES: usize = 3;
const CHUNK: usize = 256;
const ROW_BYTES: usize = 2 * CHUNK;
/// Rows that a block may norm itself, and bytes of normed inputs that it keeps at most.
const NORMED_ROWS: usize = 8;
const NORMED_BYTES: usize = 8 << 10;
/// Rows up to which launches with a norm and without ask for as much: blocks of the next one then find room where those of the one
/// before left. A multiprocessor of an H100 has three blocks either way, and of more rows it would have two. Measured there over a layer of
/// LLaMA-7B, one row: 154.2 us instead of 157.8.
const PADDED_ROWS: usize = 4;

/// Of kernels/few_narrow.cu: rows of a launch, outputs of a block (of gate and up each), what inputs are padded to.
const NARROW_ROWS: usize = 8;
const NARROW_TILE: usize = 16;
const NARROW_STEP: usize = 64;
/// Inputs up to which all that a block takes fits its shared memory: its rows of a weight and A; of gate and up both.
const NARROW_INPUTS: usize = 1536;
const NARROW_INPUTS_OF_TWO: usize = 768;
/// Numbers of a weight up to which the way to memory takes longer than they do: from there on it counts that every block reads A.
const NARROW_WEIGHT: usize = 1 << 20;
/// Super-adapters of a batch up to which a block that shrinks for one after the other is faster than blocks that do it side by side.
const NARROW_ADAPTERS: usize = 2;
/// Bytes of normed inputs that such a block keeps at most.
const NARROW_NORMED_BYTES: usize = 12 << 10;

/// One Linear of a launch: `Part` of kernels/few_rows.cu.
pub(super) struct Part {
    words: [u64; PART_WORDS],
    out: usize,
    inp: usize,
    adapters: usize,
    rank: usize,
    /// What the shrinks leave for the expands, and for one another.
    _shrunk: Option<[Rows; 2]>,
}

const PART_WORDS: usize = 11;

/// A kernel for few rows with what it takes at a time.
pub(super) struct Few {
    kernel: Kernel,
    /// Rows of a block.
    rows: usize,
    /// Whether two Linears make one result.
    paired: bool,
    normed: bool,
    /// Whether it is one of kernels/few_narrow.cu.
    narrow: bool,
}

/// The kernels of one format.
macro_rules! kernels {
    ($format:expr, $bf16:ident, $int8:ident, $int4:ident) => {
        match $format {
            Format::Bf16 => Kernel::$bf16,
            Format::Int8 => Kernel::$int8,
            Format::Int4 => Kernel::$int4,
        }
    };
}

impl Few {
    pub(super) fn linear(device: &Device, rows: usize, normed: bool, format: Format) -> Self {
        let (kernel, of_block) = match rows.min(most_rows(device)) {
            _ if normed => {
                (kernels!(format, NormedLinearFewBf16, NormedLinearFewInt8, NormedLinearFewInt4), NORMED_ROWS)
            }
            0..=8 => (kernels!(format, LinearFew8Bf16, LinearFew8Int8, LinearFew8Int4), 8),
            9..=16 => (kernels!(format, LinearFew16Bf16, LinearFew16Int8, LinearFew16Int4), 16),
            _ => (kernels!(format, LinearFew32Bf16, LinearFew32Int8, LinearFew32Int4), 32),
        };
        Self { kernel, rows: of_block, paired: false, normed, narrow: false }
    }

    /// Of gate and up together.
    pub(super) fn gate_up(device: &Device, rows: usize, normed: bool, format: Format) -> Self {
        let (kernel, of_block) = match rows.min(most_rows(device)) {
            _ if normed => {
                (kernels!(format, NormedGateUpFewBf16, NormedGateUpFewInt8, NormedGateUpFewInt4), NORMED_ROWS)
            }
            0..=8 => (kernels!(format, GateUpFew8Bf16, GateUpFew8Int8, GateUpFew8Int4), 8),
            9..=16 => (kernels!(format, GateUpFew16Bf16, GateUpFew16Int8, GateUpFew16Int4), 16),
            _ => (kernels!(format, GateUpFew32Bf16, GateUpFew32Int8, GateUpFew32Int4), 32),
        };
        Self { kernel, rows: of_block, paired: true, normed, narrow: false }
    }

    /// Of Linears for which [`Self::has_narrow`].
    pub(super) fn narrow(paired: bool, normed: bool) -> Self {
        let kernel = match (paired, normed) {
            (false, false) => Kernel::NarrowLinearFew,
            (false, true) => Kernel::NarrowNormedLinearFew,
            (true, false) => Kernel::NarrowGateUpFew,
            (true, true) => Kernel::NarrowNormedGateUpFew,
        };
        Self { kernel, rows: NARROW_ROWS, paired, normed, narrow: true }
    }

    /// Whether so many rows of `width` inputs may take [`Self::narrow`], whatever their sub-networks.
    pub(super) fn has_narrow(
        device: &Device,
        (rows, width): (usize, usize),
        linears: &[&Linear<Cuda>],
        paired: bool,
    ) -> bool {
        let most = if paired { NARROW_INPUTS_OF_TWO } else { NARROW_INPUTS };
        let is_small = |linear: &&Linear<Cuda>| {
            let weight = &linear.weight;
            weight.format == Format::Bf16
                && weight.rows * weight.columns <= NARROW_WEIGHT
                && batch::most_rank(linear) <= RANKS
        };
        device.has_narrow()
            && (1..=NARROW_ROWS).contains(&rows)
            && (1..=most).contains(&width)
            && linears.iter().all(is_small)
    }

    /// Whether blocks can norm so many rows themselves; those of a launch that may be [`Self::narrow`] more.
    pub(super) fn norms(rows: usize, width: usize, narrow: bool) -> bool {
        let most = if narrow { NARROW_NORMED_BYTES } else { NORMED_BYTES };
        rows <= NORMED_ROWS && rows * normed_bytes(width) <= most
    }

    /// Bytes of shared memory that a block takes: the ring, then normed inputs; or all inputs of its outputs, ranks and rows.
    fn shared(&self, rows: usize, width: usize, inp: usize) -> usize {
        let rows = rows.min(self.rows);
        if self.narrow {
            let of_weights = if self.paired { 2 } else { 1 } * (NARROW_TILE + RANKS);
            return (of_weights + rows) * 2 * inp.next_multiple_of(NARROW_STEP);
        }
        let normed = if self.normed { rows * normed_bytes(width) } else { 0 };
        let padded = if rows <= PADDED_ROWS { NORMED_BYTES } else { 0 };
        STAGES * (TILE + rows) * ROW_BYTES + normed.max(padded)
    }
}

/// Rows that a block takes at most, by its shared memory: those of an sm_86 have too little for 32.
pub(super) fn most_rows(device: &Device) -> usize {
    if device.has_room_for(Kernel::GateUpFew32Bf16) { 32 } else { 16 }
}

fn normed_bytes(width: usize) -> usize {
    width.div_ceil(CHUNK) * ROW_BYTES
}

/// All rows take the whole of a weight.
pub(super) fn whole(weight: &Matrix, y: &Rows) -> Part {
    let words = [
        weight.address(),
        weight.scales(),
        0,
        0,
        0,
        0,
        0,
        y.address(),
        pair(weight.stride, weight.rows),
        pair(weight.columns, y.stride),
        pair(0, 0),
    ];
    Part { words, out: weight.rows, inp: weight.columns, adapters: 0, rank: 0, _shrunk: None }
}

/// Whether rows of so few super-adapters are faster by [`Few::narrow`]. Bits are the same, but for a norm's last one.
pub(super) fn narrow_pays<'a>(sizes: impl IntoIterator<Item = &'a SegmentRow>) -> bool {
    let mut adapters = Vec::with_capacity(NARROW_ADAPTERS);
    sizes.into_iter().filter_map(SegmentRow::super_adapter).all(|adapter| {
        if !adapters.contains(&adapter) {
            adapters.push(adapter);
        }
        adapters.len() <= NARROW_ADAPTERS
    })
}

impl Few {
    /// One Linear of a launch of this kernel.
    pub(super) fn part(
        &self,
        device: &Arc<Device>,
        linear: &Linear<Cuda>,
        sizes: &[SegmentRow],
        y: &Rows,
    ) -> Result<Part, BackendError> {
        let mut part = whole(&linear.weight, y);
        part.words[2] = batch::bias(linear)?;
        part.words[3] = device.stage(sizes)?;
        part.rank = batch::most_rank(linear).next_multiple_of(RANKS);
        // Also of a Linear that all super-adapters leave alone: a gate beside it may have them.
        if !linear.adapters.is_empty() {
            part.words[4] = batch::adapters(device, linear)?;
        }
        if part.rank > 0 {
            part.adapters = linear.adapters.len();
            part.words[10] = pair(part.adapters, part.rank);
        }
        if part.rank > 0 && !self.narrow {
            let shrunk = Rows::new(device, sizes.len(), part.rank, Form::Bf16)?;
            let partial =
                Rows::new(device, sizes.len() * slices(part.inp, SHRINK_CHUNKS), part.rank, Form::F32)?;
            (part.words[5], part.words[6]) = (shrunk.address(), partial.address());
            part._shrunk = Some([shrunk, partial]);
        }
        Ok(part)
    }
}

/// Blocks that share a shrink of so many inputs, of which each takes so many chunks.
fn slices(inp: usize, chunks: usize) -> usize {
    inp.div_ceil(CHUNK).div_ceil(chunks).max(1)
}

pub(super) fn launch(device: &Device, few: &Few, inputs: &Inputs<'_>, parts: &[Part], onto: bool) {
    let x = &inputs.rows;
    let (norm, eps) = inputs.norm.map_or((0, 0.0), |norm| (norm.weight.address(), norm.eps));
    let of_inputs = [
        x.address(),
        norm,
        pair(x.stride, x.width),
        u64::from(x.length as u32) | u64::from(f32::to_bits(eps)) << 32,
    ];
    let mut of_parts = [0; MOST_PARTS * PART_WORDS];
    for (to, part) in of_parts.chunks_exact_mut(PART_WORDS).zip(parts) {
        to.copy_from_slice(&part.words);
    }
    let inp = parts.iter().map(|part| part.inp).max().unwrap_or(0);
    let shared = few.shared(x.length, x.width, inp);
    let expanded = &parts[..if few.paired { 1 } else { parts.len() }];
    let expands = |outputs| expanded.iter().map(|part| part.out.div_ceil(outputs)).sum::<usize>();
    let (of_inputs, of_parts) = (Argument::Struct(&of_inputs), Argument::Struct(&of_parts));
    let onto = Argument::Int(i32::from(onto));
    if few.narrow {
        let grid = Grid { shared, ..Grid::new([expands(NARROW_TILE), 1, 1], FEW_THREADS) };
        // SAFETY: as below; there are no more rows than a launch takes.
        return unsafe { device.push(few.kernel, grid, &[of_inputs, of_parts, onto]) };
    }
    let row_blocks = x.length.div_ceil(few.rows);
    let shrinks = |part: &Part| part.adapters * (part.rank / TILE);
    let are_shared = parts.iter().map(shrinks).sum::<usize>() * row_blocks <= MOST_SHRINKS;
    let chunks = if are_shared { SHRINK_CHUNKS } else { i32::MAX as usize };
    let shrink_blocks = parts.iter().map(|part| shrinks(part) * slices(part.inp, chunks)).sum::<usize>();
    let outputs = if few.paired { TILE / 2 } else { TILE };
    let blocks = row_blocks * (shrink_blocks + expands(outputs));
    let grid = Grid { shared, ..Grid::new([blocks, 1, 1], FEW_THREADS) };
    let arguments = [of_inputs, of_parts, int(parts.len()), device.counters(), int(chunks), onto];
    // SAFETY: the arguments of the kernels for few rows. Sizes lie within the weights and adapters, as `batch::sizes` has checked;
    // results and what is shrunk have room for every row.
    unsafe { device.push(few.kernel, grid, &arguments) };
}
