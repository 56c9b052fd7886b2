//! What everybody but the engine itself holds.

use super::observer::Observer;
use super::worker::{Submission, Worker};
use super::{Event, Request, SubmitError};
use crate::model::Executor;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
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
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self { max_running: 64, max_waiting: 256, step_tokens: 256 }
    }
}

/// A running engine. Dropping it stops the thread after its current step; sequences that are not done fail.
pub struct Engine {
    shared: Arc<Shared>,
    submissions: Mutex<Option<SyncSender<Submission>>>,
    thread: Mutex<Option<JoinHandle<()>>>,
    /// The most tokens that one sequence can ever hold.
    capacity: usize,
    /// Sequences that run or wait.
    max_active: usize,
}

/// What handle and worker both see.
#[derive(Default)]
pub(super) struct Shared {
    /// Sequences accepted and not yet ended.
    pub(super) active: AtomicUsize,
    /// No sequence is accepted any more.
    pub(super) draining: AtomicBool,
    /// The worker is to end after its current step.
    pub(super) stopping: AtomicBool,
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
        let shared = Arc::new(Shared::default());
        let max_active = options.max_running.max(1) + options.max_waiting.max(1);
        // Every message carries a sequence that has a place, so sending never blocks.
        let (submissions, received) = sync_channel(max_active);
        let worker = Worker::new(executor, options, observer, Arc::clone(&shared), received);
        let thread = std::thread::Builder::new().name("lonas-engine".into()).spawn(move || worker.run())?;
        let (submissions, thread) = (Mutex::new(Some(submissions)), Mutex::new(Some(thread)));
        Ok(Self { shared, submissions, thread, capacity, max_active })
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
        if self.shared.draining.load(Ordering::Acquire) {
            return Err(SubmitError::Stopped);
        }
        for request in &requests {
            let tokens = request.prompt.len() + request.max_tokens;
            if tokens > self.capacity || request.prompt.is_empty() {
                return Err(SubmitError::TooLong { tokens, limit: self.capacity });
            }
        }
        let sender = self.submissions.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let sender = sender.ok_or(SubmitError::Stopped)?;
        self.reserve(requests.len())?;
        let count = requests.len();
        let mut receivers = Vec::with_capacity(count);
        for request in requests {
            // Room for everything that a sequence can ever send, so that the engine never waits for a reader.
            let (events, receiver) = mpsc::channel(request.max_tokens + 4);
            let submission = Submission { request, events, submitted: Instant::now() };
            if sender.try_send(submission).is_err() {
                self.shared.active.fetch_sub(count - receivers.len(), Ordering::AcqRel);
                return Err(SubmitError::Stopped);
            }
            receivers.push(receiver);
        }
        Ok(receivers)
    }

    /// Takes `count` places at once. Running and waiting sequences are counted together: what has just come in waits
    /// until the next step even where it could run, and a burst must not be refused for that.
    fn reserve(&self, count: usize) -> Result<(), SubmitError> {
        let places = |active: usize| (active + count <= self.max_active).then_some(active + count);
        let taken = self.shared.active.fetch_update(Ordering::AcqRel, Ordering::Acquire, places);
        taken.map(drop).map_err(|_| SubmitError::QueueFull { limit: self.max_active })
    }

    /// The most tokens, prompt and output together, that one sequence can hold.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Sequences accepted and not yet ended.
    pub fn active(&self) -> usize {
        self.shared.active.load(Ordering::Acquire)
    }

    /// Whether the engine's thread is alive and takes sequences.
    pub fn is_accepting(&self) -> bool {
        let alive = |thread: &Option<JoinHandle<()>>| thread.as_ref().is_some_and(|t| !t.is_finished());
        let alive = alive(&self.thread.lock().unwrap_or_else(PoisonError::into_inner));
        alive && !self.shared.draining.load(Ordering::Acquire)
    }

    /// Accepts nothing more from now on.
    pub fn refuse(&self) {
        self.shared.draining.store(true, Ordering::Release);
    }

    /// Accepts nothing more and waits until every sequence has ended, `timeout` at most. Returns whether all have.
    pub async fn drain(&self, timeout: Duration) -> bool {
        self.refuse();
        let deadline = Instant::now() + timeout;
        while self.active() > 0 && Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        self.active() == 0
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.refuse();
        self.shared.stopping.store(true, Ordering::Release);
        drop(self.submissions.lock().unwrap_or_else(PoisonError::into_inner).take());
        if let Some(thread) = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take() {
            // It only fails if the worker panicked, and then there is nothing left to stop.
            let _ = thread.join();
        }
    }
}
