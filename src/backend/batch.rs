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

/// Heads of one attention layer, and what a row sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AttentionShape {
    /// `N`
    pub query_heads: usize,
    /// `K`, a divisor of `N`; query head `n` reads key-value head `n / (N / K)`.
    pub kv_heads: usize,
    /// `D`; scores are scaled by `1 / sqrt(D)`.
    pub head_size: usize,
    pub sight: Sight,
    /// Whether distance counts against a score (ALiBi, Press et al. 2022): `slope * (position - own position)` is added to it,
    /// with the slope of the query head, see [`alibi_slopes`].
    pub alibi: bool,
}

/// Which positions of its sequence a row sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Sight {
    /// Those up to its own.
    Past,
    /// The last so many up to its own.
    Window(usize),
    /// All of them; only without a cache, where sequences are whole.
    All,
}

impl AttentionShape {
    /// Causal attention without a bias.
    pub const fn new(query_heads: usize, kv_heads: usize, head_size: usize) -> Self {
        Self { query_heads, kv_heads, head_size, sight: Sight::Past, alibi: false }
    }
}

/// By query head, how much a score loses for each position of distance: a geometric series from `2^(-8/n)` on for `n` heads, a
/// power of two; for another number, those of the power below it and then every second of those of the power above it.
pub fn alibi_slopes(query_heads: usize) -> Vec<f32> {
    let power = query_heads.max(1).ilog2();
    // Of 2^power heads: slope i is 2^(-8 (i + 1) / 2^power).
    let slope = |power: u32, i: usize| {
        let exponent = -8.0 * (i + 1) as f64 / f64::from(power).exp2();
        exponent.exp2() as f32
    };
    let least = 1 << power;
    let first = (0..least.min(query_heads)).map(|i| slope(power, i));
    let rest = (0..query_heads.saturating_sub(least)).map(|i| slope(power + 1, 2 * i));
    first.chain(rest).collect()
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
