//! One sequence's sampler: its random generator and what it has generated.

use super::Sampling;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::collections::{HashMap, HashSet};

/// Chooses one sequence's tokens.
#[derive(Debug, Clone)]
pub struct Sampler {
    sampling: Sampling,
    random: ChaCha8Rng,
    /// Tokens of prompt and output, kept only where the repetition penalty wants them.
    seen: HashSet<u32>,
    /// How often each token was generated.
    generated: HashMap<u32, u32>,
}

/// Logits from which nothing can be chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("no token is possible: every logit is excluded or not a number")]
pub struct SamplingError;

impl Sampler {
    pub fn new(sampling: Sampling, prompt: &[u32]) -> Self {
        let random = ChaCha8Rng::seed_from_u64(sampling.seed);
        let penalised = sampling.repetition_penalty != 1.0;
        let seen = if penalised { prompt.iter().copied().collect() } else { HashSet::new() };
        Self { sampling, random, seen, generated: HashMap::new() }
    }

    /// The next token after these logits `(V)`, which are changed on the way; never one of `forbidden`.
    pub fn sample(&mut self, logits: &mut [f32], forbidden: &[u32]) -> Result<u32, SamplingError> {
        self.adjust(logits);
        for &token in forbidden {
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit = f32::NEG_INFINITY;
            }
        }
        let best = likeliest(logits)?;
        let token = if self.sampling.temperature == 0.0 { best } else { self.draw(logits, best) };
        *self.generated.entry(token).or_default() += 1;
        if self.sampling.repetition_penalty != 1.0 {
            self.seen.insert(token);
        }
        Ok(token)
    }

    fn adjust(&self, logits: &mut [f32]) {
        let Sampling { frequency_penalty, presence_penalty, repetition_penalty, logit_bias, .. } =
            &self.sampling;
        for &token in &self.seen {
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit = if *logit > 0.0 { *logit / repetition_penalty } else { *logit * repetition_penalty };
            }
        }
        if *frequency_penalty != 0.0 || *presence_penalty != 0.0 {
            for (&token, &count) in &self.generated {
                if let Some(logit) = logits.get_mut(token as usize) {
                    *logit -= frequency_penalty * count as f32 + presence_penalty;
                }
            }
        }
        for &(token, bias) in logit_bias {
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit += bias;
            }
        }
    }

    /// Draws from what temperature, top-k, top-p and min-p leave.
    fn draw(&mut self, logits: &[f32], best: u32) -> u32 {
        let kept = self.kept(logits, best);
        let total: f64 = kept.iter().map(|(_, weight)| weight).sum();
        let mut left = self.random.random::<f64>() * total;
        for &(token, weight) in &kept {
            left -= weight;
            if left < 0.0 {
                return token;
            }
        }
        // Rounding can leave a crumb beyond the last token.
        kept.last().map_or(best, |&(token, _)| token)
    }

    /// Tokens and weights (probabilities up to a common factor) that may be drawn; never empty.
    fn kept(&self, logits: &[f32], best: u32) -> Vec<(u32, f64)> {
        let Sampling { temperature, top_p, top_k, min_p, .. } = self.sampling;
        let largest = f64::from(logits[best as usize]);
        let weight = |logit: f32| ((f64::from(logit) - largest) / f64::from(temperature)).exp();
        let all = logits.iter().enumerate().map(|(id, &logit)| (id as u32, weight(logit)));
        // The likeliest has weight 1, so min-p is a bound on the weight itself. Weights that are not numbers fail too.
        let mut kept = all.filter(|&(_, w)| w > 0.0 && w >= f64::from(min_p)).collect::<Vec<_>>();
        let falling = |a: &(u32, f64), b: &(u32, f64)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
        if top_k > 0 && top_k < kept.len() {
            kept.select_nth_unstable_by(top_k - 1, falling);
            kept.truncate(top_k);
        }
        if top_p < 1.0 {
            kept.sort_unstable_by(falling);
            let total: f64 = kept.iter().map(|(_, w)| w).sum();
            let mut before = 0.0;
            let enough = kept.iter().position(|(_, w)| {
                before += w;
                before >= f64::from(top_p) * total
            });
            kept.truncate(enough.map_or(kept.len(), |i| i + 1));
        }
        if kept.is_empty() {
            kept.push((best, 1.0));
        }
        kept
    }
}

