//! Thirty-two f32 lanes in the registers of one instruction set.
//!
//! Only the kernels' inner loops use these; everything here is inlined into a function that has been compiled for the
//! instruction set, which is what makes the calls sound.
#![allow(unsafe_code)]

use super::matrix::PANEL;
use half::bf16;

/// The outputs of one panel, in registers.
pub(super) trait Vector: Copy {
    /// Rows that fit into the registers together.
    const ROWS: usize;
    fn zero() -> Self;
    fn load(from: &[f32; PANEL]) -> Self;
    fn load_bf16(from: &[bf16; PANEL]) -> Self;
    fn load_i8(from: &[i8; PANEL]) -> Self;
    fn store(self, to: &mut [f32; PANEL]);
    fn splat(x: f32) -> Self;
    /// `self + a b`
    fn add_product(self, a: Self, b: Self) -> Self;
}

/// Plain arithmetic, for processors without the instructions below.
#[derive(Clone, Copy)]
pub(super) struct Portable([f32; PANEL]);

impl Vector for Portable {
    const ROWS: usize = 1;

    #[inline(always)]
    fn zero() -> Self {
        Self([0.0; PANEL])
    }

    #[inline(always)]
    fn load(from: &[f32; PANEL]) -> Self {
        Self(*from)
    }

    #[inline(always)]
    fn load_bf16(from: &[bf16; PANEL]) -> Self {
        Self(from.map(bf16::to_f32))
    }

    #[inline(always)]
    fn load_i8(from: &[i8; PANEL]) -> Self {
        Self(from.map(f32::from))
    }

    #[inline(always)]
    fn store(self, to: &mut [f32; PANEL]) {
        *to = self.0;
    }

    #[inline(always)]
    fn splat(x: f32) -> Self {
        Self([x; PANEL])
    }

    #[inline(always)]
    fn add_product(self, a: Self, b: Self) -> Self {
        Self(std::array::from_fn(|lane| self.0[lane] + a.0[lane] * b.0[lane]))
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) use x86::{Avx2, Avx512};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{PANEL, Vector, bf16};
    use std::arch::x86_64::*;

    /// Two registers of 512 bits.
    #[derive(Clone, Copy)]
    pub(in super::super) struct Avx512([__m512; 2]);

    impl Vector for Avx512 {
        // Eight rows of two accumulators; two weights and a broadcast leave room in 32 registers.
        const ROWS: usize = 8;

        #[inline(always)]
        fn zero() -> Self {
            // SAFETY: inlined into code compiled for AVX-512F, run only where it was detected; so for all of this impl.
            unsafe { Self([_mm512_setzero_ps(); 2]) }
        }

        #[inline(always)]
        fn load(from: &[f32; PANEL]) -> Self {
            let at = from.as_ptr();
            // SAFETY: 32 floats lie there.
            unsafe { Self([_mm512_loadu_ps(at), _mm512_loadu_ps(at.add(16))]) }
        }

        #[inline(always)]
        fn load_bf16(from: &[bf16; PANEL]) -> Self {
            let at = from.as_ptr().cast::<__m256i>();
            // SAFETY: 32 16-bit numbers lie there; a bf16 is the upper half of an f32.
            unsafe {
                let widen = |half| _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(half)));
                Self([widen(_mm256_loadu_si256(at)), widen(_mm256_loadu_si256(at.add(1)))])
            }
        }

        #[inline(always)]
        fn load_i8(from: &[i8; PANEL]) -> Self {
            let at = from.as_ptr().cast::<__m128i>();
            // SAFETY: 32 bytes lie there.
            unsafe {
                let widen = |quarter| _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(quarter));
                Self([widen(_mm_loadu_si128(at)), widen(_mm_loadu_si128(at.add(1)))])
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
        fn add_product(self, a: Self, b: Self) -> Self {
            // SAFETY: see `zero`.
            unsafe {
                Self([_mm512_fmadd_ps(a.0[0], b.0[0], self.0[0]), _mm512_fmadd_ps(a.0[1], b.0[1], self.0[1])])
            }
        }
    }

    /// Four registers of 256 bits.
    #[derive(Clone, Copy)]
    pub(in super::super) struct Avx2([__m256; 4]);

    impl Vector for Avx2 {
        // Two rows of four accumulators; four weights and a broadcast leave room in 16 registers.
        const ROWS: usize = 2;

        #[inline(always)]
        fn zero() -> Self {
            // SAFETY: inlined into code compiled for AVX2 and FMA, run only where they were detected; so for all of this
            // impl.
            unsafe { Self([_mm256_setzero_ps(); 4]) }
        }

        #[inline(always)]
        fn load(from: &[f32; PANEL]) -> Self {
            // SAFETY: 32 floats lie there.
            Self(std::array::from_fn(|i| unsafe { _mm256_loadu_ps(from.as_ptr().add(8 * i)) }))
        }

        #[inline(always)]
        fn load_bf16(from: &[bf16; PANEL]) -> Self {
            let at = from.as_ptr().cast::<__m128i>();
            // SAFETY: 32 16-bit numbers lie there; a bf16 is the upper half of an f32.
            Self(std::array::from_fn(|i| unsafe {
                let half = _mm_loadu_si128(at.add(i));
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(half)))
            }))
        }

        #[inline(always)]
        fn load_i8(from: &[i8; PANEL]) -> Self {
            // SAFETY: 32 bytes lie there, eight are loaded at a time.
            Self(std::array::from_fn(|i| unsafe {
                let bytes = _mm_loadl_epi64(from.as_ptr().add(8 * i).cast());
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes))
            }))
        }

        #[inline(always)]
        fn store(self, to: &mut [f32; PANEL]) {
            for (i, lanes) in self.0.into_iter().enumerate() {
                // SAFETY: room for 32 floats.
                unsafe { _mm256_storeu_ps(to.as_mut_ptr().add(8 * i), lanes) };
            }
        }

        #[inline(always)]
        fn splat(x: f32) -> Self {
            // SAFETY: see `zero`.
            unsafe { Self([_mm256_set1_ps(x); 4]) }
        }

        #[inline(always)]
        fn add_product(self, a: Self, b: Self) -> Self {
            // SAFETY: see `zero`.
            Self(std::array::from_fn(|i| unsafe { _mm256_fmadd_ps(a.0[i], b.0[i], self.0[i]) }))
        }
    }
}
