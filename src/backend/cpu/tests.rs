//! The kernels against a slow f64 reference over ugly sizes, and bit for bit against themselves.

use super::inputs::Form;
use super::kernel::Kernel;
use super::matrix::Panels;
use super::{Cpu, Dtype, Rows};
use crate::backend::{
    Adapter, AttentionShape, Backend, CacheLayout, GatedMlp, Linear, Segment, Selection, SequenceSpan,
};
use crate::supernet::{ActiveLinear, ActiveShape};
use crate::weights::{BLOCK, Blocks, HostData, HostMatrix};
use half::{bf16, f16};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::sync::Arc;

fn random(seed: u64, count: usize) -> Vec<f32> {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    (0..count).map(|_| random.random_range(-1.0..1.0)).collect()
}

fn host(seed: u64, rows: usize, columns: usize) -> HostMatrix {
    HostMatrix { name: format!("m{seed}"), rows, columns, data: HostData::F32(random(seed, rows * columns)) }
}

/// Q4_1-like blocks; `columns` is a multiple of 32.
fn blocks(seed: u64, rows: usize, columns: usize) -> HostMatrix {
    let count = rows * columns / BLOCK;
    let quants = random(seed, rows * columns).iter().map(|v| (v * 7.5 + 7.5) as i8).collect();
    let (scales, minimums) = (random(seed + 1, count), Some(random(seed + 2, count)));
    HostMatrix {
        name: format!("b{seed}"),
        rows,
        columns,
        data: HostData::Blocks(Blocks { quants, scales, minimums, places: None }),
    }
}

/// GPTQ-like blocks, from which a zero point of each has been taken off.
fn zero_pointed(seed: u64, rows: usize, columns: usize) -> HostMatrix {
    let mut matrix = blocks(seed, rows, columns);
    let HostData::Blocks(blocks) = &mut matrix.data else { unreachable!() };
    blocks.minimums = None;
    for (block, quants) in blocks.quants.chunks_mut(BLOCK).enumerate() {
        quants.iter_mut().for_each(|quant| *quant -= (block * 7 % 17) as i8);
    }
    matrix
}

/// What is computed with: the packed matrix's own values, so that rounding to bf16 or int8 is not counted as error.
fn unpacked(matrix: &super::Matrix) -> Slow {
    let row = |r| {
        let mut row = vec![0.0; matrix.columns()];
        matrix.unpack_row(r, &mut row);
        row.into_iter().map(f64::from).collect()
    };
    (0..matrix.rows()).map(row).collect()
}

/// A matrix by rows.
type Slow = Vec<Vec<f64>>;

struct Net {
    linear: Linear<Cpu>,
    weight: Slow,
    /// A, B and scale of each super-adapter.
    adapters: Vec<(Slow, Slow, f64)>,
    bias: Vec<f64>,
    /// The largest quant of an input.
    largest: f64,
}

fn net(cpu: &Cpu, index: usize, weight: HostMatrix, rank: usize, with_bias: bool) -> Net {
    let (out, inp) = (weight.rows, weight.columns);
    let weight = cpu.matrix(weight).unwrap();
    let adapter = |seed: u64, scale| {
        let [a, b] = cpu.adapter(host(seed, rank, inp), host(seed + 1, out, rank), &weight).unwrap();
        Adapter { a, b, scale }
    };
    let adapters = [adapter(50, 2.0), adapter(60, 0.5)];
    let slow = adapters.iter().map(|a| (unpacked(&a.a), unpacked(&a.b), f64::from(a.scale))).collect();
    let bias = with_bias.then(|| random(9, out));
    Net {
        weight: unpacked(&weight),
        adapters: slow,
        largest: f64::from(cpu.kernel.largest_input()),
        bias: bias.clone().map_or(vec![0.0; out], |b| b.into_iter().map(f64::from).collect()),
        linear: Linear {
            index,
            weight: Arc::new(weight),
            bias,
            adapters: adapters.into_iter().map(Some).collect(),
        },
    }
}

