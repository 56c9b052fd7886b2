//! The element-wise loops of a training, compiled for the instructions that the processor has.
//!
//! A micro-batch takes an exponential for every number of every token's logits, twice and more often, and one for every
//! channel of every MLP; by the C library, one at a time, they took a tenth of a training's time.

pub(super) use crate::backend::cpu::vectorised;
use crate::backend::cpu::{Loops, exp};

/// Sums that one loop has side by side, so that they fill vector registers. Fixed: the order of a sum is part of its result.
const LANES: usize = 16;
/// Numbers that are summed in f32 before their sum is added in f64: a vocabulary is too long for one f32 sum.
const CHUNK: usize = 256;

/// `silu(gate) * up` in the place of the gates.
pub(super) struct Gate<'a> {
    pub(super) gate: &'a mut [f32],
    pub(super) up: &'a [f32],
}

impl Loops for Gate<'_> {
    #[inline(always)]
    fn run(self) {
        for (g, u) in self.gate.iter_mut().zip(self.up) {
            *g *= sigmoid(*g) * u;
        }
    }
}

/// The way back of [`Gate`]: `d_gate` holds the gradient of its result and gets that of the gates; `d_up` gets the other.
pub(super) struct GateBack<'a> {
    pub(super) gate: &'a [f32],
    pub(super) up: &'a [f32],
    pub(super) d_gate: &'a mut [f32],
    pub(super) d_up: &'a mut [f32],
}

impl Loops for GateBack<'_> {
    #[inline(always)]
    fn run(self) {
        let gradients = self.d_gate.iter_mut().zip(self.d_up);
        for ((d_gate, d_up), (&g, &u)) in gradients.zip(self.gate.iter().zip(self.up)) {
            let (s, dy) = (sigmoid(g), *d_gate);
            *d_gate = dy * u * s * (1.0 + g * (1.0 - s));
            *d_up = dy * g * s;
        }
    }
}

#[inline(always)]
fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// `log(sum(e^x))`
pub(super) fn log_sum_exp(row: &[f32]) -> f32 {
    let mut result = 0.0;
    vectorised(LogSumExp { row, result: &mut result });
    result
}

struct LogSumExp<'a> {
    row: &'a [f32],
    result: &'a mut f32,
}

impl Loops for LogSumExp<'_> {
    #[inline(always)]
    fn run(self) {
        let mut most = [f32::NEG_INFINITY; LANES];
        for chunk in self.row.chunks(LANES) {
            for (most, &x) in most.iter_mut().zip(chunk) {
                *most = if x > *most { x } else { *most };
            }
        }
        let most = most.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let mut sum = 0.0;
        for chunk in self.row.chunks(CHUNK) {
            let mut sums = [0.0; LANES];
            for part in chunk.chunks(LANES) {
                for (sum, x) in sums.iter_mut().zip(part) {
                    *sum += exp(x - most);
                }
            }
            sum += f64::from(sums.iter().sum::<f32>());
        }
        *self.result = most + sum.ln() as f32;
    }
}

/// `weight e^(x - total)` in place: with a row's [`log_sum_exp`] its distribution.
pub(super) struct Shares<'a> {
    pub(super) x: &'a mut [f32],
    pub(super) total: f32,
    pub(super) weight: f32,
}

impl Loops for Shares<'_> {
    #[inline(always)]
    fn run(self) {
        let Self { x, total, weight } = self;
        for x in x {
            *x = exp(*x - total) * weight;
        }
    }
}

/// Logits and their [`log_sum_exp`].
#[derive(Clone, Copy)]
pub(super) struct Logits<'a> {
    row: &'a [f32],
    total: f32,
}

impl<'a> Logits<'a> {
    pub(super) fn new(row: &'a [f32]) -> Self {
        Self { row, total: log_sum_exp(row) }
    }

    /// `KL(softmax(self) || softmax(other))`
    pub(super) fn divergence(self, other: Self) -> f64 {
        let mut result = 0.0;
        vectorised(Divergence { teacher: self, student: other, result: &mut result });
        result
    }

    /// Writes `weight (softmax(self) - softmax(other))`.
    pub(super) fn difference(self, other: Self, weight: f32, to: &mut [f32]) {
        vectorised(Difference { of: self, from: other, weight, to });
    }
}

struct Divergence<'a> {
    teacher: Logits<'a>,
    student: Logits<'a>,
    result: &'a mut f64,
}

