//! AVX-512 with VNNI: two registers of 512 bits. Written out, not with `array::map` and its like, see `avx2`.
#![allow(unsafe_code)]

use super::{PANEL, Pair, QUAD, QUAD_BYTES, QUADS, Vector};
use half::{bf16, f16};
use std::arch::x86_64::*;

/// `DOT`: with AVX512-BF16's dot product. Its sums round a little differently from two multiplications.
#[derive(Clone, Copy)]
pub(in super::super) struct Avx512<const DOT: bool>([__m512; 2]);

impl<const DOT: bool> Vector for Avx512<DOT> {
    type Ints = [__m512i; 2];

    // Twelve rows of two accumulators; two weights and a broadcast leave room in 32 registers.
    const ROWS: usize = 12;
    // Six rows of four; two weights, two scales and a broadcast beside them.
    const BYTES_ROWS: usize = 8;
    const HALVES_ROWS: usize = 8;
    const BIASED: bool = true;

    #[inline(always)]
    fn zero() -> Self {
        // SAFETY: inlined into code compiled for AVX-512 (F, BW, VNNI, and BF16 where `DOT`), run only where these were
        // detected; so for all of this impl.
        unsafe { Self([_mm512_setzero_ps(); 2]) }
    }

    #[inline(always)]
    fn load(from: &[f32; PANEL]) -> Self {
        let at = from.as_ptr();
        // SAFETY: 32 floats lie there.
        unsafe { Self([_mm512_loadu_ps(at), _mm512_loadu_ps(at.add(16))]) }
    }

    #[inline(always)]
    fn load_f16(from: &[f16; PANEL]) -> Self {
        let at = from.as_ptr().cast::<__m256i>();
        // SAFETY: 32 16-bit numbers lie there.
        unsafe {
            Self([_mm512_cvtph_ps(_mm256_loadu_si256(at)), _mm512_cvtph_ps(_mm256_loadu_si256(at.add(1)))])
        }
    }

    #[inline(always)]
    fn store(self, to: &mut [f32; PANEL]) {
        let at = to.as_mut_ptr();
        // SAFETY: room for 32 floats.
        unsafe {
            _mm512_storeu_ps(at, self.0[0]);
            _mm512_storeu_ps(at.add(16), self.0[1]);
        }
    }

