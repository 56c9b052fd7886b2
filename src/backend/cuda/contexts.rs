//! Where the rows of a step keep their contexts, as the kernels of attention read it.

use super::device::Device;
use super::kernel::Argument;
use crate::backend::{AttentionShape, BackendError, CacheLayout, SequenceSpan, Sight, alibi_slopes};

/// Rows of one sequence from which on they are many.
const MANY: usize = 8;

/// A row's sequence, and what it sees of it: `AttentionRow` of kernels/attention.cuh.
#[derive(Debug, Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub(super) struct AttentionRow {
    table: i32,
    position: i32,
    first: i32,
    last: i32,
}

impl AttentionRow {
    /// Row `i` of a span.
    fn new(table: usize, span: &SequenceSpan, i: usize, sight: Sight) -> Self {
        let position = span.start + i;
        let (first, last) = match sight {
            Sight::Past => (0, position),
            Sight::Window(width) => ((position + 1).saturating_sub(width), position),
            Sight::All => (0, span.start + span.rows.len() - 1),
        };
        let [table, position, first, last] = [table, position, first, last].map(|n| n as i32);
        Self { table, position, first, last }
    }

    /// For the kernel for few rows: one that another kernel takes.
    fn left_out(self) -> Self {
        Self { first: 0, last: -1, ..self }
    }
}

/// Rows of one sequence: `Tile` of kernels/attend_many.cu.
#[derive(Debug, Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct Tile {
    row: i32,
    count: i32,
    start: i32,
    table: i32,
    last: i32,
}

pub(super) struct Contexts {
    /// Of every row, and the same where those that another kernel takes are left out.
    pub(super) rows: Argument<'static>,
    pub(super) few: Argument<'static>,
    pub(super) any_few: bool,
    pub(super) tiles: Argument<'static>,
    pub(super) tile_count: usize,
    /// Of the query heads, where distance counts; else 0.
    pub(super) slopes: u64,
    pub(super) tables: Argument<'static>,
    /// Entries from one row's block table to the next's; 0 where rows share tables, or do not see their sequence from its first
    /// position on.
    pub(super) table_stride: usize,
    /// Chunks that a row may see of the longest context, which counts up to the next power of two: so that a tape stays the same
    /// while contexts grow.
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
        shape: &AttentionShape,
        (tile, chunk): (usize, usize),
    ) -> Result<Self, BackendError> {
        let sight = shape.sight;
        let context = spans.iter().map(|span| span.start + span.rows.len()).max().unwrap_or(0);
        let chunks = context.div_ceil(chunk).next_power_of_two();
        // As constant as the chunks are, however many blocks a sequence has.
        let stride = (chunks * chunk).div_ceil(layout.block_size);
        let (mut rows, mut few) = (Vec::new(), Vec::new());
        let (mut tables, mut tiles): (Vec<u32>, Vec<Tile>) = (Vec::new(), Vec::new());
        for span in spans {
            let (table, length) = (tables.len(), span.rows.len());
            let of_span = (0..length).map(|i| AttentionRow::new(table, span, i, sight)).collect::<Vec<_>>();
            if tile > 0 && length >= MANY {
                few.extend(of_span.iter().map(|row| row.left_out()));
                tiles.extend(of_span.chunks(tile).zip((span.rows.start..).step_by(tile)).map(tile_of));
            } else {
                few.extend(&of_span);
            }
            rows.extend(of_span);
            let used = (span.start + length).div_ceil(layout.block_size);
            tables.extend(&span.blocks[..used]);
            tables.resize(table + stride, 0);
        }
        let any_few = few.iter().any(|row| row.last >= 0);
        let is_window = matches!(sight, Sight::Window(_));
        let slopes = match shape.alibi {
            true => device.stage_changed(owner + 8, &alibi_slopes(shape.query_heads))?,
            false => 0,
        };
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
            slopes,
            tables: Argument::Address(device.stage_changed(owner + 6, &tables)?),
            table_stride: if alone && !is_window { stride } else { 0 },
            chunks: match sight {
                // However a window lies over them; what they leave is read four numbers at a time, and so not three of them.
                Sight::Window(width) => {
                    let most = width.saturating_add(chunk - 2) / chunk + 1;
                    if most < chunks { most.next_power_of_two() } else { chunks }
                }
                Sight::Past | Sight::All => chunks,
            },
            independent: alone && are_independent(spans, layout),
        })
    }
}

/// Of rows below each other, and which of all rows the first one is.
fn tile_of((rows, first): (&[AttentionRow], usize)) -> Tile {
    let AttentionRow { table, position, .. } = rows[0];
    let last = rows[rows.len() - 1].last;
    Tile { row: first as i32, count: rows.len() as i32, start: position, table, last }
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
