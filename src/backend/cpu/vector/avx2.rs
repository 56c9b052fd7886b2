//! AVX2 with FMA and F16C: four registers of 256 bits.
//!
//! Written with loops, not with `array::map` and its like: their closures are not always inlined into the code that is
//! compiled for AVX2, and would then call each instruction as a function.
#![allow(unsafe_code)]
#![expect(clippy::needless_range_loop, reason = "the index names the register")]

use super::super::ahead::Asking;
use super::super::inputs::QuantBlock;
use super::avx2_blocks::{add_blocks_to_sixteen, add_bytes, add_halves, splat, split, whole};
use super::avx2_quants::{largest, quants};
use super::{BlockRun, Lanes, PANEL, QUAD, QUAD_BYTES, QUADS, TURN, Vector, blocks};
use half::{bf16, f16};
use std::arch::x86_64::*;

#[derive(Clone, Copy)]
pub(in super::super) struct Avx2([__m256; 4]);

/// Four registers, each from an expression of its index.
macro_rules! four {
    ($zero:expr, $i:ident => $value:expr) => {{
        // SAFETY: inlined into code compiled for AVX2, FMA and F16C, run only where they were detected; what is loaded or
        // stored lies within the arrays that the arguments are. So for all of this file.
        unsafe {
            let mut all = [$zero; 4];
            for ($i, one) in all.iter_mut().enumerate() {
                *one = $value;
            }
            all
        }
    }};
}

macro_rules! floats {
    ($i:ident => $value:expr) => {
        four!(_mm256_setzero_ps(), $i => $value)
    };
}

macro_rules! ints {
    ($i:ident => $value:expr) => {
        four!(_mm256_setzero_si256(), $i => $value)
    };
}

impl Vector for Avx2 {
    type Ints = [__m256i; 4];

    // Sixteen registers: five rows of two accumulators beside two weights, four of two integers.
    const ROWS: usize = 5;
    const BYTES_ROWS: usize = 4;
    const HALVES_ROWS: usize = 4;
    const BIASED: bool = true;
    // `maddubs` adds two products in 16 bits. With eight bits the inputs would have to take the weights' signs first, a
    // third instruction for the two ports that multiply: on Zen 3, 98 instead of 133 GOP/s.
    const LARGEST: i8 = 63;

    #[inline(always)]
    fn passes(quantised: bool, rows: usize) -> usize {
        match (quantised, rows) {
            (_, 0..=1) | (false, 2) => 1,
            _ => 2,
        }
    }

    #[inline(always)]
    fn zero() -> Self {
        Self(floats!(_i => _mm256_setzero_ps()))
    }

    #[inline(always)]
    fn load(from: &[f32; PANEL]) -> Self {
        Self(floats!(i => _mm256_loadu_ps(from.as_ptr().add(8 * i))))
    }

    #[inline(always)]
    fn load_f16(from: &[f16; PANEL]) -> Self {
        Self(floats!(i => _mm256_cvtph_ps(_mm_loadu_si128(from.as_ptr().cast::<__m128i>().add(i)))))
    }

    #[inline(always)]
    fn store(self, to: &mut [f32; PANEL]) {
        for (i, lanes) in self.0.into_iter().enumerate() {
            // SAFETY: room for 32 floats; see `four`.
            unsafe { _mm256_storeu_ps(to.as_mut_ptr().add(8 * i), lanes) };
        }
    }

