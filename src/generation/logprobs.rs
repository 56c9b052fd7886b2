//! Log probabilities of the model's own distribution, and the likeliest tokens.

use crate::backend::log_normaliser;

/// The natural-log probability of `token`, and the `top` likeliest tokens with theirs, falling; of equal ones the
/// smaller id first. The likeliest token's value is the same float in both places.
///
/// Logits that are not numbers count as impossible; without any possible token all values are minus infinity.
pub fn token_logprob(logits: &[f32], token: u32, top: usize) -> (f32, Vec<(u32, f32)>) {
    let normaliser = log_normaliser(logits);
    let logprob = |x: f32| {
        let value = (f64::from(finite(x)) - normaliser) as f32;
        if value.is_nan() { f32::NEG_INFINITY } else { value }
    };
    let own = logits.get(token as usize).map_or(f32::NEG_INFINITY, |&x| logprob(x));
    let likeliest = likeliest(logits, top).into_iter().map(|id| (id, logprob(logits[id as usize])));
    (own, likeliest.collect())
}

/// A logit that is not a number is an impossible one.
fn finite(x: f32) -> f32 {
    if x.is_nan() { f32::NEG_INFINITY } else { x }
}

/// The ids of the `count` largest logits, falling.
fn likeliest(logits: &[f32], count: usize) -> Vec<u32> {
    let count = count.min(logits.len());
    if count == 0 {
        return Vec::new();
    }
    let key = |id: &u32| {
        let x = logits[*id as usize];
        if x.is_nan() { f32::NEG_INFINITY } else { x }
    };
    let falling = |a: &u32, b: &u32| key(b).total_cmp(&key(a)).then(a.cmp(b));
    let mut ids = (0..logits.len() as u32).collect::<Vec<_>>();
    ids.select_nth_unstable_by(count - 1, falling);
    ids.truncate(count);
    ids.sort_unstable_by(falling);
    ids
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probabilities_sum_to_one_and_fall() {
        let logits = [1.0, -2.0, 3.0, 3.0, f32::NEG_INFINITY, 0.5];
        let (own, top) = token_logprob(&logits, 2, 10);
        assert_eq!(top.iter().map(|t| t.0).collect::<Vec<_>>(), [2, 3, 0, 5, 1, 4]);
        assert_eq!(own, top[0].1, "the likeliest token's value is the same float in both places");
        let sum: f64 = top.iter().map(|t| f64::from(t.1).exp()).sum();
        assert!((sum - 1.0).abs() < 1e-6);
        // By hand: log(e^3 / (2 e^3 + e + e^-2 + e^0.5)).
        assert!((own - -0.799_379).abs() < 1e-5, "{own}");
    }

    #[test]
    fn logits_that_are_not_numbers_are_impossible() {
        let (own, top) = token_logprob(&[f32::NAN, 0.0], 0, 2);
        assert_eq!((own, top[0]), (f32::NEG_INFINITY, (1, 0.0)));
        assert_eq!(token_logprob(&[f32::NAN], 0, 1).0, f32::NEG_INFINITY);
        assert_eq!(token_logprob(&[0.0], 7, 0), (f32::NEG_INFINITY, Vec::new()));
    }
}
