//! One sub-network as catalog.json has it, which is also how it is sent to a running server.

use crate::supernet::{
    Catalog, CatalogEntry, Cost, Evaluation, Latency, ModelShape, SearchSpace, SpaceError,
};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// A named sub-network as JSON: a few hundred bytes. A name and choices are enough; what is missing is worked out, and what
/// is there must be right.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CatalogLine {
    pub name: String,
    /// One for each elastic group, in group order.
    pub choices: Vec<usize>,
    #[serde(default)]
    pub parameters: Option<u64>,
    #[serde(default)]
    pub macs: Option<u64>,
    /// By task.
    #[serde(default)]
    pub scores: BTreeMap<String, f64>,
    /// What the scores are of, and whatever else was measured.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub evaluations: Vec<Evaluation>,
    /// By machine.
    #[serde(default)]
    pub latency: BTreeMap<String, Latency>,
}

impl CatalogLine {
    pub fn of(entry: &CatalogEntry) -> Self {
        Self {
            name: entry.name.clone(),
            choices: entry.sub_network.choices().to_vec(),
            parameters: Some(entry.cost.parameters),
            macs: Some(entry.cost.macs),
            scores: entry.scores.clone(),
            evaluations: entry.evaluations.clone(),
            latency: entry.latency.clone(),
        }
    }

    /// The entry, checked against the search space.
    ///
    /// # Errors
    /// A name that no request could carry, choices outside the space, another sub-network under a name that every catalog has,
    /// a cost that is not the sub-network's, a score or latency that is none.
    pub fn into_entry(self, shape: &ModelShape, space: &SearchSpace) -> Result<CatalogEntry, SpaceError> {
        let Self { name, choices, parameters, macs, scores, evaluations, latency } = self;
        Catalog::check_name(&name)?;
        let sub_network = space.sub_network(choices)?;
        if Catalog::fixed(space, &name).is_some_and(|fixed| fixed != sub_network) {
            return Err(SpaceError::Fixed { name });
        }
        let cost = Cost::of(shape, &space.resolve(shape, &sub_network));
        for (field, expected, got) in [("parameters", cost.parameters, parameters), ("macs", cost.macs, macs)]
        {
            if let Some(got) = got.filter(|&got| got != expected) {
                return Err(SpaceError::WrongCost { name, field, expected, got });
            }
        }
        let entry = CatalogEntry { name, sub_network, cost, scores, evaluations, latency };
        check_figures(&entry)?;
        Ok(entry)
    }
}

/// A score is a finite number (JSON can write no other, and the file could not be read back), a time one that is not below 0.
pub(super) fn check_figures(entry: &CatalogEntry) -> Result<(), SpaceError> {
    let bad = |field: String, got: f64| SpaceError::BadFigure {
        name: entry.name.clone(),
        field,
        got: got.to_string(),
    };
    if let Some((task, &got)) = entry.scores.iter().find(|(_, score)| !score.is_finite()) {
        return Err(bad(format!("scores.{task}"), got));
    }
    for evaluation in &entry.evaluations {
        let (low, high) = evaluation.interval95;
        let numbers = [evaluation.value, low, high].into_iter().chain(evaluation.details.values().copied());
        if let Some(got) = numbers.into_iter().find(|number| !number.is_finite()) {
            return Err(bad(format!("evaluations.{}", evaluation.task), got));
        }
    }
    for (machine, latency) in &entry.latency {
        let times = [latency.prefill_seconds_per_token, latency.decode_seconds_per_token];
        if let Some(&got) = times.iter().find(|t| !t.is_finite() || **t < 0.0) {
            return Err(bad(format!("latency.{machine}"), got));
        }
    }
    Ok(())
}
