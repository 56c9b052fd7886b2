//! What is counted of each request and of each of its tokens.

use super::families::Families;
use prometheus::{Error, HistogramVec, IntCounterVec};

const TOKENS: &[f64] =
    &[1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5];

/// Requests and tokens.
pub(in crate::server) struct RequestCounts {
    /// By endpoint, sub-network and outcome.
    pub(in crate::server) ended: IntCounterVec,
    pub(in crate::server) selected: IntCounterVec,
    pub(in crate::server) rejected: IntCounterVec,
    pub(in crate::server) prompt_tokens: IntCounterVec,
    pub(in crate::server) generated_tokens: IntCounterVec,
    /// Of one request.
    pub(in crate::server) prompt_length: HistogramVec,
    pub(in crate::server) answer_length: HistogramVec,
}

impl RequestCounts {
    pub(super) fn new(families: &Families<'_>) -> Result<Self, Error> {
        let subnetwork = &["subnetwork"];
        Ok(Self {
            ended: families.counter(
                "requests_total",
                "Requests by how they ended.",
                &["endpoint", "subnetwork", "outcome"],
            )?,
            selected: families.counter(
                "subnetwork_selected_total",
                "Accepted requests by what chose the sub-network.",
                &["subnetwork", "by"],
            )?,
            rejected: families.counter("rejected_total", "Requests turned away.", &["reason"])?,
            prompt_tokens: families.counter(
                "prompt_tokens_total",
                "Prompt tokens of computed requests.",
                subnetwork,
            )?,
            generated_tokens: families.counter("generated_tokens_total", "Tokens generated.", subnetwork)?,
            prompt_length: families.histogram(
                "request_prompt_tokens",
                "Prompt tokens of one completed request.",
                subnetwork,
                TOKENS,
            )?,
            answer_length: families.histogram(
                "request_generated_tokens",
                "Generated tokens of one completed request.",
                subnetwork,
                TOKENS,
            )?,
        })
    }
}
