//! Which sequences compute what in the next step.
//!
//! A step has a budget of tokens. Running sequences that decode come first, one token each, in the order of their admission.
//! Then waiting ones are admitted, first come first served, and what is left of the budget goes to prompts: half to the
//! oldest, which so is done in time whatever comes after it, the rest to those with the least left, so that a short prompt
//! does not wait for a long one. Blocks are taken as they are needed; when none is left the youngest running sequence gives
//! its own up, waits in front of the queue, and later computes its tokens again. The oldest is never preempted and every
//! sequence fits the pool by itself, so somebody always gets on.

use super::blocks::BlockPool;
use crate::backend::{Segment, Selection, SequenceSpan};
use crate::model::Batch;
use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;

/// Sequences of one engine, waiting and running.
#[derive(Debug)]
pub struct Scheduler {
    waiting: VecDeque<Sequence>,
    /// In the order of their admission.
    running: Vec<Sequence>,
    pool: BlockPool,
    block_size: usize,
    max_running: usize,
    step_tokens: usize,
}

#[derive(Debug)]
struct Sequence {
    id: u64,
    selection: Selection,
    /// Prompt and generated tokens.
    tokens: Vec<u32>,
    /// How many of them are in the cache.
    computed: usize,
    /// Positions below this one whose logits are wanted too (for the prompt's log probabilities).
    logits_until: usize,
    blocks: Vec<u32>,
}

impl Sequence {
    /// Tokens that are not computed yet: one while it decodes.
    fn left(&self) -> usize {
        self.tokens.len() - self.computed
    }
}

/// One step.
#[derive(Debug, Default)]
pub struct StepPlan {
    pub batch: Batch,
    /// In the order of the batch's rows.
    pub sequences: Vec<Planned>,
    /// Sequences of which this step computes the first tokens.
    pub started: Vec<u64>,
    /// Sequences that had to give their blocks up.
    pub preempted: Vec<u64>,
}

/// One sequence's share of a step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Planned {
    pub id: u64,
    /// The positions that are computed.
    pub positions: Range<usize>,
    /// Its rows of the logits: of the first `wanted` positions, then (if `last`) of the last one.
    pub first_output: usize,
    /// How many of its first positions' logits are wanted for prompt log probabilities.
    pub wanted: usize,
    /// Whether all its tokens are computed with this step, so that the next one can be sampled.
    pub last: bool,
}

impl Planned {
    /// The output row of the last position.
    pub fn last_output(&self) -> usize {
        let shared = self.wanted == self.positions.len();
        self.first_output + self.wanted - usize::from(shared)
    }
}

impl Scheduler {
    /// A pool of `blocks` blocks of `block_size` positions; at most `max_running` sequences and `step_tokens` tokens in
    /// one step.
    pub fn new(blocks: usize, block_size: usize, max_running: usize, step_tokens: usize) -> Self {
        let pool = BlockPool::new(blocks);
        let (max_running, step_tokens) = (max_running.max(1), step_tokens.max(1));
        Self { waiting: VecDeque::new(), running: Vec::new(), pool, block_size, max_running, step_tokens }
    }

    /// Puts a sequence at the end of the queue. `logits_until`: the logits of its positions below this one are wanted
    /// too. The caller has made sure that the sequence can never outgrow the pool.
    pub fn add(&mut self, id: u64, selection: Selection, tokens: Vec<u32>, logits_until: usize) {
        let blocks = Vec::new();
        self.waiting.push_back(Sequence { id, selection, tokens, computed: 0, logits_until, blocks });
    }

    /// Plans the next step and takes it as computed; `None` if there is nothing to do.
    pub fn plan(&mut self) -> Option<StepPlan> {
        let mut plan = StepPlan::default();
        let mut budget = self.step_tokens;
        let mut shares = Vec::with_capacity(self.running.len());
        for sequence in &self.running {
            let share = usize::from(sequence.left() == 1).min(budget);
            budget -= share;
            shares.push(share);
        }
        self.hold(&mut shares, &mut plan.preempted);
        if plan.preempted.is_empty() && budget > 0 {
            self.admit();
        }
        shares.resize(self.running.len(), 0);
        self.share_out(budget, &mut shares);
        self.hold(&mut shares, &mut plan.preempted);
        let shares = shares.into_iter().enumerate().filter(|&(_, tokens)| tokens > 0).collect::<Vec<_>>();
        if shares.is_empty() {
            return None;
        }
        self.fill(&mut plan, shares);
        Some(plan)
    }

    /// Divides what decoding leaves of a step among prompts.
    fn share_out(&self, mut budget: usize, shares: &mut [usize]) {
        let left = |index: usize, shares: &[usize]| self.running[index].left() - shares[index];
        let mut prompts = (0..shares.len()).filter(|&i| left(i, shares) > 0).collect::<Vec<_>>();
        let Some(&oldest) = prompts.first() else { return };
        shares[oldest] += left(oldest, shares).min(budget.div_ceil(2));
        budget -= shares[oldest];
        // Of equal ones the older first: the sort is stable.
        prompts.sort_by_key(|&index| left(index, shares));
        for index in prompts {
            let more = left(index, shares).min(budget);
            shares[index] += more;
            budget -= more;
        }
    }

