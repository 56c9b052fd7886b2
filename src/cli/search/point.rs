//! `--name NAME=POINT`: a sub-network of the front into the catalog.

use super::report::{Found, Point};
use super::scores::TaskScore;
use crate::cli::Failure;
use crate::cli::eval::rounded;
use crate::cli::open::OpenedModel;
use crate::cli::tasks::Task;
use crate::search::Genome;
use crate::supernet::Catalog;

/// A name, and which sub-network is to have it.
pub(super) struct Named {
    name: String,
    said: String,
    which: Which,
}

enum Which {
    Best,
    /// The best one that costs at most this part of the maximal one.
    Within(f64),
    /// By its place on the front.
    Line(usize),
}

/// What goes into the catalog.
pub(super) struct Entry<'a> {
    name: &'a str,
    point: &'a Point,
}

impl Named {
    pub(super) fn parse(argument: &str) -> Result<Self, Failure> {
        let expected = || {
            format!(
                "--name {argument}: expected NAME=best, NAME=0.8 (of maximal's cost) or NAME=3 (of the front)"
            )
        };
        let (name, said) = argument.split_once('=').ok_or_else(expected)?;
        let which = match (said, said.parse::<usize>(), said.parse::<f64>()) {
            ("best", ..) => Which::Best,
            (_, Ok(line), _) => Which::Line(line),
            (_, _, Ok(part)) if part > 0.0 && part.is_finite() => Which::Within(part),
            _ => return Err(expected().into()),
        };
        Ok(Self { name: name.into(), said: said.into(), which })
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn is_best(&self) -> bool {
        matches!(self.which, Which::Best)
    }

    /// Whether the catalog could take the name at all, before an hour goes by.
    pub(super) fn check(&self, catalog: &Catalog) -> Result<(), Failure> {
        Catalog::check_name(&self.name)?;
        let Self { name, .. } = self;
        match [crate::supernet::MAXIMAL, crate::supernet::HEURISTIC, crate::supernet::MINIMAL]
            .contains(&name.as_str())
        {
            true => {
                Err(format!("--name {name}: the catalog has it already, and it has a fixed meaning").into())
            }
            false => {
                if catalog.get(name).is_some() {
                    tracing::warn!(
                        "the catalog has `{name}` already; it stays as it is if another sub-network is found"
                    );
                }
                Ok(())
            }
        }
    }

    /// The sub-network that it came to mean.
    pub(super) fn entry<'a>(&'a self, found: &'a Found) -> Result<Entry<'a>, Failure> {
        let none = |why: String| format!("--name {}={}: {why}", self.name, self.said);
        let point = match self.which {
            Which::Best => found.best.as_ref().ok_or_else(|| none("there is no best one".into()))?,
            Which::Line(line) => {
                let last = found.front.len().saturating_sub(1);
                found.front.get(line).ok_or_else(|| none(format!("the front goes from 0 to {last}")))?
            }
            Which::Within(part) => {
                let most = part * found.maximal.cost;
                // Along the front what costs more is better.
                let within = found.front.iter().rev().find(|p| p.cost <= most);
                within.ok_or_else(|| none("the front has nothing as cheap".into()))?
            }
        };
        Ok(Entry { name: &self.name, point })
    }
}

/// Writes the entries, all or none. A task's accuracy is kept where all of its items were scored, as `lonas eval` does.
pub(super) fn write(
    model: &mut OpenedModel,
    entries: &[Entry<'_>],
    tasks: &[Task],
    whole: &[bool],
) -> Result<(), Failure> {
    if entries.is_empty() {
        return Ok(());
    }
    // As it is now: a search takes hours, in which others may have changed it.
    let mut held = model.folder.hold_catalog(&model.shape, &model.space)?;
    let catalog = &mut held.catalog;
    for Entry { name, point } in entries {
        let sub_network = point.genome.sub_network(&model.space);
        match catalog.get(name).map(|e| Genome::of(&model.space, &e.sub_network) == point.genome) {
            Some(true) => {}
            Some(false) => {
                let path = model.folder.path().display();
                return Err(format!("--name {name}: {path} has another sub-network of that name").into());
            }
            None => _ = catalog.add(&model.shape, &model.space, name, sub_network)?,
        }
        let Some(entry) = catalog.get_mut(name) else { continue };
        let of_whole = point.scores.tasks.iter().zip(whole).filter(|(_, whole)| **whole);
        for (TaskScore { task, right, items, .. }, _) in of_whole {
            entry.scores.insert(task.clone(), rounded(*right as f64 / (*items).max(1) as f64));
        }
    }
    model.catalog = held.write()?;
    let names = entries.iter().map(|e| e.name).collect::<Vec<_>>().join(", ");
    tracing::info!("the catalog has {names}");
    let parts = tasks.iter().zip(whole).filter(|(_, whole)| !**whole).map(|(t, _)| t.name.as_str());
    let parts = parts.collect::<Vec<_>>().join(", ");
    if !parts.is_empty() {
        tracing::info!(
            "no accuracy was written for {parts}, of which only a sample was scored: lonas eval {} --subnetwork NAME",
            model.folder.path().display()
        );
    }
    Ok(())
}
