//! The elastic low-rank product and the attention of the cpu backend beside what bounds them.
//!
//! Each group runs the same shapes by several means in one process, so that the ratios hold on a noisy machine:
//! `decode` beside a plain loop that reads as many bytes as the f32 weight has, `prefill` beside the gemm crate's product of the base weight alone,
//! `mixed` (several sub-networks in one batch) beside the same rows in one sub-network.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use lonas::backend::cpu::{Cpu, Dtype, KvDtype, PagedCache, Rows};
use lonas::backend::{
    Adapter, AttentionShape, Backend, CacheLayout, Draw, GatedMlp, Linear, Segment, Selection, SequenceSpan,
};
use lonas::supernet::{ActiveLinear, ActiveShape};
use lonas::weights::{HostData, HostMatrix};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::hint::black_box;
use std::sync::Arc;

/// Name, outputs, inputs: the gate of SmolLM2-135M's MLP, and LLaMA-7B's.
const SHAPES: [(&str, usize, usize); 2] = [("smollm2-gate", 1536, 576), ("llama-7b-gate", 11008, 4096)];
const RANK: usize = 32;
const DTYPES: [(&str, Dtype); 4] =
    [("f32", Dtype::F32), ("bf16", Dtype::Bf16), ("int8", Dtype::Int8), ("q4", Dtype::Q4)];

fn random(count: usize) -> Vec<f32> {
    let mut random = ChaCha8Rng::seed_from_u64(1);
    (0..count).map(|_| random.random_range(-0.1..0.1)).collect()
}

fn matrix(rows: usize, columns: usize) -> HostMatrix {
    HostMatrix { name: "w".into(), rows, columns, data: HostData::F32(random(rows * columns)) }
}

fn linear(cpu: &Cpu, out: usize, inp: usize) -> Linear<Cpu> {
    let weight = Arc::new(cpu.matrix(matrix(out, inp)).expect("a matrix of these sizes"));
    let [a, b] = cpu.adapter(matrix(RANK, inp), matrix(out, RANK), &weight).expect("matrices of these sizes");
    Linear { index: 0, weight, bias: None, adapters: vec![Some(Adapter { a, b, scale: 2.0 })] }
}

/// `rows` rows cut evenly among sub-networks that keep these eighths of the outputs.
fn segments(rows: usize, (out, inp): (usize, usize), eighths: &[usize]) -> Vec<Segment> {
    let each = rows / eighths.len();
    let segment = |(i, &kept): (usize, &usize)| {
        let linears = vec![ActiveLinear { out: out * kept / 8, inp, rank: RANK }];
        let shape = Arc::new(ActiveShape { linears });
        let selection = Selection { adapter: 0, subnetwork: kept as u32, shape };
        Segment { rows: i * each..(i + 1) * each, selection }
    };
    eighths.iter().enumerate().map(segment).collect()
}

/// One row: bound by the bytes of the weight.
fn decode(criterion: &mut Criterion) {
    // Of its own: the thread that computes first on a backend belongs to that backend's pool from then on.
    let pool = rayon::ThreadPoolBuilder::new().build().expect("threads to read with");
    let mut group = criterion.benchmark_group("decode");
    for (name, out, inp) in SHAPES {
        let x = Rows::new(inp, random(inp));
        for (dtype_name, dtype) in DTYPES {
            let cpu = Cpu::new(dtype, 0);
            let linear = linear(&cpu, out, inp);
            let segments = segments(1, (out, inp), &[8]);
            group.throughput(Throughput::Bytes(linear.weight.bytes() as u64));
            group.bench_function(BenchmarkId::new(dtype_name, name), |b| {
                b.iter(|| cpu.linear(black_box(&x), &linear, &segments));
            });
        }
        let bytes = vec![1u64; out * inp / 2];
        group.throughput(Throughput::Bytes(bytes.len() as u64 * 8));
        group.bench_function(BenchmarkId::new("read-f32", name), |b| b.iter(|| read(&pool, &bytes)));
    }
    group.finish();
}

/// Reads memory on all threads of `pool`: sixteen sums that do not wait for each other, in the instructions that every
/// processor has. No bound: a kernel with wider loads can be a little faster.
fn read(pool: &rayon::ThreadPool, words: &[u64]) -> u64 {
    use rayon::prelude::*;
    let sum = |part: &[u64]| {
        let mut sums = [0u64; 16];
        for words in part.as_chunks::<16>().0 {
            sums.iter_mut().zip(words).for_each(|(sum, word)| *sum ^= word);
        }
        sums.iter().fold(0, |a, b| a ^ b)
    };
    let each = words.len().div_ceil(pool.current_num_threads());
    pool.install(|| words.par_chunks(each).map(sum).reduce(|| 0, |a, b| a ^ b))
}

