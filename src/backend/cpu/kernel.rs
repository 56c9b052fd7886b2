//! The inner loop: a few rows of activations times one panel of weights.
//!
//! It is written once over [`Vector`] and compiled for each instruction set. Every output has one accumulator that
//! takes the inputs in rising order, so the number of rows in a tile, and how far its neighbours reach, changes nothing
//! in any of them.
#![allow(unsafe_code)]

use super::inputs::{Inputs, QuantBlock};
use super::matrix::{BlockPanels, Layout, Matrix, PairPanels, Panels};
use super::vector::{AHEAD, PANEL, Pair, Portable, QUAD, QUAD_BYTES, QUADS, Vector, ask_ahead};
#[cfg(target_arch = "x86_64")]
use super::vector::{Avx2, Avx512};
use half::{bf16, f16};

/// Accumulators of one row: the outputs of one panel.
pub(super) type Lanes = [f32; PANEL];

/// The most rows that one tile holds.
pub(super) const TILE: usize = 12;

/// The instruction set to compute with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kernel {
    Portable,
    Avx2,
    Avx512,
    /// With the bf16 dot product.
    Avx512Bf16,
}

impl Kernel {
    /// The best that this processor has.
    pub(super) fn detect() -> Self {
        *Self::available().last().unwrap_or(&Self::Portable)
    }

    /// All that this processor has, the best last.
    pub(super) fn available() -> Vec<Self> {
        let mut available = vec![Self::Portable];
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("f16c");
            if avx2 && is_x86_feature_detected!("fma") {
                available.push(Self::Avx2);
            }
            let avx512 = is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw");
            if avx512 && is_x86_feature_detected!("avx512vnni") {
                available.push(Self::Avx512);
                if is_x86_feature_detected!("avx512bf16") {
                    // Intel's dot product has half the throughput of two f32 products (Sapphire Rapids, 169 against 348
                    // GFLOP/s on two cores), AMD's twice (Zen 4, 458 against 229).
                    let place = available.len() - usize::from(!is_amd());
                    available.insert(place, Self::Avx512Bf16);
                }
            }
        }
        available
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            Self::Avx2 => "AVX2",
            Self::Avx512 => "AVX-512 VNNI",
            Self::Avx512Bf16 => "AVX-512 VNNI and BF16",
        }
    }

    /// Adds `matrix[panel, ..] x` to the accumulators of each row.
    ///
    /// # Safety
    /// The tile's rows have been filled, before a barrier.
    #[inline(always)]
    pub(super) unsafe fn accumulate(self, tile: &Tile<'_>, lanes: &mut [Lanes]) {
        let accumulate = match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => with_avx2::accumulate,
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => with_avx512::accumulate,
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16 => with_avx512_bf16::accumulate,
            _ => portable::accumulate,
        };
        // SAFETY: `available` has seen these instructions on this processor; the rows by contract.
        unsafe { accumulate(tile, lanes) }
    }

    /// Runs plain loops compiled for this instruction set, so that the compiler can use its registers in them.
    #[inline(always)]
    pub(super) fn vectorised<R>(self, work: impl FnOnce() -> R) -> R {
        match self {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `available` has seen these instructions on this processor.
            Self::Avx2 => unsafe { vectorised_avx2(work) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `available` has seen these instructions on this processor.
            Self::Avx512 | Self::Avx512Bf16 => unsafe { vectorised_avx512(work) },
            _ => work(),
        }
    }
}

#[cfg(target_arch = "x86_64")]
fn is_amd() -> bool {
    let id = std::arch::x86_64::__cpuid(0);
    // "AuthenticAMD"
    (id.ebx, id.edx, id.ecx) == (0x6874_7541, 0x6974_6e65, 0x444d_4163)
}

/// One panel times some rows.
pub(super) struct Tile<'a> {
    pub(super) matrix: &'a Matrix,
    pub(super) panel: usize,
    pub(super) inputs: &'a Inputs<'a>,
    /// The rows, at most [`TILE`], and how many inputs of each are active, falling.
    pub(super) rows: &'a [TileRow],
    /// Whether the panel is touched for the first time: memory is asked for ahead then.
    pub(super) cold: bool,
    /// For quantised weights: [`Matrix::quads`] of the first row's inputs.
    pub(super) quads: &'a [u8],
}

