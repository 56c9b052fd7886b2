//! What a sequence's rows see, as tiles that the kernel can read: contiguous f32, whatever lies behind them.

use super::super::Rows;
use super::super::ahead::{LINE, prefetch_near};
use super::super::vector::PANEL;
use super::TILE;
use super::block::QUERY;
use super::cache::{Halves, Kept, PagedCache, Pools, by_block, place};
use super::lanes::Lanes;
use super::products::{Strided, products};
use std::ops::Range;

/// One sequence's keys and values.
pub(super) enum Context<'a> {
    /// This step's own rows, from `first` on.
    Rows {
        k: &'a Rows,
        v: &'a Rows,
        first: usize,
    },
    Cache {
        cache: &'a PagedCache,
        layer: usize,
        blocks: &'a [u32],
    },
}

impl Context<'_> {
    /// Keys of one head at `positions`, at most a tile of them, to `tile [D][TILE]`; the other lanes get something.
    #[inline(always)]
    pub(super) fn keys(&self, head: usize, positions: Range<usize>, tile: &mut [[f32; TILE]]) {
        match self {
            Self::Rows { k, first, .. } => {
                let size = tile.len();
                for (lane, position) in positions.enumerate() {
                    let key = &k.row(first + position)[head * size..(head + 1) * size];
                    tile.iter_mut().zip(key).for_each(|(tile, &x)| tile[lane] = x);
                }
            }
            Self::Cache { cache, layer, blocks } => match &cache.pools {
                Pools::F32(pools) => {
                    Paged { cache, pools, layer: *layer, head, blocks }.keys(positions, tile);
                }
                Pools::Bf16(pools) => {
                    Paged { cache, pools, layer: *layer, head, blocks }.keys(positions, tile);
                }
            },
        }
    }

    /// Asks for what [`Self::keys`] or [`Self::values`] will read: blocks are scattered, so no processor can foresee it.
    #[inline(always)]
    pub(super) fn ask(&self, half: Half, head: usize, positions: Range<usize>) {
        if let Self::Cache { cache, layer, blocks } = self {
            match &cache.pools {
                Pools::F32(pools) => Paged { cache, pools, layer: *layer, head, blocks }.ask(half, positions),
                Pools::Bf16(pools) => {
                    Paged { cache, pools, layer: *layer, head, blocks }.ask(half, positions);
                }
            }
        }
    }

    /// Values of one head at `positions`, at most a tile of them, to `tile [panel of D][TILE][PANEL]`. Lanes of numbers
    /// beyond D stay as they are.
    #[inline(always)]
    pub(super) fn values(
        &self,
        head: usize,
        size: usize,
        positions: Range<usize>,
        tile: &mut [[f32; PANEL]],
    ) {
        match self {
            Self::Rows { v, first, .. } => {
                for (lane, position) in positions.enumerate() {
                    let value = &v.row(first + position)[head * size..(head + 1) * size];
                    put_value(value, lane, tile);
                }
            }
            Self::Cache { cache, layer, blocks } => match &cache.pools {
                Pools::F32(pools) => {
                    Paged { cache, pools, layer: *layer, head, blocks }.values(positions, tile);
                }
                Pools::Bf16(pools) => {
                    Paged { cache, pools, layer: *layer, head, blocks }.values(positions, tile);
                }
            },
        }
    }
}

/// What a block multiplies with, tile by tile.
pub(super) trait Source {
    /// Makes a tile ready to be read, and has the one that follows asked for.
    fn gather(&mut self, half: Half, tile: Range<usize>, next: (Half, Range<usize>));

    /// `y[r] = x[r] K^T` of so many rows; what stands in lanes beyond the tile's positions has no meaning.
    fn scores<L: Lanes>(&self, rows: usize, tile: Range<usize>, x: Strided<'_>, y: (&mut [f32], usize));

    /// `y[r] += x[r] V`; `depth` as in [`products`].
    fn weighted<L: Lanes>(
        &self,
        rows: usize,
        tile: Range<usize>,
        x: Strided<'_>,
        y: (&mut [f32], usize),
        depth: impl Fn(usize) -> usize,
    );
}

/// Tiles that are copied first, so that many rows read f32 in order.
pub(super) struct Gathered<'a> {
    pub(super) context: &'a Context<'a>,
    pub(super) head: usize,
    pub(super) size: usize,
    /// Floats between two parts of the queries.
    pub(super) queries: usize,
    pub(super) keys: &'a mut [[f32; TILE]],
    pub(super) values: &'a mut [[f32; PANEL]],
}

