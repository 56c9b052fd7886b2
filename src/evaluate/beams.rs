//! Which continuations of one prompt are kept: greedy, or beam search as transformers 4.31 does it. No model, no cache.
//!
//! LoNAS's scripts evaluate with that version's `BeamSearchScorer`. What it does differently from later ones: the length by
//! which a finished text's score is divided includes the prompt (`generation/beam_search.py`, `BeamHypotheses.add`), with
//! `length_penalty` 1 and `early_stopping` False, transformers' defaults.

/// The search over one prompt's continuations.
#[derive(Debug, Clone)]
pub(super) struct Beams {
    width: usize,
    prompt_tokens: usize,
    max_new_tokens: usize,
    /// Best first. At the beginning one, without a token.
    alive: Vec<Beam>,
    /// Score and tokens, worst first.
    finished: Vec<(f32, Vec<u32>)>,
    done: bool,
}

/// One continuation.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Beam {
    pub(super) tokens: Vec<u32>,
    /// Sum of its tokens' log probabilities.
    score: f32,
}

impl Beams {
    pub(super) fn new(width: usize, prompt_tokens: usize, max_new_tokens: usize) -> Self {
        let alive = vec![Beam::default()];
        Self { width, prompt_tokens, max_new_tokens, alive, finished: Vec::new(), done: false }
    }

    pub(super) fn alive(&self) -> &[Beam] {
        &self.alive
    }

    pub(super) fn is_done(&self) -> bool {
        self.done
    }

    /// How many of the likeliest next tokens of each beam have to be known: so many that a stop token leaves enough.
    pub(super) fn wanted(width: usize) -> usize {
        2 * width
    }

    /// Greedy: the one beam's next token.
    pub(super) fn push(&mut self, token: u32, stop: &[u32]) {
        let Some(beam) = self.alive.first_mut() else { return };
        beam.tokens.push(token);
        self.done = stop.contains(&token) || beam.tokens.len() >= self.max_new_tokens;
    }

    /// Beam search: the likeliest next tokens of each beam that is alive, with their log probabilities, falling. Says from which
    /// of them each new one comes.
    pub(super) fn advance(&mut self, next: &[Vec<(u32, f32)>], stop: &[u32]) -> Vec<usize> {
        let of_beam = |(parent, next): (usize, &Vec<(u32, f32)>)| {
            let score = self.alive[parent].score;
            next.iter().map(move |&(token, logprob)| (score + logprob, parent, token)).collect::<Vec<_>>()
        };
        let mut candidates = next.iter().enumerate().flat_map(of_beam).collect::<Vec<_>>();
        // Stable: of equal ones the earlier beam's.
        candidates.sort_by(|a, b| b.0.total_cmp(&a.0));
        candidates.truncate(Self::wanted(self.width));
        let best = candidates.first().map_or(f32::NEG_INFINITY, |c| c.0);
        let (mut alive, mut parents) = (Vec::with_capacity(self.width), Vec::with_capacity(self.width));
        for (rank, (score, parent, token)) in candidates.into_iter().enumerate() {
            let before = &self.alive[parent].tokens;
            let tokens = [before.as_slice(), &[token]].concat();
            if !stop.contains(&token) {
                alive.push(Beam { tokens, score });
                parents.push(parent);
            } else if rank < self.width {
                // Its score has the stop token in it, its length has not.
                let length = self.prompt_tokens + before.len();
                self.finish(score, length, tokens);
            }
            if alive.len() == self.width {
                break;
            }
        }
        self.alive = alive;
        // What is still alive counts as if it ended now, with the token that it would take next.
        let length = self.alive.first().map_or(0, |b| self.prompt_tokens + b.tokens.len());
        let hopeless = self.finished.len() >= self.width
            && self.finished.first().is_some_and(|worst| worst.0 >= best / length.max(1) as f32);
        let length = self.alive.first().map_or(usize::MAX, |b| b.tokens.len());
        if !hopeless && length >= self.max_new_tokens {
            for Beam { tokens, score } in std::mem::take(&mut self.alive) {
                self.finish(score, self.prompt_tokens + tokens.len(), tokens);
            }
        }
        self.done = hopeless || length >= self.max_new_tokens;
        parents
    }

