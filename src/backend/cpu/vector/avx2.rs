//! AVX2 with FMA and F16C: four registers of 256 bits.
//!
//! Written with loops, not with `array::map` and its like: their closures are not always inlined into the code that is
//! compiled for AVX2, and would then call each instruction as a function.
#![allow(unsafe_code)]
#![expect(clippy::needless_range_loop, reason = "the index names the register")]

use super::{PANEL, QUAD, QUAD_BYTES, QUADS, Vector, ask_ahead};
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

    // Three rows of four accumulators, a weight and three broadcasts fill 16 registers. Two halves of a panel one after the
    // other, with twice the rows, were no faster for many rows and a third slower for eight.
    const ROWS: usize = 3;
    // Of quantised weights eight outputs are taken at a time. Measured on Zen 3, one core: bytes with 2, 4, 6 rows 101, 105,
    // 113 GOP/s, halves with 2, 3, 4, 6 rows 120, 123, 124, 101.
    const BYTES_ROWS: usize = 6;
    const HALVES_ROWS: usize = 4;
    // `maddubs` saturates its 16-bit sums of two products, so 8-bit weights must be signed here, see `dot_bytes`.
    const BIASED: bool = false;

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
    fn prefetch(at: *const u8) {
        // SAFETY: any address may be asked for.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) };
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

    #[inline(always)]
    fn to_f32(ints: Self::Ints) -> Self {
        Self(floats!(i => _mm256_cvtepi32_ps(ints[i])))
    }

    /// The weight's size as the unsigned factor and `x` with the weight's sign as the other: `2 * 128 * 127` fits into
    /// 16 bits, and `x` is never -128, whose sign cannot be turned round.
    #[inline(always)]
    fn dot_bytes<const R: usize>(
        start: [i32; R],
        weights: &[[u8; QUAD_BYTES]],
        x: [&[[i8; QUAD]; QUADS]; R],
        ahead: usize,
    ) -> [Self::Ints; R] {
        let mut sums = [ints!(_i => _mm256_setzero_si256()); R];
        if R == 1 {
            // In the order of memory.
            sums[0] = ints!(_i => _mm256_set1_epi32(start[0]));
            for (quad, weights) in weights.iter().take(QUADS).enumerate() {
                if ahead > 0 {
                    ask_ahead::<Self, _>(weights, ahead);
                }
                sums[0] = ints!(i => {
                    let bytes = _mm256_loadu_si256(weights.as_ptr().cast::<__m256i>().add(i));
                    let quants = _mm256_xor_si256(bytes, _mm256_set1_epi8(-128));
                    add_bytes(sums[0][i], (quants, _mm256_abs_epi8(quants)), splat(x[0][quad]))
                });
            }
            return sums;
        }
        // Eight outputs at a time, so that the accumulators of many rows stay in registers.
        for i in 0..4 {
            // SAFETY: a quad is 128 bytes; see `four`.
            unsafe {
                let mut some = [_mm256_setzero_si256(); R];
                for r in 0..R {
                    some[r] = _mm256_set1_epi32(start[r]);
                }
                for (quad, weights) in weights.iter().take(QUADS).enumerate() {
                    if ahead > 0 && i == 0 {
                        ask_ahead::<Self, _>(weights, ahead);
                    }
                    let bytes = _mm256_loadu_si256(weights.as_ptr().cast::<__m256i>().add(i));
                    let quants = _mm256_xor_si256(bytes, _mm256_set1_epi8(-128));
                    let sizes = _mm256_abs_epi8(quants);
                    for r in 0..R {
                        let signed = _mm256_sign_epi8(splat(x[r][quad]), quants);
                        let products = _mm256_maddubs_epi16(sizes, signed);
                        some[r] =
                            _mm256_add_epi32(some[r], _mm256_madd_epi16(products, _mm256_set1_epi16(1)));
                    }
                }
                for r in 0..R {
                    sums[r][i] = some[r];
                }
            }
        }
        sums
    }

    /// All of a block's sums of two products fit into 16 bits together: `16 * 15 * 127 < 32768`.
    #[inline(always)]
    fn dot_halves<const R: usize>(
        start: [i32; R],
        weights: &[[u8; QUAD_BYTES]],
        x: [&[[i8; QUAD]; QUADS]; R],
        ahead: usize,
    ) -> [Self::Ints; R] {
        let mut sums = [ints!(_i => _mm256_setzero_si256()); R];
        if R == 1 {
            // In the order of memory.
            for (pair, weights) in weights.iter().take(QUADS / 2).enumerate() {
                if ahead > 0 {
                    ask_ahead::<Self, _>(weights, ahead);
                }
                sums[0] = ints!(i => {
                    let both = _mm256_loadu_si256(weights.as_ptr().cast::<__m256i>().add(i));
                    add_halves(sums[0][i], split(both), [splat(x[0][2 * pair]), splat(x[0][2 * pair + 1])])
                });
            }
            sums[0] = ints!(i => {
                let whole = _mm256_madd_epi16(sums[0][i], _mm256_set1_epi16(1));
                _mm256_add_epi32(_mm256_set1_epi32(start[0]), whole)
            });
            return sums;
        }
        for i in 0..4 {
            // SAFETY: two quads in halves are 128 bytes; see `four`.
            unsafe {
                let mut some = [_mm256_setzero_si256(); R];
                for (pair, weights) in weights.iter().take(QUADS / 2).enumerate() {
                    if ahead > 0 && i == 0 {
                        ask_ahead::<Self, _>(weights, ahead);
                    }
                    let both = _mm256_loadu_si256(weights.as_ptr().cast::<__m256i>().add(i));
                    let quants = split(both);
                    for r in 0..R {
                        some[r] =
                            add_halves(some[r], quants, [splat(x[r][2 * pair]), splat(x[r][2 * pair + 1])]);
                    }
                }
                for r in 0..R {
                    let whole = _mm256_madd_epi16(some[r], _mm256_set1_epi16(1));
                    sums[r][i] = _mm256_add_epi32(_mm256_set1_epi32(start[r]), whole);
                }
            }
        }
        sums
    }
}

