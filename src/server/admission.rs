//! How many sequences may be in the house, and whether new ones may still come.
//!
//! A place is taken before a prompt is tokenized and given back when its ticket drops, whatever happened meanwhile.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Bounds sequences that run or wait.
#[derive(Debug)]
pub(super) struct Admission {
    places: Arc<Semaphore>,
    capacity: u32,
    draining: AtomicBool,
    /// Has no permits; closed when whoever is still inside must leave.
    cut: Arc<Semaphore>,
}

/// Why a request may not come in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refusal {
    /// It has more sequences than the server would ever hold.
    TooMany {
        capacity: u32,
    },
    Full,
    Draining,
}

impl Admission {
    pub(super) fn new(capacity: usize) -> Self {
        let capacity = u32::try_from(capacity.clamp(1, Semaphore::MAX_PERMITS >> 1)).unwrap_or(u32::MAX);
        let places = Arc::new(Semaphore::new(capacity as usize));
        Self { places, capacity, draining: AtomicBool::new(false), cut: Arc::new(Semaphore::new(0)) }
    }

    /// Takes as many places at once or none.
    pub(super) fn enter(&self, sequences: usize) -> Result<OwnedSemaphorePermit, Refusal> {
        if self.draining() {
            return Err(Refusal::Draining);
        }
        let wanted = u32::try_from(sequences).ok().filter(|&n| n <= self.capacity);
        let wanted = wanted.ok_or(Refusal::TooMany { capacity: self.capacity })?;
        self.places.clone().try_acquire_many_owned(wanted).map_err(|_| Refusal::Full)
    }

    pub(super) fn draining(&self) -> bool {
        self.draining.load(Ordering::Acquire)
    }

    /// From now on nobody comes in.
    pub(super) fn close(&self) {
        self.draining.store(true, Ordering::Release);
    }

    /// Ends every request that is still inside.
    pub(super) fn cut_off(&self) {
        self.cut.close();
    }

    /// Ready once [`Self::cut_off`] was called.
    pub(super) fn when_cut_off(&self) -> impl Future<Output = ()> + Send + 'static {
        let cut = self.cut.clone();
        async move {
            // There never is a permit, so this only ever ends by the closing.
            let _ = cut.acquire_owned().await;
        }
    }

    /// Waits until all have left; `false` if some are still there after `timeout`.
    pub(super) async fn emptied(&self, timeout: Duration) -> bool {
        tokio::time::timeout(timeout, self.places.acquire_many(self.capacity)).await.is_ok()
    }
}
