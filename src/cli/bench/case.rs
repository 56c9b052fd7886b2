//! One thing to measure: its steps, what they demand, and the seconds that they took.

use super::Failure;
use crate::backend::{Draw, Segment, Selection, SequenceSpan};
use crate::model::{Batch, Executor, MultiplyAdds};
use std::time::Instant;

/// What is measured of a sub-network or of the mix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::cli) enum Test {
    /// One prompt, in the server's steps.
    Prefill { prompt: usize },
    /// `streams` sequences with this much context, one token each a step.
    Decode { context: usize, streams: usize, steps: usize },
}

impl Test {
    pub(in crate::cli) fn tokens(self) -> usize {
        match self {
            Self::Prefill { prompt } => prompt,
            Self::Decode { streams, steps, .. } => streams * steps,
        }
    }

    pub(super) fn streams(self) -> usize {
        match self {
            Self::Prefill { .. } => 1,
            Self::Decode { streams, .. } => streams,
        }
    }

    /// Steps before the next case's turn. The first of them finds another sub-network's weights in the caches, so there are
    /// several where they are short.
    fn steps_in_turn(self) -> usize {
        match self {
            Self::Prefill { .. } => 1,
            Self::Decode { .. } => 8,
        }
    }
}

/// Who computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::cli) enum Mix {
    /// One sub-network, by its index.
    One { index: usize, adapter: bool },
    /// All sub-networks share the streams.
    All,
}

/// One thing to measure, with what was measured so far.
pub(in crate::cli) struct Case {
    pub(super) test: Test,
    pub(super) mix: Mix,
    /// Streams take turns through these.
    pub(super) selections: Vec<Selection>,
    batches: Vec<Batch>,
    /// Of all steps together.
    pub(super) traffic: usize,
    pub(super) multiply_adds: MultiplyAdds,
    /// By round, all steps together.
    pub(in crate::cli) seconds: Vec<f64>,
}

impl Case {
    pub(super) fn steps(&self) -> usize {
        self.batches.len()
    }

    /// For tests of what is worked out from seconds.
    #[cfg(test)]
    pub(super) fn with_seconds(test: Test, mix: Mix, sub_networks: usize, seconds: &[f64]) -> Self {
        let shape = std::sync::Arc::new(crate::supernet::ActiveShape { linears: Vec::new() });
        let selection = Selection { adapter: 0, subnetwork: 0, shape };
        Self {
            test,
            mix,
            selections: vec![selection; sub_networks],
            batches: Vec::new(),
            traffic: 0,
            multiply_adds: MultiplyAdds::default(),
            seconds: seconds.to_vec(),
        }
    }
}

/// The same widths, the base alone.
pub(super) fn without_adapter(selection: &Selection) -> Selection {
    // Without a super-adapter of that number, only the base is left.
    Selection { adapter: usize::MAX, ..selection.clone() }
}

/// Which sub-network a stream runs where `count` share the streams; streams of one stand together, as the engine would
/// have them.
pub(super) fn owner(stream: usize, streams: usize, count: usize) -> usize {
    let mut owners = (0..streams).map(|s| s % count).collect::<Vec<_>>();
    owners.sort_unstable();
    owners[stream]
}

/// Runs steps on an executor whose pool is divided among streams.
pub(in crate::cli) struct Driver<'a> {
    executor: &'a mut dyn Executor,
    blocks_each: usize,
    step_tokens: usize,
    /// Whether steps end with the likeliest tokens, not with logits.
    draws: bool,
}

impl<'a> Driver<'a> {
    /// Every stream has room for `stream_tokens` positions.
    pub(in crate::cli) fn new(
        executor: &'a mut dyn Executor,
        stream_tokens: usize,
        step_tokens: usize,
    ) -> Self {
        let blocks_each = stream_tokens.div_ceil(executor.block_size());
        Self { executor, blocks_each, step_tokens, draws: false }
    }

    /// Where logits are on another machine than this program, `draws` leaves them there, as the server does.
    pub(in crate::cli) fn drawing(self, draws: bool) -> Self {
        Self { draws, ..self }
    }

