//! What this machine can do at most, measured on a backend's own threads: bytes read from memory and arithmetic a second.
//!
//! A bound, to set what a step took beside it: loops of nothing but loads, or of one instruction on registers. The best of
//! several short runs counts, since whatever else runs on the machine only takes away. Knows nothing of matrices.
#![allow(unsafe_code)]

use super::super::BackendError;
use super::Cpu;
use memmap2::MmapMut;
use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// What is read: several times the third-level cache of the largest machines that are rented by the core.
const BUFFER: usize = 512 << 20;
/// Short runs of which the best counts.
const RUNS: usize = 5;
/// Turns of an arithmetic loop in one run: about 10 ms.
const TURNS: u32 = 6_000_000;
/// Sums that do not wait for each other: latency times throughput of an FMA is 8 to 10 on all processors so far.
const SUMS: usize = 12;

/// What a machine can do at most, in one second, on all threads of a backend.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Limits {
    pub read_bytes_per_second: f64,
    /// Fused multiply-adds count as two operations, here and below.
    pub f32_flops: f64,
    /// By `vdpbf16ps`; `None` where the processor has no such instruction.
    pub bf16_flops: Option<f64>,
    /// By `vpdpbusd`, else by the three AVX2 instructions in its place; `None` where there are neither.
    pub int8_ops: Option<f64>,
}

/// Measures [`Limits`] again and again; holds the memory that is read.
pub struct LimitsMeter<'a> {
    cpu: &'a Cpu,
    buffer: MmapMut,
}

impl<'a> LimitsMeter<'a> {
    /// # Errors
    /// Half a gigabyte that the system does not give.
    pub fn new(cpu: &'a Cpu) -> Result<Self, BackendError> {
        let memory =
            |_| BackendError::Memory { what: "measuring how fast memory is read".into(), bytes: BUFFER };
        let mut buffer = MmapMut::map_anon(BUFFER).map_err(memory)?;
        // Large pages, so that it is memory that is measured and not the way to it; where the system has none to give
        // it goes without.
        #[cfg(target_os = "linux")]
        let _ = buffer.advise(memmap2::Advice::HugePage);
        buffer.fill(1);
        Ok(Self { cpu, buffer })
    }

    /// Takes about a third of a second.
    pub fn measure(&self) -> Limits {
        Limits {
            read_bytes_per_second: self.read(),
            f32_flops: self.best(TURNS, f32_operations).unwrap_or_default(),
            bf16_flops: self.best(TURNS, bf16_operations),
            int8_ops: self.best(TURNS, int8_operations),
        }
    }

    fn read(&self) -> f64 {
        let words: &[u64] = bytemuck::cast_slice(&self.buffer);
        let each = words.len().div_ceil(self.cpu.threads());
        let parts = words.chunks(each).collect::<Vec<_>>();
        let read = |thread: usize| {
            if let Some(part) = parts.get(thread) {
                black_box(xor(black_box(part)));
            }
        };
        let rates = (0..RUNS).map(|_| BUFFER as f64 / self.seconds(read));
        rates.fold(0.0, f64::max)
    }

    /// Operations a second of all threads; `None` where `operations`, which does `turns` turns and says how many
    /// operations that were, has no instructions for it.
    fn best(&self, turns: u32, operations: fn(u32) -> Option<f64>) -> Option<f64> {
        let of_one_thread = operations(1)? * f64::from(turns);
        let work = |_| _ = black_box(operations(black_box(turns)));
        let rates = (0..RUNS).map(|_| of_one_thread * self.cpu.threads() as f64 / self.seconds(work));
        Some(rates.fold(0.0, f64::max))
    }

    /// What the slowest thread takes for its share.
    fn seconds(&self, work: impl Fn(usize) + Sync) -> f64 {
        let slowest = AtomicU64::new(1);
        self.cpu.team.run(|member| {
            // Woken up and together.
            member.barrier();
            let began = Instant::now();
            work(member.index());
            slowest.fetch_max(began.elapsed().as_nanos() as u64, Ordering::Relaxed);
        });
        slowest.into_inner() as f64 * 1e-9
    }
}

/// Reads all words.
fn xor(words: &[u64]) -> u64 {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: detected just now.
            return unsafe { x86::xor_avx512(words) };
        }
        if is_x86_feature_detected!("avx2") {
            // SAFETY: detected just now.
            return unsafe { x86::xor_avx2(words) };
        }
    }
    xor_by(words)
}

/// Loads into several registers that do not wait for each other.
#[inline(always)]
fn xor_by(words: &[u64]) -> u64 {
    let mut sums = [0u64; 32];
    for words in words.as_chunks::<32>().0 {
        sums.iter_mut().zip(words).for_each(|(sum, word)| *sum ^= word);
    }
    sums.iter().fold(0, |a, b| a ^ b)
}

fn f32_operations(turns: u32) -> Option<f64> {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: detected just now.
            return Some(unsafe { x86::fma_avx512(turns) });
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            // SAFETY: detected just now.
            return Some(unsafe { x86::fma_avx2(turns) });
        }
    }
    let (x, y) = (black_box(0.999f32), black_box(1e-9f32));
    let mut sums: [[f32; 4]; SUMS] = std::array::from_fn(|i| [i as f32; 4]);
    for _ in 0..turns {
        sums.iter_mut().flatten().for_each(|sum| *sum = *sum * x + y);
    }
    black_box(sums);
    Some(f64::from(turns) * (SUMS * 4 * 2) as f64)
}

