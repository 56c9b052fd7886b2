//! Searching a space for sub-networks that no other is better than: NSGA-II over genomes (Deb et al. 2002).
//!
//! Ask and tell: a [`Search`] proposes genomes, whoever runs it scores them. It knows neither what a score means nor what it
//! costs, and no tensor: objectives are numbers, and less is better. [`Method::Faithful`] is the authors' search to the
//! letter (NNCF's BootstrapNAS over pymoo 0.6.0.1); [`Method::Guided`] begins with genomes that span the space and asks for
//! those that a surrogate expects to enlarge the front. Everything is decided by the seed and the scores, so a search that
//! was saved and restored ends as if it had never stopped.

mod error;
mod genome;
mod guided;
mod nsga2;
mod seeds;
mod sorting;
mod state;
mod surrogate;
#[cfg(test)]
mod tests;

pub use error::SearchError;
pub use genome::{Genome, alike};
pub use sorting::{crowding, dominates, fronts, hypervolume};

use crate::supernet::SearchSpace;
use genome::Genes;
use nsga2::{Member, Mutation};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use std::collections::HashSet;

/// How genomes are chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Method {
    /// As LoNAS's scripts do.
    Faithful,
    /// Seeds that span the space, then what a surrogate expects to enlarge the front; takes two objectives.
    Guided,
}

/// Everything that decides a search, beside the space and the scores.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settings {
    pub method: Method,
    /// Genomes to score in all. [`Method::Faithful`] takes a multiple of the population and leaves the rest, as NNCF does.
    pub evaluations: usize,
    /// Genomes of a generation.
    pub population: usize,
    pub seed: u64,
}

/// What was scored.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    pub genome: Genome,
    /// All minimised.
    pub objectives: Vec<f64>,
    /// Counted from 1.
    pub generation: usize,
}

/// What is known of a genome's objectives without scoring it, e.g. what it costs by a formula; may be empty.
pub type Known<'a> = dyn Fn(&Genome) -> Vec<Option<f64>> + 'a;

/// A search, running.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Search {
    settings: Settings,
    genes: Genes,
    /// Counted from 1; of the genomes that are asked for.
    generation: usize,
    /// NSGA-II's population: the survivors of the generations before. The guided search does without.
    members: Vec<Member>,
    /// This generation's genomes, and what was told of them.
    asked: Vec<(Genome, Option<Vec<f64>>)>,
    evaluations: Vec<Evaluation>,
}

impl Search {
    /// A search of `space` that has not begun.
    ///
    /// # Errors
    /// Settings that it cannot run by; a space with one sub-network.
    pub fn new(space: &SearchSpace, settings: Settings) -> Result<Self, SearchError> {
        let wrong = |field, expected: String, got: usize| {
            Err(SearchError::Settings { field, expected, got: got.to_string() })
        };
        if settings.population < 2 {
            return wrong("population", "at least 2".into(), settings.population);
        }
        if settings.population > settings.evaluations {
            let expected = format!("at most the {} evaluations", settings.evaluations);
            return wrong("population", expected, settings.population);
        }
        if settings.evaluations > MOST_EVALUATIONS {
            return wrong("evaluations", format!("at most {MOST_EVALUATIONS}"), settings.evaluations);
        }
        let genes = Genes::of(space);
        if genes.choices.iter().all(|&n| n < 2) {
            return Err(SearchError::NothingToSearch);
        }
        let (members, asked, evaluations) = (Vec::new(), Vec::new(), Vec::new());
        Ok(Self { settings, genes, generation: 0, members, asked, evaluations })
    }

    /// The genomes to score now, or those of them that were not told yet; none when the search is over. `known` spares the
    /// guided search guesses.
    pub fn ask(&mut self, known: &Known<'_>) -> Vec<Genome> {
        // A generation of nobody is the end.
        let told = !self.asked.is_empty() && self.asked.iter().all(|(_, told)| told.is_some());
        if self.generation == 0 || told {
            self.advance(known);
        }
        self.asked.iter().filter(|(_, told)| told.is_none()).map(|(genome, _)| genome.clone()).collect()
    }

    /// What a genome that was asked for scored.
    ///
    /// # Errors
    /// Another genome; no objectives, a number of them that differs from before, one that is not finite.
    pub fn tell(&mut self, genome: &Genome, objectives: Vec<f64>) -> Result<(), SearchError> {
        let wrong =
            |expected: &str, got: String| Err(SearchError::Objectives { expected: expected.into(), got });
        if let Some(bad) = objectives.iter().find(|o| !o.is_finite()) {
            return wrong("finite numbers", bad.to_string());
        }
        let (most, got) = (objectives.len(), format!("{} of them", objectives.len()));
        if self.settings.method == Method::Guided && most != 2 {
            return wrong("2 for the guided search", got);
        }
        match self.evaluations.first().map(|e| e.objectives.len()) {
            Some(before) if before != most => return wrong(&format!("{before}, as before"), got),
            None if most == 0 => return wrong("at least 1", got),
            _ => {}
        }
        let Some((_, told)) = self.asked.iter_mut().find(|(asked, told)| asked == genome && told.is_none())
        else {
            return Err(SearchError::NotAsked { genome: format!("{:?}", genome.genes()) });
        };
        *told = Some(objectives.clone());
        self.evaluations.push(Evaluation { genome: genome.clone(), objectives, generation: self.generation });
        Ok(())
    }

    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// All that was told, in that order.
    pub fn evaluations(&self) -> &[Evaluation] {
        &self.evaluations
    }

