//! How a launch of kernels/few_streamed.cu is laid out: products of few rows with large weights.

use super::batch::{self, SegmentRow};
use super::device::Device;
use super::few::RANKS;
use super::kernel::{Kernel, pair};
use super::weights::Format;
use super::{Cuda, Matrix};
use crate::backend::Linear;

/// Of kernels/few_streamed.cu: rows of a launch, rows of a weight that it multiplies at a time, inputs of a slot and bytes of all of it.
pub(super) const ROWS: usize = 8;
/// Threads of a block: eight warps that multiply and one that copies.
pub(super) const THREADS: usize = 9 * 32;
const OUTPUTS: usize = 16;
const SPAN: usize = 1024;
const SLOT_BYTES: usize = OUTPUTS * (2 * SPAN + 16);
/// What rows of inputs are padded to there.
const STEP: usize = 32;
/// Slots: fewer than two do not overlap anything, more than six of 33 KB there is no room for.
const MOST_SLOTS: usize = 6;
const LEAST_SLOTS: usize = 2;
/// Linears whose ranks there is room for.
const MOST_PARTS: usize = 3;
/// Tiles of each block that the launch before sends for.
const AHEAD: usize = 1;

/// A launch's shared memory: `Room` of kernels/few_streamed.cu.
#[derive(Debug, Clone, Copy)]
pub(super) struct Streamed {
    pub(super) room: [u64; 2],
    pub(super) bytes: usize,
    ahead: Ahead,
}

/// What the launch before may send for: `Ahead` of kernels/few_streamed.cu.
pub(super) type Ahead = [u64; 4];

impl Streamed {
    /// A plan for Linears of the same rows, if they are what that kernel is for and there is room for it.
    /// `paired`: gate and up, of which it takes eight outputs each at a time.
    pub(super) fn of(device: &Device, rows: usize, linears: &[&Linear<Cuda>], paired: bool) -> Option<Self> {
        let weights = linears.iter().map(|linear| &*linear.weight).collect::<Vec<_>>();
        let rank = linears.iter().map(|linear| batch::most_rank(linear)).max().unwrap_or(0);
        Self::plan(device, rows, &weights, rank, paired)
    }

    /// The same of a matrix without adapters.
    pub(super) fn of_matrix(device: &Device, rows: usize, matrix: &Matrix) -> Option<Self> {
        Self::plan(device, rows, &[matrix], 0, false)
    }

    /// Where its weights are, for the launch before it.
    pub(super) fn ahead(&self) -> Ahead {
        self.ahead
    }

    fn plan(device: &Device, rows: usize, weights: &[&Matrix], rank: usize, paired: bool) -> Option<Self> {
        let numbers = weights.iter().map(|weight| weight.rows * weight.columns).sum::<usize>();
        let is_large = device.streams_from().is_some_and(|least| numbers >= least.max(1));
        let are_bf16 = weights.iter().all(|weight| weight.format == Format::Bf16);
        let fit = (1..=ROWS).contains(&rows) && weights.len() <= MOST_PARTS;
        (is_large && are_bf16 && fit).then_some(())?;
        let (expanded, of_weight) = if paired { (&weights[..1], OUTPUTS / 2) } else { (weights, OUTPUTS) };
        let tiles = expanded.iter().map(|weight| weight.rows.div_ceil(of_weight)).sum::<usize>();
        let units = tiles.div_ceil(device.multiprocessors().max(1));
        let inputs = weights.iter().map(|weight| weight.columns).max().unwrap_or(0);
        let (row_bytes, ranks) = (2 * inputs.next_multiple_of(STEP) + 16, rank.next_multiple_of(RANKS));
        let of_units = 2 * units * ROWS * OUTPUTS * size_of::<f32>() + units * OUTPUTS * ranks * 2;
        let beside = rows * row_bytes + of_units + MOST_PARTS * ROWS * ranks * size_of::<f32>();
        let left = device.most_shared().checked_sub(Kernel::StreamedLinearFew.static_bytes() + beside)?;
        let slots = (left / SLOT_BYTES).min(MOST_SLOTS);
        let first = weights[0];
        let second = if paired { weights[1].address() } else { 0 };
        let of_tile = pair(of_weight, 2 * first.stride);
        let ahead = [first.address(), second, of_tile, pair(first.rows / of_weight, AHEAD)];
        let room = [pair(slots, row_bytes), pair(units, ranks)];
        let plan = Self { room, bytes: slots * SLOT_BYTES + beside, ahead };
        (slots >= LEAST_SLOTS).then_some(plan)
    }
}

/// Whether Linears of the same rows take the same of a row's inputs: there is one copy of them.
pub(super) fn share_inputs<'a>(sizes: impl IntoIterator<Item = &'a [SegmentRow]>) -> bool {
    let mut all = sizes.into_iter();
    let Some(first) = all.next() else { return true };
    all.all(|other| first.iter().zip(other).all(|(a, b)| a.inp == b.inp))
}
