//! The kernels of a training, kernels/train.cu, against their formulas in f64. candle starts them, which needs a real GPU; here
//! they run wherever the others do.

use cudarc::driver::{CudaContext, CudaModule, CudaSlice, CudaStream, LaunchConfig, PushKernelArg};
use cudarc::nvrtc::Ptx;
use half::bf16;
use std::sync::Arc;

const KERNELS: &str = include_str!(concat!(env!("OUT_DIR"), "/train.ptx"));
/// Rows, and numbers of each.
const SIZES: [(usize, usize); 6] = [(1, 1), (2, 3), (3, 7), (7, 64), (16, 133), (5, 576)];

struct Gpu {
    stream: Arc<CudaStream>,
    module: Arc<CudaModule>,
}

#[derive(Clone, Copy)]
enum Scalar {
    Count(u64),
    Whole(i32),
    Bits(u32),
    Number(f32),
}
use Scalar::{Bits, Count, Number, Whole};

impl Gpu {
    fn new() -> Self {
        let context = CudaContext::new(0).unwrap();
        let module = context.load_module(Ptx::from_src(KERNELS)).unwrap();
        Self { stream: context.default_stream(), module }
    }

    fn upload(&self, values: &[f32]) -> CudaSlice<f32> {
        self.stream.clone_htod(values).unwrap()
    }

    /// Runs a kernel that takes these inputs and scalars and has `N` outputs of `size` numbers.
    fn run<const N: usize>(
        &self,
        name: &str,
        (blocks, threads): (usize, u32),
        inputs: &[&CudaSlice<f32>],
        size: usize,
        scalars: &[Scalar],
    ) -> [Vec<f64>; N] {
        // What a kernel does not write is no number.
        let outputs: [_; N] = std::array::from_fn(|_| self.upload(&vec![f32::NAN; size]));
        let function = self.module.load_function(name).unwrap();
        let mut launch = self.stream.launch_builder(&function);
        inputs.iter().copied().chain(&outputs).for_each(|slice| {
            launch.arg(slice);
        });
        for scalar in scalars {
            match scalar {
                Count(value) => launch.arg(value),
                Whole(value) => launch.arg(value),
                Bits(value) => launch.arg(value),
                Number(value) => launch.arg(value),
            };
        }
        let config =
            LaunchConfig { grid_dim: (blocks as u32, 1, 1), block_dim: (threads, 1, 1), shared_mem_bytes: 0 };
        #[expect(unsafe_code, reason = "a kernel")]
        // SAFETY: the arguments are those that kernels/train.cu declares.
        unsafe { launch.launch(config) }.unwrap();
        outputs.map(|output| {
            let values = self.stream.clone_dtoh(&output).unwrap();
            values.into_iter().map(f64::from).collect()
        })
    }
}

fn random(seed: u64, count: usize, most: f32) -> Vec<f32> {
    super::random(seed, count).into_iter().map(|v| v * most).collect()
}

