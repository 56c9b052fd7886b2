//! What `/metrics` tells, in Prometheus's text format.
//!
//! Label values come from bounded sets only: `subnetwork` is a registered `NAME:SUBNETWORK`, `none`, or `other` after a few
//! thousand names, `route` a route's pattern. Nothing that a client writes becomes a label.

mod described;
mod engine;
mod families;
mod labels;
mod requests;
mod times;

use super::served::{ServedModels, ServedSubNetwork};
use axum::http::{Method, StatusCode};
use described::Described;
use engine::EngineState;
use families::Families;
use labels::Labels;
use prometheus::{HistogramVec, IntCounterVec, Registry, TextEncoder};
use requests::RequestCounts;
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
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
    Classify,
}

impl Endpoint {
    pub(super) fn label(self) -> &'static str {
        match self {
            Self::Completions => "completions",
            Self::Chat => "chat",
            Self::Classify => "classify",
        }
    }
}

/// Every metric family of the server; the engine reports to it as its observer.
pub struct Metrics {
    registry: Registry,
    labels: RwLock<Labels>,
    described: Described,
    /// Labels whose sequences were not zero when the engine last told; see the observer.
    pub(super) busy: Mutex<BTreeSet<Arc<str>>>,
    pub(super) counts: RequestCounts,
    pub(super) times: RequestTimes,
    pub(super) engine: EngineState,
    http_requests: IntCounterVec,
    http_duration: HistogramVec,
}

impl Metrics {
    /// Registers every family and the sub-networks that there are at first.
    ///
    /// # Errors
    /// None with these names; the registry checks them.
    pub fn new(models: &ServedModels, info: &RunInfo) -> Result<Self, prometheus::Error> {
        let registry = Registry::new();
        let families = Families(&registry);
        let exchange = &["route", "method", "status"];
        let metrics = Self {
            labels: RwLock::new(Labels::new()),
            described: Described::new(&families, models, info)?,
            busy: Mutex::default(),
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
        #[cfg(target_os = "linux")]
        metrics.registry.register(Box::new(prometheus::process_collector::ProcessCollector::for_self()))?;
        for model in models.models() {
            model.sub_networks.iter().for_each(|s| metrics.serve(&model.name, s));
        }
        for reason in ["queue_full", "too_long", "auth", "drain"] {
            metrics.counts.rejected.with_label_values(&[reason]);
        }
        Ok(metrics)
    }

    /// A sub-network can be asked for from now on, or something else is known of it. What can be counted begins at zero: a
    /// series that appears only with its first event hides that event from rates.
    pub(super) fn serve(&self, model: &str, sub_network: &ServedSubNetwork) {
        let own = self.labels.write().unwrap_or_else(PoisonError::into_inner).give(sub_network);
        let Some(label) = own else { return };
        self.described.add(model, sub_network);
        for family in [&self.engine.running, &self.engine.waiting] {
            family.with_label_values(&[&label]);
        }
        let EngineState { preemptions, prefix_queried, prefix_hits, .. } = &self.engine;
        let RequestCounts { prompt_tokens, generated_tokens, .. } = &self.counts;
        let counters = [prompt_tokens, generated_tokens, preemptions, prefix_queried, prefix_hits];
        for family in counters {
            family.with_label_values(&[&label]);
        }
    }

    /// A sub-network cannot be asked for any more. What was counted stays, and what still runs is counted.
    pub(super) fn forget(&self, model: &str, sub_network: &ServedSubNetwork) {
        self.described.remove(model, sub_network);
    }

    /// The label of a sub-network by its process-wide id.
    pub(super) fn label(&self, subnetwork: u32) -> Arc<str> {
        let labels = self.labels.read().unwrap_or_else(PoisonError::into_inner);
        labels.get(subnetwork).cloned().unwrap_or_else(|| NO_SUBNETWORK.into())
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
