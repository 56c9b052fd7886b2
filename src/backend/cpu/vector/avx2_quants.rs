//! Inputs to 8-bit quants, with AVX2. Written out because what the compiler makes of plain loops goes number by number:
//! 0.67 ns for each on Zen 3 instead of 0.34.
#![allow(unsafe_code)]

use super::PANEL;
use std::arch::x86_64::*;

/// [`Vector::largest`](super::Vector::largest).
///
/// # Safety
/// Inlined into code compiled for AVX2; so below.
#[inline(always)]
pub(super) unsafe fn largest(x: &[f32; PANEL]) -> f32 {
    // SAFETY: by contract; the loads lie within the array.
    unsafe {
        let at = x.as_ptr().cast::<__m256i>();
        let mut sizes = [_mm256_setzero_si256(); 4];
        for (i, size) in sizes.iter_mut().enumerate() {
            *size = _mm256_and_si256(_mm256_loadu_si256(at.add(i)), _mm256_set1_epi32(i32::MAX));
        }
        let [a, b, c, d] = sizes;
        let eight = _mm256_max_epi32(_mm256_max_epi32(a, b), _mm256_max_epi32(c, d));
        let four = _mm_max_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256::<1>(eight));
        let two = _mm_max_epi32(four, _mm_shuffle_epi32::<0b01_00_11_10>(four));
        let one = _mm_max_epi32(two, _mm_shuffle_epi32::<0b10_11_00_01>(two));
        f32::from_bits(_mm_cvtsi128_si32(one) as u32)
    }
}

/// [`Vector::quants`](super::Vector::quants).
///
/// # Safety
/// As [`largest`].
#[inline(always)]
pub(super) unsafe fn quants(x: &[f32; PANEL], inverse: f32) -> ([i8; PANEL], i32) {
    // SAFETY: by contract; the loads and the store lie within the arrays.
    unsafe {
        let inverse = _mm256_set1_ps(inverse);
        let mut ints = [_mm256_setzero_si256(); 4];
        for (i, ints) in ints.iter_mut().enumerate() {
            *ints = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x.as_ptr().add(8 * i)), inverse));
        }
        let [a, b, c, d] = ints;
        let eight = _mm256_add_epi32(_mm256_add_epi32(a, b), _mm256_add_epi32(c, d));
        let four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256::<1>(eight));
        let two = _mm_add_epi32(four, _mm_shuffle_epi32::<0b01_00_11_10>(four));
        let sum = _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32::<0b10_11_00_01>(two)));
        // Packing goes by halves of registers: fours of numbers end in the order 0, 2, 4, 6, 1, 3, 5, 7.
        let bytes = _mm256_packs_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
        let bytes = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
        let mut quants = [0i8; PANEL];
        _mm256_storeu_si256(quants.as_mut_ptr().cast(), bytes);
        (quants, sum)
    }
}
