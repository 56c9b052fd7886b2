//! The paged key-value pool, and attention over it.
#![allow(unsafe_code)]

use super::contexts::{AttentionRow, Contexts};
use super::device::{Buffer, CHUNK_COUNTERS, Device, Shared};
use super::kernel::{Argument, Grid, Kernel, int, pair};
use super::rows::{Angles, Form, Rows};
use super::{Cuda, KvDtype, unfit};
use crate::backend::{AttentionShape, BackendError, CacheLayout, SequenceSpan, Sight};
use std::sync::Arc;

/// Of kernels/attend_few.cu: the largest head, threads of a block.
const LARGEST_HEAD: usize = 256;
const THREADS: usize = 256;
/// Bytes for what chunks leave: rows are taken a part at a time where all would need more.
const PARTIAL_BYTES: usize = if cfg!(test) { 32 << 10 } else { 32 << 20 };

/// Of kernels/attend_many.cu: in place of a window, that rows see all of their sequence.
const ALL: i32 = -1;

/// Rows that a tile of many rows of a sequence has, under all heads of a group.
const TILE: usize = 128;

/// Keys and values: by layer keys, then values, each `[slot][kv head][D]`.
#[derive(Clone, Copy)]
struct Pool {
    layout: CacheLayout,
    dtype: KvDtype,
    address: u64,
}

/// A [`Pool`] that stays.
pub struct Cache {
    layout: CacheLayout,
    dtype: KvDtype,
    pub(super) values: Buffer,
}

impl Cache {
    pub(super) fn new(
        device: &Arc<Device>,
        layout: CacheLayout,
        dtype: KvDtype,
    ) -> Result<Self, BackendError> {
        let bytes = pool_bytes(&layout, dtype)?;
        Ok(Self { layout, dtype, values: device.buffer("the key-value pool", bytes)? })
    }

    fn pool(&self) -> Pool {
        Pool { layout: self.layout, dtype: self.dtype, address: self.values.address }
    }

    pub(super) fn bytes(&self) -> usize {
        self.values.bytes
    }
}

fn pool_bytes(layout: &CacheLayout, dtype: KvDtype) -> Result<usize, BackendError> {
    let too_large = || BackendError::Memory { what: "the key-value pool".into(), bytes: usize::MAX };
    [layout.layers, layout.kv_heads, layout.head_size, layout.blocks, layout.block_size]
        .into_iter()
        .try_fold(2 * dtype.bytes(), usize::checked_mul)
        .ok_or_else(too_large)
}

