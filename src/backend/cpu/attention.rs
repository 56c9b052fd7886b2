//! Causal attention through block tables.

use super::rows::{dot, exp};
use super::{Cpu, Rows, expect};
use crate::backend::{AttentionShape, BackendError, CacheLayout, SequenceSpan};
use std::sync::Mutex;

/// Keys and values of all layers, `[layer][block][kv head][position][D]`: one head's keys within a block lie together.
pub struct PagedCache {
    layout: CacheLayout,
    keys: Vec<f32>,
    values: Vec<f32>,
}

impl PagedCache {
    pub(super) fn new(layout: CacheLayout) -> Result<Self, BackendError> {
        let CacheLayout { layers, kv_heads, head_size, blocks, block_size } = layout;
        let floats = [layers, kv_heads, head_size, blocks, block_size];
        let floats = floats.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
        let memory = || BackendError::Memory {
            what: "the key-value pool".into(),
            bytes: floats.map_or(usize::MAX, |n| n.saturating_mul(8)),
        };
        // Asked for first, since running out of memory must be an error; then zeroed by the system, which gives a page
        // only when it is written: a pool costs memory as it fills.
        let pool = || {
            let floats = floats.ok_or_else(memory)?;
            Vec::<f32>::new().try_reserve_exact(floats).map_err(|_| memory())?;
            Ok(vec![0.0; floats])
        };
        Ok(Self { layout, keys: pool()?, values: pool()? })
    }

    pub(super) fn bytes(&self) -> usize {
        size_of_val(self.keys.as_slice()) + size_of_val(self.values.as_slice())
    }

    /// Where the first position of `(layer, block, head)` starts.
    fn place(&self, layer: usize, block: u32, head: usize) -> usize {
        let CacheLayout { kv_heads, head_size, blocks, block_size, .. } = self.layout;
        ((layer * blocks + block as usize) * kv_heads + head) * block_size * head_size
    }

    fn write(&mut self, layer: usize, span: &SequenceSpan, k: &Rows, v: &Rows) {
        let CacheLayout { kv_heads, head_size, block_size, .. } = self.layout;
        for (i, row) in span.rows.clone().enumerate() {
            let position = span.start + i;
            for head in 0..kv_heads {
                let place = self.place(layer, span.blocks[position / block_size], head);
                let at = place + position % block_size * head_size;
                let of_head = head * head_size..(head + 1) * head_size;
                self.keys[at..at + head_size].copy_from_slice(&k.row(row)[of_head.clone()]);
                self.values[at..at + head_size].copy_from_slice(&v.row(row)[of_head]);
            }
        }
    }

    fn check(&self, layer: usize, span: &SequenceSpan) -> Result<(), BackendError> {
        let CacheLayout { layers, blocks, block_size, .. } = self.layout;
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
}

/// One sequence's keys and values as runs of positions of one head.
enum Context<'a> {
    /// This step's own rows.
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
    /// Calls `each` with key and value of positions `0..count` of one key-value head, in order.
    #[inline(always)]
    fn visit(&self, head: usize, size: usize, count: usize, mut each: impl FnMut(usize, &[f32], &[f32])) {
        match self {
            Self::Rows { k, v, first } => {
                let of_head = head * size..(head + 1) * size;
                for position in 0..count {
                    let row = first + position;
                    each(position, &k.row(row)[of_head.clone()], &v.row(row)[of_head.clone()]);
                }
            }
            Self::Cache { cache, layer, blocks } => {
                let block_size = cache.layout.block_size;
                for (start, &block) in (0..count).step_by(block_size).zip(*blocks) {
                    let place = cache.place(*layer, block, head);
                    for i in 0..block_size.min(count - start) {
                        let at = place + i * size..place + (i + 1) * size;
                        each(start + i, &cache.keys[at.clone()], &cache.values[at]);
                    }
                }
            }
        }
    }
}

pub(super) fn attention(
    cpu: &Cpu,
    q: &Rows,
    k: &Rows,
    v: &Rows,
    shape: &AttentionShape,
    spans: &[SequenceSpan],
    mut cache: Option<(&mut PagedCache, usize)>,
) -> Result<Rows, BackendError> {
    let AttentionShape { query_heads, kv_heads, head_size } = *shape;
    expect("attention", "query columns", query_heads * head_size, q.width())?;
    expect("attention", "key columns", kv_heads * head_size, k.width())?;
    expect("attention", "value columns", kv_heads * head_size, v.width())?;
    for span in spans {
        expect("attention", "rows", span.rows.end, span.rows.end.min(q.len()))?;
        match &mut cache {
            Some((cache, layer)) => {
                cache.check(*layer, span)?;
                cache.write(*layer, span, k, v);
            }
            None => expect("attention", "cached positions without a cache", 0, span.start)?,
        }
    }
    let cache = cache.map(|(cache, layer)| (&*cache, layer));
    // One piece of work: a sequence's rows under one query head. Writes go to that head's columns of those rows.
    let work =
        spans.iter().flat_map(|span| span.rows.clone().map(move |row| (span, row))).collect::<Vec<_>>();
    let mut y = Rows::zeros(q.len(), q.width());
    let outputs =
        y.values_mut().chunks_exact_mut(query_heads * head_size).map(Mutex::new).collect::<Vec<_>>();
    cpu.each(work.len(), |i| {
        let (span, row) = work[i];
        let context = match cache {
            Some((cache, layer)) => Context::Cache { cache, layer, blocks: &span.blocks },
            None => Context::Rows { k, v, first: span.rows.start },
        };
        let count = span.start + (row - span.rows.start) + 1;
        // Each row is one piece of work, so its lock is always free; a poisoned one would mean a panic elsewhere.
        let Ok(mut output) = outputs[row].lock() else { return };
        cpu.kernel.vectorised(|| {
            for (n, output) in output.chunks_exact_mut(head_size).enumerate() {
                let q = &q.row(row)[n * head_size..(n + 1) * head_size];
                attend(q, &context, n / (query_heads / kv_heads), count, output);
            }
        });
    });
    drop(outputs);
    Ok(y)
}

/// Softmax attention of one query over `count` positions, in two passes, each in the order of the positions.
#[inline(always)]
fn attend(q: &[f32], context: &Context<'_>, head: usize, count: usize, output: &mut [f32]) {
    let scale = 1.0 / (q.len() as f32).sqrt();
    let mut scores = vec![0.0; count];
    context.visit(head, q.len(), count, |position, key, _| scores[position] = dot(q, key) * scale);
    let largest = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut sum = 0.0;
    for score in &mut scores {
        *score = exp(*score - largest);
        sum += *score;
    }
    context.visit(head, q.len(), count, |position, _, value| {
        let weight = scores[position] / sum;
        output.iter_mut().zip(value).for_each(|(y, v)| *y += weight * v);
    });
}
