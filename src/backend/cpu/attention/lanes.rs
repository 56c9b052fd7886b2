//! Some f32 lanes in two registers of one instruction set, with what attention does to them.
//!
//! Unlike a panel of weights, a tile is read in parts that leave registers for many rows, and a softmax needs more than
//! products. Everything here is inlined into a function that has been compiled for the instruction set, which is what
//! makes the calls sound.
#![allow(unsafe_code)]

use super::TILE;

/// Half a tile.
pub(super) const HALF: usize = TILE / 2;

pub(super) trait Lanes: Copy {
    /// Parts of a tile, as many lanes each.
    const PARTS: usize;
    /// Rows whose accumulators fit into the registers together, for one part.
    const ROWS: usize;
    fn splat(x: f32) -> Self;
    fn load(from: &[f32; TILE], part: usize) -> Self;
    fn store(self, to: &mut [f32; TILE], part: usize);
    /// As [`Self::load`], of a tile in two halves.
    fn load_halves(from: [&[f32; HALF]; 2], part: usize) -> Self;
    /// The same of numbers in bf16.
    fn widen_halves(from: [&[u16; HALF]; 2], part: usize) -> Self;
    fn add(self, other: Self) -> Self;
    fn mul(self, other: Self) -> Self;
    /// The larger of the two in each lane; `other` where `self` is not a number.
    fn max(self, other: Self) -> Self;
    /// `self + a b`
    fn add_product(self, a: Self, b: Self) -> Self;
    /// `2^n` from the bits of `1.5 * 2^23 + n`.
    fn power(self) -> Self;
}

/// `e^x` for `x <= 0` to within 2 units in the last place: as `rows::exp`, in registers. What is below -87 counts as -87.
#[inline(always)]
pub(super) fn exp<L: Lanes>(x: L) -> L {
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    // Adding and taking away 1.5 * 2^23 rounds to a whole number.
    const ROUND: f32 = 12_582_912.0;
    const POLYNOMIAL: [f32; 5] = [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5];
    let x = x.max(L::splat(-87.0));
    let rounded = L::splat(ROUND).add_product(x, L::splat(std::f32::consts::LOG2_E));
    let n = rounded.add(L::splat(-ROUND));
    let r = x.add_product(n, L::splat(-LN2_HIGH)).add_product(n, L::splat(-LN2_LOW));
    let mut p = L::splat(1.987_569_1e-4);
    for coefficient in POLYNOMIAL {
        p = L::splat(coefficient).add_product(p, r);
    }
    r.add(L::splat(1.0)).add_product(p.mul(r), r).mul(rounded.power())
}

/// Plain arithmetic, for processors without the instructions below.
#[derive(Clone, Copy)]
pub(super) struct Portable([f32; TILE / 4]);

impl Portable {
    #[inline(always)]
    fn each(mut self, other: Self, combine: impl Fn(f32, f32) -> f32) -> Self {
        for (x, y) in self.0.iter_mut().zip(other.0) {
            *x = combine(*x, y);
        }
        self
    }
}

impl Lanes for Portable {
    const PARTS: usize = 4;
    const ROWS: usize = 4;

    #[inline(always)]
    fn splat(x: f32) -> Self {
        Self([x; TILE / 4])
    }

    #[inline(always)]
    fn load(from: &[f32; TILE], part: usize) -> Self {
        let mut lanes = Self::splat(0.0);
        lanes.0.copy_from_slice(&from.as_chunks::<{ TILE / 4 }>().0[part]);
        lanes
    }

    #[inline(always)]
    fn store(self, to: &mut [f32; TILE], part: usize) {
        to.as_chunks_mut::<{ TILE / 4 }>().0[part] = self.0;
    }

    #[inline(always)]
    fn load_halves(from: [&[f32; HALF]; 2], part: usize) -> Self {
        let mut lanes = Self::splat(0.0);
        lanes.0.copy_from_slice(&from[part / 2].as_chunks::<{ TILE / 4 }>().0[part % 2]);
        lanes
    }