impl Net {
    /// By definition, in f64: `y = W[:o,:i] x + b[:o] + s B[:o,:r] (A[:r,:i] x)`, `x` and `s A x` rounded as the kernels
    /// round them. With it, how far off a sum may be that was rounded the other way in one place.
    fn slow(&self, x: &[f32], active: ActiveLinear, adapter: usize) -> Vec<(f64, f64)> {
        let dot = |row: &[f64], x: &[f64], n: usize| row[..n].iter().zip(x).map(|(w, x)| w * x).sum::<f64>();
        let (form, places) = (Form::of(&self.linear.weight), places(&self.linear.weight));
        let x = x[..active.inp].iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
        let (x, _) = rounded(form, &x, places.as_deref(), self.largest);
        let (a, b, scale) = &self.adapters[adapter];
        let shrunk = (0..active.rank).map(|r| scale * dot(&a[r], &x, active.inp)).collect::<Vec<_>>();
        let (shrunk, step) = rounded(form, &shrunk, None, self.largest);
        let row = |o: usize| {
            let y = dot(&self.weight[o], &x, active.inp) + self.bias[o] + dot(&b[o], &shrunk, active.rank);
            (y, step)
        };
        (0..self.weight.len()).map(|o| if o < active.out { row(o) } else { (0.0, 0.0) }).collect()
    }
}

fn places(matrix: &super::Matrix) -> Option<Arc<[u32]>> {
    match &matrix.panels {
        Panels::Blocks(blocks) => blocks.places.clone(),
        _ => None,
    }
}

/// Inputs as a kernel of this form takes them, and the largest step between two neighbours.
fn rounded(form: Form, x: &[f64], places: Option<&[u32]>, largest_quant: f64) -> (Vec<f64>, f64) {
    let largest = x.iter().fold(0f64, |m, x| m.max(x.abs()));
    match form {
        Form::F32 => (x.to_vec(), 0.0),
        Form::Bf16 => (x.iter().map(|&x| f64::from(bf16::from_f32(x as f32))).collect(), largest / 128.0),
        Form::Quants => {
            let in_order = (0..x.len() as u32).collect::<Vec<_>>();
            let mut result = x.to_vec();
            for block in places.unwrap_or(&in_order).chunks(BLOCK) {
                let inside = || block.iter().map(|&i| i as usize).filter(|&i| i < x.len());
                let step = inside().map(|i| x[i].abs()).fold(0.0, f64::max) / largest_quant;
                inside().for_each(|i| result[i] = (x[i] / step.max(1e-30)).round() * step);
            }
            (result, largest / largest_quant)
        }
    }
}

const ROWS: [usize; 7] = [1, 2, 3, 7, 16, 64, 133];
/// How the rows of a batch spread over sub-networks.
const DISTRIBUTIONS: [&str; 3] = ["identical", "distinct", "skewed"];

/// Segments over `rows` rows; the sub-networks' sizes run through `actives`, the super-adapters alternate.
fn segments(rows: usize, distribution: &str, actives: &[ActiveLinear], index: usize) -> Vec<Segment> {
    let lengths = match distribution {
        "identical" => vec![rows],
        "distinct" => vec![1; rows],
        _ => {
            let last = rows.div_ceil(8);
            if rows > last { vec![rows - last, last] } else { vec![rows] }
        }
    };
    let mut start = 0;
    let segment = |(i, length): (usize, usize)| {
        let mut linears = vec![ActiveLinear { out: 0, inp: 0, rank: 0 }; index + 1];
        linears[index] = actives[i % actives.len()];
        let shape = Arc::new(ActiveShape { linears });
        start += length;
        let selection = Selection { adapter: i % 2, subnetwork: i as u32, shape };
        Segment { rows: start - length..start, selection }
    };
    lengths.into_iter().enumerate().map(segment).collect()
}

