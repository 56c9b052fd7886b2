//! Work on texts that takes a while: rendering conversations, reading prompts.

use super::generate::draining;
use super::wire::ApiError;
use std::sync::Arc;
use tokio::sync::Semaphore;

/// Threads for it, one for each core: they hold no other request up.
pub(super) struct TextWork {
    turns: Arc<Semaphore>,
}

impl TextWork {
    pub(super) fn new(at_once: usize) -> Self {
        Self { turns: Arc::new(Semaphore::new(at_once)) }
    }

    /// Waits for its turn and works. Work that has begun keeps its turn to its end even if its client goes, so that no more is
    /// ever done at once; who goes while it waits has none done.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, ApiError> {
        let turn = self.turns.clone().acquire_owned().await.map_err(|_| draining())?;
        let work = move || {
            let _turn = turn;
            work()
        };
        tokio::task::spawn_blocking(work).await.map_err(|error| {
            tracing::error!(%error, "text work panicked");
            ApiError::internal()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::mpsc;
    use std::time::Duration;

    #[tokio::test]
    async fn clients_that_go_leave_no_more_work_behind_than_there_are_turns() {
        let (work, begun) = (TextWork::new(2), Arc::new(AtomicUsize::new(0)));
        let (go, wait) = mpsc::sync_channel::<()>(1);
        let wait = Arc::new(std::sync::Mutex::new(wait));
        for _ in 0..8 {
            let (begun, wait) = (begun.clone(), wait.clone());
            let blocked = work.run(move || {
                begun.fetch_add(1, Ordering::SeqCst);
                // Ends when the test has looked.
                let _ = wait.lock().map(|wait| wait.recv());
            });
            // Its client waits a moment and goes.
            assert!(tokio::time::timeout(Duration::from_millis(20), blocked).await.is_err());
        }
        assert_eq!(begun.load(Ordering::SeqCst), 2);
        drop(go);
        assert_eq!(work.run(|| 5).await.unwrap(), 5);
        assert_eq!(begun.load(Ordering::SeqCst), 2, "nobody wanted the others any more");
    }
}
