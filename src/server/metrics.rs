//! What `/metrics` tells, in Prometheus's text format.
//!
//! Label values come from closed sets only: `subnet` is a registered `NAME:SUBNETWORK` or `none`, `route` a route's
//! pattern. Nothing that a client writes becomes a label.

use super::served::ServedModels;
use axum::http::{Method, StatusCode};
use prometheus::core::Collector;
use prometheus::{
    Gauge, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounterVec, IntGaugeVec, Opts, Registry,
    TextEncoder,
};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

/// The label of requests that never got a sub-network.
pub(super) const NO_SUBNET: &str = "none";

const TIME_TO_FIRST_TOKEN: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
    80.0, 160.0, 640.0, 2560.0,
];
/// Finer at the low end than is usual: small sub-networks answer within a millisecond or two.
const TOKEN_LATENCY: &[f64] = &[
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5,
    10.0, 20.0, 40.0, 80.0,
];
const REQUEST_LATENCY: &[f64] = &[
    0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0,
    240.0, 480.0, 960.0, 1920.0, 7680.0,
];
const STEP_SECONDS: &[f64] =
    &[0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];
const TOKENS: &[f64] =
    &[1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5];
const STEP_TOKENS: &[f64] =
    &[1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0];
const STEP_SUBNETWORKS: &[f64] = &[1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 32.0, 64.0];

/// What runs: the values of `lonas_build_info` and `lonas_model_info`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunInfo {
    /// Of the weights in memory, e.g. `bf16`.
    pub dtype: String,
    /// E.g. `cpu`.
    pub device: String,
}

/// Which endpoint a request came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Endpoint {
    Completions,
    Chat,
}

impl Endpoint {
    pub(super) fn label(self) -> &'static str {
        match self {
            Self::Completions => "completions",
            Self::Chat => "chat",
        }
    }
}

/// Every metric family of the server; the engine reports to it as its observer.
pub struct Metrics {
    registry: Registry,
    /// Labels by the process-wide id of a sub-network.
    labels: HashMap<u32, Arc<str>>,
    pub(super) requests: IntCounterVec,
    pub(super) running: IntGaugeVec,
    pub(super) waiting: IntGaugeVec,
    pub(super) request_duration: HistogramVec,
    pub(super) queue: HistogramVec,
    pub(super) time_to_first_token: HistogramVec,
    pub(super) inter_token_latency: HistogramVec,
    pub(super) time_per_output_token: HistogramVec,
    pub(super) prompt_tokens: IntCounterVec,
    pub(super) generated_tokens: IntCounterVec,
    pub(super) request_prompt_tokens: HistogramVec,
    pub(super) request_generated_tokens: HistogramVec,
    pub(super) selected: IntCounterVec,
    pub(super) step_seconds: HistogramVec,
    pub(super) step_tokens: HistogramVec,
    pub(super) step_subnetworks: Histogram,
    pub(super) kv_usage: Gauge,
    pub(super) kv_blocks: IntGaugeVec,
    pub(super) preemptions: IntCounterVec,
    pub(super) rejected: IntCounterVec,
    http_requests: IntCounterVec,
    http_duration: HistogramVec,
    pub(super) last_step: Gauge,
}

