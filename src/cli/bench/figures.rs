//! From seconds to figures: rates, shares of the machine's bound, ratios within a round.

use super::case::{Case, Mix, Test, owner};
use crate::backend::cpu::Limits;

/// One number by round.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub(in crate::cli) struct Spread {
    pub(in crate::cli) median: f64,
    pub(in crate::cli) min: f64,
    pub(in crate::cli) max: f64,
}

impl Spread {
    /// Of at least one value.
    pub(in crate::cli) fn of(values: impl Iterator<Item = f64>) -> Self {
        let mut sorted = values.collect::<Vec<_>>();
        sorted.sort_by(f64::total_cmp);
        let at = |i: usize| sorted.get(i).copied().unwrap_or(f64::NAN);
        let last = sorted.len().saturating_sub(1);
        // Of an even number the mean of the two in the middle.
        Self { median: (at(last / 2) + at(last.div_ceil(2))) / 2.0, min: at(0), max: at(last) }
    }
}

/// What bounds a step on this machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Bound {
    Memory,
    Arithmetic,
}

/// What was found out about one case.
pub(super) struct Figure {
    pub(super) test: Test,
    pub(super) mix: Mix,
    pub(super) steps: usize,
    pub(super) tokens_per_second: Spread,
    pub(super) seconds_per_step: f64,
    /// Bytes that a step must read, and multiply-adds.
    pub(super) traffic: f64,
    pub(super) multiply_adds: f64,
    pub(super) bound: Bound,
    /// The bound's time over the time taken, median of the rounds.
    pub(super) share: f64,
    /// Of the mix: its time over the mean time of the uniform batches, weighted by streams, median of the rounds.
    pub(super) over_uniform: Option<f64>,
    /// Of a case that was also run without its adapter: which share of its time the adapter takes.
    pub(super) adapter_share: Option<f64>,
}

/// One figure a case, in the same order. `limits` by round.
pub(super) fn figures(cases: &[Case], limits: &[Limits]) -> Vec<Figure> {
    cases.iter().map(|case| figure(case, cases, limits)).collect()
}

fn figure(case: &Case, cases: &[Case], limits: &[Limits]) -> Figure {
    let (tokens, steps) = (case.test.tokens() as f64, case.steps());
    let rounds = case.seconds.iter().zip(limits);
    let share = rounds.map(|(seconds, limits)| bound(case, limits).0 / seconds);
    Figure {
        test: case.test,
        mix: case.mix,
        steps,
        tokens_per_second: Spread::of(case.seconds.iter().map(|s| tokens / s)),
        seconds_per_step: Spread::of(case.seconds.iter().copied()).median / steps as f64,
        traffic: case.traffic as f64 / steps as f64,
        multiply_adds: case.multiply_adds.total() as f64 / steps as f64,
        bound: limits.first().map_or(Bound::Memory, |limits| bound(case, limits).1),
        share: Spread::of(share).median,
        over_uniform: over_uniform(case, cases),
        adapter_share: adapter_share(case, cases),
    }
}

/// The least seconds that the case could take, and why.
fn bound(case: &Case, limits: &Limits) -> (f64, Bound) {
    let memory = case.traffic as f64 / limits.read_bytes_per_second;
    let sums = case.multiply_adds;
    let seconds = |count: usize, peak: Option<f64>| 2.0 * count as f64 / peak.unwrap_or(limits.f32_flops);
    let arithmetic =
        seconds(sums.f32, None) + seconds(sums.bf16, limits.bf16_flops) + seconds(sums.int8, limits.int8_ops);
    if memory >= arithmetic { (memory, Bound::Memory) } else { (arithmetic, Bound::Arithmetic) }
}

fn over_uniform(case: &Case, cases: &[Case]) -> Option<f64> {
    if case.mix != Mix::All {
        return None;
    }
    let streams = case.test.streams();
    let uniform = (0..streams).map(|stream| {
        let index = owner(stream, streams, case.selections.len());
        find(cases, case.test, Mix::One { index, adapter: true })
    });
    let uniform = uniform.collect::<Option<Vec<_>>>()?;
    let ratio = |(round, seconds): (usize, &f64)| {
        seconds * streams as f64 / uniform.iter().map(|c| c.seconds[round]).sum::<f64>()
    };
    Some(Spread::of(case.seconds.iter().enumerate().map(ratio)).median)
}

fn adapter_share(case: &Case, cases: &[Case]) -> Option<f64> {
    let Mix::One { index, adapter: true } = case.mix else { return None };
    let bare = find(cases, case.test, Mix::One { index, adapter: false })?;
    let shares = case.seconds.iter().zip(&bare.seconds).map(|(with, without)| 1.0 - without / with);
    Some(Spread::of(shares).median)
}

fn find(cases: &[Case], test: Test, mix: Mix) -> Option<&Case> {
    cases.iter().find(|c| c.test == test && c.mix == mix)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_of_an_even_number_lies_between_the_middle_two() {
        let spread = |values: &[f64]| Spread::of(values.iter().copied());
        assert_eq!(spread(&[3.0, 1.0, 2.0]), Spread { median: 2.0, min: 1.0, max: 3.0 });
        assert_eq!(spread(&[4.0, 1.0, 2.0, 3.0]).median, 2.5);
        assert_eq!(spread(&[7.0]), Spread { median: 7.0, min: 7.0, max: 7.0 });
    }

    #[test]
    fn a_mix_is_set_beside_the_uniform_batches_by_streams() {
        let tests = Test::Decode { context: 1, streams: 3, steps: 1 };
        let case = |mix, count, seconds: &[f64]| Case::with_seconds(tests, mix, count, seconds);
        let one = |index, adapter| Mix::One { index, adapter };
        let cases = [
            case(one(0, true), 1, &[1.0, 2.0]),
            case(one(0, false), 1, &[0.5, 1.0]),
            case(one(1, true), 1, &[4.0, 8.0]),
            case(Mix::All, 2, &[4.0, 8.0]),
        ];
        // Two streams of the first, one of the second: (1 + 1 + 4) / 3 = 2.
        assert_eq!(over_uniform(&cases[3], &cases), Some(2.0));
        assert_eq!(over_uniform(&cases[0], &cases), None);
        assert_eq!(adapter_share(&cases[0], &cases), Some(0.5));
        assert_eq!(adapter_share(&cases[2], &cases), None);
    }
}
