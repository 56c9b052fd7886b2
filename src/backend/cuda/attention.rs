//! The paged key-value pool, and attention over it.
#![allow(unsafe_code)]

use super::device::{Buffer, Device, Shared};
use super::kernel::{Argument, Grid, Kernel, int, pair};
use super::rows::{Angles, Form, Rows};
use super::{Cuda, KvDtype, unfit};
use crate::backend::{AttentionShape, BackendError, CacheLayout, SequenceSpan};
use std::sync::Arc;

/// Of kernels/attention.cu: the largest head, threads of a block, positions that it takes.
const LARGEST_HEAD: usize = 256;
const THREADS: usize = 128;
const CHUNK: usize = 64;
/// Bytes for what chunks leave: rows are taken a part at a time where all would need more.
const PARTIAL_BYTES: usize = if cfg!(test) { 32 << 10 } else { 32 << 20 };

/// Keys and values: by layer keys, then values, each `[slot][kv head][D]`.
pub struct Cache {
    layout: CacheLayout,
    dtype: KvDtype,
    values: Buffer,
}

impl Cache {
    pub(super) fn new(
        device: &Arc<Device>,
        layout: CacheLayout,
        dtype: KvDtype,
    ) -> Result<Self, BackendError> {
        let too_large = || BackendError::Memory { what: "the key-value pool".into(), bytes: usize::MAX };
        let bytes = [layout.layers, layout.kv_heads, layout.head_size, layout.blocks, layout.block_size]
            .into_iter()
            .try_fold(2 * dtype.bytes(), usize::checked_mul)
            .ok_or_else(too_large)?;
        Ok(Self { layout, dtype, values: device.buffer("the key-value pool", bytes)? })
    }

    pub(super) fn bytes(&self) -> usize {
        self.values.bytes
    }

    /// Where a layer's keys and values begin.
    fn layer(&self, layer: usize) -> [Argument<'static>; 2] {
        let CacheLayout { kv_heads, head_size, blocks, block_size, .. } = self.layout;
        let half = kv_heads * head_size * blocks * block_size * self.dtype.bytes();
        let start = self.values.address + (2 * layer * half) as u64;
        [Argument::Address(start), Argument::Address(start + half as u64)]
    }
}

/// A row's sequence: `AttentionRow` of kernels/attention.cu.
#[derive(Debug, Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct AttentionRow {
    table: i32,
    position: i32,
}

/// Queries, keys and values of a step; with angles, they are still to be rotated by them.
pub(super) struct Step<'a> {
    pub(super) q: &'a Rows,
    pub(super) k: &'a Rows,
    pub(super) v: &'a Rows,
    pub(super) angles: Option<&'a Angles>,
    pub(super) shape: &'a AttentionShape,
    pub(super) spans: &'a [SequenceSpan],
}

/// Attention with the pool; without one, over a pool of its own that holds this step only. With angles, `q` is rotated where
/// it stands.
pub(super) fn attention(
    cuda: &Cuda,
    step: &Step<'_>,
    cache: Option<(&mut Cache, usize)>,
) -> Result<Rows, BackendError> {
    check(step)?;
    match cache {
        Some((cache, layer)) => {
            check_cache(step, cache, layer)?;
            attend(cuda, step, step.spans, cache, layer)
        }
        None => {
            if let Some(span) = step.spans.iter().find(|span| span.start > 0) {
                return Err(unfit_attention(
                    "spans from position 0 without a cache",
                    format!("{}", span.start),
                ));
            }
            let AttentionShape { kv_heads, head_size, .. } = *step.shape;
            let blocks = step.q.length.max(1);
            let layout = CacheLayout { layers: 1, kv_heads, head_size, blocks, block_size: 1 };
            let own = Cache::new(&cuda.device, layout, KvDtype::F32)?;
            let block = |row: usize| row as u32;
            let spans = step
                .spans
                .iter()
                .map(|span| SequenceSpan { blocks: span.rows.clone().map(block).collect(), ..span.clone() });
            attend(cuda, step, &spans.collect::<Vec<_>>(), &own, 0)
        }
    }
}

/// Where each row's sequence keeps its context, as the kernels read it.
struct Contexts {
    rows: Argument<'static>,
    tables: Argument<'static>,
    /// Chunks of the longest context, up to the next power of two: so that a tape stays the same while contexts grow.
    chunks: usize,
}

impl Contexts {
    /// The layers of a step, which keep their context in one pool, share them.
    fn staged(device: &Device, spans: &[SequenceSpan], cache: &Cache) -> Result<Self, BackendError> {
        let longest = spans.iter().map(|span| span.blocks.len()).max().unwrap_or(0).next_power_of_two();
        let (mut rows, mut tables): (Vec<AttentionRow>, Vec<u32>) = (Vec::new(), Vec::new());
        for span in spans {
            let table = tables.len() as i32;
            rows.extend(
                (0..span.rows.len()).map(|i| AttentionRow { table, position: (span.start + i) as i32 }),
            );
            tables.extend(&span.blocks);
            tables.resize(table as usize + longest, 0);
        }
        let context = spans.iter().map(|span| span.start + span.rows.len()).max().unwrap_or(0);
        let owner = cache.values.address;
        let rows = device.stage_changed(owner, &rows)?;
        let tables = device.stage_changed(owner + 2, &tables)?;
        let chunks = context.div_ceil(CHUNK).next_power_of_two();
        Ok(Self { rows: Argument::Address(rows), tables: Argument::Address(tables), chunks })
    }
}

