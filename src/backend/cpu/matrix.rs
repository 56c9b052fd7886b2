//! Weights as the kernels read them.
//!
//! A matrix `(out, inp)` is cut into panels of 32 outputs; within a panel all outputs of the first inputs come first, then
//! those of the next, and so on. A prefix of the outputs is then a prefix of the panels, a prefix of the inputs a prefix
//! within each panel: every sub-network reads contiguous memory and nothing is copied for it. Where a file's blocks run
//! across an order of channels, the prefix is one within each block (see [`Blocks::places`]).

use super::super::BackendError;
use super::memory::{Memory, Packed};
use super::vector::{PANEL, QUAD, QUAD_BYTES, QUADS};
use crate::backend::quantise;
use crate::weights::{BLOCK, Blocks, HostData, HostMatrix};
use half::{bf16, f16};
use std::ops::Range;
use std::sync::Arc;

/// How base weights are kept in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Dtype {
    /// As the file has them: the smallest that loses nothing of it.
    #[default]
    Auto,
    F32,
    Bf16,
    /// One byte a weight, a scale for each block of 32.
    Int8,
    /// Half a byte a weight, a scale and a minimum for each block of 32; embeddings one byte.
    Q4,
}

/// A packed weight.
#[derive(Debug)]
pub struct Matrix {
    rows: usize,
    columns: usize,
    pub(super) panels: Panels,
}

/// Outputs beyond the last are zero, inputs beyond the last meet inputs that are.
#[derive(Debug)]
pub(super) enum Panels {
    /// `[panel][input][PANEL]` f32
    F32(Packed),
    /// `[panel][pair of inputs][PANEL][2]` bf16
    Bf16(PairPanels),
    Blocks(BlockPanels),
}

/// Weights in bf16.
#[derive(Debug)]
pub(super) struct PairPanels {
    pub(super) packed: Packed,
    /// Whether inputs are rounded to bf16 too, for the processor's dot product; else they are multiplied as they are.
    pub(super) rounds_inputs: bool,
}

/// `[panel][block]`: [`PANEL`] scales in f16, as many minimums where there are any, then the quants by quads:
/// `[quad][PANEL][QUAD]` bytes, or two quads in the lower and upper halves of each.
#[derive(Debug)]
pub(super) struct BlockPanels {
    pub(super) packed: Packed,
    pub(super) layout: Layout,
    /// By place in a row: the input that stands there; `None` where they stand in order.
    pub(super) places: Option<Arc<[u32]>>,
}

/// `value = scale * (byte - offset) + minimum`
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Layout {
    /// Offset 128, no minimum.
    Bytes,
    /// Offset 128.
    BytesWithMinimums,
    /// Offset 8, no minimum.
    Halves,
    /// Offset 0.
    HalvesWithMinimums,
}

impl Layout {
    pub(super) const ALL: [Self; 4] =
        [Self::Bytes, Self::BytesWithMinimums, Self::Halves, Self::HalvesWithMinimums];

    /// The most compact one that holds the quants.
    fn of(blocks: &Blocks, bytes: bool) -> Self {
        let within = |low, high| blocks.quants.iter().all(|q| (low..=high).contains(q));
        match blocks.minimums {
            Some(_) if !bytes && within(0, 15) => Self::HalvesWithMinimums,
            Some(_) => Self::BytesWithMinimums,
            None if !bytes && within(-8, 7) => Self::Halves,
            None => Self::Bytes,
        }
    }

    fn offset(self) -> i8 {
        match self {
            Self::Bytes | Self::BytesWithMinimums => -128,
            Self::Halves => -8,
            Self::HalvesWithMinimums => 0,
        }
    }

    pub(super) const fn has_minimums(self) -> bool {
        matches!(self, Self::BytesWithMinimums | Self::HalvesWithMinimums)
    }

    pub(super) const fn is_halves(self) -> bool {
        matches!(self, Self::Halves | Self::HalvesWithMinimums)
    }

    /// Where the quants of a block begin.
    pub(super) const fn header(self) -> usize {
        PANEL * size_of::<f16>() * if self.has_minimums() { 2 } else { 1 }
    }

    /// Bytes of one block of a panel.
    pub(super) const fn record(self) -> usize {
        self.header() + QUADS * QUAD_BYTES / if self.is_halves() { 2 } else { 1 }
    }
}

