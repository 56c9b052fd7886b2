//! How long a layer of SmolLM2-135M takes with the kernels for small weights and without them. Not a test but a measurement, for a
//! GPU: `--ignored --nocapture narrow`.
#![allow(clippy::print_stdout)]

use super::*;
use crate::backend::cuda::Cache;
use crate::backend::cuda::device::How;
use crate::backend::cuda::rows::Rows;
use std::time::Instant;

const HIDDEN: usize = 576;
const WIDTH: usize = 1536;
const RANK: usize = 32;
const HEADS: (usize, usize, usize) = (9, 3, 64);
const CONTEXT: usize = 127;
const BLOCK_SIZE: usize = 16;
const ADAPTERS: usize = 3;

struct Layer {
    norms: [crate::backend::cuda::Vector; 2],
    qkv: [Linear<Cuda>; 3],
    o: Linear<Cuda>,
    mlp: GatedMlp<Cuda>,
}

/// Layers that no cache holds, and what their attention reads.
struct Chain {
    gpu: Cuda,
    layers: Vec<Layer>,
    cache: Cache,
    rounds: usize,
}

impl Chain {
    fn new(how: How, (layers, rounds): (usize, usize)) -> Self {
        let gpu = Cuda::open_as(0, how).unwrap();
        let (query, kv, size) = HEADS;
        let shapes = [(query * size, HIDDEN), (kv * size, HIDDEN), (kv * size, HIDDEN)];
        let linear = |seed: u64, index: usize, (out, inp): (usize, usize)| {
            let weight = gpu.matrix(scaled(seed, out, inp)).unwrap();
            let adapter = |seed| {
                let [a, b] =
                    gpu.adapter(scaled(seed, RANK, inp), scaled(seed + 1, out, RANK), &weight).unwrap();
                Some(Adapter { a, b, scale: 2.0 })
            };
            let adapters = (0..ADAPTERS as u64).map(|i| adapter(seed + 2 * i + 1)).chain([None]).collect();
            Linear { index, weight: Arc::new(weight), bias: None, adapters }
        };
        let layer = |layer: u64| {
            let seed = |i: usize| 1000 * layer + 20 * i as u64;
            let norm = |i| gpu.vector(vector(seed(i), HIDDEN)).unwrap();
            let [gate, up] = [4, 5].map(|i| linear(seed(i), i, (WIDTH, HIDDEN)));
            Layer {
                norms: [norm(8), norm(9)],
                qkv: [0, 1, 2].map(|i| linear(seed(i), i, shapes[i])),
                o: linear(seed(3), 3, (HIDDEN, query * size)),
                mlp: GatedMlp { gate, up, down: linear(seed(6), 6, (HIDDEN, WIDTH)) },
            }
        };
        let count = layers;
        let layers = (0..layers as u64).map(layer).collect();
        let blocks = 8 * (CONTEXT + 1).div_ceil(BLOCK_SIZE);
        let layout =
            CacheLayout { layers: count, kv_heads: kv, head_size: size, blocks, block_size: BLOCK_SIZE };
        let cache = gpu.cache(layout).unwrap();
        // Not what memory held before, which may be no number.
        let numbers = vec![0u8; 4 * count * kv * size * blocks * BLOCK_SIZE];
        gpu.device.upload_to(cache.values.address, &numbers).unwrap();
        Self { gpu, layers, cache, rounds }
    }

