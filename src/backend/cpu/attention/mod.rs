//! Attention of a step: what is done by whom. `cache` writes keys and values, `context` reads them tile by tile,
//! `block` computes, by `products` of `lanes`.
//!
//! Work is cut into blocks of rows under one key-value head, so that every tile of keys and values that is read serves
//! all query heads that share it and several rows. Where a sequence has few rows and a long context, as in decoding,
//! each stretch of the context is a piece of work of its own, and a second phase joins them.
#![allow(unsafe_code)]

mod block;
mod cache;
mod context;
mod direct;
mod lanes;
mod products;
#[cfg(test)]
mod tests;

pub use cache::{KvDtype, PagedCache};

use super::ahead::Ahead;
use super::shared::Shared;
use super::vector::PANEL;
use super::{Cpu, Rows, expect};
use crate::backend::{AttentionShape, BackendError, SequenceSpan, Sight, alibi_slopes};
use block::{Block, Finish, Join, Part, Scratch};
use context::Context;
use std::cell::RefCell;
use std::cmp::Reverse;
use std::ops::Range;

/// Positions that are read together: the lanes of a vector.
const TILE: usize = PANEL;
/// Positions that share one softmax, and the least that a thread takes of a long context; whole tiles.
const STRETCH: usize = 256;
/// Query vectors of a block, at most: enough that gathering a tile costs little beside its products, few enough that
/// their scores stay in the second-level cache. At least, where there are threads that would have nothing to do.
const VECTORS: [usize; 2] = [96, 24];
/// Positions, of all pieces together, that one thread has read before another could have been told to help.
const ALONE: usize = 128;

pub(super) fn attention(
    cpu: &Cpu,
    q: &Rows,
    k: &Rows,
    v: &Rows,
    shape: &AttentionShape,
    spans: &[SequenceSpan],
    kept: &[usize],
    mut cache: Option<(&mut PagedCache, usize)>,
) -> Result<Rows, BackendError> {
    let AttentionShape { query_heads, kv_heads, head_size, .. } = *shape;
    expect("attention", "query columns", query_heads * head_size, q.width())?;
    expect("attention", "key columns", kv_heads * head_size, k.width())?;
    expect("attention", "value columns", kv_heads * head_size, v.width())?;
    expect("attention", "keys", q.len(), k.len())?;
    expect("attention", "values", q.len(), v.len())?;
    if !kept.is_empty() {
        expect("attention", "spans whose heads are known", spans.len(), kept.len())?;
    }
    let mut end = 0;
    for span in spans {
        expect("attention", "rows", span.rows.end, span.rows.end.min(q.len()))?;
        // Each span's rows are written by threads of their own.
        expect("attention", "as the first row of a span, or later", end, end.min(span.rows.start))?;
        end = span.rows.end.max(end);
        match &cache {
            Some(_) if shape.sight == Sight::All => {
                expect("attention", "caches where rows see what follows", 0, 1)?;
            }
            Some((cache, layer)) => cache.check(*layer, shape, span)?,
            None => expect("attention", "cached positions without a cache", 0, span.start)?,
        }
    }
    if let Some((cache, layer)) = &mut cache {
        cache.write(cpu, *layer, spans, k, v);
    }
    let slopes = if shape.alibi { alibi_slopes(query_heads) } else { Vec::new() };
    let cache = cache.map(|(cache, layer)| (&*cache, layer));
    let step = Step { cpu, q, k, v, shape, slopes: &slopes, spans, cache };
    Ok(step.run(&Plan::new(shape, (q.len(), spans), kept, cpu.threads)))
}

/// Rows of one span under one key-value head.
#[derive(Clone)]
struct BlockPlace {
    span: usize,
    rows: Range<usize>,
    head: usize,
}

/// Some stretches of what a block's rows see.
struct Piece {
    block: BlockPlace,
    stretches: Range<usize>,
    /// About so many scores for each query head.
    scores: usize,
    /// Where its part goes, if others are joined with it later; else it is the whole.
    part: Option<Range<usize>>,
}

/// A block whose stretches are pieces of their own.
struct Joining {
    block: BlockPlace,
    /// Its parts, one behind the other.
    parts: Range<usize>,
}

struct Plan {
    pieces: Vec<Piece>,
    joins: Vec<Joining>,
    /// Floats of all parts.
    parts: usize,
    /// Query vectors of the largest block.
    vectors: usize,
    /// Whether every head of every row has a piece.
    is_whole: bool,
}

