//! Plain arithmetic, for processors without the instructions of the others.

use super::{PANEL, QUAD, QUAD_BYTES, QUADS, Vector};
use half::{bf16, f16};

#[derive(Clone, Copy)]
pub(in super::super) struct Portable([f32; PANEL]);

impl Vector for Portable {
    type Ints = [i32; PANEL];

    const ROWS: usize = 1;
    const BYTES_ROWS: usize = 1;
    const HALVES_ROWS: usize = 1;
    const BIASED: bool = true;

    #[inline(always)]
    fn zero() -> Self {
        Self([0.0; PANEL])
    }

    #[inline(always)]
    fn load(from: &[f32; PANEL]) -> Self {
        Self(*from)
    }

    #[inline(always)]
    fn load_f16(from: &[f16; PANEL]) -> Self {
        Self(from.map(f16::to_f32))
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
    fn mul(self, other: Self) -> Self {
        Self(std::array::from_fn(|lane| self.0[lane] * other.0[lane]))
    }

    #[inline(always)]
    fn add_product(self, a: Self, b: Self) -> Self {
        Self(std::array::from_fn(|lane| self.0[lane] + a.0[lane] * b.0[lane]))
    }

    #[inline(always)]
    fn load_pairs(from: &[[bf16; 2]; PANEL]) -> [Self; 2] {
        [Self(from.map(|pair| pair[0].to_f32())), Self(from.map(|pair| pair[1].to_f32()))]
    }

    #[inline(always)]
    fn to_f32(ints: Self::Ints) -> Self {
        Self(ints.map(|x| x as f32))
    }

    #[inline(always)]
    fn dot_bytes<const R: usize>(
        start: [i32; R],
        weights: &[[u8; QUAD_BYTES]],
        x: [&[[i8; QUAD]; QUADS]; R],
    ) -> [Self::Ints; R] {
        let mut sums = start.map(|start| [start; PANEL]);
        for (quad, weights) in weights.iter().enumerate() {
            for r in 0..R {
                add_quad(&mut sums[r], weights, x[r][quad]);
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
        let mut sums = start.map(|start| [start; PANEL]);
        for (pair, weights) in weights.iter().enumerate() {
            for r in 0..R {
                add_quad(&mut sums[r], &weights.map(|byte| byte & 15), x[r][2 * pair]);
                add_quad(&mut sums[r], &weights.map(|byte| byte >> 4), x[r][2 * pair + 1]);
            }
        }
        sums
    }
}

#[inline(always)]
fn add_quad(sums: &mut [i32; PANEL], weights: &[u8; QUAD_BYTES], x: [i8; QUAD]) {
    for (sum, weights) in sums.iter_mut().zip(weights.as_chunks::<QUAD>().0) {
        *sum += weights.iter().zip(x).map(|(&w, x)| i32::from(w) * i32::from(x)).sum::<i32>();
    }
}