/// A row's part in a tile.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct TileRow {
    pub(super) row: usize,
    pub(super) inp: usize,
}

/// The kernels of one instruction set: a function for each form of weights, so that the compiler has them one by one.
macro_rules! instruction_set {
    ($name:ident, $vector:ty $(, $features:literal)?) => {
        mod $name {
            use super::*;

            /// # Safety
            /// The processor has these instructions; the tile's rows have been filled, before a barrier.
            pub(super) unsafe fn accumulate(tile: &Tile<'_>, lanes: &mut [Lanes]) {
                // SAFETY: by contract; so in all of these.
                unsafe {
                    match &tile.matrix.panels {
                        Panels::F32(_) => form::<F32>(tile, lanes),
                        Panels::Bf16(PairPanels { rounds_inputs: false, .. }) => form::<BF16>(tile, lanes),
                        Panels::Bf16(_) => form::<BF16_DOT>(tile, lanes),
                        Panels::Blocks(BlockPanels { layout, .. }) => match layout {
                            Layout::Bytes => form::<BYTES>(tile, lanes),
                            Layout::BytesWithMinimums => form::<BYTES_WITH_MINIMUMS>(tile, lanes),
                            Layout::Halves => form::<HALVES>(tile, lanes),
                            Layout::HalvesWithMinimums => form::<HALVES_WITH_MINIMUMS>(tile, lanes),
                        },
                    }
                }
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn form<const FORM: usize>(tile: &Tile<'_>, lanes: &mut [Lanes]) {
                // SAFETY: as above.
                unsafe { staircase::<$vector, FORM>(tile, lanes) }
            }
        }
    };
}

instruction_set!(portable, Portable);
#[cfg(target_arch = "x86_64")]
instruction_set!(with_avx2, Avx2, "avx2,fma,f16c");
#[cfg(target_arch = "x86_64")]
instruction_set!(with_avx512, Avx512<false>, "avx512f,avx512bw,avx512vnni,avx2,fma,f16c");
#[cfg(target_arch = "x86_64")]
instruction_set!(with_avx512_bf16, Avx512<true>, "avx512f,avx512bw,avx512vnni,avx512bf16,avx2,fma,f16c");

/// The forms of weights, for a constant of the kernel; the quantised ones by [`LAYOUTS`].
const BYTES: usize = 0;
const BYTES_WITH_MINIMUMS: usize = 1;
const HALVES: usize = 2;
const HALVES_WITH_MINIMUMS: usize = 3;
const F32: usize = 4;
const BF16: usize = 5;
const BF16_DOT: usize = 6;
const LAYOUTS: [Layout; 4] =
    [Layout::Bytes, Layout::BytesWithMinimums, Layout::Halves, Layout::HalvesWithMinimums];

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
fn vectorised_avx2<R>(work: impl FnOnce() -> R) -> R {
    work()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx2,fma,f16c")]
fn vectorised_avx512<R>(work: impl FnOnce() -> R) -> R {
    work()
}

/// The staircase: as long as all rows have inputs, all take part; then those that reach further.
///
/// # Safety
/// The tile's rows have been filled, before a barrier.
#[inline(always)]
unsafe fn staircase<V: Vector, const FORM: usize>(tile: &Tile<'_>, lanes: &mut [Lanes]) {
    assert!(tile.rows.len() == lanes.len() && lanes.len() <= TILE);
    let columns = tile.matrix.columns();
    let unit = match &tile.matrix.panels {
        Panels::F32(_) => 1,
        Panels::Bf16(_) => 2,
        // Blocks in an order of their own: each has some of every row's inputs.
        Panels::Blocks(BlockPanels { places: Some(_), .. }) => columns.max(1),
        Panels::Blocks(_) => PANEL,
    };
    let mut ends = [0; TILE];
    for (end, row) in ends.iter_mut().zip(tile.rows) {
        *end = row.inp.min(columns).div_ceil(unit);
    }
    let (mut start, mut rows) = (0, tile.rows.len());
    while rows > 0 {
        let end = ends[rows - 1];
        if end > start {
            // SAFETY: by contract.
            unsafe { stage::<V, FORM>(tile, start..end, &mut lanes[..rows]) };
            start = end;
        }
        rows -= 1;
    }
}

/// How many rows are taken at once.
struct AtOnce<V, const FORM: usize>(std::marker::PhantomData<V>);

impl<V: Vector, const FORM: usize> AtOnce<V, FORM> {
    const ROWS: usize = match FORM {
        BYTES | BYTES_WITH_MINIMUMS => V::BYTES_ROWS,
        HALVES | HALVES_WITH_MINIMUMS => V::HALVES_ROWS,
        _ => V::ROWS,
    };
}

/// Units of inputs `range` for the first rows of a tile.
///
/// # Safety
/// The tile's rows have been filled, before a barrier.
#[inline(always)]
unsafe fn stage<V: Vector, const FORM: usize>(
    tile: &Tile<'_>,
    range: std::ops::Range<usize>,
    lanes: &mut [Lanes],
) {
    let most = AtOnce::<V, FORM>::ROWS;
    let mut row = 0;
    while row < lanes.len() {
        // Cut evenly: 8 rows as 4 and 4 where 6 fit.
        let left = lanes.len() - row;
        let range = range.clone();
        let rows = left.div_ceil(left.div_ceil(most));
        // A constant first, so that what does not fit into the registers of an instruction set is not compiled for it.
        macro_rules! take {
            ($($count:literal)*) => {
                $(if AtOnce::<V, FORM>::ROWS >= $count && rows >= $count {
                    // SAFETY: by contract.
                    row += unsafe { some_rows::<V, FORM, $count>(tile, range, row, lanes) };
                } else)* {
                    // SAFETY: by contract.
                    row += unsafe { some_rows::<V, FORM, 1>(tile, range, row, lanes) };
                }
            };
        }
        take!(12 8 6 5 4 3 2);
    }
}

/// `R` rows from `row` on; returns `R`.
///
/// # Safety
/// The tile's rows have been filled, before a barrier.
#[inline(always)]
unsafe fn some_rows<V: Vector, const FORM: usize, const R: usize>(
    tile: &Tile<'_>,
    range: std::ops::Range<usize>,
    row: usize,
    lanes: &mut [Lanes],
) -> usize {
    let Tile { matrix, panel, inputs, .. } = *tile;
    // What the first rows of a panel have read is near for the others.
    let cold = tile.cold && row == 0;
    let lanes: &mut [Lanes; R] = lanes[row..].first_chunk_mut().expect("as many accumulators as rows");
    // Loops, not `array::map`, see `vector::avx2`.
    let mut sums = [V::zero(); R];
    for r in 0..R {
        sums[r] = V::load(&lanes[r]);
    }
    let rows = &tile.rows[row..row + R];
    match &matrix.panels {
        Panels::F32(packed) if FORM == F32 => {
            let panels: &[Lanes] = bytemuck::cast_slice(packed.bytes());
            let weights = &panels[panel * matrix.columns()..][range.clone()];
            let mut x: [&[f32]; R] = [&[]; R];
            for r in 0..R {
                // SAFETY: by contract; so below.
                x[r] = unsafe { &inputs.f32(rows[r].row)[range.clone()] };
            }
            check(weights.len(), x);
            V::add_inputs(&mut sums, weights, x, cold);
        }
        Panels::Bf16(pairs) if FORM == BF16 || FORM == BF16_DOT => {
            let panels: &[[[bf16; 2]; PANEL]] = bytemuck::cast_slice(pairs.packed.bytes());
            let weights = &panels[panel * matrix.columns().div_ceil(2)..][range.clone()];
            if FORM == BF16_DOT {
                let mut x: [&[Pair]; R] = [&[]; R];
                for r in 0..R {
                    // SAFETY: by contract.
                    x[r] = unsafe { &inputs.pairs(rows[r].row)[range.clone()] };
                }
                check(weights.len(), x);
                for (k, weights) in weights.iter().enumerate() {
                    if cold {
                        ask_ahead::<V, _>(weights, AHEAD);
                    }
                    for r in 0..R {
                        sums[r] = sums[r].add_dot(x[r][k], weights);
                    }
                }
            } else {
                let mut x: [&[[f32; 2]]; R] = [&[]; R];
                for r in 0..R {
                    // SAFETY: by contract.
                    x[r] = unsafe { &inputs.f32(rows[r].row).as_chunks().0[range.clone()] };
                }
                check(weights.len(), x);
                V::add_pairs(&mut sums, weights, x, cold);
            }
        }
        Panels::Blocks(blocks) if FORM < LAYOUTS.len() => {
            let per_panel = matrix.columns().div_ceil(PANEL);
            // In an order of its own, a matrix is one unit.
            let range = if blocks.places.is_some() { 0..per_panel } else { range };
            let quads = &tile.quads[range.clone()];
            let mut x: [&[QuantBlock]; R] = [&[]; R];
            for r in 0..R {
                // SAFETY: by contract.
                x[r] = unsafe { &inputs.blocks(rows[r].row)[range.clone()] };
            }
            let from = (panel * per_panel + range.start, cold);
            quants::<V, FORM, R>(&mut sums, blocks, from, quads, x);
        }
        // The form is that of the panels, see `instruction_set`.
        _ => {}
    }
    for r in 0..R {
        sums[r].store(&mut lanes[r]);
    }
    R
}

/// That each row has an input for each weight, so that the loops need not look each time.
#[inline(always)]
fn check<T, const R: usize>(weights: usize, x: [&[T]; R]) {
    for x in x {
        assert!(x.len() == weights);
    }
}

/// Within a block, integers; then its scale, and its minimum times the sum of the inputs. `first` is the block of the
/// matrix that the first of `quads` belongs to.
#[inline(always)]
fn quants<V: Vector, const FORM: usize, const R: usize>(
    sums: &mut [V; R],
    blocks: &BlockPanels,
    (first, cold): (usize, bool),
    quads: &[u8],
    x: [&[QuantBlock]; R],
) {
    let layout = const { LAYOUTS[FORM % LAYOUTS.len()] };
    // Whole blocks, so that where only their beginnings are needed only these are asked for.
    let ahead = if cold { 2 * layout.record() } else { 0 };
    let records = &blocks.packed.bytes()[first * layout.record()..][..quads.len() * layout.record()];
    assert!(x.iter().all(|x| x.len() == quads.len()));
    for (b, (record, &quads)) in records.chunks_exact(layout.record()).zip(quads).enumerate() {
        let mut block = [x[0].as_ptr(); R];
        for r in 0..R {
            // SAFETY: as many blocks as `quads`, as just checked.
            block[r] = unsafe { x[r].as_ptr().add(b) };
        }
        let (header, weights) = record.split_at(layout.header());
        let weights = weights.as_chunks::<QUAD_BYTES>().0;
        let (header, _) = bytemuck::cast_slice::<u8, f16>(header).as_chunks::<PANEL>();
        if ahead > 0 {
            ask_ahead::<V, _>(&header[0], ahead);
        }
        let scales = V::load_f16(&header[0]);
        // SAFETY: each points to a block, as just said.
        let dots = unsafe { dots::<V, FORM, R>(weights, usize::from(quads).min(QUADS), block, ahead) };
        for r in 0..R {
            // SAFETY: as above.
            let scale = V::splat(unsafe { (*block[r]).scale });
            sums[r] = sums[r].add_product(V::to_f32(dots[r]), scales.mul(scale));
        }
        if layout.has_minimums() {
            let minimums = V::load_f16(&header[1]);
            for r in 0..R {
                // SAFETY: as above.
                sums[r] = sums[r].add_product(minimums, V::splat(unsafe { (*block[r]).sum }));
            }
        }
    }
}

/// One block's integer dot products, offsets taken off.
///
/// # Safety
/// `x` points to a block for each row.
#[inline(always)]
unsafe fn dots<V: Vector, const FORM: usize, const R: usize>(
    weights: &[[u8; QUAD_BYTES]],
    quads: usize,
    x: [*const QuantBlock; R],
    ahead: usize,
) -> [V::Ints; R] {
    let layout = const { LAYOUTS[FORM % LAYOUTS.len()] };
    let mut start = [0; R];
    let mut quants: [&[[i8; QUAD]; QUADS]; R] = [&[[0; QUAD]; QUADS]; R];
    for r in 0..R {
        // SAFETY: by contract.
        let block = unsafe { &*x[r] };
        start[r] = match layout {
            Layout::Bytes | Layout::BytesWithMinimums if V::BIASED => block.minus_128,
            Layout::Halves => block.minus_8,
            _ => 0,
        };
        quants[r] = block.quants.as_chunks().0.first_chunk().expect("a block has this many quads");
    }
    match layout.is_halves() {
        true => V::dot_halves(start, &weights[..quads.div_ceil(2)], quants, ahead),
        false => V::dot_bytes(start, &weights[..quads], quants, ahead),
    }
}
