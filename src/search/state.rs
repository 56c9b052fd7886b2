//! A search that was written down and read back, perhaps from a damaged file. Who writes it is somebody else's business.

use super::{Method, Search, SearchError, Settings};
use crate::supernet::SearchSpace;

impl Search {
    /// A deserialised search, if it is one of this space by these settings: it goes on where it was serialised.
    ///
    /// # Errors
    /// Another space, other settings, genomes outside of the space, objectives that nobody could have told.
    pub fn restored(self, space: &SearchSpace, settings: &Settings) -> Result<Self, SearchError> {
        let wrong = |reason: String| SearchError::State { reason };
        let fresh = Self::new(space, settings.clone())?;
        if self.settings != fresh.settings {
            return Err(wrong(format!("its settings are {:?}, not {:?}", self.settings, fresh.settings)));
        }
        if self.genes != fresh.genes {
            return Err(wrong("it belongs to another search space".into()));
        }
        self.check().map_err(wrong)?;
        Ok(self)
    }

    fn check(&self) -> Result<(), String> {
        let told = self.evaluations.iter().map(|e| (&e.genome, Some(&e.objectives)));
        let asked = self.asked.iter().map(|(genome, told)| (genome, told.as_ref()));
        let members = self.members.iter().map(|m| (&m.genome, Some(&m.objectives)));
        let count = self.evaluations.first().map_or(0, |e| e.objectives.len());
        for (genome, objectives) in told.chain(asked).chain(members) {
            if !self.genes.accept(genome) {
                return Err(format!("{:?} is no genome of this space", genome.genes()));
            }
            let usable = |o: &Vec<f64>| o.len() == count && o.iter().all(|o| o.is_finite());
            if let Some(bad) = objectives.filter(|o| !usable(o)) {
                return Err(format!("expected {count} finite objectives, got {bad:?}"));
            }
        }
        // Whoever looks at objectives relies on their number.
        let enough = if self.settings.method == Method::Guided { count == 2 } else { count > 0 };
        let none = self.evaluations.is_empty() && self.members.is_empty();
        if !enough && !none {
            return Err(format!("its genomes have {count} objectives"));
        }
        if self.members.iter().any(|m| m.crowding.is_nan()) {
            return Err("a crowding distance is no number".into());
        }
        let most = 2 * self.settings.evaluations;
        if self.evaluations.len() + self.asked.len() > most || self.generation > most {
            return Err("it has more genomes than its settings allow".into());
        }
        Ok(())
    }
}
