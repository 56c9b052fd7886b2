//! Products with weights: elastic low-rank ones, and the vocabulary's. Few rows and many have kernels of their own.
#![allow(unsafe_code)]

use super::batch::{self, SegmentRow};
use super::device::Device;
use super::few::{self, Few, MOST_PARTS};
use super::kernel::{Grid, Kernel};
use super::many::{self, Many};
use super::rows::{Form, Read, Rows};
use super::{Cuda, Matrix, unfit};
use crate::backend::{BackendError, GatedMlp, Linear, Norm, Segment};

/// Rows up to which a step is one of few rows: it reads weights faster than it multiplies. Of large weights, from [`LARGE`] numbers
/// on, tensor cores are busy earlier. Measured on an H100, kernels for few rows and for many: LLaMA-7B decodes 16 streams with
/// 1732 and 1591 tokens/s, 32 with 2700 and 2938; SmolLM2-135M 16 with 11667 and 8285, 32 with 20059 and 15874.
const FEW: usize = 32;
const FEW_OF_LARGE: usize = 16;
const LARGE: usize = 4 << 20;
/// Rows up to which each block norms its inputs itself: it reads them in f32, and every block reads all. Where weights are small, all
/// that their kernel takes: a kernel that only norms takes longer.
const OWN_NORM: usize = 4;
const OWN_NORM_OF_NARROW: usize = 8;

/// Rows that are to be multiplied, and what they are to be normed with on the way.
pub(super) struct Inputs<'a> {
    pub(super) rows: Read<'a>,
    pub(super) norm: Option<Norm<'a, Cuda>>,
}

