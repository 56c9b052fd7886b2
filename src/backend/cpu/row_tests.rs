//! What is done to each row by itself, against formulas in f64.

use super::kernel::Kernel;
use super::{Cpu, Dtype, Rows};
use crate::backend::{Activation, Backend, BackendError};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

const SIZES: [(usize, usize); 7] = [(1, 1), (2, 7), (3, 16), (7, 33), (16, 48), (64, 130), (133, 5)];

fn random(seed: u64, count: usize, range: f32) -> Vec<f32> {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    (0..count).map(|_| random.random_range(-range..range)).collect()
}

fn cpus() -> impl Iterator<Item = Cpu> {
    Kernel::available().into_iter().map(|kernel| Cpu::with_kernel(Dtype::F32, 2, kernel))
}

fn close(got: &[f32], expected: impl Iterator<Item = f64>, within: f64, what: &str) {
    for (i, (&got, expected)) in got.iter().zip(expected).enumerate() {
        assert!((f64::from(got) - expected).abs() <= within, "{what}, number {i}: {got} not {expected}");
    }
}

#[test]
fn a_layer_norm_takes_mean_and_variance_of_its_row() {
    for cpu in cpus() {
        for (rows, width) in SIZES {
            // Far from zero, where a variance by sums of squares would cancel.
            let x = random(1, rows * width, 1.0).iter().map(|x| x + 30.0).collect::<Vec<_>>();
            let (weight, bias) = (random(2, width, 2.0), random(3, width, 2.0));
            let y = cpu.layer_norm(&Rows::new(width, x.clone()), &weight, &bias, 1e-5).unwrap();
            for (x, y) in x.chunks(width).zip(y.values().chunks(width)) {
                let x = x.iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
                let mean = x.iter().sum::<f64>() / width as f64;
                let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / width as f64;
                let parts = x.iter().zip(&weight).zip(&bias);
                let expected = parts
                    .map(|((x, &w), &b)| (x - mean) / (variance + 1e-5).sqrt() * f64::from(w) + f64::from(b));
                close(y, expected, 2e-4, &format!("{} ({rows}, {width})", cpu.instructions()));
            }
        }
    }
}

/// The error function by Simpson's rule.
fn erf(x: f64) -> f64 {
    let (steps, a) = (1000, x.abs().min(6.0));
    let step = a / f64::from(steps);
    let density = |i: i32| (-(f64::from(i) * step).powi(2)).exp();
    let inner = (1..steps).map(|i| density(i) * if i % 2 == 1 { 4.0 } else { 2.0 }).sum::<f64>();
    let sum = (density(0) + inner + density(steps)) * step / 3.0;
    (2.0 / std::f64::consts::PI.sqrt() * sum).copysign(x)
}

#[test]
fn activations_are_their_formulas_and_leave_zero_alone() {
    let mut x = (-1200..=1200).map(|i| i as f32 / 100.0).collect::<Vec<_>>();
    x.extend([1e-6, -1e-6, 40.0, -40.0, 1e30, -1e30]);
    let root = (2.0 / std::f64::consts::PI).sqrt();
    for cpu in cpus() {
        for (activation, formula) in [
            (Activation::Gelu, (|x| x * 0.5 * (1.0 + erf(x / 2f64.sqrt()))) as fn(f64) -> f64),
            (Activation::Tanh, f64::tanh),
            (Activation::Relu, |x| x.max(0.0)),
        ] {
            let y = cpu.activate(Rows::new(x.len(), x.clone()), activation).unwrap();
            let relative = x.iter().zip(y.values()).map(|(x, y)| y / x.abs().max(1.0)).collect::<Vec<_>>();
            let expected = x.iter().map(|&x| formula(f64::from(x)) / f64::from(x.abs().max(1.0)));
            close(&relative, expected, 4e-7, &format!("{} {activation:?}", cpu.instructions()));
            let zeros = cpu.activate(Rows::zeros(3, 5), activation).unwrap();
            assert!(zeros.values().iter().all(|&x| x == 0.0));
        }
        let y = cpu.activate(Rows::new(x.len(), x.clone()), Activation::GeluTanh).unwrap();
        let relative = x.iter().zip(y.values()).map(|(x, y)| y / x.abs().max(1.0)).collect::<Vec<_>>();
        let gelu = |x: f64| x * 0.5 * (1.0 + (root * (x + 0.044715 * x.powi(3))).tanh());
        let expected = x.iter().map(|&x| gelu(f64::from(x)) / f64::from(x.abs().max(1.0)));
        close(&relative, expected, 4e-7, &format!("{} tanh", cpu.instructions()));
    }
}

#[test]
fn each_head_is_normed_by_itself() {
    for cpu in cpus() {
        for (rows, size, heads) in [(1, 1, 3), (2, 10, 1), (7, 16, 5), (33, 48, 2)] {
            let (x, weight) = (random(4, rows * heads * size, 3.0), random(5, size, 2.0));
            let y = cpu.head_norm(&Rows::new(heads * size, x.clone()), &weight, 1e-6).unwrap();
            for (x, y) in x.chunks(size).zip(y.values().chunks(size)) {
                let square = x.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / size as f64;
                let expected = x.iter().zip(&weight);
                let expected = expected.map(|(&x, &w)| f64::from(x) / (square + 1e-6).sqrt() * f64::from(w));
                close(y, expected, 1e-5, &format!("{} {rows} {size} {heads}", cpu.instructions()));
            }
        }
    }
}

#[test]
fn parts_of_a_split_are_its_columns_and_what_does_not_fit_is_refused() {
    let cpu = Cpu::new(Dtype::F32, 2);
    let x = Rows::new(6, (0..12).map(|i| i as f32).collect());
    let [a, b, c] = cpu.split(&x).unwrap();
    assert_eq!(a.values(), [0.0, 1.0, 6.0, 7.0]);
    assert_eq!(b.values(), [2.0, 3.0, 8.0, 9.0]);
    assert_eq!(c.values(), [4.0, 5.0, 10.0, 11.0]);
    let refused =
        |result: Result<(), BackendError>| assert!(matches!(result, Err(BackendError::Shape { .. })));
    refused(cpu.split::<4>(&x).map(|_| ()));
    refused(cpu.head_norm(&x, &vec![1.0; 4], 1e-5).map(|_| ()));
    refused(cpu.layer_norm(&x, &vec![1.0; 6], &vec![1.0; 5], 1e-5).map(|_| ()));
    refused(cpu.layer_norm(&x, &vec![1.0; 7], &vec![1.0; 7], 1e-5).map(|_| ()));
}