    /// Keeps the best texts that ended, as many as there are beams.
    fn finish(&mut self, score: f32, length: usize, tokens: Vec<u32>) {
        let score = score / length.max(1) as f32;
        if self.finished.len() < self.width || self.finished.first().is_some_and(|worst| score > worst.0) {
            let place = self.finished.partition_point(|f| f.0 <= score);
            self.finished.insert(place, (score, tokens));
            if self.finished.len() > self.width {
                self.finished.remove(0);
            }
        }
    }

    /// The best text, its stop token included.
    pub(super) fn best(mut self) -> Vec<u32> {
        match self.finished.pop() {
            Some((_, tokens)) => tokens,
            None => self.alive.into_iter().next().map_or(Vec::new(), |beam| beam.tokens),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STOP: [u32; 1] = [0];

    #[test]
    fn greedy_ends_with_a_stop_token_or_at_its_length() {
        let mut beams = Beams::new(1, 5, 3);
        [4, 0].into_iter().for_each(|token| beams.push(token, &STOP));
        assert!(beams.is_done());
        assert_eq!(beams.best(), [4, 0]);
        let mut beams = Beams::new(1, 5, 3);
        [4, 5, 6].into_iter().for_each(|token| beams.push(token, &STOP));
        assert!(beams.is_done());
        assert_eq!(beams.best(), [4, 5, 6]);
    }

    #[test]
    fn a_worse_first_token_can_lead_to_the_better_text() {
        let mut beams = Beams::new(2, 1, 2);
        let next = vec![vec![(1, -0.5), (2, -1.0), (3, -9.0), (4, -9.5)]];
        assert_eq!(beams.advance(&next, &STOP), [0, 0]);
        assert_eq!(beams.alive()[1].tokens, [2]);
        let next = vec![
            vec![(5, -3.0), (6, -3.5), (7, -9.0), (8, -9.0)],
            vec![(5, -0.1), (6, -4.0), (7, -9.0), (8, -9.0)],
        ];
        assert_eq!(beams.advance(&next, &STOP), [1, 0]);
        assert!(beams.is_done());
        assert_eq!(beams.best(), [2, 5]);
    }

    #[test]
    fn a_text_that_ends_is_measured_with_its_prompt_and_without_its_stop_token() {
        // The stop token is the best of the first: -1.0 over 3 prompt tokens. What lives on is -1.5 over 4, then -1.6 over 5.
        let mut beams = Beams::new(2, 3, 2);
        beams.advance(&[vec![(0, -1.0), (1, -1.5), (2, -1.6), (3, -8.0)]], &STOP);
        assert_eq!(beams.alive().iter().map(|b| b.tokens.clone()).collect::<Vec<_>>(), [[1], [2]]);
        let next = vec![vec![(4, -0.1), (5, -8.0), (6, -8.0), (7, -8.0)], vec![(4, -8.0); 4]];
        beams.advance(&next, &STOP);
        // -1.0 / 3 against -1.6 / 5: without the prompt it would be -1.0 / 0 or 1 against -1.6 / 2.
        assert_eq!(beams.best(), [1, 4]);
    }

    #[test]
    fn a_stop_token_beyond_the_best_ones_is_passed_over() {
        let mut beams = Beams::new(2, 3, 9);
        beams.advance(&[vec![(1, -0.5), (2, -0.6), (0, -0.7), (3, -0.8)]], &STOP);
        assert!(beams.finished.is_empty());
        beams.advance(&[vec![(1, -0.5), (0, -0.6), (2, -0.7), (3, -0.8)], vec![(1, -9.0); 4]], &STOP);
        assert_eq!(beams.finished.len(), 1);
    }
}
