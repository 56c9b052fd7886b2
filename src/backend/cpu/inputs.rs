//! Rows on their way into a product, in the form that the weight's kernel multiplies with: f32, pairs of bf16, or blocks
//! of 8-bit quants.
//!
//! A row is prepared once for all weights that read it, and cut off at its sub-network's width: what lies beyond is zero,
//! so it adds nothing to whatever it is multiplied with.

use super::kernel::{Kernel, Loops};
use super::matrix::{BlockPanels, Matrix, PairPanels, Panels};
use super::shared::Shared;
use super::vector::{PANEL, Pair, QUAD, QUADS, Vector};
use crate::weights::BLOCK;
use std::ops::Range;

/// What a kernel multiplies a weight with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    F32,
    Bf16,
    Quants,
}

impl Form {
    pub(super) fn of(matrix: &Matrix) -> Self {
        match matrix.panels {
            Panels::Bf16(PairPanels { rounds_inputs: true, .. }) => Self::Bf16,
            Panels::F32(_) | Panels::Bf16(_) => Self::F32,
            Panels::Blocks(_) => Self::Quants,
        }
    }
}

/// A block of one row in at most 8 bits: `x = scale * quant`.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub(super) struct QuantBlock {
    pub(super) scale: f32,
    /// `scale * sum of the quants`, which a weight's minimum is multiplied with.
    pub(super) sum: f32,
    /// `-8 * sum of the quants` and `-128 * sum of the quants`: where sums over weights with that offset begin.
    pub(super) minus_8: i32,
    pub(super) minus_128: i32,
    /// Within [`Vector::LARGEST`].
    pub(super) quants: [i8; BLOCK],
}

impl QuantBlock {
    #[inline(always)]
    pub(super) fn quads(&self) -> &[[i8; QUAD]; QUADS] {
        self.quants.as_chunks().0.first_chunk().expect("a block has this many quads")
    }
}

/// Buffers for the prepared rows of one operation; kept from one to the next.
#[derive(Debug, Default)]
pub(super) struct Buffers {
    f32: Vec<f32>,
    pairs: Vec<Pair>,
    blocks: Vec<QuantBlock>,
}

/// Prepared rows of one width. Filled row by row on all threads, then read by all.
pub(super) struct Inputs<'a> {
    width: usize,
    f32: Option<Shared<'a, f32>>,
    pairs: Option<Shared<'a, Pair>>,
    blocks: Option<Shared<'a, QuantBlock>>,
    /// The order in which a row is cut into blocks.
    places: Option<&'a [u32]>,
}

impl<'a> Inputs<'a> {
    /// Room for `rows` rows of `width` numbers, in the forms that `weights` need.
    ///
    /// Weights of a greater width, or with blocks in another order than the others, are not for these inputs; `None` then.
    pub(super) fn new<'m: 'a>(
        buffers: &'a mut Buffers,
        rows: usize,
        width: usize,
        weights: impl Iterator<Item = &'m Matrix>,
    ) -> Option<Self> {
        let (mut forms, mut places) = ([false; 3], None);
        for weight in weights {
            if weight.columns() > width {
                return None;
            }
            forms[Form::of(weight) as usize] = true;
            if let Panels::Blocks(BlockPanels { places: own, .. }) = &weight.panels {
                let in_order = own.is_none() || weight.columns() == width;
                if !in_order || places.is_some_and(|places| !same(places, own.as_deref())) {
                    return None;
                }
                places = Some(own.as_deref());
            }
        }
        let Buffers { f32, pairs, blocks } = buffers;
        let form = |form: Form| forms[form as usize];
        Some(Self {
            width,
            f32: form(Form::F32).then(|| room(f32, rows * width.next_multiple_of(2))),
            pairs: form(Form::Bf16).then(|| room(pairs, rows * width.div_ceil(2))),
            blocks: form(Form::Quants).then(|| room(blocks, rows * width.div_ceil(BLOCK))),
            places: places.flatten(),
        })
    }