impl Source for Gathered<'_> {
    #[inline(always)]
    fn gather(&mut self, half: Half, tile: Range<usize>, next: (Half, Range<usize>)) {
        match half {
            Half::Keys => self.context.keys(self.head, tile, self.keys),
            Half::Values => self.context.values(self.head, self.size, tile, self.values),
        }
        self.context.ask(next.0, self.head, next.1);
    }

    #[inline(always)]
    fn scores<L: Lanes>(
        &self,
        rows: usize,
        _: Range<usize>,
        x: Strided<'_>,
        (y, stride): (&mut [f32], usize),
    ) {
        for (part, keys) in self.keys.chunks(QUERY).enumerate() {
            let x = Strided { floats: &x.floats[part * self.queries..], ..x };
            products::<L>(rows, keys, x, (&mut *y, stride), part > 0, |_| keys.len());
        }
    }

    #[inline(always)]
    fn weighted<L: Lanes>(
        &self,
        rows: usize,
        _: Range<usize>,
        x: Strided<'_>,
        (y, width): (&mut [f32], usize),
        depth: impl Fn(usize) -> usize,
    ) {
        for (panel, values) in self.values.chunks_exact(TILE).enumerate() {
            products::<L>(rows, values, x, (&mut y[panel * PANEL..], width), true, &depth);
        }
    }
}

/// Which half of the pool.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Half {
    Keys,
    Values,
}

#[inline(always)]
fn put_value<T: Kept>(value: &[T], lane: usize, tile: &mut [[f32; PANEL]]) {
    let (panels, rest) = value.as_chunks::<PANEL>();
    for (panel, value) in panels.iter().enumerate() {
        tile[panel * TILE + lane] = T::widen(value);
    }
    if !rest.is_empty() {
        put(rest, &mut tile[panels.len() * TILE + lane]);
    }
}

/// As many numbers as `from` has, eight at a time as long as there are.
#[inline(always)]
fn put<T: Kept>(from: &[T], to: &mut [f32]) {
    let ((eights, ones), (to_eights, to_ones)) = (from.as_chunks::<8>(), to.as_chunks_mut::<8>());
    for (to, from) in to_eights.iter_mut().zip(eights) {
        *to = T::widen(from);
    }
    let rest = to_eights.as_flattened_mut()[8 * eights.len()..].iter_mut().chain(to_ones);
    for (to, &from) in rest.zip(ones) {
        [*to] = T::widen(&[from]);
    }
}

/// One head of one sequence in the pool.
pub(super) struct Paged<'a, T> {
    pub(super) cache: &'a PagedCache,
    pub(super) pools: &'a Halves<T>,
    pub(super) layer: usize,
    pub(super) head: usize,
    pub(super) blocks: &'a [u32],
}

