//! Softmax attention of a block of rows: the query heads that share a key-value head, of several rows of one sequence.
//!
//! Positions are cut into tiles and stretches at fixed absolute places. Within a stretch all scores are known before
//! the softmax; stretches are joined one after the other. What a row gets from a stretch depends on the row and the
//! stretch only, so it is the same whichever rows are in its block and however stretches are shared among threads.
#![allow(unsafe_code)]

use super::super::Rows;
use super::super::ahead::Ahead;
use super::super::kernel::{Kernel, Loops};
use super::super::rows::exp;
use super::super::vector::PANEL;
use super::cache::Pools;
use super::context::{Context, Gathered, Half, Paged, Source};
use super::direct::{Direct, FEW};
#[cfg(target_arch = "x86_64")]
use super::lanes::{Avx2, Avx512};
use super::lanes::{Lanes, Portable};
use super::products::{Strided, softmax};
use super::{STRETCH, TILE};
use crate::backend::Sight;
use std::ops::Range;

/// Floats between two query vectors' scores: more than a stretch, since rows that lie a power of two apart fall into the
/// same few places of the cache.
const SCORES: usize = STRETCH + TILE;

/// Floats between two query vectors, and how many of their numbers lie together: a constant, so that the products' loops need
/// one address for all rows (one thread, 256 rows of SmolLM2-135M after 256 others, Sapphire Rapids: 0.93 of the time). Of a
/// larger head what comes after so many numbers lies behind those of all vectors.
pub(super) const QUERY: usize = SCORES;

/// The score of a position that a row does not see any more. Finite, since a stretch can have no other: it is then joined to one
/// that has, beside which it counts as nothing.
const HIDDEN: f32 = -1e30;

/// Cache lines of the next weights that are asked for with each tile: what memory delivers meanwhile.
const LINES: usize = 32;

/// A block of rows under one key-value head. Its query vectors are numbered row by row, within a row by query head.
pub(super) struct Block<'a> {
    pub(super) context: Context<'a>,
    /// Weights that are asked for meanwhile: attention leaves memory idle.
    pub(super) ahead: &'a Ahead,
    pub(super) q: &'a Rows,
    pub(super) rows: Range<usize>,
    /// The first row's position; each other row is one after the row before it.
    pub(super) own: usize,
    /// Positions of its sequence.
    pub(super) end: usize,
    pub(super) sight: Sight,
    /// By query head, what a position of distance costs; empty if nothing.
    pub(super) slopes: &'a [f32],
    /// The key-value head.
    pub(super) head: usize,
    /// Query heads that share it.
    pub(super) group: usize,
    pub(super) head_size: usize,
}

/// What a block's query vectors have got from some positions: `n` sums of weighted values, each as wide as the padded
/// head, then `n` largest scores, then `n` sums of weights.
pub(super) struct Part<'a> {
    sums: &'a mut [f32],
    largest: &'a mut [f32],
    weights: &'a mut [f32],
}

impl<'a> Part<'a> {
    /// Floats of a part.
    pub(super) fn floats(vectors: usize, head_size: usize) -> usize {
        vectors * (head_size.next_multiple_of(PANEL) + 2)
    }

    pub(super) fn of(floats: &'a mut [f32], vectors: usize, head_size: usize) -> Self {
        let (sums, rest) = floats.split_at_mut(vectors * head_size.next_multiple_of(PANEL));
        let (largest, rest) = rest.split_at_mut(vectors);
        Self { sums, largest, weights: &mut rest[..vectors] }
    }
}

/// Takes in what the query vectors from `first` on have got from later positions.
pub(super) struct Join<'a, 'p, 'q> {
    pub(super) all: &'a mut Part<'p>,
    pub(super) later: &'a Part<'q>,
    pub(super) first: usize,
}

impl Loops for Join<'_, '_, '_> {
    #[inline(always)]
    fn run(self) {
        let Self { all, later, first } = self;
        let width = all.sums.len() / all.largest.len();
        for i in first..all.largest.len() {
            let largest = if later.largest[i] > all.largest[i] { later.largest[i] } else { all.largest[i] };
            let [own, other] = [all.largest[i], later.largest[i]].map(|l| exp(l - largest));
            all.largest[i] = largest;
            all.weights[i] = all.weights[i] * own + later.weights[i] * other;
            let of_vector = i * width..(i + 1) * width;
            for (sum, later) in all.sums[of_vector.clone()].iter_mut().zip(&later.sums[of_vector]) {
                *sum = *sum * own + later * other;
            }
        }
    }
}

/// The finished attention of one query vector.
pub(super) struct Finish<'a, 'p> {
    pub(super) part: &'a Part<'p>,
    pub(super) vector: usize,
    pub(super) output: &'a mut [f32],
}

