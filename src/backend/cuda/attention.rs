//! The paged key-value pool, and attention over it.
#![allow(unsafe_code)]

use super::device::{Argument, Device, Grid, Kernel};
use super::{Cuda, KvDtype, Rows};
use crate::backend::{AttentionShape, BackendError, CacheLayout, SequenceSpan};
use cudarc::driver::CudaSlice;

/// The largest head that the kernel holds in registers.
const LARGEST_HEAD: usize = 256;
/// Four warps, `ATTENTION_WARPS` of kernels/attention.cu.
const THREADS: usize = 128;

/// Keys and values: by layer keys, then values, each `[slot][kv head][D]`.
pub struct Cache {
    layout: CacheLayout,
    dtype: KvDtype,
    values: CudaSlice<u8>,
}

impl Cache {
    pub(super) fn new(device: &Device, layout: CacheLayout, dtype: KvDtype) -> Result<Self, BackendError> {
        let too_large = || BackendError::Memory { what: "the key-value pool".into(), bytes: usize::MAX };
        let bytes = [layout.layers, layout.kv_heads, layout.head_size, layout.blocks, layout.block_size]
            .into_iter()
            .try_fold(2 * dtype.bytes(), usize::checked_mul)
            .ok_or_else(too_large)?;
        Ok(Self { layout, dtype, values: device.room("the key-value pool", bytes)? })
    }

    pub(super) fn bytes(&self) -> usize {
        self.values.len()
    }

    /// Where a layer's keys and values begin.
    fn layer(&self, device: &Device, layer: usize) -> [Argument; 2] {
        let CacheLayout { kv_heads, head_size, blocks, block_size, .. } = self.layout;
        let half = kv_heads * head_size * blocks * block_size * self.dtype.bytes();
        let start = device.address(&self.values) + (2 * layer * half) as u64;
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

/// Queries, keys and values of a step.
pub(super) struct Step<'a> {
    pub(super) q: &'a Rows,
    pub(super) k: &'a Rows,
    pub(super) v: &'a Rows,
    pub(super) shape: &'a AttentionShape,
    pub(super) spans: &'a [SequenceSpan],
}

/// Attention with the pool; without one, over a pool of its own that holds this step only.
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
                return Err(unfit("spans from position 0 without a cache", format!("{}", span.start)));
            }
            let AttentionShape { kv_heads, head_size, .. } = *step.shape;
            let blocks = step.q.len().max(1);
            let layout = CacheLayout { layers: 1, kv_heads, head_size, blocks, block_size: 1 };
            let mut own = Cache::new(&cuda.device, layout, KvDtype::F32)?;
            let block = |row: usize| row as u32;
            let spans = step
                .spans
                .iter()
                .map(|span| SequenceSpan { blocks: span.rows.clone().map(block).collect(), ..span.clone() });
            attend(cuda, step, &spans.collect::<Vec<_>>(), &mut own, 0)
        }
    }
}

