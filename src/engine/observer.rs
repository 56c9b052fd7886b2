//! What the engine tells whoever keeps metrics.

use std::collections::BTreeMap;
use std::time::Duration;

/// One computed step.
#[derive(Debug, Clone, Default)]
pub struct Step {
    pub duration: Duration,
    /// Rows of prompts (and of what is computed again after a preemption).
    pub prefill_tokens: usize,
    /// Rows of single generated tokens.
    pub decode_tokens: usize,
    /// Distinct sub-networks that ran in it.
    pub sub_networks: usize,
    pub load: Load,
}

/// How full the engine is.
#[derive(Debug, Clone, Default)]
pub struct Load {
    /// Sequences by registered sub-network: running and waiting.
    pub by_sub_network: BTreeMap<u32, (usize, usize)>,
    pub blocks_used: usize,
    pub blocks: usize,
}

/// Called on the engine's thread, so it must be quick.
pub trait Observer: Send + Sync {
    /// A step was computed.
    fn step(&self, _step: &Step) {}

    /// Sequences came or went without a step.
    fn load(&self, _load: &Load) {}

    /// A sequence of this sub-network gave its blocks up and will compute its tokens again.
    fn preempted(&self, _subnetwork: u32) {}

    /// A sequence of this sub-network waited this long before its first step.
    fn started(&self, _subnetwork: u32, _waited: Duration) {}

    /// So many tokens of a prompt were looked for in the prefix cache, and so many of them found.
    fn looked_up(&self, _subnetwork: u32, _tokens: usize, _cached: usize) {}
}

impl Observer for () {}