/// The largest logit's id, the smallest of equal ones.
fn likeliest(logits: &[f32]) -> Result<u32, SamplingError> {
    let mut best: Option<(usize, f32)> = None;
    for (id, &logit) in logits.iter().enumerate() {
        if logit.is_finite() && best.is_none_or(|(_, most)| logit > most) {
            best = Some((id, logit));
        }
    }
    best.map(|(id, _)| id as u32).ok_or(SamplingError)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOGITS: [f32; 6] = [2.0, 1.0, 0.0, 3.0, -1.0, 0.5];

    /// How often each token comes in `n` draws of fresh samplers.
    fn frequencies(sampling: &Sampling, n: u64) -> Vec<f64> {
        let mut counts = vec![0.0; LOGITS.len()];
        for seed in 0..n {
            let mut sampler = Sampler::new(Sampling { seed, ..sampling.clone() }, &[]);
            counts[sampler.sample(&mut LOGITS.clone(), &[]).unwrap() as usize] += 1.0 / n as f64;
        }
        counts
    }

    fn softmax(logits: &[f64]) -> Vec<f64> {
        let sum: f64 = logits.iter().map(|x| x.exp()).sum();
        logits.iter().map(|x| x.exp() / sum).collect()
    }

    fn assert_near(got: &[f64], expected: &[f64]) {
        // Four standard deviations of 4000 draws.
        for (g, e) in got.iter().zip(expected) {
            assert!(
                (g - e).abs() <= 4.0 * (e * (1.0 - e) / 4000.0).sqrt() + 1e-9,
                "{got:?} not {expected:?}"
            );
        }
    }

    #[test]
    fn draws_follow_the_models_distribution() {
        let logits = LOGITS.map(f64::from);
        assert_near(&frequencies(&Sampling::default(), 4000), &softmax(&logits));
        let cold = Sampling { temperature: 0.5, ..Sampling::default() };
        assert_near(&frequencies(&cold, 4000), &softmax(&logits.map(|x| 2.0 * x)));
    }

    #[test]
    fn truncation_keeps_what_it_says() {
        let never = f64::NEG_INFINITY;
        let top_k = Sampling { top_k: 2, ..Sampling::default() };
        assert_near(&frequencies(&top_k, 4000), &softmax(&[2.0, never, never, 3.0, never, never]));
        // Probabilities 0.61, 0.22, 0.08, 0.05, 0.03, 0.01: the first two reach 0.8.
        let top_p = Sampling { top_p: 0.8, ..Sampling::default() };
        assert_near(&frequencies(&top_p, 4000), &softmax(&[2.0, never, never, 3.0, never, never]));
        // exp(1 - 3) = 0.135 stays, exp(0.5 - 3) = 0.082 goes.
        let min_p = Sampling { min_p: 0.1, ..Sampling::default() };
        assert_near(&frequencies(&min_p, 4000), &softmax(&[2.0, 1.0, never, 3.0, never, never]));
    }

    #[test]
    fn greedy_takes_the_first_of_the_largest() {
        let mut sampler = Sampler::new(Sampling::greedy(), &[]);
        assert_eq!(sampler.sample(&mut [1.0, 5.0, 5.0], &[]), Ok(1));
        assert_eq!(sampler.sample(&mut [1.0, 5.0, 5.0], &[1]), Ok(2));
        assert_eq!(sampler.sample(&mut [f32::NAN, 0.0], &[]), Ok(1));
        assert_eq!(sampler.sample(&mut [f32::NAN, f32::NEG_INFINITY], &[]), Err(SamplingError));
        assert_eq!(sampler.sample(&mut [1.0], &[0]), Err(SamplingError));
    }

    #[test]
    fn penalties_and_bias_change_the_choice() {
        let greedy = Sampling::greedy;
        let mut twice = Sampler::new(Sampling { presence_penalty: 1.5, ..greedy() }, &[3]);
        let mut next = || twice.sample(&mut LOGITS.clone(), &[]).unwrap();
        assert_eq!(
            [next(), next(), next()],
            [3, 0, 3],
            "a prompt token is not penalised, a generated one once"
        );
        let mut often = Sampler::new(Sampling { frequency_penalty: 0.6, ..greedy() }, &[]);
        let mut next = || often.sample(&mut LOGITS.clone(), &[]).unwrap();
        assert_eq!(
            [next(), next(), next(), next()],
            [3, 3, 0, 3],
            "3.0, 2.4 and then 1.8 against 2.0 and 1.4"
        );
        let mut repeated = Sampler::new(Sampling { repetition_penalty: 2.0, ..greedy() }, &[3]);
        assert_eq!(repeated.sample(&mut LOGITS.clone(), &[]), Ok(0), "3.0 / 2 is below 2.0");
        let mut biased = Sampler::new(Sampling { logit_bias: vec![(4, 5.0), (99, 1.0)], ..greedy() }, &[]);
        assert_eq!(biased.sample(&mut LOGITS.clone(), &[]), Ok(4));
    }

    #[test]
    fn the_same_seed_gives_the_same_tokens() {
        let run = |seed| {
            let mut sampler = Sampler::new(Sampling { seed, ..Sampling::default() }, &[]);
            (0..50).map(|_| sampler.sample(&mut LOGITS.clone(), &[]).unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(run(7), run(7));
        assert_ne!(run(7), run(8));
    }
}