#[test]
fn the_low_rank_product_is_what_its_formula_says() {
    let sizes: [(usize, usize, usize); 7] =
        [(1, 1, 1), (5, 17, 3), (33, 100, 8), (96, 64, 24), (70, 131, 32), (40, 1100, 3), (333, 70, 5)];
    for kernel in Kernel::available() {
        for (out, inp, rank) in sizes {
            type Make = fn(u64, usize, usize) -> HostMatrix;
            let weights: [(_, _, Make); 6] = [
                (Dtype::F32, 1, host),
                (Dtype::Bf16, 2, host),
                (Dtype::Int8, 2, host),
                (Dtype::Q4, 2, host),
                (Dtype::Auto, 2, blocks),
                (Dtype::Auto, 2, zero_pointed),
            ];
            for (dtype, threads, weight) in weights {
                // One thread takes all of many panels together.
                let cpu = Cpu::with_kernel(dtype, if out > 100 { 1 } else { threads }, kernel);
                // Only Auto meets the file's own blocks, which need whole ones.
                let inp = if dtype == Dtype::Auto { inp.next_multiple_of(BLOCK) } else { inp };
                let net = net(&cpu, 2, weight(1, out, inp), rank, out % 2 == 1);
                let part = |n: usize, d: usize| ActiveLinear {
                    out: (out * n / d).max(1),
                    inp: (inp * n / d).max(1),
                    rank: (rank * n / d).max(1),
                };
                // The last two are of layers that go without this Linear.
                let nothing = [(out, 0), (0, inp)].map(|(out, inp)| ActiveLinear { out, inp, rank: 0 });
                let actives = [part(1, 1), part(3, 4), part(2, 3), part(1, 2), nothing[0], nothing[1]];
                // Where nobody reaches the last outputs, the memory has those of before.
                for (rows, actives) in ROWS.into_iter().flat_map(|n| [(n, &actives[..]), (n, &actives[2..4])])
                {
                    for distribution in DISTRIBUTIONS {
                        let x = Rows::new(inp, random(7, rows * inp));
                        let segments = segments(rows, distribution, actives, 2);
                        let y = cpu.linear(&x, &net.linear, &segments).unwrap();
                        let what = format!("{kernel:?} {dtype:?} {out}x{inp} {rows} {distribution}");
                        check(&net, &x, &y, &segments, &what);
                    }
                }
            }
        }
    }
}

fn check(net: &Net, x: &Rows, y: &Rows, segments: &[Segment], what: &str) {
    for segment in segments {
        let active = segment.selection.shape.linears[net.linear.index];
        for row in segment.rows.clone() {
            let slow = net.slow(x.row(row), active, segment.selection.adapter);
            for (o, (&got, (expected, step))) in y.row(row).iter().zip(slow).enumerate() {
                let off = (f64::from(got) - expected).abs();
                assert!(
                    off < 2e-4 * (1.0 + expected.abs()) + step,
                    "{what}: row {row} output {o}: {got} not {expected}"
                );
            }
        }
    }
}

#[test]
fn the_largest_products_are_not_cut_off() {
    for kernel in Kernel::available() {
        for dtype in [Dtype::Int8, Dtype::Q4, Dtype::Auto] {
            let cpu = Cpu::with_kernel(dtype, 1, kernel);
            // All weights at the end of what a byte, or half of one, holds: without a minimum, of one sign, or with one.
            let mut weight = if dtype == Dtype::Auto { blocks(1, 32, 64) } else { host(1, 32, 64) };
            match &mut weight.data {
                HostData::Blocks(blocks) => blocks.quants.fill(15),
                HostData::F32(values) => values.fill(1.0),
                HostData::Bf16(_) => unreachable!(),
            }
            let net = net(&cpu, 0, weight, 32, false);
            let active = ActiveLinear { out: 32, inp: 64, rank: 32 };
            for x in [1.0, -1.0] {
                for rows in [1, 2, 3, 4] {
                    let x = Rows::new(64, vec![x; rows * 64]);
                    let segments = segments(rows, "identical", &[active], 0);
                    let y = cpu.linear(&x, &net.linear, &segments).unwrap();
                    check(&net, &x, &y, &segments, &format!("{kernel:?} {dtype:?} {rows} rows"));
                }
            }
        }
    }
}