    /// Prepares one row; `x` holds its first numbers, the others are zero.
    ///
    /// # Safety
    /// Nobody else fills or reads this row meanwhile.
    #[expect(unsafe_code, reason = "rows are filled by several threads")]
    pub(super) unsafe fn fill(&self, kernel: Kernel, row: usize, x: &[f32]) {
        let x = &x[..x.len().min(self.width)];
        if let Some(buffer) = &self.f32 {
            // SAFETY: of this row, by contract; so below.
            let to = unsafe { buffer.part(self.floats(row)) };
            to[..x.len()].copy_from_slice(x);
            to[x.len()..].fill(0.0);
        }
        if let Some(buffer) = &self.pairs {
            let count = self.width.div_ceil(2);
            // SAFETY: as above.
            let to = unsafe { buffer.part(row * count..(row + 1) * count) };
            kernel.vectorised(FillPairs { x, to });
        }
        if let Some(buffer) = &self.blocks {
            let count = self.width.div_ceil(BLOCK);
            // SAFETY: as above.
            let to = unsafe { buffer.part(row * count..(row + 1) * count) };
            kernel.fill_blocks(x, self.places, to);
        }
    }

    /// Bytes of a prepared row.
    pub(super) fn row_bytes(&self) -> usize {
        let f32 = self.f32.is_some().then(|| self.width * size_of::<f32>());
        let pairs = self.pairs.is_some().then(|| self.width.div_ceil(2) * size_of::<Pair>());
        let blocks = self.blocks.is_some().then(|| self.width.div_ceil(BLOCK) * size_of::<QuantBlock>());
        f32.unwrap_or(0) + pairs.unwrap_or(0) + blocks.unwrap_or(0)
    }

    /// Where a row's numbers lie, rounded up to pairs.
    fn floats(&self, row: usize) -> Range<usize> {
        let width = self.width.next_multiple_of(2);
        row * width..(row + 1) * width
    }

    /// A prepared row; empty where it was not prepared in this form.
    ///
    /// # Safety
    /// It has been filled, before a barrier.
    #[inline(always)]
    #[expect(unsafe_code, reason = "rows are filled by several threads")]
    pub(super) unsafe fn f32(&self, row: usize) -> &[f32] {
        // SAFETY: by contract; so below.
        self.f32.as_ref().map_or(&[], |b| unsafe { b.view(self.floats(row)) })
    }

    /// As [`Self::f32`].
    ///
    /// # Safety
    /// As [`Self::f32`].
    #[inline(always)]
    #[expect(unsafe_code, reason = "rows are filled by several threads")]
    pub(super) unsafe fn pairs(&self, row: usize) -> &[Pair] {
        let count = self.width.div_ceil(2);
        // SAFETY: by contract.
        self.pairs.as_ref().map_or(&[], |b| unsafe { b.view(row * count..(row + 1) * count) })
    }

    /// As [`Self::f32`].
    ///
    /// # Safety
    /// As [`Self::f32`].
    #[inline(always)]
    #[expect(unsafe_code, reason = "rows are filled by several threads")]
    pub(super) unsafe fn blocks(&self, row: usize) -> &[QuantBlock] {
        let count = self.width.div_ceil(BLOCK);
        // SAFETY: by contract.
        self.blocks.as_ref().map_or(&[], |b| unsafe { b.view(row * count..(row + 1) * count) })
    }
}

/// Whether two orders are the same; an adapter shares its weight's, so that they are rarely compared one by one.
fn same(one: Option<&[u32]>, other: Option<&[u32]>) -> bool {
    match (one, other) {
        (Some(one), Some(other)) => std::ptr::eq(one, other) || one == other,
        (one, other) => one.is_none() && other.is_none(),
    }
}

/// Room for `length` values, whatever they are.
fn room<T: Copy + Default>(buffer: &mut Vec<T>, length: usize) -> Shared<'_, T> {
    if buffer.len() < length {
        buffer.resize(length, T::default());
    }
    Shared::new(&mut buffer[..length])
}