    #[inline(always)]
    fn splat(x: f32) -> Self {
        Self(floats!(_i => _mm256_set1_ps(x)))
    }

    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        Self(floats!(i => _mm256_mul_ps(self.0[i], other.0[i])))
    }

    #[inline(always)]
    fn add_product(self, a: Self, b: Self) -> Self {
        Self(floats!(i => _mm256_fmadd_ps(a.0[i], b.0[i], self.0[i])))
    }

    #[inline(always)]
    fn load_pairs(from: &[[bf16; 2]; PANEL]) -> [Self; 2] {
        let w = ints!(i => _mm256_loadu_si256(from.as_ptr().cast::<__m256i>().add(i)));
        let firsts = floats!(i => _mm256_castsi256_ps(_mm256_slli_epi32::<16>(w[i])));
        let seconds = floats!(i => {
            _mm256_castsi256_ps(_mm256_and_si256(w[i], _mm256_set1_epi32(0xffff_0000_u32 as i32)))
        });
        [Self(firsts), Self(seconds)]
    }

    /// One or two rows take all outputs of the panel at once, in the order of memory. More rows take sixteen, then the
    /// others, so that their accumulators stay in registers: on Zen 3, one core, 3 to 6 rows reach 73, 97, 96, 98 GFLOP/s.
    #[inline(always)]
    fn add_inputs<const R: usize>(
        lanes: &mut [Lanes; R],
        weights: &[[f32; PANEL]],
        x: [&[f32]; R],
        asking: Asking<'_>,
    ) {
        // SAFETY: see `four`.
        unsafe {
            if R <= 2 {
                return add_inputs::<4, R>(lanes, 0, weights, x, asking);
            }
            add_inputs::<2, R>(lanes, 0, weights, x, asking);
            add_inputs::<2, R>(lanes, 16, weights, x, asking);
        }
    }

    /// As [`Self::add_inputs`]; 72, 94, 95, 92 GFLOP/s.
    #[inline(always)]
    fn add_pairs<const R: usize>(
        lanes: &mut [Lanes; R],
        weights: &[[[bf16; 2]; PANEL]],
        x: [&[[f32; 2]]; R],
        asking: Asking<'_>,
    ) {
        // SAFETY: see `four`.
        unsafe {
            if R <= 2 {
                return add_pairs::<4, R>(lanes, 0, weights, x, asking);
            }
            add_pairs::<2, R>(lanes, 0, weights, x, asking);
            add_pairs::<2, R>(lanes, 16, weights, x, asking);
        }
    }

    /// One row takes all outputs of the panel at once, in the order of memory. More rows take sixteen, then the others, so
    /// that their accumulators stay in registers through a block. On Zen 3, one core, a product of 64 rows and 1536 by 576
    /// weights: bytes 133 GOP/s, halves 143.
    #[inline(always)]
    fn add_blocks<const LAYOUT: usize, const R: usize>(
        lanes: &mut [Lanes; R],
        run: BlockRun<'_>,
        x: [&[QuantBlock]; R],
    ) {
        if R == 1 {
            return blocks::add_blocks::<Self, LAYOUT, R>(lanes, run, x);
        }
        for x in x {
            assert!(x.len() == run.len());
        }
        for pair in 0..2 {
            // SAFETY: see `four`; there are as many blocks of inputs as of weights.
            unsafe { add_blocks_to_sixteen::<LAYOUT, R>(lanes, pair, run, x) };
        }
    }

    #[inline(always)]
    fn largest(x: &[f32; PANEL]) -> f32 {
        // SAFETY: see `four`.
        unsafe { largest(x) }
    }

    #[inline(always)]
    fn quants(x: &[f32; PANEL], inverse: f32) -> ([i8; PANEL], i32) {
        // SAFETY: see `four`.
        unsafe { quants(x, inverse) }
    }

    #[inline(always)]
    fn to_f32(ints: Self::Ints) -> Self {
        Self(floats!(i => _mm256_cvtepi32_ps(ints[i])))
    }

    #[inline(always)]
    fn dot_bytes<const R: usize>(
        start: [i32; R],
        weights: &[[u8; QUAD_BYTES]],
        x: [&[[i8; QUAD]; QUADS]; R],
    ) -> [Self::Ints; R] {
        let mut sums = [ints!(_i => _mm256_setzero_si256()); R];
        for r in 0..R {
            sums[r] = ints!(_i => _mm256_set1_epi32(start[r]));
        }
        for (quad, weights) in weights.iter().take(QUADS).enumerate() {
            for r in 0..R {
                sums[r] = ints!(i => {
                    let bytes = _mm256_loadu_si256(weights.as_ptr().cast::<__m256i>().add(i));
                    add_bytes(sums[r][i], bytes, splat(x[r][quad]))
                });
            }
        }
        sums
    }

    #[inline(always)]
    fn dot_halves<const R: usize>(
        start: [i32; R],
        weights: &[[u8; QUAD_BYTES]],
        x: [&[[i8; QUAD]; QUADS]; R],
    ) -> [Self::Ints; R] {
        let mut sums = [ints!(_i => _mm256_setzero_si256()); R];
        for (pair, weights) in weights.iter().take(QUADS / 2).enumerate() {
            for r in 0..R {
                sums[r] = ints!(i => {
                    let both = _mm256_loadu_si256(weights.as_ptr().cast::<__m256i>().add(i));
                    let [lower, upper] = split(both);
                    let sum = add_halves(sums[r][i], lower, splat(x[r][2 * pair]));
                    add_halves(sum, upper, splat(x[r][2 * pair + 1]))
                });
            }
        }
        for r in 0..R {
            sums[r] = ints!(i => whole(start[r], sums[r][i]));
        }
        sums
    }
}

