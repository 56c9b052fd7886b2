//! Making and registering metric families, each under the program's prefix.

use prometheus::core::Collector;
use prometheus::{
    Error, Gauge, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounterVec, IntGaugeVec, Opts,
    Registry,
};

/// Puts families into one registry. Names are given without the prefix.
pub(super) struct Families<'a>(pub(super) &'a Registry);

impl Families<'_> {
    pub(super) fn counter(&self, name: &str, help: &str, labels: &[&str]) -> Result<IntCounterVec, Error> {
        self.registered(IntCounterVec::new(options(name, help), labels)?)
    }

    pub(super) fn gauge(&self, name: &str, help: &str, labels: &[&str]) -> Result<IntGaugeVec, Error> {
        self.registered(IntGaugeVec::new(options(name, help), labels)?)
    }

    /// A gauge of fractions.
    pub(super) fn ratio(&self, name: &str, help: &str, labels: &[&str]) -> Result<GaugeVec, Error> {
        self.registered(GaugeVec::new(options(name, help), labels)?)
    }

    pub(super) fn plain_gauge(&self, name: &str, help: &str) -> Result<Gauge, Error> {
        self.registered(Gauge::with_opts(options(name, help))?)
    }

    pub(super) fn histogram(
        &self,
        name: &str,
        help: &str,
        labels: &[&str],
        buckets: &[f64],
    ) -> Result<HistogramVec, Error> {
        let options = HistogramOpts::from(options(name, help)).buckets(buckets.to_vec());
        self.registered(HistogramVec::new(options, labels)?)
    }

    pub(super) fn plain_histogram(
        &self,
        name: &str,
        help: &str,
        buckets: &[f64],
    ) -> Result<Histogram, Error> {
        let options = HistogramOpts::from(options(name, help)).buckets(buckets.to_vec());
        self.registered(Histogram::with_opts(options)?)
    }

    fn registered<C: Collector + Clone + 'static>(&self, family: C) -> Result<C, Error> {
        self.0.register(Box::new(family.clone()))?;
        Ok(family)
    }
}

fn options(name: &str, help: &str) -> Opts {
    Opts::new(format!("lonas_{name}"), help)
}