fn bf16_operations(turns: u32) -> Option<f64> {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bf16") {
        // SAFETY: detected just now.
        return Some(unsafe { x86::dot_bf16(turns) });
    }
    let _ = turns;
    None
}

fn int8_operations(turns: u32) -> Option<f64> {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vnni") {
            // SAFETY: detected just now.
            return Some(unsafe { x86::dot_int8_avx512(turns) });
        }
        if is_x86_feature_detected!("avx2") {
            // SAFETY: detected just now.
            return Some(unsafe { x86::dot_int8_avx2(turns) });
        }
    }
    let _ = turns;
    None
}

/// Each does `turns` turns and returns how many operations that were.
#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{SUMS, xor_by};
    use std::arch::x86_64::*;
    use std::hint::black_box;

    #[target_feature(enable = "avx512f")]
    pub(super) fn xor_avx512(words: &[u64]) -> u64 {
        xor_by(words)
    }

    #[target_feature(enable = "avx2")]
    pub(super) fn xor_avx2(words: &[u64]) -> u64 {
        xor_by(words)
    }

    #[target_feature(enable = "avx512f")]
    pub(super) fn fma_avx512(turns: u32) -> f64 {
        let (x, y) = (_mm512_set1_ps(black_box(0.999)), _mm512_set1_ps(black_box(1e-9)));
        let mut sums: [__m512; SUMS] = std::array::from_fn(|i| _mm512_set1_ps(i as f32));
        for _ in 0..turns {
            for sum in &mut sums {
                *sum = _mm512_fmadd_ps(*sum, x, y);
            }
        }
        black_box(sums);
        f64::from(turns) * (SUMS * 16 * 2) as f64
    }

    #[target_feature(enable = "avx2,fma")]
    pub(super) fn fma_avx2(turns: u32) -> f64 {
        let (x, y) = (_mm256_set1_ps(black_box(0.999)), _mm256_set1_ps(black_box(1e-9)));
        let mut sums: [__m256; SUMS] = std::array::from_fn(|i| _mm256_set1_ps(i as f32));
        for _ in 0..turns {
            for sum in &mut sums {
                *sum = _mm256_fmadd_ps(*sum, x, y);
            }
        }
        black_box(sums);
        f64::from(turns) * (SUMS * 8 * 2) as f64
    }

    #[target_feature(enable = "avx512f,avx512bf16")]
    pub(super) fn dot_bf16(turns: u32) -> f64 {
        // Each half of a lane is the bf16 of 2^-8.
        let factor = _mm512_set1_epi32(black_box(0x3B80_3B80));
        // SAFETY: 512 bits of numbers in either type.
        let factor = unsafe { std::mem::transmute::<__m512i, __m512bh>(factor) };
        let mut sums: [__m512; SUMS] = std::array::from_fn(|i| _mm512_set1_ps(i as f32));
        for _ in 0..turns {
            for sum in &mut sums {
                *sum = _mm512_dpbf16_ps(*sum, factor, factor);
            }
        }
        black_box(sums);
        f64::from(turns) * (SUMS * 32 * 2) as f64
    }

    #[target_feature(enable = "avx512f,avx512vnni")]
    pub(super) fn dot_int8_avx512(turns: u32) -> f64 {
        let (x, y) = (_mm512_set1_epi8(black_box(3)), _mm512_set1_epi8(black_box(-2)));
        let mut sums: [__m512i; SUMS] = std::array::from_fn(|i| _mm512_set1_epi32(i as i32));
        for _ in 0..turns {
            for sum in &mut sums {
                *sum = _mm512_dpbusd_epi32(*sum, x, y);
            }
        }
        black_box(sums);
        f64::from(turns) * (SUMS * 64 * 2) as f64
    }

    /// Multiplies bytes to sums of two, these to sums of four, and adds them up. The products wait for nothing, so a few
    /// sums are enough, and the factors come from memory so that no product is computed once for all.
    #[target_feature(enable = "avx2")]
    pub(super) fn dot_int8_avx2(turns: u32) -> f64 {
        const FACTORS: usize = 4;
        let (x, ones) = (_mm256_set1_epi8(black_box(3)), _mm256_set1_epi16(1));
        let factors: [__m256i; FACTORS] = std::array::from_fn(|i| _mm256_set1_epi8(-(i as i8)));
        let mut sums: [__m256i; FACTORS] = std::array::from_fn(|i| _mm256_set1_epi32(i as i32));
        for _ in 0..turns {
            let factors = black_box(&factors);
            for (sum, factor) in sums.iter_mut().zip(factors) {
                let fours = _mm256_madd_epi16(_mm256_maddubs_epi16(x, *factor), ones);
                *sum = _mm256_add_epi32(*sum, fours);
            }
        }
        black_box(sums);
        f64::from(turns) * (FACTORS * 32 * 2) as f64
    }
}
