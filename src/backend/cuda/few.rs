//! Products of few rows: kernels/few_rows.cu, one launch for up to three Linears.
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
        Self { kernel, rows: of_block, paired: false, normed }
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
        Self { kernel, rows: of_block, paired: true, normed }
    }

    /// Whether blocks can norm so many rows themselves.
    pub(super) fn norms(rows: usize, width: usize) -> bool {
        rows <= NORMED_ROWS && rows * normed_bytes(width) <= NORMED_BYTES
    }

    /// Bytes of shared memory that a block takes: the ring, then normed inputs.
    fn shared(&self, rows: usize, width: usize) -> usize {
        let rows = rows.min(self.rows);
        let normed = if self.normed { rows * normed_bytes(width) } else { 0 };
        STAGES * (TILE + rows) * ROW_BYTES + normed
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

pub(super) fn part(
    device: &Arc<Device>,
    linear: &Linear<Cuda>,
    sizes: &[SegmentRow],
    y: &Rows,
) -> Result<Part, BackendError> {
    let mut part = whole(&linear.weight, y);
    part.words[2] = batch::bias(linear)?;
    part.words[3] = device.stage(sizes)?;
    part.rank = batch::most_rank(linear).next_multiple_of(RANKS);
    if part.rank > 0 {
        part.adapters = linear.adapters.len();
        part.words[4] = batch::adapters(device, linear)?;
        let shrunk = Rows::new(device, sizes.len(), part.rank, Form::Bf16)?;
        let partial = Rows::new(device, sizes.len() * slices(part.inp, SHRINK_CHUNKS), part.rank, Form::F32)?;
        (part.words[5], part.words[6]) = (shrunk.address(), partial.address());
        part.words[10] = pair(part.adapters, part.rank);
        part._shrunk = Some([shrunk, partial]);
    }
    Ok(part)
}

/// Blocks that share a shrink of so many inputs, of which each takes so many chunks.
fn slices(inp: usize, chunks: usize) -> usize {
    inp.div_ceil(CHUNK).div_ceil(chunks).max(1)
}

pub(super) fn launch(device: &Device, few: &Few, inputs: &Inputs<'_>, parts: &[Part], onto: bool) {
    let (x, outputs) = (&inputs.rows, if few.paired { TILE / 2 } else { TILE });
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
    let row_blocks = x.length.div_ceil(few.rows);
    let shrinks = |part: &Part| part.adapters * (part.rank / TILE);
    let shared = parts.iter().map(shrinks).sum::<usize>() * row_blocks <= MOST_SHRINKS;
    let chunks = if shared { SHRINK_CHUNKS } else { i32::MAX as usize };
    let shrink_blocks = parts.iter().map(|part| shrinks(part) * slices(part.inp, chunks)).sum::<usize>();
    let expanded = &parts[..if few.paired { 1 } else { parts.len() }];
    let expands = expanded.iter().map(|part| part.out.div_ceil(outputs)).sum::<usize>();
    let blocks = row_blocks * (shrink_blocks + expands);
    let grid = Grid { shared: few.shared(x.length, x.width), ..Grid::new([blocks, 1, 1], FEW_THREADS) };
    let arguments = [
        Argument::Struct(&of_inputs),
        Argument::Struct(&of_parts),
        int(parts.len()),
        device.counters(),
        int(chunks),
        Argument::Int(i32::from(onto)),
    ];
    // SAFETY: the arguments of the kernels for few rows. Sizes lie within the weights and adapters, as `batch::sizes` has checked;
    // results and what is shrunk have room for every row.
    unsafe { device.push(few.kernel, grid, &arguments) };
}
