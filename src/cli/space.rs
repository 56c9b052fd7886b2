//! A search-space file: which modules have an adapter, and what is elastic.

use super::Failure;
use crate::artifact::{AdapterConfig, Family};
use crate::model::{GroupTemplate, Layout};
use std::path::Path;

/// A search-space file. See README, "Your own super-network".
#[derive(Debug, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SpaceFile {
    /// The adapters' full rank.
    rank: usize,
    /// The adapters' scale is `alpha / rank`.
    alpha: f64,
    /// Short names of the modules that get an adapter.
    targets: Vec<String>,
    groups: Vec<GroupTemplate>,
}

impl SpaceFile {
    pub(super) fn read(path: &Path) -> Result<Self, Failure> {
        let wrong = |e: &dyn std::fmt::Display| format!("{}: {e}", path.display());
        let text = std::fs::read(path).map_err(|e| wrong(&e))?;
        Ok(serde_json::from_slice(&text).map_err(|e| wrong(&e))?)
    }

    pub(super) fn groups(&self) -> &[GroupTemplate] {
        &self.groups
    }

    /// The adapter's configuration on a base of that name.
    ///
    /// # Errors
    /// A rank or alpha out of range, a module that the family has not.
    pub(super) fn adapter(
        &self,
        family: Family,
        dropout: f64,
        base_model_name: String,
    ) -> Result<AdapterConfig, Failure> {
        let &Self { rank, alpha, .. } = self;
        let target_modules = self.targets.clone();
        let adapter = AdapterConfig {
            rank,
            alpha,
            dropout,
            target_modules,
            base_model_name,
            ..AdapterConfig::default()
        };
        check_targets(Layout::of(family), &adapter)?;
        Ok(adapter)
    }
}

fn check_targets(layout: &Layout, adapter: &AdapterConfig) -> Result<(), Failure> {
    let usable = (1..=4096).contains(&adapter.rank) && adapter.alpha.is_finite() && adapter.alpha > 0.0;
    if !usable {
        return Err(format!(
            "search space: rank {} or alpha {} is out of range",
            adapter.rank, adapter.alpha
        )
        .into());
    }
    let known = |t: &String| (0..layout.modules.len()).any(|place| layout.is_target(place, t));
    match adapter.target_modules.iter().find(|t| !known(t)) {
        Some(unknown) => {
            let name = layout.name;
            Err(format!("search space: targets: a {name} layer has no module `{unknown}`").into())
        }
        None if adapter.target_modules.is_empty() => Err("search space: targets: none".into()),
        None => Ok(()),
    }
}
