//! Thirty-two lanes in the registers of one instruction set: the outputs of one panel.
//!
//! Only the kernels' inner loops use these; everything here is inlined into a function that has been compiled for the
//! instruction set, which is what makes the calls sound. What each operation computes is written in [`Portable`]; the
//! others must agree with it (integers exactly, floats to their rounding).

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx2_blocks;
#[cfg(target_arch = "x86_64")]
mod avx2_quants;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod blocks;
mod portable;

#[cfg(target_arch = "x86_64")]
pub(super) use avx2::Avx2;
#[cfg(target_arch = "x86_64")]
pub(super) use avx512::Avx512;
pub(super) use blocks::BlockRun;
pub(super) use portable::Portable;

use super::ahead::Asking;
use super::inputs::QuantBlock;
use crate::weights::BLOCK;
use half::{bf16, f16};

/// Inputs, or pairs of them, between two turns of asking memory for more.
pub(super) const TURN: usize = 8;

/// Outputs in one panel of weights: two vector registers of 512 bits.
pub(super) const PANEL: usize = 32;
/// Four consecutive inputs of each output of a panel, one byte each: what one integer dot product takes.
pub(super) const QUAD: usize = 4;
/// Quads in one block.
pub(super) const QUADS: usize = BLOCK / QUAD;
/// Bytes of one quad of a panel.
pub(super) const QUAD_BYTES: usize = PANEL * QUAD;

