//! Attention of one row straight from the pool: with so few query vectors, gathering a tile first costs more than its
//! products. Every number is computed in the order of `products`, so that it is the same bit for bit.
#![allow(unsafe_code)]
#![expect(clippy::needless_range_loop, reason = "the index names the row")]

use super::super::ahead::{Ahead, LINE, Runs};
use super::TILE;
use super::cache::{Kept, PagedCache, by_block, place};
use super::context::{Half, Paged, Source};
use super::lanes::{HALF, Lanes};
use super::products::Strided;
use std::ops::Range;

/// Steps of the inner loops between two turns of asking memory for what comes.
const TURN: usize = 8;

/// Query vectors that are worth it.
pub(super) const FEW: usize = 4;

impl PagedCache {
    /// Whether halves of tiles lie within blocks, and values are whole tiles, of no more than so many numbers.
    pub(super) fn is_direct(&self, most: usize) -> bool {
        let head_size = self.layout.head_size;
        self.layout.block_size.is_multiple_of(HALF) && head_size.is_multiple_of(TILE) && head_size <= most
    }
}

/// One head of one sequence in the pool, and the tile of it that is read next, asked for line by line between products: all
/// at once it would keep them waiting.
pub(super) struct Direct<'a, T> {
    paged: Paged<'a, T>,
    coming: Ahead,
}

impl<'a, T> Direct<'a, T> {
    #[inline(always)]
    pub(super) fn new(paged: Paged<'a, T>) -> Self {
        Self { paged, coming: Ahead::default() }
    }
}

impl<T: Kept> Source for Direct<'_, T> {
    #[inline(always)]
    fn gather(&mut self, _: Half, _: Range<usize>, next: (Half, Range<usize>)) {
        // A tile lies in two blocks at most, see `is_direct`.
        let mut addresses = self.paged.addresses(next.0, next.1);
        self.coming.set(&[0, 1].map(|_| Runs::whole(addresses.next().unwrap_or_default())));
    }

    #[inline(always)]
    fn scores<L: Lanes>(&self, rows: usize, tile: Range<usize>, x: Strided<'_>, y: (&mut [f32], usize)) {
        match rows {
            1 => self.scores_in_parts::<L, 1>(tile, x, y),
            2 => self.scores_in_parts::<L, 2>(tile, x, y),
            3 => self.scores_in_parts::<L, 3>(tile, x, y),
            _ => self.scores_in_parts::<L, FEW>(tile, x, y),
        }
    }

    #[inline(always)]
    fn weighted<L: Lanes>(
        &self,
        rows: usize,
        tile: Range<usize>,
        x: Strided<'_>,
        y: (&mut [f32], usize),
        _: impl Fn(usize) -> usize,
    ) {
        match rows {
            1 => self.weighted_in_parts::<L, 1>(tile, x, y),
            2 => self.weighted_in_parts::<L, 2>(tile, x, y),
            3 => self.weighted_in_parts::<L, 3>(tile, x, y),
            _ => self.weighted_in_parts::<L, FEW>(tile, x, y),
        }
    }
}

