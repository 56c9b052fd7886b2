//! Whose text is computed next.
//!
//! Requests stand in a queue. The first one gives a text to the step and goes to the end if it has more, until the next text
//! would be too much for the step. So among requests of one text the first comes first, and between two texts of a request no
//! other has more than one: who brings a hundred texts does not hold up who brings one. A text is never cut, since every token
//! attends to all others; one that is longer than a step is a step of its own.

use super::TextTokens;
use crate::backend::{Segment, Selection};
use crate::model::TextBatch;
use std::collections::{BTreeMap, VecDeque};

/// Requests of which texts are left.
#[derive(Debug)]
pub(super) struct Turns {
    waiting: VecDeque<Waiting>,
    /// Tokens in one step, a text at least.
    step_tokens: usize,
}

#[derive(Debug)]
struct Waiting {
    id: u64,
    selection: Selection,
    /// With its place in the request; never empty.
    texts: VecDeque<(usize, TextTokens)>,
}

/// One step.
#[derive(Debug)]
pub(super) struct TextPlan {
    pub(super) batch: TextBatch,
    /// In the order of the batch's texts.
    pub(super) texts: Vec<PlannedText>,
}

/// A text of a step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct PlannedText {
    /// Its request.
    pub(super) id: u64,
    /// Its place there.
    pub(super) text: usize,
    pub(super) subnetwork: u32,
}

impl Turns {
    pub(super) fn new(step_tokens: usize) -> Self {
        Self { waiting: VecDeque::new(), step_tokens: step_tokens.max(1) }
    }

    /// Puts a request at the end of the queue; one without texts has nothing to wait for.
    pub(super) fn add(&mut self, id: u64, selection: Selection, texts: Vec<TextTokens>) {
        let texts = texts.into_iter().enumerate().collect::<VecDeque<_>>();
        if !texts.is_empty() {
            self.waiting.push_back(Waiting { id, selection, texts });
        }
    }

    /// Takes the next step out of the queue; `None` if there is nothing to do.
    pub(super) fn plan(&mut self) -> Option<TextPlan> {
        let mut chosen = Vec::new();
        let mut tokens = 0;
        while let Some(mut first) = self.waiting.pop_front() {
            let length = first.texts.front().map_or(0, |(_, text)| text.tokens.len());
            if !chosen.is_empty() && tokens + length > self.step_tokens {
                self.waiting.push_front(first);
                break;
            }
            tokens += length;
            if let Some((place, text)) = first.texts.pop_front() {
                chosen.push((first.id, place, first.selection.clone(), text));
            }
            if !first.texts.is_empty() {
                self.waiting.push_back(first);
            }
        }
        (!chosen.is_empty()).then(|| lay_out(chosen))
    }

    /// Forgets what is left of a request.
    pub(super) fn remove(&mut self, id: u64) {
        self.waiting.retain(|request| request.id != id);
    }

    pub(super) fn is_idle(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Texts that wait, by sub-network.
    pub(super) fn by_sub_network(&self) -> BTreeMap<u32, usize> {
        let mut counts = BTreeMap::new();
        for request in &self.waiting {
            *counts.entry(request.selection.subnetwork).or_default() += request.texts.len();
        }
        counts
    }
}

/// Texts below each other, those of equal sub-networks together.
fn lay_out(mut chosen: Vec<(u64, usize, Selection, TextTokens)>) -> TextPlan {
    chosen.sort_by_key(|(_, _, selection, _)| (selection.adapter, selection.subnetwork));
    let (mut batch, mut texts) = (TextBatch::default(), Vec::with_capacity(chosen.len()));
    for (id, text, selection, TextTokens { tokens, token_types }) in chosen {
        let start = batch.tokens.len();
        batch.tokens.extend(tokens);
        batch.token_types.extend(token_types);
        let rows = start..batch.tokens.len();
        batch.texts.push(rows.clone());
        texts.push(PlannedText { id, text, subnetwork: selection.subnetwork });
        match batch.segments.last_mut() {
            Some(segment) if segment.selection == selection => segment.rows.end = rows.end,
            _ => batch.segments.push(Segment { rows, selection }),
        }
    }
    TextPlan { batch, texts }
}
