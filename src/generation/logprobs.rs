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

/// Logits that are passed over together if none of them is among the largest.
const CHUNK: usize = 64;

/// The ids of the `count` largest logits, falling; of equal ones the smaller id first.
fn likeliest(logits: &[f32], count: usize) -> Vec<u32> {
    let count = count.min(logits.len());
    let mut found: Vec<(f32, u32)> = Vec::with_capacity(count + 1);
    for (chunk, part) in logits.chunks(CHUNK).enumerate() {
        // Later ones have to be larger: of equal ones the first stays.
        let least = if found.len() < count { None } else { found.last().map(|&(least, _)| least) };
        if least.is_some_and(|least| !part.iter().fold(false, |any, &x| any | (x > least))) {
            continue;
        }
        for (i, &x) in part.iter().enumerate() {
            let x = finite(x);
            if count > 0 && (found.len() < count || found.last().is_some_and(|&(least, _)| x > least)) {
                let place = found.partition_point(|&(larger, _)| larger >= x);
                found.insert(place, (x, (chunk * CHUNK + i) as u32));
                found.truncate(count);
            }
        }
    }
    found.into_iter().map(|(_, id)| id).collect()
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
    fn the_likeliest_are_those_of_a_stable_sort() {
        let logits =
            (0..1000).map(|i| if i % 97 == 5 { f32::NAN } else { (i * 37 % 101) as f32 }).collect::<Vec<_>>();
        let mut sorted = (0..1000).collect::<Vec<u32>>();
        sorted.sort_by(|&a, &b| finite(logits[b as usize]).total_cmp(&finite(logits[a as usize])));
        for count in [0, 1, 2, 7, 20, 133, 1000, 2000] {
            assert_eq!(likeliest(&logits, count), sorted[..count.min(1000)], "{count}");
        }
    }

    #[test]
    fn logits_that_are_not_numbers_are_impossible() {
        let (own, top) = token_logprob(&[f32::NAN, 0.0], 0, 2);
        assert_eq!((own, top[0]), (f32::NEG_INFINITY, (1, 0.0)));
        assert_eq!(token_logprob(&[f32::NAN], 0, 1).0, f32::NEG_INFINITY);
        assert_eq!(token_logprob(&[0.0], 7, 0), (f32::NEG_INFINITY, Vec::new()));
    }
}
