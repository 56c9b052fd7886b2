//! Sixteen outputs of quantised weights times some rows, and the integer products that all AVX2 kernels share.
#![allow(unsafe_code)]

use super::super::inputs::QuantBlock;
use super::super::matrix::Layout;
use super::avx2::Avx2;
use super::{BlockRun, Lanes, QUAD, QUAD_BYTES, Vector, blocks};
use std::arch::x86_64::*;

/// The outputs of registers `2 pair` and `2 pair + 1`: eight integer accumulators for four rows, and room for two weights.
/// The float accumulators stay in the first-level cache, where each is wanted once a block.
///
/// # Safety
/// Inlined into code compiled for AVX2. There are as many blocks of inputs as of weights.
#[inline(always)]
pub(super) unsafe fn add_blocks_to_sixteen<const LAYOUT: usize, const R: usize>(
    lanes: &mut [Lanes; R],
    pair: usize,
    run: BlockRun<'_>,
    x: [&[QuantBlock]; R],
) {
    let layout = const { Layout::ALL[LAYOUT] };
    // SAFETY: by contract.
    unsafe {
        for (b, (header, weights)) in run.blocks(layout).enumerate() {
            run.asking.turn(header.as_ptr(), layout.header() + size_of_val(weights), layout.record());
            let mut block = [x[0].as_ptr(); R];
            for r in 0..R {
                block[r] = x[r].as_ptr().add(b);
            }
            let dots = block_dots::<LAYOUT, R>(pair, weights, block);
            for i in 0..2 {
                let at = 2 * pair + i;
                let scales = _mm256_cvtph_ps(_mm_loadu_si128(header[0].as_ptr().cast::<__m128i>().add(at)));
                for r in 0..R {
                    let sum = lanes[r].as_mut_ptr().add(8 * at);
                    let scales = _mm256_mul_ps(scales, _mm256_set1_ps((*block[r]).scale));
                    let dots = _mm256_cvtepi32_ps(dots[r][i]);
                    _mm256_storeu_ps(sum, _mm256_fmadd_ps(dots, scales, _mm256_loadu_ps(sum)));
                }
                if layout.has_minimums() {
                    let minimums = header[1].as_ptr().cast::<__m128i>().add(at);
                    let mut minimums = _mm256_cvtph_ps(_mm_loadu_si128(minimums));
                    if layout.counts_in_scales() {
                        minimums = _mm256_mul_ps(minimums, scales);
                    }
                    for r in 0..R {
                        let sum = lanes[r].as_mut_ptr().add(8 * at);
                        let x = _mm256_set1_ps((*block[r]).sum);
                        _mm256_storeu_ps(sum, _mm256_fmadd_ps(minimums, x, _mm256_loadu_ps(sum)));
                    }
                }
            }
        }
    }
}

/// The integer sums of one block. The loop's length is kept from the compiler, so that it is not written out: all weights
/// would then be unpacked before the first is used, and registers run out (4-bit weights in the first-level cache, Zen 3:
/// 140 instead of 190 GOP/s; in whole products there is 2 % between the two).
///
/// # Safety
/// Inlined into code compiled for AVX2; `x` points to a block for each row.
#[inline(always)]
unsafe fn block_dots<const LAYOUT: usize, const R: usize>(
    pair: usize,
    weights: &[[u8; QUAD_BYTES]],
    x: [*const QuantBlock; R],
) -> [[__m256i; 2]; R] {
    let layout = const { Layout::ALL[LAYOUT] };
    // SAFETY: by contract.
    unsafe {
        let mut dots = [[_mm256_setzero_si256(); 2]; R];
        if !layout.is_halves() {
            for r in 0..R {
                dots[r] = [_mm256_set1_epi32(blocks::start(layout, Avx2::BIASED, &*x[r])); 2];
            }
        }
        for k in 0..unknown(weights.len()) {
            let at = weights.get_unchecked(k).as_ptr().cast::<__m256i>().add(2 * pair);
            let bytes = [_mm256_loadu_si256(at), _mm256_loadu_si256(at.add(1))];
            if layout.is_halves() {
                let (first, second) = (split(bytes[0]), split(bytes[1]));
                for half in 0..2 {
                    for r in 0..R {
                        let x = splat((*x[r]).quads()[2 * k + half]);
                        dots[r][0] = add_halves(dots[r][0], first[half], x);
                        dots[r][1] = add_halves(dots[r][1], second[half], x);
                    }
                }
            } else {
                for r in 0..R {
                    let x = splat((*x[r]).quads()[k]);
                    dots[r][0] = add_bytes(dots[r][0], bytes[0], x);
                    dots[r][1] = add_bytes(dots[r][1], bytes[1], x);
                }
            }
        }
        if layout.is_halves() {
            for r in 0..R {
                let start = blocks::start(layout, Avx2::BIASED, &*x[r]);
                dots[r] = [whole(start, dots[r][0]), whole(start, dots[r][1])];
            }
        }
        dots
    }
}

/// `n`, in a way that the compiler knows nothing of it.
#[inline(always)]
fn unknown(mut n: usize) -> usize {
    // SAFETY: no instruction at all.
    unsafe { std::arch::asm!("/* {0} */", inout(reg) n, options(pure, nomem, nostack, preserves_flags)) };
    n
}

#[inline(always)]
pub(super) fn splat(x: [i8; QUAD]) -> __m256i {
    // SAFETY: inlined into code compiled for AVX2.
    unsafe { _mm256_set1_epi32(i32::from_le_bytes([x[0] as u8, x[1] as u8, x[2] as u8, x[3] as u8])) }
}

/// Adds the products of bytes with four inputs each. Two of them fit into 16 bits, `2 * 255 * 63 < 32768`, because the
/// inputs have seven bits here ([`Vector::LARGEST`]).
///
/// # Safety
/// Inlined into code compiled for AVX2.
#[inline(always)]
pub(super) unsafe fn add_bytes(sum: __m256i, bytes: __m256i, x: __m256i) -> __m256i {
    // SAFETY: by contract.
    unsafe { _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(bytes, x), _mm256_set1_epi16(1))) }
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

/// Adds the products of one half of bytes, two and two, in 16 bits. All of a block's fit: `16 * 15 * 127 < 32768`.
///
/// # Safety
/// Inlined into code compiled for AVX2.
#[inline(always)]
pub(super) unsafe fn add_halves(sum: __m256i, quants: __m256i, x: __m256i) -> __m256i {
    // SAFETY: by contract.
    unsafe { _mm256_add_epi16(sum, _mm256_maddubs_epi16(quants, x)) }
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