impl Loops for Finish<'_, '_> {
    #[inline(always)]
    fn run(self) {
        let Self { part, vector, output } = self;
        let width = part.sums.len() / part.largest.len();
        let share = 1.0 / part.weights[vector];
        for (y, sum) in output.iter_mut().zip(&part.sums[vector * width..]) {
            *y = sum * share;
        }
    }
}

/// Buffers of one thread.
#[derive(Default)]
pub(super) struct Scratch {
    /// `[part of D][vector][QUERY]`, scaled.
    q: Vec<f32>,
    /// `[vector][SCORES]`
    scores: Vec<f32>,
    /// `[D][TILE]`
    keys: Vec<[f32; TILE]>,
    /// `[panel of D][TILE][PANEL]`
    values: Vec<[f32; PANEL]>,
}

impl Scratch {
    /// Room for blocks of up to so many query vectors. Whatever other blocks have left in it, each fills anew what it reads.
    pub(super) fn fit(&mut self, vectors: usize, head_size: usize) {
        let Self { q, scores, keys, values } = self;
        q.resize(q.len().max(vectors * head_size.next_multiple_of(QUERY)), 0.0);
        scores.resize(scores.len().max(vectors * SCORES), 0.0);
        keys.resize(head_size, [0.0; TILE]);
        values.resize(head_size.div_ceil(PANEL) * TILE, [0.0; PANEL]);
    }
}

