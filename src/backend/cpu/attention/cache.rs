//! The paged key-value pool: how it is laid out, checked and written.
//!
//! Keys lie transposed within a block, so that the positions of a tile fill registers; values by position, so that the
//! numbers of a value do. It knows nothing of scores; `context.rs` reads it.
#![allow(unsafe_code)]

use super::super::inputs::rounded;
use super::super::kernel::Loops;
use super::super::memory::Zeroed;
use super::super::shared::Shared;
use super::super::{Cpu, Rows, expect};
use super::lanes::{HALF, Lanes};
use crate::backend::{AttentionShape, BackendError, CacheLayout, SequenceSpan};
use bytemuck::Pod;
use std::ops::Range;

/// Rows from which on all threads write.
const ROWS_FOR_THREADS: usize = 8;

/// How the key-value pool keeps its numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum KvDtype {
    #[default]
    F32,
    /// Rounded to the nearest when written: half the bytes to read at a long context.
    Bf16,
}

/// Keys and values of all layers.
pub struct PagedCache {
    pub(super) layout: CacheLayout,
    pub(super) pools: Pools,
}

pub(super) enum Pools {
    F32(Halves<f32>),
    Bf16(Halves<u16>),
}

pub(super) struct Halves<T> {
    /// `[block][layer][kv head][D][position]`: what a sequence has of all layers lies in few large pages.
    pub(super) keys: Zeroed<T>,
    /// `[block][layer][kv head][position][D]`
    pub(super) values: Zeroed<T>,
}

/// A number as the pool keeps it; a bf16 as its bits, which are half of those of the f32.
pub(super) trait Kept: Pod + Send + Sync {
    fn keep(x: f32) -> Self;
    fn widen<const N: usize>(from: &[Self; N]) -> [f32; N];
    /// One part of a tile in two halves.
    fn lanes<L: Lanes>(halves: [&[Self; HALF]; 2], part: usize) -> L;
}

impl Kept for f32 {
    #[inline(always)]
    fn keep(x: f32) -> Self {
        x
    }

    #[inline(always)]
    fn widen<const N: usize>(from: &[f32; N]) -> [f32; N] {
        *from
    }

    #[inline(always)]
    fn lanes<L: Lanes>(halves: [&[f32; HALF]; 2], part: usize) -> L {
        L::load_halves(halves, part)
    }
}

impl Kept for u16 {
    #[inline(always)]
    fn keep(x: f32) -> Self {
        (rounded(x) >> 16) as u16
    }

    #[inline(always)]
    fn widen<const N: usize>(from: &[u16; N]) -> [f32; N] {
        let mut bits = [0; N];
        for (bits, &x) in bits.iter_mut().zip(from) {
            *bits = u32::from(x) << 16;
        }
        let mut widened = [0.0; N];
        for (x, bits) in widened.iter_mut().zip(bits) {
            *x = f32::from_bits(bits);
        }
        widened
    }

    #[inline(always)]
    fn lanes<L: Lanes>(halves: [&[u16; HALF]; 2], part: usize) -> L {
        L::widen_halves(halves, part)
    }
}

impl PagedCache {
    pub(in super::super) fn new(layout: CacheLayout, dtype: KvDtype) -> Result<Self, BackendError> {
        let pools = match dtype {
            KvDtype::F32 => Pools::F32(Halves::new(&layout)?),
            KvDtype::Bf16 => Pools::Bf16(Halves::new(&layout)?),
        };
        Ok(Self { layout, pools })
    }

    pub(in super::super) fn bytes(&self) -> usize {
        match &self.pools {
            Pools::F32(pools) => pools.bytes(),
            Pools::Bf16(pools) => pools.bytes(),
        }
    }

    /// Whether the span's blocks and this layer are in the pool, and heads are what it was made for.
    pub(super) fn check(
        &self,
        layer: usize,
        shape: &AttentionShape,
        span: &SequenceSpan,
    ) -> Result<(), BackendError> {
        let CacheLayout { layers, kv_heads, head_size, blocks, block_size } = self.layout;
        expect("attention", "key-value heads as in the pool", kv_heads, shape.kv_heads)?;
        expect("attention", "numbers in a head as in the pool", head_size, shape.head_size)?;
        let needed = (span.start + span.rows.len()).div_ceil(block_size);
        let inside = span.blocks.iter().all(|&b| (b as usize) < blocks);
        if layer < layers && inside && span.blocks.len() >= needed {
            return Ok(());
        }
        Err(BackendError::Shape {
            operation: "attention",
            expected: format!("{needed} blocks below {blocks}, a layer below {layers}"),
            got: format!("blocks {:?}, layer {layer}", span.blocks),
        })
    }