impl Panels {
    /// Inputs that the kernels take together.
    pub(super) fn unit(&self) -> usize {
        match self {
            Self::F32(_) => 1,
            Self::Bf16(_) => 2,
            Self::Blocks(_) => BLOCK,
        }
    }

    /// Bytes of a panel for so many inputs.
    pub(super) fn unit_bytes(&self) -> usize {
        match self {
            Self::F32(_) => PANEL * size_of::<f32>(),
            Self::Bf16(_) => 2 * PANEL * size_of::<bf16>(),
            Self::Blocks(blocks) => blocks.layout.record(),
        }
    }

    fn packed(&self) -> &Packed {
        match self {
            Self::F32(packed)
            | Self::Bf16(PairPanels { packed, .. })
            | Self::Blocks(BlockPanels { packed, .. }) => packed,
        }
    }
}

impl Matrix {
    /// # Errors
    /// A matrix without rows or columns, or no memory.
    pub(super) fn pack(how: &Packing<'_>, host: HostMatrix, dtype: Dtype) -> Result<Self, BackendError> {
        let host = sized(host)?;
        let (name, rows, columns) = (host.name.clone(), host.rows, host.columns);
        let packer = Packer { how, name: &name, rows, columns };
        let panels = match (dtype, host.data) {
            (Dtype::Auto, HostData::F32(values)) => packer.f32(&values)?,
            // What is to lose nothing does not round its inputs either.
            (Dtype::Auto, HostData::Bf16(values)) => packer.bf16(&values, false)?,
            (Dtype::Bf16, HostData::Bf16(values)) => packer.bf16(&values, how.bf16_products)?,
            (Dtype::Auto, HostData::Blocks(blocks)) => packer.blocks(&blocks, false, None)?,
            (Dtype::Q4, HostData::Blocks(blocks)) if Layout::of(&blocks, false).is_halves() => {
                packer.blocks(&blocks, false, None)?
            }
            (Dtype::Int8, HostData::Blocks(blocks)) if blocks.minimums.is_none() => {
                packer.blocks(&blocks, true, None)?
            }
            (dtype, data) => {
                let values = HostMatrix { name: host.name, rows, columns, data }.to_f32();
                match dtype {
                    Dtype::Auto | Dtype::F32 => packer.f32(&values)?,
                    Dtype::Bf16 => {
                        let rounded = values.into_iter().map(bf16::from_f32).collect::<Vec<_>>();
                        packer.bf16(&rounded, how.bf16_products)?
                    }
                    Dtype::Int8 => packer.blocks(&quantise::to_bytes(&values, columns, None), true, None)?,
                    Dtype::Q4 => packer.blocks(&quantise::to_halves(&values, columns), false, None)?,
                }
            }
        };
        Ok(Self { rows, columns, panels })
    }

    /// An adapter's A and B, so that they take the inputs of the weight that they stand beside as these have been prepared:
    /// beside a quantised one as bytes, else as `dtype` says.
    pub(super) fn pack_adapter(
        how: &Packing<'_>,
        [a, b]: [HostMatrix; 2],
        beside: &Self,
        dtype: Dtype,
    ) -> Result<[Self; 2], BackendError> {
        let dtype = if matches!(beside.panels, Panels::Blocks(_)) { Dtype::Int8 } else { dtype };
        let a = match &beside.panels {
            Panels::Blocks(BlockPanels { places: Some(places), .. }) if places.len() == a.columns => {
                let a = sized(a)?;
                let packer = Packer { how, name: &a.name, rows: a.rows, columns: a.columns };
                let blocks = quantise::to_bytes(&a.to_f32(), a.columns, Some(places));
                let panels = packer.blocks(&blocks, true, Some(Arc::clone(places)))?;
                Self { rows: a.rows, columns: a.columns, panels }
            }
            _ => Self::pack(how, a, dtype)?,
        };
        Ok([a, Self::pack(how, b, dtype)?])
    }

    /// Outputs.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Inputs.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Bytes in memory.
    pub fn bytes(&self) -> usize {
        self.prefix_bytes(self.rows, self.columns)
    }