impl<T: Kept> Paged<'_, T> {
    #[inline(always)]
    fn ask(&self, half: Half, positions: Range<usize>) {
        for addresses in self.addresses(half, positions) {
            addresses.step_by(LINE).for_each(prefetch_near);
        }
    }

    /// Where a tile lies, block by block: whole blocks of keys, since they lie transposed. Nothing where blocks are larger than
    /// tiles, of which each number of a key would have a part.
    #[inline(always)]
    pub(super) fn addresses(
        &self,
        half: Half,
        tile: Range<usize>,
    ) -> impl Iterator<Item = Range<usize>> + '_ {
        let layout = &self.cache.layout;
        let tile = if layout.block_size > TILE { 0..0 } else { tile };
        by_block(tile, layout.block_size, self.blocks).map(move |(block, offset, run)| {
            let place = place(layout, self.layer, block, self.head);
            let numbers = match half {
                Half::Keys => &self.pools.keys[place],
                Half::Values => {
                    &self.pools.values[place][offset * layout.head_size..][..run.len() * layout.head_size]
                }
            };
            let Range { start, end } = numbers.as_ptr_range();
            start as usize..end as usize
        })
    }

    #[inline(always)]
    fn keys(&self, positions: Range<usize>, tile: &mut [[f32; TILE]]) {
        let layout = &self.cache.layout;
        // Whole blocks even where the sequence ends within one, so that the copies below have few sizes.
        let whole = positions.start..positions.start + TILE;
        for (block, offset, run) in by_block(whole, layout.block_size, self.blocks) {
            if run.start >= positions.end {
                break;
            }
            let block = &self.pools.keys[place(layout, self.layer, block, self.head)];
            let (from, to) = ((layout.block_size, offset), run.start - positions.start);
            match run.len() {
                TILE => put_keys::<T, TILE>(block, from, tile, to),
                16 => put_keys::<T, 16>(block, from, tile, to),
                8 => put_keys::<T, 8>(block, from, tile, to),
                1 => put_keys::<T, 1>(block, from, tile, to),
                count => {
                    for (tile, block) in tile.iter_mut().zip(block.chunks_exact(layout.block_size)) {
                        let keys = &block[offset..offset + count];
                        put(keys, &mut tile[to..to + count]);
                    }
                }
            }
        }
    }

    #[inline(always)]
    fn values(&self, positions: Range<usize>, tile: &mut [[f32; PANEL]]) {
        let layout = &self.cache.layout;
        let (start, size) = (positions.start, layout.head_size);
        for (block, offset, run) in by_block(positions, layout.block_size, self.blocks) {
            let block = &self.pools.values[place(layout, self.layer, block, self.head)];
            let values = block[offset * size..].chunks_exact(size);
            for (value, position) in values.zip(run) {
                put_value(value, position - start, tile);
            }
        }
    }
}

/// `N` positions of a block `[D][block_size]`, from `offset` on, to lanes `to..` of the tile.
#[inline(always)]
fn put_keys<T: Kept, const N: usize>(
    block: &[T],
    (block_size, offset): (usize, usize),
    tile: &mut [[f32; TILE]],
    to: usize,
) {
    for (tile, block) in tile.iter_mut().zip(block.chunks_exact(block_size)) {
        let keys: Option<&[T; N]> = block[offset..].first_chunk();
        if let (Some(keys), Some(tile)) = (keys, tile[to..].first_chunk_mut::<N>()) {
            *tile = T::widen(keys);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::CacheLayout;
    use crate::backend::cpu::KvDtype;

    #[test]
    fn what_comes_is_where_the_tile_lies() {
        let layout = CacheLayout { layers: 2, kv_heads: 3, head_size: 32, blocks: 4, block_size: 16 };
        let cache = PagedCache::new(layout, KvDtype::F32).expect("a pool of this size");
        let Pools::F32(pools) = &cache.pools else { panic!("f32 was asked for") };
        let paged = Paged { cache: &cache, pools, layer: 1, head: 2, blocks: &[3, 0, 2] };
        let place = |block: u32| place(&layout, 1, block, 2).start;
        let bytes = |of: &[f32], at: usize, count: usize| {
            let start = of[at..at + count].as_ptr() as usize;
            start..start + count * size_of::<f32>()
        };
        let addresses = |half, tile| paged.addresses(half, tile).collect::<Vec<_>>();
        let (keys, values, block) = (&*pools.keys, &*pools.values, 16 * 32);
        let whole = [bytes(keys, place(3), block), bytes(keys, place(0), block)];
        assert_eq!(addresses(Half::Keys, 0..32), whole);
        // Five positions of the third block: all of its keys, which lie transposed, and as many values.
        assert_eq!(addresses(Half::Keys, 32..37), [bytes(keys, place(2), block)]);
        assert_eq!(addresses(Half::Values, 32..37), [bytes(values, place(2), 5 * 32)]);
        assert!(addresses(Half::Values, 37..37).is_empty());
    }
}
