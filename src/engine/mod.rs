//! Continuous batching: which sequences compute what in the next step, and the thread that computes it.
//!
//! `scheduler` is a pure state machine: no clock, no tensor, no await, no channel. `worker` is the thread that asks
//! it for a step, computes the step, and sends what came of it. `handle` is what everybody else holds, `entrance` what it has in
//! common with the engine that classifies texts (`classify`).
//!
//! `blocks` keeps what full blocks hold for sequences that begin alike (the prefix cache).
//!
//! Cancelling: whoever drops a sequence's receiver cancels it. The worker notices before its next step, wherever the
//! sequence is (waiting, in the middle of its prompt, decoding), and its cache blocks are free at once.

mod blocks;
mod classify;
mod entrance;
mod handle;
mod observer;
#[cfg(test)]
mod prefix_tests;
mod request;
mod scheduler;
#[cfg(test)]
mod tests;
mod worker;

pub use classify::{Classified, ClassifierEngine, ClassifyRequest, TextTokens};
pub use handle::{Engine, EngineOptions};
pub use observer::{Load, Observer, Step};
pub use request::{Event, Finish, Request, SubmitError, TokenLogprob};
pub use scheduler::{Planned, Scheduler, Started, StepPlan};