impl Plan {
    /// How work is cut for so many threads changes no result. Heads that a span has not `kept` have no piece: zeros are
    /// what its output begins with.
    fn new(
        shape: &AttentionShape,
        (length, spans): (usize, &[SequenceSpan]),
        kept: &[usize],
        threads: usize,
    ) -> Self {
        let group = shape.query_heads / shape.kv_heads;
        // Spans are one after the other.
        let rows = spans.iter().map(|span| span.rows.len()).sum::<usize>();
        let is_whole = rows == length && kept.iter().all(|&kept| kept >= shape.kv_heads);
        let mut plan = Self { pieces: Vec::new(), joins: Vec::new(), parts: 0, vectors: 0, is_whole };
        let [most, least] = VECTORS.map(|vectors| (vectors / group).max(1));
        let pieces = |rows: usize| -> usize {
            spans.iter().map(|span| shape.kv_heads * span.rows.len().div_ceil(rows)).sum()
        };
        let enough = |&rows: &usize| rows <= least || pieces(rows) >= 4 * threads;
        let seen = |span: &SequenceSpan, rows: &Range<usize>| match shape.sight {
            Sight::All => span.rows.len(),
            Sight::Past | Sight::Window(_) => span.start + rows.end - span.rows.start,
        };
        let scores =
            spans.iter().map(|span| shape.kv_heads * span.rows.len() * seen(span, &span.rows)).sum::<usize>();
        let rows_together = (0..).map(|halvings| most >> halvings).find(enough).unwrap_or(least).max(1);
        for (index, span) in spans.iter().enumerate() {
            for start in span.rows.clone().step_by(rows_together) {
                let rows = start..span.rows.end.min(start + rows_together);
                plan.vectors = plan.vectors.max(rows.len() * group);
                let seen = seen(span, &rows);
                let stretches = seen.div_ceil(STRETCH);
                // A piece of no more than this leaves all threads enough to take.
                let large = 4 * threads * rows.len() * seen > scores;
                let split = large && stretches > 1 && span.rows.len() <= rows_together;
                let heads = kept.get(index).map_or(shape.kv_heads, |&kept| kept.min(shape.kv_heads));
                for head in 0..heads {
                    let block = BlockPlace { span: index, rows: rows.clone(), head };
                    if split {
                        plan.split(block, seen, Part::floats(rows.len() * group, shape.head_size));
                    } else {
                        let scores = rows.len() * seen;
                        plan.pieces.push(Piece { block, stretches: 0..stretches, scores, part: None });
                    }
                }
            }
        }
        // The largest first, so that all threads end at about the same time.
        plan.pieces.sort_by_key(|piece| Reverse(piece.scores));
        plan
    }

    /// One piece for each stretch of what a block's rows see.
    fn split(&mut self, block: BlockPlace, seen: usize, floats: usize) {
        let stretches = seen.div_ceil(STRETCH);
        let parts = self.parts..self.parts + stretches * floats;
        for stretch in 0..stretches {
            let start = self.parts + stretch * floats;
            let (block, part) = (block.clone(), Some(start..start + floats));
            let scores = block.rows.len() * STRETCH.min(seen - stretch * STRETCH);
            self.pieces.push(Piece { block, stretches: stretch..stretch + 1, scores, part });
        }
        self.parts = parts.end;
        self.joins.push(Joining { block, parts });
    }
}

struct Step<'a> {
    cpu: &'a Cpu,
    q: &'a Rows,
    k: &'a Rows,
    v: &'a Rows,
    shape: &'a AttentionShape,
    /// By query head, if scores depend on the distance.
    slopes: &'a [f32],
    spans: &'a [SequenceSpan],
    cache: Option<(&'a PagedCache, usize)>,
}

