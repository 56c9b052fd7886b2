//! The sub-networks that can be asked for at this moment, and how they come and go while the server runs.
//!
//! A request takes [`Registry::now`] once and keeps it, so it is answered by what it found, whatever is registered or removed
//! meanwhile. An id is never given twice: whoever keeps something by a sub-network's id (rows of a batch that stand
//! together, say) cannot take a new sub-network for an old one of the same name.

use super::metrics::Metrics;
use super::select::{find_model, quoted};
use super::served::{ServedModel, ServedModels, ServedSubNetwork};
use super::wire::ApiError;
use crate::artifact::{ArtifactError, CatalogLine};
use crate::backend::Selection;
use crate::supernet::{Catalog, CatalogEntry, SpaceError};
use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

/// What a score can be: an accuracy, or a correlation. Requests are led to sub-networks by them.
const SCORES: RangeInclusive<f64> = -1.0..=1.0;

pub(super) struct Registry {
    now: RwLock<Arc<ServedModels>>,
    /// The next free id; whoever changes something holds it, from the checks to the end.
    next_id: Mutex<u32>,
    /// Sub-networks that may be there together.
    most: usize,
    metrics: Arc<Metrics>,
}

/// What a registration came to.
pub(super) struct Registered {
    pub(super) model: String,
    pub(super) sub_network: Arc<ServedSubNetwork>,
    /// Whether it is new.
    pub(super) created: bool,
}

impl Registry {
    pub(super) fn new(models: ServedModels, most: usize, metrics: Arc<Metrics>) -> Self {
        let ids = models.sub_networks().map(|s| s.selection.subnetwork);
        let next_id = Mutex::new(ids.max().map_or(0, |last| last.saturating_add(1)));
        Self { now: RwLock::new(Arc::new(models)), next_id, most, metrics }
    }

    /// What can be asked for now.
    pub(super) fn now(&self) -> Arc<ServedModels> {
        self.now.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Makes a sub-network one that can be asked for; `persist` writes it into the model folder's catalog too. The same
    /// again changes nothing but the figures that it brings. May wait for a disk.
    ///
    /// # Errors
    /// 400: not a sub-network of this space, or one that cannot be computed here. 404: no such super-adapter. 409: another
    /// sub-network has the name, there are too many, the catalog cannot be written. Then nothing has changed.
    pub(super) fn register(
        &self,
        model: Option<&str>,
        line: CatalogLine,
        persist: bool,
    ) -> Result<Registered, ApiError> {
        let mut next_id = self.next_id.lock().unwrap_or_else(PoisonError::into_inner);
        let now = self.now();
        let model = super_adapter(&now, model, "model")?;
        let mut entry =
            line.into_entry(&model.adapter.shape, &model.adapter.space).map_err(|error| refused(&error))?;
        if let Some((task, score)) = entry.scores.iter().find(|(_, score)| !SCORES.contains(score)) {
            let field = format!("scores.{task}");
            let message = format!("{field}: expected a number from -1 to 1, got {score}");
            return Err(ApiError::invalid(&field, message));
        }
        let known = model.get(&entry.name).cloned();
        let selection = match &known {
            Some(known) if known.entry.sub_network != entry.sub_network => {
                return Err(refused(&SpaceError::Taken { name: entry.name }));
            }
            Some(known) => {
                let mut learnt = known.entry.clone();
                learnt.learn(entry);
                entry = learnt;
                known.selection.clone()
            }
            None => self.selection(&now, model, &entry, *next_id)?,
        };
        if persist {
            persisted(model, |catalog| catalog.put(entry.clone()))?;
        }
        let sub_network = Arc::new(ServedSubNetwork::new(&model.name, entry, selection));
        self.metrics.serve(&model.name, &sub_network);
        if known.is_none() {
            *next_id += 1;
        }
        self.replace(now.with(&model.name, &sub_network));
        Ok(Registered { model: model.name.clone(), sub_network, created: known.is_none() })
    }

    /// How a batch is to select a new sub-network.
    fn selection(
        &self,
        now: &ServedModels,
        model: &ServedModel,
        entry: &CatalogEntry,
        id: u32,
    ) -> Result<Selection, ApiError> {
        let count = now.sub_networks().count();
        // The last id would have none after it.
        if count >= self.most || id == u32::MAX {
            let message = format!("this server has {count} sub-networks and takes no more; remove one first");
            return Err(ApiError::conflict("too_many_subnetworks", None, message));
        }
        let adapter = &model.adapter;
        let shape = adapter.space.resolve(&adapter.shape, &entry.sub_network);
        if adapter.merged && !adapter.shape.keeps_ranks(&shape) {
            let message = "choices: this server has the adapter merged into the base (--merge-adapter), so only sub-networks \
                           with all ranks can be computed";
            return Err(ApiError::invalid("choices", message.into()));
        }
        Ok(Selection { adapter: adapter.number, subnetwork: id, shape: Arc::new(shape) })
    }

    /// Takes a sub-network, `SUBNETWORK` or `NAME:SUBNETWORK`, out of what can be asked for; `persist` takes it out of
    /// the catalog too. Requests that run with it go on. May wait for a disk. Returns its label.
    ///
    /// # Errors
    /// 404: nothing has this name. 409: it must always be there, or the catalog cannot be written.
    pub(super) fn remove(&self, id: &str, persist: bool) -> Result<Arc<str>, ApiError> {
        let _changing = self.next_id.lock().unwrap_or_else(PoisonError::into_inner);
        let now = self.now();
        let (model, sub_network) = find_sub_network(&now, id)?;
        let name = &sub_network.entry.name;
        if Catalog::fixed(&model.adapter.space, name).is_some() {
            let message = format!("`{name}` always exists and cannot be removed");
            return Err(ApiError::conflict("fixed_subnetwork", None, message));
        }
        if *name == model.default {
            let message = format!(
                "`{name}` answers where a request names no sub-network (--default-subnetwork) and cannot be removed"
            );
            return Err(ApiError::conflict("default_subnetwork", None, message));
        }
        if persist {
            persisted(model, |catalog| {
                catalog.remove(name);
                Ok(())
            })?;
        }
        self.replace(now.without(&model.name, name));
        self.metrics.forget(&model.name, sub_network);
        Ok(sub_network.label.clone())
    }

    fn replace(&self, models: ServedModels) {
        *self.now.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(models);
    }
}

/// The sub-network with this id: `SUBNETWORK` where there is one super-adapter, else `NAME:SUBNETWORK`.
pub(super) fn find_sub_network<'a>(
    models: &'a ServedModels,
    id: &str,
) -> Result<(&'a ServedModel, &'a Arc<ServedSubNetwork>), ApiError> {
    let full = match id.contains(':') {
        true => id.to_string(),
        false => format!("{}:{id}", super_adapter(models, None, "name")?.name),
    };
    let (model, sub_network) = find_model(models, &full)?;
    let sub_network = sub_network.ok_or_else(ApiError::internal)?;
    Ok((model, sub_network))
}