    /// Bytes that are read for the first `out` outputs of the first `inp` inputs, in whole panels.
    pub(super) fn prefix_bytes(&self, out: usize, inp: usize) -> usize {
        let (out, inp) = (out.min(self.rows), inp.min(self.columns));
        let of_panel = match &self.panels {
            Panels::F32(_) => inp * PANEL * size_of::<f32>(),
            Panels::Bf16(_) => inp.div_ceil(2) * 2 * PANEL * size_of::<bf16>(),
            Panels::Blocks(blocks) => {
                let of_block = |&quads: &u8| match blocks.layout.is_halves() {
                    true => usize::from(quads).div_ceil(2) * QUAD_BYTES,
                    false => usize::from(quads) * QUAD_BYTES,
                };
                let quads = self.quads(inp);
                quads.len() * blocks.layout.header() + quads.iter().map(of_block).sum::<usize>()
            }
        };
        out.div_ceil(PANEL) * of_panel
    }

    /// By block: the quads that hold any of the first `inp` inputs; as many blocks as are needed.
    pub(super) fn quads(&self, inp: usize) -> Vec<u8> {
        let Panels::Blocks(BlockPanels { places: Some(places), .. }) = &self.panels else {
            let of_block = |block: usize| (inp - block * BLOCK).min(BLOCK).div_ceil(QUAD) as u8;
            return (0..inp.div_ceil(BLOCK)).map(of_block).collect();
        };
        let of_block =
            |block: &[u32]| block.partition_point(|&input| (input as usize) < inp).div_ceil(QUAD) as u8;
        places.chunks(BLOCK).map(of_block).collect()
    }

    /// Where a panel lies.
    pub(super) fn addresses(&self, panel: usize) -> Range<usize> {
        let bytes = self.columns.div_ceil(self.panels.unit()) * self.panels.unit_bytes();
        let start = self.panels.packed().bytes().as_ptr() as usize + panel * bytes;
        start..start + bytes
    }

    /// Where a panel and those after it lie.
    pub(super) fn addresses_from(&self, panel: usize) -> Range<usize> {
        self.addresses(panel).start..self.panels.packed().bytes().as_ptr_range().end as usize
    }

    /// Row `row` as f32, for an embedding.
    pub(super) fn unpack_row(&self, row: usize, into: &mut [f32]) {
        let (panel, lane) = (row / PANEL, row % PANEL);
        match &self.panels {
            Panels::F32(packed) => {
                let values: &[f32] = bytemuck::cast_slice(packed.bytes());
                let at = |input: usize| (panel * self.columns + input) * PANEL + lane;
                into.iter_mut().enumerate().for_each(|(input, value)| *value = values[at(input)]);
            }
            Panels::Bf16(PairPanels { packed, .. }) => {
                let values: &[bf16] = bytemuck::cast_slice(packed.bytes());
                let pair = |input: usize| (panel * self.columns.div_ceil(2) + input / 2) * PANEL + lane;
                let at = |input: usize| pair(input) * 2 + input % 2;
                into.iter_mut().enumerate().for_each(|(input, value)| *value = values[at(input)].to_f32());
            }
            Panels::Blocks(blocks) => blocks.unpack_row(self.columns, (panel, lane), into),
        }
    }
}

impl BlockPanels {
    fn unpack_row(&self, columns: usize, (panel, lane): (usize, usize), into: &mut [f32]) {
        let (layout, per_panel) = (self.layout, columns.div_ceil(BLOCK));
        let records = self.packed.bytes().chunks_exact(layout.record()).skip(panel * per_panel);
        for (block, record) in records.take(per_panel).enumerate() {
            let header: &[f16] = bytemuck::cast_slice(&record[..layout.header()]);
            let scale = header[lane].to_f32();
            let minimum = if layout.has_minimums() { header[PANEL + lane].to_f32() } else { 0.0 };
            let quants = &record[layout.header()..];
            for i in 0..BLOCK.min(columns - block * BLOCK) {
                let (quad, at) = (i / QUAD, lane * QUAD + i % QUAD);
                let byte = match (layout.is_halves(), quad % 2) {
                    (false, _) => quants[quad * QUAD_BYTES + at],
                    (true, 0) => quants[quad / 2 * QUAD_BYTES + at] & 15,
                    (true, _) => quants[quad / 2 * QUAD_BYTES + at] >> 4,
                };
                let place = block * BLOCK + i;
                let input = self.places.as_ref().map_or(place, |places| places[place] as usize);
                into[input] = scale * (f32::from(byte) + f32::from(layout.offset())) + minimum;
            }
        }
    }
}

fn sized(host: HostMatrix) -> Result<HostMatrix, BackendError> {
    if host.rows > 0 && host.columns > 0 {
        return Ok(host);
    }
    Err(BackendError::Shape {
        operation: "pack",
        expected: format!("`{}` with rows and columns", host.name),
        got: format!("({}, {})", host.rows, host.columns),
    })
}

