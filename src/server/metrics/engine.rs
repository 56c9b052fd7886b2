//! What the engine's steps do and how full it is.

use super::families::Families;
use prometheus::{Error, Gauge, Histogram, HistogramVec, IntCounterVec, IntGaugeVec};

const STEP_SECONDS: &[f64] =
    &[0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];
const STEP_TOKENS: &[f64] =
    &[1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0];
const STEP_SUBNETWORKS: &[f64] = &[1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 32.0, 64.0];

/// Steps, sequences and blocks.
pub(in crate::server) struct EngineState {
    pub(in crate::server) running: IntGaugeVec,
    pub(in crate::server) waiting: IntGaugeVec,
    pub(in crate::server) step_seconds: HistogramVec,
    pub(in crate::server) step_tokens: HistogramVec,
    pub(in crate::server) step_subnetworks: Histogram,
    pub(in crate::server) last_step: Gauge,
    pub(in crate::server) kv_usage: Gauge,
    pub(in crate::server) kv_blocks: IntGaugeVec,
    pub(in crate::server) preemptions: IntCounterVec,
    pub(in crate::server) prefix_queried: IntCounterVec,
    pub(in crate::server) prefix_hits: IntCounterVec,
}

impl EngineState {
    pub(super) fn new(families: &Families<'_>) -> Result<Self, Error> {
        let (subnetwork, phase) = (&["subnetwork"], &["phase"]);
        Ok(Self {
            running: families.gauge("requests_running", "Sequences in the running batch.", subnetwork)?,
            waiting: families.gauge(
                "requests_waiting",
                "Sequences waiting for their first step.",
                subnetwork,
            )?,
            step_seconds: families.histogram(
                "step_seconds",
                "Duration of one engine step.",
                phase,
                STEP_SECONDS,
            )?,
            step_tokens: families.histogram(
                "step_tokens",
                "Tokens in one engine step.",
                phase,
                STEP_TOKENS,
            )?,
            step_subnetworks: families.plain_histogram(
                "step_subnetworks",
                "Distinct sub-networks in one engine step.",
                STEP_SUBNETWORKS,
            )?,
            last_step: families.plain_gauge(
                "engine_last_step_timestamp_seconds",
                "When the engine finished its last step, Unix time.",
            )?,
            kv_usage: families
                .plain_gauge("kv_cache_usage_ratio", "Used share of the key-value pool, 0 to 1.")?,
            kv_blocks: families.gauge("kv_blocks", "Blocks of the key-value pool.", &["state"])?,
            preemptions: families.counter(
                "preemptions_total",
                "Sequences put back for lack of blocks.",
                subnetwork,
            )?,
            prefix_queried: families.counter(
                "prefix_cache_queried_tokens_total",
                "Prompt tokens that were looked for in the prefix cache.",
                subnetwork,
            )?,
            prefix_hits: families.counter(
                "prefix_cache_hit_tokens_total",
                "Prompt tokens that were in the prefix cache, so that they were not computed.",
                subnetwork,
            )?,
        })
    }
}