/// All pairs of a row whose first numbers are `x`.
struct FillPairs<'a> {
    x: &'a [f32],
    to: &'a mut [Pair],
}

impl Loops for FillPairs<'_> {
    #[inline(always)]
    fn run(self) {
        let (pairs, rest) = self.x.as_chunks::<2>();
        let (whole, others) = self.to.split_at_mut(pairs.len());
        for (to, &[first, second]) in whole.iter_mut().zip(pairs) {
            *to = rounded(first) >> 16 | rounded(second) & 0xffff_0000;
        }
        others.fill(0);
        if let (Some(to), &[last]) = (others.first_mut(), rest) {
            *to = rounded(last) >> 16;
        }
    }
}

/// The bits of the nearest bf16, ties to even, in the upper half; what is in the lower half has no meaning.
#[inline(always)]
pub(super) fn rounded(x: f32) -> u32 {
    let bits = x.to_bits();
    // A NaN stays one: rounding up could make it an infinity, or carry into the sign.
    if x.is_nan() { bits | 0x0040_0000 } else { bits.wrapping_add(0x7fff + (bits >> 16 & 1)) }
}

/// All blocks of a row whose first numbers are `x`.
#[inline(always)]
pub(super) fn fill_blocks<V: Vector>(x: &[f32], to: &mut [QuantBlock]) {
    let (whole, rest) = x.as_chunks::<BLOCK>();
    let (first, others) = to.split_at_mut(whole.len());
    for (block, x) in first.iter_mut().zip(whole) {
        *block = quantise::<V>(x);
    }
    if let Some((block, none)) = others.split_first_mut() {
        let mut last = [0.0; BLOCK];
        last[..rest.len()].copy_from_slice(rest);
        *block = quantise::<V>(&last);
        none.fill(QuantBlock::default());
    }
}

/// The same with the numbers in the order of `places`, of which there are as many as the row has numbers.
#[inline(always)]
pub(super) fn fill_gathered<V: Vector>(x: &[f32], places: &[u32], to: &mut [QuantBlock]) {
    let (whole, rest) = places.as_chunks::<BLOCK>();
    let (first, last) = to.split_at_mut(whole.len());
    for (block, places) in first.iter_mut().zip(whole) {
        *block = quantise::<V>(&V::gather(x, places));
    }
    if let Some(block) = last.first_mut() {
        let mut places = [u32::MAX; BLOCK];
        places[..rest.len()].copy_from_slice(rest);
        *block = quantise::<V>(&V::gather(x, &places));
    }
}

/// A block with a NaN or an infinity in it has such a scale or sum, so that it is not lost.
#[inline(always)]
fn quantise<V: Vector>(x: &[f32; BLOCK]) -> QuantBlock {
    let scale = V::largest(x) / f32::from(V::LARGEST);
    // What has no inverse is too small to matter.
    let inverse = if scale >= f32::MIN_POSITIVE { 1.0 / scale } else { 0.0 };
    let (quants, sum) = V::quants(x, inverse);
    // Wrapping only where the scale is not finite, which decides the result anyway.
    let (minus_8, minus_128) = (sum.wrapping_mul(-8), sum.wrapping_mul(-128));
    QuantBlock { scale, sum: scale * sum as f32, minus_8, minus_128, quants }
}

const _: () = assert!(BLOCK == PANEL, "a rank of one panel is one block of the product that follows");

#[cfg(test)]
mod tests {
    use super::*;
    use half::bf16;

