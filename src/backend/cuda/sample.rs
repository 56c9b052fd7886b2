//! What is wanted of logits, where they are: chosen tokens, log probabilities; kernels/sample.cu.
#![allow(unsafe_code)]

use super::Cuda;
use super::device::Shared;
use super::kernel::{Argument, Grid, Kernel, int};
use super::rows::{Form, Rows};
use crate::backend::{BackendError, Choice, Draw, SamplingError};

/// Threads of a block there.
const THREADS: usize = 1024;

/// `DrawRow` of kernels/sample.cu.
#[derive(Debug, Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct DrawRow {
    uniform: f64,
    row: i32,
    first_edit: i32,
    edit_count: i32,
    top_k: i32,
    temperature: f32,
    top_p: f32,
    min_p: f32,
    padding: i32,
}

/// `Edit` of kernels/sample.cu.
#[derive(Debug, Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct EditRow {
    token: u32,
    penalty: f32,
    add: f32,
}

/// Runs the step.
pub(super) fn choose(cuda: &Cuda, logits: &Rows, draws: &[(u32, Draw)]) -> Result<Vec<Choice>, BackendError> {
    let (mut rows, mut edits) = (Vec::with_capacity(draws.len()), Vec::new());
    for (row, draw) in draws {
        if *row as usize >= logits.length {
            return Err(super::unfit("choose", &format!("a row of {}", logits.length), row.to_string()));
        }
        rows.push(DrawRow {
            uniform: draw.uniform,
            row: *row as i32,
            first_edit: edits.len() as i32,
            edit_count: draw.edits.len() as i32,
            top_k: i32::try_from(draw.top_k).unwrap_or(i32::MAX),
            temperature: draw.temperature,
            top_p: draw.top_p,
            min_p: draw.min_p,
            padding: 0,
        });
        edits.extend(draw.edits.iter().map(|edit| EditRow {
            token: edit.token,
            penalty: edit.penalty,
            add: edit.add,
        }));
    }
    let (device, vocabulary) = (&cuda.device, logits.width);
    let logits = logits.read_as(device, Form::F32)?;
    let [rows, edits] = [device.stage(&rows)?, device.stage(&edits)?].map(Argument::Address);
    let chosen = device.activations(draws.len() * size_of::<u32>())?;
    let to = Argument::Address(chosen.address());
    let arguments = [logits.argument(), int(logits.stride), int(logits.width), rows, edits, to];
    // SAFETY: the arguments of `sample`; rows are there, as checked, and tokens beyond the vocabulary are left alone by it.
    unsafe { device.push(Kernel::Sample, Grid::new([draws.len(), 1, 1], THREADS), &arguments) };
    let chosen = device.download::<u32>(chosen.address(), draws.len())?;
    // Where no token is possible the kernel writes one beyond any vocabulary.
    let within = |token: u32| Some(token).filter(|&token| (token as usize) < vocabulary).ok_or(SamplingError);
    Ok(chosen.into_iter().map(within).collect())
}

/// Threads of a block that adds up a row.
const SUM_THREADS: usize = 512;

/// `Wanted` of kernels/sample.cu.
#[derive(Debug, Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct Wanted {
    row: u32,
    token: u32,
}

/// Runs the step.
pub(super) fn log_probabilities(
    cuda: &Cuda,
    logits: &Rows,
    rows: usize,
    tokens: &[(u32, u32)],
) -> Result<Vec<f32>, BackendError> {
    let fits = |row: u32| (row as usize) < rows.min(logits.length);
    if let Some((row, _)) = tokens.iter().find(|(row, _)| !fits(*row)) {
        let expected = format!("a row of {}", rows.min(logits.length));
        return Err(super::unfit("log_probabilities", &expected, row.to_string()));
    }
    let device = &cuda.device;
    let wanted = tokens.iter().map(|&(row, token)| Wanted { row, token }).collect::<Vec<_>>();
    let logits = logits.read_as(device, Form::F32)?;
    let wanted = Argument::Address(device.stage(&wanted)?);
    let found = device.activations(tokens.len() * size_of::<f32>())?;
    let to = Argument::Address(found.address());
    let arguments = [logits.argument(), int(logits.stride), int(logits.width), wanted, to];
    // SAFETY: the arguments of `log_probabilities`; rows are there, as checked, and it leaves tokens beyond the vocabulary alone.
    unsafe {
        device.push(Kernel::LogProbabilities, Grid::new([tokens.len(), 1, 1], SUM_THREADS), &arguments);
    };
    device.download::<f32>(found.address(), tokens.len())
}