fn attend(
    cuda: &Cuda,
    step: &Step<'_>,
    spans: &[SequenceSpan],
    cache: &Cache,
    layer: usize,
) -> Result<Rows, BackendError> {
    let (device, length) = (&cuda.device, step.q.length);
    let AttentionShape { query_heads, kv_heads, head_size } = *step.shape;
    let contexts = Contexts::staged(device, spans, cache)?;
    let [keys, values] = cache.layer(layer);
    let wide = head_size.is_multiple_of(8);
    let [store, attend] = match (cache.dtype, wide) {
        (KvDtype::F32, false) => [Kernel::StoreF32, Kernel::AttendF32],
        (KvDtype::F32, true) => [Kernel::StoreF32, Kernel::AttendF32Wide],
        (KvDtype::Bf16, false) => [Kernel::StoreBf16, Kernel::AttendBf16],
        (KvDtype::Bf16, true) => [Kernel::StoreBf16, Kernel::AttendBf16Wide],
    };
    let heads = [pair(query_heads, kv_heads), pair(head_size, cache.layout.block_size)];
    let heads = Argument::Struct(&heads);
    let y = Rows::new(device, length, query_heads * head_size, Form::Bf16)?;
    let counters = device.activations(length * kv_heads * size_of::<u32>())?;
    let angles = step.angles.map_or(Ok(Argument::Address(0)), |angles| angles.staged(device))?;
    let [q, k, v] = [step.q, step.k, step.v];
    let (rows, tables) = (contexts.rows, contexts.tables);
    let counts = Argument::Address(counters.address());
    let arguments = [
        q.argument(),
        int(q.stride),
        k.argument(),
        v.argument(),
        int(k.stride),
        angles,
        rows,
        tables,
        heads,
        keys,
        values,
        counts,
    ];
    // SAFETY: the arguments of `store`; positions lie within their blocks and blocks within the pool, as checked.
    unsafe { device.push(store, Grid::by_row(length, (query_heads + kv_heads) * head_size / 2), &arguments) };
    let of_row = query_heads * contexts.chunks * (head_size + 2) * size_of::<f32>();
    let at_once = (PARTIAL_BYTES / of_row).clamp(1, length.max(1));
    let partial = device.activations(at_once * of_row)?;
    let of_partial = [partial.address(), pair(contexts.chunks, head_size)];
    for first in (0..length).step_by(at_once) {
        let at = |argument: Argument<'static>, bytes: usize| match argument {
            Argument::Address(address) => Argument::Address(address + (first * bytes) as u64),
            other => other,
        };
        let grid = Grid::new([at_once.min(length - first), kv_heads, contexts.chunks], THREADS);
        let arguments = [
            at(q.argument(), q.stride * Form::F32.bytes()),
            int(q.stride),
            at(rows, size_of::<AttentionRow>()),
            tables,
            heads,
            Argument::Float(1.0 / (head_size as f32).sqrt()),
            keys,
            values,
            Argument::Struct(&of_partial),
            at(counts, kv_heads * size_of::<u32>()),
            at(y.argument(), y.stride * Form::Bf16.bytes()),
            int(y.stride),
        ];
        // SAFETY: the arguments of `attend`, from row `first` on; else as above.
        unsafe { device.push(attend, grid, &arguments) };
    }
    Ok(y)
}

fn unfit_attention(expected: &str, got: String) -> BackendError {
    unfit("attention", expected, got)
}

/// Sizes that fit each other, and spans over all rows in order.
fn check(step: &Step<'_>) -> Result<(), BackendError> {
    let AttentionShape { query_heads, kv_heads, head_size } = *step.shape;
    if kv_heads == 0 || head_size == 0 || !query_heads.is_multiple_of(kv_heads) || head_size > LARGEST_HEAD {
        let got = format!("{query_heads} and {kv_heads} of {head_size}");
        return Err(unfit_attention("query heads in groups of key-value heads, of at most 256 numbers", got));
    }
    for (rows, heads) in [(step.q, query_heads), (step.k, kv_heads), (step.v, kv_heads)] {
        if (rows.length, rows.width) != (step.q.length, heads * head_size) {
            let got = format!("({}, {})", rows.length, rows.width);
            return Err(unfit_attention(&format!("({}, {})", step.q.length, heads * head_size), got));
        }
    }
    let mut next = 0;
    for span in step.spans {
        if span.rows.start != next || span.rows.end < next {
            return Err(unfit_attention(
                "spans over all rows in order",
                format!("{:?} at {next}", span.rows),
            ));
        }
        next = span.rows.end;
    }
    if next != step.q.length {
        return Err(unfit_attention("spans over all rows", format!("{next} of {}", step.q.length)));
    }
    Ok(())
}

fn check_cache(step: &Step<'_>, cache: &Cache, layer: usize) -> Result<(), BackendError> {
    let CacheLayout { layers, kv_heads, head_size, blocks, block_size } = cache.layout;
    if layer >= layers || (kv_heads, head_size) != (step.shape.kv_heads, step.shape.head_size) {
        let got = format!("layer {layer}, {} of {}", step.shape.kv_heads, step.shape.head_size);
        return Err(unfit_attention(&format!("a layer of {layers}, {kv_heads} heads of {head_size}"), got));
    }
    let mut written = std::collections::HashSet::new();
    for span in step.spans {
        let end = span.start + span.rows.len();
        if span.blocks.len() * block_size < end {
            return Err(unfit_attention(
                &format!("blocks for {end} positions"),
                format!("{}", span.blocks.len()),
            ));
        }
        if let Some(block) = span.blocks.iter().find(|&&block| block as usize >= blocks) {
            return Err(unfit_attention(&format!("a block of {blocks}"), block.to_string()));
        }
        let slot = |position: usize| (span.blocks[position / block_size], position % block_size);
        if let Some(position) = (span.start..end).find(|&position| !written.insert(slot(position))) {
            return Err(unfit_attention(
                "spans that write to different places",
                format!("position {position} twice"),
            ));
        }
    }
    Ok(())
}
