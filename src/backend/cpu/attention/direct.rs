//! Attention of one row straight from the pool: with so few query vectors, gathering a tile first costs more than its
//! products. Every number is computed in the order of `products`, so that it is the same bit for bit.
#![expect(clippy::needless_range_loop, reason = "the index names the row")]

use super::TILE;
use super::cache::{Kept, place};
use super::context::Paged;
use super::lanes::{HALF, Lanes};
use super::products::Strided;
use std::ops::Range;

/// Query vectors that are worth it.
pub(super) const FEW: usize = 4;

impl<T: Kept> Paged<'_, T> {
    /// Whether halves of tiles lie within blocks, and values are whole tiles.
    pub(super) fn is_direct(&self) -> bool {
        self.cache.layout.block_size.is_multiple_of(HALF) && self.cache.layout.head_size.is_multiple_of(TILE)
    }

    /// `y[r] = x[r] K^T` for the positions of one tile; what stands in lanes beyond them has no meaning.
    #[inline(always)]
    pub(super) fn scores<L: Lanes>(
        &self,
        rows: usize,
        tile: Range<usize>,
        x: Strided<'_>,
        y: (&mut [f32], usize),
    ) {
        match rows {
            1 => self.some_scores::<L, 1>(tile, x, y),
            2 => self.some_scores::<L, 2>(tile, x, y),
            3 => self.some_scores::<L, 3>(tile, x, y),
            _ => self.some_scores::<L, FEW>(tile, x, y),
        }
    }

    #[inline(always)]
    fn some_scores<L: Lanes, const R: usize>(
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
        for part in 0..L::PARTS {
            let mut sums = [L::splat(0.0); R];
            for d in 0..layout.head_size {
                let keys = T::lanes::<L>(halves.map(|half| first_half(&half[d * layout.block_size..])), part);
                for r in 0..R {
                    sums[r] = sums[r].add_product(L::splat(x.floats[r * x.stride + d]), keys);
                }
            }
            for r in 0..R {
                sums[r].store(lanes(&mut y[r * stride..]), part);
            }
        }
    }

    /// `y[r] += x[r] V` over the positions of one tile.
    #[inline(always)]
    pub(super) fn weighted<L: Lanes>(
        &self,
        rows: usize,
        tile: Range<usize>,
        x: Strided<'_>,
        y: (&mut [f32], usize),
    ) {
        match rows {
            1 => self.some_weighted::<L, 1>(tile, x, y),
            2 => self.some_weighted::<L, 2>(tile, x, y),
            3 => self.some_weighted::<L, 3>(tile, x, y),
            _ => self.some_weighted::<L, FEW>(tile, x, y),
        }
    }

    #[inline(always)]
    fn some_weighted<L: Lanes, const R: usize>(
        &self,
        tile: Range<usize>,
        x: Strided<'_>,
        (y, stride): (&mut [f32], usize),
    ) {
        let layout = &self.cache.layout;
        let size = layout.head_size;
        for start in (0..size).step_by(TILE) {
            for part in 0..L::PARTS {
                let mut sums = [L::splat(0.0); R];
                for r in 0..R {
                    sums[r] = L::load(lanes(&mut y[r * stride + start..]), part);
                }
                let mut position = tile.start;
                while position < tile.end {
                    let block = self.blocks[position / layout.block_size];
                    let offset = position % layout.block_size;
                    let count = (layout.block_size - offset).min(tile.end - position);
                    let values = &self.pools.values[place(layout, self.layer, block, self.head)];
                    for i in 0..count {
                        let value = &values[(offset + i) * size + start..];
                        let value = T::lanes::<L>([first_half(value), first_half(&value[HALF..])], part);
                        for r in 0..R {
                            let weight = x.floats[r * x.stride + position + i - tile.start];
                            sums[r] = sums[r].add_product(L::splat(weight), value);
                        }
                    }
                    position += count;
                }
                for r in 0..R {
                    sums[r].store(lanes(&mut y[r * stride + start..]), part);
                }
            }
        }
    }
}

#[inline(always)]
fn first_half<T>(numbers: &[T]) -> &[T; HALF] {
    numbers.first_chunk().expect("blocks and heads are whole halves")
}

#[inline(always)]
fn lanes(floats: &mut [f32]) -> &mut [f32; TILE] {
    floats.first_chunk_mut().expect("rows are padded to whole tiles")
}
