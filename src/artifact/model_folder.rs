//! A model folder: supernet.json, the super-adapter beside it, catalog.json.

use super::catalog_line::{CatalogLine, check_figures};
use super::fetch::BaseSource;
use super::lock::wait_for;
use super::{
    AdapterConfig, AdapterTensors, ArtifactError, HeadTensors, read_adapter, read_adapter_config,
    read_adapter_head, read_json, write_whole,
};
use crate::supernet::{Catalog, Group, Kind, ModelShape, SearchSpace, SpaceError, TensorRef, is_model_name};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::fs::File;
use std::path::{Path, PathBuf};

const SUPERNET: &str = "supernet.json";
const CATALOG: &str = "catalog.json";
const FORMAT_VERSION: u32 = 1;

/// Which base a super-adapter belongs to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BaseReference {
    pub source: BaseSource,
    /// Of the file with the weights; checked where it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SupernetFile {
    version: u32,
    name: String,
    base: BaseReference,
    /// `alpha / r`, for the reader; the adapter's own file decides.
    scale: f64,
    groups: Vec<GroupFile>,
    /// By group id, for width and heads groups: channel or key-value head `i` of the super-network is `order[i]` of the base.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    orders: BTreeMap<usize, Vec<usize>>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct GroupFile {
    kind: Kind,
    choices: Vec<usize>,
    members: Vec<String>,
    followers: Vec<String>,
}

/// A catalog that nobody else changes meanwhile.
#[derive(Debug)]
pub struct HeldCatalog<'a> {
    pub catalog: Catalog,
    folder: &'a ModelFolder,
    _lock: File,
}

impl HeldCatalog<'_> {
    /// Writes the catalog as it is now, and returns it.
    ///
    /// # Errors
    /// As [`ModelFolder::write_catalog`].
    pub fn write(self) -> Result<Catalog, ArtifactError> {
        self.folder.put_catalog(&self.catalog)?;
        Ok(self.catalog)
    }
}

/// An opened model folder. Groups are checked when the model's shapes are known: [`Self::search_space`].
#[derive(Debug, Clone)]
pub struct ModelFolder {
    path: PathBuf,
    pub name: String,
    pub base: BaseReference,
    pub adapter_config: AdapterConfig,
    groups: Vec<GroupFile>,
    orders: BTreeMap<usize, Vec<usize>>,
}

impl ModelFolder {
    /// Reads supernet.json and adapter_config.json.
    pub fn open(path: &Path) -> Result<Self, ArtifactError> {
        let file = path.join(SUPERNET);
        let supernet: SupernetFile = read_json(&file)?;
        if supernet.version != FORMAT_VERSION {
            let reason = format!("{} is not supported; supported: {FORMAT_VERSION}", supernet.version);
            return Err(ArtifactError::field(&file, "version", reason));
        }
        if !is_model_name(&supernet.name) {
            let reason =
                format!("`{}` must have no colon, no space and at least one character", supernet.name);
            return Err(ArtifactError::field(&file, "name", reason));
        }
        let adapter_config = read_adapter_config(path)?;
        let (scale, expected) = (supernet.scale, adapter_config.scale());
        if !(scale - expected).abs().le(&1e-9) {
            let reason = format!("{scale}, but lora_alpha / r is {expected}");
            return Err(ArtifactError::field(&file, "scale", reason));
        }
        let SupernetFile { name, base, groups, orders, .. } = supernet;
        Ok(Self { path: path.into(), name, base, adapter_config, groups, orders })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The super-adapter's tensors, in the base's own order.
    pub fn adapter(&self) -> Result<AdapterTensors, ArtifactError> {
        read_adapter(&self.path).map(|(_, tensors)| tensors)
    }

    /// What was trained whole beside the adapters: a classifier's head; empty where there is none.
    pub fn head(&self) -> Result<HeadTensors, ArtifactError> {
        read_adapter_head(&self.path)
    }

    /// The search space, checked against the model's shapes; and so are the orders.
    pub fn search_space(&self, shape: &ModelShape) -> Result<SearchSpace, ArtifactError> {
        let wrong = |source| ArtifactError::Space { path: self.path.join(SUPERNET), source };
        let groups = self.groups.iter().enumerate().map(|(id, g)| parse_group(shape, id, g));
        let groups = groups.collect::<Result<Vec<_>, _>>().map_err(wrong)?;
        let space = SearchSpace::new(shape, groups).map_err(wrong)?;
        for (&id, order) in &self.orders {
            check_order(shape, id, order, space.groups()).map_err(wrong)?;
        }
        Ok(space)
    }

    /// Orders by group id; empty in the base's own order.
    pub fn orders(&self) -> &BTreeMap<usize, Vec<usize>> {
        &self.orders
    }

    /// The named sub-networks; the three that always exist where there is no catalog yet.
    ///
    /// # Errors
    /// A choice outside the search space, a cost that is not what the sub-network costs, a taken name.
    pub fn catalog(&self, shape: &ModelShape, space: &SearchSpace) -> Result<Catalog, ArtifactError> {
        let path = self.path.join(CATALOG);
        let mut catalog = Catalog::new(shape, space);
        if !path.exists() {
            return Ok(catalog);
        }
        let wrong = |source| ArtifactError::Space { path: path.clone(), source };
        let mut names = BTreeSet::new();
        for line in read_json::<Vec<CatalogLine>>(&path)? {
            if !names.insert(line.name.clone()) {
                return Err(wrong(SpaceError::DuplicateName { name: line.name }));
            }
            let entry = line.into_entry(shape, space).map_err(wrong)?;
            catalog.put(entry).map_err(wrong)?;
        }
        Ok(catalog)
    }

    /// catalog.json as it is now, to be changed: until this is dropped no other process of ours changes it. What was measured for
    /// hours goes into this, not into a catalog that was read before.
    ///
    /// # Errors
    /// As [`Self::catalog`].
    pub fn hold_catalog(
        &self,
        shape: &ModelShape,
        space: &SearchSpace,
    ) -> Result<HeldCatalog<'_>, ArtifactError> {
        let lock = self.lock_catalog()?;
        Ok(HeldCatalog { catalog: self.catalog(shape, space)?, folder: self, _lock: lock })
    }