impl Loops for Divergence<'_> {
    #[inline(always)]
    fn run(self) {
        let Self { teacher, student, result } = self;
        for (t, s) in teacher.row.chunks(CHUNK).zip(student.row.chunks(CHUNK)) {
            let mut sums = [0.0; LANES];
            for (t, s) in t.chunks(LANES).zip(s.chunks(LANES)) {
                for (sum, (t, s)) in sums.iter_mut().zip(t.iter().zip(s)) {
                    let share = t - teacher.total;
                    *sum += exp(share) * (share - (s - student.total));
                }
            }
            *result += f64::from(sums.iter().sum::<f32>());
        }
    }
}

struct Difference<'a> {
    of: Logits<'a>,
    from: Logits<'a>,
    weight: f32,
    to: &'a mut [f32],
}

impl Loops for Difference<'_> {
    #[inline(always)]
    fn run(self) {
        let Self { of, from, weight, to } = self;
        for (to, (a, b)) in to.iter_mut().zip(of.row.iter().zip(from.row)) {
            *to = (exp(a - of.total) - exp(b - from.total)) * weight;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// From -`spread` to `spread`, in no order.
    fn logits(length: usize, spread: f32, salt: usize) -> Vec<f32> {
        (0..length).map(|i| ((i * 7919 + salt * 31) % 1009) as f32 / 504.5 * spread - spread).collect()
    }

    fn exact_total(row: &[f32]) -> f64 {
        row.iter().map(|&x| f64::from(x).exp()).sum::<f64>().ln()
    }

    fn near(got: f64, expected: f64, tolerance: f64, what: &str) {
        assert!((got - expected).abs() <= tolerance, "{what}: {got}, not {expected}");
    }

    #[test]
    fn sums_and_distributions_of_any_length_are_those_of_f64() {
        for length in [1, 7, 15, 16, 17, 255, 257, 4099] {
            for spread in [0.0, 3.0, 40.0] {
                let (row, other) = (logits(length, spread, 1), logits(length, spread, 2));
                let [total, other_total] = [&row, &other].map(|row| exact_total(row));
                near(f64::from(log_sum_exp(&row)), total, 1e-5, "log of a sum");

                let share = |x: &f32, total: f64| (f64::from(*x) - total).exp();
                let mut shares = row.clone();
                vectorised(Shares { x: &mut shares, total: total as f32, weight: 0.5 });
                let [of, from] = [Logits::new(&row), Logits::new(&other)];
                let mut differences = vec![9.0; length];
                of.difference(from, 2.0, &mut differences);
                let mut divergence = 0.0;
                for i in 0..length {
                    let [p, q] = [share(&row[i], total), share(&other[i], other_total)];
                    near(f64::from(shares[i]), 0.5 * p, 1e-5 * p + 1e-30, "share");
                    near(f64::from(differences[i]), 2.0 * (p - q), 2e-5 * (p + q), "difference");
                    divergence += p * (f64::from(row[i]) - total - f64::from(other[i]) + other_total);
                }
                near(of.divergence(from), divergence, 1e-5 * (1.0 + divergence), "divergence");
                assert!(of.divergence(of).abs() < 1e-5);
            }
        }
    }

    #[test]
    fn gates_are_those_of_f64_and_their_gradients_the_differences() {
        let (gate, up) = (logits(37, 9.0, 3), logits(37, 2.0, 4));
        let silu = |g: f64| g / (1.0 + (-g).exp());
        let mut y = gate.clone();
        vectorised(Gate { gate: &mut y, up: &up });
        let (mut d_gate, mut d_up) = (vec![0.25; 37], vec![0.0; 37]);
        vectorised(GateBack { gate: &gate, up: &up, d_gate: &mut d_gate, d_up: &mut d_up });
        for i in 0..37 {
            let (g, u) = (f64::from(gate[i]), f64::from(up[i]));
            near(f64::from(y[i]), silu(g) * u, 1e-5, "gated");
            let slope = (silu(g + 1e-5) - silu(g - 1e-5)) / 2e-5;
            near(f64::from(d_gate[i]), 0.25 * slope * u, 1e-5, "gradient of a gate");
            near(f64::from(d_up[i]), 0.25 * silu(g), 1e-5, "gradient beside it");
        }
    }

    #[test]
    fn what_is_no_number_stays_so() {
        // Else a training that has diverged would go on.
        let mut row = logits(50, 1.0, 5);
        row[33] = f32::NAN;
        assert!(log_sum_exp(&row).is_nan());
        let whole = logits(50, 1.0, 6);
        assert!(Logits::new(&row).divergence(Logits::new(&whole)).is_nan());
        assert!(Logits::new(&whole).divergence(Logits::new(&row)).is_nan());
        let mut gates = row.clone();
        vectorised(Gate { gate: &mut gates, up: &whole });
        assert!(gates[33].is_nan() && gates[32].is_finite());
    }
}
