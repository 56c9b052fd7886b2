//! Products with weights: elastic low-rank ones, and the vocabulary's.
#![allow(unsafe_code)]

use super::batch::{self, SegmentRow};
use super::device::Device;
use super::kernel::{Argument, Grid, Kernel, int, pair};
use super::rows::{Form, Read, Rows};
use super::{Cuda, Matrix, unfit};
use crate::backend::{BackendError, GatedMlp, Linear, Norm, Segment};
use std::sync::Arc;

/// Threads of a block of kernels/few_rows.cu; outputs of a warp, rows of a tile, Linears of a launch.
const FEW_THREADS: usize = 256;
const OUTPUTS: usize = 16;
const ROWS: usize = 8;
const MOST_PARTS: usize = 3;
/// What ranks are padded to there.
const RANKS: usize = 32;
/// Rows up to which each block norms its inputs itself: it reads them in f32, and every block reads all.
const OWN_NORM: usize = 4;

/// One Linear of a launch: `Part` of kernels/few_rows.cu.
struct Part {
    words: [u64; PART_WORDS],
    out: usize,
    adapters: usize,
    rank: usize,
    /// What the shrinks leave for the expands.
    _shrunk: Option<Rows>,
}

const PART_WORDS: usize = 9;

/// A kernel for few rows with what it takes at a time.
struct Few {
    kernel: Kernel,
    /// Tiles of rows, and of outputs.
    tiles: usize,
    groups: usize,
}

impl Few {
    fn linear(rows: usize, normed: bool) -> Self {
        match rows {
            _ if normed => Self { kernel: Kernel::NormedLinearFew, tiles: 1, groups: 1 },
            0..=8 => Self { kernel: Kernel::LinearFew8, tiles: 1, groups: 1 },
            9..=16 => Self { kernel: Kernel::LinearFew16, tiles: 2, groups: 2 },
            _ => Self { kernel: Kernel::LinearFew32, tiles: 4, groups: 4 },
        }
    }

    fn gate_up(rows: usize, normed: bool) -> Self {
        match rows {
            _ if normed => Self { kernel: Kernel::NormedGateUpFew, tiles: 1, groups: 1 },
            0..=8 => Self { kernel: Kernel::GateUpFew8, tiles: 1, groups: 1 },
            9..=16 => Self { kernel: Kernel::GateUpFew16, tiles: 2, groups: 2 },
            _ => Self { kernel: Kernel::GateUpFew32, tiles: 4, groups: 2 },
        }
    }
}

/// Rows that are to be multiplied, and what they are to be normed with on the way.
struct Inputs<'a> {
    rows: Read<'a>,
    norm: Option<Norm<'a, Cuda>>,
}

/// Several Linears of the same rows; one of them may be added to rows that are there.
pub(super) fn linears<const N: usize>(
    cuda: &Cuda,
    x: &Rows,
    norm: Option<Norm<'_, Cuda>>,
    linears: [&Linear<Cuda>; N],
    segments: &[Segment],
) -> Result<[Rows; N], BackendError> {
    let inputs = inputs(cuda, x, norm)?;
    let few = Few::linear(x.length, inputs.norm.is_some());
    let mut results = Vec::with_capacity(N);
    for some in linears.chunks(MOST_PARTS) {
        let mut parts = Vec::with_capacity(some.len());
        for &linear in some {
            let sizes = batch::sizes(linear, x.length, x.width, segments)?;
            let y = Rows::new(&cuda.device, x.length, linear.weight.rows, Form::F32)?;
            parts.push(part(&cuda.device, linear, &sizes, &y)?);
            results.push(y);
        }
        launch(&cuda.device, &few, &inputs, &parts, false);
    }
    results.try_into().map_err(|_| unfit("linear", "as many rows as Linears", String::new()))
}

/// `onto + linear(x)`
pub(super) fn linear_onto(
    cuda: &Cuda,
    onto: Rows,
    x: &Rows,
    linear: &Linear<Cuda>,
    segments: &[Segment],
) -> Result<Rows, BackendError> {
    if (onto.length, onto.width) != (x.length, linear.weight.rows) {
        let got = format!("({}, {})", onto.length, onto.width);
        return Err(unfit("linear", &format!("({}, {})", x.length, linear.weight.rows), got));
    }
    let (inputs, onto) = (inputs(cuda, x, None)?, onto.into_form(&cuda.device, Form::F32)?);
    let sizes = batch::sizes(linear, x.length, x.width, segments)?;
    let part = part(&cuda.device, linear, &sizes, &onto)?;
    launch(&cuda.device, &Few::linear(x.length, false), &inputs, &[part], true);
    Ok(onto)
}

