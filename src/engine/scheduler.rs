//! Which sequences compute what in the next step.
//!
//! A step has a budget of tokens. Running sequences that decode come first, one token each, in the order of their admission.
//! Then waiting ones are admitted, first come first served, and what is left of the budget goes to prompts: half to the
//! oldest, which so is done in time whatever comes after it, the rest to those with the least left, so that a short prompt
//! does not wait for a long one. Blocks are taken as they are needed; when none is left the youngest running sequence gives
//! its own up, waits in front of the queue, and later computes its tokens again. The oldest is never preempted and every
//! sequence fits the pool by itself, so somebody always gets on.
//!
//! A sequence begins behind what full blocks of others hold of it (see `blocks`), at the latest with its last token, whose
//! logits nobody has kept. While another one computes what it begins with, it gives that one its turns and waits.

use super::blocks::{BlockPool, Origin, Prefix};
use super::handle::EngineOptions;
use super::request::Request;
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
    /// Whether blocks are kept for others that begin alike.
    prefix_cache: bool,
}

#[derive(Debug)]
struct Sequence {
    id: u64,
    selection: Selection,
    /// Prompt and generated tokens.
    tokens: Vec<u32>,
    /// How many of them are the prompt's.
    prompt: usize,
    /// How many of them are in the cache.
    computed: usize,
    /// Positions below this one whose logits are wanted too (for the prompt's log probabilities).
    logits_until: usize,
    blocks: Vec<u32>,
    /// How many of its blocks are full and published, and what these hold.
    published: usize,
    prefix: Prefix,
    /// What stands before its first block.
    start: Prefix,
    /// Whether it has had a share of a step since it was admitted.
    begun: bool,
}

impl Sequence {
    fn new(id: u64, request: &Request) -> Self {
        let Selection { adapter, subnetwork, .. } = request.selection;
        let start = Prefix::Nothing(Origin { adapter, subnetwork, salt: request.cache_salt.clone() });
        Self {
            id,
            selection: request.selection.clone(),
            tokens: request.prompt.clone(),
            prompt: request.prompt.len(),
            computed: 0,
            // The logits of position p say how likely token p + 1 is, so the prompt's last position is not among them.
            logits_until: request.prompt_logprobs.map_or(0, |_| request.prompt.len().saturating_sub(1)),
            blocks: Vec::new(),
            published: 0,
            prefix: start.clone(),
            start,
            begun: false,
        }
    }

    /// As before it was admitted; its blocks have been taken.
    fn put_back(&mut self) {
        (self.computed, self.published, self.begun) = (0, 0, false);
        self.prefix = self.start.clone();
    }

    /// The tokens, in whole blocks, that it can take from others before it begins: their logits are not needed.
    fn reusable(&self, block_size: usize) -> &[u32] {
        let most = if self.logits_until > 0 { 0 } else { self.tokens.len().saturating_sub(1) };
        &self.tokens[..most / block_size * block_size]
    }

    /// Before it begins: blocks of others that hold what comes next, and what these hold.
    fn find(&self, pool: &BlockPool, block_size: usize) -> (Vec<u32>, Prefix) {
        let tokens = self.reusable(block_size).get(self.computed..).unwrap_or_default();
        pool.find(&self.prefix, tokens, block_size)
    }

    /// Before it begins: takes these.
    fn look_up(&mut self, pool: &mut BlockPool, block_size: usize) {
        let (found, prefix) = self.find(pool, block_size);
        debug_assert!(found.is_empty() || self.blocks.len() == self.published);
        pool.share(&found);
        self.published += found.len();
        self.computed = self.published * block_size;
        self.prefix = prefix;
        self.blocks.extend(found);
    }

    /// Tokens that are not computed yet: one while it decodes.
    fn left(&self) -> usize {
        self.tokens.len() - self.computed
    }
}

/// Whose turn it is, and up to which position.
struct Turn {
    index: usize,
    until: usize,
}

/// One step.
#[derive(Debug, Default)]
pub struct StepPlan {
    pub batch: Batch,
    /// In the order of the batch's rows.
    pub sequences: Vec<Planned>,
    /// Sequences that have their first share of a step since they were admitted.
    pub started: Vec<Started>,
    /// Sequences that had to give their blocks up.
    pub preempted: Vec<u64>,
}

/// A sequence that begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Started {
    pub id: u64,
    /// So many of its tokens were looked for in the cache.
    pub looked_up: usize,
    /// So many of them are there already, by others that began alike.
    pub cached: usize,
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
    /// Whether that is one token which it has generated.
    pub decodes: bool,
}

impl Planned {
    /// The output row of the last position.
    pub fn last_output(&self) -> usize {
        let shared = self.wanted == self.positions.len();
        self.first_output + self.wanted - usize::from(shared)
    }
}

impl Scheduler {
    /// A pool of `blocks` blocks of `block_size` positions.
    pub fn new(blocks: usize, block_size: usize, options: &EngineOptions) -> Self {
        let EngineOptions { max_running, step_tokens, prefix_cache, .. } = *options;
        Self {
            waiting: VecDeque::new(),
            running: Vec::new(),
            pool: BlockPool::new(blocks),
            block_size,
            max_running: max_running.max(1),
            step_tokens: step_tokens.max(1),
            prefix_cache,
        }
    }

