//! Tokens chosen from rows of logits, by all threads: what [`Draw::choose`] says, without sorting a vocabulary.
//!
//! Weights are f32 here, and f64 there, so that a draw within 1e-6 of the border between two tokens can fall to the other
//! one.
#![allow(unsafe_code)]

use super::kernel::{Kernel, Loops};
use super::rows::exp;
use super::shared::Shared;
use super::{Cpu, Rows, expect};
use crate::backend::{BackendError, Choice, Draw, SamplingError};
use std::cell::RefCell;

/// Logits that are looked at together, so that loops become vector code.
const LANES: usize = 32;
/// How far below the largest logit, in temperatures, the candidates for top-k and top-p are looked for: only few reach it, and
/// most vocabularies have enough of them.
const DISTANCES: [f32; 4] = [4.0, 8.0, 16.0, f32::INFINITY];

/// A token for each draw, from the row of `logits (T, V)` that it names.
///
/// # Errors
/// A row that is not there. A row without a possible token is an error in its own place only.
pub(super) fn choose(cpu: &Cpu, logits: &Rows, draws: &[(u32, Draw)]) -> Result<Vec<Choice>, BackendError> {
    for (row, _) in draws {
        let row = *row as usize;
        expect("choose", "rows", logits.len().max(row + 1), logits.len())?;
    }
    let choose = |(row, draw): &(u32, Draw)| {
        DESK.with_borrow_mut(|desk| desk.choose(cpu.kernel, logits.row(*row as usize), draw))
    };
    if let [only] = draws {
        return Ok(vec![choose(only)]);
    }
    let mut choices = vec![Err(SamplingError); draws.len()];
    let (pieces, to) = (cpu.team.pieces(draws.len()), Shared::new(&mut choices));
    cpu.team.run(|member| {
        member.share(&pieces, |range| {
            // SAFETY: each draw is one piece, and nobody reads before the run ends.
            let to = unsafe { to.part(range.clone()) };
            to.iter_mut().zip(&draws[range]).for_each(|(to, draw)| *to = choose(draw));
        });
    });
    Ok(choices)
}

thread_local! {
    static DESK: RefCell<Desk> = RefCell::default();
}

/// What a thread works in, from one row to the next.
#[derive(Default)]
struct Desk {
    logits: Vec<f32>,
    /// By token: its probability relative to the likeliest, 0 if it may not be drawn.
    weights: Vec<f32>,
    /// Logits and weights.
    candidates: Vec<(f32, f32)>,
    /// Sums of weights, by [`LANES`] tokens.
    sums: Vec<f64>,
}

impl Desk {
    fn choose(&mut self, kernel: Kernel, row: &[f32], draw: &Draw) -> Choice {
        let mut best = None;
        if draw.edits.is_empty() {
            kernel.vectorised(Likeliest { logits: row, best: &mut best });
        } else {
            self.logits.clear();
            self.logits.extend_from_slice(row);
            draw.edit(&mut self.logits);
            kernel.vectorised(Likeliest { logits: &self.logits, best: &mut best });
        }
        let (best, largest) = best.ok_or(SamplingError)?;
        if draw.temperature == 0.0 {
            return Ok(best as u32);
        }
        let Self { logits, weights, candidates, sums } = self;
        let logits = if draw.edits.is_empty() { row } else { logits };
        let mut token = best;
        weights.resize(logits.len().max(weights.len()), 0.0);
        let weights = &mut weights[..logits.len()];
        kernel.vectorised(Drawn { logits, largest, draw, weights, candidates, sums, token: &mut token });
        Ok(token as u32)
    }
}

/// The largest finite logit, of equal ones the first.
struct Likeliest<'a> {
    logits: &'a [f32],
    best: &'a mut Option<(usize, f32)>,
}

impl Loops for Likeliest<'_> {
    #[inline(always)]
    fn run(self) {
        let (chunks, rest) = self.logits.as_chunks::<LANES>();
        let mut most = [f32::NEG_INFINITY; LANES];
        for chunk in chunks {
            for (most, &x) in most.iter_mut().zip(chunk) {
                let larger = x > *most && x < f32::INFINITY;
                *most = if larger { x } else { *most };
            }
        }
        let mut largest = f32::NEG_INFINITY;
        for &x in most.iter().chain(rest) {
            largest = if x > largest && x < f32::INFINITY { x } else { largest };
        }
        if largest > f32::NEG_INFINITY {
            let mut first = 0;
            for chunk in chunks {
                let mut found = false;
                for &x in chunk {
                    found |= x == largest;
                }
                if found {
                    break;
                }
                first += LANES;
            }
            while self.logits[first] != largest {
                first += 1;
            }
            *self.best = Some((first, largest));
        }
    }
}