#[inline(always)]
fn splat(x: [i8; QUAD]) -> __m256i {
    // SAFETY: see `four`.
    unsafe { _mm256_set1_epi32(i32::from_le_bytes([x[0] as u8, x[1] as u8, x[2] as u8, x[3] as u8])) }
}

/// The quants and their sizes times four inputs each.
///
/// # Safety
/// Inlined into code compiled for AVX2; so below.
#[inline(always)]
unsafe fn add_bytes(sum: __m256i, (quants, sizes): (__m256i, __m256i), x: __m256i) -> __m256i {
    // SAFETY: by contract.
    unsafe {
        let products = _mm256_maddubs_epi16(sizes, _mm256_sign_epi8(x, quants));
        _mm256_add_epi32(sum, _mm256_madd_epi16(products, _mm256_set1_epi16(1)))
    }
}

/// The lower and upper halves of bytes.
///
/// # Safety
/// As [`add_bytes`].
#[inline(always)]
unsafe fn split(both: __m256i) -> [__m256i; 2] {
    // SAFETY: by contract.
    unsafe {
        let mask = _mm256_set1_epi8(15);
        [_mm256_and_si256(both, mask), _mm256_and_si256(_mm256_srli_epi16::<4>(both), mask)]
    }
}

/// Adds both halves' products, two and two, in 16 bits.
///
/// # Safety
/// As [`add_bytes`].
#[inline(always)]
unsafe fn add_halves(sum: __m256i, quants: [__m256i; 2], x: [__m256i; 2]) -> __m256i {
    // SAFETY: by contract.
    unsafe {
        let sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(quants[0], x[0]));
        _mm256_add_epi16(sum, _mm256_maddubs_epi16(quants[1], x[1]))
    }
}