/// Accumulators of one row: the outputs of one panel.
pub(super) type Lanes = [f32; PANEL];

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
    /// Rows that are taken together whatever the weights.
    const FEW: usize = least(Self::ROWS, least(Self::BYTES_ROWS, Self::HALVES_ROWS));
    /// Whether [`Self::dot_bytes`] takes a byte for the number that it is, 128 more than the quant it stands for.
    const BIASED: bool;
    /// The largest quant of an input.
    const LARGEST: i8 = 127;

    /// How often the kernels for so many rows, of weights that are quantised or not, read a panel.
    #[inline(always)]
    fn passes(_quantised: bool, _rows: usize) -> usize {
        1
    }

    fn zero() -> Self;
    fn load(from: &[f32; PANEL]) -> Self;
    fn load_f16(from: &[f16; PANEL]) -> Self;
    fn store(self, to: &mut [f32; PANEL]);
    fn splat(x: f32) -> Self;
    fn mul(self, other: Self) -> Self;
    /// `self + a b`
    fn add_product(self, a: Self, b: Self) -> Self;

    /// The first inputs and the second ones of a pair of inputs in bf16.
    fn load_pairs(from: &[[bf16; 2]; PANEL]) -> [Self; 2];
    /// `self + x.0 w.0 + x.1 w.1` by the processor's dot product where it has one.
    #[inline(always)]
    fn add_dot(self, x: Pair, w: &[[bf16; 2]; PANEL]) -> Self {
        let ([first, second], w) = (both(x), Self::load_pairs(w));
        self.add_product(Self::splat(first), w[0]).add_product(Self::splat(second), w[1])
    }

    /// Adds the products of some inputs with f32 weights to each row's accumulators, one input after the other.
    #[inline(always)]
    fn add_inputs<const R: usize>(
        lanes: &mut [Lanes; R],
        weights: &[[f32; PANEL]],
        x: [&[f32]; R],
        asking: Asking<'_>,
    ) {
        let mut sums = load_all::<Self, R>(lanes);
        for (k, weights) in weights.iter().enumerate() {
            if k.is_multiple_of(TURN) {
                asking.turn(weights, TURN * size_of_val(weights), TURN * size_of_val(weights));
            }
            let weights = Self::load(weights);
            for r in 0..R {
                sums[r] = sums[r].add_product(Self::splat(x[r][k]), weights);
            }
        }
        store_all(sums, lanes);
    }

    /// The same for pairs of inputs and weights in bf16.
    #[inline(always)]
    fn add_pairs<const R: usize>(
        lanes: &mut [Lanes; R],
        weights: &[[[bf16; 2]; PANEL]],
        x: [&[[f32; 2]]; R],
        asking: Asking<'_>,
    ) {
        let mut sums = load_all::<Self, R>(lanes);
        for (k, weights) in weights.iter().enumerate() {
            if k.is_multiple_of(TURN) {
                asking.turn(weights, TURN * size_of_val(weights), TURN * size_of_val(weights));
            }
            let [first, second] = Self::load_pairs(weights);
            for r in 0..R {
                let [a, b] = x[r][k];
                sums[r] = sums[r].add_product(Self::splat(a), first).add_product(Self::splat(b), second);
            }
        }
        store_all(sums, lanes);
    }

    /// The same for inputs in bf16 as well.
    #[inline(always)]
    fn add_dots<const R: usize>(
        lanes: &mut [Lanes; R],
        weights: &[[[bf16; 2]; PANEL]],
        x: [&[Pair]; R],
        asking: Asking<'_>,
    ) {
        let mut sums = load_all::<Self, R>(lanes);
        for (k, weights) in weights.iter().enumerate() {
            if k.is_multiple_of(TURN) {
                asking.turn(weights, TURN * size_of_val(weights), TURN * size_of_val(weights));
            }
            for r in 0..R {
                sums[r] = sums[r].add_dot(x[r][k], weights);
            }
        }
        store_all(sums, lanes);
    }

    /// The same for quantised weights of the layout, by its place in `Layout::ALL`.
    #[inline(always)]
    fn add_blocks<const LAYOUT: usize, const R: usize>(
        lanes: &mut [Lanes; R],
        run: BlockRun<'_>,
        x: [&[QuantBlock]; R],
    ) {
        blocks::add_blocks::<Self, LAYOUT, R>(lanes, run, x);
    }

    /// The numbers at these places; zero at places beyond the last.
    #[inline(always)]
    fn gather(x: &[f32], places: &[u32; PANEL]) -> [f32; PANEL] {
        gather(x, places)
    }

    /// The largest size among numbers; a NaN if one is.
    #[inline(always)]
    fn largest(x: &[f32; PANEL]) -> f32 {
        // As integers, sizes of floats are ordered alike, and NaN above all.
        f32::from_bits(x.iter().fold(0, |largest, x| largest.max(x.to_bits() & 0x7fff_ffff)))
    }

    /// The whole numbers nearest to `x * inverse`, ties to even, within eight bits, and their sum. What becomes of a number that
    /// is not finite has no meaning.
    #[inline(always)]
    fn quants(x: &[f32; PANEL], inverse: f32) -> ([i8; PANEL], i32) {
        // Adding 1.5 * 2^23 rounds to a whole number and leaves it in the lowest bits.
        const ROUND: f32 = 12_582_912.0;
        let int = |x: f32| (x * inverse + ROUND).to_bits().wrapping_sub(ROUND.to_bits()) as i32;
        let (mut quants, mut sum) = ([0; PANEL], 0i32);
        for (quant, &x) in quants.iter_mut().zip(x) {
            sum = sum.wrapping_add(int(x));
            *quant = int(x) as i8;
        }
        (quants, sum)
    }

    fn to_f32(ints: Self::Ints) -> Self;
    /// For each row, `start` and the dot products of its inputs and the bytes, quad by quad; the bytes biased or not (see
    /// [`Self::BIASED`]), the inputs within [`Self::LARGEST`].
    fn dot_bytes<const R: usize>(
        start: [i32; R],
        weights: &[[u8; QUAD_BYTES]],
        x: [&[[i8; QUAD]; QUADS]; R],
    ) -> [Self::Ints; R];
    /// The same for two quads in each byte, `0..=15`: the lower halves are the first of the two.
    fn dot_halves<const R: usize>(
        start: [i32; R],
        weights: &[[u8; QUAD_BYTES]],
        x: [&[[i8; QUAD]; QUADS]; R],
    ) -> [Self::Ints; R];
}

const fn least(one: usize, other: usize) -> usize {
    if one < other { one } else { other }
}

/// [`Vector::gather`] one by one.
#[inline(always)]
fn gather(x: &[f32], places: &[u32; PANEL]) -> [f32; PANEL] {
    let mut gathered = [0.0; PANEL];
    for (to, &place) in gathered.iter_mut().zip(places) {
        *to = x.get(place as usize).copied().unwrap_or(0.0);
    }
    gathered
}

/// The two inputs of a pair.
#[inline(always)]
pub(super) fn both(pair: Pair) -> [f32; 2] {
    [f32::from_bits(pair << 16), f32::from_bits(pair & 0xffff_0000)]
}

#[inline(always)]
fn load_all<V: Vector, const R: usize>(lanes: &[Lanes; R]) -> [V; R] {
    let mut sums = [V::zero(); R];
    for r in 0..R {
        sums[r] = V::load(&lanes[r]);
    }
    sums
}

#[inline(always)]
fn store_all<V: Vector, const R: usize>(sums: [V; R], lanes: &mut [Lanes; R]) {
    for r in 0..R {
        sums[r].store(&mut lanes[r]);
    }
}