/// A token drawn by weight.
struct Drawn<'a> {
    logits: &'a [f32],
    largest: f32,
    draw: &'a Draw,
    weights: &'a mut [f32],
    candidates: &'a mut Vec<(f32, f32)>,
    sums: &'a mut Vec<f64>,
    /// At first the likeliest.
    token: &'a mut usize,
}

impl Loops for Drawn<'_> {
    #[inline(always)]
    fn run(self) {
        let Self { logits, largest, draw, weights, candidates, sums, token } = self;
        let Draw { temperature, top_k, top_p, min_p, .. } = *draw;
        for (weight, &x) in weights.iter_mut().zip(logits) {
            let of = exp((x - largest) / temperature);
            // What is not a number is less than nothing, too.
            *weight = if x.abs() < f32::INFINITY && of >= min_p { of } else { 0.0 };
        }
        let mut search = Search { logits, largest, temperature, candidates };
        if top_k > 0 {
            search.keep(weights, top_k as f64, |_| 1.0);
        }
        if top_p < 1.0 {
            let enough = f64::from(top_p) * add_up(weights, sums);
            search.keep(weights, enough, f64::from);
        }
        let mut left = draw.uniform * add_up(weights, sums);
        for (chunk, &sum) in sums.iter().enumerate() {
            if left >= sum {
                left -= sum;
                continue;
            }
            // Rounding can leave a crumb beyond the last of them.
            for (i, &weight) in weights[chunk * LANES..].iter().take(LANES).enumerate() {
                if weight > 0.0 {
                    *token = chunk * LANES + i;
                    left -= f64::from(weight);
                    if left < 0.0 {
                        return;
                    }
                }
            }
            return;
        }
    }
}

/// The sum of all weights, and by chunk.
#[inline(always)]
fn add_up(weights: &[f32], sums: &mut Vec<f64>) -> f64 {
    sums.clear();
    let mut total = 0.0;
    let (chunks, rest) = weights.as_chunks::<LANES>();
    for chunk in chunks {
        let mut lanes = [0.0f64; LANES / 4];
        for part in chunk.as_chunks::<{ LANES / 4 }>().0 {
            for (lane, &weight) in lanes.iter_mut().zip(part) {
                *lane += f64::from(weight);
            }
        }
        let mut sum = 0.0;
        for lane in lanes {
            sum += lane;
        }
        sums.push(sum);
        total += sum;
    }
    let mut sum = 0.0;
    for &weight in rest {
        sum += f64::from(weight);
    }
    sums.push(sum);
    total + sum
}

/// For where to cut off tokens that are less likely.
struct Search<'a> {
    logits: &'a [f32],
    largest: f32,
    temperature: f32,
    candidates: &'a mut Vec<(f32, f32)>,
}

impl Search<'_> {
    /// Keeps the largest logits until they count `enough`, each what `counts` makes of its weight, and what equals the last of
    /// them; all if there are not enough.
    #[inline(always)]
    fn keep(&mut self, weights: &mut [f32], enough: f64, counts: impl Fn(f32) -> f64) {
        for distance in DISTANCES {
            self.gather(weights, self.largest - distance * self.temperature);
            if let Some(last) = last_of(self.candidates, enough, &counts) {
                for (weight, &x) in weights.iter_mut().zip(self.logits) {
                    *weight = if x >= last { *weight } else { 0.0 };
                }
                return;
            }
        }
    }

    /// Logits that are at least so large, of tokens that have a weight.
    #[inline(always)]
    fn gather(&mut self, weights: &[f32], least: f32) {
        self.candidates.clear();
        let chunks = self.logits.chunks(LANES).zip(weights.chunks(LANES));
        for (logits, weights) in chunks {
            let mut any = false;
            for &x in logits {
                any |= x >= least;
            }
            if any {
                for (&x, &weight) in logits.iter().zip(weights) {
                    if x >= least && weight > 0.0 {
                        self.candidates.push((x, weight));
                    }
                }
            }
        }
    }
}

