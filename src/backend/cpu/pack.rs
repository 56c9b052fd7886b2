//! From a file's numbers to panels: all threads take panels, each straight from what the file has, so that nothing but the
//! panels themselves is ever as large as a weight.
#![allow(unsafe_code)]

use super::super::BackendError;
use super::matrix::{BlockPanels, Dtype, Layout, Matrix, PairPanels, Panels};
use super::memory::{Memory, Packed};
use super::shared::Shared;
use super::team::Team;
use super::vector::{PANEL, QUAD, QUAD_BYTES};
use crate::backend::quantise;
use crate::weights::{BLOCK, Blocks, HostData, HostMatrix};
use half::{bf16, f16};
use std::ops::Range;
use std::sync::Arc;

/// Inputs that are moved together, so that what is read and what is written stay in the first-level cache.
const STRETCH: usize = 64;

/// Where, by whom and for which processor weights are packed.
pub(super) struct Packing<'a> {
    pub(super) memory: &'a Memory,
    pub(super) team: &'a Team,
    /// Whether the processor multiplies bf16 as such.
    pub(super) bf16_products: bool,
}

impl Packing<'_> {
    /// # Errors
    /// A matrix without rows or columns, or no memory.
    pub(super) fn pack(&self, host: &HostMatrix, dtype: Dtype) -> Result<Matrix, BackendError> {
        let packer = Packer::new(self, host)?;
        let panels = match (dtype, &host.data) {
            // What is to lose nothing does not round its inputs either.
            (Dtype::Auto, HostData::Bf16(values)) => packer.bf16(|rows| &values[rows], false)?,
            (Dtype::Bf16, HostData::Bf16(values)) => packer.bf16(|rows| &values[rows], self.bf16_products)?,
            (Dtype::Auto, HostData::Blocks(blocks)) => packer.blocks(blocks, false)?,
            (Dtype::Q4, HostData::Blocks(blocks)) if Layout::of(blocks, false).is_halves() => {
                packer.blocks(blocks, false)?
            }
            (Dtype::Int8, HostData::Blocks(blocks)) if blocks.minimums.is_none() => {
                packer.blocks(blocks, true)?
            }
            (Dtype::Auto | Dtype::F32, _) => packer.f32()?,
            (Dtype::Bf16, _) => packer.bf16(
                |values| {
                    let rows = values.start / host.columns..values.end / host.columns;
                    host.rows_to_f32(rows).into_iter().map(bf16::from_f32).collect::<Vec<_>>()
                },
                self.bf16_products,
            )?,
            (Dtype::Int8, _) => packer.rounded(Layout::Bytes, None)?,
            (Dtype::Q4, _) => packer.rounded(Layout::HalvesWithMinimums, None)?,
        };
        Ok(Matrix::new(host.rows, host.columns, panels))
    }

    /// An adapter's A and B, so that they take the inputs of the weight that they stand beside as these have been prepared:
    /// beside a quantised one as bytes, else as `dtype` says.
    pub(super) fn pack_adapter(
        &self,
        [a, b]: [&HostMatrix; 2],
        beside: &Matrix,
        dtype: Dtype,
    ) -> Result<[Matrix; 2], BackendError> {
        let dtype = if matches!(beside.panels, Panels::Blocks(_)) { Dtype::Int8 } else { dtype };
        let a = match &beside.panels {
            Panels::Blocks(BlockPanels { places: Some(places), .. }) if places.len() == a.columns => {
                let panels = Packer::new(self, a)?.rounded(Layout::Bytes, Some(places))?;
                Matrix::new(a.rows, a.columns, panels)
            }
            _ => self.pack(a, dtype)?,
        };
        Ok([a, self.pack(b, dtype)?])
    }
}

/// One matrix on its way.
struct Packer<'a> {
    how: &'a Packing<'a>,
    host: &'a HostMatrix,
}

impl<'a> Packer<'a> {
    fn new(how: &'a Packing<'a>, host: &'a HostMatrix) -> Result<Self, BackendError> {
        if host.rows > 0 && host.columns > 0 {
            return Ok(Self { how, host });
        }
        Err(BackendError::Shape {
            operation: "pack",
            expected: format!("`{}` with rows and columns", host.name),
            got: format!("({}, {})", host.rows, host.columns),
        })
    }

    fn f32(&self) -> Result<Panels, BackendError> {
        let columns = self.host.columns;
        let of_panel = columns * PANEL * size_of::<f32>();
        let packed = self.each_panel(of_panel, |rows, panel| {
            if let HostData::F32(values) = &self.host.data {
                transpose(&values[rows.start * columns..rows.end * columns], columns, 1, panel);
            } else {
                transpose(&self.host.rows_to_f32(rows), columns, 1, panel);
            }
        })?;
        Ok(Panels::F32(packed))
    }

    /// `values` gives some of the row-major numbers, whole rows.
    fn bf16<V: AsRef<[bf16]>>(
        &self,
        values: impl Fn(Range<usize>) -> V + Sync,
        rounds_inputs: bool,
    ) -> Result<Panels, BackendError> {
        let columns = self.host.columns;
        let of_panel = columns.next_multiple_of(2) * PANEL * size_of::<bf16>();
        let packed = self.each_panel(of_panel, |rows, panel| {
            let values = values(rows.start * columns..rows.end * columns);
            transpose(values.as_ref(), columns, 2, panel);
        })?;
        Ok(Panels::Bf16(PairPanels { packed, rounds_inputs }))
    }

