//! Who holds which block of the key-value pool, and what full blocks hold that outlive their sequences: the prefix cache.
//!
//! What a block holds is told by its tokens and by what stands before them, so what begins alike is found block by block.
//! Nothing is told by a hash: whoever finds a block has the very tokens that it was computed from. Who holds a block holds all
//! that stand before it, so none is forgotten before those behind it. Blocks that nobody holds count as free; those with nothing in
//! them go first, then what was let go of longest ago.

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
    /// What the block holds that was published under this number, and what stands before it. No number is given twice.
    Block(u64),
}

/// What a published block holds.
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
    published: HashMap<Prefix, HashMap<Box<[u32]>, u32>>,
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
            published: HashMap::new(),
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
            && let Some(blocks) = self.published.get_mut(&before)
        {
            blocks.remove(&tokens);
            if blocks.is_empty() {
                self.published.remove(&before);
            }
        }
        Some(block)
    }

    /// Takes all of the owner's blocks back. The last go first when room is needed, since a block can be found only after
    /// those before it.
    pub(super) fn release(&mut self, owner: &mut Vec<u32>) {
        owner.drain(..).rev().for_each(|block| self.let_go(block));
    }

    /// One less holds this block.
    fn let_go(&mut self, number: u32) {
        let block = &mut self.blocks[number as usize];
        block.holders -= 1;
        match (block.holders, &block.content) {
            (0, Some(_)) => {
                self.turns += 1;
                block.turn = self.turns;
                self.idle.insert(self.turns, number);
            }
            (0, None) => self.empty.push(number),
            _ => {}
        }
    }

    /// The blocks that hold the first of these tokens, as far as there are any, and what they hold together.
    pub(super) fn find(&self, start: &Prefix, tokens: &[u32], block_size: usize) -> (Vec<u32>, Prefix) {
        let (mut found, mut before) = (Vec::new(), start.clone());
        for of_block in tokens.chunks_exact(block_size) {
            let Some(&block) = self.published.get(&before).and_then(|blocks| blocks.get(of_block)) else {
                break;
            };
            let Some(content) = &self.blocks[block as usize].content else { break };
            before = Prefix::Block(content.number);
            found.push(block);
        }
        (found, before)
    }

    /// How many of these count as free.
    pub(super) fn free_among(&self, blocks: &[u32]) -> usize {
        blocks.iter().filter(|&&block| self.blocks[block as usize].holders == 0).count()
    }

    /// One more holds each of these blocks, which were found.
    pub(super) fn share(&mut self, found: &[u32]) {
        for &number in found {
            let block = &mut self.blocks[number as usize];
            if block.holders == 0 {
                self.idle.remove(&block.turn);
            }
            block.holders += 1;
        }
    }

    /// The caller's `block` is full: it can be found from now on by who begins with what stands before it and these tokens. If
    /// another one is found for them already, the caller holds that instead. Returns what stands before the next block.
    pub(super) fn publish(&mut self, before: &Prefix, tokens: &[u32], block: &mut u32) -> Prefix {
        let blocks = self.published.entry(before.clone()).or_default();
        let found = *blocks.entry(tokens.into()).or_insert(*block);
        if found != *block {
            self.share(&[found]);
            self.let_go(*block);
            *block = found;
        }
        let content = &mut self.blocks[found as usize].content;
        let content = content.get_or_insert_with(|| {
            self.numbers += 1;
            Content { number: self.numbers, before: before.clone(), tokens: tokens.into() }
        });
        Prefix::Block(content.number)
    }

    /// Blocks that can be given away.
    pub(super) fn free(&self) -> usize {
        self.empty.len() + self.idle.len()
    }

    pub(super) fn total(&self) -> usize {
        self.blocks.len()
    }
}