impl<T: Kept> Direct<'_, T> {
    /// Cache lines to ask for in each step of the inner loops, of which a tile takes as many as a head has numbers, be it of
    /// keys or of values.
    const LINES: usize = TILE * size_of::<T>() / LINE;

    #[inline(always)]
    fn scores_in_parts<L: Lanes, const R: usize>(
        &self,
        tile: Range<usize>,
        x: Strided<'_>,
        y: (&mut [f32], usize),
    ) {
        match parts_together(L::PARTS, R) {
            2 => self.some_scores::<L, R, 2>(tile, x, y),
            _ => self.some_scores::<L, R, 1>(tile, x, y),
        }
    }

    #[inline(always)]
    fn some_scores<L: Lanes, const R: usize, const P: usize>(
        &self,
        tile: Range<usize>,
        x: Strided<'_>,
        (y, stride): (&mut [f32], usize),
    ) {
        let Paged { cache, pools, layer, head, blocks } = self.paged;
        let (size, block_size) = (cache.layout.head_size, cache.layout.block_size);
        // Halves of positions, `step` of them for each number of a key.
        let step = block_size / HALF;
        let half = |position: usize| {
            // A tile that ends within its first half reads that twice.
            let position = if position < tile.end { position } else { tile.start };
            let keys = &pools.keys[place(&cache.layout, layer, blocks[position / block_size], head)];
            &keys.as_chunks::<HALF>().0[position % block_size / HALF..]
        };
        let halves = [half(tile.start), half(tile.start + HALF)];
        assert!(halves.iter().all(|half| half.len() > (size - 1) * step));
        let mut rows = [&x.floats[..0]; R];
        for (r, row) in rows.iter_mut().enumerate() {
            *row = &x.floats[r * x.stride..][..size];
        }
        for first in (0..L::PARTS).step_by(P) {
            let mut sums = [[L::splat(0.0); P]; R];
            for start in (0..size).step_by(TURN) {
                self.coming.ask(TURN * Self::LINES);
                for d in start..size.min(start + TURN) {
                    let mut x = [L::splat(0.0); R];
                    for r in 0..R {
                        x[r] = L::splat(rows[r][d]);
                    }
                    // SAFETY: `d` is less than `size`, for which there are halves enough, as asserted.
                    let keys =
                        unsafe { [halves[0].get_unchecked(d * step), halves[1].get_unchecked(d * step)] };
                    for p in 0..P {
                        let keys = T::lanes::<L>(keys, first + p);
                        for r in 0..R {
                            sums[r][p] = sums[r][p].add_product(x[r], keys);
                        }
                    }
                }
            }
            for r in 0..R {
                for p in 0..P {
                    sums[r][p].store(lanes(&mut y[r * stride..]), first + p);
                }
            }
        }
    }

    #[inline(always)]
    fn weighted_in_parts<L: Lanes, const R: usize>(
        &self,
        tile: Range<usize>,
        x: Strided<'_>,
        y: (&mut [f32], usize),
    ) {
        match parts_together(L::PARTS, R) {
            2 => self.some_weighted::<L, R, 2>(tile, x, y),
            _ => self.some_weighted::<L, R, 1>(tile, x, y),
        }
    }

    #[inline(always)]
    fn some_weighted<L: Lanes, const R: usize, const P: usize>(
        &self,
        tile: Range<usize>,
        x: Strided<'_>,
        (y, stride): (&mut [f32], usize),
    ) {
        let Paged { cache, pools, layer, head, blocks } = self.paged;
        // Halves of a value.
        let step = cache.layout.head_size / HALF;
        for (start, first) in
            (0..step).step_by(2).flat_map(|start| (0..L::PARTS).step_by(P).map(move |part| (start, part)))
        {
            let mut sums = [[L::splat(0.0); P]; R];
            for r in 0..R {
                for p in 0..P {
                    sums[r][p] = L::load(lanes(&mut y[r * stride + start * HALF..]), first + p);
                }
            }
            for (block, offset, run) in by_block(tile.clone(), cache.layout.block_size, blocks) {
                let values = &pools.values[place(&cache.layout, layer, block, head)];
                let values = &values.as_chunks::<HALF>().0[offset * step..][..run.len() * step];
                let mut weights = [&x.floats[..0]; R];
                for (r, weights) in weights.iter_mut().enumerate() {
                    *weights = &x.floats[r * x.stride + run.start - tile.start..][..run.len()];
                }
                for i in 0..run.len() {
                    if i.is_multiple_of(TURN) {
                        self.coming.ask(TURN * Self::LINES);
                    }
                    let mut x = [L::splat(0.0); R];
                    for r in 0..R {
                        x[r] = L::splat(weights[r][i]);
                    }
                    let at = i * step + start;
                    // SAFETY: `i` is less than `run.len()` and `start + 1` than `step`, which is even.
                    let value = unsafe { [values.get_unchecked(at), values.get_unchecked(at + 1)] };
                    for p in 0..P {
                        let value = T::lanes::<L>(value, first + p);
                        for r in 0..R {
                            sums[r][p] = sums[r][p].add_product(x[r], value);
                        }
                    }
                }
            }
            for r in 0..R {
                for p in 0..P {
                    sums[r][p].store(lanes(&mut y[r * stride + start * HALF..]), first + p);
                }
            }
        }
    }
}

/// Parts of a tile that are computed together: an accumulator takes an addition every fourth cycle, so there should be eight
/// and more of them; twelve fit into sixteen registers.
#[inline(always)]
const fn parts_together(parts: usize, rows: usize) -> usize {
    if parts == 2 && rows <= 3 { 2 } else { 1 }
}

#[inline(always)]
fn lanes(floats: &mut [f32]) -> &mut [f32; TILE] {
    floats.first_chunk_mut().expect("rows are padded to whole tiles")
}
