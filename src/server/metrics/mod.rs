//! What `/metrics` tells, in Prometheus's text format.
//!
//! Label values come from closed sets only: `subnetwork` is a registered `NAME:SUBNETWORK` or `none`, `route` a route's
//! pattern. Nothing that a client writes becomes a label.

mod engine;
mod families;
mod requests;
mod times;

use super::served::{ServedModels, ServedSubNetwork};
use axum::http::{Method, StatusCode};
use engine::EngineState;
use families::Families;
use prometheus::{HistogramVec, IntCounterVec, Registry, TextEncoder};
use requests::RequestCounts;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;
use times::{REQUEST_LATENCY, RequestTimes};

/// The label of requests that never got a sub-network.
pub(super) const NO_SUBNETWORK: &str = "none";

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
    pub(super) counts: RequestCounts,
    pub(super) times: RequestTimes,
    pub(super) engine: EngineState,
    http_requests: IntCounterVec,
    http_duration: HistogramVec,
}

impl Metrics {
    /// Registers every family and the closed set of sub-networks.
    ///
    /// # Errors
    /// None with these names; the registry checks them.
    pub fn new(models: &ServedModels, info: &RunInfo) -> Result<Self, prometheus::Error> {
        let registry = Registry::new();
        let families = Families(&registry);
        let exchange = &["route", "method", "status"];
        let metrics = Self {
            labels: models.sub_networks().map(|s| (s.selection.subnetwork, s.label.clone())).collect(),
            counts: RequestCounts::new(&families)?,
            times: RequestTimes::new(&families)?,
            engine: EngineState::new(&families)?,
            http_requests: families.counter("http_requests_total", "HTTP requests.", exchange)?,
            http_duration: families.histogram(
                "http_request_duration_seconds",
                "From an HTTP request's arrival to the head of its answer.",
                exchange,
                REQUEST_LATENCY,
            )?,
            registry,
        };
        describe(&metrics.registry, models, info)?;
        metrics.begin_at_zero(models);
        Ok(metrics)
    }

    /// Zeros for everything that can be counted from the start: a series that appears only with its first event hides
    /// that event from rates.
    fn begin_at_zero(&self, models: &ServedModels) {
        for ServedSubNetwork { label, .. } in models.sub_networks() {
            for family in [&self.engine.running, &self.engine.waiting] {
                family.with_label_values(&[label]).set(0);
            }
            let counters =
                [&self.counts.prompt_tokens, &self.counts.generated_tokens, &self.engine.preemptions];
            for family in counters {
                family.with_label_values(&[label]);
            }
        }
        for reason in ["queue_full", "too_long", "auth", "drain"] {
            self.counts.rejected.with_label_values(&[reason]);
        }
    }

    /// Every sub-network's process-wide id and label.
    pub(super) fn labels(&self) -> impl Iterator<Item = (u32, &str)> {
        self.labels.iter().map(|(&id, label)| (id, &**label))
    }

    /// The label of a sub-network by its process-wide id.
    pub(super) fn label(&self, subnetwork: u32) -> &str {
        self.labels.get(&subnetwork).map_or(NO_SUBNETWORK, AsRef::as_ref)
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

/// The families that only say what is loaded.
fn describe(registry: &Registry, models: &ServedModels, info: &RunInfo) -> Result<(), prometheus::Error> {
    let families = Families(registry);
    let build = families.gauge("build_info", "The program; always 1.", &["version"])?;
    build.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
    let labels = &["model", "base", "dtype", "device"];
    let loaded = families.gauge("model_info", "A loaded super-adapter; always 1.", labels)?;
    let labels = &["subnetwork", "model", "name"];
    let named = families.gauge("subnetwork_info", "A served sub-network; always 1.", labels)?;
    let subnetwork = &["subnetwork"];
    let parameters = families.gauge("subnetwork_params", "Linear weights of a sub-network.", subnetwork)?;
    let accuracy =
        families.ratio("subnetwork_accuracy_ratio", "Mean score over the catalog's tasks.", subnetwork)?;
    for model in models.models() {
        loaded.with_label_values(&[&model.name, &model.base, &info.dtype, &info.device]).set(1);
        for s in &model.sub_networks {
            named.with_label_values(&[&*s.label, &model.name, &s.name]).set(1);
            let linear = i64::try_from(s.cost.parameters).unwrap_or(i64::MAX);
            parameters.with_label_values(&[&s.label]).set(linear);
            if !s.scores.is_empty() {
                let mean = s.scores.values().sum::<f64>() / s.scores.len() as f64;
                accuracy.with_label_values(&[&s.label]).set(mean);
            }
        }
    }
    #[cfg(target_os = "linux")]
    registry.register(Box::new(prometheus::process_collector::ProcessCollector::for_self()))?;
    Ok(())
}