    #[test]
    fn a_block_is_within_half_a_step_and_keeps_what_is_not_a_number() {
        let x = (0..3 * BLOCK).map(|i| ((i * 37 % 91) as f32 - 40.0) * 0.37).collect::<Vec<_>>();
        for (kernel, length) in
            Kernel::available().into_iter().flat_map(|k| [0, 1, 5, 32, 33, 90].map(|n| (k, n)))
        {
            let mut blocks = [QuantBlock::default(); 4];
            kernel.fill_blocks(&x[..length], None, &mut blocks);
            for (b, block) in blocks.into_iter().enumerate() {
                let sum = block.quants.iter().map(|&q| i32::from(q)).sum::<i32>();
                assert_eq!((block.minus_8, block.minus_128), (-8 * sum, -128 * sum));
                assert!((block.sum - block.scale * sum as f32).abs() <= 1e-6 * block.sum.abs(), "{kernel:?}");
                for (i, &quant) in block.quants.iter().enumerate() {
                    let value = x[..length].get(b * BLOCK + i).copied().unwrap_or(0.0);
                    let error = (f32::from(quant) * block.scale - value).abs();
                    assert!(error <= 0.5001 * block.scale, "{kernel:?} {length} {b} {i}");
                    assert!(quant.unsigned_abs() <= kernel.largest_input().unsigned_abs());
                }
            }
        }
        for kernel in Kernel::available() {
            let quantise = |first: &[f32]| {
                let mut block = [QuantBlock::default()];
                kernel.fill_blocks(first, None, &mut block);
                block[0]
            };
            assert!(quantise(&[1.0, f32::NAN, 3.0]).scale.is_nan());
            assert!(quantise(&[1.0, -f32::NAN, f32::INFINITY]).scale.is_nan());
            assert!(!quantise(&[1.0, f32::NEG_INFINITY, 3.0]).scale.is_finite());
            assert_eq!(quantise(&[0.0, -0.0]).scale, 0.0);
            // So small that its scale is zero or its inverse infinite.
            let tiny = quantise(&[1e-45, -1e-38]);
            assert!(tiny.quants.iter().all(|q| q.unsigned_abs() <= 63));
            // Ties go to the even one; the largest quant stands for itself.
            let largest = f32::from(kernel.largest_input());
            assert_eq!(quantise(&[largest, 0.5, 1.5, -2.5, -0.5]).quants[..5], [largest as i8, 0, 2, -2, 0]);
        }
    }

    #[test]
    fn blocks_have_the_numbers_in_their_order() {
        let x = (0..3 * BLOCK).map(|i| ((i * 37 % 91) as f32 - 40.0) * 0.37).collect::<Vec<_>>();
        for kernel in Kernel::available() {
            // Whole blocks and not; and of rows that are cut off.
            for (width, length) in [(96usize, 96), (96, 50), (70, 70), (70, 33), (5, 2), (32, 0)] {
                let places = (0..width as u32).map(|i| (i * 29 + 7) % width as u32).collect::<Vec<_>>();
                let number = |&place: &u32| x[..length].get(place as usize).copied().unwrap_or(0.0);
                let gathered = places.iter().map(number).collect::<Vec<_>>();
                let (mut expected, mut got) = ([QuantBlock::default(); 3], [QuantBlock::default(); 3]);
                let blocks = ..width.div_ceil(BLOCK);
                kernel.fill_blocks(&gathered, None, &mut expected[blocks]);
                kernel.fill_blocks(&x[..length], Some(&places), &mut got[blocks]);
                for (got, expected) in got.iter().zip(expected) {
                    assert_eq!(
                        (got.scale, got.quants),
                        (expected.scale, expected.quants),
                        "{kernel:?} {width}"
                    );
                }
            }
        }
    }

    #[test]
    fn pairs_are_rounded_to_the_nearest() {
        for x in [0.0, -0.0, 1.0, 1.003_906_3, -3.16159, 1e-40, f32::MAX, f32::INFINITY, f32::NAN] {
            let mut pair = [0; 2];
            FillPairs { x: &[x, -x, x], to: &mut pair }.run();
            let nearest = bf16::from_f32(x);
            let got = [pair[0] as u16, (pair[0] >> 16) as u16, pair[1] as u16].map(bf16::from_bits);
            for (got, sign) in got.into_iter().zip([1.0, -1.0, 1.0]) {
                assert!(got.to_f32() == sign * nearest.to_f32() || x.is_nan() && got.is_nan(), "{x} {got}");
            }
            assert_eq!(pair[1] >> 16, 0);
        }
    }
}
