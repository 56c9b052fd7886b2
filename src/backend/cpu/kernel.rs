//! The inner loop: a few rows of activations times one panel of weights.
//!
//! It is written once over [`Vector`] and compiled for each instruction set. Every output has one accumulator that
//! takes the inputs in rising order, so the number of rows in a tile changes nothing in any of them.
#![allow(unsafe_code)]

use super::matrix::{BlockPanels, Matrix, PANEL, Panels};
#[cfg(target_arch = "x86_64")]
use super::vector::{Avx2, Avx512};
use super::vector::{Portable, Vector};
use crate::weights::BLOCK;

/// Accumulators of one row: the outputs of one panel.
pub(super) type Lanes = [f32; PANEL];

/// The instruction set to compute with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kernel {
    Portable,
    Avx2,
    Avx512,
}

impl Kernel {
    /// The best that this processor has.
    pub(super) fn detect() -> Self {
        *Self::available().last().unwrap_or(&Self::Portable)
    }

    /// All that this processor has, the best last.
    pub(super) fn available() -> Vec<Self> {
        let mut available = vec![Self::Portable];
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                available.push(Self::Avx2);
            }
            if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw") {
                available.push(Self::Avx512);
            }
        }
        available
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            Self::Avx2 => "AVX2",
            Self::Avx512 => "AVX-512",
        }
    }

    /// Adds `matrix[panel, :inp] x` to the accumulators of each row.
    ///
    /// `x` gives the rows' inputs, each at least `inp` long; `sums[r]` row `r`'s sums by block (see [`block_sums`]), read
    /// only where the matrix has minimums.
    pub(super) fn accumulate(self, tile: &Tile<'_>, lanes: &mut [Lanes]) {
        let Tile { matrix, inp, x, sums, .. } = *tile;
        assert!(inp <= matrix.columns() && x.len() == lanes.len() && sums.len() == x.len());
        assert!(x.iter().all(|x| x.len() >= inp));
        match self {
            Self::Portable => accumulate::<Portable>(tile, lanes),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `available` has seen these instructions on this processor.
            Self::Avx2 => unsafe { accumulate_avx2(tile, lanes) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `available` has seen these instructions on this processor.
            Self::Avx512 => unsafe { accumulate_avx512(tile, lanes) },
            #[cfg(not(target_arch = "x86_64"))]
            _ => accumulate::<Portable>(tile, lanes),
        }
    }

    /// Runs plain loops compiled for this instruction set, so that the compiler can use its registers in them.
    #[inline(always)]
    pub(super) fn vectorised(self, work: impl FnOnce()) {
        match self {
            Self::Portable => work(),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `available` has seen these instructions on this processor.
            Self::Avx2 => unsafe { vectorised_avx2(work) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `available` has seen these instructions on this processor.
            Self::Avx512 => unsafe { vectorised_avx512(work) },
            #[cfg(not(target_arch = "x86_64"))]
            _ => work(),
        }
    }
}

/// One panel times some rows.
pub(super) struct Tile<'a> {
    pub(super) matrix: &'a Matrix,
    pub(super) panel: usize,
    /// Active inputs.
    pub(super) inp: usize,
    /// By row: the inputs, at least `inp`.
    pub(super) x: &'a [&'a [f32]],
    /// By row: sums by block.
    pub(super) sums: &'a [&'a [f32]],
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn accumulate_avx2(tile: &Tile<'_>, lanes: &mut [Lanes]) {
    accumulate::<Avx2>(tile, lanes);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx2,fma")]
fn accumulate_avx512(tile: &Tile<'_>, lanes: &mut [Lanes]) {
    accumulate::<Avx512>(tile, lanes);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn vectorised_avx2(work: impl FnOnce()) {
    work();
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx2,fma")]
fn vectorised_avx512(work: impl FnOnce()) {
    work();
}

/// Takes as many rows at a time as the registers hold, then the rest in fewer.
#[inline(always)]
fn accumulate<V: Vector>(tile: &Tile<'_>, lanes: &mut [Lanes]) {
    let mut row = 0;
    while row < lanes.len() {
        row += match lanes.len() - row {
            8.. if V::ROWS >= 8 => rows::<V, 8>(tile, row, lanes),
            4.. if V::ROWS >= 4 => rows::<V, 4>(tile, row, lanes),
            2.. if V::ROWS >= 2 => rows::<V, 2>(tile, row, lanes),
            _ => rows::<V, 1>(tile, row, lanes),
        };
    }
}

/// `R` rows from `row` on; returns `R`.
#[inline(always)]
fn rows<V: Vector, const R: usize>(tile: &Tile<'_>, row: usize, lanes: &mut [Lanes]) -> usize {
    let Tile { matrix, panel, inp, .. } = *tile;
    let columns = matrix.columns();
    let values = panel * columns * PANEL..(panel * columns + inp) * PANEL;
    let x: [&[f32]; R] = std::array::from_fn(|r| &tile.x[row + r][..inp]);
    let start: [V; R] = std::array::from_fn(|r| V::load(&lanes[row + r]));
    let end = match &matrix.panels {
        Panels::F32(weights) => dense(&weights[values], x, start, V::load),
        Panels::Bf16(weights) => dense(&weights[values], x, start, V::load_bf16),
        Panels::Blocks(blocks) => {
            let sums: [&[f32]; R] = std::array::from_fn(|r| tile.sums[row + r]);
            blocked(blocks, values, panel * columns.div_ceil(BLOCK) * PANEL, x, sums, start)
        }
    };
    for r in 0..R {
        end[r].store(&mut lanes[row + r]);
    }
    R
}

#[inline(always)]
fn dense<V: Vector, T, const R: usize>(
    weights: &[T],
    x: [&[f32]; R],
    start: [V; R],
    load: impl Fn(&[T; PANEL]) -> V,
) -> [V; R] {
    let mut sums = start;
    for (k, weights) in weights.as_chunks::<PANEL>().0.iter().enumerate() {
        let weights = load(weights);
        for r in 0..R {
            sums[r] = sums[r].add_product(V::splat(x[r][k]), weights);
        }
    }
    sums
}

/// Within a block the quants are summed by themselves; then its scale, and its minimum times the sum of the inputs.
/// `first` is where the panel's scales begin.
#[inline(always)]
fn blocked<V: Vector, const R: usize>(
    blocks: &BlockPanels,
    values: std::ops::Range<usize>,
    first: usize,
    x: [&[f32]; R],
    block_sums: [&[f32]; R],
    start: [V; R],
) -> [V; R] {
    let mut sums = start;
    let quants = blocks.quants[values].as_chunks::<PANEL>().0;
    for (b, quants) in quants.chunks(BLOCK).enumerate() {
        let x: [&[f32]; R] = std::array::from_fn(|r| &x[r][b * BLOCK..b * BLOCK + quants.len()]);
        let partial = dense_i8(quants, x);
        let at = first + b * PANEL;
        let scales = V::load(lanes_at(&blocks.scales, at));
        for r in 0..R {
            sums[r] = sums[r].add_product(scales, partial[r]);
        }
        if !blocks.minimums.is_empty() {
            let minimums = V::load(lanes_at(&blocks.minimums, at));
            for r in 0..R {
                sums[r] = sums[r].add_product(V::splat(block_sums[r][b]), minimums);
            }
        }
    }
    sums
}

#[inline(always)]
fn dense_i8<V: Vector, const R: usize>(quants: &[[i8; PANEL]], x: [&[f32]; R]) -> [V; R] {
    let mut sums = [V::zero(); R];
    for (k, quants) in quants.iter().enumerate() {
        let weights = V::load_i8(quants);
        for r in 0..R {
            sums[r] = sums[r].add_product(V::splat(x[r][k]), weights);
        }
    }
    sums
}

#[inline(always)]
fn lanes_at(values: &[f32], at: usize) -> &Lanes {
    values[at..].first_chunk().expect("scales and minimums are packed in whole panels")
}

/// The sum of each block of a row's first `inp` inputs, where the matrix has minimums to multiply with; else nothing.
pub(super) fn block_sums(matrix: &Matrix, x: &[f32], inp: usize) -> Vec<f32> {
    match &matrix.panels {
        Panels::Blocks(b) if !b.minimums.is_empty() => {
            x[..inp].chunks(BLOCK).map(|block| block.iter().sum()).collect()
        }
        _ => Vec::new(),
    }
}