/// The last of the largest logits that are needed for `enough`, by halves: which half it is in is known without their order.
fn last_of(candidates: &mut [(f32, f32)], enough: f64, counts: impl Fn(f32) -> f64) -> Option<f32> {
    let count = |some: &[(f32, f32)]| some.iter().map(|&(_, weight)| counts(weight)).sum::<f64>();
    if count(candidates) < enough {
        return None;
    }
    let (mut left, mut before) = (candidates, 0.0);
    while left.len() > 1 {
        let (half, mid) = (left.len() / 2, left.len() / 2 - 1);
        left.select_nth_unstable_by(mid, |(a, _), (b, _)| b.total_cmp(a));
        let larger = before + count(&left[..half]);
        if larger >= enough {
            left = &mut left[..half];
        } else {
            (left, before) = (&mut left[half..], larger);
        }
    }
    left.first().map(|&(logit, _)| logit)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::Dtype;
    use crate::backend::{Backend, Edit};
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    fn draw(temperature: f32, top_k: usize, top_p: f32, min_p: f32, uniform: f64) -> Draw {
        Draw { edits: Vec::new(), temperature, top_k, top_p, min_p, uniform }
    }

    /// Rows of a vocabulary: equal, spread evenly, a few likely ones above many, and some that are no numbers.
    fn rows(random: &mut ChaCha8Rng, vocabulary: usize) -> [Vec<f32>; 4] {
        let even = (0..vocabulary).map(|_| random.random_range(-3.0..3.0)).collect::<Vec<f32>>();
        let skewed = even.iter().map(|x| x * 2.0 + if *x > 2.9 { 9.0 } else { 0.0 }).collect();
        let strange = even.iter().enumerate().map(|(i, &x)| match i % 5 {
            1 => f32::NEG_INFINITY,
            2 => f32::INFINITY,
            3 => f32::NAN,
            _ => x,
        });
        [vec![0.25; vocabulary], even.clone(), skewed, strange.collect()]
    }

    #[test]
    fn tokens_are_those_of_the_readable_way() {
        let mut random = ChaCha8Rng::seed_from_u64(7);
        let draws = [
            draw(0.0, 0, 1.0, 0.0, 0.0),
            draw(1.0, 0, 1.0, 0.0, 0.0),
            draw(0.7, 5, 1.0, 0.0, 0.0),
            draw(1.0, 0, 0.9, 0.0, 0.0),
            draw(1.3, 40, 0.5, 0.0, 0.0),
            draw(2.0, 0, 0.999, 0.05, 0.0),
            draw(1e-3, 3, 0.2, 0.5, 0.0),
        ];
        for kernel in Kernel::available() {
            let cpu = Cpu::with_kernel(Dtype::F32, 2, kernel);
            for vocabulary in [1, 2, 7, 33, 64, 1000, 5003] {
                let rows = rows(&mut random, vocabulary);
                let logits = Rows::new(vocabulary, rows.concat());
                for (place, draw) in draws.iter().enumerate() {
                    for uniform in [0.0, 0.31, random.random(), 0.999_99] {
                        let edits = match vocabulary {
                            33.. if place % 2 == 1 => {
                                [(3, 2.0, 0.5), (32, 1.0, f32::NEG_INFINITY), (9999, 1.0, 1.0)]
                                    .map(|(token, penalty, add)| Edit { token, penalty, add })
                                    .to_vec()
                            }
                            _ => Vec::new(),
                        };
                        let draw = Draw { uniform, edits, ..draw.clone() };
                        let draws = [3, 0, 1, 2].map(|row| (row, draw.clone()));
                        let got = cpu.choose(&logits, &draws).unwrap();
                        for ((row, draw), got) in draws.iter().zip(got) {
                            let expected = draw.choose(&rows[*row as usize]);
                            assert_eq!(got, expected, "{kernel:?} row {row} of {vocabulary}: {draw:?}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn where_no_token_is_possible_the_others_go_on() {
        let cpu = Cpu::new(Dtype::F32, 2);
        let logits = Rows::new(2, vec![f32::NAN, f32::NEG_INFINITY, 0.0, 1.0]);
        let draws = [0, 1].map(|row| (row, draw(1.0, 0, 1.0, 0.0, 0.9)));
        assert_eq!(cpu.choose(&logits, &draws).unwrap(), [Err(SamplingError), Ok(1)]);
        assert_eq!(cpu.choose(&logits, &draws[1..]).unwrap(), [Ok(1)]);
        assert_eq!(cpu.choose(&logits, &[]).unwrap(), []);
        let outside = cpu.choose(&logits, &[(2, draw(0.0, 0, 1.0, 0.0, 0.0))]).unwrap_err().to_string();
        assert!(outside.contains("choose") && outside.contains('3'), "{outside}");
    }

    #[test]
    fn tokens_come_as_often_as_they_are_likely() {
        let cpu = Cpu::new(Dtype::F32, 1);
        let logits = Rows::new(3, vec![0.0, 2f32.ln(), 3f32.ln()]);
        let mut counts = [0; 3];
        for i in 0..6000 {
            let uniform = (f64::from(i) + 0.5) / 6000.0;
            let token = cpu.choose(&logits, &[(0, draw(1.0, 0, 1.0, 0.0, uniform))]).unwrap()[0].unwrap();
            counts[token as usize] += 1;
        }
        assert!(
            counts.iter().zip([1000i32, 2000, 3000]).all(|(&got, most)| (got - most).abs() <= 1),
            "{counts:?}"
        );
    }
}
