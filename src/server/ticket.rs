//! A request's accompanying slip: it holds the request's places and counts it exactly once, however it ends.

use super::metrics::{Endpoint, Metrics, NO_SUBNETWORK};
use super::served::ServedSubNetwork;
use super::wire::ApiError;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::OwnedSemaphorePermit;

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    Stop,
    Length,
    /// Classified.
    Done,
    Error,
    Rejected,
    Invalid,
}

impl Outcome {
    fn label(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::Done => "done",
            Self::Error => "error",
            Self::Rejected => "rejected",
            Self::Invalid => "invalid",
        }
    }
}

/// One request from its arrival to its end. Dropped without an outcome, the client has gone.
pub(super) struct Ticket {
    metrics: Arc<Metrics>,
    endpoint: Endpoint,
    subnetwork: Arc<str>,
    started: Instant,
    places: Option<OwnedSemaphorePermit>,
    prompt_tokens: usize,
    generated_tokens: usize,
    first_token_seen: bool,
    ended: bool,
}

impl Ticket {
    pub(super) fn new(metrics: Arc<Metrics>, endpoint: Endpoint) -> Self {
        Self {
            metrics,
            endpoint,
            subnetwork: NO_SUBNETWORK.into(),
            started: Instant::now(),
            places: None,
            prompt_tokens: 0,
            generated_tokens: 0,
            first_token_seen: false,
            ended: false,
        }
    }

    pub(super) fn set_subnetwork(&mut self, sub_network: &ServedSubNetwork) {
        self.subnetwork = self.metrics.label(sub_network.selection.subnetwork);
    }

    pub(super) fn set_places(&mut self, places: OwnedSemaphorePermit) {
        self.places = Some(places);
    }

    /// The engine has taken the request.
    pub(super) fn accepted(&mut self, prompt_tokens: usize, by: &str) {
        self.prompt_tokens = prompt_tokens;
        self.metrics.counts.selected.with_label_values(&[&self.subnetwork, by]).inc();
    }

    /// A sequence's prompt has been computed.
    pub(super) fn prompt_done(&self, tokens: usize) {
        self.metrics.counts.prompt_tokens.with_label_values(&[&self.subnetwork]).inc_by(tokens as u64);
    }

    /// A token came at `at`; `before` is when the sequence's last one came.
    pub(super) fn token(&mut self, at: Instant, before: Option<Instant>) {
        self.generated_tokens += 1;
        self.metrics.counts.generated_tokens.with_label_values(&[&self.subnetwork]).inc();
        if !self.first_token_seen {
            self.first_token_seen = true;
            let labels = [self.endpoint.label(), &*self.subnetwork];
            let waited = at.saturating_duration_since(self.started).as_secs_f64();
            self.metrics.times.first_token.with_label_values(&labels).observe(waited);
        }
        if let Some(before) = before {
            let gap = at.saturating_duration_since(before).as_secs_f64();
            self.metrics.times.inter_token.with_label_values(&[&self.subnetwork]).observe(gap);
        }
    }

    /// A sequence of so many tokens has ended; `span` lies between its first and its last one.
    pub(super) fn sequence_done(&self, tokens: usize, span: Duration) {
        if tokens > 1 {
            let mean = span.as_secs_f64() / (tokens - 1) as f64;
            self.metrics.times.per_token.with_label_values(&[&self.subnetwork]).observe(mean);
        }
    }

    pub(super) fn generated_tokens(&self) -> usize {
        self.generated_tokens
    }

    pub(super) fn prompt_tokens(&self) -> usize {
        self.prompt_tokens
    }

    /// The request ends: counted now, not when the slip is dropped, so that a client that has seen the end of its
    /// answer also finds it in the metrics.
    pub(super) fn end(&mut self, outcome: Outcome) {
        if self.ended {
            return;
        }
        self.places = None;
        self.record(outcome.label());
        if matches!(outcome, Outcome::Stop | Outcome::Length | Outcome::Done) {
            let (metrics, labels) = (&self.metrics, [self.endpoint.label(), &*self.subnetwork]);
            let took = self.started.elapsed().as_secs_f64();
            metrics.times.duration.with_label_values(&labels).observe(took);
            let subnetwork = [&*self.subnetwork];
            metrics.counts.prompt_length.with_label_values(&subnetwork).observe(self.prompt_tokens as f64);
            if outcome != Outcome::Done {
                let generated = self.generated_tokens as f64;
                metrics.counts.answer_length.with_label_values(&subnetwork).observe(generated);
            }
        }
    }

    fn record(&mut self, outcome: &str) {
        self.ended = true;
        self.metrics
            .counts
            .ended
            .with_label_values(&[self.endpoint.label(), &*self.subnetwork, outcome])
            .inc();
    }

    /// The request ends with an error that the client sees.
    pub(super) fn fail(&mut self, error: &ApiError) {
        let rejected = |reason: &str| self.metrics.counts.rejected.with_label_values(&[reason]).inc();
        match error.code {
            Some("queue_full") => rejected("queue_full"),
            Some("shutting_down") => rejected("drain"),
            Some("context_length_exceeded") => rejected("too_long"),
            _ => {}
        }
        self.end(match error.status.as_u16() {
            503 => Outcome::Rejected,
            400..=499 => Outcome::Invalid,
            _ => Outcome::Error,
        });
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if !self.ended {
            self.record("cancelled");
        }
    }
}
