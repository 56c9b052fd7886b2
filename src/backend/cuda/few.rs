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

/// Threads of a block of kernels/few_rows.cu; outputs of a warp, rows of a tile, Linears of a launch.
const FEW_THREADS: usize = 256;
const OUTPUTS: usize = 16;
const ROWS: usize = 8;
pub(super) const MOST_PARTS: usize = 3;
/// What ranks are padded to there.
const RANKS: usize = 32;

/// One Linear of a launch: `Part` of kernels/few_rows.cu.
pub(super) struct Part {
    words: [u64; PART_WORDS],
    out: usize,
    adapters: usize,
    rank: usize,
    /// What the shrinks leave for the expands.
    _shrunk: Option<Rows>,
}

const PART_WORDS: usize = 10;

/// A kernel for few rows with what it takes at a time.
pub(super) struct Few {
    kernel: Kernel,
    /// Tiles of rows, and of outputs.
    tiles: usize,
    groups: usize,
    /// Whether two Linears make one result.
    paired: bool,
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
    pub(super) fn linear(rows: usize, normed: bool, format: Format) -> Self {
        let (kernel, tiles, groups) = match rows {
            _ if normed => {
                (kernels!(format, NormedLinearFewBf16, NormedLinearFewInt8, NormedLinearFewInt4), 1, 1)
            }
            0..=8 => (kernels!(format, LinearFew8Bf16, LinearFew8Int8, LinearFew8Int4), 1, 1),
            9..=16 => (kernels!(format, LinearFew16Bf16, LinearFew16Int8, LinearFew16Int4), 2, 2),
            _ => (kernels!(format, LinearFew32Bf16, LinearFew32Int8, LinearFew32Int4), 4, 4),
        };
        Self { kernel, tiles, groups, paired: false }
    }

    /// Of gate and up together.
    pub(super) fn gate_up(rows: usize, normed: bool, format: Format) -> Self {
        let (kernel, tiles, groups) = match rows {
            _ if normed => {
                (kernels!(format, NormedGateUpFewBf16, NormedGateUpFewInt8, NormedGateUpFewInt4), 1, 1)
            }
            0..=8 => (kernels!(format, GateUpFew8Bf16, GateUpFew8Int8, GateUpFew8Int4), 1, 1),
            9..=16 => (kernels!(format, GateUpFew16Bf16, GateUpFew16Int8, GateUpFew16Int4), 2, 2),
            _ => (kernels!(format, GateUpFew32Bf16, GateUpFew32Int8, GateUpFew32Int4), 4, 2),
        };
        Self { kernel, tiles, groups, paired: true }
    }
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
        y.address(),
        pair(weight.stride, weight.rows),
        pair(weight.columns, y.stride),
        pair(0, 0),
    ];
    Part { words, out: weight.rows, adapters: 0, rank: 0, _shrunk: None }
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
        part.words[5] = shrunk.address();
        part.words[9] = pair(part.adapters, part.rank);
        part._shrunk = Some(shrunk);
    }
    Ok(part)
}

pub(super) fn launch(device: &Device, few: &Few, inputs: &Inputs<'_>, parts: &[Part], onto: bool) {
    let (x, outputs) = (&inputs.rows, few.groups * OUTPUTS);
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
    let shrinks = parts.iter().map(|part| part.adapters * part.rank.div_ceil(outputs)).sum::<usize>();
    let expanded = &parts[..if few.paired { 1 } else { parts.len() }];
    let expands = expanded.iter().map(|part| part.out.div_ceil(outputs)).sum::<usize>();
    let blocks = x.length.div_ceil(few.tiles * ROWS) * (shrinks + expands);
    let arguments = [
        Argument::Struct(&of_inputs),
        Argument::Struct(&of_parts),
        int(parts.len()),
        device.counters(),
        Argument::Int(i32::from(onto)),
    ];
    // SAFETY: the arguments of the kernels for few rows. Sizes lie within the weights and adapters, as `batch::sizes` has checked;
    // results and what is shrunk have room for every row.
    unsafe { device.push(few.kernel, Grid::new([blocks, 1, 1], FEW_THREADS), &arguments) };
}
