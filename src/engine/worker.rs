//! The engine's thread: plan a step, compute it, sample, send.

use super::entrance::Inside;
use super::handle::EngineOptions;
use super::observer::{Load, Observer, Step};
use super::{Event, Finish, Planned, Request, Scheduler, Started, StepPlan, TokenLogprob};
use crate::backend::Draw;
use crate::generation::{Sampler, token_logprob};
use crate::model::{Executor, Outputs};
use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Instant;
use tokio::sync::mpsc;

/// An accepted sequence on its way to the worker.
pub(super) struct Submission {
    pub(super) request: Request,
    pub(super) events: mpsc::Sender<Event>,
    pub(super) submitted: Instant,
}

/// An accepted sequence.
struct Task {
    request: Request,
    events: mpsc::Sender<Event>,
    submitted: Instant,
    sampler: Sampler,
    generated: usize,
    /// Whether it has left the queue once; a preempted one does not count as waiting again.
    started: bool,
    /// Log probabilities of prompt tokens `1..`, as far as they are known.
    prompt_logprobs: Vec<TokenLogprob>,
    prompt_sent: bool,
}

pub(super) struct Worker {
    executor: Box<dyn Executor>,
    scheduler: Scheduler,
    tasks: HashMap<u64, Task>,
    next_id: u64,
    observer: Arc<dyn Observer>,
    inside: Inside<Submission>,
    /// Whether what computes has failed for good.
    lost: bool,
}

impl Worker {
    pub(super) fn new(
        executor: Box<dyn Executor>,
        options: EngineOptions,
        observer: Arc<dyn Observer>,
        inside: Inside<Submission>,
    ) -> Self {
        let scheduler = Scheduler::new(executor.blocks(), executor.block_size(), &options);
        Self { executor, scheduler, tasks: HashMap::new(), next_id: 0, observer, inside, lost: false }
    }

    /// Until the handle is dropped, or nothing can be computed any more: then it takes nothing either, and says so.
    pub(super) fn run(mut self) {
        while !self.lost && self.receive() {
            self.drop_cancelled();
            self.step();
        }
        for (_, task) in std::mem::take(&mut self.tasks) {
            let why = if self.lost { "the device is lost" } else { "the engine is shutting down" };
            self.end(&task, Event::Failed(why.into()));
        }
        // What was accepted but never seen: a dropped sender tells its reader that nothing will come.
        self.inside.close();
    }

    /// One step: the whole engine in a few lines.
    fn step(&mut self) {
        let Some(plan) = self.scheduler.plan() else { return };
        self.announce(&plan);
        let began = Instant::now();
        let draws = self.draws(&plan);
        let computed = catch_unwind(AssertUnwindSafe(|| self.executor.sample(&plan.batch, &draws)));
        let outputs = match computed {
            Ok(Ok(outputs)) => outputs,
            Ok(Err(error)) => {
                self.lost = error.is_lost();
                return self.fail(&plan, &error.to_string());
            }
            Err(_) => return self.fail(&plan, "the computation panicked"),
        };
        for planned in &plan.sequences {
            self.deliver(planned, &outputs);
        }
        self.report(&plan, began);
    }

    /// Takes in what was submitted; waits if there is nothing else to do. False when the engine is to end.
    fn receive(&mut self) -> bool {
        let idle = self.scheduler.is_idle();
        if idle {
            self.observer.load(&self.load());
        }
        let (new, go_on) = self.inside.receive(idle);
        new.into_iter().for_each(|submission| self.accept(submission));
        go_on
    }

    fn accept(&mut self, submission: Submission) {
        let Submission { request, events, submitted } = submission;
        let id = self.next_id;
        self.next_id += 1;
        let sampler = Sampler::new(request.sampling.clone(), &request.prompt);
        self.scheduler.add(id, &request);
        let task = Task {
            request,
            events,
            submitted,
            sampler,
            generated: 0,
            started: false,
            prompt_logprobs: Vec::new(),
            prompt_sent: false,
        };
        self.tasks.insert(id, task);
    }

    fn drop_cancelled(&mut self) {
        let gone = |(&id, task): (&u64, &Task)| task.events.is_closed().then_some(id);
        for id in self.tasks.iter().filter_map(gone).collect::<Vec<_>>() {
            self.remove(id);
        }
    }

    fn announce(&mut self, plan: &StepPlan) {
        for id in &plan.preempted {
            if let Some(task) = self.tasks.get(id) {
                self.observer.preempted(task.request.selection.subnetwork);
            }
        }
        for Started { id, looked_up, cached } in &plan.started {
            let Some(task) = self.tasks.get_mut(id).filter(|t| !t.started) else { continue };
            task.started = true;
            let subnetwork = task.request.selection.subnetwork;
            self.observer.started(subnetwork, task.submitted.elapsed());
            self.observer.looked_up(subnetwork, *looked_up, *cached);
            let _ = task.events.try_send(Event::Started { cached: *cached });
        }
    }