    fn run(&mut self, batch: &Batch) -> Result<(), Failure> {
        if self.draws {
            let likeliest =
                Draw { edits: Vec::new(), temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, uniform: 0.0 };
            let draws =
                (0..batch.outputs.len() as u32).map(|row| (row, likeliest.clone())).collect::<Vec<_>>();
            self.executor.sample(batch, &draws)?;
        } else {
            self.executor.forward(batch)?;
        }
        Ok(())
    }

    pub(in crate::cli) fn case(&self, test: Test, mix: Mix, selections: &[Selection]) -> Case {
        let batches = match test {
            Test::Prefill { prompt } => self.prefill(0, prompt, &selections[0]),
            Test::Decode { context, streams, steps } => {
                (context..context + steps).map(|p| self.decode(p, streams, selections)).collect()
            }
        };
        let mut multiply_adds = MultiplyAdds::default();
        for of_step in batches.iter().map(|b| self.executor.multiply_adds(b)) {
            multiply_adds += of_step;
        }
        let traffic = batches.iter().map(|b| self.executor.traffic(b)).sum();
        Case {
            test,
            mix,
            selections: selections.to_vec(),
            batches,
            traffic,
            multiply_adds,
            seconds: Vec::new(),
        }
    }

    /// Computes `tokens` positions of one stream, so that there is something to attend to.
    pub(in crate::cli) fn fill(
        &mut self,
        stream: usize,
        tokens: usize,
        by: &Selection,
    ) -> Result<(), Failure> {
        for batch in self.prefill(stream, tokens, by) {
            self.executor.forward(&batch)?;
        }
        Ok(())
    }

    /// One step that does not count.
    pub(in crate::cli) fn warm_up(&mut self, case: &Case) -> Result<(), Failure> {
        if let Some(first) = case.batches.first() {
            self.run(first)?;
        }
        Ok(())
    }

    /// Times all steps of each case of one test once. Cases take turns after a few steps, because a machine that is shared with others
    /// has a speed that changes within a second; another one begins each `round`, so that none always follows the same one.
    pub(in crate::cli) fn round(&mut self, cases: &mut [Case], round: usize) -> Result<(), Failure> {
        let first = round % cases.len().max(1);
        cases.iter_mut().for_each(|case| case.seconds.push(0.0));
        let steps = cases.iter().map(Case::steps).max().unwrap_or(0);
        let in_turn = cases.first().map_or(1, |case| case.test.steps_in_turn());
        for start in (0..steps).step_by(in_turn) {
            for turn in (first..cases.len()).chain(0..first) {
                let case = &mut cases[turn];
                let began = Instant::now();
                for batch in case.batches.iter().skip(start).take(in_turn) {
                    self.run(batch)?;
                }
                if let Some(seconds) = case.seconds.last_mut() {
                    *seconds += began.elapsed().as_secs_f64();
                }
            }
        }
        Ok(())
    }

    /// The steps of one prompt; its last position's logits are wanted.
    fn prefill(&self, stream: usize, tokens: usize, by: &Selection) -> Vec<Batch> {
        let starts = (0..tokens).step_by(self.step_tokens);
        let step = |start: usize| {
            let mut batch = Batch::default();
            let end = (start + self.step_tokens).min(tokens);
            self.push(&mut batch, stream, start..end, by);
            if end < tokens {
                batch.outputs.clear();
            }
            batch
        };
        starts.map(step).collect()
    }

    /// One step of a whole prompt; the logits of its last `outputs` positions are wanted.
    pub(super) fn whole(&self, tokens: usize, outputs: usize, by: &Selection) -> Batch {
        let mut batch = Batch::default();
        self.push(&mut batch, 0, 0..tokens, by);
        batch.outputs = (tokens.saturating_sub(outputs) as u32..tokens as u32).collect();
        batch
    }

