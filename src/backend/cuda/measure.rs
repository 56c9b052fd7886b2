//! How fast single operations are on a GPU, over weights of a model's sizes.
//!
//! Weights are copies with other numbers, together larger than any second-level cache, and each is used in turn, so that every
//! product reads its weight from memory, as in a model.

use super::{Cuda, Rows};
use crate::backend::{
    Adapter, AttentionShape, Backend, BackendError, CacheLayout, GatedMlp, Linear, Norm, Segment, Selection,
    SequenceSpan,
};
use crate::supernet::{ActiveLinear, ActiveShape};
use crate::weights::{HostData, HostMatrix, HostVector};
use half::bf16;
use std::sync::Arc;
use std::time::Instant;

/// The sizes of a model's layers.
#[derive(Debug, Clone, Copy)]
pub struct LayerSizes {
    pub hidden: usize,
    pub mlp: usize,
    pub rank: usize,
    pub vocabulary: usize,
    pub attention: AttentionShape,
}

impl LayerSizes {
    /// LLaMA-7B with LoNAS's adapters.
    pub const LLAMA_7B: Self = Self {
        hidden: 4096,
        mlp: 11008,
        rank: 32,
        vocabulary: 32000,
        attention: AttentionShape::new(32, 32, 128),
    };
}

/// What is measured, and how long.
#[derive(Debug, Clone)]
pub struct Measured {
    /// Bytes of the copies of a weight, at least.
    pub bytes: usize,
    /// Times that each is measured; the best counts.
    pub rounds: usize,
    /// Rows of a step.
    pub rows: Vec<usize>,
}

/// One operation's figure.
#[derive(Debug, Clone, PartialEq)]
pub struct OperationFigure {
    pub operation: &'static str,
    pub rows: usize,
    /// Whether the super-adapter takes part.
    pub adapter: bool,
    pub seconds: f64,
    /// That it must read: weights, adapters, keys and values, each once.
    pub bytes: usize,
    pub multiply_adds: usize,
}

/// Every operation of a layer, and the vocabulary's product, by rows, with and without an adapter.
///
/// # Errors
/// The driver's; too little memory.
pub fn operations(
    cuda: &Cuda,
    sizes: &LayerSizes,
    measured: &Measured,
) -> Result<Vec<OperationFigure>, BackendError> {
    let mut figures = Vec::new();
    let bench = Bench { cuda, sizes, measured };
    bench.qkv(&mut figures)?;
    bench.output(&mut figures)?;
    bench.mlp(&mut figures)?;
    bench.head(&mut figures)?;
    bench.attention(&mut figures)?;
    Ok(figures)
}

struct Bench<'a> {
    cuda: &'a Cuda,
    sizes: &'a LayerSizes,
    measured: &'a Measured,
}