impl Metrics {
    /// Registers every family and the closed set of sub-networks.
    ///
    /// # Errors
    /// None with these names; the registry checks them.
    pub fn new(models: &ServedModels, info: &RunInfo) -> Result<Self, prometheus::Error> {
        let r = Registry::new();
        let metrics = Self {
            labels: models.sub_networks().map(|s| (s.selection.subnetwork, s.label.clone())).collect(),
            requests: counter(
                &r,
                "requests_total",
                "Requests by how they ended.",
                &["endpoint", "subnet", "outcome"],
            )?,
            running: gauge(&r, "requests_running", "Sequences in the running batch.", &["subnet"])?,
            waiting: gauge(&r, "requests_waiting", "Sequences waiting for their first step.", &["subnet"])?,
            request_duration: histogram(
                &r,
                "request_duration_seconds",
                "From a request's arrival to its last token, completed requests.",
                &["endpoint", "subnet"],
                REQUEST_LATENCY,
            )?,
            queue: histogram(
                &r,
                "queue_seconds",
                "From submission to the first step of a sequence.",
                &["subnet"],
                REQUEST_LATENCY,
            )?,
            time_to_first_token: histogram(
                &r,
                "time_to_first_token_seconds",
                "From a request's arrival to its first token, streamed or not.",
                &["endpoint", "subnet"],
                TIME_TO_FIRST_TOKEN,
            )?,
            inter_token_latency: histogram(
                &r,
                "inter_token_latency_seconds",
                "Between two tokens of one sequence.",
                &["subnet"],
                TOKEN_LATENCY,
            )?,
            time_per_output_token: histogram(
                &r,
                "time_per_output_token_seconds",
                "Mean between the tokens of one sequence, one observation a sequence.",
                &["subnet"],
                TOKEN_LATENCY,
            )?,
            prompt_tokens: counter(
                &r,
                "prompt_tokens_total",
                "Prompt tokens of computed requests.",
                &["subnet"],
            )?,
            generated_tokens: counter(&r, "generated_tokens_total", "Tokens generated.", &["subnet"])?,
            request_prompt_tokens: histogram(
                &r,
                "request_prompt_tokens",
                "Prompt tokens of one completed request.",
                &["subnet"],
                TOKENS,
            )?,
            request_generated_tokens: histogram(
                &r,
                "request_generated_tokens",
                "Generated tokens of one completed request.",
                &["subnet"],
                TOKENS,
            )?,
            selected: counter(
                &r,
                "subnetwork_selected_total",
                "Accepted requests by what chose the sub-network.",
                &["subnet", "by"],
            )?,
            step_seconds: histogram(
                &r,
                "step_seconds",
                "Duration of one engine step.",
                &["phase"],
                STEP_SECONDS,
            )?,
            step_tokens: histogram(&r, "step_tokens", "Tokens in one engine step.", &["phase"], STEP_TOKENS)?,
            step_subnetworks: plain_histogram(
                &r,
                "step_subnetworks",
                "Distinct sub-networks in one engine step.",
                STEP_SUBNETWORKS,
            )?,
            kv_usage: plain_gauge(&r, "kv_cache_usage_ratio", "Used share of the key-value pool, 0 to 1.")?,
            kv_blocks: gauge(&r, "kv_blocks", "Blocks of the key-value pool.", &["state"])?,
            preemptions: counter(
                &r,
                "preemptions_total",
                "Sequences put back for lack of blocks.",
                &["subnet"],
            )?,
            rejected: counter(&r, "rejected_total", "Requests turned away.", &["reason"])?,
            http_requests: counter(
                &r,
                "http_requests_total",
                "HTTP requests.",
                &["route", "method", "status"],
            )?,
            http_duration: histogram(
                &r,
                "http_request_duration_seconds",
                "From an HTTP request's arrival to the head of its answer.",
                &["route", "method", "status"],
                REQUEST_LATENCY,
            )?,
            last_step: plain_gauge(
                &r,
                "engine_last_step_timestamp_seconds",
                "When the engine finished its last step, Unix time.",
            )?,
            registry: r,
        };
        metrics.describe(models, info)?;
        Ok(metrics)
    }