impl Block<'_> {
    pub(super) fn vectors(&self) -> usize {
        self.rows.len() * self.group
    }

    /// How many positions the last row sees.
    pub(super) fn end(&self) -> usize {
        self.seen_by(self.vectors() - 1)
    }

    /// The first query vector that sees a position; those after it do as well.
    pub(super) fn first(&self, position: usize) -> usize {
        let rows = match self.sight {
            Sight::All => 0,
            Sight::Past | Sight::Window(_) => position.saturating_sub(self.own),
        };
        (rows * self.group).min(self.vectors())
    }

    /// How many positions of a query vector's context there are.
    fn seen_by(&self, vector: usize) -> usize {
        match self.sight {
            Sight::All => self.end,
            Sight::Past | Sight::Window(_) => self.own + vector / self.group + 1,
        }
    }

    /// Attention over some stretches, to `into`; those after the first come by `spare`. Both are floats of a [`Part`].
    pub(super) fn attend(
        &self,
        kernel: Kernel,
        stretches: Range<usize>,
        scratch: &mut Scratch,
        into: &mut [f32],
        spare: &mut [f32],
    ) {
        match kernel {
            Kernel::Portable => self.join_stretches::<Portable>(stretches, scratch, into, spare),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `Kernel::available` has seen these instructions on this processor.
            Kernel::Avx2 => unsafe { attend_avx2(self, stretches, scratch, into, spare) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `Kernel::available` has seen these instructions on this processor.
            Kernel::Avx512 | Kernel::Avx512Bf16 => unsafe {
                attend_avx512(self, stretches, scratch, into, spare);
            },
            #[cfg(not(target_arch = "x86_64"))]
            _ => self.join_stretches::<Portable>(stretches, scratch, into, spare),
        }
    }

    #[inline(always)]
    fn join_stretches<L: Lanes>(
        &self,
        stretches: Range<usize>,
        scratch: &mut Scratch,
        into: &mut [f32],
        spare: &mut [f32],
    ) {
        let (vectors, size) = (self.vectors(), self.head_size);
        let columns = self.head * self.group * size..(self.head + 1) * self.group * size;
        // So that scores need no scaling: for head sizes that are powers of four this is exact.
        let scale = 1.0 / (size as f32).sqrt();
        for (i, row) in self.rows.clone().enumerate() {
            for (n, q) in self.q.row(row)[columns.clone()].chunks_exact(size).enumerate() {
                for (part, q) in q.chunks(QUERY).enumerate() {
                    let at = (part * vectors + i * self.group + n) * QUERY;
                    scratch.q[at..].iter_mut().zip(q).for_each(|(to, q)| *to = q * scale);
                }
            }
        }
        for stretch in stretches.clone() {
            let is_first = stretch == stretches.start;
            // One call for both, since it becomes thousands of instructions.
            let floats = if is_first { &mut *into } else { &mut *spare };
            self.stretch::<L>(stretch, scratch, &mut Part::of(floats, vectors, size));
            if !is_first {
                let (mut all, later) = (Part::of(into, vectors, size), Part::of(spare, vectors, size));
                Join { all: &mut all, later: &later, first: self.first(stretch * STRETCH) }.run();
            }
        }
    }

    /// Attention over one stretch, of the query vectors that see it.
    #[inline(always)]
    fn stretch<L: Lanes>(&self, stretch: usize, scratch: &mut Scratch, part: &mut Part<'_>) {
        let positions = stretch * STRETCH..((stretch + 1) * STRETCH).min(self.end());
        let Scratch { q, scores, keys, values } = scratch;
        match &self.context {
            Context::Cache { cache, layer, blocks }
                if self.rows.len() == 1 && self.group <= FEW && cache.is_direct(QUERY) =>
            {
                let (layer, head) = (*layer, self.head);
                match &cache.pools {
                    Pools::F32(pools) => {
                        let paged = Paged { cache, pools, layer, head, blocks };
                        self.tiles::<L>(positions, Direct::new(paged), (q, scores), part);
                    }
                    Pools::Bf16(pools) => {
                        let paged = Paged { cache, pools, layer, head, blocks };
                        self.tiles::<L>(positions, Direct::new(paged), (q, scores), part);
                    }
                }
            }
            context => {
                let (head, size, queries) = (self.head, self.head_size, self.vectors() * QUERY);
                let gathered = Gathered { context, head, size, queries, keys, values };
                self.tiles::<L>(positions, gathered, (q, scores), part);
            }
        }
    }

    /// What a vector's scores of positions from `first` on lose by their distance.
    #[inline(always)]
    fn by_distance(&self, vector: usize, first: usize, scores: &mut [f32]) {
        let own = self.own + vector / self.group;
        if let Some(slope) = self.slopes.get(vector % self.group) {
            let nearest = first as f32 - own as f32;
            for (i, score) in scores.iter_mut().enumerate() {
                *score += slope * (nearest + i as f32);
            }
        }
        if let Sight::Window(width) = self.sight {
            let hidden = (own + 1).saturating_sub(width).saturating_sub(first).min(scores.len());
            scores[..hidden].fill(HIDDEN);
        }
    }

    /// The tiles of a stretch, by queries and scores of the scratch.
    #[inline(always)]
    fn tiles<L: Lanes>(
        &self,
        positions: Range<usize>,
        mut source: impl Source,
        (q, scores): (&[f32], &mut [f32]),
        part: &mut Part<'_>,
    ) {
        let (vectors, width) = (self.vectors(), self.head_size.next_multiple_of(PANEL));
        let tiles = || positions.clone().step_by(TILE).map(|start| start..positions.end.min(start + TILE));
        let after = |end: usize| end..positions.end.min(end + TILE);
        for tile in tiles() {
            self.ahead.ask(LINES);
            let next = match after(tile.end) {
                next if next.is_empty() => (Half::Values, after(positions.start)),
                next => (Half::Keys, next),
            };
            source.gather(Half::Keys, tile.clone(), next);
            let (first, at) = (self.first(tile.start), tile.start - positions.start);
            let x = Strided { floats: &q[first * QUERY..], stride: QUERY };
            let y = &mut scores[first * SCORES + at..];
            source.scores::<L>(vectors - first, tile, x, (y, SCORES));
        }
        let first = self.first(positions.start);
        for i in first..vectors {
            let seen = self.seen_by(i).min(positions.end) - positions.start;
            let scores = &mut scores[i * SCORES..][..seen.next_multiple_of(TILE)];
            self.by_distance(i, positions.start, &mut scores[..seen]);
            (part.largest[i], part.weights[i]) = softmax::<L>(scores, seen);
        }
        part.sums[first * width..].fill(0.0);
        for tile in tiles() {
            self.ahead.ask(LINES);
            // After the last tile, the keys of the next stretch.
            let next = match after(tile.end) {
                next if next.is_empty() => (Half::Keys, tile.end..self.end().min(tile.end + TILE)),
                next => (Half::Values, next),
            };
            source.gather(Half::Values, tile.clone(), next);
            let (first, at) = (self.first(tile.start), tile.start - positions.start);
            let x = Strided { floats: &scores[first * SCORES + at..], stride: SCORES };
            let y = (&mut part.sums[first * width..], width);
            let depth = |last: usize| self.seen_by(first + last).min(tile.end) - tile.start;
            source.weighted::<L>(vectors - first, tile.clone(), x, y, depth);
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn attend_avx2(
    block: &Block<'_>,
    stretches: Range<usize>,
    scratch: &mut Scratch,
    into: &mut [f32],
    spare: &mut [f32],
) {
    block.join_stretches::<Avx2>(stretches, scratch, into, spare);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx2,fma")]
fn attend_avx512(
    block: &Block<'_>,
    stretches: Range<usize>,
    scratch: &mut Scratch,
    into: &mut [f32],
    spare: &mut [f32],
) {
    block.join_stretches::<Avx512>(stretches, scratch, into, spare);
}
