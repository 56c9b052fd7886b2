//! One sequence's sampler: its random generator and what it has generated.

use super::Sampling;
use crate::backend::{Draw, Edit};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::collections::{BTreeMap, HashMap, HashSet};

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

impl Sampler {
    pub fn new(sampling: Sampling, prompt: &[u32]) -> Self {
        let random = ChaCha8Rng::seed_from_u64(sampling.seed);
        let penalised = sampling.repetition_penalty != 1.0;
        let seen = if penalised { prompt.iter().copied().collect() } else { HashSet::new() };
        Self { sampling, random, seen, generated: HashMap::new() }
    }

    /// How to choose the next token; never one of `forbidden`. [`Self::note`] then takes it.
    pub fn draw(&mut self, forbidden: &[u32]) -> Draw {
        let Sampling { temperature, top_k, top_p, min_p, .. } = self.sampling;
        let uniform = if temperature == 0.0 { 0.0 } else { self.random.random() };
        Draw { edits: self.edits(forbidden), temperature, top_k, top_p, min_p, uniform }
    }

    /// A token was chosen.
    pub fn note(&mut self, token: u32) {
        *self.generated.entry(token).or_default() += 1;
        if self.sampling.repetition_penalty != 1.0 {
            self.seen.insert(token);
        }
    }

    /// By token: penalties, then the bias.
    fn edits(&self, forbidden: &[u32]) -> Vec<Edit> {
        let Sampling { frequency_penalty, presence_penalty, repetition_penalty, logit_bias, .. } =
            &self.sampling;
        let mut edits = BTreeMap::new();
        let mut edit = |token: u32, penalty: f32, add: f32| {
            let edit = edits.entry(token).or_insert(Edit { token, penalty: 1.0, add: 0.0 });
            edit.penalty *= penalty;
            edit.add += add;
        };
        self.seen.iter().for_each(|&token| edit(token, *repetition_penalty, 0.0));
        if *frequency_penalty != 0.0 || *presence_penalty != 0.0 {
            let add = |count: u32| -(frequency_penalty * count as f32 + presence_penalty);
            self.generated.iter().for_each(|(&token, &count)| edit(token, 1.0, add(count)));
        }
        logit_bias.iter().for_each(|&(token, bias)| edit(token, 1.0, bias));
        forbidden.iter().for_each(|&token| edit(token, 1.0, f32::NEG_INFINITY));
        edits.into_values().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::SamplingError;

    impl Sampler {
        fn sample(&mut self, logits: &[f32], forbidden: &[u32]) -> Result<u32, SamplingError> {
            let token = self.draw(forbidden).choose(logits)?;
            self.note(token);
            Ok(token)
        }
    }

    const LOGITS: [f32; 6] = [2.0, 1.0, 0.0, 3.0, -1.0, 0.5];

    /// How often each token comes in `n` draws of fresh samplers.
    fn frequencies(sampling: &Sampling, n: u64) -> Vec<f64> {
        let mut counts = vec![0.0; LOGITS.len()];
        for seed in 0..n {
            let mut sampler = Sampler::new(Sampling { seed, ..sampling.clone() }, &[]);
            counts[sampler.sample(&LOGITS, &[]).unwrap() as usize] += 1.0 / n as f64;
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
        assert_eq!(sampler.sample(&[1.0, 5.0, 5.0], &[]), Ok(1));
        assert_eq!(sampler.sample(&[1.0, 5.0, 5.0], &[1]), Ok(2));
        assert_eq!(sampler.sample(&[f32::NAN, 0.0], &[]), Ok(1));
        assert_eq!(sampler.sample(&[f32::NAN, f32::NEG_INFINITY], &[]), Err(SamplingError));
        assert_eq!(sampler.sample(&[1.0], &[0]), Err(SamplingError));
    }

    #[test]
    fn penalties_and_bias_change_the_choice() {
        let greedy = Sampling::greedy;
        let mut twice = Sampler::new(Sampling { presence_penalty: 1.5, ..greedy() }, &[3]);
        let mut next = || twice.sample(&LOGITS, &[]).unwrap();
        assert_eq!(
            [next(), next(), next()],
            [3, 0, 3],
            "a prompt token is not penalised, a generated one once"
        );
        let mut often = Sampler::new(Sampling { frequency_penalty: 0.6, ..greedy() }, &[]);
        let mut next = || often.sample(&LOGITS, &[]).unwrap();
        assert_eq!(
            [next(), next(), next(), next()],
            [3, 3, 0, 3],
            "3.0, 2.4 and then 1.8 against 2.0 and 1.4"
        );
        let mut repeated = Sampler::new(Sampling { repetition_penalty: 2.0, ..greedy() }, &[3]);
        assert_eq!(repeated.sample(&LOGITS, &[]), Ok(0), "3.0 / 2 is below 2.0");
        let mut biased = Sampler::new(Sampling { logit_bias: vec![(4, 5.0), (99, 1.0)], ..greedy() }, &[]);
        assert_eq!(biased.sample(&LOGITS, &[]), Ok(4));
    }

    #[test]
    fn the_same_seed_gives_the_same_tokens() {
        let run = |seed| {
            let mut sampler = Sampler::new(Sampling { seed, ..Sampling::default() }, &[]);
            (0..50).map(|_| sampler.sample(&LOGITS, &[]).unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(run(7), run(7));
        assert_ne!(run(7), run(8));
    }
}
