//! Who holds which block of the key-value pool, and what full blocks hold that outlive their sequences: the prefix cache.
//!
//! What a block holds is told by its tokens and by what stands before them, so what begins alike is found block by block.
//! Nothing is told by a hash: whoever finds a block has the very tokens that it was computed from. Blocks that nobody
//! holds count as free; those with nothing in them go first, then what was let go of longest ago.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

/// Who computed it: others compute other keys and values from the same tokens.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Origin {
    pub(super) adapter: usize,
    pub(super) subnetwork: u32,
    /// Only who names the same finds it.
    pub(super) salt: Option<Arc<str>>,
}

/// What stands before a block's tokens.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum Prefix {
    Nothing(Origin),
    /// All that the block holds which was known under this number, and what stands before it. No number is given twice.
    Known(u64),
}

/// What a block holds.
#[derive(Debug, Clone)]
struct Content {
    number: u64,
    before: Prefix,
    tokens: Box<[u32]>,
}

#[derive(Debug, Default)]
struct Block {
    /// Sequences that hold it.
    holders: usize,
    content: Option<Content>,
    /// Its place among those that nobody holds.
    turn: u64,
}

/// All blocks of the pool.
#[derive(Debug)]
pub(super) struct BlockPool {
    blocks: Vec<Block>,
    /// Nobody holds these, and they hold nothing.
    empty: Vec<u32>,
    /// Nobody holds these, but they may be found: by turn, the oldest first.
    idle: BTreeMap<u64, u32>,
    /// Where to find what: by what stands before, then by a block's tokens.
    known: HashMap<Prefix, HashMap<Box<[u32]>, u32>>,
    numbers: u64,
    turns: u64,
}

impl BlockPool {
    pub(super) fn new(total: usize) -> Self {
        Self {
            blocks: (0..total).map(|_| Block::default()).collect(),
            // Popped from the end, so that block 0 goes first.
            empty: (0..total as u32).rev().collect(),
            idle: BTreeMap::new(),
            known: HashMap::new(),
            numbers: 0,
            turns: 0,
        }
    }

    /// Gives `owner` blocks until it has `wanted`; gives none at all where too few are free.
    pub(super) fn grow(&mut self, owner: &mut Vec<u32>, wanted: usize) -> bool {
        let missing = wanted.saturating_sub(owner.len());
        if missing > self.free() {
            return false;
        }
        for _ in 0..missing {
            let Some(block) = self.empty.pop().or_else(|| self.forget_oldest()) else { return false };
            self.blocks[block as usize].holders = 1;
            owner.push(block);
        }
        true
    }

    /// Empties the block that was let go of longest ago.
    fn forget_oldest(&mut self) -> Option<u32> {
        let (_, block) = self.idle.pop_first()?;
        let content = self.blocks[block as usize].content.take();
        if let Some(Content { before, tokens, .. }) = content
            && let Some(alike) = self.known.get_mut(&before)
        {
            alike.remove(&tokens);
            if alike.is_empty() {
                self.known.remove(&before);
            }
        }
        Some(block)
    }

    /// Takes all of the owner's blocks back. The last go first when room is needed, since a block can be found only after
    /// those before it.
    pub(super) fn release(&mut self, owner: &mut Vec<u32>) {
        for block in owner.drain(..).rev() {
            let state = &mut self.blocks[block as usize];
            state.holders -= 1;
            if state.holders > 0 {
                continue;
            }
            if state.content.is_some() {
                self.turns += 1;
                state.turn = self.turns;
                self.idle.insert(self.turns, block);
            } else {
                self.empty.push(block);
            }
        }
    }

    /// The blocks that hold the first of these tokens, as far as there are any, and what they hold together.
    pub(super) fn find(&self, start: &Prefix, tokens: &[u32], block_size: usize) -> (Vec<u32>, Prefix) {
        let (mut found, mut before) = (Vec::new(), start.clone());
        for tokens in tokens.chunks_exact(block_size) {
            let Some(&block) = self.known.get(&before).and_then(|alike| alike.get(tokens)) else { break };
            let Some(content) = &self.blocks[block as usize].content else { break };
            before = Prefix::Known(content.number);
            found.push(block);
        }
        (found, before)
    }

    /// How many of these count as free.
    pub(super) fn free_among(&self, blocks: &[u32]) -> usize {
        blocks.iter().filter(|&&block| self.blocks[block as usize].holders == 0).count()
    }

    /// One more holds these blocks, which it has found.
    pub(super) fn hold(&mut self, found: &[u32]) {
        for &block in found {
            let state = &mut self.blocks[block as usize];
            if state.holders == 0 {
                self.idle.remove(&state.turn);
            }
            state.holders += 1;
        }
    }

    /// A held block is full: whoever begins with what stands before and these tokens may find it from now on, unless another
    /// block is found for them already. Returns what stands before the next block.
    pub(super) fn know(&mut self, before: &Prefix, tokens: &[u32], block: u32) -> Prefix {
        let alike = self.known.entry(before.clone()).or_default();
        let block = *alike.entry(tokens.into()).or_insert(block);
        let content = &mut self.blocks[block as usize].content;
        let content = content.get_or_insert_with(|| {
            self.numbers += 1;
            Content { number: self.numbers, before: before.clone(), tokens: tokens.into() }
        });
        Prefix::Known(content.number)
    }

    /// Blocks that can be given away.
    pub(super) fn free(&self) -> usize {
        self.empty.len() + self.idle.len()
    }

    pub(super) fn total(&self) -> usize {
        self.blocks.len()
    }
}