/// 128 rows: bound by arithmetic.
fn prefill(criterion: &mut Criterion) {
    let rows = 128;
    let pool = rayon::ThreadPoolBuilder::new().build().expect("threads to multiply with");
    let mut group = criterion.benchmark_group("prefill");
    group.sample_size(20);
    for (name, out, inp) in SHAPES {
        let x = Rows::new(inp, random(rows * inp));
        group.throughput(Throughput::Elements((2 * rows * out * inp) as u64));
        for (dtype_name, dtype) in DTYPES {
            let cpu = Cpu::new(dtype, 0);
            let linear = linear(&cpu, out, inp);
            let segments = segments(rows, (out, inp), &[8]);
            group.bench_function(BenchmarkId::new(dtype_name, name), |b| {
                b.iter(|| cpu.linear(black_box(&x), &linear, &segments));
            });
        }
        let (weight, mut y) = (random(out * inp), vec![0.0; rows * out]);
        group.bench_function(BenchmarkId::new("gemm-f32-base-only", name), |b| {
            b.iter(|| pool.install(|| gemm(&mut y, x.values(), &weight, (rows, out, inp))));
        });
    }
    group.finish();
}

#[expect(unsafe_code, reason = "the gemm crate's interface")]
fn gemm(y: &mut [f32], x: &[f32], weight: &[f32], (rows, out, inp): (usize, usize, usize)) {
    assert!(y.len() == rows * out && x.len() == rows * inp && weight.len() == out * inp);
    let threads = gemm::Parallelism::Rayon(rayon::current_num_threads());
    let (o, i) = (out as isize, inp as isize);
    let (y, x, weight) = (y.as_mut_ptr(), x.as_ptr(), weight.as_ptr());
    // SAFETY: the three matrices are exactly as large as their shapes say.
    unsafe {
        gemm::gemm(
            rows, out, inp, y, 1, o, false, x, 1, i, weight, i, 1, 0.0, 1.0, false, false, false, threads,
        );
    }
}

/// The gated MLP of SmolLM2-135M at full size, adapters in it, for one row, a few and many.
fn mlp(criterion: &mut Criterion) {
    let (hidden, channels) = (576, 1536);
    let mut group = criterion.benchmark_group("mlp");
    for (dtype_name, dtype) in DTYPES {
        let cpu = Cpu::new(dtype, 0);
        let of = |index: usize, out: usize, inp: usize| Linear { index, ..linear(&cpu, out, inp) };
        let (gate, up) = (of(0, channels, hidden), of(1, channels, hidden));
        let mlp = GatedMlp { gate, up, down: of(2, hidden, channels) };
        let linears = [(channels, hidden), (channels, hidden), (hidden, channels)];
        let linears = linears.map(|(out, inp)| ActiveLinear { out, inp, rank: RANK }).to_vec();
        let shape = Arc::new(ActiveShape { linears });
        for rows in [1, 16, 256] {
            let selection = Selection { adapter: 0, subnetwork: 1, shape: Arc::clone(&shape) };
            let segments = [Segment { rows: 0..rows, selection }];
            let x = Rows::new(hidden, random(rows * hidden));
            group.throughput(Throughput::Elements((2 * rows * 3 * channels * hidden) as u64));
            group.bench_function(BenchmarkId::new(dtype_name, rows), |b| {
                b.iter(|| cpu.gated_mlp(black_box(&x), &mlp, &segments));
            });
        }
    }
    group.finish();
}

/// A token from each of eight rows of SmolLM2's vocabulary: the backend's way, and the readable one.
fn choose(criterion: &mut Criterion) {
    let (rows, vocabulary) = (8, 49_152);
    let cpu = Cpu::new(Dtype::F32, 0);
    // As spread out as a model's: most tokens are a thousandth as likely as the likeliest, or less.
    let logits = Rows::new(vocabulary, random(rows * vocabulary).iter().map(|x| x.powi(3) * 1e4).collect());
    let mut group = criterion.benchmark_group("choose");
    group.throughput(Throughput::Elements(rows as u64));
    for (name, temperature, top_k, top_p) in [
        ("temperature-0", 0.0, 0, 1.0),
        ("temperature-1", 1.0, 0, 1.0),
        ("top-p-0.95", 1.0, 0, 0.95),
        ("top-k-40", 0.7, 40, 1.0),
    ] {
        let draw = Draw { edits: Vec::new(), temperature, top_k, top_p, min_p: 0.0, uniform: 0.5 };
        let draws = (0..rows as u32).map(|row| (row, draw.clone())).collect::<Vec<_>>();
        group.bench_function(BenchmarkId::new("cpu", name), |b| {
            b.iter(|| cpu.choose(black_box(&logits), &draws));
        });
        group.bench_function(BenchmarkId::new("readable", name), |b| {
            let each = |(row, draw): &(u32, Draw)| draw.choose(black_box(&logits).row(*row as usize));
            b.iter(|| draws.iter().map(each).collect::<Vec<_>>());
        });
    }
    group.finish();
}

