//! Who owns which block of the key-value pool.

/// The blocks that nobody owns.
#[derive(Debug)]
pub(super) struct BlockPool {
    free: Vec<u32>,
    total: usize,
}

impl BlockPool {
    pub(super) fn new(total: usize) -> Self {
        // Popped from the end, so that block 0 goes first.
        Self { free: (0..total as u32).rev().collect(), total }
    }

    /// Gives `owner` blocks until it has `wanted`; gives none at all where too few are free.
    pub(super) fn grow(&mut self, owner: &mut Vec<u32>, wanted: usize) -> bool {
        let missing = wanted.saturating_sub(owner.len());
        if missing > self.free.len() {
            return false;
        }
        owner.extend(self.free.drain(self.free.len() - missing..).rev());
        true
    }

    /// Takes all of the owner's blocks back.
    pub(super) fn release(&mut self, owner: &mut Vec<u32>) {
        self.free.append(owner);
        debug_assert!(self.free.len() <= self.total);
    }

    pub(super) fn free(&self) -> usize {
        self.free.len()
    }

    pub(super) fn total(&self) -> usize {
        self.total
    }
}
