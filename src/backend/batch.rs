//! What one step computes, beside its tokens: who uses which sub-network, and where each sequence keeps its context.

use crate::supernet::ActiveShape;
use std::ops::Range;
use std::sync::Arc;

/// One sub-network of one loaded super-adapter.
#[derive(Debug, Clone)]
pub struct Selection {
    /// Which loaded super-adapter.
    pub adapter: usize,
    /// Which registered sub-network: unique in the process and never given twice, so equal ids mean equal weights. What is
    /// kept of a sub-network from one step to another goes by this, not by its name.
    pub subnetwork: u32,
    /// The sizes that it leaves of every Linear.
    pub shape: Arc<ActiveShape>,
}

impl PartialEq for Selection {
    fn eq(&self, other: &Self) -> bool {
        (self.adapter, self.subnetwork) == (other.adapter, other.subnetwork)
    }
}

impl Eq for Selection {}

/// Consecutive rows of a batch that run the same sub-network of the same super-adapter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    pub rows: Range<usize>,
    pub selection: Selection,
}

/// Consecutive rows of a batch that belong to one sequence, at consecutive positions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SequenceSpan {
    pub rows: Range<usize>,
    /// The position of the first row: as many positions are already in the cache.
    pub start: usize,
    /// The cache blocks of positions `0..`, in order; enough for `start + rows.len()` positions. Empty without a cache.
    pub blocks: Vec<u32>,
}

/// Heads of one attention layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AttentionShape {
    /// `N`
    pub query_heads: usize,
    /// `K`, a divisor of `N`; query head `n` reads key-value head `n / (N / K)`.
    pub kv_heads: usize,
    /// `D`; scores are scaled by `1 / sqrt(D)`.
    pub head_size: usize,
}

/// The size of a key-value pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheLayout {
    pub layers: usize,
    pub kv_heads: usize,
    pub head_size: usize,
    pub blocks: usize,
    /// Positions in one block.
    pub block_size: usize,
}

impl CacheLayout {
    /// Floats of keys and values together.
    pub fn floats(&self) -> usize {
        2 * self.layers * self.kv_heads * self.head_size * self.blocks * self.block_size
    }
}