    /// One step of so many sequences, which take turns in so many super-adapters.
    fn step(&mut self, rows: usize, adapters: usize) -> Rows {
        let (gpu, (query, kv, size)) = (&self.gpu, HEADS);
        let shape = |rank| {
            let of = |out, inp| ActiveLinear { out, inp, rank };
            let kv = of(kv * size, HIDDEN);
            let up = of(WIDTH, HIDDEN);
            let linears =
                vec![of(query * size, HIDDEN), kv, kv, of(HIDDEN, query * size), up, up, of(HIDDEN, WIDTH)];
            Arc::new(ActiveShape { linears })
        };
        let segment = |row: usize| {
            let (adapter, rank) = if adapters == 0 { (ADAPTERS, 0) } else { (row % adapters, RANK) };
            Segment {
                rows: row..row + 1,
                selection: Selection { adapter, subnetwork: 0, shape: shape(rank) },
            }
        };
        let segments = (0..rows).map(segment).collect::<Vec<_>>();
        let of_row = (CONTEXT + 1).div_ceil(BLOCK_SIZE) as u32;
        let span = |row: usize| {
            let blocks = (of_row * row as u32..of_row * (row as u32 + 1)).collect();
            SequenceSpan { rows: row..row + 1, start: CONTEXT, blocks }
        };
        let spans = (0..rows).map(span).collect::<Vec<_>>();
        let table = gpu.table(scaled(5, rows, HIDDEN)).unwrap();
        let mut x = gpu.embed(&table, &(0..rows as u32).collect::<Vec<_>>()).unwrap();
        let frequencies = (0..size / 2).map(|i| 0.7f32.powi(i as i32)).collect::<Vec<_>>();
        let angles = gpu.angles(&vec![CONTEXT as u32; rows], &frequencies).unwrap();
        let shape = AttentionShape::new(query, kv, size);
        for (i, layer) in self.layers.iter().enumerate() {
            let norm = |i: usize| Norm { weight: &layer.norms[i], eps: 1e-5 };
            let qkv = gpu.linears(&x, Some(norm(0)), layer.qkv.each_ref(), &segments).unwrap();
            let cache = Some((&mut self.cache, i));
            let attended = gpu.rotary_attention(qkv, &angles, &shape, &spans, cache).unwrap();
            x = gpu.linear_onto(x, &attended, &layer.o, &segments).unwrap();
            x = gpu.gated_mlp_onto(x, norm(1), &layer.mlp, &segments).unwrap();
        }
        x
    }

    /// Microseconds a layer, the best and the middle one of some rounds, and the last one's results.
    fn measure(&mut self, rows: usize, adapters: usize) -> (f64, f64, Vec<f32>) {
        let mut times = Vec::new();
        let mut last = Vec::new();
        // The first ones make and record the kernels.
        for round in 0..self.rounds + 3 {
            let x = self.step(rows, adapters);
            self.gpu.device.wait().unwrap();
            let began = Instant::now();
            self.gpu.device.run().unwrap();
            self.gpu.device.wait().unwrap();
            if round >= 3 {
                times.push(began.elapsed().as_secs_f64() * 1e6 / self.layers.len() as f64);
            }
            last = self.gpu.host(x).unwrap();
        }
        times.sort_by(f64::total_cmp);
        (times[0], times[times.len() / 2], last)
    }
}

/// Numbers as weights have them.
fn scaled(seed: u64, rows: usize, columns: usize) -> HostMatrix {
    let numbers =
        random(seed, rows * columns).into_iter().map(|number| bf16::from_f32(number / 16.0)).collect();
    HostMatrix { name: format!("m{seed}"), rows, columns, data: HostData::Bf16(numbers) }
}

#[test]
#[ignore = "a measurement"]
fn what_a_layer_takes_with_narrow_kernels_and_without() {
    let size @ (layers, _) = if std::env::var_os("LONAS_EMULATED").is_some() { (1, 1) } else { (30, 40) };
    let mut with = Chain::new(How::RULE, size);
    let mut without = Chain::new(How { narrow: false, ..How::RULE }, size);
    println!("{}: SmolLM2-135M, {layers} layers, rank {RANK}; us a layer, best (median)", with.gpu.name());
    for (rows, adapters) in [(1, 1), (1, 0), (2, 1), (4, 1), (4, 0), (4, 2), (8, 1), (8, 0), (8, 2)] {
        let (best, median, got) = with.measure(rows, adapters);
        let (best_without, median_without, expected) = without.measure(rows, adapters);
        let bits = |numbers: &[f32]| numbers.iter().map(|number| number.to_bits()).collect::<Vec<_>>();
        let equal = match bits(&got) == bits(&expected) {
            true => "equal",
            false if rows > 4 => "differ, as a norm inside and one before do",
            false => "DIFFER",
        };
        println!(
            "{rows} rows, {adapters} super-adapters: narrow {best:6.2} ({median:6.2})   few {best_without:6.2} \
             ({median_without:6.2})   bits {equal}"
        );
        assert!(got.iter().all(|number| number.is_finite()), "{rows} rows");
    }
}