impl Pool {
    /// Where a layer's keys and values begin.
    fn layer(&self, layer: usize) -> [Argument<'static>; 2] {
        let CacheLayout { kv_heads, head_size, blocks, block_size, .. } = self.layout;
        let half = kv_heads * head_size * blocks * block_size * self.dtype.bytes();
        let start = self.address + (2 * layer * half) as u64;
        [Argument::Address(start), Argument::Address(start + half as u64)]
    }
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

/// Attention with the pool; without one, over a pool of its own that holds this step only. With angles, `q` may be rotated
/// where it stands.
pub(super) fn attention(
    cuda: &Cuda,
    step: &Step<'_>,
    cache: Option<(&mut Cache, usize)>,
) -> Result<Rows, BackendError> {
    check(step)?;
    match cache {
        Some(_) if step.shape.sight == Sight::All => {
            Err(unfit_attention("no cache, where rows see what comes after them", "one".into()))
        }
        Some((cache, layer)) => {
            check_cache(step, cache, layer)?;
            attend(cuda, step, step.spans, cache.pool(), layer)
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
            // Like activations: at the same place in the same steps.
            let own = cuda.device.activations(pool_bytes(&layout, cuda.kv)?)?;
            let pool = Pool { layout, dtype: cuda.kv, address: own.address() };
            let block = |row: usize| row as u32;
            let spans = step
                .spans
                .iter()
                .map(|span| SequenceSpan { blocks: span.rows.clone().map(block).collect(), ..span.clone() });
            attend(cuda, step, &spans.collect::<Vec<_>>(), pool, 0)
        }
    }
}

/// The kernel for few rows of heads of this size, and how many positions a block of it takes: `Cut::CHUNK` of
/// kernels/attend_few.cuh.
fn few(shape: &AttentionShape, dtype: KvDtype) -> (Kernel, usize) {
    let is_grouped = shape.query_heads > shape.kv_heads;
    match (dtype, shape.head_size) {
        (KvDtype::F32, size) if !size.is_multiple_of(8) => (Kernel::AttendF32Odd, 32),
        (KvDtype::Bf16, size) if !size.is_multiple_of(8) => (Kernel::AttendBf16Odd, 64),
        (KvDtype::F32, ..=64) => (Kernel::AttendF32To64, 128),
        (KvDtype::F32, ..=128) => (Kernel::AttendF32To128, 64),
        (KvDtype::F32, _) => (Kernel::AttendF32To256, 32),
        (KvDtype::Bf16, ..=64) if is_grouped => (Kernel::AttendBf16To64Grouped, 128),
        (KvDtype::Bf16, ..=128) if is_grouped => (Kernel::AttendBf16To128Grouped, 128),
        (KvDtype::Bf16, _) if is_grouped => (Kernel::AttendBf16To256Grouped, 64),
        (KvDtype::Bf16, ..=64) => (Kernel::AttendBf16To64, 128),
        (KvDtype::Bf16, ..=128) => (Kernel::AttendBf16To128, 128),
        (KvDtype::Bf16, _) => (Kernel::AttendBf16To256, 64),
    }
}

/// The kernel for many rows of heads of this size: it takes tensor cores, and so keys and values in bf16.
fn many(device: &Device, shape: &AttentionShape, dtype: KvDtype) -> Option<(Kernel, usize)> {
    let AttentionShape { query_heads, kv_heads, head_size, .. } = *shape;
    let (kernel, threads) = match head_size {
        0..=64 => (Kernel::AttendMany64, 128),
        65..=128 => (Kernel::AttendMany128, 128),
        _ => (Kernel::AttendMany256, 256),
    };
    let fits = dtype == KvDtype::Bf16
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
    angles: Argument<'static>,
    keys: Argument<'static>,
    values: Argument<'static>,
    y: &'a Rows,
}

fn attend(
    cuda: &Cuda,
    step: &Step<'_>,
    spans: &[SequenceSpan],
    pool: Pool,
    layer: usize,
) -> Result<Rows, BackendError> {
    let device = &cuda.device;
    let AttentionShape { query_heads, kv_heads, head_size, .. } = *step.shape;
    let many = many(device, step.shape, pool.dtype);
    let tile = many.map_or(0, |_| TILE / (query_heads / kv_heads));
    let (few, chunk) = few(step.shape, pool.dtype);
    let [keys, values] = pool.layer(layer);
    let y = Rows::new(device, step.q.length, query_heads * head_size, Form::Bf16)?;
    let launches = Launches {
        device,
        step,
        contexts: Contexts::staged(device, pool.address, &pool.layout, spans, step.shape, (tile, chunk))?,
        heads: [pair(query_heads, kv_heads), pair(head_size, pool.layout.block_size)],
        angles: step.angles.map_or(Ok(Argument::Address(0)), |angles| angles.staged(device))?,
        keys,
        values,
        y: &y,
    };
    if !launches.contexts.independent {
        launches.store(pool.dtype);
    }
    if launches.contexts.any_few {
        launches.few(few)?;
    }
    if let Some((kernel, threads)) = many.filter(|_| launches.contexts.tile_count > 0) {
        launches.many(kernel, threads);
    }
    Ok(y)
}

/// Takes and gives back what the longest contexts may need, so that it is there when they come.
pub(super) fn take_most(device: &Arc<Device>) -> Result<(), BackendError> {
    device.activations(PARTIAL_BYTES).map(drop)
}

impl Launches<'_> {
    /// Rotates, where that is still to be done, and writes keys and values.
    fn store(&self, dtype: KvDtype) {
        let Step { q, k, v, shape, .. } = *self.step;
        let kernel = match dtype {
            KvDtype::F32 => Kernel::StoreF32,
            KvDtype::Bf16 => Kernel::StoreBf16,
        };
        let arguments = [
            q.argument(),
            int(q.stride),
            k.argument(),
            v.argument(),
            int(k.stride),
            self.angles,
            self.contexts.rows,
            self.contexts.tables,
            Argument::Struct(&self.heads),
            self.keys,
            self.values,
        ];
        // A thread has pairs of numbers half a head apart: four in heads of sizes that allow it.
        let pairs = shape.head_size.div_ceil(2) / if shape.head_size.is_multiple_of(8) { 4 } else { 1 };
        let queries = self.step.angles.map_or(0, |_| shape.query_heads);
        let threads = (queries + 2 * shape.kv_heads) * pairs;
        let grid = Grid::new([q.length, threads.div_ceil(THREADS), 1], THREADS);
        // SAFETY: the arguments of `store`; positions lie within their blocks and blocks within the pool, as checked.
        unsafe { self.device.push(kernel, grid, &arguments) };
    }