/// The super-adapter of this name. What changes a server is never guessed: with several loaded, one must be named.
fn super_adapter<'a>(
    models: &'a ServedModels,
    name: Option<&str>,
    param: &str,
) -> Result<&'a ServedModel, ApiError> {
    match (name, models.models()) {
        (Some(name), _) => models
            .get(name)
            .ok_or_else(|| ApiError::no_model(param, format!("the model {} does not exist", quoted(name)))),
        (None, [only]) => Ok(only),
        (None, several) => {
            let names = several.iter().map(|m| format!("`{}`", m.name)).collect::<Vec<_>>().join(", ");
            Err(ApiError::invalid(param, format!("{param}: say of which super-adapter: there is {names}")))
        }
    }
}

/// Reads catalog.json as it is now, changes it, and puts it back whole, while no other process does.
fn persisted(
    model: &ServedModel,
    change: impl FnOnce(&mut Catalog) -> Result<(), SpaceError>,
) -> Result<(), ApiError> {
    let adapter = &model.adapter;
    let unwritten = |error: ArtifactError| {
        tracing::error!(%error, model = model.name, "the catalog could not be changed");
        // Paths are the operator's to know, from the log.
        let why = match &error {
            ArtifactError::Io { source, .. } => source.kind().to_string(),
            _ => "it does not fit its super-network".into(),
        };
        let message =
            format!("persist: the catalog of `{}` cannot be changed ({why}); nothing was", model.name);
        ApiError::conflict("catalog_not_written", Some("persist"), message)
    };
    let mut held = adapter.folder.hold_catalog(&adapter.shape, &adapter.space).map_err(unwritten)?;
    change(&mut held.catalog).map_err(|error| refused(&error))?;
    held.write().map_err(unwritten)?;
    Ok(())
}

/// What is wrong with a sub-network, by field.
fn refused(error: &SpaceError) -> ApiError {
    let message = error.to_string();
    match error {
        SpaceError::Fixed { .. } | SpaceError::Taken { .. } => {
            ApiError::conflict("name_taken", Some("name"), message)
        }
        SpaceError::BadName { .. } => ApiError::invalid("name", message),
        SpaceError::NotAChoice { group, .. } => ApiError::invalid(&format!("choices[{group}]"), message),
        SpaceError::WrongCount { .. } => ApiError::invalid("choices", message),
        SpaceError::WrongCost { field, .. } => ApiError::invalid(field, message),
        SpaceError::BadFigure { field, .. } => ApiError::invalid(field, message),
        _ => ApiError::malformed(message),
    }
}
