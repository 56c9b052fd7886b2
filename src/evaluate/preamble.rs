//! What all token sequences of a call begin with, such as an instruction's template: computed once for each sub-network, and
//! kept in the first blocks of the pool.

use crate::backend::Selection;
use crate::model::Executor;

/// The common beginning, whole blocks of it.
pub(super) struct Preambles {
    /// In positions.
    length: usize,
    block_size: usize,
    /// Each sub-network's place, and whether its preamble has been computed.
    slots: Vec<(Selection, bool)>,
}

impl Preambles {
    /// For these sequences, each with how many of its positions may be taken from elsewhere. None of them will ever need more than
    /// `most` positions.
    pub(super) fn new<'a>(
        executor: &dyn Executor,
        sequences: impl Iterator<Item = (&'a [u32], usize, &'a Selection)> + Clone,
        most: usize,
    ) -> Self {
        let block_size = executor.block_size();
        let mut slots: Vec<(Selection, bool)> = Vec::new();
        for (.., selection) in sequences.clone() {
            if slots.last().is_none_or(|s| s.0 != *selection) && slots.iter().all(|s| s.0 != *selection) {
                slots.push((selection.clone(), false));
            }
        }
        let first = sequences.clone().next().map_or(&[][..], |(tokens, ..)| tokens);
        let shared = sequences.map(|(tokens, takes, _)| common(first, tokens).min(takes));
        let length = shared.min().unwrap_or(0) / block_size * block_size;
        // Whatever is kept here is missing for the longest sequence, if another sub-network computes it.
        let room = executor.blocks() * block_size;
        let fits = length * slots.len() + most.next_multiple_of(block_size) <= room;
        Self { length: if fits { length } else { 0 }, block_size, slots }
    }

    /// In positions.
    pub(super) fn length(&self) -> usize {
        self.length
    }

    /// The blocks that are kept for it, the pool's first ones.
    pub(super) fn kept_blocks(&self) -> usize {
        self.slots.len() * self.length / self.block_size
    }

    /// The blocks of the preamble, and how many of its positions are in them already: all or none.
    pub(super) fn of(&self, selection: &Selection) -> (Vec<u32>, usize) {
        let blocks = self.length / self.block_size;
        let slot = self.slots.iter().position(|s| s.0 == *selection).unwrap_or(0);
        let computed = self.slots.get(slot).is_some_and(|s| s.1);
        let first = slot * blocks;
        ((first as u32..(first + blocks) as u32).collect(), if computed { self.length } else { 0 })
    }

    /// This sub-network's is in its blocks from now on.
    pub(super) fn computed(&mut self, selection: &Selection) {
        self.slots.iter_mut().filter(|s| s.0 == *selection).for_each(|s| s.1 = true);
    }
}

/// How many tokens both begin with.
pub(super) fn common(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}