/// Several Linears of the same rows.
pub(super) fn linears<const N: usize>(
    cuda: &Cuda,
    x: &Rows,
    norm: Option<Norm<'_, Cuda>>,
    linears: [&Linear<Cuda>; N],
    segments: &[Segment],
) -> Result<[Rows; N], BackendError> {
    let is_narrow = Few::has_narrow(&cuda.device, (x.length, x.width), &linears, false);
    let inputs = inputs(cuda, x, norm, is_narrow)?;
    let sizes = linears.map(|linear| batch::sizes(linear, x.length, x.width, segments));
    let sizes = sizes.into_iter().collect::<Result<Vec<_>, _>>()?;
    let mut results = Vec::with_capacity(N);
    if are_many(&cuda.device, x.length, &linears) {
        let of = std::array::from_fn::<_, N, _>(|i| (linears[i], &sizes[i][..]));
        let products = many::shrink(&cuda.device, &inputs.rows, of)?;
        for linear in linears {
            results.push(Rows::new(&cuda.device, x.length, linear.weight.rows, Form::F32)?);
        }
        many::linears(&cuda.device, &inputs.rows, &products, &results.iter().collect::<Vec<_>>(), false);
        return results.try_into().map_err(|_| unfit("linear", "as many rows as Linears", String::new()));
    }
    let is_narrow = is_narrow && few::narrow_pays(sizes.iter().flatten());
    let all = linears.iter().zip(&sizes).collect::<Vec<_>>();
    // Linears whose weights have one format share a launch.
    for same in all.chunk_by(|(a, _), (b, _)| a.weight.format == b.weight.format) {
        let few = match is_narrow {
            true => Few::narrow(false, inputs.norm.is_some()),
            false => Few::linear(&cuda.device, x.length, inputs.norm.is_some(), same[0].0.weight.format),
        };
        for some in same.chunks(MOST_PARTS) {
            let mut parts = Vec::with_capacity(some.len());
            for &(&linear, sizes) in some {
                let y = Rows::new(&cuda.device, x.length, linear.weight.rows, Form::F32)?;
                parts.push(few.part(&cuda.device, linear, sizes, &y)?);
                results.push(y);
            }
            few::launch(&cuda.device, &few, &inputs, &parts, false);
        }
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
    let (inputs, onto) = (inputs(cuda, x, None, false)?, onto.into_form(&cuda.device, Form::F32)?);
    let sizes = batch::sizes(linear, x.length, x.width, segments)?;
    if are_many(&cuda.device, x.length, &[linear]) {
        let products = many::shrink(&cuda.device, &inputs.rows, [(linear, &sizes[..])])?;
        many::linears(&cuda.device, &inputs.rows, &products, &[&onto], true);
    } else {
        let is_narrow = Few::has_narrow(&cuda.device, (x.length, x.width), &[linear], false);
        let few = match is_narrow && few::narrow_pays(&sizes) {
            true => Few::narrow(false, false),
            false => Few::linear(&cuda.device, x.length, false, linear.weight.format),
        };
        let part = few.part(&cuda.device, linear, &sizes, &onto)?;
        few::launch(&cuda.device, &few, &inputs, &[part], true);
    }
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
    if gate.weight.format == up.weight.format && of_gate.iter().zip(&of_up).all(same) {
        let is_narrow = Few::has_narrow(device, (x.length, x.width), &[gate, up], true);
        let inputs = inputs(cuda, x, norm, is_narrow)?;
        if are_many(&cuda.device, x.length, &[gate, up]) {
            let of = [(gate, &of_gate[..]), (up, &of_up[..])];
            many::gate_up(device, &inputs.rows, &many::shrink(device, &inputs.rows, of)?, &y);
        } else {
            let few = match is_narrow && few::narrow_pays(of_gate.iter().chain(&of_up)) {
                true => Few::narrow(true, inputs.norm.is_some()),
                false => Few::gate_up(device, x.length, inputs.norm.is_some(), gate.weight.format),
            };
            let parts = [few.part(device, gate, &of_gate, &y)?, few.part(device, up, &of_up, &y)?];
            few::launch(device, &few, &inputs, &parts, false);
        }
    } else {
        let [gate, up] = linears(cuda, x, norm, [gate, up], segments)?;
        let [count, width, stride] = gate.each();
        let arguments = [gate.argument(), up.argument(), y.argument(), count, width, stride];
        // SAFETY: the arguments of `silu_multiply`; rows of one length and stride.
        unsafe { device.push(Kernel::SiluMultiply, Grid::each(gate.numbers()), &arguments) };
    }
    Ok(y)
}

/// `x head^T`
pub(super) fn logits(cuda: &Cuda, x: &Rows, head: &Matrix) -> Result<Rows, BackendError> {
    if head.columns != x.width {
        return Err(unfit("logits", &format!("a head of {} columns", x.width), head.columns.to_string()));
    }
    let inputs = inputs(cuda, x, None, false)?;
    let y = Rows::new(&cuda.device, x.length, head.rows, Form::F32)?;
    if is_many(&cuda.device, x.length, &[head]) {
        let product = Many::whole(&cuda.device, head)?;
        many::linears(&cuda.device, &inputs.rows, &[product], &[&y], false);
    } else {
        let few = Few::linear(&cuda.device, x.length, false, head.format);
        few::launch(&cuda.device, &few, &inputs, &[few::whole(head, &y)], false);
    }
    Ok(y)
}

/// As products take them: normed by the kernel itself where that pays, else before. It does not depend on what is in the batch but the
/// number of rows.
fn inputs<'a>(
    cuda: &Cuda,
    x: &'a Rows,
    norm: Option<Norm<'a, Cuda>>,
    is_narrow: bool,
) -> Result<Inputs<'a>, BackendError> {
    let Some(norm) = norm else {
        return Ok(Inputs { rows: x.read_as(&cuda.device, Form::Bf16)?, norm: None });
    };
    super::check_norm("rms_norm", x, norm.weight)?;
    let most = if is_narrow { OWN_NORM_OF_NARROW } else { OWN_NORM };
    if x.length <= most && Few::norms(x.length, x.width, is_narrow) && x.form == Form::F32 && !x.is_part() {
        return Ok(Inputs { rows: Read::Same(x), norm: Some(norm) });
    }
    Ok(Inputs { rows: Read::Converted(super::rms_norm(cuda, x, norm)?), norm: None })
}

/// Whether so many rows of products with these weights are many.
fn is_many(device: &Device, rows: usize, weights: &[&Matrix]) -> bool {
    let large = weights.iter().any(|weight| weight.rows * weight.columns >= LARGE);
    rows > if large { FEW_OF_LARGE } else { FEW.min(few::most_rows(device)) }
}

/// The same of Linears; the kernels for many rows have a limit of rank.
fn are_many(device: &Device, rows: usize, linears: &[&Linear<Cuda>]) -> bool {
    let weights = linears.iter().map(|linear| &*linear.weight).collect::<Vec<_>>();
    is_many(device, rows, &weights)
        && linears.iter().all(|linear| batch::most_rank(linear) <= many::MOST_RANK)
}
