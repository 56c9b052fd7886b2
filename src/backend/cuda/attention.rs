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

/// Rows of one sequence from which on they are many, and those that a tile of them has under all heads of a group.
const MANY: usize = 8;
const TILE: usize = 128;

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
    /// Of every row, and of those that the kernel for few rows takes; the others' positions are below 0 there.
    rows: Argument<'static>,
    few: Argument<'static>,
    any_few: bool,
    /// `tiles` of kernels/attend_many.cu: first row, count, position, block table.
    tiles: Argument<'static>,
    tile_count: usize,
    tables: Argument<'static>,
    /// Chunks of the longest context, up to the next power of two: so that a tape stays the same while contexts grow.
    chunks: usize,
}

impl Contexts {
    /// `tile`: rows that a tile of many may have; 0 where there are none. The layers of a step, which keep their context in one
    /// pool, share them.
    fn staged(
        device: &Device,
        spans: &[SequenceSpan],
        cache: &Cache,
        tile: usize,
    ) -> Result<Self, BackendError> {
        let longest = spans.iter().map(|span| span.blocks.len()).max().unwrap_or(0).next_power_of_two();
        let (mut rows, mut few) = (Vec::new(), Vec::new());
        let (mut tables, mut tiles): (Vec<u32>, Vec<[i32; 4]>) = (Vec::new(), Vec::new());
        for span in spans {
            let (table, length) = (tables.len() as i32, span.rows.len());
            let position = |i: usize| (span.start + i) as i32;
            let is_many = tile > 0 && length >= MANY;
            rows.extend((0..length).map(|i| AttentionRow { table, position: position(i) }));
            few.extend(
                (0..length).map(|i| AttentionRow { table, position: if is_many { -1 } else { position(i) } }),
            );
            if is_many {
                let tile_at = |i: usize| {
                    [(span.rows.start + i) as i32, tile.min(length - i) as i32, position(i), table]
                };
                tiles.extend((0..length).step_by(tile).map(tile_at));
            }
            tables.extend(&span.blocks);
            tables.resize(table as usize + longest, 0);
        }
        let any_few = few.iter().any(|row| row.position >= 0);
        let context = spans.iter().map(|span| span.start + span.rows.len()).max().unwrap_or(0);
        let owner = cache.values.address;
        let rows = device.stage_changed(owner, &rows)?;
        // Where nothing is for tiles the two are the same.
        let few = if tiles.is_empty() { rows } else { device.stage_changed(owner + 2, &few)? };
        Ok(Self {
            rows: Argument::Address(rows),
            few: Argument::Address(few),
            any_few,
            tiles: Argument::Address(device.stage_changed(owner + 4, &tiles)?),
            tile_count: tiles.len(),
            tables: Argument::Address(device.stage_changed(owner + 6, &tables)?),
            chunks: context.div_ceil(CHUNK).next_power_of_two(),
        })
    }
}

/// The kernel for many rows of heads of this size: it takes tensor cores, and so keys and values in bf16.
fn many(device: &Device, shape: &AttentionShape, cache: &Cache) -> Option<(Kernel, usize)> {
    let AttentionShape { query_heads, kv_heads, head_size } = *shape;
    let (kernel, threads) = match head_size {
        0..=64 => (Kernel::AttendMany64, 128),
        65..=128 => (Kernel::AttendMany128, 128),
        _ => (Kernel::AttendMany256, 256),
    };
    let fits = cache.dtype == KvDtype::Bf16
        && head_size.is_multiple_of(8)
        && query_heads / kv_heads <= TILE
        && device.has_room_for(kernel);
    fits.then_some((kernel, threads))
}

/// A step's attention with all that its kernels share.
struct Launches<'a> {
    device: &'a Arc<Device>,
    step: &'a Step<'a>,
    contexts: Contexts,
    heads: [u64; 2],
    keys: Argument<'static>,
    values: Argument<'static>,
    y: &'a Rows,
}

fn attend(
    cuda: &Cuda,
    step: &Step<'_>,
    spans: &[SequenceSpan],
    cache: &Cache,
    layer: usize,
) -> Result<Rows, BackendError> {
    let device = &cuda.device;
    let AttentionShape { query_heads, kv_heads, head_size } = *step.shape;
    let many = many(device, step.shape, cache);
    let tile = many.map_or(0, |_| TILE / (query_heads / kv_heads));
    let [keys, values] = cache.layer(layer);
    let y = Rows::new(device, step.q.length, query_heads * head_size, Form::Bf16)?;
    let launches = Launches {
        device,
        step,
        contexts: Contexts::staged(device, spans, cache, tile)?,
        heads: [pair(query_heads, kv_heads), pair(head_size, cache.layout.block_size)],
        keys,
        values,
        y: &y,
    };
    let counters = device.activations(step.q.length * kv_heads * size_of::<u32>())?;
    let counters = Argument::Address(counters.address());
    launches.store(cache.dtype, counters)?;
    if launches.contexts.any_few {
        launches.few(cache.dtype, counters)?;
    }
    if let Some((kernel, threads)) = many.filter(|_| launches.contexts.tile_count > 0) {
        launches.many(kernel, threads);
    }
    Ok(y)
}

