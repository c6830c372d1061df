//! Bookkeeping of the KV pool: reference counts, free blocks, and a cache of full blocks keyed by everything
//! before them. Holds no keys or values and knows nothing of sequences; those are the backend's and the
//! scheduler's.

use std::collections::{BTreeMap, HashMap};

use crate::backend::BlockId;

/// Names what a cached block holds: its tokens and all before them. Never reused.
pub(super) type ContentId = u64;

/// The content before the first block.
pub(super) const ROOT: ContentId = 0;

/// A block's place in the chain. The parent is a name and the tokens are compared in full, so two prefixes
/// cannot collide; a hash of the tokens, as vLLM keeps, would have to be trusted.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Key {
    parent: ContentId,
    tokens: Box<[u32]>,
}

#[derive(Clone, Debug, Default)]
struct Block {
    refs: u32,
    /// Most references at one time since the block was last unused.
    sharers: u32,
    /// Its entry in the index, if it is findable.
    key: Option<Key>,
    /// Its place in `idle` while it is findable and unused.
    idle_since: u64,
}

/// The pool. A block is referenced, idle (unreferenced but findable) or free.
#[derive(Clone, Debug)]
pub(super) struct BlockPool {
    block_size: usize,
    blocks: Vec<Block>,
    free: Vec<BlockId>,
    /// Unused findable blocks, least recently used first.
    idle: BTreeMap<u64, BlockId>,
    index: HashMap<Key, (BlockId, ContentId)>,
    next_content: ContentId,
    clock: u64,
    prefix_cache: bool,
}

impl BlockPool {
    pub(super) fn new(blocks: usize, block_size: usize, prefix_cache: bool) -> Self {
        Self {
            block_size,
            blocks: vec![Block::default(); blocks],
            // Lowest ids first: easier to read in a debugger.
            free: (0..blocks as BlockId).rev().collect(),
            idle: BTreeMap::new(),
            index: HashMap::new(),
            next_content: ROOT + 1,
            clock: 0,
            prefix_cache,
        }
    }

    pub(super) fn block_size(&self) -> usize {
        self.block_size
    }

    pub(super) fn len(&self) -> usize {
        self.blocks.len()
    }

