//! Log probabilities of the model's own distribution, from logits.

use super::cpu::{Loops, exp, vectorised};
use rayon::prelude::*;

/// Logits that are looked at together, so that loops become vector code.
const LANES: usize = 16;

/// What a logit's log probability is less than the logit: the logarithm of the sum of all exponentials. A logit that is not a
/// number counts as impossible, where a training's `log_sum_exp` keeps it, so that it is noticed. Not a number where none is
/// possible, or one is infinite.
pub fn log_normaliser(logits: &[f32]) -> f64 {
    let mut normaliser = f64::NAN;
    vectorised(Normalise { logits, normaliser: &mut normaliser });
    normaliser
}

struct Normalise<'a> {
    logits: &'a [f32],
    normaliser: &'a mut f64,
}

impl Loops for Normalise<'_> {
    #[inline(always)]
    fn run(self) {
        let (chunks, rest) = self.logits.as_chunks::<LANES>();
        let mut lanes = [f32::NEG_INFINITY; LANES];
        for chunk in chunks {
            for (most, &x) in lanes.iter_mut().zip(chunk) {
                *most = if x > *most { x } else { *most };
            }
        }
        let mut largest = f32::NEG_INFINITY;
        for &x in lanes.iter().chain(rest) {
            largest = if x > largest { x } else { largest };
        }
        if largest.is_infinite() {
            return;
        }
        // In f32 to within 2 units in the last place each, added up in f64.
        let mut sums = [0.0f64; LANES];
        for chunk in chunks {
            for (sum, &x) in sums.iter_mut().zip(chunk) {
                *sum += f64::from(part(x, largest));
            }
        }
        for (sum, &x) in sums.iter_mut().zip(rest) {
            *sum += f64::from(part(x, largest));
        }
        *self.normaliser = f64::from(largest) + sums.iter().sum::<f64>().ln();
    }
}

#[inline(always)]
fn part(x: f32, largest: f32) -> f32 {
    if x.is_nan() { 0.0 } else { exp(x - largest) }
}

/// For each (row, token) the natural logarithm of the token's probability in that row of `logits (rows, V)`; minus infinity of a
/// token that has no logit, or one that is not a number.
pub fn log_probabilities(logits: &[f32], rows: usize, tokens: &[(u32, u32)]) -> Vec<f32> {
    let vocabulary = logits.len() / rows.max(1);
    let row = |row: usize| logits.get(row * vocabulary..(row + 1) * vocabulary).unwrap_or_default();
    let normalisers = (0..rows).into_par_iter().map(|r| log_normaliser(row(r))).collect::<Vec<_>>();
    let log_probability = |&(r, token): &(u32, u32)| {
        let logit = row(r as usize).get(token as usize)?;
        Some((f64::from(*logit) - normalisers[r as usize]) as f32).filter(|p| !p.is_nan())
    };
    tokens.iter().map(|wanted| log_probability(wanted).unwrap_or(f32::NEG_INFINITY)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_normaliser_is_that_of_f64() {
        for count in [1, 2, 7, 16, 33, 1000, 5003] {
            let mut logits = (0..count).map(|i| (i * 37 % 101) as f32 * 0.4 - 25.0).collect::<Vec<_>>();
            logits.push(f32::NEG_INFINITY);
            let sum: f64 = logits.iter().map(|&x| f64::from(x).exp()).sum();
            assert!((log_normaliser(&logits) - sum.ln()).abs() < 3e-7, "{count}");
            logits.push(f32::NAN);
            assert!((log_normaliser(&logits) - sum.ln()).abs() < 3e-7, "{count} and one that is no number");
        }
        for impossible in [&[][..], &[f32::NAN], &[f32::NEG_INFINITY, f32::NAN], &[f32::INFINITY, 0.0]] {
            assert!(log_normaliser(impossible).is_nan(), "{impossible:?}");
        }
    }

    #[test]
    fn log_probabilities_are_those_of_the_named_rows_and_tokens() {
        let ln = f32::ln;
        let logits = [ln(1.0), ln(2.0), ln(5.0), 0.0, f32::NAN, 0.0];
        let tokens = [(1, 0), (0, 2), (0, 0), (1, 1), (0, 3), (2, 0)];
        let got = log_probabilities(&logits, 2, &tokens);
        let expected =
            [ln(0.5), ln(0.625), ln(0.125), f32::NEG_INFINITY, f32::NEG_INFINITY, f32::NEG_INFINITY];
        for (got, expected) in got.iter().zip(expected) {
            assert!((got - expected).abs() < 1e-6 || *got == expected, "{got} not {expected}");
        }
        assert!(log_probabilities(&[], 0, &[]).is_empty());
    }
}
