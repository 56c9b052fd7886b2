//! How long requests and their tokens take.

use super::families::Families;
use prometheus::{Error, HistogramVec};

const TIME_TO_FIRST_TOKEN: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
    80.0, 160.0, 640.0, 2560.0,
];
/// Finer at the low end than is usual: small sub-networks answer within a millisecond or two.
const TOKEN_LATENCY: &[f64] = &[
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5,
    10.0, 20.0, 40.0, 80.0,
];
pub(super) const REQUEST_LATENCY: &[f64] = &[
    0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0,
    240.0, 480.0, 960.0, 1920.0, 7680.0,
];

/// Histograms of seconds.
pub(in crate::server) struct RequestTimes {
    pub(in crate::server) duration: HistogramVec,
    pub(in crate::server) queue: HistogramVec,
    pub(in crate::server) first_token: HistogramVec,
    /// Between two tokens.
    pub(in crate::server) inter_token: HistogramVec,
    /// Mean of one sequence.
    pub(in crate::server) per_token: HistogramVec,
}

impl RequestTimes {
    pub(super) fn new(families: &Families<'_>) -> Result<Self, Error> {
        Ok(Self {
            duration: families.histogram(
                "request_duration_seconds",
                "From a request's arrival to its last token, completed requests.",
                &["endpoint", "subnetwork"],
                REQUEST_LATENCY,
            )?,
            queue: families.histogram(
                "queue_seconds",
                "From submission to the first step of a sequence.",
                &["subnetwork"],
                REQUEST_LATENCY,
            )?,
            first_token: families.histogram(
                "time_to_first_token_seconds",
                "From a request's arrival to its first token, streamed or not.",
                &["endpoint", "subnetwork"],
                TIME_TO_FIRST_TOKEN,
            )?,
            inter_token: families.histogram(
                "inter_token_latency_seconds",
                "Between two tokens of one sequence.",
                &["subnetwork"],
                TOKEN_LATENCY,
            )?,
            per_token: families.histogram(
                "time_per_output_token_seconds",
                "Mean between the tokens of one sequence, one observation a sequence.",
                &["subnetwork"],
                TOKEN_LATENCY,
            )?,
        })
    }
}