    /// Gives running sequences blocks for their shares; the shares of those that had to go go with them.
    fn hold(&mut self, shares: &mut Vec<usize>, preempted: &mut Vec<u64>) {
        let mut next = 0;
        while next < self.running.len() {
            if shares[next] == 0 || self.make_room(next, shares[next], preempted) {
                next += 1;
            }
        }
        shares.truncate(self.running.len());
    }

    /// Gives running sequence `index` blocks for `tokens` more, from the youngest ones if need be. False if it was
    /// itself the youngest and had to go.
    fn make_room(&mut self, index: usize, tokens: usize, preempted: &mut Vec<u64>) -> bool {
        loop {
            let sequence = &mut self.running[index];
            let wanted = (sequence.computed + tokens).div_ceil(self.block_size);
            if self.pool.grow(&mut sequence.blocks, wanted) {
                return true;
            }
            let Some(mut youngest) = self.running.pop() else { return false };
            if !youngest.blocks.is_empty() {
                preempted.push(youngest.id);
            }
            self.pool.release(&mut youngest.blocks);
            youngest.computed = 0;
            self.waiting.push_front(youngest);
            if index == self.running.len() {
                return false;
            }
        }
    }

    /// Admits waiting sequences while there is room for all of their tokens.
    fn admit(&mut self) {
        // What running ones may still take of what they have, not only this step's share: otherwise prompts admitted
        // together would soon preempt each other.
        let promised = |s: &Sequence| s.tokens.len().div_ceil(self.block_size) - s.blocks.len();
        let mut promised_all = self.running.iter().map(promised).sum::<usize>();
        while self.running.len() < self.max_running {
            let Some(first) = self.waiting.front() else { return };
            promised_all += promised(first);
            if promised_all > self.pool.free() {
                return;
            }
            self.running.extend(self.waiting.pop_front());
        }
    }

    /// Lays the shares out as a batch in which equal sub-networks stand together.
    fn fill(&mut self, plan: &mut StepPlan, mut shares: Vec<(usize, usize)>) {
        shares.sort_by_key(|&(index, _)| {
            let Selection { adapter, subnetwork, .. } = self.running[index].selection;
            (adapter, subnetwork)
        });
        for (index, tokens) in shares {
            let sequence = &mut self.running[index];
            let positions = sequence.computed..sequence.computed + tokens;
            if sequence.computed == 0 {
                plan.started.push(sequence.id);
            }
            let last = positions.end == sequence.tokens.len();
            let wanted = sequence.logits_until.clamp(positions.start, positions.end) - positions.start;
            let batch = &mut plan.batch;
            let (row, first_output) = (batch.tokens.len(), batch.outputs.len());
            batch.tokens.extend(&sequence.tokens[positions.clone()]);
            batch.positions.extend(positions.clone().map(|p| p as u32));
            batch.outputs.extend((row..row + wanted).map(|r| r as u32));
            if last && wanted < tokens {
                batch.outputs.push((row + tokens - 1) as u32);
            }
            let rows = row..row + tokens;
            let (start, blocks) = (positions.start, sequence.blocks.clone());
            batch.spans.push(SequenceSpan { rows: rows.clone(), start, blocks });
            match batch.segments.last_mut() {
                Some(segment) if segment.selection == sequence.selection => segment.rows.end = rows.end,
                _ => batch.segments.push(Segment { rows, selection: sequence.selection.clone() }),
            }
            sequence.computed = positions.end;
            plan.sequences.push(Planned { id: sequence.id, positions, first_output, wanted, last });
        }
    }

    /// Appends a sampled token to a running sequence.
    pub fn push(&mut self, id: u64, token: u32) {
        if let Some(sequence) = self.running.iter_mut().find(|s| s.id == id) {
            sequence.tokens.push(token);
        }
    }

    /// Forgets a sequence, wherever it is; its blocks are free at once.
    pub fn remove(&mut self, id: u64) {
        self.waiting.retain(|s| s.id != id);
        if let Some(index) = self.running.iter().position(|s| s.id == id) {
            let mut sequence = self.running.remove(index);
            self.pool.release(&mut sequence.blocks);
        }
    }

    /// Whether there is nothing left to do.
    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty()
    }

    /// By sub-network: how many sequences run and wait.
    pub fn by_sub_network(&self) -> BTreeMap<u32, (usize, usize)> {
        let mut counts = BTreeMap::<u32, (usize, usize)>::new();
        for sequence in self.running.iter().chain(&self.waiting) {
            let (running, waiting) = counts.entry(sequence.selection.subnetwork).or_default();
            // An admitted one waits for its first share of a step.
            *(if sequence.computed > 0 { running } else { waiting }) += 1;
        }
        counts
    }

    /// Blocks in use, and all blocks.
    pub fn blocks(&self) -> (usize, usize) {
        (self.pool.total() - self.pool.free(), self.pool.total())
    }
}