/// `8 N` outputs from `from` on.
///
/// # Safety
/// Inlined into code compiled for AVX2; so below. There are as many inputs as weights, and so many outputs.
#[inline(always)]
unsafe fn add_inputs<const N: usize, const R: usize>(
    lanes: &mut [Lanes; R],
    from: usize,
    weights: &[[f32; PANEL]],
    x: [&[f32]; R],
    asking: Asking<'_>,
) {
    // SAFETY: by contract.
    unsafe {
        let mut sums = load_sums::<N, R>(lanes, from);
        for (k, weights) in weights.iter().enumerate() {
            if k.is_multiple_of(TURN) {
                asking.turn(weights, TURN * size_of_val(weights), TURN * size_of_val(weights));
            }
            let mut some = [_mm256_setzero_ps(); N];
            for i in 0..N {
                some[i] = _mm256_loadu_ps(weights.as_ptr().add(from + 8 * i));
            }
            for r in 0..R {
                add_products(&mut sums[r], some, *x[r].get_unchecked(k));
            }
        }
        store_sums(sums, lanes, from);
    }
}

/// As [`add_inputs`]. The weights are loaded twice, so that no registers are needed for the second of each pair while the
/// first is multiplied.
///
/// # Safety
/// As [`add_inputs`].
#[inline(always)]
unsafe fn add_pairs<const N: usize, const R: usize>(
    lanes: &mut [Lanes; R],
    from: usize,
    weights: &[[[bf16; 2]; PANEL]],
    x: [&[[f32; 2]]; R],
    asking: Asking<'_>,
) {
    // SAFETY: by contract.
    unsafe {
        let mut sums = load_sums::<N, R>(lanes, from);
        for (k, weights) in weights.iter().enumerate() {
            if k.is_multiple_of(TURN) {
                asking.turn(weights, TURN * size_of_val(weights), TURN * size_of_val(weights));
            }
            let at = weights.as_ptr().add(from).cast::<__m256i>();
            let mut some = [_mm256_setzero_ps(); N];
            for i in 0..N {
                some[i] = _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_loadu_si256(at.add(i))));
            }
            for r in 0..R {
                add_products(&mut sums[r], some, x[r].get_unchecked(k)[0]);
            }
            let upper = _mm256_set1_epi32(0xffff_0000_u32 as i32);
            for i in 0..N {
                some[i] = _mm256_castsi256_ps(_mm256_and_si256(_mm256_loadu_si256(at.add(i)), upper));
            }
            for r in 0..R {
                add_products(&mut sums[r], some, x[r].get_unchecked(k)[1]);
            }
        }
        store_sums(sums, lanes, from);
    }
}

/// # Safety
/// As [`add_inputs`].
#[inline(always)]
unsafe fn add_products<const N: usize>(sums: &mut [__m256; N], weights: [__m256; N], x: f32) {
    // SAFETY: by contract.
    unsafe {
        let x = _mm256_set1_ps(x);
        for i in 0..N {
            sums[i] = _mm256_fmadd_ps(x, weights[i], sums[i]);
        }
    }
}

/// # Safety
/// As [`add_inputs`].
#[inline(always)]
unsafe fn load_sums<const N: usize, const R: usize>(lanes: &[Lanes; R], from: usize) -> [[__m256; N]; R] {
    // SAFETY: by contract.
    unsafe {
        let mut sums = [[_mm256_setzero_ps(); N]; R];
        for r in 0..R {
            for i in 0..N {
                sums[r][i] = _mm256_loadu_ps(lanes[r].as_ptr().add(from + 8 * i));
            }
        }
        sums
    }
}

/// # Safety
/// As [`add_inputs`].
#[inline(always)]
unsafe fn store_sums<const N: usize, const R: usize>(
    sums: [[__m256; N]; R],
    lanes: &mut [Lanes; R],
    from: usize,
) {
    for r in 0..R {
        for i in 0..N {
            // SAFETY: by contract.
            unsafe { _mm256_storeu_ps(lanes[r].as_mut_ptr().add(from + 8 * i), sums[r][i]) };
        }
    }
}
