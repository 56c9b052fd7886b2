//! Weights as the kernels read them; `pack` makes them.
//!
//! A matrix `(out, inp)` is cut into panels of 32 outputs; within a panel all outputs of the first inputs come first, then
//! those of the next, and so on. A prefix of the outputs is then a prefix of the panels, a prefix of the inputs a prefix
//! within each panel: every sub-network reads contiguous memory and nothing is copied for it. Where a file's blocks run
//! across an order of channels, the prefix is one within each block (see [`Blocks::places`]).

use super::ahead::{LINE, Runs};
use super::memory::Packed;
use super::vector::{PANEL, QUAD, QUAD_BYTES, QUADS};
use crate::weights::{BLOCK, Blocks};
use half::{bf16, f16};
use std::collections::HashMap;
use std::ops::{Deref, Range};
use std::sync::{Arc, Mutex, PoisonError};

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
    /// [`Self::quads`] of all inputs.
    quads: Vec<u8>,
    /// The same of the prefixes in use that are not simply the first of these: each step wants them.
    prefixes: Mutex<HashMap<usize, Arc<[u8]>>>,
}

/// By block of a prefix: how many of its quads are needed.
#[derive(Debug, Clone)]
pub(super) enum Quads<'a> {
    Of(&'a [u8]),
    Shared(Arc<[u8]>),
}

impl Deref for Quads<'_> {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Of(quads) => quads,
            Self::Shared(quads) => quads,
        }
    }
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
    /// Offset 0, and minimums counted in scales: whole numbers, so that zero points (GPTQ's) are exact, which their products with
    /// scales are not in f16.
    HalvesWithSteps,
}

impl Layout {
    pub(super) const ALL: [Self; 5] =
        [Self::Bytes, Self::BytesWithMinimums, Self::Halves, Self::HalvesWithMinimums, Self::HalvesWithSteps];

    /// The most compact one that holds the quants.
    pub(super) fn of(blocks: &Blocks, bytes: bool) -> Self {
        let within = |low, high| blocks.quants.iter().all(|q| (low..=high).contains(q));
        match blocks.minimums {
            Some(_) if !bytes && within(0, 15) => Self::HalvesWithMinimums,
            Some(_) => Self::BytesWithMinimums,
            None if !bytes && within(-8, 7) => Self::Halves,
            None if !bytes && blocks.quants.chunks(BLOCK).all(fits_halves) => Self::HalvesWithSteps,
            None => Self::Bytes,
        }
    }

    pub(super) fn offset(self) -> i8 {
        match self {
            Self::Bytes | Self::BytesWithMinimums => -128,
            Self::Halves => -8,
            Self::HalvesWithMinimums | Self::HalvesWithSteps => 0,
        }
    }

    pub(super) const fn has_minimums(self) -> bool {
        matches!(self, Self::BytesWithMinimums | Self::HalvesWithMinimums | Self::HalvesWithSteps)
    }

    /// Whether a minimum is to be multiplied with its scale.
    pub(super) const fn counts_in_scales(self) -> bool {
        matches!(self, Self::HalvesWithSteps)
    }

    pub(super) const fn is_halves(self) -> bool {
        matches!(self, Self::Halves | Self::HalvesWithMinimums | Self::HalvesWithSteps)
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

/// Whether four bits hold a block's quants above its least.
fn fits_halves(block: &[i8]) -> bool {
    let (least, most) = block.iter().fold((i8::MAX, i8::MIN), |(l, m), &q| (l.min(q), m.max(q)));
    i16::from(most) - i16::from(least) <= 15
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
    pub(super) fn new(rows: usize, columns: usize, panels: Panels) -> Self {
        let quads = match &panels {
            Panels::Blocks(blocks) => quads(blocks.places.as_deref(), columns),
            Panels::F32(_) | Panels::Bf16(_) => Vec::new(),
        };
        Self { rows, columns, panels, quads, prefixes: Mutex::default() }
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

    /// By block: the quads that hold any of the first `inp` inputs; as many blocks as are needed. None where there are no blocks.
    pub(super) fn quads(&self, inp: usize) -> Quads<'_> {
        match &self.panels {
            Panels::Blocks(blocks) if inp < self.columns => match &blocks.places {
                None if inp.is_multiple_of(BLOCK) => Quads::Of(&self.quads[..inp / BLOCK]),
                places => {
                    let mut prefixes = self.prefixes.lock().unwrap_or_else(PoisonError::into_inner);
                    let prefix = prefixes.entry(inp).or_insert_with(|| quads(places.as_deref(), inp).into());
                    Quads::Shared(Arc::clone(prefix))
                }
            },
            _ => Quads::Of(&self.quads),
        }
    }

    /// Where a panel lies.
    pub(super) fn addresses(&self, panel: usize) -> Range<usize> {
        let bytes = self.columns.div_ceil(self.panels.unit()) * self.panels.unit_bytes();
        let start = self.panels.packed().bytes().as_ptr() as usize + panel * bytes;
        start..start + bytes
    }

    /// What is read of these panels for the first `inp` inputs. Where each block has some of them, as much of every block
    /// as it is of them all on average.
    pub(super) fn reading(&self, panels: Range<usize>, inp: usize) -> Runs {
        let (start, end) = (self.addresses(panels.start).start, self.addresses(panels.end).start);
        let inp = inp.min(self.columns);
        let (run, stride) = match &self.panels {
            Panels::Blocks(BlockPanels { places: Some(_), layout, .. }) => {
                let of_block = self.prefix_bytes(1, inp) / self.columns.div_ceil(BLOCK).max(1);
                (of_block.next_multiple_of(LINE).min(layout.record()), layout.record())
            }
            panels => (inp.div_ceil(panels.unit()) * panels.unit_bytes(), self.addresses(0).len()),
        };
        if run == stride { Runs::whole(start..end) } else { Runs { start, run, stride, end } }
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

/// [`Matrix::quads`] of blocks in order or with `places`.
fn quads(places: Option<&[u32]>, inp: usize) -> Vec<u8> {
    let in_order = |block: usize| (inp - block * BLOCK).min(BLOCK).div_ceil(QUAD) as u8;
    let within = |block: &[u32]| block.partition_point(|&input| (input as usize) < inp).div_ceil(QUAD) as u8;
    match places {
        None => (0..inp.div_ceil(BLOCK)).map(in_order).collect(),
        Some(places) => places.chunks(BLOCK).map(within).collect(),
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
            let minimum = if layout.counts_in_scales() { scale * minimum } else { minimum };
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