#[test]
fn a_row_is_the_same_bit_for_bit_whatever_runs_beside_it() {
    let (hidden, width, rank) = (40, 77, 5);
    for kernel in Kernel::available() {
        for dtype in [Dtype::F32, Dtype::Bf16, Dtype::Int8] {
            let cpu = Cpu::with_kernel(dtype, 2, kernel);
            let [gate, up] = [3, 4].map(|seed| net(&cpu, 0, host(seed, width, hidden), rank, false).linear);
            let down = net(&cpu, 1, host(5, hidden, width), rank, false).linear;
            let mlp = GatedMlp { gate, up, down };
            let x = Rows::new(hidden, random(8, 133 * hidden));
            let widths = [77, 50, 64, 33, 1, 0];
            let selection = |i: usize| {
                let out = widths[i % widths.len()];
                let ranks = if out == 0 { [0; 2] } else { [1 + i % rank, rank] };
                let first = ActiveLinear { out, inp: hidden, rank: ranks[0] };
                let linears = vec![first, ActiveLinear { out: hidden, inp: out, rank: ranks[1] }];
                Selection { adapter: i % 2, subnetwork: i as u32, shape: Arc::new(ActiveShape { linears }) }
            };
            let all =
                (0..133).map(|i| Segment { rows: i..i + 1, selection: selection(i) }).collect::<Vec<_>>();
            let mixed = cpu.gated_mlp(&x, &mlp, &all).unwrap();
            for row in [0, 1, 2, 31, 32, 100, 132] {
                let alone = cpu.select(&x, &[row as u32]).unwrap();
                let segment = Segment { rows: 0..1, selection: selection(row) };
                let alone = cpu.gated_mlp(&alone, &mlp, &[segment]).unwrap();
                assert_eq!(alone.row(0), mixed.row(row), "{kernel:?} {dtype:?} row {row}");
                // Nine rows of the same sub-network, so that the row falls into a tile of another height.
                let many = cpu.select(&x, &[row as u32; 9]).unwrap();
                let segment = Segment { rows: 0..9, selection: selection(row) };
                let many = cpu.gated_mlp(&many, &mlp, &[segment]).unwrap();
                assert_eq!(many.row(8), mixed.row(row), "{kernel:?} {dtype:?} row {row} of nine");
            }
        }
    }
}

const ATTENTION: AttentionShape = AttentionShape::new(6, 2, 10);

/// Attention over one sequence fed in chunks, through a scattered block table; `(rows, N*D)`.
fn fed(cpu: &Cpu, q: &Rows, k: &Rows, v: &Rows, chunk: usize) -> Vec<f32> {
    let layout = CacheLayout { layers: 2, kv_heads: 2, head_size: 10, blocks: 40, block_size: 4 };
    let mut cache = cpu.cache(layout).unwrap();
    let blocks = (0..20).map(|b| 39 - 2 * b).collect::<Vec<_>>();
    let mut all = Vec::new();
    for start in (0..q.len()).step_by(chunk) {
        let rows = (start..(start + chunk).min(q.len())).map(|r| r as u32).collect::<Vec<_>>();
        let part = |x: &Rows| cpu.select(x, &rows).unwrap();
        let span = SequenceSpan { rows: 0..rows.len(), start, blocks: blocks.clone() };
        let cache = Some((&mut cache, 1));
        let y = cpu.attention(&part(q), &part(k), &part(v), &ATTENTION, &[span], cache).unwrap();
        all.extend_from_slice(y.values());
    }
    all
}

#[test]
fn attention_does_not_depend_on_how_the_prompt_was_cut() {
    let cpu = Cpu::new(Dtype::Auto, 2);
    let rows = 37;
    let (q, k, v) = (
        Rows::new(60, random(1, rows * 60)),
        Rows::new(20, random(2, rows * 20)),
        Rows::new(20, random(3, rows * 20)),
    );
    let whole = fed(&cpu, &q, &k, &v, rows);
    for chunk in [1, 3, 4, 16] {
        assert_eq!(fed(&cpu, &q, &k, &v, chunk), whole, "chunks of {chunk}");
    }
    let span = SequenceSpan { rows: 0..rows, start: 0, blocks: Vec::new() };
    let uncached = cpu.attention(&q, &k, &v, &ATTENTION, &[span], None).unwrap();
    assert_eq!(uncached.values(), whole);
    for (row, got) in whole.chunks_exact(60).enumerate() {
        for n in 0..6 {
            let expected = slow_attention(&q, &k, &v, row, n);
            for (got, expected) in got[n * 10..].iter().zip(expected) {
                assert!(
                    (f64::from(*got) - expected).abs() < 1e-5,
                    "row {row} head {n}: {got} not {expected}"
                );
            }
        }
    }
}

fn slow_attention(q: &Rows, k: &Rows, v: &Rows, row: usize, n: usize) -> Vec<f64> {
    let head = n / 3 * 10;
    let f = |x: &Rows, r: usize, at: usize| f64::from(x.row(r)[at]);
    let score =
        |p: usize| (0..10).map(|d| f(q, row, n * 10 + d) * f(k, p, head + d)).sum::<f64>() / 10f64.sqrt();
    let weights = (0..=row).map(|p| score(p).exp()).collect::<Vec<_>>();
    let sum: f64 = weights.iter().sum();
    (0..10).map(|d| (0..=row).map(|p| weights[p] / sum * f(v, p, head + d)).sum()).collect()
}

