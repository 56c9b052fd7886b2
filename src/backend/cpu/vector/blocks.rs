//! Blocks of quantised weights times blocks of quantised inputs: integers within a block; then its scale, and its minimum
//! times the sum of the inputs.
#![allow(unsafe_code)]

use super::super::ahead::Asking;
use super::super::inputs::QuantBlock;
use super::super::matrix::Layout;
use super::{Lanes, PANEL, QUAD, QUAD_BYTES, QUADS, Vector, load_all, store_all};
use half::f16;

/// Some blocks of one panel, one after the other.
#[derive(Clone, Copy)]
pub(in super::super) struct BlockRun<'a> {
    /// As many records as `quads`.
    records: &'a [u8],
    /// By block: how many of its quads are needed.
    quads: &'a [u8],
    /// A turn for each block.
    pub(super) asking: Asking<'a>,
}

impl<'a> BlockRun<'a> {
    /// From block `first` of the packed matrix on, as many as `quads`; so many after them are not read.
    #[inline(always)]
    pub(in super::super) fn new(
        layout: Layout,
        packed: &'a [u8],
        first: usize,
        quads: &'a [u8],
        skipped: usize,
        asking: Asking<'a>,
    ) -> Self {
        let records = &packed[first * layout.record()..][..quads.len() * layout.record()];
        Self { records, quads, asking: asking.during(records, skipped * layout.record()) }
    }

    /// In blocks.
    #[inline(always)]
    pub(super) fn len(&self) -> usize {
        self.quads.len()
    }

    /// Each block's scales and minimums, if any, and the quads that are needed of it.
    #[inline(always)]
    pub(super) fn blocks(
        self,
        layout: Layout,
    ) -> impl Iterator<Item = (&'a [[f16; PANEL]], &'a [[u8; QUAD_BYTES]])> {
        let records = self.records.chunks_exact(layout.record());
        records.zip(self.quads).map(move |(record, &quads)| {
            let (header, weights) = record.split_at(layout.header());
            let quads = usize::from(quads).min(QUADS);
            let quads = if layout.is_halves() { quads.div_ceil(2) } else { quads };
            (bytemuck::cast_slice::<u8, f16>(header).as_chunks().0, &weights.as_chunks().0[..quads])
        })
    }
}

/// Where a row's dot products with the bytes or halves of a block begin, so that their offset is taken off.
#[inline(always)]
pub(super) fn start(layout: Layout, biased: bool, block: &QuantBlock) -> i32 {
    match layout {
        Layout::Bytes | Layout::BytesWithMinimums if biased => block.minus_128,
        Layout::Halves => block.minus_8,
        _ => 0,
    }
}

/// All outputs of the panel at once, in the order of memory.
#[inline(always)]
pub(super) fn add_blocks<V: Vector, const LAYOUT: usize, const R: usize>(
    lanes: &mut [Lanes; R],
    run: BlockRun<'_>,
    x: [&[QuantBlock]; R],
) {
    let layout = const { Layout::ALL[LAYOUT] };
    for x in x {
        assert!(x.len() == run.quads.len());
    }
    let mut sums = load_all::<V, R>(lanes);
    for (b, (header, weights)) in run.blocks(layout).enumerate() {
        run.asking.turn(header.as_ptr(), layout.header() + size_of_val(weights), layout.record());
        let scales = V::load_f16(&header[0]);
        let mut begin = [0; R];
        let mut quants: [&[[i8; QUAD]; QUADS]; R] = [&[[0; QUAD]; QUADS]; R];
        for r in 0..R {
            // SAFETY: as many blocks as `quads`, as asserted; so below.
            let block = unsafe { x[r].get_unchecked(b) };
            begin[r] = start(layout, V::BIASED, block);
            quants[r] = block.quads();
        }
        let dots = match layout.is_halves() {
            true => V::dot_halves(begin, weights, quants),
            false => V::dot_bytes(begin, weights, quants),
        };
        for r in 0..R {
            // SAFETY: as above.
            let scale = V::splat(unsafe { x[r].get_unchecked(b) }.scale);
            sums[r] = sums[r].add_product(V::to_f32(dots[r]), scales.mul(scale));
        }
        if layout.has_minimums() {
            let minimums = V::load_f16(&header[1]);
            let minimums = if layout.counts_in_scales() { minimums.mul(scales) } else { minimums };
            for r in 0..R {
                // SAFETY: as above.
                sums[r] = sums[r].add_product(minimums, V::splat(unsafe { x[r].get_unchecked(b) }.sum));
            }
        }
    }
    store_all(sums, lanes);
}
