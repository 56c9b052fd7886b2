//! Products of few rows: kernels/few_rows.cu, one launch for up to three Linears.
#![allow(unsafe_code)]

use super::batch::{self, SegmentRow};
use super::device::Device;
use super::kernel::{Argument, Grid, Kernel, int, pair};
use super::product::Inputs;
use super::rows::{Form, Rows};
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

const PART_WORDS: usize = 9;

/// A kernel for few rows with what it takes at a time.
pub(super) struct Few {
    kernel: Kernel,
    /// Tiles of rows, and of outputs.
    tiles: usize,
    groups: usize,
}

impl Few {
    pub(super) fn linear(rows: usize, normed: bool) -> Self {
        match rows {
            _ if normed => Self { kernel: Kernel::NormedLinearFew, tiles: 1, groups: 1 },
            0..=8 => Self { kernel: Kernel::LinearFew8, tiles: 1, groups: 1 },
            9..=16 => Self { kernel: Kernel::LinearFew16, tiles: 2, groups: 2 },
            _ => Self { kernel: Kernel::LinearFew32, tiles: 4, groups: 4 },
        }
    }

    pub(super) fn gate_up(rows: usize, normed: bool) -> Self {
        match rows {
            _ if normed => Self { kernel: Kernel::NormedGateUpFew, tiles: 1, groups: 1 },
            0..=8 => Self { kernel: Kernel::GateUpFew8, tiles: 1, groups: 1 },
            9..=16 => Self { kernel: Kernel::GateUpFew16, tiles: 2, groups: 2 },
            _ => Self { kernel: Kernel::GateUpFew32, tiles: 4, groups: 2 },
        }
    }
}

/// All rows take the whole of a weight.
pub(super) fn whole(weight: &Matrix, y: &Rows) -> Part {
    let words = [
        weight.address(),
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
    part.words[1] = batch::bias(linear)?;
    part.words[2] = device.stage(sizes)?;
    part.rank = batch::most_rank(linear).next_multiple_of(RANKS);
    if part.rank > 0 {
        part.adapters = linear.adapters.len();
        part.words[3] = batch::adapters(device, linear)?;
        let shrunk = Rows::new(device, sizes.len(), part.rank, Form::Bf16)?;
        part.words[4] = shrunk.address();
        part.words[8] = pair(part.adapters, part.rank);
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
    let paired = matches!(
        few.kernel,
        Kernel::GateUpFew8 | Kernel::GateUpFew16 | Kernel::GateUpFew32 | Kernel::NormedGateUpFew
    );
    let expanded = &parts[..if paired { 1 } else { parts.len() }];
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