    /// Puts a sequence at the end of the queue. The caller has made sure that it can never outgrow the pool.
    pub fn add(&mut self, id: u64, request: &Request) {
        self.waiting.push_back(Sequence::new(id, request));
    }

    /// Plans the next step; `None` if there is nothing to do. It is to be computed before the next one is planned.
    pub fn plan(&mut self) -> Option<StepPlan> {
        let mut plan = StepPlan::default();
        let mut budget = self.step_tokens;
        let mut shares = Vec::with_capacity(self.running.len());
        for sequence in &self.running {
            let share = usize::from(sequence.left() == 1).min(budget);
            budget -= share;
            shares.push(share);
        }
        let running = self.running.len();
        budget += self.hold(&mut shares, &mut plan.preempted);
        if self.running.len() == running && budget > 0 {
            self.admit();
        }
        for sequence in self.running.iter_mut().filter(|sequence| !sequence.begun) {
            sequence.look_up(&mut self.pool, self.block_size);
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
            let Turn { index, until } = self.turn(index, shares);
            let computed = self.running[index].computed + shares[index];
            let more = left(index, shares).min(until.saturating_sub(computed)).min(budget);
            shares[index] += more;
            budget -= more;
        }
    }

    /// Who takes the turn of this sequence: itself, or who is at what it could begin with. That one has computed no less
    /// of it, so it needs no more of the step than this one would.
    fn turn(&self, index: usize, shares: &[usize]) -> Turn {
        let sequence = &self.running[index];
        if !self.prefix_cache || sequence.begun || shares[index] > 0 {
            return Turn { index, until: usize::MAX };
        }
        let wanted = sequence.reusable(self.block_size);
        let in_common = |other: &Sequence| {
            let blocks = other.tokens.chunks_exact(self.block_size).zip(wanted.chunks_exact(self.block_size));
            blocks.take_while(|(theirs, own)| theirs == own).count()
        };
        let computing = self.running.iter().enumerate().filter(|&(at, other)| {
            (other.begun || shares[at] > 0)
                && (sequence.published..other.tokens.len() / self.block_size).contains(&other.published)
                && other.start == sequence.start
        });
        let ahead = computing.map(|(at, other)| (at, other.published, in_common(other)));
        let useful = ahead.filter(|&(_, published, blocks)| blocks > published);
        match useful.max_by_key(|&(_, _, blocks)| blocks) {
            Some((index, _, blocks)) => Turn { index, until: blocks * self.block_size },
            None => Turn { index, until: usize::MAX },
        }
    }

    /// Gives running sequences blocks for their shares; returns what those had that had to go.
    fn hold(&mut self, shares: &mut Vec<usize>, preempted: &mut Vec<u64>) -> usize {
        let mut next = 0;
        while next < self.running.len() {
            if shares[next] == 0 || self.make_room(next, shares[next], preempted) {
                next += 1;
            }
        }
        shares.drain(self.running.len()..).sum()
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
            if youngest.begun {
                preempted.push(youngest.id);
            }
            self.pool.release(&mut youngest.blocks);
            youngest.put_back();
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
            let (found, _) = first.find(&self.pool, self.block_size);
            promised_all += promised(first) - found.len();
            if promised_all + self.pool.free_among(&found) > self.pool.free() {
                return;
            }
            let Some(mut first) = self.waiting.pop_front() else { return };
            first.look_up(&mut self.pool, self.block_size);
            self.running.push(first);
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
            if !sequence.begun {
                sequence.begun = true;
                let looks = self.prefix_cache && sequence.logits_until == 0;
                let looked_up = if looks { sequence.tokens.len() } else { 0 };
                plan.started.push(Started { id: sequence.id, looked_up, cached: sequence.computed });
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
            let decodes = last && tokens == 1 && sequence.tokens.len() > sequence.prompt;
            plan.sequences.push(Planned { id: sequence.id, positions, first_output, wanted, last, decodes });
        }
    }

    /// A sequence's share has been computed: others may find the blocks that are full now.
    pub fn publish(&mut self, planned: &Planned) {
        let sequence = self.running.iter_mut().find(|s| s.id == planned.id);
        let Some(sequence) = sequence.filter(|_| self.prefix_cache) else { return };
        let full = planned.positions.end / self.block_size;
        let blocks = sequence.tokens.chunks_exact(self.block_size).zip(&mut sequence.blocks);
        for (tokens, block) in blocks.take(full).skip(sequence.published) {
            sequence.prefix = self.pool.publish(&sequence.prefix, tokens, block);
        }
        sequence.published = full;
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
            *(if sequence.begun { running } else { waiting }) += 1;
        }
        counts
    }

    /// Blocks in use, and all blocks.
    pub fn blocks(&self) -> (usize, usize) {
        (self.pool.total() - self.pool.free(), self.pool.total())
    }
}
