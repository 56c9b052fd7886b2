//! Thirty-two lanes in the registers of one instruction set: the outputs of one panel.
//!
//! Only the kernels' inner loops use these; everything here is inlined into a function that has been compiled for the
//! instruction set, which is what makes the calls sound. What each operation computes is written in [`Portable`]; the
//! others must agree with it (integers exactly, floats to their rounding).

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod portable;

#[cfg(target_arch = "x86_64")]
pub(super) use avx2::Avx2;
#[cfg(target_arch = "x86_64")]
pub(super) use avx512::Avx512;
pub(super) use portable::Portable;

use crate::weights::BLOCK;
use half::{bf16, f16};

/// Bytes of a cache line.
pub(super) const LINE: usize = 64;
/// How far ahead of the products the first rows ask for a panel's weights, which are cold then. The processor's own
/// prefetching stops at the end of each page and takes a while to begin; panels follow each other in memory, so what lies
/// ahead is the next one. Asked for line by line between the products; what that gains stands in ARCHITECTURE.md.
pub(super) const AHEAD: usize = 1024;

/// Outputs in one panel of weights: two vector registers of 512 bits.
pub(super) const PANEL: usize = 32;
/// Four consecutive inputs of each output of a panel, one byte each: what one integer dot product takes.
pub(super) const QUAD: usize = 4;
/// Quads in one block.
pub(super) const QUADS: usize = BLOCK / QUAD;
/// Bytes of one quad of a panel.
pub(super) const QUAD_BYTES: usize = PANEL * QUAD;

/// Two neighbouring inputs in bf16, the first in the lower half.
pub(super) type Pair = u32;

pub(super) trait Vector: Copy {
    /// 32 integers.
    type Ints: Copy;

    /// Rows that fit into the registers together, multiplied with f32 or bf16 weights.
    const ROWS: usize;
    /// The same for weights quantised to a byte, which need an integer and a float accumulator each.
    const BYTES_ROWS: usize;
    /// The same for weights quantised to half a byte.
    const HALVES_ROWS: usize;
    /// Whether [`Self::dot_bytes`] takes a byte for the number that it is, 128 more than the quant it stands for.
    const BIASED: bool;

    fn zero() -> Self;
    fn load(from: &[f32; PANEL]) -> Self;
    fn load_f16(from: &[f16; PANEL]) -> Self;
    fn store(self, to: &mut [f32; PANEL]);
    fn splat(x: f32) -> Self;
    fn mul(self, other: Self) -> Self;
    /// `self + a b`
    fn add_product(self, a: Self, b: Self) -> Self;

    /// Asks for a cache line that will be read soon; does nothing where it cannot.
    fn prefetch(at: *const u8);

    /// The first inputs and the second ones of a pair of inputs in bf16.
    fn load_pairs(from: &[[bf16; 2]; PANEL]) -> [Self; 2];
    /// `self + x.0 w.0 + x.1 w.1` by the processor's dot product where it has one.
    #[inline(always)]
    fn add_dot(self, x: Pair, w: &[[bf16; 2]; PANEL]) -> Self {
        let ([first, second], w) = (both(x), Self::load_pairs(w));
        self.add_product(Self::splat(first), w[0]).add_product(Self::splat(second), w[1])
    }

    /// Adds the products of some inputs with dense weights, one input of all rows after the other.
    #[inline(always)]
    fn add_inputs<const R: usize>(
        sums: &mut [Self; R],
        weights: &[[f32; PANEL]],
        x: [&[f32]; R],
        cold: bool,
    ) {
        for (k, weights) in weights.iter().enumerate() {
            if cold {
                ask_ahead::<Self, _>(weights, AHEAD);
            }
            let weights = Self::load(weights);
            for r in 0..R {
                sums[r] = sums[r].add_product(Self::splat(x[r][k]), weights);
            }
        }
    }

    /// The same for pairs of inputs and weights in bf16.
    #[inline(always)]
    fn add_pairs<const R: usize>(
        sums: &mut [Self; R],
        weights: &[[[bf16; 2]; PANEL]],
        x: [&[[f32; 2]]; R],
        cold: bool,
    ) {
        for (k, weights) in weights.iter().enumerate() {
            if cold {
                ask_ahead::<Self, _>(weights, AHEAD);
            }
            let [first, second] = Self::load_pairs(weights);
            for r in 0..R {
                let [a, b] = x[r][k];
                sums[r] = sums[r].add_product(Self::splat(a), first).add_product(Self::splat(b), second);
            }
        }
    }

    fn to_f32(ints: Self::Ints) -> Self;
    /// For each row, `start` and the dot products of its inputs and the bytes, quad by quad; the bytes biased or not (see
    /// [`Self::BIASED`]), the inputs within `-127..=127`. Asks for memory `ahead` bytes on, unless that is 0.
    fn dot_bytes<const R: usize>(
        start: [i32; R],
        weights: &[[u8; QUAD_BYTES]],
        x: [&[[i8; QUAD]; QUADS]; R],
        ahead: usize,
    ) -> [Self::Ints; R];
    /// The same for two quads in each byte, `0..=15`: the lower halves are the first of the two.
    fn dot_halves<const R: usize>(
        start: [i32; R],
        weights: &[[u8; QUAD_BYTES]],
        x: [&[[i8; QUAD]; QUADS]; R],
        ahead: usize,
    ) -> [Self::Ints; R];
}

/// The two inputs of a pair.
#[inline(always)]
pub(super) fn both(pair: Pair) -> [f32; 2] {
    [f32::from_bits(pair << 16), f32::from_bits(pair & 0xffff_0000)]
}

/// Asks for what lies so many bytes ahead of some weights.
#[inline(always)]
pub(super) fn ask_ahead<V: Vector, T>(weights: &T, ahead: usize) {
    for line in (0..size_of::<T>()).step_by(LINE) {
        V::prefetch(std::ptr::from_ref(weights).cast::<u8>().wrapping_add(ahead + line));
    }
}
