//! Many texts in one step, no token of a sub-network computed twice.
//!
//! Texts of one sub-network stand together. A text takes as many of its first positions as it can from one that stands before
//! it, block table and rows of logits alike, so a step computes the tree of its texts' beginnings. A text's last token
//! is never computed: nothing follows it.

use super::likelihood::{STEP_TOKENS, Scored, Text};
use super::preamble::{Preambles, common};
use crate::backend::{BackendError, Segment, Selection, SequenceSpan};
use crate::model::{Batch, Executor};
use std::cmp::Reverse;

/// A step that is being filled.
pub(super) struct Step<'a> {
    groups: Vec<Group<'a>>,
    /// Where each text went, in the order in which they came: group, place in it.
    places: Vec<(usize, usize)>,
    block_size: usize,
    /// Rows, and blocks of the pool, that are taken.
    rows: usize,
    blocks: usize,
    most_blocks: usize,
}

/// The texts of one sub-network.
struct Group<'a> {
    selection: &'a Selection,
    texts: Vec<Placed<'a>>,
}

struct Placed<'a> {
    text: &'a Text,
    /// Its first position that is computed for it.
    from: usize,
    /// Whose rows the positions before that are; without one, a preamble's.
    source: Option<usize>,
}

/// A text's place in the batch.
struct Laid {
    blocks: Vec<u32>,
    /// The row of each computed position; of those in the preamble only where this step computes it.
    rows: Vec<Option<u32>>,
}

impl<'a> Step<'a> {
    pub(super) fn new(executor: &dyn Executor, preambles: &Preambles) -> Self {
        let most_blocks = executor.blocks().saturating_sub(preambles.kept_blocks());
        let block_size = executor.block_size();
        Self { groups: Vec::new(), places: Vec::new(), block_size, rows: 0, blocks: 0, most_blocks }
    }

    /// Takes a text in; false where the step is full.
    pub(super) fn add(&mut self, text: &'a Text, preambles: &Preambles) -> bool {
        let group = self.groups.iter().position(|g| *g.selection == text.selection);
        let (from, source) = self.beginning(group, text, preambles);
        let computed = text.computed().len();
        let rows = computed - from;
        // Those of the preamble are kept for it anyway.
        let blocks = computed.div_ceil(self.block_size) - from.max(preambles.length()) / self.block_size;
        if self.blocks + blocks > self.most_blocks || (self.rows > 0 && self.rows + rows > STEP_TOKENS) {
            return false;
        }
        (self.rows, self.blocks) = (self.rows + rows, self.blocks + blocks);
        let group = group.unwrap_or_else(|| {
            self.groups.push(Group { selection: &text.selection, texts: Vec::new() });
            self.groups.len() - 1
        });
        let texts = &mut self.groups[group].texts;
        self.places.push((group, texts.len()));
        texts.push(Placed { text, from, source });
        true
    }

    /// How many positions a text takes from elsewhere, and from whom.
    fn beginning(&self, group: Option<usize>, text: &Text, preambles: &Preambles) -> (usize, Option<usize>) {
        let Some(group) = group else { return (preambles.of(&text.selection).1, None) };
        let others = self.groups[group].texts.iter().enumerate();
        let shared = others.map(|(i, placed)| (common(placed.text.computed(), text.computed()), i));
        let best = shared.max_by_key(|&(shared, i)| (shared, Reverse(i)));
        best.map_or((0, None), |(shared, i)| (shared / self.block_size * self.block_size, Some(i)))
    }

    /// Computes the step. One result for each text, in the order in which they came.
    pub(super) fn score(
        self,
        executor: &mut dyn Executor,
        preambles: &mut Preambles,
    ) -> Result<Vec<Scored>, BackendError> {
        let mut batch = Batch::default();
        let laid = self.lay(&mut batch, preambles);
        let mut output_of = vec![None; batch.tokens.len()];
        for (group, laid) in self.groups.iter().zip(&laid) {
            for (placed, laid) in group.texts.iter().zip(laid) {
                let predicting = &laid.rows[placed.text.context - 1..];
                predicting.iter().flatten().for_each(|&row| output_of[row as usize] = Some(0));
            }
        }
        for (row, output) in output_of.iter_mut().enumerate().filter(|(_, o)| o.is_some()) {
            *output = Some(batch.outputs.len());
            batch.outputs.push(row as u32);
        }
        let wanted = self.places.iter().map(|&(group, place)| {
            let (text, laid) = (self.groups[group].texts[place].text, &laid[group][place]);
            let predicted = laid.rows[text.context - 1..].iter().zip(&text.tokens[text.context..]);
            let output = |row: &Option<u32>| row.and_then(|row| output_of[row as usize]);
            predicted.map(|(row, &token)| (output(row), token)).collect::<Vec<_>>()
        });
        let wanted = wanted.collect::<Vec<_>>();
        let named = wanted.iter().flatten().filter_map(|&(output, token)| Some((output? as u32, token)));
        // Texts without a token to predict make an empty step.
        let logprobs = match batch.tokens.is_empty() {
            true => Vec::new(),
            false => executor.log_probabilities(&batch, &named.collect::<Vec<_>>())?,
        };
        self.groups.iter().for_each(|g| preambles.computed(g.selection));
        let mut rest = logprobs.into_iter();
        let mut next = |(output, _): &(Option<usize>, u32)| {
            output.and_then(|_| rest.next()).unwrap_or(f32::NEG_INFINITY)
        };
        Ok(wanted
            .iter()
            .map(|of_text| Scored { logprobs: of_text.iter().map(&mut next).collect() })
            .collect())
    }

    /// Fills the batch but for its outputs; by group, by text in it, where that stands.
    fn lay(&self, batch: &mut Batch, preambles: &Preambles) -> Vec<Vec<Laid>> {
        let mut next_block = preambles.kept_blocks() as u32;
        let mut all = Vec::with_capacity(self.groups.len());
        for Group { selection, texts } in &self.groups {
            let first_row = batch.tokens.len();
            let mut of_group: Vec<Laid> = Vec::with_capacity(texts.len());
            for Placed { text, from, source } in texts {
                let (mut blocks, mut rows) = match source {
                    Some(i) => {
                        let source = &of_group[*i];
                        (source.blocks[..from / self.block_size].to_vec(), source.rows[..*from].to_vec())
                    }
                    None => (preambles.of(selection).0, vec![None; *from]),
                };
                let tokens = &text.computed()[*from..];
                let first = batch.tokens.len();
                let missing = text.computed().len().div_ceil(self.block_size) - blocks.len();
                blocks.extend(next_block..next_block + missing as u32);
                next_block += missing as u32;
                batch.tokens.extend(tokens);
                batch.positions.extend(*from as u32..text.computed().len() as u32);
                let own = first..batch.tokens.len();
                rows.extend(own.clone().map(|row| Some(row as u32)));
                if !own.is_empty() {
                    batch.spans.push(SequenceSpan { rows: own, start: *from, blocks: blocks.clone() });
                }
                of_group.push(Laid { blocks, rows });
            }
            let rows = first_row..batch.tokens.len();
            if !rows.is_empty() {
                batch.segments.push(Segment { rows, selection: (*selection).clone() });
            }
            all.push(of_group);
        }
        all
    }
}