    /// Not catalog.json itself, which is replaced by another file with each change.
    fn lock_catalog(&self) -> Result<File, ArtifactError> {
        wait_for(&self.path.join(SUPERNET))
    }

    /// Replaces catalog.json.
    ///
    /// # Errors
    /// A score or latency that is no number: JSON cannot say so, and the file could not be read back.
    pub fn write_catalog(&self, catalog: &Catalog) -> Result<(), ArtifactError> {
        let _lock = self.lock_catalog()?;
        self.put_catalog(catalog)
    }

    fn put_catalog(&self, catalog: &Catalog) -> Result<(), ArtifactError> {
        let path = self.path.join(CATALOG);
        let wrong = |source| ArtifactError::Space { path: path.clone(), source };
        catalog.entries().iter().try_for_each(check_figures).map_err(wrong)?;
        let lines = catalog.entries().iter().map(|e| json_line(&path, &CatalogLine::of(e)));
        let lines = lines.collect::<Result<Vec<_>, _>>()?;
        write_whole(&path, format!("[\n  {}\n]\n", lines.join(",\n  ")).as_bytes())
    }

    /// Writes supernet.json: one group and one order a line, so that people can read it and git can show its changes.
    pub fn write_supernet(
        folder: &Path,
        name: &str,
        base: &BaseReference,
        scale: f64,
        shape: &ModelShape,
        space: &SearchSpace,
        orders: &BTreeMap<usize, Vec<usize>>,
    ) -> Result<(), ArtifactError> {
        let path = folder.join(SUPERNET);
        let names = |tensors: &[TensorRef]| tensors.iter().map(|&t| shape.tensor_name(t)).collect();
        let groups = space.groups().iter().map(|g| {
            let (members, followers) = (names(&g.members), names(&g.followers));
            json_line(&path, &GroupFile { kind: g.kind, choices: g.choices.clone(), members, followers })
        });
        let groups = groups.collect::<Result<Vec<_>, _>>()?.join(",\n    ");
        let orders = orders.iter().map(|(id, order)| Ok(format!("\"{id}\": {}", json_line(&path, order)?)));
        let orders = orders.collect::<Result<Vec<_>, ArtifactError>>()?.join(",\n    ");
        let mut text = String::new();
        let (name, base) = (json_line(&path, &name)?, json_line(&path, base)?);
        // Writing to a string cannot fail.
        let _ = write!(
            text,
            "{{\n  \"version\": {FORMAT_VERSION},\n  \"name\": {name},\n  \"base\": {base},\n  \"scale\": {scale:?},\n  \
             \"groups\": [\n    {groups}\n  ]"
        );
        if !orders.is_empty() {
            let _ = write!(text, ",\n  \"orders\": {{\n    {orders}\n  }}");
        }
        text += "\n}\n";
        write_whole(&path, text.as_bytes())
    }
}

fn json_line(path: &Path, value: &impl Serialize) -> Result<String, ArtifactError> {
    serde_json::to_string(value).map_err(|e| ArtifactError::wrong(path, e.to_string()))
}

fn parse_group(shape: &ModelShape, id: usize, file: &GroupFile) -> Result<Group, SpaceError> {
    let tensors = |names: &[String]| {
        let parse = |name: &String| {
            let unknown = || SpaceError::UnknownTensor { group: id, tensor: name.clone() };
            shape.parse_tensor(name).ok_or_else(unknown)
        };
        names.iter().map(parse).collect::<Result<Vec<_>, _>>()
    };
    let (members, followers) = (tensors(&file.members)?, tensors(&file.followers)?);
    Ok(Group { kind: file.kind, members, followers, choices: file.choices.clone() })
}

/// Channels are ordered one by one, heads with all that share a key-value head.
fn check_order(shape: &ModelShape, id: usize, order: &[usize], groups: &[Group]) -> Result<(), SpaceError> {
    let unit = |group: &Group| {
        let first = group.members.first()?.linear;
        let channels = shape.channels.iter().find(|c| c.kind == group.kind && c.writers.contains(&first));
        channels.map(|channels| channels.unit.max(1))
    };
    // Ranks have no order of their own: they are the adapter's.
    let count = groups.get(id).and_then(|group| Some(group.choices.first()? / unit(group)?)).unwrap_or(0);
    let mut seen = vec![false; count];
    let fresh = |&i: &usize| seen.get_mut(i).is_some_and(|s| !std::mem::replace(s, true));
    if count > 0 && order.len() == count && order.iter().all(fresh) {
        return Ok(());
    }
    Err(SpaceError::BadOrder { group: id, expected: count })
}
