//! An executor whose steps a test can hold back, or make fail.

use lonas::backend::{BackendError, Draw};
use lonas::model::{Batch, Executor, Logits, Outputs};
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
    /// They give no logits at all, which no correct executor does.
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
            Some(Then::Fail) => {
                Err(BackendError::Library { operation: "step", message: "secret of the backend".into() })
            }
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