    /// Blocks as the file has them; `bytes`: a byte a quant even where half a byte would do.
    fn blocks(&self, blocks: &Blocks, bytes: bool) -> Result<Panels, BackendError> {
        let layout = Layout::of(blocks, bytes);
        let packed = self.each_panel(self.block_panel(layout), |rows, panel| {
            put_blocks(blocks, self.host.columns, layout, rows, panel);
        })?;
        let places = blocks.places.as_ref().map(|places| places.as_slice().into());
        Ok(Panels::Blocks(BlockPanels { packed, layout, places }))
    }

    /// Values that are rounded to blocks on the way.
    fn rounded(&self, layout: Layout, places: Option<&Arc<[u32]>>) -> Result<Panels, BackendError> {
        let columns = self.host.columns;
        let packed = self.each_panel(self.block_panel(layout), |rows, panel| {
            let values = self.host.rows_to_f32(rows.clone());
            let blocks = if layout.is_halves() {
                quantise::to_halves(&values, columns)
            } else {
                quantise::to_bytes(&values, columns, places.map(|places| &**places))
            };
            put_blocks(&blocks, columns, layout, 0..rows.len(), panel);
        })?;
        Ok(Panels::Blocks(BlockPanels { packed, layout, places: places.cloned() }))
    }

    /// Bytes of a panel of blocks.
    fn block_panel(&self, layout: Layout) -> usize {
        self.host.columns.div_ceil(BLOCK) * layout.record()
    }

    /// Calls `fill` with the rows of each panel and its bytes, which are zero.
    fn each_panel(
        &self,
        of_panel: usize,
        fill: impl Fn(Range<usize>, &mut [u8]) + Sync,
    ) -> Result<Packed, BackendError> {
        let HostMatrix { name, rows, .. } = self.host;
        let panels = rows.div_ceil(PANEL);
        self.how.memory.take(name, panels * of_panel, |packed| {
            let packed = Shared::new(packed);
            self.how.team.each(panels, |panel| {
                let rows = panel * PANEL..(*rows).min((panel + 1) * PANEL);
                // SAFETY: each panel is one piece of work, done once.
                fill(rows, unsafe { packed.part(panel * of_panel..(panel + 1) * of_panel) });
            });
        })
    }
}

/// Rows to `[group of inputs][PANEL][group]`.
fn transpose<T: bytemuck::Pod>(rows: &[T], columns: usize, group: usize, panel: &mut [u8]) {
    let panel: &mut [T] = bytemuck::cast_slice_mut(panel);
    for start in (0..columns).step_by(STRETCH) {
        let inputs = start..columns.min(start + STRETCH);
        let groups = &mut panel[start * PANEL..];
        for (lane, row) in rows.chunks_exact(columns).enumerate() {
            let groups = groups.chunks_exact_mut(PANEL * group);
            for (to, from) in groups.zip(row[inputs.clone()].chunks(group)) {
                to[lane * group..lane * group + from.len()].copy_from_slice(from);
            }
        }
    }
}

/// Some rows of blocks to one panel's records.
fn put_blocks(blocks: &Blocks, columns: usize, layout: Layout, rows: Range<usize>, panel: &mut [u8]) {
    let per_row = columns.div_ceil(BLOCK);
    for (block, record) in panel.chunks_exact_mut(layout.record()).enumerate() {
        let (header, quants) = record.split_at_mut(layout.header());
        let header: &mut [f16] = bytemuck::cast_slice_mut(header);
        let inputs = block * BLOCK..columns.min((block + 1) * BLOCK);
        for (lane, row) in rows.clone().enumerate() {
            header[lane] = f16::from_f32(blocks.scales[row * per_row + block]);
            if let Some(minimums) = blocks.minimums.as_ref().filter(|_| layout.has_minimums()) {
                header[PANEL + lane] = f16::from_f32(minimums[row * per_row + block]);
            }
            let row = &blocks.quants[row * columns..(row + 1) * columns][inputs.clone()];
            let mut offset = layout.offset();
            if layout.counts_in_scales() {
                offset = row.iter().copied().min().unwrap_or(0);
                header[PANEL + lane] = f16::from_f32(f32::from(offset));
            }
            put_quants(layout, offset, lane, row, quants);
        }
    }
}

/// One lane's quants of one block, at most [`BLOCK`].
fn put_quants(layout: Layout, offset: i8, lane: usize, row: &[i8], quants: &mut [u8]) {
    // Within 0..=255, or 0..=15 for halves: `Layout::of` has looked.
    let byte = |quant: i8| quant.wrapping_sub(offset) as u8;
    let lanes = lane * QUAD..(lane + 1) * QUAD;
    if layout.is_halves() {
        for (quad, four) in row.chunks(QUAD).enumerate() {
            let to = &mut quants[quad / 2 * QUAD_BYTES..][lanes.clone()];
            to.iter_mut().zip(four).for_each(|(to, &quant)| *to |= byte(quant) << (quad % 2 * 4));
        }
    } else {
        for (to, four) in quants.chunks_exact_mut(QUAD_BYTES).zip(row.chunks(QUAD)) {
            to[lanes.clone()].iter_mut().zip(four).for_each(|(to, &quant)| *to = byte(quant));
        }
    }
}
