//! The inner loop: a few rows of activations times one panel of weights.
//!
//! It is written once, over arrays that the compiler turns into vector registers, and compiled for each instruction
//! set. Every output has one accumulator that takes the inputs in rising order, so the number of rows in a tile
//! changes nothing in any of them.
#![allow(unsafe_code)]

use super::matrix::{BlockPanels, Matrix, PANEL, Panels};
use crate::weights::BLOCK;
use half::bf16;

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
    pub(super) fn accumulate(
        self,
        matrix: &Matrix,
        panel: usize,
        inp: usize,
        x: &[&[f32]],
        sums: &[&[f32]],
        lanes: &mut [Lanes],
    ) {
        let columns = matrix.columns();
        assert!(inp <= columns && x.len() == lanes.len() && x.iter().all(|x| x.len() >= inp));
        let values = panel * columns * PANEL..(panel * columns + inp) * PANEL;
        match self {
            // Without fused instructions `mul_add` would be a library call.
            Self::Portable => accumulate::<2, false>(matrix, panel, values, x, sums, lanes),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `available` has seen these instructions on this processor.
            Self::Avx2 => unsafe { accumulate_avx2(matrix, panel, values, x, sums, lanes) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `available` has seen these instructions on this processor.
            Self::Avx512 => unsafe { accumulate_avx512(matrix, panel, values, x, sums, lanes) },
            #[cfg(not(target_arch = "x86_64"))]
            _ => accumulate::<2, false>(matrix, panel, values, x, sums, lanes),
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn accumulate_avx2(
    matrix: &Matrix,
    panel: usize,
    values: std::ops::Range<usize>,
    x: &[&[f32]],
    sums: &[&[f32]],
    lanes: &mut [Lanes],
) {
    // Three rows of four 256-bit accumulators leave four registers for weights and broadcasts.
    accumulate::<3, true>(matrix, panel, values, x, sums, lanes);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")]
fn accumulate_avx512(
    matrix: &Matrix,
    panel: usize,
    values: std::ops::Range<usize>,
    x: &[&[f32]],
    sums: &[&[f32]],
    lanes: &mut [Lanes],
) {
    // Eight rows of two 512-bit accumulators; each pair of weight vectors is loaded once for the eight.
    accumulate::<8, true>(matrix, panel, values, x, sums, lanes);
}

/// Cuts the rows into tiles of `R` and what is left into single rows.
#[inline(always)]
fn accumulate<const R: usize, const FUSED: bool>(
    matrix: &Matrix,
    panel: usize,
    values: std::ops::Range<usize>,
    x: &[&[f32]],
    sums: &[&[f32]],
    lanes: &mut [Lanes],
) {
    let mut row = 0;
    while row < x.len() {
        let left = x.len() - row;
        if left >= R {
            tile::<R, FUSED>(matrix, panel, values.clone(), &x[row..], &sums[row..], &mut lanes[row..]);
            row += R;
        } else if R > 4 && left >= 4 {
            tile::<4, FUSED>(matrix, panel, values.clone(), &x[row..], &sums[row..], &mut lanes[row..]);
            row += 4;
        } else if R > 2 && left >= 2 {
            tile::<2, FUSED>(matrix, panel, values.clone(), &x[row..], &sums[row..], &mut lanes[row..]);
            row += 2;
        } else {
            tile::<1, FUSED>(matrix, panel, values.clone(), &x[row..], &sums[row..], &mut lanes[row..]);
            row += 1;
        }
    }
}

#[inline(always)]
fn tile<const R: usize, const FUSED: bool>(
    matrix: &Matrix,
    panel: usize,
    values: std::ops::Range<usize>,
    x: &[&[f32]],
    sums: &[&[f32]],
    lanes: &mut [Lanes],
) {
    let inp = values.len() / PANEL;
    let x: [&[f32]; R] = std::array::from_fn(|r| &x[r][..inp]);
    let mut accumulators: [Lanes; R] = std::array::from_fn(|r| lanes[r]);
    match &matrix.panels {
        Panels::F32(weights) => dense::<f32, R, FUSED>(&weights[values], x, &mut accumulators),
        Panels::Bf16(weights) => dense::<bf16, R, FUSED>(&weights[values], x, &mut accumulators),
        Panels::Blocks(blocks) => {
            let sums: [&[f32]; R] = std::array::from_fn(|r| sums[r]);
            let first = panel * matrix.columns().div_ceil(BLOCK) * PANEL;
            blocked::<R, FUSED>(blocks, values, first, x, sums, &mut accumulators);
        }
    }
    lanes[..R].copy_from_slice(&accumulators);
}

/// A weight as it lies in memory.
trait Weight: Copy {
    fn widen(self) -> f32;
}

impl Weight for f32 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }
}

impl Weight for bf16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
}

#[inline(always)]
fn multiply_add<const FUSED: bool>(a: f32, b: f32, sum: f32) -> f32 {
    if FUSED { a.mul_add(b, sum) } else { a * b + sum }
}

#[inline(always)]
fn dense<W: Weight, const R: usize, const FUSED: bool>(
    weights: &[W],
    x: [&[f32]; R],
    lanes: &mut [Lanes; R],
) {
    for (k, weights) in weights.chunks_exact(PANEL).enumerate() {
        let wide: Lanes = std::array::from_fn(|lane| weights[lane].widen());
        for r in 0..R {
            let x = x[r][k];
            for lane in 0..PANEL {
                lanes[r][lane] = multiply_add::<FUSED>(x, wide[lane], lanes[r][lane]);
            }
        }
    }
}

/// Within a block the quants are summed by themselves; then its scale, and its minimum times the sum of the inputs.
#[inline(always)]
fn blocked<const R: usize, const FUSED: bool>(
    blocks: &BlockPanels,
    values: std::ops::Range<usize>,
    first: usize,
    x: [&[f32]; R],
    sums: [&[f32]; R],
    lanes: &mut [Lanes; R],
) {
    for (b, quants) in blocks.quants[values].chunks(BLOCK * PANEL).enumerate() {
        let mut partial = [[0.0f32; PANEL]; R];
        for (k, quants) in quants.chunks_exact(PANEL).enumerate() {
            let wide: Lanes = std::array::from_fn(|lane| f32::from(quants[lane]));
            for r in 0..R {
                let x = x[r][b * BLOCK + k];
                for lane in 0..PANEL {
                    partial[r][lane] = multiply_add::<FUSED>(x, wide[lane], partial[r][lane]);
                }
            }
        }
        let at = first + b * PANEL;
        let scales = &blocks.scales[at..at + PANEL];
        for r in 0..R {
            for lane in 0..PANEL {
                lanes[r][lane] = multiply_add::<FUSED>(scales[lane], partial[r][lane], lanes[r][lane]);
            }
        }
        if let Some(minimums) = blocks.minimums.get(at..at + PANEL) {
            for r in 0..R {
                let sum = sums[r][b];
                for lane in 0..PANEL {
                    lanes[r][lane] = multiply_add::<FUSED>(sum, minimums[lane], lanes[r][lane]);
                }
            }
        }
    }
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
