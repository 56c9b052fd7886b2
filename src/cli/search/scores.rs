//! What sub-networks score on the tasks, many of them in one batch.

use crate::backend::Selection;
use crate::cli::Failure;
use crate::cli::open::OpenedModel;
use crate::cli::tasks::Task;
use crate::evaluate::multiple_choice;
use crate::model::Executor;
use crate::search::Genome;
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::time::Instant;

/// What one sub-network scored.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Scores {
    pub(super) tasks: Vec<TaskScore>,
    /// Its part of the time that those took that were scored with it.
    pub(super) seconds: f64,
}

/// On one task.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct TaskScore {
    pub(super) task: String,
    pub(super) right: usize,
    pub(super) items: usize,
    /// Nats per token of the right answers.
    pub(super) loss: f64,
}

impl Scores {
    /// The mean over tasks, each counting the same (LoNAS's average).
    pub(super) fn accuracy(&self) -> f64 {
        self.mean(|t| t.right as f64 / t.items.max(1) as f64)
    }

    /// Likewise.
    pub(super) fn loss(&self) -> f64 {
        self.mean(|t| t.loss)
    }

    pub(super) fn items(&self) -> usize {
        self.tasks.iter().map(|t| t.items).sum()
    }

    fn mean(&self, value: impl Fn(&TaskScore) -> f64) -> f64 {
        self.tasks.iter().map(value).sum::<f64>() / self.tasks.len().max(1) as f64
    }
}

/// A loaded model that scores genomes.
pub(super) struct Scorer<'a> {
    executor: Box<dyn Executor>,
    model: &'a OpenedModel,
    tasks: &'a [Task],
    /// Sub-networks so far: each has an id of its own in the process.
    selected: u32,
}

impl<'a> Scorer<'a> {
    pub(super) fn new(executor: Box<dyn Executor>, model: &'a OpenedModel, tasks: &'a [Task]) -> Self {
        Self { executor, model, tasks, selected: 0 }
    }

    /// One for each genome.
    pub(super) fn score(&mut self, genomes: &[Genome]) -> Result<Vec<Scores>, Failure> {
        let (began, first) = (Instant::now(), self.selected);
        self.selected += genomes.len() as u32;
        let select = |(subnetwork, genome): (u32, &Genome)| selection(self.model, genome, subnetwork);
        let selections = (first..).zip(genomes).map(select).collect::<Vec<_>>();
        let mut scores = vec![Scores { tasks: Vec::new(), seconds: 0.0 }; genomes.len()];
        for task in self.tasks {
            let of_task = multiple_choice(&mut *self.executor, &task.items, &selections, |_| {})?;
            for (scores, of_task) in scores.iter_mut().zip(of_task) {
                if !of_task.answer_loss.is_finite() {
                    return Err(format!("task `{}`: a loss is {}", task.name, of_task.answer_loss).into());
                }
                let (right, items) = (of_task.accuracy.right, of_task.accuracy.count);
                scores.tasks.push(TaskScore {
                    task: task.name.clone(),
                    right,
                    items,
                    loss: of_task.answer_loss,
                });
            }
        }
        let each = began.elapsed().as_secs_f64() / genomes.len().max(1) as f64;
        scores.iter_mut().for_each(|s| s.seconds = each);
        Ok(scores)
    }
}

/// How a batch selects a genome's sub-network.
pub(super) fn selection(model: &OpenedModel, genome: &Genome, subnetwork: u32) -> Selection {
    let shape = Arc::new(model.space.resolve(&model.shape, &genome.sub_network(&model.space)));
    Selection { adapter: 0, subnetwork, shape }
}
