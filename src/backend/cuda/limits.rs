//! What a GPU can do at most, measured: bytes read from its memory and f32 arithmetic a second. A bound, to set what a step
//! took beside it. The best of several short runs counts.
#![allow(unsafe_code)]

use super::Cuda;
use super::kernel::{Argument, Grid, Kernel, int};
use crate::backend::BackendError;
use cudarc::driver::CudaSlice;
use std::time::Instant;

/// What is read: many times the caches of any GPU, where it has as much to spare.
const MOST_READ: usize = 1 << 30;
/// Short runs of which the best counts, and starts of a kernel in each.
const RUNS: usize = 5;
const STARTS: usize = 4;
/// Blocks for each multiprocessor, and threads of each.
const BLOCKS: usize = 8;
const THREADS: usize = 256;
/// Multiply-adds of a thread: turns of eight.
const TURNS: usize = 4096;
/// The same with tensor cores: turns of eight products of 16 x 8 x 16, at least and at most; as many as take a while.
const TENSOR_TURNS: [usize; 2] = [16, 4096];
const A_WHILE: f64 = 1e-3;

/// What a GPU can do at most, in one second.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Limits {
    pub read_bytes_per_second: f64,
    /// With tensor cores, by the instructions that the kernels use.
    pub bf16_flops: f64,
    /// Without. Fused multiply-adds count as two operations.
    pub f32_flops: f64,
}

/// Measures [`Limits`] again and again; holds the memory that is read.
pub struct LimitsMeter<'a> {
    cuda: &'a Cuda,
    buffer: CudaSlice<u8>,
    result: CudaSlice<u32>,
    blocks: usize,
}

impl<'a> LimitsMeter<'a> {
    /// # Errors
    /// No memory to read.
    pub fn new(cuda: &'a Cuda) -> Result<Self, BackendError> {
        let device = &cuda.device;
        let (free, _) = device.memory().map_err(|error| BackendError::Library {
            operation: "measuring how fast memory is read",
            message: error.to_string(),
        })?;
        let bytes = MOST_READ.min(free / 4).next_multiple_of(16);
        let buffer = device.room("measuring how fast memory is read", bytes)?;
        let result = device.room("measuring", 1)?;
        Ok(Self { cuda, buffer, result, blocks: BLOCKS * device.multiprocessors() })
    }

    /// # Errors
    /// The driver's.
    pub fn measure(&self) -> Result<Limits, BackendError> {
        let device = &self.cuda.device;
        let result = Argument::Address(device.address(&self.result));
        let (bytes, operations) = (self.buffer.len(), 2 * 8 * TURNS * self.blocks * THREADS);
        let read = [Argument::Address(device.address(&self.buffer)), Argument::Size(bytes / 16), result];
        let add = [int(TURNS), Argument::Float(0.999), result];
        Ok(Limits {
            read_bytes_per_second: bytes as f64 / self.best(Kernel::ReadAll, &read)?,
            bf16_flops: self.tensor_flops(result)?,
            f32_flops: operations as f64 / self.best(Kernel::MultiplyAdd, &add)?,
        })
    }

    /// With so many turns that starting them does not count.
    fn tensor_flops(&self, result: Argument<'_>) -> Result<f64, BackendError> {
        let of_turn = 2 * 16 * 8 * 16 * 8 * (self.blocks * THREADS / 32);
        let [mut turns, most] = TENSOR_TURNS;
        loop {
            let arguments = [int(turns), Argument::Float(0.999), result];
            let seconds = self.best(Kernel::MultiplyAddTensors, &arguments)?;
            if seconds > A_WHILE || turns >= most {
                return Ok((turns * of_turn) as f64 / seconds);
            }
            turns *= 4;
        }
    }

    /// Seconds of one start.
    fn best(&self, kernel: Kernel, arguments: &[Argument<'_>]) -> Result<f64, BackendError> {
        let device = &self.cuda.device;
        let mut best = f64::INFINITY;
        for _ in 0..RUNS {
            device.run()?;
            device.wait()?;
            device.hold();
            let began = Instant::now();
            for _ in 0..STARTS {
                // SAFETY: the arguments of both kernels, and the buffer is as large as they say.
                unsafe { device.push(kernel, Grid::new([self.blocks, 1, 1], THREADS), arguments) };
            }
            device.run()?;
            device.wait()?;
            best = best.min(began.elapsed().as_secs_f64() / STARTS as f64);
        }
        Ok(best)
    }
}
