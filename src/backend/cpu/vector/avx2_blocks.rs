//! Eight outputs of quantised weights times some rows, and the integer products that all AVX2 kernels share.
#![allow(unsafe_code)]

use super::super::inputs::QuantBlock;
use super::super::matrix::Layout;
use super::avx2::{Avx2, load_sums, store_sums};
use super::{BlockRun, Lanes, QUAD, QUAD_BYTES, QUADS, Vector, blocks};
use std::arch::x86_64::*;

/// The outputs of register `i`.
///
/// # Safety
/// Inlined into code compiled for AVX2.
#[inline(always)]
pub(super) unsafe fn add_blocks_to_eight<const LAYOUT: usize, const R: usize>(
    lanes: &mut [Lanes; R],
    i: usize,
    run: BlockRun<'_>,
    x: [&[QuantBlock]; R],
) {
    let layout = const { Layout::ALL[LAYOUT] };
    // SAFETY: by contract.
    unsafe {
        let mut sums = load_sums::<1, R>(lanes, 8 * i);
        for (b, (header, weights)) in run.blocks(layout).enumerate() {
            let mut block = [x[0].as_ptr(); R];
            let mut dots = [_mm256_setzero_si256(); R];
            for r in 0..R {
                block[r] = x[r].as_ptr().add(b);
                if !layout.is_halves() {
                    dots[r] = _mm256_set1_epi32(blocks::start(layout, Avx2::BIASED, &*block[r]));
                }
            }
            run.asking.turn(header.as_ptr(), layout.record());
            // A whole block's number of turns is known, so that they are written out.
            dots = match (layout.is_halves(), weights.len()) {
                (true, n) if n == QUADS / 2 => add_dots::<LAYOUT, R>(dots, i, &weights[..QUADS / 2], block),
                (false, QUADS) => add_dots::<LAYOUT, R>(dots, i, &weights[..QUADS], block),
                _ => add_dots::<LAYOUT, R>(dots, i, weights, block),
            };
            let scales = _mm256_cvtph_ps(_mm_loadu_si128(header[0].as_ptr().cast::<__m128i>().add(i)));
            for r in 0..R {
                if layout.is_halves() {
                    dots[r] = whole(blocks::start(layout, Avx2::BIASED, &*block[r]), dots[r]);
                }
                let scales = _mm256_mul_ps(scales, _mm256_set1_ps((*block[r]).scale));
                sums[r][0] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots[r]), scales, sums[r][0]);
            }
            if layout.has_minimums() {
                let minimums = _mm256_cvtph_ps(_mm_loadu_si128(header[1].as_ptr().cast::<__m128i>().add(i)));
                for r in 0..R {
                    sums[r][0] = _mm256_fmadd_ps(minimums, _mm256_set1_ps((*block[r]).sum), sums[r][0]);
                }
            }
        }
        store_sums(sums, lanes, 8 * i);
    }
}

/// # Safety
/// Inlined into code compiled for AVX2; `x` points to a block for each row.
#[inline(always)]
pub(super) unsafe fn add_dots<const LAYOUT: usize, const R: usize>(
    mut dots: [__m256i; R],
    i: usize,
    weights: &[[u8; QUAD_BYTES]],
    x: [*const QuantBlock; R],
) -> [__m256i; R] {
    let layout = const { Layout::ALL[LAYOUT] };
    // SAFETY: by contract.
    unsafe {
        for (k, weights) in weights.iter().enumerate() {
            let bytes = _mm256_loadu_si256(weights.as_ptr().cast::<__m256i>().add(i));
            if layout.is_halves() {
                let quants = split(bytes);
                for r in 0..R {
                    let x = (*x[r]).quads();
                    dots[r] = add_halves(dots[r], quants, [splat(x[2 * k]), splat(x[2 * k + 1])]);
                }
            } else {
                let quants = sized(bytes);
                for r in 0..R {
                    dots[r] = add_bytes(dots[r], quants, splat((*x[r]).quads()[k]));
                }
            }
        }
    }
    dots
}

#[inline(always)]
pub(super) fn splat(x: [i8; QUAD]) -> __m256i {
    // SAFETY: inlined into code compiled for AVX2.
    unsafe { _mm256_set1_epi32(i32::from_le_bytes([x[0] as u8, x[1] as u8, x[2] as u8, x[3] as u8])) }
}

/// The quants that bytes stand for, and their sizes.
///
/// # Safety
/// Inlined into code compiled for AVX2.
#[inline(always)]
pub(super) unsafe fn sized(bytes: __m256i) -> (__m256i, __m256i) {
    // SAFETY: by contract.
    unsafe {
        let quants = _mm256_xor_si256(bytes, _mm256_set1_epi8(-128));
        (quants, _mm256_abs_epi8(quants))
    }
}

/// Adds the products of quants with four inputs each: the quant's size as the unsigned factor and `x` with the quant's sign
/// as the other. `2 * 128 * 127` fits into 16 bits, and `x` is never -128, whose sign cannot be turned round.
///
/// # Safety
/// Inlined into code compiled for AVX2.
#[inline(always)]
pub(super) unsafe fn add_bytes(sum: __m256i, (quants, sizes): (__m256i, __m256i), x: __m256i) -> __m256i {
    // SAFETY: by contract.
    unsafe {
        let products = _mm256_maddubs_epi16(sizes, _mm256_sign_epi8(x, quants));
        _mm256_add_epi32(sum, _mm256_madd_epi16(products, _mm256_set1_epi16(1)))
    }
}

/// The lower and upper halves of bytes.
///
/// # Safety
/// Inlined into code compiled for AVX2.
#[inline(always)]
pub(super) unsafe fn split(both: __m256i) -> [__m256i; 2] {
    // SAFETY: by contract.
    unsafe {
        let mask = _mm256_set1_epi8(15);
        [_mm256_and_si256(both, mask), _mm256_and_si256(_mm256_srli_epi16::<4>(both), mask)]
    }
}

/// Adds both halves' products, two and two, in 16 bits. All of a block's fit: `16 * 15 * 127 < 32768`.
///
/// # Safety
/// Inlined into code compiled for AVX2.
#[inline(always)]
pub(super) unsafe fn add_halves(sum: __m256i, quants: [__m256i; 2], x: [__m256i; 2]) -> __m256i {
    // SAFETY: by contract.
    unsafe {
        let sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(quants[0], x[0]));
        _mm256_add_epi16(sum, _mm256_maddubs_epi16(quants[1], x[1]))
    }
}

/// A block's sum from 16 bits, see [`add_halves`].
///
/// # Safety
/// Inlined into code compiled for AVX2.
#[inline(always)]
pub(super) unsafe fn whole(start: i32, sum: __m256i) -> __m256i {
    // SAFETY: by contract.
    unsafe { _mm256_add_epi32(_mm256_set1_epi32(start), _mm256_madd_epi16(sum, _mm256_set1_epi16(1))) }
}
