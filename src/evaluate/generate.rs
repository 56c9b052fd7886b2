//! Continuations of prompts, many of them at once: continuous batching over one executor, without a preemption.
//!
//! A prompt is begun when the pool has room for everything that may come of it. In blocks of one position beams share
//! all that they have in common, so that keeping a beam twice copies a block table and nothing else.

use super::beams::Beams;
use super::likelihood::STEP_TOKENS;
use super::preamble::Preambles;
use crate::backend::{BackendError, Draw, Segment, Selection, SequenceSpan};
use crate::generation::token_logprob;
use crate::model::{Batch, Executor, Outputs};
use rayon::prelude::*;
use std::collections::{BTreeSet, VecDeque};

/// A prompt under one sub-network; at least one token.
#[derive(Debug, Clone)]
pub struct Prompt {
    pub tokens: Vec<u32>,
    pub selection: Selection,
}

/// How to continue it.
#[derive(Debug, Clone)]
pub struct Decoding {
    /// At least 1.
    pub max_new_tokens: usize,
    /// 1 takes the likeliest token each time; more is beam search as of transformers 4.31, and needs blocks of one position.
    pub beams: usize,
    /// Tokens that end a text; they are its last.
    pub stop: Vec<u32>,
}

/// Beams that compute together. Beyond this many rows a step of decoding takes longer in proportion.
const MOST_BEAMS: usize = 64;

/// Continues every prompt and gives each text to `done`, with the prompt's index, as soon as it is there.
///
/// # Errors
/// A prompt that does not fit the pool with its texts, what fails below, and what `done` says.
pub fn generate<E: From<BackendError>>(
    executor: &mut dyn Executor,
    prompts: &[Prompt],
    decoding: &Decoding,
    mut done: impl FnMut(usize, Vec<u32>) -> Result<(), E>,
) -> Result<(), E> {
    if decoding.beams > 1 && executor.block_size() > 1 {
        let (expected, got) = ("blocks of one position for beams".into(), executor.block_size().to_string());
        return Err(BackendError::Shape { operation: "generate", expected, got }.into());
    }
    let mut generator = Generator::new(executor, prompts, decoding);
    while generator.admit()? {
        let mut batch = Batch::default();
        let order = generator.plan(&mut batch);
        generator.compute(executor, &batch, &order)?;
        for (prompt, tokens) in generator.finished() {
            done(prompt, tokens)?;
        }
    }
    Ok(())
}

struct Generator<'a> {
    prompts: &'a [Prompt],
    decoding: &'a Decoding,
    preambles: Preambles,
    waiting: VecDeque<usize>,
    running: Vec<Running>,
    block_size: usize,
    free: Vec<u32>,
    /// Blocks that running prompts have or may still take.
    promised: usize,
    blocks: usize,
}

/// A prompt that is being continued.
struct Running {
    prompt: usize,
    beams: Beams,
    /// The blocks of each beam that is alive, in the beams' order.
    tables: Vec<Vec<u32>>,
    /// How many of the first blocks are a preamble's.
    kept: usize,
    /// Positions of the prompt in the cache; less than all of them before the first step.
    computed: usize,
    promised: usize,
}

impl<'a> Generator<'a> {
    fn new(executor: &dyn Executor, prompts: &'a [Prompt], decoding: &'a Decoding) -> Self {
        // The last token's logits are wanted of every prompt, so that one is never a preamble's.
        let sequences = prompts.iter().map(|p| (p.tokens.as_slice(), p.tokens.len() - 1, &p.selection));
        let block_size = executor.block_size();
        let texts = decoding.beams * decoding.max_new_tokens.next_multiple_of(block_size);
        let longest = prompts.iter().map(|p| p.tokens.len()).max().unwrap_or(0);
        let preambles = Preambles::new(executor, sequences, longest + texts);
        let kept = preambles.kept_blocks();
        Self {
            prompts,
            decoding,
            preambles,
            waiting: (0..prompts.len()).collect(),
            running: Vec::new(),
            block_size,
            free: (kept as u32..executor.blocks() as u32).rev().collect(),
            promised: 0,
            blocks: executor.blocks() - kept,
        }
    }

    /// Blocks that a prompt and its texts may come to, without its preamble's.
    fn needed(&self, prompt: usize) -> usize {
        let Decoding { beams, max_new_tokens, .. } = self.decoding;
        let tokens = self.prompts[prompt].tokens.len();
        // Each beam but the first has the prompt in common with it.
        let all = (tokens + max_new_tokens).div_ceil(self.block_size);
        all + (beams - 1) * max_new_tokens.div_ceil(self.block_size)
            - self.preambles.length() / self.block_size
    }

    /// Begins as many prompts as there is room for. False when there is nothing left to do.
    fn admit(&mut self) -> Result<bool, BackendError> {
        let mut rows = self.running.iter().map(|r| r.beams.alive().len()).sum::<usize>();
        let mut beams = self.running.len() * self.decoding.beams;
        while let Some(&prompt) = self.waiting.front() {
            let Prompt { tokens, selection } = &self.prompts[prompt];
            let needed = self.needed(prompt);
            if self.running.is_empty() && needed > self.blocks {
                let limit = self.blocks * self.block_size;
                let expected = format!("at most {limit} tokens, prompt and texts together");
                let got = (needed * self.block_size).to_string();
                return Err(BackendError::Shape { operation: "generate", expected, got });
            }
            let (table, computed) = self.preambles.of(selection);
            let own = tokens.len() - computed;
            let full = beams + self.decoding.beams > MOST_BEAMS || rows + own > STEP_TOKENS;
            if self.promised + needed > self.blocks || (full && !self.running.is_empty()) {
                break;
            }
            // Whoever is admitted next may take the preamble from this step.
            self.preambles.computed(selection);
            self.waiting.pop_front();
            (rows, beams, self.promised) = (rows + own, beams + self.decoding.beams, self.promised + needed);
            let search = Beams::new(self.decoding.beams, tokens.len(), self.decoding.max_new_tokens);
            let kept = table.len();
            let tables = vec![table];
            self.running.push(Running { prompt, beams: search, tables, kept, computed, promised: needed });
        }
        Ok(!self.running.is_empty())
    }