#[test]
fn what_does_not_fit_is_refused_and_nothing_panics() {
    let cpu = Cpu::new(Dtype::Auto, 1);
    let net = net(&cpu, 0, host(1, 8, 6), 2, false);
    let x = Rows::new(6, random(2, 6));
    for (out, inp, rank, rows) in [(9, 6, 2, 1), (8, 7, 2, 1), (8, 6, 3, 1), (8, 6, 2, 2)] {
        let shape = Arc::new(ActiveShape { linears: vec![ActiveLinear { out, inp, rank }] });
        let segment = Segment { rows: 0..rows, selection: Selection { adapter: 0, subnetwork: 0, shape } };
        assert!(cpu.linear(&x, &net.linear, &[segment]).is_err(), "{out} {inp} {rank} {rows}");
    }
    assert!(cpu.embed(&net.linear.weight, &[8]).is_err());
    assert!(cpu.select(&x, &[1]).is_err());
    let huge = CacheLayout {
        layers: 1 << 20,
        kv_heads: 1 << 10,
        head_size: 1 << 10,
        blocks: 1 << 20,
        block_size: 16,
    };
    assert!(cpu.cache(huge).is_err());
    let layout = CacheLayout { layers: 1, kv_heads: 2, head_size: 10, blocks: 2, block_size: 4 };
    let mut cache = cpu.cache(layout).unwrap();
    let (q, kv) = (Rows::zeros(1, 60), Rows::zeros(1, 20));
    for (start, blocks, layer) in [(0, vec![2], 0), (4, vec![0], 0), (0, vec![0], 1)] {
        let span = SequenceSpan { rows: 0..1, start, blocks };
        assert!(cpu.attention(&q, &kv, &kv, &ATTENTION, &[span], Some((&mut cache, layer))).is_err());
    }
}

#[test]
fn exp_and_silu_are_exact_enough() {
    for i in -8700..8800 {
        let x = i as f32 / 100.0;
        let (got, expected) = (f64::from(super::rows::exp(x)), f64::from(x).exp());
        assert!((got / expected - 1.0).abs() < 3e-7, "exp({x}) = {got}, not {expected}");
        let expected = f64::from(x) / (1.0 + (-f64::from(x)).exp());
        let got = f64::from(super::rows::silu(x));
        assert!((got - expected).abs() <= 4e-7 * expected.abs() + 1e-35, "silu({x}) = {got}, not {expected}");
    }
}

