//! The inner loop: a few rows of activations times one panel of weights.
//!
//! It is written once over [`Vector`] and compiled for each instruction set. Every output has one accumulator that
//! takes the inputs in rising order, so the number of rows in a tile, and how far its neighbours reach, changes nothing
//! in any of them.
#![allow(unsafe_code)]

use super::ahead::Asking;
use super::inputs::{QuantBlock, fill_blocks, fill_gathered};
use super::matrix::{BlockPanels, Layout, PairPanels, Panels};
use super::tile::{TILE, Tile};
pub(super) use super::vector::Lanes;
#[cfg(target_arch = "x86_64")]
use super::vector::{Avx2, Avx512};
use super::vector::{BlockRun, PANEL, Pair, Portable, TURN, Vector};
use half::bf16;
use std::ops::Range;
use std::sync::LazyLock;

/// Bytes of a panel that all rows of a tile are multiplied with before the next ones: half of a first-level cache, so that
/// the inputs of a few rows find room beside them.
const NEAR: usize = 16 << 10;

/// The instruction set to compute with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::backend) enum Kernel {
    Portable,
    Avx2,
    Avx512,
    /// With the bf16 dot product.
    Avx512Bf16,
}

impl Kernel {
    /// The best that this processor has.
    pub(in crate::backend) fn detect() -> Self {
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

    /// So few rows go through a panel at once, in about the time that memory takes for it: they ask by themselves for what
    /// follows, and take neighbouring panels in one call.
    pub(super) fn few(self) -> usize {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => Avx2::FEW,
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 | Self::Avx512Bf16 => Avx512::<false>::FEW,
            _ => Portable::FEW,
        }
    }

    /// The largest quant of an input.
    #[cfg(test)]
    pub(super) fn largest_input(self) -> i8 {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => Avx2::LARGEST,
            _ => Portable::LARGEST,
        }
    }

    /// The blocks of a row whose first numbers are `x`; the others are zero. `places`: the numbers' order in the blocks.
    pub(super) fn fill_blocks(self, x: &[f32], places: Option<&[u32]>, to: &mut [QuantBlock]) {
        let fill = match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => with_avx2::fill,
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => with_avx512::fill,
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16 => with_avx512_bf16::fill,
            _ => portable::fill,
        };
        // SAFETY: `available` has seen these instructions on this processor.
        unsafe { fill(x, places, to) }
    }

    /// Adds `matrix[panel, ..] x` to the accumulators, `lanes[panel][row]`.
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
    pub(in crate::backend) fn vectorised<L: Loops>(self, loops: L) {
        match self {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `available` has seen these instructions on this processor.
            Self::Avx2 => unsafe { vectorised_avx2(loops) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `available` has seen these instructions on this processor.
            Self::Avx512 | Self::Avx512Bf16 => unsafe { vectorised_avx512(loops) },
            _ => loops.run(),
        }
    }
}

/// Work for [`Kernel::vectorised`]: a method marked `inline(always)`, of loops. A closure or a function would be called from
/// the code compiled for the instruction set, not become part of it; the same holds for `for_each` within.
pub(in crate::backend) trait Loops {
    fn run(self);
}

/// Runs loops with the best instructions that this processor has, for who has no backend at hand.
pub(in crate::backend) fn vectorised(loops: impl Loops) {
    static BEST: LazyLock<Kernel> = LazyLock::new(Kernel::detect);
    BEST.vectorised(loops);
}

