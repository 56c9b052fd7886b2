//! The engine's thread: plan a step, classify its texts, send.

use super::turns::{PlannedText, TextPlan, Turns};
use super::{Classified, ClassifyRequest};
use crate::engine::entrance::Inside;
use crate::engine::{Load, Observer, Step};
use crate::model::Classifier;
use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Instant;
use tokio::sync::mpsc;

/// An accepted request on its way to the worker.
pub(super) struct Submission {
    pub(super) request: ClassifyRequest,
    pub(super) results: mpsc::Sender<Result<Classified, String>>,
    pub(super) submitted: Instant,
}

/// An accepted request.
struct Task {
    results: mpsc::Sender<Result<Classified, String>>,
    submitted: Instant,
    /// Texts that hold a place.
    left: usize,
}

pub(super) struct Worker {
    classifier: Box<dyn Classifier>,
    turns: Turns,
    tasks: HashMap<u64, Task>,
    next_id: u64,
    observer: Arc<dyn Observer>,
    inside: Inside<Submission>,
    /// Whether what computes has failed for good.
    lost: bool,
}

impl Worker {
    pub(super) fn new(
        classifier: Box<dyn Classifier>,
        step_tokens: usize,
        observer: Arc<dyn Observer>,
        inside: Inside<Submission>,
    ) -> Self {
        let turns = Turns::new(step_tokens);
        Self { classifier, turns, tasks: HashMap::new(), next_id: 0, observer, inside, lost: false }
    }

    /// Until the handle is dropped, or nothing can be computed any more: then it takes nothing either, and says so.
    pub(super) fn run(mut self) {
        while !self.lost && self.receive() {
            self.drop_cancelled();
            self.step();
        }
        for id in self.tasks.keys().copied().collect::<Vec<_>>() {
            self.give_up(id, if self.lost { "the device is lost" } else { "the engine is shutting down" });
        }
        // What was accepted but never seen: a dropped sender tells its reader that nothing will come.
        self.inside.close();
    }

    /// Takes in what was submitted; waits if there is nothing else to do. False when the engine is to end.
    fn receive(&mut self) -> bool {
        let idle = self.turns.is_idle();
        if idle {
            self.observer.load(&self.load(&[]));
        }
        let (new, go_on) = self.inside.receive(idle);
        for Submission { request, results, submitted } in new {
            let task = Task { results, submitted, left: request.texts.len() };
            self.tasks.insert(self.next_id, task);
            self.turns.add(self.next_id, request.selection, request.texts);
            self.next_id += 1;
        }
        go_on
    }

    fn drop_cancelled(&mut self) {
        let gone = |(&id, task): (&u64, &Task)| task.results.is_closed().then_some(id);
        for id in self.tasks.iter().filter_map(gone).collect::<Vec<_>>() {
            self.remove(id);
        }
    }

    /// One step: the whole engine in a few lines.
    fn step(&mut self) {
        let Some(plan) = self.turns.plan() else { return };
        self.announce(&plan);
        let began = Instant::now();
        let computed = catch_unwind(AssertUnwindSafe(|| self.classifier.classify(&plan.batch)));
        let texts = plan.texts.len();
        match computed {
            Ok(Ok(outputs)) if outputs.len() == texts => {
                plan.texts.iter().zip(outputs).for_each(|(text, outputs)| self.deliver(text, outputs));
            }
            Ok(Ok(outputs)) => {
                let wrong = format!("the model said something of {} texts, not of {texts}", outputs.len());
                return self.fail(&plan, &wrong);
            }
            Ok(Err(error)) => {
                self.lost = error.is_lost();
                return self.fail(&plan, &error.to_string());
            }
            Err(_) => return self.fail(&plan, "the computation panicked"),
        }
        self.observer.step(&Step {
            duration: began.elapsed(),
            prefill_tokens: plan.batch.tokens.len(),
            decode_tokens: 0,
            sub_networks: plan.batch.segments.len(),
            load: self.load(&[]),
        });
    }

    /// Says who leaves the queue and what runs.
    fn announce(&self, plan: &TextPlan) {
        for text in &plan.texts {
            if let Some(task) = self.tasks.get(&text.id) {
                self.observer.started(text.subnetwork, task.submitted.elapsed());
            }
        }
        self.observer.load(&self.load(&plan.texts));
    }

    fn deliver(&mut self, text: &PlannedText, outputs: Vec<f32>) {
        if outputs.iter().any(|output| !output.is_finite()) {
            return self.give_up(text.id, "the model gave a number that is not finite");
        }
        let Some(task) = self.tasks.get_mut(&text.id) else { return };
        task.left -= 1;
        // Its place is free before its reader hears of it.
        self.inside.leave(1);
        // A closed receiver is noticed before the next step; a full channel cannot be.
        let _ = task.results.try_send(Ok(Classified { text: text.text, outputs }));
        if task.left == 0 {
            self.tasks.remove(&text.id);
        }
    }

    /// A step that could not be computed ends the requests in it; the others go on.
    fn fail(&mut self, plan: &TextPlan, reason: &str) {
        tracing::error!("a step of {} texts failed: {reason}", plan.texts.len());
        plan.texts.iter().for_each(|text| self.give_up(text.id, reason));
    }

    fn give_up(&mut self, id: u64, reason: &str) {
        if let Some(task) = self.remove(id) {
            let _ = task.results.try_send(Err(reason.into()));
        }
    }

    /// Frees a request's places, without a last word.
    fn remove(&mut self, id: u64) -> Option<Task> {
        self.turns.remove(id);
        let task = self.tasks.remove(&id)?;
        self.inside.leave(task.left);
        Some(task)
    }

    /// What waits, and what runs.
    fn load(&self, running: &[PlannedText]) -> Load {
        let waiting = self.turns.by_sub_network().into_iter().map(|(id, count)| (id, (0, count)));
        let mut load = Load { by_sub_network: waiting.collect(), ..Load::default() };
        for text in running {
            load.by_sub_network.entry(text.subnetwork).or_default().0 += 1;
        }
        load
    }
}
