//! The way into an engine's thread and out of it again: bounded, counted, and closed once.

use super::SubmitError;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// What everybody but the engine's thread holds. Dropping it stops the thread after its current step.
pub(super) struct Entrance<S> {
    shared: Arc<Shared>,
    submissions: Mutex<Option<SyncSender<S>>>,
    thread: Mutex<Option<JoinHandle<()>>>,
    /// Places: what runs or waits.
    most: usize,
}

/// What both sides see.
#[derive(Default)]
struct Shared {
    /// Places that are taken.
    active: AtomicUsize,
    /// Nothing is accepted any more.
    draining: AtomicBool,
    /// The thread is to end after its current step.
    stopping: AtomicBool,
}

/// What the engine's thread holds.
pub(super) struct Inside<S> {
    shared: Arc<Shared>,
    submissions: Receiver<S>,
}

impl<S: Send + 'static> Entrance<S> {
    /// Starts a thread that computes what comes in, at most `most` places at a time.
    ///
    /// # Errors
    /// The system gives no thread.
    pub(super) fn open(
        name: &str,
        most: usize,
        run: impl FnOnce(Inside<S>) + Send + 'static,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared::default());
        // Every message has a place at least, so sending never blocks.
        let (sender, submissions) = sync_channel(most);
        let inside = Inside { shared: Arc::clone(&shared), submissions };
        let thread = std::thread::Builder::new().name(name.into()).spawn(move || run(inside))?;
        Ok(Self { shared, submissions: Mutex::new(Some(sender)), thread: Mutex::new(Some(thread)), most })
    }

    /// Takes so many places at once or none; what is sent by the sender must have them. Running and waiting ones are counted
    /// together: what has just come in waits until the next step even where it could run, and a burst must not be refused
    /// for that.
    pub(super) fn reserve(&self, count: usize) -> Result<SyncSender<S>, SubmitError> {
        if self.shared.draining.load(Ordering::Acquire) {
            return Err(SubmitError::Stopped);
        }
        let sender = self.submissions.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let sender = sender.ok_or(SubmitError::Stopped)?;
        let places = |active: usize| active.checked_add(count).filter(|&all| all <= self.most);
        let taken = self.shared.active.fetch_update(Ordering::AcqRel, Ordering::Acquire, places);
        taken.map(|_| sender).map_err(|_| SubmitError::QueueFull { limit: self.most })
    }

    /// Gives back places for which nothing could be sent.
    pub(super) fn release(&self, count: usize) {
        self.shared.leave(count);
    }

    /// Places that are taken.
    pub(super) fn active(&self) -> usize {
        self.shared.active.load(Ordering::Acquire)
    }

    /// Whether the thread is alive and takes something.
    pub(super) fn is_accepting(&self) -> bool {
        let alive = |thread: &Option<JoinHandle<()>>| thread.as_ref().is_some_and(|t| !t.is_finished());
        let alive = alive(&self.thread.lock().unwrap_or_else(PoisonError::into_inner));
        alive && !self.shared.draining.load(Ordering::Acquire)
    }

    /// Accepts nothing more from now on.
    pub(super) fn refuse(&self) {
        self.shared.draining.store(true, Ordering::Release);
    }

    /// Accepts nothing more and waits until every place is free, `timeout` at most. Returns whether all are.
    pub(super) async fn drain(&self, timeout: Duration) -> bool {
        self.refuse();
        let deadline = Instant::now() + timeout;
        while self.active() > 0 && Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        self.active() == 0
    }
}

impl<S> Drop for Entrance<S> {
    fn drop(&mut self) {
        self.shared.draining.store(true, Ordering::Release);
        self.shared.stopping.store(true, Ordering::Release);
        drop(self.submissions.lock().unwrap_or_else(PoisonError::into_inner).take());
        if let Some(thread) = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take() {
            // It only fails if the thread panicked, and then there is nothing left to stop.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn leave(&self, count: usize) {
        self.active.fetch_sub(count, Ordering::AcqRel);
    }
}

impl<S> Inside<S> {
    /// What has come in; waits for something if the thread is `idle`. And whether it is to go on.
    pub(super) fn receive(&self, idle: bool) -> (Vec<S>, bool) {
        let mut new = Vec::new();
        if idle {
            match self.submissions.recv() {
                Ok(submission) => new.push(submission),
                Err(_) => return (new, false),
            }
        }
        loop {
            match self.submissions.try_recv() {
                Ok(submission) => new.push(submission),
                Err(TryRecvError::Empty) => return (new, !self.shared.stopping.load(Ordering::Acquire)),
                Err(TryRecvError::Disconnected) => return (new, false),
            }
        }
    }

    /// So many places are free.
    pub(super) fn leave(&self, count: usize) {
        self.shared.leave(count);
    }

    /// Accepts nothing more from now on.
    pub(super) fn close(&self) {
        self.shared.draining.store(true, Ordering::Release);
    }
}