#[cfg(target_arch = "x86_64")]
fn is_amd() -> bool {
    let id = std::arch::x86_64::__cpuid(0);
    // "AuthenticAMD"
    (id.ebx, id.edx, id.ecx) == (0x6874_7541, 0x6974_6e65, 0x444d_4163)
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
                            Layout::HalvesWithSteps => form::<HALVES_WITH_STEPS>(tile, lanes),
                        },
                    }
                }
            }

            /// # Safety
            /// The processor has these instructions.
            $(#[target_feature(enable = $features)])?
            pub(super) unsafe fn fill(x: &[f32], places: Option<&[u32]>, to: &mut [QuantBlock]) {
                match places {
                    Some(places) => fill_gathered::<$vector>(x, places, to),
                    None => fill_blocks::<$vector>(x, to),
                }
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn form<const FORM: usize>(tile: &Tile<'_>, lanes: &mut [Lanes]) {
                let rows = tile.rows.len();
                assert!(rows <= TILE && lanes.len() == rows * tile.panels.len());
                if tile.is_straight::<$vector>() {
                    // SAFETY: as above.
                    return unsafe { straight::<$vector, FORM>(tile, lanes) };
                }
                for (panel, lanes) in tile.panels.clone().zip(lanes.chunks_exact_mut(rows.max(1))) {
                    // SAFETY: as above.
                    unsafe { staircase::<$vector, FORM>(tile, panel, lanes) };
                }
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

/// The forms of weights, for a constant of the kernel; the quantised ones as in [`Layout::ALL`].
const BYTES: usize = 0;
const BYTES_WITH_MINIMUMS: usize = 1;
const HALVES: usize = 2;
const HALVES_WITH_MINIMUMS: usize = 3;
const HALVES_WITH_STEPS: usize = 4;
const F32: usize = 5;
const BF16: usize = 6;
const BF16_DOT: usize = 7;

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
fn vectorised_avx2(loops: impl Loops) {
    loops.run();
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx2,fma,f16c")]
fn vectorised_avx512(loops: impl Loops) {
    loops.run();
}

/// Few rows of one width go through panels as fast as memory gives them: what is the same for all panels is found out once.
///
/// # Safety
/// The tile's rows have been filled, before a barrier.
#[inline(always)]
unsafe fn straight<V: Vector, const FORM: usize>(tile: &Tile<'_>, lanes: &mut [Lanes]) {
    let (rows, range) = (tile.rows.len(), 0..tile.units(tile.active.unwrap_or(tile.rows[0].inp)));
    let asking = asking_near::<V, FORM>(tile, tile.panels.start, rows, range.len());
    for (panel, lanes) in tile.panels.clone().zip(lanes.chunks_exact_mut(rows)) {
        let then = tile.then.filter(|_| panel + 1 == tile.panels.end);
        let asking = asking.map(|asking| asking.then(then));
        // SAFETY: by contract.
        unsafe { all_rows::<V, FORM>(tile, panel, range.clone(), lanes, asking) };
    }
}

/// The staircase: as long as all rows have inputs, all take part; then those that reach further.
///
/// # Safety
/// The tile's rows have been filled, before a barrier.
#[inline(always)]
unsafe fn staircase<V: Vector, const FORM: usize>(tile: &Tile<'_>, panel: usize, lanes: &mut [Lanes]) {
    let (mut start, mut rows) = (0, tile.rows.len());
    while rows > 0 {
        let end = tile.units(tile.active.unwrap_or(tile.rows[rows - 1].inp));
        if end > start {
            // SAFETY: by contract.
            unsafe { stage::<V, FORM>(tile, panel, start..end, &mut lanes[..rows]) };
            start = end;
        }
        rows = if tile.active.is_some() { 0 } else { rows - 1 };
    }
}

/// How many rows are taken at once.
struct AtOnce<V, const FORM: usize>(std::marker::PhantomData<V>);

impl<V: Vector, const FORM: usize> AtOnce<V, FORM> {
    const ROWS: usize = match FORM {
        BYTES | BYTES_WITH_MINIMUMS => V::BYTES_ROWS,
        HALVES | HALVES_WITH_MINIMUMS | HALVES_WITH_STEPS => V::HALVES_ROWS,
        _ => V::ROWS,
    };
}

/// Turns of asking for what follows while so many rows go through so many units.
#[inline(always)]
fn turns<V: Vector, const FORM: usize>(rows: usize, units: usize) -> usize {
    let quantised = FORM < Layout::ALL.len();
    let groups = rows.div_ceil(AtOnce::<V, FORM>::ROWS);
    groups * V::passes(quantised, rows.div_ceil(groups)) * units.div_ceil(if quantised { 1 } else { TURN })
}

/// Of few rows the first to go through a panel, so many units of it, ask for what follows it.
#[inline(always)]
fn asking_near<'a, V: Vector, const FORM: usize>(
    tile: &Tile<'a>,
    panel: usize,
    rows: usize,
    units: usize,
) -> [Asking<'a>; 2] {
    let at_once = rows.div_ceil(rows.div_ceil(AtOnce::<V, FORM>::ROWS));
    let turns = tile.spread_from(panel).map(|panels| panels * turns::<V, FORM>(at_once, units));
    [tile.ahead.in_turns(turns, true), tile.ahead.not_at_all()]
}

/// Units of inputs `range` for the first rows of a tile; for many rows in parts that stay near.
///
/// # Safety
/// The tile's rows have been filled, before a barrier.
#[inline(always)]
unsafe fn stage<V: Vector, const FORM: usize>(
    tile: &Tile<'_>,
    panel: usize,
    range: Range<usize>,
    lanes: &mut [Lanes],
) {
    let most = AtOnce::<V, FORM>::ROWS;
    let near = if lanes.len() <= most { usize::MAX } else { NEAR / tile.matrix.panels.unit_bytes() };
    let asking = if tile.rows.len() <= V::FEW {
        asking_near::<V, FORM>(tile, panel, lanes.len(), range.len())
    } else {
        let turns = tile.spread_from(panel).map(|panels| panels * turns::<V, FORM>(lanes.len(), range.len()));
        [tile.ahead.in_turns(turns, false); 2]
    };
    let mut start = range.start;
    while start < range.end {
        let part = start..range.end.min(start.saturating_add(near));
        start = part.end;
        // SAFETY: by contract.
        unsafe { all_rows::<V, FORM>(tile, panel, part, lanes, asking) };
    }
}

/// All rows, as many at once as there is room for; `asking` while the first of them go through the panel, and later ones.
///
/// # Safety
/// The tile's rows have been filled, before a barrier.
#[inline(always)]
unsafe fn all_rows<V: Vector, const FORM: usize>(
    tile: &Tile<'_>,
    panel: usize,
    range: Range<usize>,
    lanes: &mut [Lanes],
    asking: [Asking<'_>; 2],
) {
    let mut row = 0;
    while row < lanes.len() {
        let asking = asking[usize::from(row > 0)];
        let left = lanes.len() - row;
        // Cut evenly: 10 rows as 5 and 5 where 8 fit.
        let rows = left.div_ceil(left.div_ceil(AtOnce::<V, FORM>::ROWS));
        // A constant first, so that what does not fit into the registers of an instruction set is not compiled for it.
        macro_rules! take {
            ($($count:literal)*) => {
                $(if AtOnce::<V, FORM>::ROWS >= $count && rows >= $count {
                    // SAFETY: by contract.
                    row += unsafe { some_rows::<V, FORM, $count>(tile, panel, range.clone(), row, lanes, asking) };
                } else)* {
                    // SAFETY: by contract.
                    row += unsafe { some_rows::<V, FORM, 1>(tile, panel, range.clone(), row, lanes, asking) };
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
    panel: usize,
    range: Range<usize>,
    row: usize,
    lanes: &mut [Lanes],
    asking: Asking<'_>,
) -> usize {
    let Tile { matrix, inputs, first: first_row, .. } = *tile;
    let lanes: &mut [Lanes; R] = lanes[row..].first_chunk_mut().expect("as many accumulators as rows");
    // Loops, not `array::map`, see `vector::avx2`.
    let rows = &tile.rows[row..row + R];
    match &matrix.panels {
        Panels::F32(packed) if FORM == F32 => {
            let panels: &[Lanes] = bytemuck::cast_slice(packed.bytes());
            let weights = &panels[panel * matrix.columns()..][range.clone()];
            let mut x: [&[f32]; R] = [&[]; R];
            for r in 0..R {
                // SAFETY: by contract; so below.
                x[r] = unsafe { &inputs.f32(first_row + rows[r].row)[range.clone()] };
            }
            check(weights.len(), x);
            let skipped = (matrix.columns() - weights.len()) * size_of::<Lanes>();
            V::add_inputs(lanes, weights, x, asking.during(weights, skipped));
        }
        Panels::Bf16(PairPanels { packed, .. }) if FORM == BF16 || FORM == BF16_DOT => {
            let panels: &[[[bf16; 2]; PANEL]] = bytemuck::cast_slice(packed.bytes());
            let pairs = matrix.columns().div_ceil(2);
            let weights = &panels[panel * pairs..][range.clone()];
            let asking = asking.during(weights, (pairs - weights.len()) * size_of::<[[bf16; 2]; PANEL]>());
            if FORM == BF16_DOT {
                let mut x: [&[Pair]; R] = [&[]; R];
                for r in 0..R {
                    // SAFETY: by contract.
                    x[r] = unsafe { &inputs.pairs(first_row + rows[r].row)[range.clone()] };
                }
                check(weights.len(), x);
                V::add_dots(lanes, weights, x, asking);
            } else {
                let mut x: [&[[f32; 2]]; R] = [&[]; R];
                for r in 0..R {
                    // SAFETY: by contract.
                    x[r] = unsafe { &inputs.f32(first_row + rows[r].row).as_chunks().0[range.clone()] };
                }
                check(weights.len(), x);
                V::add_pairs(lanes, weights, x, asking);
            }
        }
        Panels::Blocks(blocks) if FORM < Layout::ALL.len() => {
            let per_panel = matrix.columns().div_ceil(PANEL);
            let (first, quads) = (panel * per_panel + range.start, &tile.quads[range.clone()]);
            let mut x: [&[QuantBlock]; R] = [&[]; R];
            for r in 0..R {
                // SAFETY: by contract.
                x[r] = unsafe { &inputs.blocks(first_row + rows[r].row)[range.clone()] };
            }
            let (packed, skipped) = (blocks.packed.bytes(), per_panel - quads.len());
            let run = BlockRun::new(blocks.layout, packed, first, quads, skipped, asking);
            quants::<V, FORM, R>(lanes, run, x);
        }
        // The form is that of the panels, see `instruction_set`.
        _ => {}
    }
    R
}

/// The layout as a constant.
#[inline(always)]
fn quants<V: Vector, const FORM: usize, const R: usize>(
    lanes: &mut [Lanes; R],
    run: BlockRun<'_>,
    x: [&[QuantBlock]; R],
) {
    match FORM {
        BYTES => V::add_blocks::<BYTES, R>(lanes, run, x),
        BYTES_WITH_MINIMUMS => V::add_blocks::<BYTES_WITH_MINIMUMS, R>(lanes, run, x),
        HALVES => V::add_blocks::<HALVES, R>(lanes, run, x),
        HALVES_WITH_MINIMUMS => V::add_blocks::<HALVES_WITH_MINIMUMS, R>(lanes, run, x),
        _ => V::add_blocks::<HALVES_WITH_STEPS, R>(lanes, run, x),
    }
}

/// That each row has an input for each weight, so that the loops need not look each time.
#[inline(always)]
fn check<T, const R: usize>(weights: usize, x: [&[T]; R]) {
    for x in x {
        assert!(x.len() == weights);
    }
}