impl Bench<'_> {
    fn qkv(&self, figures: &mut Vec<OperationFigure>) -> Result<(), BackendError> {
        let LayerSizes { hidden, attention, .. } = *self.sizes;
        let AttentionShape { query_heads, kv_heads, head_size, .. } = attention;
        let outs = [query_heads, kv_heads, kv_heads].map(|heads| heads * head_size);
        let shapes = outs.map(|out| (out, hidden));
        let layers = self.copies(&shapes, |seed| {
            let [q, k, v] = [0, 1, 2].map(|i| self.linear(seed + 9 * i as u64, i, shapes[i]));
            Ok([q?, k?, v?])
        })?;
        let norm = self.norm(hidden)?;
        self.each(("q, k and v", &shapes), figures, |x, segments| {
            for [q, k, v] in &layers {
                self.cuda.linears(x, Some(Norm { weight: &norm, eps: 1e-5 }), [q, k, v], segments)?;
            }
            Ok(layers.len())
        })
    }

    fn output(&self, figures: &mut Vec<OperationFigure>) -> Result<(), BackendError> {
        let AttentionShape { query_heads, head_size, .. } = self.sizes.attention;
        let shapes = [(self.sizes.hidden, query_heads * head_size)];
        let layers = self.copies(&shapes, |seed| self.linear(seed, 0, shapes[0]))?;
        self.each(("o", &shapes), figures, |x, segments| {
            for linear in &layers {
                self.cuda.linear(x, linear, segments)?;
            }
            Ok(layers.len())
        })
    }

    fn mlp(&self, figures: &mut Vec<OperationFigure>) -> Result<(), BackendError> {
        let LayerSizes { hidden, mlp: width, .. } = *self.sizes;
        let shapes = [(width, hidden), (width, hidden), (hidden, width)];
        let layers = self.copies(&shapes, |seed| {
            let [gate, up, down] = [0, 1, 2].map(|i| self.linear(seed + 9 * i as u64, i, shapes[i]));
            Ok(GatedMlp { gate: gate?, up: up?, down: down? })
        })?;
        self.each(("gate, up and down", &shapes), figures, |x, segments| {
            for mlp in &layers {
                self.cuda.gated_mlp(x, mlp, segments)?;
            }
            Ok(layers.len())
        })
    }

    fn head(&self, figures: &mut Vec<OperationFigure>) -> Result<(), BackendError> {
        let LayerSizes { hidden, vocabulary, .. } = *self.sizes;
        let heads =
            self.copies(&[(vocabulary, hidden)], |seed| self.cuda.table(random(seed, vocabulary, hidden)))?;
        for &rows in &self.measured.rows {
            let x = self.input(rows, hidden)?;
            let seconds = self.best(|| {
                for head in &heads {
                    self.cuda.logits(&x, head)?;
                }
                Ok(heads.len())
            })?;
            let (bytes, multiply_adds) = (2 * vocabulary * hidden, rows * vocabulary * hidden);
            figures.push(OperationFigure {
                operation: "logits",
                rows,
                adapter: false,
                seconds,
                bytes,
                multiply_adds,
            });
        }
        Ok(())
    }

    /// The last positions of a context of 2048, in one sequence.
    fn attention(&self, figures: &mut Vec<OperationFigure>) -> Result<(), BackendError> {
        const CONTEXT: usize = 2048;
        const BLOCK_SIZE: usize = 16;
        let AttentionShape { query_heads, kv_heads, head_size, .. } = self.sizes.attention;
        let position = 2 * kv_heads * head_size * self.cuda.kv.bytes();
        let layers = self.measured.bytes.div_ceil(CONTEXT * position).max(1);
        let blocks = CONTEXT / BLOCK_SIZE;
        let layout = CacheLayout { layers, kv_heads, head_size, blocks, block_size: BLOCK_SIZE };
        let mut cache = self.cuda.cache(layout)?;
        for &rows in self.measured.rows.iter().filter(|&&rows| rows <= CONTEXT) {
            let of = |heads: usize| self.input(rows, heads * head_size);
            let (q, k, v) = (of(query_heads)?, of(kv_heads)?, of(kv_heads)?);
            let blocks = (0..blocks as u32).collect();
            let spans = [SequenceSpan { rows: 0..rows, start: CONTEXT - rows, blocks }];
            let seconds = self.best(|| {
                for layer in 0..layers {
                    self.cuda.attention(
                        &q,
                        &k,
                        &v,
                        &self.sizes.attention,
                        &spans,
                        Some((&mut cache, layer)),
                    )?;
                }
                Ok(layers)
            })?;
            let multiply_adds = 2 * rows * (CONTEXT - rows / 2) * query_heads * head_size;
            let bytes = CONTEXT * position;
            figures.push(OperationFigure {
                operation: "attention",
                rows,
                adapter: false,
                seconds,
                bytes,
                multiply_adds,
            });
        }
        Ok(())
    }

    /// By rows, with and without the adapter; `run` says over how many copies it went.
    fn each(
        &self,
        (operation, shapes): (&'static str, &[(usize, usize)]),
        figures: &mut Vec<OperationFigure>,
        run: impl Fn(&Rows, &[Segment]) -> Result<usize, BackendError>,
    ) -> Result<(), BackendError> {
        for &rows in &self.measured.rows {
            let x = self.input(rows, shapes[0].1)?;
            for adapter in [true, false] {
                let rank = if adapter { self.sizes.rank } else { 0 };
                let linears = shapes.iter().map(|&(out, inp)| ActiveLinear { out, inp, rank }).collect();
                let shape = Arc::new(ActiveShape { linears });
                let selection = Selection { adapter: usize::from(!adapter), subnetwork: rank as u32, shape };
                let segments = [Segment { rows: 0..rows, selection }];
                let seconds = self.best(|| run(&x, &segments))?;
                let weights = shapes.iter().map(|(out, inp)| out * inp + rank * (out + inp)).sum::<usize>();
                let (bytes, multiply_adds) = (2 * weights, rows * weights);
                figures.push(OperationFigure { operation, rows, adapter, seconds, bytes, multiply_adds });
            }
        }
        Ok(())
    }

    /// Seconds of one copy, in the best round; the first two rounds make and record the kernels.
    fn best(&self, mut run: impl FnMut() -> Result<usize, BackendError>) -> Result<f64, BackendError> {
        let device = &self.cuda.device;
        let mut best = f64::INFINITY;
        device.run()?;
        for round in 0..self.measured.rounds + 2 {
            device.hold();
            let copies = run()?;
            device.wait()?;
            let began = Instant::now();
            device.run()?;
            device.wait()?;
            if round >= 2 {
                best = best.min(began.elapsed().as_secs_f64() / copies as f64);
            }
        }
        Ok(best)
    }

    /// As many as come to the bytes that are to be read.
    fn copies<T>(
        &self,
        shapes: &[(usize, usize)],
        make: impl Fn(u64) -> Result<T, BackendError>,
    ) -> Result<Vec<T>, BackendError> {
        let bytes = shapes.iter().map(|(out, inp)| 2 * out * inp).sum::<usize>();
        (0..self.measured.bytes.div_ceil(bytes.max(1)).max(1) as u64).map(|copy| make(100 * copy)).collect()
    }

    /// With one super-adapter; a second one leaves it alone.
    fn linear(
        &self,
        seed: u64,
        index: usize,
        (out, inp): (usize, usize),
    ) -> Result<Linear<Cuda>, BackendError> {
        let weight = self.cuda.matrix(random(seed, out, inp))?;
        let (a, b) = (random(seed + 1, self.sizes.rank, inp), random(seed + 2, out, self.sizes.rank));
        let [a, b] = self.cuda.adapter(a, b, &weight)?;
        let adapters = vec![Some(Adapter { a, b, scale: 2.0 }), None];
        Ok(Linear { index, weight: Arc::new(weight), bias: None, adapters })
    }

    fn norm(&self, width: usize) -> Result<super::Vector, BackendError> {
        self.cuda.vector(HostVector { name: "norm".into(), data: vec![1.0; width] })
    }

    fn input(&self, rows: usize, width: usize) -> Result<Rows, BackendError> {
        let table = self.cuda.table(random(rows as u64, 1, width))?;
        self.cuda.embed(&table, &vec![0; rows])
    }
}

/// Numbers between -1/16 and 1/16, as weights are.
fn random(seed: u64, rows: usize, columns: usize) -> HostMatrix {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let number = |_| {
        // xorshift64, Marsaglia 2003.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bf16::from_f32((state >> 40) as f32 / (1 << 27) as f32 - 1.0 / 16.0)
    };
    let data = HostData::Bf16((0..rows * columns).map(number).collect());
    HostMatrix { name: "random".into(), rows, columns, data }
}