    /// One token of each stream, all at the same position.
    fn decode(&self, position: usize, streams: usize, selections: &[Selection]) -> Batch {
        let mut batch = Batch::default();
        for stream in 0..streams {
            let by = &selections[owner(stream, streams, selections.len())];
            self.push(&mut batch, stream, position..position + 1, by);
        }
        batch
    }

    /// Appends positions of a stream; the logits of the last one are wanted.
    fn push(&self, batch: &mut Batch, stream: usize, positions: std::ops::Range<usize>, by: &Selection) {
        let rows = batch.tokens.len()..batch.tokens.len() + positions.len();
        // Any tokens, but not the same ones: multiples of two primes.
        let token = |p: usize| ((1000 + stream * 7919 + p * 104_729) % self.executor.vocabulary()) as u32;
        batch.tokens.extend(positions.clone().map(token));
        batch.positions.extend(positions.clone().map(|p| p as u32));
        batch.outputs.push(rows.end as u32 - 1);
        let first = (stream * self.blocks_each) as u32;
        let blocks = (first..first + self.blocks_each as u32).collect();
        batch.spans.push(SequenceSpan { rows: rows.clone(), start: positions.start, blocks });
        match batch.segments.last_mut() {
            Some(segment) if segment.selection == *by => segment.rows.end = rows.end,
            _ => batch.segments.push(Segment { rows, selection: by.clone() }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::BackendError;
    use crate::model::Logits;
    use crate::supernet::ActiveShape;
    use std::sync::Arc;

    /// Notes of each step whose it was and where it began.
    #[derive(Default)]
    struct Noting(Vec<(u32, usize)>);

    impl Executor for Noting {
        fn forward(&mut self, batch: &Batch) -> Result<Logits, BackendError> {
            self.0.push((batch.segments[0].selection.subnetwork, batch.spans[0].start));
            Ok(Logits { values: Vec::new(), vocabulary: 4 })
        }

        fn vocabulary(&self) -> usize {
            4
        }

        fn blocks(&self) -> usize {
            64
        }

        fn block_size(&self) -> usize {
            16
        }
    }

    /// Runs rounds 0 and 1 of three cases of one test, of sub-networks 0, 1 and 2; the steps of each round.
    fn rounds(test: Test) -> [Vec<(u32, usize)>; 2] {
        let mut executor = Noting::default();
        let mut cases = (0..3)
            .map(|subnetwork| {
                let shape = Arc::new(ActiveShape { linears: Vec::new() });
                let by = Selection { adapter: 0, subnetwork, shape };
                let one = Mix::One { index: subnetwork as usize, adapter: true };
                Driver::new(&mut executor, 64, 10).case(test, one, &[by])
            })
            .collect::<Vec<_>>();
        let rounds = [0, 1].map(|round| {
            Driver::new(&mut executor, 64, 10).round(&mut cases, round).unwrap();
            std::mem::take(&mut executor.0)
        });
        assert!(cases.iter().all(|case| case.seconds.len() == 2 && case.seconds.iter().all(|&s| s > 0.0)));
        rounds
    }

    #[test]
    fn cases_take_turns_and_each_round_begins_with_another_one() {
        let steps = |turns: &[u32], starts: &[usize]| {
            turns.iter().flat_map(|&of| starts.iter().map(move |&start| (of, start))).collect::<Vec<_>>()
        };
        let [first, second] = rounds(Test::Decode { context: 5, streams: 1, steps: 11 });
        let (eight, three) = ((5..13).collect::<Vec<_>>(), (13..16).collect::<Vec<_>>());
        assert_eq!(first, [steps(&[0, 1, 2], &eight), steps(&[0, 1, 2], &three)].concat());
        assert_eq!(second, [steps(&[1, 2, 0], &eight), steps(&[1, 2, 0], &three)].concat());

        // A prompt's steps are long: each is a turn.
        let [first, second] = rounds(Test::Prefill { prompt: 25 });
        let turns = |order: &[u32]| [0, 10, 20].map(|start| steps(order, &[start])).concat();
        assert_eq!([first, second], [turns(&[0, 1, 2]), turns(&[1, 2, 0])]);
    }
}
