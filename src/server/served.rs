//! What can be asked for: the loaded super-adapters and the named sub-networks of each.
//!
//! A value that is only looked things up in; what changes while the server runs is which one holds, see `registry`.

use super::classes::Classes;
use crate::artifact::ModelFolder;
use crate::backend::Selection;
use crate::supernet::{CatalogEntry, MAXIMAL, ModelShape, SearchSpace, is_model_name};
use std::sync::Arc;

/// A super-adapter in memory, and what it takes to make sub-networks of it.
#[derive(Debug)]
pub struct SuperAdapter {
    /// Its number among those that are loaded, as a [`Selection`] has it.
    pub number: usize,
    pub shape: ModelShape,
    pub space: SearchSpace,
    /// It is merged into the base, so that only sub-networks with all ranks can be computed.
    pub merged: bool,
    /// Where its catalog lies.
    pub folder: ModelFolder,
}

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
    /// What its outputs are, where it classifies; `None` where it continues texts.
    pub classes: Option<Arc<Classes>>,
    pub adapter: Arc<SuperAdapter>,
    /// Shared with the requests that they answer, which may outlive their names.
    pub sub_networks: Vec<Arc<ServedSubNetwork>>,
}

/// One named sub-network, ready to be put into an engine request.
#[derive(Debug, Clone)]
pub struct ServedSubNetwork {
    pub entry: CatalogEntry,
    pub selection: Selection,
    /// `NAME:SUBNETWORK`: `model` in answers, `id` of its card.
    pub label: Arc<str>,
}

impl ServedModel {
    /// A super-adapter under its folder's name, whose default is the maximal sub-network.
    pub fn new<'a>(
        adapter: SuperAdapter,
        base: &str,
        fingerprint: &str,
        entries: impl IntoIterator<Item = (&'a CatalogEntry, Selection)>,
    ) -> Self {
        let name = adapter.folder.name.clone();
        let served =
            |(entry, selection): (&CatalogEntry, _)| ServedSubNetwork::new(&name, entry.clone(), selection);
        let sub_networks = entries.into_iter().map(|one| Arc::new(served(one))).collect();
        let (base, fingerprint) = (base.into(), fingerprint.into());
        let (default, adapter) = (MAXIMAL.into(), Arc::new(adapter));
        Self { name, base, fingerprint, default, classes: None, adapter, sub_networks }
    }

    pub fn get(&self, sub_network: &str) -> Option<&Arc<ServedSubNetwork>> {
        self.sub_networks.iter().find(|s| s.entry.name == sub_network)
    }
}

impl ServedSubNetwork {
    pub(super) fn new(model: &str, entry: CatalogEntry, selection: Selection) -> Self {
        Self { label: format!("{model}:{}", entry.name).into(), entry, selection }
    }

    /// The mean score over the catalog's tasks.
    pub(super) fn accuracy(&self) -> Option<f64> {
        let scores = &self.entry.scores;
        // Divided first, so that not even the largest numbers add up to more than there is.
        (!scores.is_empty()).then(|| scores.values().map(|score| score / scores.len() as f64).sum())
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
    pub fn sub_networks(&self) -> impl Iterator<Item = &Arc<ServedSubNetwork>> {
        self.models.iter().flat_map(|m| &m.sub_networks)
    }

    /// The same with one more sub-network of `model`, or with this one instead of the one of its name.
    pub(super) fn with(&self, model: &str, sub_network: &Arc<ServedSubNetwork>) -> Self {
        self.changed(model, |own| match own.iter_mut().find(|s| s.entry.name == sub_network.entry.name) {
            Some(old) => old.clone_from(sub_network),
            None => own.push(sub_network.clone()),
        })
    }

    /// The same without a sub-network of `model`.
    pub(super) fn without(&self, model: &str, name: &str) -> Self {
        self.changed(model, |own| own.retain(|s| s.entry.name != name))
    }

    fn changed(&self, model: &str, change: impl FnOnce(&mut Vec<Arc<ServedSubNetwork>>)) -> Self {
        let mut new = self.clone();
        if let Some(model) = new.models.iter_mut().find(|m| m.name == model) {
            change(&mut model.sub_networks);
        }
        new
    }
}
