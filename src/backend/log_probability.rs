//! Log probabilities of the model's own distribution, from logits.

use rayon::prelude::*;

/// What a logit's log probability is less than the logit: the logarithm of the sum of all exponentials. A logit that is not a
/// number counts as impossible.
pub fn log_normaliser(logits: &[f32]) -> f64 {
    let finite = |x: f32| if x.is_nan() { f32::NEG_INFINITY } else { x };
    let largest = logits.iter().copied().map(finite).fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&x| f64::from(finite(x) - largest).exp()).sum();
    f64::from(largest) + sum.ln()
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