#[test]
fn packing_keeps_what_the_number_format_can() {
    let cpu = Cpu::new(Dtype::Auto, 1);
    let order = (0..96).map(|i| (i * 35 + 7) % 96).collect::<Vec<_>>();
    for reordered in [false, true] {
        let host = |matrix: HostMatrix| if reordered { matrix.permute_columns(&order) } else { matrix };
        // Quants of a byte and of half a byte, with minimums and without; scales that f16 holds.
        for (low, high) in [(0, 15), (-8, 7), (-128, 127)] {
            for minimums in [true, false] {
                let mut matrix = blocks(1, 37, 96);
                let HostData::Blocks(blocks) = &mut matrix.data else { unreachable!() };
                let quants = random(4, 37 * 96).into_iter().map(|v| v.mul_add(130.0, 0.0) as i32);
                blocks.quants = quants.map(|q| q.clamp(low, high) as i8).collect();
                blocks.scales.iter_mut().for_each(|s| *s = f16::from_f32(*s).to_f32());
                let rounded =
                    blocks.minimums.take().map(|m| m.iter().map(|&m| f16::from_f32(m).to_f32()).collect());
                blocks.minimums = rounded.filter(|_| minimums);
                let matrix = host(matrix);
                let values = matrix.to_f32();
                let packed = cpu.matrix(matrix).unwrap();
                let got = unpacked(&packed).concat();
                let equal =
                    got.iter().zip(&values).all(|(&got, &value)| (got - f64::from(value)).abs() < 1e-5);
                assert!(equal, "{low}..={high} minimums {minimums} reordered {reordered}");
                assert!(packed.bytes() <= 64 * 96 * 5 / 4, "{} bytes", packed.bytes());
            }
        }
        // Zero points, whose products with scales f16 does not hold.
        let mut matrix = zero_pointed(1, 37, 96);
        let HostData::Blocks(blocks) = &mut matrix.data else { unreachable!() };
        blocks.scales.iter_mut().for_each(|s| *s = f16::from_f32(*s).to_f32());
        let (matrix, of_halves) = (host(matrix), 64 * 96 * 3 / 4);
        let values = matrix.to_f32().into_iter().map(f64::from).collect::<Vec<_>>();
        for dtype in [Dtype::Auto, Dtype::Q4, Dtype::Int8] {
            let packed = Cpu::new(dtype, 1).matrix(matrix.clone()).unwrap();
            assert_eq!(unpacked(&packed).concat(), values, "{dtype:?} reordered {reordered}");
            assert!((packed.bytes() <= of_halves) == (dtype != Dtype::Int8), "{} bytes", packed.bytes());
        }
        for (dtype, most) in [
            (Dtype::F32, 0.0),
            (Dtype::Bf16, 1.0 / 256.0),
            (Dtype::Int8, 1.0 / 250.0),
            (Dtype::Q4, 1.0 / 14.0),
        ] {
            let matrix = host(self::host(3, 37, 96));
            let values = matrix.to_f32();
            let packed = Cpu::new(dtype, 1).matrix(matrix).unwrap();
            let off = unpacked(&packed)
                .concat()
                .iter()
                .zip(&values)
                .map(|(a, &b)| (a - f64::from(b)).abs())
                .fold(0.0, f64::max);
            assert!(off <= most && (off > 0.0 || most == 0.0), "{dtype:?}: off by {off}");
        }
    }
}

#[test]
fn a_reordered_quantised_mlp_is_the_same_as_one_in_order() {
    let (hidden, width, rank) = (64, 96, 5);
    let order = (0..width).map(|i| (i * 35 + 7) % width).collect::<Vec<_>>();
    for kernel in Kernel::available() {
        let cpu = Cpu::with_kernel(Dtype::Auto, 2, kernel);
        let mlp = |reordered: bool| {
            let rows = |m: HostMatrix| if reordered { m.permute_rows(&order) } else { m };
            let columns = |m: HostMatrix| if reordered { m.permute_columns(&order) } else { m };
            let linear = |index, weight: HostMatrix, a: HostMatrix, b: HostMatrix| {
                let weight = cpu.matrix(weight).unwrap();
                let [a, b] = cpu.adapter(a, b, &weight).unwrap();
                let adapters = vec![Some(Adapter { a, b, scale: 0.5 })];
                Linear { index, weight: Arc::new(weight), bias: None, adapters }
            };
            let up = |seed| {
                linear(
                    0,
                    rows(blocks(seed, width, hidden)),
                    host(seed + 7, rank, hidden),
                    rows(host(seed + 8, width, rank)),
                )
            };
            let down = linear(
                1,
                columns(blocks(30, hidden, width)),
                columns(host(31, rank, width)),
                host(32, hidden, rank),
            );
            GatedMlp { gate: up(10), up: up(20), down }
        };
        let x = Rows::new(hidden, random(8, 5 * hidden));
        let segment = |kept: usize| {
            let linears = vec![
                ActiveLinear { out: kept, inp: hidden, rank },
                ActiveLinear { out: hidden, inp: kept, rank },
            ];
            let shape = Arc::new(ActiveShape { linears });
            [Segment { rows: 0..5, selection: Selection { adapter: 0, subnetwork: kept as u32, shape } }]
        };
        let plain = cpu.gated_mlp(&x, &mlp(false), &segment(width)).unwrap();
        let ordered = cpu.gated_mlp(&x, &mlp(true), &segment(width)).unwrap();
        let size = plain.values().iter().fold(0f32, |m, x| m.max(x.abs()));
        for (a, b) in plain.values().iter().zip(ordered.values()) {
            assert!((a - b).abs() < 1e-4 * size, "{kernel:?}: {a} {b} of {size}");
        }
        // A narrow one is another function, and the weights that it keeps are the first of the order.
        let narrow = cpu.gated_mlp(&x, &mlp(true), &segment(40)).unwrap();
        assert_ne!(narrow, ordered);
    }
}
