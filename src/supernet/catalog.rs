//! The named sub-networks of a super-network, with what is known of each.

use super::{Cost, ModelShape, SearchSpace, SpaceError, SubNetwork};
use std::collections::BTreeMap;

/// Names that every catalog has.
pub const MAXIMAL: &str = "maximal";
pub const HEURISTIC: &str = "heuristic";
pub const MINIMAL: &str = "minimal";

/// Whether requests can name a super-network so: not empty, no colon (which parts it from the sub-network), no space.
pub fn is_model_name(name: &str) -> bool {
    !name.is_empty() && !name.contains(|c: char| c == ':' || c.is_whitespace() || c.is_control())
}

/// Measured seconds of one sub-network on one machine.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Latency {
    /// Seconds for each prompt token, one prompt at a time.
    pub prefill_seconds_per_token: f64,
    /// Seconds for each generated token, one stream, with a prompt's context before it.
    pub decode_seconds_per_token: f64,
}

/// What one sub-network reached on one task, and how that was found out.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Evaluation {
    pub task: String,
    /// `likelihood`, `generation`, `loss` or `classification`.
    pub method: String,
    /// How the questions were put, e.g. `short`.
    pub form: String,
    /// What `value` is: `accuracy`, a share; `loss`, nats per token; or `pearson`, a correlation.
    pub metric: String,
    pub value: f64,
    /// The value's 95 % interval.
    pub interval95: (f64, f64),
    /// Items of the task.
    pub count: usize,
    /// What else is known, by name.
    #[serde(default)]
    pub details: BTreeMap<String, f64>,
    /// sha256 of the task's file, and of the digests of those of its items that were used.
    pub file_sha256: String,
    pub items_sha256: String,
    /// In which numbers it was computed.
    pub numbers: String,
}

/// One named sub-network.
#[derive(Debug, Clone, PartialEq)]
pub struct CatalogEntry {
    pub name: String,
    pub sub_network: SubNetwork,
    pub cost: Cost,
    /// Score by task, e.g. accuracy as a fraction.
    pub scores: BTreeMap<String, f64>,
    /// Where scores come from, and what else was found out.
    pub evaluations: Vec<Evaluation>,
    /// Measured latency by machine.
    pub latency: BTreeMap<String, Latency>,
}

impl CatalogEntry {
    /// An entry of which nothing is known but what it costs, which is counted.
    fn new(shape: &ModelShape, space: &SearchSpace, name: &str, sub_network: SubNetwork) -> Self {
        Self {
            name: name.to_string(),
            cost: Cost::of(shape, &space.resolve(shape, &sub_network)),
            sub_network,
            scores: BTreeMap::new(),
            evaluations: Vec::new(),
            latency: BTreeMap::new(),
        }
    }

    /// Takes over what another entry of the same sub-network knows; where both know something, the other's.
    pub fn learn(&mut self, other: Self) {
        self.scores.extend(other.scores);
        other.evaluations.into_iter().for_each(|evaluation| self.record(evaluation));
        self.latency.extend(other.latency);
    }

    /// Keeps an evaluation in the place of one of the same task, method and form.
    pub fn record(&mut self, evaluation: Evaluation) {
        let key = |e: &Evaluation| (e.task.clone(), e.method.clone(), e.form.clone());
        self.evaluations.retain(|e| key(e) != key(&evaluation));
        self.evaluations.push(evaluation);
        self.evaluations.sort_by_key(key);
    }
}

/// The named sub-networks; `maximal`, `heuristic` and `minimal` always exist and mean what LoNAS means.
#[derive(Debug, Clone, PartialEq)]
pub struct Catalog {
    entries: Vec<CatalogEntry>,
}

impl Catalog {
    /// The three sub-networks that always exist.
    pub fn new(shape: &ModelShape, space: &SearchSpace) -> Self {
        let named = [(MAXIMAL, space.maximal()), (HEURISTIC, space.heuristic()), (MINIMAL, space.minimal())];
        let entries = named.map(|(name, sub_network)| CatalogEntry::new(shape, space, name, sub_network));
        Self { entries: entries.into() }
    }

    /// The sub-network that this name has in every catalog, if it has one.
    pub fn fixed(space: &SearchSpace, name: &str) -> Option<SubNetwork> {
        match name {
            MAXIMAL => Some(space.maximal()),
            HEURISTIC => Some(space.heuristic()),
            MINIMAL => Some(space.minimal()),
            _ => None,
        }
    }

    pub fn entries(&self) -> &[CatalogEntry] {
        &self.entries
    }

    pub fn get(&self, name: &str) -> Option<&CatalogEntry> {
        self.entries.iter().find(|e| e.name == name)
    }

    pub fn get_mut(&mut self, name: &str) -> Option<&mut CatalogEntry> {
        self.entries.iter_mut().find(|e| e.name == name)
    }

    /// Whether a sub-network can be called so.
    ///
    /// # Errors
    /// A name that a request's `model` field could not carry.
    pub fn check_name(name: &str) -> Result<(), SpaceError> {
        let allowed = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
        // `.` and `..` would mean something else in a path.
        let dots = name.chars().all(|c| c == '.');
        match !dots && name.len() <= 64 && name.chars().all(allowed) {
            true => Ok(()),
            false => Err(SpaceError::BadName { name: name.to_string() }),
        }
    }

    /// Adds one more named sub-network and counts its cost.
    ///
    /// # Errors
    /// A name that is taken or that a request's `model` field could not carry.
    pub fn add(
        &mut self,
        shape: &ModelShape,
        space: &SearchSpace,
        name: &str,
        sub_network: SubNetwork,
    ) -> Result<&mut CatalogEntry, SpaceError> {
        Self::check_name(name)?;
        if self.get(name).is_some() {
            return Err(SpaceError::DuplicateName { name: name.to_string() });
        }
        self.entries.push(CatalogEntry::new(shape, space, name, sub_network));
        let last = self.entries.len() - 1;
        Ok(&mut self.entries[last])
    }

    /// Adds an entry of the same space, or what it knows to the one of its name.
    ///
    /// # Errors
    /// A name that another sub-network has.
    pub fn put(&mut self, entry: CatalogEntry) -> Result<(), SpaceError> {
        match self.get_mut(&entry.name) {
            None => self.entries.push(entry),
            Some(own) if own.sub_network == entry.sub_network => own.learn(entry),
            Some(_) => return Err(SpaceError::Taken { name: entry.name }),
        }
        Ok(())
    }

    /// Forgets an entry; false where there is none or its name is one of the three that every catalog has.
    pub fn remove(&mut self, name: &str) -> bool {
        let before = self.entries.len();
        self.entries.retain(|e| e.name != name || [MAXIMAL, HEURISTIC, MINIMAL].contains(&name));
        self.entries.len() < before
    }
}
