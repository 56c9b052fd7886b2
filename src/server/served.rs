//! What can be asked for: the loaded super-adapters and the named sub-networks of each.
//!
//! Filled once before the first request; a request only looks things up here.

use crate::backend::Selection;
use crate::supernet::{CatalogEntry, Cost, Latency, MAXIMAL, is_model_name};
use std::collections::BTreeMap;
use std::sync::Arc;

/// One loaded super-adapter under the name that requests use.
#[derive(Debug, Clone)]
pub struct ServedModel {
    /// `NAME` in `model: "NAME:SUBNETWORK"`; without a colon.
    pub name: String,
    /// The base's name, `root` of the model cards.
    pub base: String,
    /// Tells two states of the weights apart, e.g. the start of a digest of the super-adapter's file.
    pub fingerprint: String,
    /// Which sub-network answers when a request names none.
    pub default: String,
    pub sub_networks: Vec<ServedSubNetwork>,
}

/// One named sub-network, ready to be put into an engine request.
#[derive(Debug, Clone)]
pub struct ServedSubNetwork {
    pub name: String,
    pub selection: Selection,
    pub cost: Cost,
    /// Score by task.
    pub scores: BTreeMap<String, f64>,
    /// Measured latency by machine.
    pub latency: BTreeMap<String, Latency>,
    /// `NAME:SUBNETWORK`: `model` in answers and the value of the metrics' label `subnetwork`.
    pub label: Arc<str>,
}

impl ServedModel {
    /// A super-adapter whose default is the maximal sub-network.
    pub fn new<'a>(
        name: &str,
        base: &str,
        fingerprint: &str,
        entries: impl IntoIterator<Item = (&'a CatalogEntry, Selection)>,
    ) -> Self {
        let served = entries.into_iter().map(|(entry, selection)| ServedSubNetwork {
            name: entry.name.clone(),
            selection,
            cost: entry.cost,
            scores: entry.scores.clone(),
            latency: entry.latency.clone(),
            label: format!("{name}:{}", entry.name).into(),
        });
        let sub_networks = served.collect();
        let own = str::to_string;
        Self {
            name: own(name),
            base: own(base),
            fingerprint: own(fingerprint),
            default: own(MAXIMAL),
            sub_networks,
        }
    }

    pub fn get(&self, sub_network: &str) -> Option<&ServedSubNetwork> {
        self.sub_networks.iter().find(|s| s.name == sub_network)
    }
}

/// Why a set of super-adapters cannot be served under these names.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ServedError {
    #[error("no super-adapter to serve")]
    Nothing,
    #[error("`{name}` cannot be a model's name: it must have no colon, no space and at least one character")]
    BadName { name: String },
    #[error("two super-adapters are named `{name}`")]
    DuplicateName { name: String },
    #[error("super-adapter `{model}` has no sub-network `{default}`, which should be its default")]
    NoDefault { model: String, default: String },
}

/// Everything that can be asked for.
#[derive(Debug, Clone)]
pub struct ServedModels {
    models: Vec<ServedModel>,
    /// The catalog's name for this machine: whose latencies hold here.
    machine: Option<String>,
}

impl ServedModels {
    /// The first super-adapter answers requests that name no model.
    ///
    /// # Errors
    /// Names that a request could not tell apart, a default sub-network that does not exist.
    pub fn new(models: Vec<ServedModel>, machine: Option<String>) -> Result<Self, ServedError> {
        if models.is_empty() {
            return Err(ServedError::Nothing);
        }
        for (at, model) in models.iter().enumerate() {
            let name = model.name.clone();
            if !is_model_name(&name) {
                return Err(ServedError::BadName { name });
            }
            if models[..at].iter().any(|other| other.name == name) {
                return Err(ServedError::DuplicateName { name });
            }
            if model.get(&model.default).is_none() {
                return Err(ServedError::NoDefault { model: name, default: model.default.clone() });
            }
        }
        Ok(Self { models, machine })
    }

    pub fn models(&self) -> &[ServedModel] {
        &self.models
    }

    pub fn machine(&self) -> Option<&str> {
        self.machine.as_deref()
    }

    pub fn get(&self, name: &str) -> Option<&ServedModel> {
        self.models.iter().find(|m| m.name == name)
    }

    /// Every sub-network of every super-adapter.
    pub fn sub_networks(&self) -> impl Iterator<Item = &ServedSubNetwork> {
        self.models.iter().flat_map(|m| &m.sub_networks)
    }
}