fn attend(
    cuda: &Cuda,
    step: &Step<'_>,
    spans: &[SequenceSpan],
    cache: &mut Cache,
    layer: usize,
) -> Result<Rows, BackendError> {
    let device = &cuda.device;
    let (mut rows, mut tables): (Vec<AttentionRow>, Vec<u32>) = (Vec::new(), Vec::new());
    for span in spans {
        let position =
            |i: usize| AttentionRow { table: tables.len() as i32, position: (span.start + i) as i32 };
        rows.extend((0..span.rows.len()).map(position));
        tables.extend(&span.blocks);
    }
    // One table: rows, then block tables. The layers of a step share it, if they keep their context in one pool.
    let mut bytes = bytemuck::cast_slice::<_, u8>(&rows).to_vec();
    bytes.extend_from_slice(bytemuck::cast_slice(&tables));
    let table = device.keep(device.address(&cache.values), "a batch's sequences", bytes)?;
    let [rows_at, tables_at] = [0, size_of_val(rows.as_slice())].map(|at| device.place(&table, at));
    let [keys, values] = cache.layer(device, layer);
    let AttentionShape { query_heads, kv_heads, head_size } = *step.shape;
    let int = |n: usize| Argument::Int(n as i32);
    let (block_size, width) = (int(cache.layout.block_size), kv_heads * head_size);
    let [store, attend] = match cache.dtype {
        KvDtype::F32 => [Kernel::StoreF32, Kernel::AttendF32],
        KvDtype::Bf16 => [Kernel::StoreBf16, Kernel::AttendBf16],
    };
    let y = cuda.room(rows.len(), query_heads * head_size)?;
    let [q, k, v, to] = [step.q, step.k, step.v, &y].map(|rows| rows.argument(device));
    let arguments = [k, v, rows_at, tables_at, block_size, int(width), keys, values];
    // SAFETY: the arguments of `store` and `attend`; positions lie within their blocks and blocks within the pool, as checked.
    unsafe { device.launch(store, Grid::by_row(rows.len(), width), &arguments)? };
    let scale = Argument::Float(1.0 / (head_size as f32).sqrt());
    let heads = [int(query_heads), int(kv_heads), int(head_size)];
    let arguments =
        [q, rows_at, tables_at, block_size, heads[0], heads[1], heads[2], scale, keys, values, to];
    // SAFETY: as above.
    unsafe { device.launch(attend, Grid::new((rows.len(), query_heads), THREADS), &arguments)? };
    Ok(y)
}

fn unfit(expected: &str, got: String) -> BackendError {
    BackendError::Shape { operation: "attention", expected: expected.into(), got }
}

/// Sizes that fit each other, and spans over all rows in order.
fn check(step: &Step<'_>) -> Result<(), BackendError> {
    let AttentionShape { query_heads, kv_heads, head_size } = *step.shape;
    if kv_heads == 0 || head_size == 0 || !query_heads.is_multiple_of(kv_heads) || head_size > LARGEST_HEAD {
        let got = format!("{query_heads} and {kv_heads} of {head_size}");
        return Err(unfit("query heads in groups of key-value heads, of at most 256 numbers", got));
    }
    for (rows, heads) in [(step.q, query_heads), (step.k, kv_heads), (step.v, kv_heads)] {
        if (rows.len(), rows.width()) != (step.q.len(), heads * head_size) {
            let got = format!("({}, {})", rows.len(), rows.width());
            return Err(unfit(&format!("({}, {})", step.q.len(), heads * head_size), got));
        }
    }
    let mut next = 0;
    for span in step.spans {
        if span.rows.start != next || span.rows.end < next {
            return Err(unfit("spans over all rows in order", format!("{:?} at {next}", span.rows)));
        }
        next = span.rows.end;
    }
    if next != step.q.len() {
        return Err(unfit("spans over all rows", format!("{next} of {}", step.q.len())));
    }
    Ok(())
}

fn check_cache(step: &Step<'_>, cache: &Cache, layer: usize) -> Result<(), BackendError> {
    let CacheLayout { layers, kv_heads, head_size, blocks, block_size } = cache.layout;
    if layer >= layers || (kv_heads, head_size) != (step.shape.kv_heads, step.shape.head_size) {
        let got = format!("layer {layer}, {} of {}", step.shape.kv_heads, step.shape.head_size);
        return Err(unfit(&format!("a layer of {layers}, {kv_heads} heads of {head_size}"), got));
    }
    let mut written = std::collections::HashSet::new();
    for span in step.spans {
        let end = span.start + span.rows.len();
        if span.blocks.len() * block_size < end {
            return Err(unfit(&format!("blocks for {end} positions"), format!("{}", span.blocks.len())));
        }
        if let Some(block) = span.blocks.iter().find(|&&block| block as usize >= blocks) {
            return Err(unfit(&format!("a block of {blocks}"), block.to_string()));
        }
        let slot = |position: usize| (span.blocks[position / block_size], position % block_size);
        if let Some(position) = (span.start..end).find(|&position| !written.insert(slot(position))) {
            return Err(unfit("spans that write to different places", format!("position {position} twice")));
        }
    }
    Ok(())
}