fn same(what: &str, got: &[f64], expected: &[f64]) {
    assert_eq!(got.len(), expected.len(), "{what}");
    let largest = expected.iter().fold(0.0f64, |m, v| m.max(v.abs()));
    for (at, (got, expected)) in got.iter().zip(expected).enumerate() {
        assert!((got - expected).abs() <= 2e-6 + 1e-5 * largest, "{what}, {at}: {got} not {expected}");
    }
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().copied().map(f64::from).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

#[test]
fn norms_and_gates_are_their_formulas_both_ways() {
    let (gpu, eps) = (Gpu::new(), 1e-5);
    for (rows, width) in SIZES {
        let (what, count) = (format!("{rows} x {width}"), rows * width);
        let [x, dy, up] = [(1, 3.0), (2, 1.0), (3, 1.0)].map(|(seed, most)| random(seed, count, most));
        let weight = random(4, width, 1.0);
        let [on_x, on_dy, on_up, on_weight] = [&x, &dy, &up, &weight].map(|values| gpu.upload(values));
        let [x, dy, up, weight] = [&x, &dy, &up, &weight].map(|values| wide(values));
        let scalars = [Whole(width as i32), Number(eps)];
        let [y] = gpu.run("train_rms_norm", (rows, 256), &[&on_x, &on_weight], count, &scalars);
        let [dx] = gpu.run("train_rms_norm_back", (rows, 256), &[&on_x, &on_weight, &on_dy], count, &scalars);
        let (mut of_y, mut of_dx) = (Vec::new(), Vec::new());
        for (x, dy) in x.chunks(width).zip(dy.chunks(width)) {
            let n = 1.0 / (dot(x, x) / width as f64 + f64::from(eps)).sqrt();
            let g = dy.iter().zip(&weight).map(|(d, w)| d * w).collect::<Vec<_>>();
            let along = n * n * n * dot(&g, x) / width as f64;
            of_y.extend(x.iter().zip(&weight).map(|(x, w)| x * n * w));
            of_dx.extend(g.iter().zip(x).map(|(g, x)| n * g - along * x));
        }
        same(&format!("norm of {what}"), &y, &of_y);
        same(&format!("norm's way back of {what}"), &dx, &of_dx);

        let scalars = [Count(count as u64)];
        let [y] = gpu.run("train_gated", (2, 256), &[&on_x, &on_up], count, &scalars);
        let [dgate, dup] = gpu.run("train_gated_back", (2, 256), &[&on_x, &on_up, &on_dy], count, &scalars);
        let cells = x.iter().zip(&up).zip(&dy).map(|((&g, &u), &d)| {
            let s = sigmoid(g);
            (g * s * u, d * u * (s + g * s * (1.0 - s)), d * g * s)
        });
        let cells = cells.collect::<Vec<_>>();
        same(&format!("gated {what}"), &y, &cells.iter().map(|c| c.0).collect::<Vec<_>>());
        same(&format!("gate of {what}"), &dgate, &cells.iter().map(|c| c.1).collect::<Vec<_>>());
        same(&format!("up of {what}"), &dup, &cells.iter().map(|c| c.2).collect::<Vec<_>>());
    }
}

/// Murmur3's last mixing, as in src/backend/reference/dropout.rs, whose masks are tested there.
fn mixed(mut h: u32) -> u32 {
    h = (h ^ (h >> 16)).wrapping_mul(0x85eb_ca6b);
    h = (h ^ (h >> 13)).wrapping_mul(0xc2b2_ae35);
    h ^ (h >> 16)
}

#[test]
fn adapters_are_added_and_dropped_by_the_same_masks_as_on_a_processor() {
    let gpu = Gpu::new();
    // The numbers of elements pass 32 bits on the way.
    let (key, first, threshold, scale) = (0x1234_5678_9abc_def0u64, (1u64 << 32) - 5, 1u32 << 30, 4.0 / 3.0);
    for (rows, width) in SIZES {
        let (what, count) = (format!("{rows} x {width}"), rows * width);
        let (x, base) = (random(1, count, 3.0), random(2, count, 1.0));
        let on_x = gpu.upload(&x);
        // Two bf16 numbers stand where one f32 does, the first of them in its lower half.
        let halves = base.iter().map(|&v| u32::from(bf16::from_f32(v).to_bits())).collect::<Vec<_>>();
        let pairs = halves.chunks(2).map(|pair| f32::from_bits(pair[0] | pair.get(1).unwrap_or(&0) << 16));
        let on_base = gpu.upload(&pairs.collect::<Vec<_>>());
        let (x, base) = (wide(&x), wide(&base));
        let dropped = x.iter().zip(first..).map(|(x, at)| {
            let low = mixed(at as u32 ^ key as u32);
            let bits = mixed(low ^ (at >> 32) as u32 ^ (key >> 32) as u32);
            if bits >= threshold { x * f64::from(scale) } else { 0.0 }
        });
        let dropped = dropped.collect::<Vec<_>>();
        let mask = [Count(count as u64), Count(key), Count(first), Bits(threshold), Number(scale)];
        let [got] = gpu.run("train_dropped", (3, 256), &[&on_x], count, &mask);
        same(&format!("dropped {what}"), &got, &dropped);
        let sums = |part: &[f64], factor: f64| {
            base.iter().zip(part).map(|(b, p)| b + factor * p).collect::<Vec<_>>()
        };
        let [got] = gpu.run("train_added_dropped", (2, 256), &[&on_base, &on_x], count, &mask);
        same(&format!("added and dropped {what}"), &got, &sums(&dropped, 1.0));
        let scalars = [Count(count as u64), Number(2.5)];
        let [got] = gpu.run("train_added", (2, 256), &[&on_base, &on_x], count, &scalars);
        same(&format!("added {what}"), &got, &sums(&x, 2.5));
    }
}

#[test]
fn heads_are_turned_forward_and_back() {
    let gpu = Gpu::new();
    let (rows, heads, half) = (5, 3, 4);
    let x = random(1, rows * heads * half * 2, 1.0);
    let (sines, cosines) = (random(2, rows * half, 1.0), random(3, rows * half, 1.0));
    let inputs = [&x, &sines, &cosines].map(|values| gpu.upload(values));
    for direction in [1.0, -1.0] {
        let scalars =
            [Count((x.len() / 2) as u64), Whole(heads as i32), Whole(half as i32), Number(direction)];
        let [got] =
            gpu.run("train_turned", (1, 256), &[&inputs[0], &inputs[1], &inputs[2]], x.len(), &scalars);
        let mut expected = wide(&x);
        for (head, pair) in expected.chunks_mut(2 * half).enumerate() {
            let (first, second) = pair.split_at_mut(half);
            for (d, (a, b)) in first.iter_mut().zip(second).enumerate() {
                let at = head / heads * half + d;
                let (sine, cosine) = (f64::from(sines[at] * direction), f64::from(cosines[at]));
                (*a, *b) = (*a * cosine - *b * sine, *b * cosine + *a * sine);
            }
        }
        same("turned", &got, &expected);
    }
}

#[test]
fn softmax_with_biases_is_its_formula_both_ways() {
    let (gpu, factor) = (Gpu::new(), 0.3f32);
    for (heads, biases, rows, positions) in [(1, 1, 1, 1), (3, 1, 7, 7), (6, 3, 5, 37), (4, 4, 16, 70)] {
        let count = heads * rows * positions;
        let (x, dy) = (random(1, count, 3.0), random(2, count, 1.0));
        let seen = |at: usize| {
            let (row, position) = (at / positions % rows, at % positions);
            if position <= row + 2 { at as f32 % 5.0 / 10.0 } else { f32::NEG_INFINITY }
        };
        let bias = (0..biases * rows * positions).map(seen).collect::<Vec<_>>();
        let [on_x, on_bias, on_dy] = [&x, &bias, &dy].map(|values| gpu.upload(values));
        let [all, blocks] = [heads * rows, (heads * rows * 32).div_ceil(256)];
        let scalars = [
            Count(all as u64),
            Whole(rows as i32),
            Whole(biases as i32),
            Whole(positions as i32),
            Number(factor),
        ];
        let [y] = gpu.run("train_softmax", (blocks, 256), &[&on_x, &on_bias], count, &scalars);
        let [dx] = gpu.run("train_softmax_back", (blocks, 256), &[&on_x, &on_bias, &on_dy], count, &scalars);
        let (mut of_y, mut of_dx) = (Vec::new(), Vec::new());
        for (row, (x, dy)) in wide(&x).chunks(positions).zip(wide(&dy).chunks(positions)).enumerate() {
            let bias = &bias[(row / rows % biases * rows + row % rows) * positions..][..positions];
            let weights = x.iter().zip(bias).map(|(x, &b)| (f64::from(factor) * x + f64::from(b)).exp());
            let weights = weights.collect::<Vec<_>>();
            let total = weights.iter().sum::<f64>();
            let shares = weights.iter().map(|w| w / total).collect::<Vec<_>>();
            let along = dot(&shares, dy);
            of_dx.extend(shares.iter().zip(dy).map(|(y, d)| f64::from(factor) * y * (d - along)));
            of_y.extend(shares);
        }
        let what = format!("{heads} heads, {biases} biases, {rows} x {positions}");
        same(&format!("softmax of {what}"), &y, &of_y);
        same(&format!("softmax's way back of {what}"), &dx, &of_dx);
    }
}

#[test]
fn losses_of_logits_are_their_formulas_both_ways() {
    let (gpu, weight, all) = (Gpu::new(), 1.7f32, 11.0f32);
    let on_weight = gpu.upload(&[weight]);
    for (rows, width) in SIZES {
        let count = rows * width;
        let (logits, teacher) = (random(1, count, 3.0), random(2, count, 5.0));
        let targets = (0..rows).map(|row| (row * 31 % width) as u32).collect::<Vec<_>>();
        // Bits are bits.
        let on_targets = gpu.upload(&targets.iter().map(|&t| f32::from_bits(t)).collect::<Vec<_>>());
        let [on_logits, on_teacher] = [&logits, &teacher].map(|values| gpu.upload(values));
        let shares = |values: &[f32]| {
            let of_row = |row: &[f64]| {
                let total = row.iter().map(|v| v.exp()).sum::<f64>();
                row.iter().map(|v| v.exp() / total).collect::<Vec<_>>()
            };
            wide(values).chunks(width).map(of_row).collect::<Vec<_>>()
        };
        let (of_logits, of_teacher) = (shares(&logits), shares(&teacher));
        let (by_row, by_cell) = ([Whole(width as i32)], [Whole(width as i32), Number(all)]);
        let factor = f64::from(weight / all);

        let [losses] = gpu.run("train_cross_entropy", (rows, 512), &[&on_logits, &on_targets], rows, &by_row);
        let inputs = [&on_logits, &on_targets, &on_weight];
        let [back] = gpu.run("train_cross_entropy_back", (rows, 512), &inputs, count, &by_cell);
        let rows_of = of_logits.iter().zip(&targets);
        let expected = rows_of.clone().map(|(row, &t)| -row[t as usize].ln()).collect::<Vec<_>>();
        same("cross entropy", &losses, &expected);
        let cells = rows_of.flat_map(|(row, &t)| {
            row.iter().zip(0..).map(move |(p, at)| factor * (p - f64::from(u8::from(at == t))))
        });
        same("cross entropy's way back", &back, &cells.collect::<Vec<_>>());

        let [losses] = gpu.run("train_divergence", (rows, 512), &[&on_teacher, &on_logits], rows, &by_row);
        let inputs = [&on_teacher, &on_logits, &on_weight];
        let [back] = gpu.run("train_divergence_back", (rows, 512), &inputs, count, &by_cell);
        let pairs = of_teacher.iter().zip(&of_logits);
        let divergence =
            |(t, l): (&Vec<f64>, &Vec<f64>)| t.iter().zip(l).map(|(t, l)| t * (t / l).ln()).sum();
        same("divergence", &losses, &pairs.clone().map(divergence).collect::<Vec<f64>>());
        let cells = pairs.flat_map(|(t, l)| t.iter().zip(l).map(|(t, l)| factor * (l - t)));
        same("divergence's way back", &back, &cells.collect::<Vec<_>>());
    }
}
