//! Attention of one row straight from the pool: with so few query vectors, gathering a tile first costs more than its
//! products. Every number is computed in the order of `products`, so that it is the same bit for bit.
#![expect(clippy::needless_range_loop, reason = "the index names the row")]

use super::TILE;
use super::cache::{Kept, PagedCache, by_block, place};
use super::context::{Half, Paged, Source};
use super::lanes::{HALF, Lanes};
use super::products::Strided;
use std::ops::Range;

/// Query vectors that are worth it.
pub(super) const FEW: usize = 4;

impl PagedCache {
    /// Whether halves of tiles lie within blocks, and values are whole tiles.
    pub(super) fn is_direct(&self) -> bool {
        self.layout.block_size.is_multiple_of(HALF) && self.layout.head_size.is_multiple_of(TILE)
    }
}

impl<T: Kept> Source for Paged<'_, T> {
    #[inline(always)]
    fn gather(&mut self, _: Half, _: Range<usize>) {}

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

impl<T: Kept> Paged<'_, T> {
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
        let layout = &self.cache.layout;
        let half = |position: usize| {
            // A tile that ends within its first half reads that twice.
            let position = if position < tile.end { position } else { tile.start };
            let block = self.blocks[position / layout.block_size];
            &self.pools.keys[place(layout, self.layer, block, self.head)][position % layout.block_size..]
        };
        let halves = [half(tile.start), half(tile.start + HALF)];
        let mut rows = [&x.floats[..0]; R];
        for (r, row) in rows.iter_mut().enumerate() {
            *row = &x.floats[r * x.stride..][..layout.head_size];
        }
        for first in (0..L::PARTS).step_by(P) {
            let mut sums = [[L::splat(0.0); P]; R];
            let keys = halves.map(|half| half.chunks(layout.block_size));
            let [left, right] = keys;
            for (d, (left, right)) in left.zip(right).take(layout.head_size).enumerate() {
                let mut x = [L::splat(0.0); R];
                for r in 0..R {
                    x[r] = L::splat(rows[r][d]);
                }
                let keys = [first_half(left), first_half(right)];
                for p in 0..P {
                    let keys = T::lanes::<L>(keys, first + p);
                    for r in 0..R {
                        sums[r][p] = sums[r][p].add_product(x[r], keys);
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
        let size = self.cache.layout.head_size;
        for (start, first) in
            (0..size).step_by(TILE).flat_map(|start| (0..L::PARTS).step_by(P).map(move |part| (start, part)))
        {
            let mut sums = [[L::splat(0.0); P]; R];
            for r in 0..R {
                for p in 0..P {
                    sums[r][p] = L::load(lanes(&mut y[r * stride + start..]), first + p);
                }
            }
            for (block, offset, run) in by_block(tile.clone(), self.cache.layout.block_size, self.blocks) {
                let values = &self.pools.values[place(&self.cache.layout, self.layer, block, self.head)];
                let mut weights = [&x.floats[..0]; R];
                for (r, weights) in weights.iter_mut().enumerate() {
                    *weights = &x.floats[r * x.stride + run.start - tile.start..][..run.len()];
                }
                let values = values[offset * size..].chunks_exact(size).take(run.len());
                for (i, value) in values.enumerate() {
                    let mut x = [L::splat(0.0); R];
                    for r in 0..R {
                        x[r] = L::splat(weights[r][i]);
                    }
                    let value = &value[start..];
                    let value = [first_half(value), first_half(&value[HALF..])];
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
                    sums[r][p].store(lanes(&mut y[r * stride + start..]), first + p);
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
fn first_half<T>(numbers: &[T]) -> &[T; HALF] {
    numbers.first_chunk().expect("blocks and heads are whole halves")
}

#[inline(always)]
fn lanes(floats: &mut [f32]) -> &mut [f32; TILE] {
    floats.first_chunk_mut().expect("rows are padded to whole tiles")
}