    /// Fills a batch with the next row of every beam and the prompts that were begun; by row of its outputs, whose it is.
    fn plan(&mut self, batch: &mut Batch) -> Vec<usize> {
        let mut order = (0..self.running.len()).collect::<Vec<_>>();
        // Sub-networks together; whoever computes a preamble stands before those who use it.
        order.sort_by_key(|&i| {
            let Selection { adapter, subnetwork, .. } = self.prompts[self.running[i].prompt].selection;
            (adapter, subnetwork)
        });
        for &index in &order {
            let running = &mut self.running[index];
            let Prompt { tokens, selection } = &self.prompts[running.prompt];
            let first = batch.tokens.len();
            for (beam, table) in running.beams.alive().iter().zip(&mut running.tables) {
                let (start, own) = match beam.tokens.last() {
                    None => (running.computed, &tokens[running.computed..]),
                    Some(last) => (tokens.len() + beam.tokens.len() - 1, std::slice::from_ref(last)),
                };
                let missing = (start + own.len()).div_ceil(self.block_size).saturating_sub(table.len());
                table.extend(self.free.drain(self.free.len() - missing..).rev());
                let rows = batch.tokens.len()..batch.tokens.len() + own.len();
                batch.tokens.extend(own);
                batch.positions.extend((start..start + own.len()).map(|p| p as u32));
                batch.outputs.push(rows.end as u32 - 1);
                batch.spans.push(SequenceSpan { rows, start, blocks: table.clone() });
            }
            running.computed = tokens.len();
            let rows = first..batch.tokens.len();
            match batch.segments.last_mut() {
                Some(segment) if segment.selection == *selection => segment.rows.end = rows.end,
                _ => batch.segments.push(Segment { rows, selection: selection.clone() }),
            }
        }
        order
    }

    /// Computes the batch and lets every beam go on.
    fn compute(
        &mut self,
        executor: &mut dyn Executor,
        batch: &Batch,
        order: &[usize],
    ) -> Result<(), BackendError> {
        let greedy = self.decoding.beams == 1;
        let draw =
            Draw { edits: Vec::new(), temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, uniform: 0.0 };
        let draws = (0..batch.outputs.len() as u32).filter(|_| greedy).map(|row| (row, draw.clone()));
        let outputs = executor.sample(batch, &draws.collect::<Vec<_>>())?;
        let candidates = if greedy { Vec::new() } else { self.candidates(&outputs) };
        let mut row = 0;
        for &index in order {
            let running = &mut self.running[index];
            let rows = row..row + running.beams.alive().len();
            row = rows.end;
            if greedy {
                running.beams.push(drawn(&outputs, rows.start)?, &self.decoding.stop);
                continue;
            }
            let parents = running.beams.advance(&candidates[rows], &self.decoding.stop);
            let tables = parents.iter().map(|&p| running.tables[p].clone()).collect();
            let before = std::mem::replace(&mut running.tables, tables);
            let used = running.tables.iter().flatten().copied().collect::<BTreeSet<_>>();
            // Nobody's any more; those of the prompt are everybody's, and given back at the end.
            let prompt = self.prompts[running.prompt].tokens.len();
            let left = before.iter().flat_map(|table| table.iter().skip(prompt)).copied();
            let left = left.filter(|block| !used.contains(block)).collect::<BTreeSet<_>>();
            self.free.extend(left);
            if running.tables.is_empty() {
                // Every beam has ended; the prompt's blocks have nobody else to remember them.
                running.tables = before.iter().take(1).map(|table| table[..prompt].to_vec()).collect();
            }
        }
        Ok(())
    }

    /// Of every row the likeliest next tokens.
    fn candidates(&self, outputs: &Outputs) -> Vec<Vec<(u32, f32)>> {
        let count = Beams::wanted(self.decoding.beams);
        let rows = (0..outputs.rows.len()).into_par_iter();
        rows.map(|row| token_logprob(outputs.logits(row).unwrap_or_default(), 0, count).1).collect()
    }

    /// Takes out those whose search is over; their blocks are free.
    fn finished(&mut self) -> Vec<(usize, Vec<u32>)> {
        let (over, running) =
            std::mem::take(&mut self.running).into_iter().partition(|r: &Running| r.beams.is_done());
        self.running = running;
        let over: Vec<Running> = over;
        for Running { tables, kept, promised, .. } in &over {
            let own = tables.iter().flat_map(|table| table.iter().skip(*kept)).copied();
            self.free.extend(own.collect::<BTreeSet<_>>());
            self.promised -= promised;
        }
        over.into_iter().map(|r| (r.prompt, r.beams.best())).collect()
    }
}

fn drawn(outputs: &Outputs, row: usize) -> Result<u32, BackendError> {
    let wrong = |message: String| BackendError::Library { operation: "generate", message };
    let token = outputs.token(row).ok_or_else(|| wrong("no token was drawn".into()))?;
    token.map_err(|e| wrong(e.to_string()))
}
