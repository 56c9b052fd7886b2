//! What everybody but the engine itself holds.

use super::entrance::Entrance;
use super::observer::Observer;
use super::worker::{Submission, Worker};
use super::{Event, Request, SubmitError};
use crate::model::Executor;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

/// Limits of an engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EngineOptions {
    /// Sequences that compute together.
    pub max_running: usize,
    /// Sequences that may wait while as many as may run do.
    pub max_waiting: usize,
    /// Tokens in one step; a longer prompt is computed in chunks.
    pub step_tokens: usize,
    /// Whether what a sequence has computed is kept for others that begin alike, as long as nobody needs the room.
    pub prefix_cache: bool,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self { max_running: 64, max_waiting: 256, step_tokens: 256, prefix_cache: true }
    }
}

impl EngineOptions {
    /// What may run or wait at a time.
    pub(super) fn places(&self) -> usize {
        self.max_running.max(1) + self.max_waiting.max(1)
    }
}

/// A running engine. Dropping it stops the thread after its current step; sequences that are not done fail.
pub struct Engine {
    entrance: Entrance<Submission>,
    /// The most tokens that one sequence can ever hold.
    capacity: usize,
}

impl Engine {
    /// Starts the engine's thread.
    ///
    /// # Errors
    /// The system gives no thread.
    pub fn start(
        executor: Box<dyn Executor>,
        options: EngineOptions,
        observer: Arc<dyn Observer>,
    ) -> std::io::Result<Self> {
        let capacity = executor.blocks() * executor.block_size();
        let run = move |inside| Worker::new(executor, options, observer, inside).run();
        Ok(Self { entrance: Entrance::open("lonas-engine", options.places(), run)?, capacity })
    }

    /// Accepts a sequence or says at once why not. Dropping the receiver cancels the sequence.
    pub fn submit(&self, request: Request) -> Result<mpsc::Receiver<Event>, SubmitError> {
        let mut receivers = self.submit_all(vec![request])?;
        receivers.pop().ok_or(SubmitError::Stopped)
    }

    /// Accepts all of these sequences or none.
    ///
    /// # Errors
    /// No place for all of them, one that could never fit, an engine that drains or has stopped.
    pub fn submit_all(&self, requests: Vec<Request>) -> Result<Vec<mpsc::Receiver<Event>>, SubmitError> {
        for request in &requests {
            let tokens = request.prompt.len() + request.max_tokens;
            if tokens > self.capacity || request.prompt.is_empty() {
                return Err(SubmitError::TooLong { tokens, limit: self.capacity });
            }
        }
        let count = requests.len();
        let sender = self.entrance.reserve(count)?;
        let mut receivers = Vec::with_capacity(count);
        for request in requests {
            // Room for everything that a sequence can ever send, so that the engine never waits for a reader.
            let (events, receiver) = mpsc::channel(request.max_tokens + 4);
            let submission = Submission { request, events, submitted: Instant::now() };
            if sender.try_send(submission).is_err() {
                self.entrance.release(count - receivers.len());
                return Err(SubmitError::Stopped);
            }
            receivers.push(receiver);
        }
        Ok(receivers)
    }

    /// The most tokens, prompt and output together, that one sequence can hold.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Sequences accepted and not yet ended.
    pub fn active(&self) -> usize {
        self.entrance.active()
    }

    /// Whether the engine's thread is alive and takes sequences.
    pub fn is_accepting(&self) -> bool {
        self.entrance.is_accepting()
    }

    /// Accepts nothing more from now on.
    pub fn refuse(&self) {
        self.entrance.refuse();
    }

    /// Accepts nothing more and waits until every sequence has ended, `timeout` at most. Returns whether all have.
    pub async fn drain(&self, timeout: Duration) -> bool {
        self.entrance.drain(timeout).await
    }
}