/// `silu(gate(x)) * up(x)`
pub(super) fn gate_up(
    cuda: &Cuda,
    x: &Rows,
    norm: Option<Norm<'_, Cuda>>,
    mlp: &GatedMlp<Cuda>,
    segments: &[Segment],
) -> Result<Rows, BackendError> {
    let [gate, up] = [&mlp.gate, &mlp.up];
    let width = gate.weight.rows;
    if up.weight.rows != width {
        return Err(unfit("gated mlp", &format!("an up of {width}"), up.weight.rows.to_string()));
    }
    let device = &cuda.device;
    let of = |linear| batch::sizes(linear, x.length, x.width, segments);
    let (of_gate, of_up) = (of(gate)?, of(up)?);
    let same = |(gate, up): (&SegmentRow, &SegmentRow)| (gate.out, gate.inp) == (up.out, up.inp);
    let y = Rows::new(device, x.length, width, Form::Bf16)?;
    if of_gate.iter().zip(&of_up).all(same) {
        let inputs = inputs(cuda, x, norm)?;
        let parts = [part(device, gate, &of_gate, &y)?, part(device, up, &of_up, &y)?];
        launch(device, &Few::gate_up(x.length, inputs.norm.is_some()), &inputs, &parts, false);
    } else {
        let [gate, up] = linears(cuda, x, norm, [gate, up], segments)?;
        let count = gate.numbers();
        let arguments = [gate.argument(), up.argument(), y.argument(), Argument::Size(count)];
        // SAFETY: the arguments of `silu_multiply`; rows of one length and stride.
        unsafe { device.push(Kernel::SiluMultiply, Grid::each(count), &arguments) };
    }
    Ok(y)
}

/// `x head^T`
pub(super) fn logits(cuda: &Cuda, x: &Rows, head: &Matrix) -> Result<Rows, BackendError> {
    if head.columns != x.width {
        return Err(unfit("logits", &format!("a head of {} columns", x.width), head.columns.to_string()));
    }
    let inputs = inputs(cuda, x, None)?;
    let y = Rows::new(&cuda.device, x.length, head.rows, Form::F32)?;
    launch(&cuda.device, &Few::linear(x.length, false), &inputs, &[whole(head, &y)], false);
    Ok(y)
}

/// As products take them: normed by the kernel itself where that pays, else before.
fn inputs<'a>(cuda: &Cuda, x: &'a Rows, norm: Option<Norm<'a, Cuda>>) -> Result<Inputs<'a>, BackendError> {
    let Some(norm) = norm else {
        return Ok(Inputs { rows: x.read_as(&cuda.device, Form::Bf16)?, norm: None });
    };
    super::check_norm(x, norm.weight)?;
    if x.length <= OWN_NORM && x.form == Form::F32 {
        return Ok(Inputs { rows: Read::Same(x), norm: Some(norm) });
    }
    Ok(Inputs { rows: Read::Converted(super::rms_norm(cuda, x, norm)?), norm: None })
}

/// All rows take the whole of a weight.
fn whole(weight: &Matrix, y: &Rows) -> Part {
    let words = [
        weight.address(),
        0,
        0,
        0,
        0,
        y.address(),
        pair(weight.stride, weight.rows),
        pair(weight.columns, y.stride),
        pair(0, 0),
    ];
    Part { words, out: weight.rows, adapters: 0, rank: 0, _shrunk: None }
}

fn part(
    device: &Arc<Device>,
    linear: &Linear<Cuda>,
    sizes: &[SegmentRow],
    y: &Rows,
) -> Result<Part, BackendError> {
    let weight = &*linear.weight;
    if let Some(bias) = linear.bias.as_ref().filter(|bias| bias.len() != weight.rows) {
        return Err(unfit("linear", &format!("a bias of {}", weight.rows), bias.len().to_string()));
    }
    let mut part = whole(weight, y);
    part.words[1] = linear.bias.as_ref().map_or(0, super::Vector::address);
    part.words[2] = device.stage(sizes)?;
    part.rank = batch::most_rank(linear).next_multiple_of(RANKS);
    if part.rank > 0 {
        part.adapters = linear.adapters.len();
        part.words[3] = batch::adapters(device, linear)?;
        let shrunk = Rows::new(device, sizes.len(), part.rank, Form::Bf16)?;
        part.words[4] = shrunk.address();
        part.words[8] = pair(part.adapters, part.rank);
        part._shrunk = Some(shrunk);
    }
    Ok(part)
}

fn launch(device: &Device, few: &Few, inputs: &Inputs<'_>, parts: &[Part], onto: bool) {
    let (x, outputs) = (&inputs.rows, few.groups * OUTPUTS);
    let (norm, eps) = inputs.norm.map_or((0, 0.0), |norm| (norm.weight.address(), norm.eps));
    let of_inputs = [
        x.address(),
        norm,
        pair(x.stride, x.width),
        u64::from(x.length as u32) | u64::from(f32::to_bits(eps)) << 32,
    ];
    let mut of_parts = [0; MOST_PARTS * PART_WORDS];
    for (to, part) in of_parts.chunks_exact_mut(PART_WORDS).zip(parts) {
        to.copy_from_slice(&part.words);
    }
    let shrinks = parts.iter().map(|part| part.adapters * part.rank.div_ceil(outputs)).sum::<usize>();
    let paired = matches!(
        few.kernel,
        Kernel::GateUpFew8 | Kernel::GateUpFew16 | Kernel::GateUpFew32 | Kernel::NormedGateUpFew
    );
    let expanded = &parts[..if paired { 1 } else { parts.len() }];
    let expands = expanded.iter().map(|part| part.out.div_ceil(outputs)).sum::<usize>();
    let blocks = x.length.div_ceil(few.tiles * ROWS) * (shrinks + expands);
    let arguments = [
        Argument::Struct(&of_inputs),
        Argument::Struct(&of_parts),
        int(parts.len()),
        device.counters(),
        Argument::Int(i32::from(onto)),
    ];
    // SAFETY: the arguments of the kernels for few rows. Sizes lie within the weights and adapters, as `batch::sizes` has checked;
    // results and what is shrunk have room for every row.
    unsafe { device.push(few.kernel, Grid::new([blocks, 1, 1], FEW_THREADS), &arguments) };
}