    /// The families that only say what is loaded, and zeros for everything that can be counted from the start.
    fn describe(&self, models: &ServedModels, info: &RunInfo) -> Result<(), prometheus::Error> {
        let r = &self.registry;
        let build = gauge(r, "build_info", "The program; always 1.", &["version"])?;
        build.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        let loaded = gauge(
            r,
            "model_info",
            "A loaded super-adapter; always 1.",
            &["model", "base", "dtype", "device"],
        )?;
        for model in models.models() {
            loaded.with_label_values(&[&model.name, &model.base, &info.dtype, &info.device]).set(1);
        }
        let named =
            gauge(r, "subnetwork_info", "A served sub-network; always 1.", &["subnet", "model", "name"])?;
        let parameters = gauge(r, "subnetwork_params", "Linear weights of a sub-network.", &["subnet"])?;
        let opts = Opts::new("lonas_subnetwork_accuracy_ratio", "Mean score over the catalog's tasks.");
        let accuracy = registered(r, GaugeVec::new(opts, &["subnet"])?)?;
        for model in models.models() {
            for s in &model.sub_networks {
                named.with_label_values(&[&*s.label, &model.name, &s.name]).set(1);
                parameters
                    .with_label_values(&[&s.label])
                    .set(i64::try_from(s.cost.parameters).unwrap_or(i64::MAX));
                if !s.scores.is_empty() {
                    let mean = s.scores.values().sum::<f64>() / s.scores.len() as f64;
                    accuracy.with_label_values(&[&s.label]).set(mean);
                }
                for family in [&self.running, &self.waiting] {
                    family.with_label_values(&[&s.label]).set(0);
                }
                for family in [&self.prompt_tokens, &self.generated_tokens, &self.preemptions] {
                    family.with_label_values(&[&s.label]);
                }
            }
        }
        for reason in ["queue_full", "too_long", "auth", "drain"] {
            self.rejected.with_label_values(&[reason]);
        }
        #[cfg(target_os = "linux")]
        r.register(Box::new(prometheus::process_collector::ProcessCollector::for_self()))?;
        Ok(())
    }

    /// Every sub-network's process-wide id and label.
    pub(super) fn labels(&self) -> impl Iterator<Item = (u32, &str)> {
        self.labels.iter().map(|(&id, label)| (id, &**label))
    }

    /// The label of a sub-network by its process-wide id.
    pub(super) fn label(&self, subnetwork: u32) -> &str {
        self.labels.get(&subnetwork).map_or(NO_SUBNET, AsRef::as_ref)
    }

    /// One finished HTTP exchange. `route` is a pattern, never a path.
    pub(super) fn http(&self, route: &str, method: &Method, status: StatusCode, took: Duration) {
        let method = match method.as_str() {
            known @ ("GET" | "POST" | "HEAD" | "OPTIONS" | "PUT" | "DELETE" | "PATCH") => known,
            _ => "other",
        };
        let labels = [route, method, status.as_str()];
        self.http_requests.with_label_values(&labels).inc();
        self.http_duration.with_label_values(&labels).observe(took.as_secs_f64());
    }

    /// Everything in the text format.
    pub(super) fn render(&self) -> Result<String, prometheus::Error> {
        TextEncoder::new().encode_to_string(&self.registry.gather())
    }
}

fn registered<C: Collector + Clone + 'static>(
    registry: &Registry,
    family: C,
) -> Result<C, prometheus::Error> {
    registry.register(Box::new(family.clone()))?;
    Ok(family)
}

fn counter(
    r: &Registry,
    name: &str,
    help: &str,
    labels: &[&str],
) -> Result<IntCounterVec, prometheus::Error> {
    registered(r, IntCounterVec::new(Opts::new(format!("lonas_{name}"), help), labels)?)
}

fn gauge(r: &Registry, name: &str, help: &str, labels: &[&str]) -> Result<IntGaugeVec, prometheus::Error> {
    registered(r, IntGaugeVec::new(Opts::new(format!("lonas_{name}"), help), labels)?)
}

fn plain_gauge(r: &Registry, name: &str, help: &str) -> Result<Gauge, prometheus::Error> {
    registered(r, Gauge::new(format!("lonas_{name}"), help)?)
}

fn histogram(
    r: &Registry,
    name: &str,
    help: &str,
    labels: &[&str],
    buckets: &[f64],
) -> Result<HistogramVec, prometheus::Error> {
    let opts = HistogramOpts::new(format!("lonas_{name}"), help).buckets(buckets.to_vec());
    registered(r, HistogramVec::new(opts, labels)?)
}

fn plain_histogram(
    r: &Registry,
    name: &str,
    help: &str,
    buckets: &[f64],
) -> Result<Histogram, prometheus::Error> {
    let opts = HistogramOpts::new(format!("lonas_{name}"), help).buckets(buckets.to_vec());
    registered(r, Histogram::with_opts(opts)?)
}