impl Launches<'_> {
    /// Rotates, where that is still to be done, and writes keys and values.
    fn store(&self, dtype: KvDtype, counters: Argument<'static>) -> Result<(), BackendError> {
        let Step { q, k, v, shape, .. } = *self.step;
        let kernel = match dtype {
            KvDtype::F32 => Kernel::StoreF32,
            KvDtype::Bf16 => Kernel::StoreBf16,
        };
        let angles =
            self.step.angles.map_or(Ok(Argument::Address(0)), |angles| angles.staged(self.device))?;
        let arguments = [
            q.argument(),
            int(q.stride),
            k.argument(),
            v.argument(),
            int(k.stride),
            angles,
            self.contexts.rows,
            self.contexts.tables,
            Argument::Struct(&self.heads),
            self.keys,
            self.values,
            counters,
        ];
        let width = (shape.query_heads + shape.kv_heads) * shape.head_size / 2;
        // SAFETY: the arguments of `store`; positions lie within their blocks and blocks within the pool, as checked.
        unsafe { self.device.push(kernel, Grid::by_row(q.length, width), &arguments) };
        Ok(())
    }

    /// Each row by itself, its context split over blocks of threads.
    fn few(&self, dtype: KvDtype, counters: Argument<'static>) -> Result<(), BackendError> {
        let (q, y) = (self.step.q, self.y);
        let Contexts { chunks, few, tables, .. } = self.contexts;
        let AttentionShape { query_heads, kv_heads, head_size } = *self.step.shape;
        let kernel = match (dtype, head_size.is_multiple_of(8)) {
            (KvDtype::F32, false) => Kernel::AttendF32,
            (KvDtype::F32, true) => Kernel::AttendF32Wide,
            (KvDtype::Bf16, false) => Kernel::AttendBf16,
            (KvDtype::Bf16, true) => Kernel::AttendBf16Wide,
        };
        let of_row = query_heads * chunks * (head_size + 2) * size_of::<f32>();
        let at_once = (PARTIAL_BYTES / of_row).clamp(1, q.length.max(1));
        let partial = self.device.activations(at_once * of_row)?;
        let of_partial = [partial.address(), pair(chunks, head_size)];
        for first in (0..q.length).step_by(at_once) {
            let at = |argument: Argument<'static>, bytes: usize| match argument {
                Argument::Address(address) => Argument::Address(address + (first * bytes) as u64),
                other => other,
            };
            let grid = Grid::new([at_once.min(q.length - first), kv_heads, chunks], THREADS);
            let arguments = [
                at(q.argument(), q.stride * Form::F32.bytes()),
                int(q.stride),
                at(few, size_of::<AttentionRow>()),
                tables,
                Argument::Struct(&self.heads),
                self.scale(),
                self.keys,
                self.values,
                Argument::Struct(&of_partial),
                at(counters, kv_heads * size_of::<u32>()),
                at(y.argument(), y.stride * Form::Bf16.bytes()),
                int(y.stride),
            ];
            // SAFETY: the arguments of `attend`, from row `first` on; else as above.
            unsafe { self.device.push(kernel, grid, &arguments) };
        }
        Ok(())
    }

    /// Tiles of rows of one sequence.
    fn many(&self, kernel: Kernel, threads: usize) {
        let (q, y, contexts) = (self.step.q, self.y, &self.contexts);
        let arguments = [
            q.argument(),
            int(q.stride),
            contexts.tiles,
            contexts.tables,
            Argument::Struct(&self.heads),
            self.scale(),
            self.keys,
            self.values,
            y.argument(),
            int(y.stride),
        ];
        let blocks = [contexts.tile_count, self.step.shape.kv_heads, 1];
        let grid = Grid { shared: kernel.shared_bytes(), ..Grid::new(blocks, threads) };
        // SAFETY: the arguments of `attend_many`; tiles lie within the rows, and else as above.
        unsafe { self.device.push(kernel, grid, &arguments) };
    }

    fn scale(&self) -> Argument<'static> {
        Argument::Float(1.0 / (self.step.shape.head_size as f32).sqrt())
    }
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