    /// Blocks needed for `tokens` tokens.
    pub(super) fn blocks_for(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.block_size)
    }

    /// Blocks that [`Self::allocate`] can give out.
    pub(super) fn available(&self) -> usize {
        self.free.len() + self.idle.len()
    }

    /// Makes `block` its only owner's alone, to be written to; false if it has others.
    pub(super) fn make_private(&mut self, block: BlockId) -> bool {
        let entry = &mut self.blocks[block as usize];
        if entry.refs == 1 {
            entry.sharers = 1;
        }
        entry.refs == 1
    }

    /// Share of `block` that one of its owners answers for: one over the most owners it had. The present
    /// count was rejected: it would charge a prompt to whichever completion happens to finish last.
    pub(super) fn share(&self, block: BlockId) -> f64 {
        1.0 / f64::from(self.blocks[block as usize].sharers.max(1))
    }

    /// A block for writing, with one reference; forgets the least recently used cached block if it must.
    pub(super) fn allocate(&mut self) -> Option<BlockId> {
        let block = match self.free.pop() {
            Some(block) => block,
            None => {
                let (_, block) = self.idle.pop_first()?;
                self.forget(block);
                block
            }
        };
        let entry = &mut self.blocks[block as usize];
        entry.refs = 1;
        entry.sharers = 1;
        Some(block)
    }

    /// One more reference.
    pub(super) fn retain(&mut self, block: BlockId) {
        let entry = &mut self.blocks[block as usize];
        if entry.refs == 0 {
            self.idle.remove(&entry.idle_since);
            entry.sharers = 0;
        }
        entry.refs += 1;
        entry.sharers = entry.sharers.max(entry.refs);
    }

    /// One reference less; at zero the block becomes idle or free.
    pub(super) fn release(&mut self, block: BlockId) {
        let entry = &mut self.blocks[block as usize];
        debug_assert!(entry.refs > 0, "block {block} released twice");
        entry.refs -= 1;
        if entry.refs > 0 {
            return;
        }
        if entry.key.is_some() {
            self.clock += 1;
            entry.idle_since = self.clock;
            self.idle.insert(self.clock, block);
        } else {
            self.free.push(block);
        }
    }

    /// Releases a sequence's blocks, last first: a tail is useless without its head and is evicted earlier.
    pub(super) fn release_all(&mut self, blocks: &mut Vec<BlockId>) {
        while let Some(block) = blocks.pop() {
            self.release(block);
        }
    }

    /// Makes the full block `block`, holding `tokens` after `parent`, findable; returns the name of the
    /// content. If another block with this content is findable already, that one stays.
    pub(super) fn register(
        &mut self,
        block: BlockId,
        parent: ContentId,
        tokens: &[u32],
    ) -> ContentId {
        if !self.prefix_cache {
            return ROOT;
        }
        let key = Key {
            parent,
            tokens: tokens.into(),
        };
        if let Some((_, content)) = self.index.get(&key) {
            return *content;
        }
        // Known under a parent that was evicted meanwhile: the old name leads nowhere any more.
        self.forget(block);
        let content = self.next_content;
        self.next_content += 1;
        self.index.insert(key.clone(), (block, content));
        self.blocks[block as usize].key = Some(key);
        content
    }

    /// The longest chain of findable blocks that `tokens` starts with, each with a reference added.
    pub(super) fn lookup(&mut self, tokens: &[u32]) -> Vec<BlockId> {
        let mut found = Vec::new();
        let mut parent = ROOT;
        if !self.prefix_cache {
            return found;
        }
        for chunk in tokens.chunks_exact(self.block_size) {
            let key = Key {
                parent,
                tokens: chunk.into(),
            };
            let Some(&(block, content)) = self.index.get(&key) else {
                break;
            };
            self.retain(block);
            found.push(block);
            parent = content;
        }
        found
    }

    /// Forgets every cached block; referenced ones stay with their owners.
    pub(super) fn clear_cache(&mut self) {
        self.index.clear();
        for block in &mut self.blocks {
            block.key = None;
        }
        // Reversed, so that the order of reuse is that of a new pool whatever happened before.
        self.free
            .extend(std::mem::take(&mut self.idle).into_values());
        self.free.sort_unstable_by(|a, b| b.cmp(a));
    }

    fn forget(&mut self, block: BlockId) {
        if let Some(key) = self.blocks[block as usize].key.take() {
            self.index.remove(&key);
        }
    }

    /// References per block, and how many blocks are idle or free.
    #[cfg(test)]
    pub(super) fn census(&self) -> (Vec<u32>, usize, usize) {
        let refs = self.blocks.iter().map(|b| b.refs).collect();
        (refs, self.idle.len(), self.free.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chain_is_found_by_its_whole_prefix_only() {
        let mut pool = BlockPool::new(4, 2, true);
        let [a, b, c] = [(); 3].map(|()| pool.allocate().unwrap());
        let first = pool.register(a, ROOT, &[1, 2]);
        pool.register(b, first, &[3, 4]);
        // The same tokens after another prefix are another content.
        let other = pool.register(c, ROOT, &[3, 4]);
        assert_ne!(other, first);
        assert_eq!(pool.lookup(&[1, 2, 3, 4, 5]), [a, b]);
        assert_eq!(pool.lookup(&[3, 4, 1, 2]), [c]);
        assert_eq!(pool.lookup(&[1]), [] as [BlockId; 0]);
        assert_eq!(pool.census().0, [2, 2, 2, 0]);
    }

    #[test]
    fn the_least_recently_used_idle_block_goes_first() {
        let mut pool = BlockPool::new(3, 1, true);
        let blocks = [(); 3].map(|()| pool.allocate().unwrap());
        for (i, block) in blocks.into_iter().enumerate() {
            pool.register(block, ROOT, &[i as u32]);
        }
        assert_eq!(pool.allocate(), None);
        for block in [blocks[1], blocks[0], blocks[2]] {
            pool.release(block);
        }
        // Used again, so 0 becomes the oldest.
        let found = pool.lookup(&[1]);
        pool.release(found[0]);
        assert_eq!(pool.allocate(), Some(blocks[0]));
        assert!(pool.lookup(&[0]).is_empty());
        assert_eq!(pool.available(), 2);
        pool.clear_cache();
        assert!(pool.lookup(&[1]).is_empty());
        assert_eq!(pool.available(), 2);
    }

    #[test]
    fn a_share_is_one_over_the_most_owners() {
        let mut pool = BlockPool::new(1, 4, false);
        let block = pool.allocate().unwrap();
        for _ in 0..3 {
            pool.retain(block);
        }
        for _ in 0..3 {
            pool.release(block);
        }
        assert_eq!(pool.share(block), 0.25);
        pool.release(block);
        assert_eq!(pool.allocate(), Some(block));
        assert_eq!(pool.share(block), 1.0);
    }
}