    #[inline(always)]
    fn splat(x: f32) -> Self {
        // SAFETY: see `zero`.
        unsafe { Self([_mm512_set1_ps(x); 2]) }
    }

    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        // SAFETY: see `zero`.
        unsafe { Self([_mm512_mul_ps(self.0[0], other.0[0]), _mm512_mul_ps(self.0[1], other.0[1])]) }
    }

    #[inline(always)]
    fn add_product(self, a: Self, b: Self) -> Self {
        // SAFETY: see `zero`.
        unsafe {
            Self([_mm512_fmadd_ps(a.0[0], b.0[0], self.0[0]), _mm512_fmadd_ps(a.0[1], b.0[1], self.0[1])])
        }
    }

    #[inline(always)]
    fn load_pairs(from: &[[bf16; 2]; PANEL]) -> [Self; 2] {
        // SAFETY: see `zero`.
        unsafe {
            let (w, upper) =
                (load(from.as_flattened().as_ptr().cast()), _mm512_set1_epi32(0xffff_0000_u32 as i32));
            let firsts = [_mm512_slli_epi32::<16>(w[0]), _mm512_slli_epi32::<16>(w[1])];
            let seconds = [_mm512_and_si512(w[0], upper), _mm512_and_si512(w[1], upper)];
            [
                Self([_mm512_castsi512_ps(firsts[0]), _mm512_castsi512_ps(firsts[1])]),
                Self([_mm512_castsi512_ps(seconds[0]), _mm512_castsi512_ps(seconds[1])]),
            ]
        }
    }

    #[inline(always)]
    fn add_dot(self, x: Pair, w: &[[bf16; 2]; PANEL]) -> Self {
        if !DOT {
            let ([first, second], w) = (super::both(x), Self::load_pairs(w));
            return self.add_product(Self::splat(first), w[0]).add_product(Self::splat(second), w[1]);
        }
        // SAFETY: see `zero`.
        unsafe {
            let w = load(w.as_flattened().as_ptr().cast());
            let x: __m512bh = std::mem::transmute(_mm512_set1_epi32(x as i32));
            let w = [
                std::mem::transmute::<__m512i, __m512bh>(w[0]),
                std::mem::transmute::<__m512i, __m512bh>(w[1]),
            ];
            Self([_mm512_dpbf16_ps(self.0[0], x, w[0]), _mm512_dpbf16_ps(self.0[1], x, w[1])])
        }
    }

    #[inline(always)]
    fn gather(x: &[f32], places: &[u32; PANEL]) -> [f32; PANEL] {
        let mut gathered = [0.0f32; PANEL];
        // Places are read as signed numbers, of four bytes each.
        let Ok(length) = i32::try_from(x.len()) else { return super::gather(x, places) };
        for (to, places) in gathered.as_chunks_mut::<16>().0.iter_mut().zip(places.as_chunks::<16>().0) {
            // SAFETY: as in `zero`; only places within `x` are read, as the mask says.
            unsafe {
                let places = _mm512_loadu_si512(places.as_ptr().cast());
                let within = _mm512_cmplt_epu32_mask(places, _mm512_set1_epi32(length));
                let none = _mm512_setzero_ps();
                let numbers = _mm512_mask_i32gather_ps::<4>(none, within, places, x.as_ptr().cast());
                _mm512_storeu_ps(to.as_mut_ptr(), numbers);
            }
        }
        gathered
    }

    #[inline(always)]
    fn largest(x: &[f32; PANEL]) -> f32 {
        // As integers, sizes of floats are ordered alike, and NaN above all.
        // SAFETY: see `zero`; 32 floats lie there.
        unsafe {
            let [first, second] = load(x.as_ptr().cast());
            let size = _mm512_set1_epi32(i32::MAX);
            let sizes = _mm512_max_epi32(_mm512_and_si512(first, size), _mm512_and_si512(second, size));
            f32::from_bits(_mm512_reduce_max_epi32(sizes) as u32)
        }
    }

    #[inline(always)]
    fn quants(x: &[f32; PANEL], inverse: f32) -> ([i8; PANEL], i32) {
        // SAFETY: see `zero`; the loads and stores lie within the arrays.
        unsafe {
            let (x, inverse) = (Self::load(x), _mm512_set1_ps(inverse));
            let first = _mm512_cvtps_epi32(_mm512_mul_ps(x.0[0], inverse));
            let second = _mm512_cvtps_epi32(_mm512_mul_ps(x.0[1], inverse));
            let mut quants = [0i8; PANEL];
            let to = quants.as_mut_ptr().cast::<__m128i>();
            _mm_storeu_si128(to, _mm512_cvtsepi32_epi8(first));
            _mm_storeu_si128(to.add(1), _mm512_cvtsepi32_epi8(second));
            (quants, _mm512_reduce_add_epi32(_mm512_add_epi32(first, second)))
        }
    }

    #[inline(always)]
    fn to_f32(ints: Self::Ints) -> Self {
        // SAFETY: see `zero`.
        unsafe { Self([_mm512_cvtepi32_ps(ints[0]), _mm512_cvtepi32_ps(ints[1])]) }
    }

    #[inline(always)]
    fn dot_bytes<const R: usize>(
        start: [i32; R],
        weights: &[[u8; QUAD_BYTES]],
        x: [&[[i8; QUAD]; QUADS]; R],
    ) -> [Self::Ints; R] {
        let mut sums = starting(start);
        for (quad, weights) in weights.iter().take(QUADS).enumerate() {
            // SAFETY: a quad is 128 bytes.
            let weights = unsafe { load(weights.as_ptr()) };
            for r in 0..R {
                sums[r] = add_quad(sums[r], weights, x[r][quad]);
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
        let mut sums = starting(start);
        for (pair, weights) in weights.iter().take(QUADS / 2).enumerate() {
            // SAFETY: two quads in halves are 128 bytes.
            let both = unsafe { load(weights.as_ptr()) };
            // SAFETY: see `zero`.
            let (lower, upper) = unsafe {
                let mask = _mm512_set1_epi8(15);
                let shifted = [_mm512_srli_epi16::<4>(both[0]), _mm512_srli_epi16::<4>(both[1])];
                let lower = [_mm512_and_si512(both[0], mask), _mm512_and_si512(both[1], mask)];
                (lower, [_mm512_and_si512(shifted[0], mask), _mm512_and_si512(shifted[1], mask)])
            };
            for r in 0..R {
                sums[r] = add_quad(sums[r], lower, x[r][2 * pair]);
                sums[r] = add_quad(sums[r], upper, x[r][2 * pair + 1]);
            }
        }
        sums
    }
}

/// Each row's sums where they begin.
#[inline(always)]
fn starting<const R: usize>(start: [i32; R]) -> [[__m512i; 2]; R] {
    // SAFETY: inlined into code compiled for AVX-512.
    unsafe {
        let mut sums = [[_mm512_setzero_si512(); 2]; R];
        for r in 0..R {
            sums[r] = [_mm512_set1_epi32(start[r]); 2];
        }
        sums
    }
}

/// 128 bytes.
///
/// # Safety
/// They lie there.
#[inline(always)]
unsafe fn load(from: *const u8) -> [__m512i; 2] {
    let at = from.cast::<__m512i>();
    // SAFETY: by contract; inlined into code compiled for AVX-512.
    unsafe { [_mm512_loadu_si512(at), _mm512_loadu_si512(at.add(1))] }
}

#[inline(always)]
fn add_quad(sums: [__m512i; 2], weights: [__m512i; 2], x: [i8; QUAD]) -> [__m512i; 2] {
    let x = i32::from_le_bytes([x[0] as u8, x[1] as u8, x[2] as u8, x[3] as u8]);
    // SAFETY: inlined into code compiled for AVX-512 with VNNI.
    unsafe {
        let x = _mm512_set1_epi32(x);
        [_mm512_dpbusd_epi32(sums[0], weights[0], x), _mm512_dpbusd_epi32(sums[1], weights[1], x)]
    }
}