impl Step<'_> {
    fn run(&self, plan: &Plan) -> Rows {
        let mut y = self.cpu.rows(self.q.len(), self.q.width());
        if !plan.is_whole {
            y.values_mut().fill(0.0);
        }
        let mut parts = vec![0.0; plan.parts];
        let output = Shared::new(y.values_mut());
        let parts = Shared::new(&mut parts);
        if plan.pieces.iter().map(|piece| piece.scores).sum::<usize>() <= ALONE {
            let ahead = Ahead::default();
            BUFFERS.with_borrow_mut(|buffers| {
                buffers.fit(plan.vectors, self.shape.head_size);
                plan.pieces.iter().for_each(|piece| self.piece(piece, buffers, &parts, &output, &ahead));
            });
            plan.joins.iter().for_each(|join| self.join(join, &parts, &output));
            return y;
        }
        let pieces = self.cpu.team.pieces(plan.pieces.len());
        let joins = (!plan.joins.is_empty()).then(|| self.cpu.team.pieces(plan.joins.len()));
        self.cpu.team.run(|member| {
            BUFFERS.with_borrow_mut(|buffers| {
                buffers.fit(plan.vectors, self.shape.head_size);
                member.share(&pieces, |range| {
                    for piece in &plan.pieces[range] {
                        self.piece(piece, buffers, &parts, &output, member.ahead());
                    }
                });
            });
            if let Some(joins) = &joins {
                member.barrier();
                member.share(joins, |range| {
                    plan.joins[range].iter().for_each(|join| self.join(join, &parts, &output));
                });
            }
        });
        y
    }

    fn block<'b>(&'b self, place: &BlockPlace, ahead: &'b Ahead) -> Block<'b> {
        let span = &self.spans[place.span];
        let group = self.shape.query_heads / self.shape.kv_heads;
        let context = match self.cache {
            Some((cache, layer)) => Context::Cache { cache, layer, blocks: &span.blocks },
            None => Context::Rows { k: self.k, v: self.v, first: span.rows.start },
        };
        Block {
            context,
            ahead,
            q: self.q,
            rows: place.rows.clone(),
            own: span.start + place.rows.start - span.rows.start,
            end: span.start + span.rows.len(),
            sight: self.shape.sight,
            slopes: if self.slopes.is_empty() { &[] } else { &self.slopes[place.head * group..][..group] },
            head: place.head,
            group,
            head_size: self.shape.head_size,
        }
    }

    fn piece(
        &self,
        piece: &Piece,
        buffers: &mut Buffers,
        parts: &Shared<'_, f32>,
        output: &Shared<'_, f32>,
        ahead: &Ahead,
    ) {
        let block = self.block(&piece.block, ahead);
        let Buffers { scratch, all, spare } = buffers;
        let stretches = piece.stretches.clone();
        if let Some(part) = &piece.part {
            // SAFETY: each piece has a part of its own, and is done once.
            let part = unsafe { parts.part(part.clone()) };
            block.attend(self.cpu.kernel, stretches, scratch, part, spare);
        } else {
            block.attend(self.cpu.kernel, stretches, scratch, all, spare);
            self.finish(&block, &Part::of(all, block.vectors(), block.head_size), output);
        }
    }

    fn join(&self, join: &Joining, parts: &Shared<'_, f32>, output: &Shared<'_, f32>) {
        let ahead = Ahead::default();
        let block = self.block(&join.block, &ahead);
        let (vectors, size) = (block.vectors(), block.head_size);
        // SAFETY: each join has parts of its own; those who wrote them have passed the barrier.
        let parts = unsafe { parts.part(join.parts.clone()) };
        let mut parts = parts.chunks_exact_mut(Part::floats(vectors, size)).enumerate();
        let Some((_, all)) = parts.next() else { return };
        let mut all = Part::of(all, vectors, size);
        for (stretch, later) in parts {
            let (later, first) = (Part::of(later, vectors, size), block.first(stretch * STRETCH));
            self.cpu.kernel.vectorised(Join { all: &mut all, later: &later, first });
        }
        self.finish(&block, &all, output);
    }

    /// Writes a block's rows, whose context `part` covers.
    fn finish(&self, block: &Block<'_>, part: &Part<'_>, output: &Shared<'_, f32>) {
        let of_head = block.group * block.head_size;
        for (i, row) in block.rows.clone().enumerate() {
            let start = row * self.q.width() + block.head * of_head;
            // SAFETY: these columns of these rows belong to this block alone, and it is finished once.
            let output = unsafe { output.part(start..start + of_head) };
            for (n, output) in output.chunks_exact_mut(block.head_size).enumerate() {
                let vector = i * block.group + n;
                self.cpu.kernel.vectorised(Finish { part, vector, output });
            }
        }
    }
}

thread_local! {
    static BUFFERS: RefCell<Buffers> = RefCell::default();
}

/// What one thread works in, from one step to the next.
#[derive(Default)]
struct Buffers {
    scratch: Scratch,
    /// The part of all stretches of a block, and of one of them.
    all: Vec<f32>,
    spare: Vec<f32>,
}

impl Buffers {
    /// Room for blocks of up to so many query vectors.
    fn fit(&mut self, vectors: usize, head_size: usize) {
        self.scratch.fit(vectors, head_size);
        let part = Part::floats(vectors, head_size);
        for floats in [&mut self.all, &mut self.spare] {
            floats.resize(part.max(floats.len()), 0.0);
        }
    }
}