    /// How many genomes it will score, if the space has so many.
    pub fn total(&self) -> usize {
        match self.settings.method {
            Method::Faithful => {
                self.settings.evaluations / self.settings.population * self.settings.population
            }
            Method::Guided => self.settings.evaluations,
        }
    }

    /// The population: of a faithful search those that survived the last whole generation, in no order that means anything.
    pub fn population(&self) -> impl Iterator<Item = (&Genome, &[f64])> {
        self.members.iter().map(|m| (&m.genome, m.objectives.as_slice()))
    }

    /// Takes in a whole generation and chooses the next one.
    fn advance(&mut self, known: &Known<'_>) {
        let mut random = ChaCha8Rng::seed_from_u64(self.settings.seed);
        // A stream a generation: nothing of the generator has to be saved.
        self.generation += 1;
        random.set_stream(self.generation as u64);
        let told = std::mem::take(&mut self.asked).into_iter();
        let told =
            told.filter_map(|(genome, told)| Some(Member { genome, objectives: told?, crowding: 0.0 }));
        let first = self.members.is_empty();
        self.members.extend(told);
        let asked = match self.settings.method {
            Method::Faithful => self.faithful(first, &mut random),
            Method::Guided => self.guided(known, &mut random),
        };
        self.asked = asked.into_iter().map(|genome| (genome, None)).collect();
    }

    fn faithful(&mut self, first: bool, random: &mut ChaCha8Rng) -> Vec<Genome> {
        let Settings { population, evaluations, .. } = self.settings;
        if self.generation == 1 {
            return distinct((0..population).map(|_| {
                Genome::new(self.genes.choices.iter().map(|&n| random.random_range(0..n)).collect())
            }));
        }
        // The initial population may be smaller, by duplicates, and all of it survives.
        let count = if first { self.members.len() } else { population };
        self.members = nsga2::survive(std::mem::take(&mut self.members), count, random);
        if self.generation > evaluations / population {
            return Vec::new();
        }
        let mutation = Mutation::faithful(self.genes.len());
        nsga2::children(&self.members, &self.genes, mutation, population, &HashSet::new(), random)
    }

    fn guided(&mut self, known: &Known<'_>, random: &mut ChaCha8Rng) -> Vec<Genome> {
        let Settings { population, evaluations, .. } = self.settings;
        self.members.clear();
        if self.evaluations.is_empty() {
            let begin = (evaluations / 5).max(population);
            return seeds::seeds(&self.genes, begin, random);
        }
        let count = population.min(evaluations.saturating_sub(self.evaluations.len()));
        guided::propose(&self.genes, &self.evaluations, count, known, random)
    }
}

/// At most `count` different genomes of every size, which span the space: its ends, uniform ones, then random ones.
pub fn spanning(space: &SearchSpace, count: usize, seed: u64) -> Vec<Genome> {
    seeds::seeds(&Genes::of(space), count, &mut ChaCha8Rng::seed_from_u64(seed))
}

/// So that a state that is written often stays small.
const MOST_EVALUATIONS: usize = 10_000;

/// Without those that came before.
fn distinct(genomes: impl Iterator<Item = Genome>) -> Vec<Genome> {
    let mut known = HashSet::new();
    genomes.filter(|g| known.insert(g.clone())).collect()
}

/// The evaluations that no other dominates, by rising first objective; of equal ones the first.
pub fn front(evaluations: &[Evaluation]) -> Vec<&Evaluation> {
    let points = evaluations.iter().map(|e| e.objectives.as_slice()).collect::<Vec<_>>();
    let first = |&i: &usize| !points[..i].contains(&points[i]);
    let best = fronts(&points).into_iter().next().unwrap_or_default();
    let mut best = best.into_iter().filter(first).map(|i| &evaluations[i]).collect::<Vec<_>>();
    best.sort_by(|a, b| a.objectives[0].total_cmp(&b.objectives[0]));
    best
}

/// LoNAS's rule of the best sub-network (NNCF's `_save_checkpoint_best_subnetwork`): of those whose second objective lies
/// below `limit`, and not on it, the one with the least first objective; of equal ones the first.
pub fn cheapest_below(evaluations: &[Evaluation], limit: f64) -> Option<&Evaluation> {
    let good = evaluations.iter().filter(|e| e.objectives.get(1).is_some_and(|&o| o < limit));
    good.fold(None, |best: Option<&Evaluation>, e| match best {
        Some(best) if e.objectives[0] >= best.objectives[0] => Some(best),
        _ => Some(e),
    })
}