/// Where and for which processor weights are packed.
pub(super) struct Packing<'a> {
    pub(super) memory: &'a Memory,
    /// Whether the processor multiplies bf16 as such.
    pub(super) bf16_products: bool,
}

/// Row-major values to panels.
struct Packer<'a> {
    how: &'a Packing<'a>,
    name: &'a str,
    rows: usize,
    columns: usize,
}

impl Packer<'_> {
    fn f32(&self, values: &[f32]) -> Result<Panels, BackendError> {
        Ok(Panels::F32(self.dense(values, 1)?))
    }

    fn bf16(&self, values: &[bf16], rounds_inputs: bool) -> Result<Panels, BackendError> {
        Ok(Panels::Bf16(PairPanels { packed: self.dense(values, 2)?, rounds_inputs }))
    }

    /// `[panel][group of inputs][PANEL][group]`
    fn dense<T: bytemuck::Pod>(&self, values: &[T], group: usize) -> Result<Packed, BackendError> {
        let of_panel = self.columns.next_multiple_of(group) * PANEL;
        let bytes = self.rows.div_ceil(PANEL) * of_panel * size_of::<T>();
        self.how.memory.take(self.name, bytes, |packed| {
            let packed: &mut [T] = bytemuck::cast_slice_mut(packed);
            for (panel, rows) in packed.chunks_exact_mut(of_panel).zip(values.chunks(self.columns * PANEL)) {
                for (lane, row) in rows.chunks_exact(self.columns).enumerate() {
                    for (group_of_lanes, inputs) in
                        panel.chunks_exact_mut(PANEL * group).zip(row.chunks(group))
                    {
                        group_of_lanes[lane * group..lane * group + inputs.len()].copy_from_slice(inputs);
                    }
                }
            }
        })
    }

    /// `bytes`: a byte a quant even where half a byte would do.
    fn blocks(
        &self,
        blocks: &Blocks,
        bytes: bool,
        places: Option<Arc<[u32]>>,
    ) -> Result<Panels, BackendError> {
        let layout = Layout::of(blocks, bytes);
        let (per_row, record) = (self.columns.div_ceil(BLOCK), layout.record());
        let total = self.rows.div_ceil(PANEL) * per_row * record;
        let packed = self.how.memory.take(self.name, total, |packed| {
            for (index, record) in packed.chunks_exact_mut(record).enumerate() {
                let (panel, block) = (index / per_row, index % per_row);
                let (header, quants) = record.split_at_mut(layout.header());
                let header: &mut [f16] = bytemuck::cast_slice_mut(header);
                let rows = panel * PANEL..self.rows.min((panel + 1) * PANEL);
                for (lane, row) in rows.enumerate() {
                    header[lane] = f16::from_f32(blocks.scales[row * per_row + block]);
                    if let Some(minimums) = blocks.minimums.as_ref().filter(|_| layout.has_minimums()) {
                        header[PANEL + lane] = f16::from_f32(minimums[row * per_row + block]);
                    }
                    let columns = block * BLOCK..self.columns.min((block + 1) * BLOCK);
                    let row = &blocks.quants[row * self.columns..(row + 1) * self.columns][columns];
                    pack_quants(layout, lane, row, quants);
                }
            }
        })?;
        let own = || blocks.places.as_ref().map(|places| places.as_slice().into());
        Ok(Panels::Blocks(BlockPanels { packed, layout, places: places.or_else(own) }))
    }
}

/// One lane's quants of one block, at most [`BLOCK`].
fn pack_quants(layout: Layout, lane: usize, row: &[i8], quants: &mut [u8]) {
    for (quad, four) in row.chunks(QUAD).enumerate() {
        for (i, &quant) in four.iter().enumerate() {
            // Within 0..=255, or 0..=15 for halves: `Layout::of` has looked.
            let byte = quant.wrapping_sub(layout.offset()) as u8;
            let at = lane * QUAD + i;
            match (layout.is_halves(), quad % 2) {
                (false, _) => quants[quad * QUAD_BYTES + at] = byte,
                (true, 0) => quants[quad / 2 * QUAD_BYTES + at] |= byte,
                (true, _) => quants[quad / 2 * QUAD_BYTES + at] |= byte << 4,
            }
        }
    }
}
