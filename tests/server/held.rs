//! An executor and a classifier whose steps a test can hold back, or make fail.

use lonas::backend::{BackendError, Draw};
use lonas::model::{Batch, Classifier, Executor, Logits, Outputs, TextBatch};
use std::sync::{Arc, Condvar, Mutex};

/// What lets steps through; open at first.
#[derive(Default)]
pub(crate) struct Gate {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// Steps that may still pass; `None` for all.
    steps: Option<usize>,
    then: Then,
}

/// What happens to the steps after the last one that may pass.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Then {
    /// They wait until the gate opens.
    #[default]
    Wait,
    Fail,
    Panic,
    /// They give no numbers at all, which no correct model does.
    Nothing,
}

impl Gate {
    /// Lets so many more steps pass.
    pub(crate) fn after(&self, steps: usize, then: Then) {
        self.set(State { steps: Some(steps), then });
    }

    pub(crate) fn open(&self) {
        self.set(State::default());
    }

    fn set(&self, state: State) {
        *self.state.lock().unwrap() = state;
        self.changed.notify_all();
    }

    /// Waits for its turn; `Some` if this step is not to be computed.
    fn pass(&self) -> Option<Then> {
        let mut state = self.state.lock().unwrap();
        loop {
            match (state.steps, state.then) {
                (None, _) => return None,
                (Some(0), Then::Wait) => state = self.changed.wait(state).unwrap(),
                (Some(0), then) => return Some(then),
                (Some(left), _) => {
                    state.steps = Some(left - 1);
                    return None;
                }
            }
        }
    }
}

/// An executor behind a gate.
pub(crate) struct Held {
    pub(crate) executor: Box<dyn Executor>,
    pub(crate) gate: Arc<Gate>,
}

impl Executor for Held {
    fn forward(&mut self, batch: &Batch) -> Result<Logits, BackendError> {
        self.executor.forward(batch)
    }

    fn sample(&mut self, batch: &Batch, draws: &[(u32, Draw)]) -> Result<Outputs, BackendError> {
        match self.gate.pass() {
            None | Some(Then::Wait) => self.executor.sample(batch, draws),
            Some(Then::Fail) => Err(failure()),
            Some(Then::Panic) => panic!("asked to panic"),
            Some(Then::Nothing) => Ok(Outputs::default()),
        }
    }

    fn vocabulary(&self) -> usize {
        self.executor.vocabulary()
    }

    fn blocks(&self) -> usize {
        self.executor.blocks()
    }

    fn block_size(&self) -> usize {
        self.executor.block_size()
    }
}

fn failure() -> BackendError {
    BackendError::Library { operation: "step", message: "secret of the backend".into() }
}

/// A stand-in for a classifier, behind a gate: [`says`] of each text. The first super-adapter has three labels, the second
/// one number.
pub(crate) struct HeldClassifier {
    pub(crate) gate: Arc<Gate>,
    /// The longest text.
    pub(crate) longest: usize,
}

/// The outputs for a text: they depend on each token, its type and place, and the sub-network.
pub(crate) fn says(text: &[(u32, u32)], adapter: usize, subnetwork: u32) -> Vec<f32> {
    let hash = text.iter().fold(17 + u64::from(subnetwork), |h, &(token, kind)| {
        (h * 31 + u64::from(token) * 2 + u64::from(kind)) % 1_000_003
    });
    let outputs = (0..3).map(|label| ((hash >> (5 * label)) % 97) as f32 / 10.0 - 4.0);
    outputs.take(if adapter == 0 { 3 } else { 1 }).collect()
}

impl Classifier for HeldClassifier {
    fn classify(&mut self, batch: &TextBatch) -> Result<Vec<Vec<f32>>, BackendError> {
        match self.gate.pass() {
            None | Some(Then::Wait) => {}
            Some(Then::Fail) => return Err(failure()),
            Some(Then::Panic) => panic!("asked to panic"),
            Some(Then::Nothing) => return Ok(Vec::new()),
        }
        let text = |rows: &std::ops::Range<usize>| {
            let segment = batch.segments.iter().find(|s| s.rows.contains(&rows.start)).unwrap();
            let both = rows.clone().map(|row| (batch.tokens[row], batch.token_types[row]));
            says(&both.collect::<Vec<_>>(), segment.selection.adapter, segment.selection.subnetwork)
        };
        Ok(batch.texts.iter().map(text).collect())
    }

    fn labels(&self, adapter: usize) -> Option<usize> {
        [3, 1].get(adapter).copied()
    }

    fn max_positions(&self) -> usize {
        self.longest
    }
}