    /// Writes the spans' rows, in the order of the spans.
    pub(super) fn write(&mut self, cpu: &Cpu, layer: usize, spans: &[SequenceSpan], k: &Rows, v: &Rows) {
        let new = New { layout: self.layout, layer, spans, k, v };
        match &mut self.pools {
            Pools::F32(pools) => pools.write(cpu, &new),
            Pools::Bf16(pools) => pools.write(cpu, &new),
        }
    }
}

/// The numbers of `(layer, block, head)` among all keys, and among all values.
pub(super) fn place(layout: &CacheLayout, layer: usize, block: u32, head: usize) -> Range<usize> {
    let size = layout.block_size * layout.head_size;
    let start = ((block as usize * layout.layers + layer) * layout.kv_heads + head) * size;
    start..start + size
}

/// Positions cut where blocks end: block, where in the block, positions.
pub(super) fn by_block(
    positions: Range<usize>,
    block_size: usize,
    blocks: &[u32],
) -> impl Iterator<Item = (u32, usize, Range<usize>)> + '_ {
    let blocks = blocks.iter().enumerate().skip(positions.start / block_size);
    blocks.map_while(move |(i, &block)| {
        let start = positions.start.max(i * block_size);
        let end = positions.end.min((i + 1) * block_size);
        (start < end).then_some((block, start - i * block_size, start..end))
    })
}

/// A step's keys and values of one layer on their way into the pool.
struct New<'a> {
    layout: CacheLayout,
    layer: usize,
    spans: &'a [SequenceSpan],
    k: &'a Rows,
    v: &'a Rows,
}

impl<T: Kept> Halves<T> {
    fn bytes(&self) -> usize {
        size_of_val(&*self.keys) + size_of_val(&*self.values)
    }

    fn new(layout: &CacheLayout) -> Result<Self, BackendError> {
        let CacheLayout { layers, kv_heads, head_size, blocks, block_size } = *layout;
        let numbers = [layers, kv_heads, head_size, blocks, block_size];
        let numbers = numbers.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
        let memory = || BackendError::Memory {
            what: "the key-value pool".into(),
            bytes: numbers.map_or(usize::MAX, |n| n.saturating_mul(2 * size_of::<T>())),
        };
        let pool = || Zeroed::new("the key-value pool", numbers.ok_or_else(memory)?).map_err(|_| memory());
        Ok(Self { keys: pool()?, values: pool()? })
    }

    fn write(&mut self, cpu: &Cpu, new: &New<'_>) {
        let (keys, values) = (Shared::new(&mut self.keys), Shared::new(&mut self.values));
        // Cut by head, since blocks can be written by several spans, whose order must hold.
        let write = |piece| cpu.kernel.vectorised(Piece { new, piece, keys: &keys, values: &values });
        let (pieces, rows) = (2 * new.layout.kv_heads, new.k.len());
        match rows {
            ROWS_FOR_THREADS.. => cpu.each(pieces, write),
            _ => (0..pieces).for_each(write),
        }
    }
}

/// A head's keys or its values.
struct Piece<'a, T> {
    new: &'a New<'a>,
    piece: usize,
    keys: &'a Shared<'a, T>,
    values: &'a Shared<'a, T>,
}

impl<T: Kept> Loops for Piece<'_, T> {
    #[inline(always)]
    fn run(self) {
        let Self { new, piece, keys, values } = self;
        let (layout, head, is_keys) = (&new.layout, piece / 2, piece.is_multiple_of(2));
        for span in new.spans {
            let positions = span.start..span.start + span.rows.len();
            for (block, offset, run) in by_block(positions, layout.block_size, &span.blocks) {
                let place = place(layout, new.layer, block, head);
                let first = span.rows.start + run.start - span.start;
                let rows = first..first + run.len();
                if is_keys {
                    // SAFETY: this piece alone has this head's keys.
                    new.keys(head, rows, offset, unsafe { keys.part(place) });
                } else {
                    // SAFETY: this piece alone has this head's values.
                    new.values(head, rows, offset, unsafe { values.part(place) });
                }
            }
        }
    }
}

impl New<'_> {
    #[inline(always)]
    fn keys<T: Kept>(&self, head: usize, rows: Range<usize>, offset: usize, block: &mut [T]) {
        let size = self.layout.head_size;
        for (position, row) in (offset..).zip(rows) {
            let key = &self.k.row(row)[head * size..(head + 1) * size];
            for (to, &x) in block.chunks_exact_mut(self.layout.block_size).zip(key) {
                to[position] = T::keep(x);
            }
        }
    }

    #[inline(always)]
    fn values<T: Kept>(&self, head: usize, rows: Range<usize>, offset: usize, block: &mut [T]) {
        let size = self.layout.head_size;
        for (row, value) in rows.zip(block[offset * size..].chunks_exact_mut(size)) {
            let of_head = &self.v.row(row)[head * size..(head + 1) * size];
            for (to, &x) in value.iter_mut().zip(of_head) {
                *to = T::keep(x);
            }
        }
    }
}
