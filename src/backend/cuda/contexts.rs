//! Where the rows of a step keep their contexts, as the kernels of attention read it.

use super::device::Device;
use super::kernel::Argument;
use crate::backend::{BackendError, CacheLayout, SequenceSpan};

/// Rows of one sequence from which on they are many.
const MANY: usize = 8;

/// A row's sequence: `AttentionRow` of kernels/attention.cu.
#[derive(Debug, Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub(super) struct AttentionRow {
    table: i32,
    position: i32,
}

pub(super) struct Contexts {
    /// Of every row, and of those that the kernel for few rows takes; the others' positions are below 0 there.
    pub(super) rows: Argument<'static>,
    pub(super) few: Argument<'static>,
    pub(super) any_few: bool,
    /// `tiles` of kernels/attend_many.cu: first row, count, position, block table.
    pub(super) tiles: Argument<'static>,
    pub(super) tile_count: usize,
    pub(super) tables: Argument<'static>,
    /// Entries from one row's block table to the next's; 0 where rows share tables.
    pub(super) table_stride: usize,
    /// Chunks of the longest context, up to the next power of two: so that a tape stays the same while contexts grow.
    pub(super) chunks: usize,
    /// Whether no row reads what another one writes in this step.
    pub(super) independent: bool,
}

impl Contexts {
    /// Writes them into the step's table; its layers, whose pool belongs to `owner`, share them. `tile`: rows that a tile of
    /// many may have; 0 where there are none. `chunk`: positions that the kernel for few rows takes at once.
    pub(super) fn staged(
        device: &Device,
        owner: u64,
        layout: &CacheLayout,
        spans: &[SequenceSpan],
        (tile, chunk): (usize, usize),
    ) -> Result<Self, BackendError> {
        let context = spans.iter().map(|span| span.start + span.rows.len()).max().unwrap_or(0);
        let chunks = context.div_ceil(chunk).next_power_of_two();
        // As constant as the chunks are, however many blocks a sequence has.
        let stride = (chunks * chunk).div_ceil(layout.block_size);
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
            let used = (span.start + length).div_ceil(layout.block_size);
            tables.extend(&span.blocks[..used]);
            tables.resize(table as usize + stride, 0);
        }
        let any_few = few.iter().any(|row| row.position >= 0);
        let alone = spans.iter().all(|span| span.rows.len() == 1);
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
            table_stride: if alone { stride } else { 0 },
            chunks,
            independent: alone && are_independent(spans, layout),
        })
    }
}

/// Whether each span's block that is written, of spans of one row, is once in its table and in no other's.
fn are_independent(spans: &[SequenceSpan], layout: &CacheLayout) -> bool {
    let bit = |block: u32| (block as usize / 64, 1u64 << (block % 64));
    let mut written = vec![0u64; layout.blocks.div_ceil(64)];
    for span in spans {
        let (word, bit) = bit(span.blocks[span.start / layout.block_size]);
        if written[word] & bit != 0 {
            return false;
        }
        written[word] |= bit;
    }
    let is_read_alone = |span: &SequenceSpan| {
        let before = &span.blocks[..span.start / layout.block_size];
        before.iter().all(|&block| written[bit(block).0] & bit(block).1 == 0)
    };
    spans.iter().all(is_read_alone)
}