/// Eight rows in four sub-networks beside eight rows in each of the four.
fn mixed(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("mixed");
    let (name, out, inp) = SHAPES[0];
    let x = Rows::new(inp, random(8 * inp));
    let cpu = Cpu::new(Dtype::Bf16, 0);
    let linear = linear(&cpu, out, inp);
    for (what, eighths) in
        [("8/8", &[8][..]), ("7/8", &[7]), ("6/8", &[6]), ("4/8", &[4]), ("all four", &[8, 7, 6, 4])]
    {
        let segments = segments(8, (out, inp), eighths);
        group.bench_function(BenchmarkId::new(what, name), |b| {
            b.iter(|| cpu.linear(black_box(&x), &linear, &segments));
        });
    }
    group.finish();
}

/// SmolLM2-135M's attention in its serving pool, one layer a time: a prompt of 512 tokens, bound by arithmetic, and streams
/// that decode at a context, bound by the bytes of their keys and values.
fn attention(criterion: &mut Criterion) {
    const SHAPE: AttentionShape = AttentionShape::new(9, 3, 64);
    const BLOCK_SIZE: usize = 16;
    // All layers in turn, so that a layer's keys and values are as cold as in a model.
    const LAYERS: usize = 30;
    let AttentionShape { query_heads, kv_heads, head_size, .. } = SHAPE;
    let mut group = criterion.benchmark_group("attention");
    group.sample_size(20);
    let cases = [("prefill", 512, 512), ("decode", 128, 1), ("decode", 2048, 1)];
    let cases = cases.iter().flat_map(|case| [(case, 1usize), (case, 8)]);
    for (&(what, context, rows), streams) in cases.filter(|(case, streams)| case.2 == 1 || *streams == 1) {
        let blocks = usize::div_ceil(context, BLOCK_SIZE);
        // Scattered, as after a while of serving.
        let table = |stream: usize| (0..blocks).map(|b| (b * streams + stream) as u32).collect();
        let span = |stream: usize| SequenceSpan {
            rows: stream * rows..(stream + 1) * rows,
            start: context - rows,
            blocks: table(stream),
        };
        let spans = (0..streams).map(span).collect::<Vec<_>>();
        let x = |heads: usize| Rows::new(heads * head_size, random(streams * rows * heads * head_size));
        let (q, kv) = (x(query_heads), x(kv_heads));
        for (name, dtype, bytes) in [("f32", KvDtype::F32, 4), ("bf16", KvDtype::Bf16, 2)] {
            group.throughput(if rows > 1 {
                let products = (1..=rows).sum::<usize>() * query_heads * head_size * 2;
                Throughput::Elements(2 * products as u64)
            } else {
                Throughput::Bytes((streams * context * 2 * kv_heads * head_size * bytes) as u64)
            });
            let cpu = Cpu::new(Dtype::Auto, 0).with_kv(dtype);
            let blocks = blocks * streams;
            let layout = CacheLayout { layers: LAYERS, kv_heads, head_size, blocks, block_size: BLOCK_SIZE };
            let mut cache = cpu.cache(layout).expect("a pool of this size");
            fill(&cpu, &mut cache, &layout, SHAPE);
            let mut layers = (0..LAYERS).cycle();
            group.bench_function(BenchmarkId::new(name, format!("{what} {context} x{streams}")), |b| {
                b.iter(|| {
                    let cache = layers.next().map(|layer| (&mut cache, layer));
                    cpu.attention(black_box(&q), &kv, &kv, &SHAPE, &spans, cache)
                });
            });
        }
    }
    group.finish();
}

/// Writes to all of a pool, so that the system has given its memory.
fn fill(cpu: &Cpu, cache: &mut PagedCache, layout: &CacheLayout, shape: AttentionShape) {
    let CacheLayout { layers, blocks, block_size, .. } = *layout;
    let x = |heads: usize| Rows::new(heads * shape.head_size, random(block_size * heads * shape.head_size));
    let (q, kv) = (x(shape.query_heads), x(shape.kv_heads));
    for (layer, block) in (0..layers).flat_map(|layer| (0..blocks as u32).map(move |block| (layer, block))) {
        let span = SequenceSpan { rows: 0..block_size, start: 0, blocks: vec![block] };
        cpu.attention(&q, &kv, &kv, &shape, &[span], Some((cache, layer))).expect("a block of the pool");
    }
}

criterion_group!(benches, decode, prefill, mlp, choose, mixed, attention);
criterion_main!(benches);
