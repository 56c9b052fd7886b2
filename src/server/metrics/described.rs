//! The families that only say what is loaded and what can be asked for.

use super::RunInfo;
use super::families::Families;
use crate::server::served::{ServedModels, ServedSubNetwork};
use prometheus::{Error, GaugeVec, IntGaugeVec};

/// Of each sub-network that can be asked for.
pub(super) struct Described {
    named: IntGaugeVec,
    parameters: IntGaugeVec,
    accuracy: GaugeVec,
}

impl Described {
    /// Describes the program and the super-adapters once and for all; no sub-network yet.
    pub(super) fn new(families: &Families<'_>, models: &ServedModels, info: &RunInfo) -> Result<Self, Error> {
        let build = families.gauge("build_info", "The program; always 1.", &["version"])?;
        build.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        let labels = &["model", "base", "dtype", "device"];
        let loaded = families.gauge("model_info", "A loaded super-adapter; always 1.", labels)?;
        for model in models.models() {
            loaded.with_label_values(&[&model.name, &model.base, &info.dtype, &info.device]).set(1);
        }
        let (labels, subnetwork) = (&["subnetwork", "model", "name"], &["subnetwork"]);
        Ok(Self {
            named: families.gauge("subnetwork_info", "A served sub-network; always 1.", labels)?,
            parameters: families.gauge(
                "subnetwork_params",
                "Linear weights of a sub-network.",
                subnetwork,
            )?,
            accuracy: families.ratio(
                "subnetwork_accuracy_ratio",
                "Mean score over the catalog's tasks.",
                subnetwork,
            )?,
        })
    }

    pub(super) fn add(&self, model: &str, sub_network: &ServedSubNetwork) {
        let (label, entry) = (&*sub_network.label, &sub_network.entry);
        self.named.with_label_values(&[label, model, &entry.name]).set(1);
        let linear = i64::try_from(entry.cost.parameters).unwrap_or(i64::MAX);
        self.parameters.with_label_values(&[label]).set(linear);
        if let Some(mean) = sub_network.accuracy() {
            self.accuracy.with_label_values(&[label]).set(mean);
        }
    }

    /// An error only says that there was no such series.
    pub(super) fn remove(&self, model: &str, sub_network: &ServedSubNetwork) {
        let (label, name) = (&*sub_network.label, &*sub_network.entry.name);
        let _ = self.named.remove_label_values(&[label, model, name]);
        let _ = self.parameters.remove_label_values(&[label]);
        let _ = self.accuracy.remove_label_values(&[label]);
    }
}