    /// What is to be drawn from the step's outputs: the next tokens of those who only want tokens.
    fn draws(&mut self, plan: &StepPlan) -> Vec<(u32, Draw)> {
        let next = plan.sequences.iter().filter(|planned| planned.last);
        let draw = |planned: &Planned| {
            let task = self.tasks.get_mut(&planned.id)?;
            let wanted = task.request.max_tokens > 0 && task.request.logprobs.is_none();
            wanted.then(|| (planned.last_output() as u32, task.draw()))
        };
        next.filter_map(draw).collect()
    }

    /// Everything that one sequence gets out of a step.
    fn deliver(&mut self, planned: &Planned, outputs: &Outputs) {
        let Some(task) = self.tasks.get_mut(&planned.id) else { return };
        task.note_prompt(planned, outputs);
        if !planned.last {
            return self.scheduler.publish(planned);
        }
        if task.request.max_tokens == 0 {
            self.scheduler.publish(planned);
            return self.finish(planned.id, Event::Finished(Finish::Length));
        }
        let finished = match task.next_token(outputs, planned.last_output()) {
            Ok((token, event)) => {
                // Not where its logits are no numbers: whatever made them so may be in its blocks.
                self.scheduler.publish(planned);
                // A closed receiver is noticed before the next step; a full channel cannot be.
                let _ = task.events.try_send(event);
                self.scheduler.push(planned.id, token);
                task.finish_after(token).map(Event::Finished)
            }
            Err(error) => Some(Event::Failed(error)),
        };
        if let Some(event) = finished {
            self.finish(planned.id, event);
        }
    }

    /// A step that could not be computed ends the sequences in it; the others go on.
    fn fail(&mut self, plan: &StepPlan, reason: &str) {
        tracing::error!("a step of {} sequences failed: {reason}", plan.sequences.len());
        for planned in &plan.sequences {
            self.finish(planned.id, Event::Failed(reason.to_string()));
        }
    }

    fn finish(&mut self, id: u64, event: Event) {
        self.scheduler.remove(id);
        if let Some(task) = self.tasks.remove(&id) {
            self.end(&task, event);
        }
    }

    /// Without a last event: nobody listens any more.
    fn remove(&mut self, id: u64) {
        self.scheduler.remove(id);
        if self.tasks.remove(&id).is_some() {
            self.inside.leave(1);
        }
    }

    /// Its place is free before its reader hears the last of it.
    fn end(&self, task: &Task, event: Event) {
        self.inside.leave(1);
        let _ = task.events.try_send(event);
    }

    fn report(&self, plan: &StepPlan, began: Instant) {
        let rows = plan.sequences.iter().map(|s| s.positions.len());
        let decode_tokens = plan.sequences.iter().filter(|s| s.decodes).count();
        self.observer.step(&Step {
            duration: began.elapsed(),
            prefill_tokens: rows.sum::<usize>() - decode_tokens,
            decode_tokens,
            sub_networks: plan.batch.segments.len(),
            load: self.load(),
        });
    }

    fn load(&self) -> Load {
        let (blocks_used, blocks) = self.scheduler.blocks();
        Load { by_sub_network: self.scheduler.by_sub_network(), blocks_used, blocks }
    }
}

impl Task {
    /// Keeps the log probabilities of prompt tokens that this step makes known; sends them when all are.
    fn note_prompt(&mut self, planned: &Planned, outputs: &Outputs) {
        let (Some(top), false) = (self.request.prompt_logprobs, self.prompt_sent) else { return };
        for i in 0..planned.wanted {
            let predicted = planned.positions.start + i + 1;
            // After a preemption the same positions are computed again.
            let logits =
                outputs.logits(planned.first_output + i).filter(|_| predicted > self.prompt_logprobs.len());
            if let Some(logits) = logits {
                let token = self.request.prompt[predicted];
                let (logprob, top) = token_logprob(logits, token, top);
                self.prompt_logprobs.push(TokenLogprob { token, logprob, top });
            }
        }
        if planned.positions.end >= self.request.prompt.len() {
            self.prompt_sent = true;
            let _ = self.events.try_send(Event::Prompt(std::mem::take(&mut self.prompt_logprobs)));
        }
    }

    /// How to choose the next token.
    fn draw(&mut self) -> Draw {
        let early = self.generated < self.request.min_tokens;
        self.sampler.draw(if early { &self.request.stop_tokens } else { &[] })
    }

    /// The next token: as it was drawn, or drawn now from logits of which the event's log probability is wanted too.
    fn next_token(&mut self, outputs: &Outputs, output: usize) -> Result<(u32, Event), String> {
        let logits = outputs.logits(output).unwrap_or_default();
        let choice = outputs.token(output).unwrap_or_else(|| self.draw().choose(logits));
        let token = choice.map_err(|e| e.to_string())?;
        let logprob = self.request.logprobs.map(|top| {
            let (logprob, top) = token_logprob(logits, token, top);
            TokenLogprob { token, logprob, top }
        });
        self.sampler.note(token);
        self.generated += 1;
        Ok((token, Event::Token { token, logprob, at: Instant::now() }))
    }

    fn finish_after(&self, token: u32) -> Option<Finish> {
        if self.request.stop_tokens.contains(&token) {
            return Some(Finish::Stop(token));
        }
        (self.generated >= self.request.max_tokens).then_some(Finish::Length)
    }
}