    #[inline(always)]
    fn widen_halves(from: [&[u16; HALF]; 2], part: usize) -> Self {
        Self(
            from[part / 2].as_chunks::<{ TILE / 4 }>().0[part % 2]
                .map(|x| f32::from_bits(u32::from(x) << 16)),
        )
    }

    #[inline(always)]
    fn add(self, other: Self) -> Self {
        self.each(other, |x, y| x + y)
    }

    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        self.each(other, |x, y| x * y)
    }

    #[inline(always)]
    fn max(self, other: Self) -> Self {
        self.each(other, |x, y| if x > y { x } else { y })
    }

    #[inline(always)]
    fn add_product(self, a: Self, b: Self) -> Self {
        self.add(a.mul(b))
    }

    #[inline(always)]
    fn power(self) -> Self {
        self.each(self, |x, _| f32::from_bits((x.to_bits() << 23).wrapping_add(1.0f32.to_bits())))
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) use x86::{Avx2, Avx512};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{HALF, Lanes, TILE};
    use std::arch::x86_64::*;

    /// Two registers of 512 bits: a whole tile.
    #[derive(Clone, Copy)]
    pub(in super::super) struct Avx512(__m512, __m512);

    impl Lanes for Avx512 {
        const PARTS: usize = 1;
        // Twelve rows of two accumulators, two registers of the tile and a broadcast, of 32.
        const ROWS: usize = 12;

        #[inline(always)]
        fn splat(x: f32) -> Self {
            // SAFETY: inlined into code compiled for AVX-512F, run only where it was detected; so for all of this impl.
            let x = unsafe { _mm512_set1_ps(x) };
            Self(x, x)
        }

        #[inline(always)]
        fn load(from: &[f32; TILE], _: usize) -> Self {
            // SAFETY: 32 floats lie there.
            unsafe { Self(_mm512_loadu_ps(from.as_ptr()), _mm512_loadu_ps(from.as_ptr().add(16))) }
        }

        #[inline(always)]
        fn store(self, to: &mut [f32; TILE], _: usize) {
            // SAFETY: room for 32 floats.
            unsafe {
                _mm512_storeu_ps(to.as_mut_ptr(), self.0);
                _mm512_storeu_ps(to.as_mut_ptr().add(16), self.1);
            }
        }

        #[inline(always)]
        fn load_halves(from: [&[f32; HALF]; 2], _: usize) -> Self {
            // SAFETY: 16 floats lie in each.
            unsafe { Self(_mm512_loadu_ps(from[0].as_ptr()), _mm512_loadu_ps(from[1].as_ptr())) }
        }

        #[inline(always)]
        fn widen_halves(from: [&[u16; HALF]; 2], _: usize) -> Self {
            // SAFETY: 16 numbers of 16 bits lie in each.
            unsafe {
                let bits = [
                    _mm512_cvtepu16_epi32(_mm256_loadu_si256(from[0].as_ptr().cast())),
                    _mm512_cvtepu16_epi32(_mm256_loadu_si256(from[1].as_ptr().cast())),
                ];
                Self(
                    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits[0])),
                    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits[1])),
                )
            }
        }

        #[inline(always)]
        fn add(self, other: Self) -> Self {
            // SAFETY: see `splat`.
            unsafe { Self(_mm512_add_ps(self.0, other.0), _mm512_add_ps(self.1, other.1)) }
        }

        #[inline(always)]
        fn mul(self, other: Self) -> Self {
            // SAFETY: see `splat`.
            unsafe { Self(_mm512_mul_ps(self.0, other.0), _mm512_mul_ps(self.1, other.1)) }
        }

        #[inline(always)]
        fn max(self, other: Self) -> Self {
            // SAFETY: see `splat`.
            unsafe { Self(_mm512_max_ps(self.0, other.0), _mm512_max_ps(self.1, other.1)) }
        }

        #[inline(always)]
        fn add_product(self, a: Self, b: Self) -> Self {
            // SAFETY: see `splat`.
            unsafe { Self(_mm512_fmadd_ps(a.0, b.0, self.0), _mm512_fmadd_ps(a.1, b.1, self.1)) }
        }

        #[inline(always)]
        fn power(self) -> Self {
            // SAFETY: see `splat`.
            unsafe {
                let one = _mm512_castps_si512(_mm512_set1_ps(1.0));
                let power = |x| {
                    let n = _mm512_slli_epi32::<23>(_mm512_castps_si512(x));
                    _mm512_castsi512_ps(_mm512_add_epi32(n, one))
                };
                Self(power(self.0), power(self.1))
            }
        }
    }

    /// Two registers of 256 bits: half a tile.
    #[derive(Clone, Copy)]
    pub(in super::super) struct Avx2(__m256, __m256);

    impl Lanes for Avx2 {
        const PARTS: usize = 2;
        // Six rows of two accumulators, two registers of the tile and a broadcast, of 16.
        const ROWS: usize = 6;

        #[inline(always)]
        fn splat(x: f32) -> Self {
            // SAFETY: inlined into code compiled for AVX2 and FMA, run only where they were detected; so for all of this
            // impl.
            let x = unsafe { _mm256_set1_ps(x) };
            Self(x, x)
        }

        #[inline(always)]
        fn load(from: &[f32; TILE], part: usize) -> Self {
            let from = from.as_chunks::<{ TILE / 2 }>().0[part].as_ptr();
            // SAFETY: 16 floats lie there.
            unsafe { Self(_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))) }
        }

        #[inline(always)]
        fn store(self, to: &mut [f32; TILE], part: usize) {
            let to = to.as_chunks_mut::<{ TILE / 2 }>().0[part].as_mut_ptr();
            // SAFETY: room for 16 floats.
            unsafe {
                _mm256_storeu_ps(to, self.0);
                _mm256_storeu_ps(to.add(8), self.1);
            }
        }

        #[inline(always)]
        fn load_halves(from: [&[f32; HALF]; 2], part: usize) -> Self {
            let from = from[part].as_ptr();
            // SAFETY: 16 floats lie there.
            unsafe { Self(_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))) }
        }

        #[inline(always)]
        fn widen_halves(from: [&[u16; HALF]; 2], part: usize) -> Self {
            let from = from[part].as_ptr().cast::<__m128i>();
            // SAFETY: 16 numbers of 16 bits lie there.
            unsafe {
                let bits = [
                    _mm256_cvtepu16_epi32(_mm_loadu_si128(from)),
                    _mm256_cvtepu16_epi32(_mm_loadu_si128(from.add(1))),
                ];
                Self(
                    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits[0])),
                    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits[1])),
                )
            }
        }

        #[inline(always)]
        fn add(self, other: Self) -> Self {
            // SAFETY: see `splat`.
            unsafe { Self(_mm256_add_ps(self.0, other.0), _mm256_add_ps(self.1, other.1)) }
        }

        #[inline(always)]
        fn mul(self, other: Self) -> Self {
            // SAFETY: see `splat`.
            unsafe { Self(_mm256_mul_ps(self.0, other.0), _mm256_mul_ps(self.1, other.1)) }
        }

        #[inline(always)]
        fn max(self, other: Self) -> Self {
            // SAFETY: see `splat`.
            unsafe { Self(_mm256_max_ps(self.0, other.0), _mm256_max_ps(self.1, other.1)) }
        }

        #[inline(always)]
        fn add_product(self, a: Self, b: Self) -> Self {
            // SAFETY: see `splat`.
            unsafe { Self(_mm256_fmadd_ps(a.0, b.0, self.0), _mm256_fmadd_ps(a.1, b.1, self.1)) }
        }

        #[inline(always)]
        fn power(self) -> Self {
            // SAFETY: see `splat`.
            unsafe {
                let one = _mm256_castps_si256(_mm256_set1_ps(1.0));
                let power = |x| {
                    let n = _mm256_slli_epi32::<23>(_mm256_castps_si256(x));
                    _mm256_castsi256_ps(_mm256_add_epi32(n, one))
                };
                Self(power(self.0), power(self.1))
            }
        }
    }
}