    /// Each row by itself, its context split over blocks of threads; where rows are independent, stored on the way.
    fn few(&self, kernel: Kernel) -> Result<(), BackendError> {
        let Step { q, k, v, .. } = *self.step;
        let Contexts { chunks, few, slopes, tables, table_stride, independent, .. } = self.contexts;
        let AttentionShape { query_heads, kv_heads, head_size, .. } = *self.step.shape;
        let of_row = query_heads * chunks * (head_size + 2) * size_of::<f32>();
        let at_once = (PARTIAL_BYTES / of_row).min(CHUNK_COUNTERS / kv_heads).clamp(1, q.length.max(1));
        let partial = self.device.activations(at_once * of_row)?;
        let of_partial = [partial.address(), pair(chunks, head_size)];
        for first in (0..q.length).step_by(at_once) {
            let at = |argument: Argument<'static>, bytes: usize| match argument {
                Argument::Address(address) if address > 0 => address + (first * bytes) as u64,
                _ => 0,
            };
            let rows_at = |rows: &Rows| at(rows.argument(), rows.stride * rows.form.bytes());
            let fresh =
                [rows_at(k), rows_at(v), at(self.angles, head_size * size_of::<f32>()), k.stride as u64];
            let blocks = [at_once.min(q.length - first), kv_heads, chunks];
            let grid = Grid { shared: kernel.shared_bytes(), ..Grid::new(blocks, THREADS) };
            let arguments = [
                Argument::Address(rows_at(q)),
                int(q.stride),
                Argument::Address(at(few, size_of::<AttentionRow>())),
                Argument::Address(at(tables, table_stride * size_of::<u32>())),
                int(table_stride),
                Argument::Address(slopes),
                Argument::Struct(&self.heads),
                self.scale(),
                self.keys,
                self.values,
                Argument::Struct(if independent { &fresh } else { &[0; 4] }),
                Argument::Struct(&of_partial),
                self.device.chunk_counters(),
                Argument::Address(rows_at(self.y)),
                int(self.y.stride),
            ];
            // SAFETY: the arguments of `attend`, from row `first` on; else as above.
            unsafe { self.device.push(kernel, grid, &arguments) };
        }
        Ok(())
    }

    /// Tiles of rows of one sequence.
    fn many(&self, kernel: Kernel, threads: usize) {
        let (q, y, contexts) = (self.step.q, self.y, &self.contexts);
        let window = match self.step.shape.sight {
            Sight::Past => 0,
            // Beyond all positions there are it is as good as none.
            Sight::Window(width) => i32::try_from(width).unwrap_or(0),
            Sight::All => ALL,
        };
        let arguments = [
            q.argument(),
            int(q.stride),
            contexts.tiles,
            contexts.tables,
            Argument::Struct(&[u64::from(window as u32), contexts.slopes]),
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
    let AttentionShape { query_heads, kv_heads, head_size, .. } = *step.shape;
    let fits = (1..=CHUNK_COUNTERS).contains(&kv_heads) && (1..=LARGEST_HEAD).contains(&head_size);
    if !fits || !query_heads.is_multiple_of(kv_heads) {
        let got = format!("{query_heads} and {kv_heads} of {head_size}");
        return Err(unfit_attention("query heads in groups of key-value heads, of at most 256 numbers", got));
    }
    if step.shape.sight == Sight::Window(0) {
        return Err(unfit_attention("a window of at least one position", "none".into()));
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
