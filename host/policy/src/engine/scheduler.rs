//! Who runs in the next step, with how many tokens and on which blocks. Owns groups, sequences and the
//! block pool; never sees a backend, a logit or a text.
//!
//! Running sequences come first, in order of arrival, then waiting ones while rows, tokens and blocks last.
//! One token budget covers decoding and prompt chunks. Without a free block the youngest sequence gives
//! its blocks back and is computed again later; the oldest never does, so there is always progress.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Instant,
};

use super::{
    EngineConfig,
    kv::{BlockPool, ROOT},
    sequence::{Group, GroupId, Sequence, SequenceId},
};
use crate::{backend::BlockId, error::PolicyError, types::Request};

/// One row of the next step.
#[derive(Clone, Copy, Debug)]
pub(super) struct Planned {
    pub(super) id: SequenceId,
    /// Tokens to run, from the first not cached.
    pub(super) tokens: usize,
    /// Drafted tokens there is room for behind them.
    pub(super) drafts: usize,
}

/// The next step.
#[derive(Clone, Debug, Default)]
pub(super) struct Plan {
    pub(super) rows: Vec<Planned>,
    /// Blocks to copy before the rows run, in this order.
    pub(super) copies: Vec<(BlockId, BlockId)>,
    pub(super) preempted: usize,
    tokens: usize,
    /// What is planned beyond each row's tokens is drawn one after the other, not run together in one step.
    ahead: bool,
}

impl Plan {
    fn push(&mut self, id: SequenceId, tokens: usize, drafts: usize) {
        self.rows.push(Planned { id, tokens, drafts });
        self.tokens += tokens + if self.ahead { 0 } else { drafts };
    }
}

/// A sequence that left.
#[derive(Debug)]
pub(super) struct Removed {
    pub(super) sequence: Sequence,
    pub(super) request: Arc<Request>,
    /// Blocks it referred to, each shared one counted by its share.
    pub(super) kv_blocks: f64,
}

/// What became of an attempt to start a waiting sequence.
enum Start {
    Started,
    /// A sibling computes the prompt.
    Wait,
    NoRoom {
        needed: usize,
    },
}

/// See the file header.
#[derive(Clone, Debug)]
pub(super) struct Scheduler {
    max_batch: usize,
    max_step_tokens: usize,
    pub(super) pool: BlockPool,
    pub(super) groups: BTreeMap<GroupId, Group>,
    pub(super) sequences: BTreeMap<SequenceId, Sequence>,
    pub(super) waiting: BTreeSet<SequenceId>,
    pub(super) running: BTreeSet<SequenceId>,
    /// Tokens beyond its cached ones for which a sequence keeps blocks that it has ([`crate::backend::Backend::max_ahead`]).
    pub(super) kept: usize,
    next_group: GroupId,
    next_sequence: SequenceId,
}

impl Scheduler {
    pub(super) fn new(config: &EngineConfig) -> Self {
        Self {
            max_batch: config.max_batch,
            max_step_tokens: config.max_step_tokens,
            pool: BlockPool::new(
                config.kv_blocks,
                config.block_size,
                config.enable_prefix_cache,
            ),
            groups: BTreeMap::new(),
            sequences: BTreeMap::new(),
            waiting: BTreeSet::new(),
            running: BTreeSet::new(),
            kept: 0,
            next_group: 0,
            next_sequence: 0,
        }
    }

    /// Queues all completions of a valid request.
    pub(super) fn add(&mut self, request: Request, now: Instant) {
        let group = self.next_group;
        self.next_group += 1;
        for index in 0..request.n {
            let id = self.next_sequence;
            self.next_sequence += 1;
            self.sequences
                .insert(id, Sequence::new(group, &request, index, now));
            self.waiting.insert(id);
        }
        self.groups.insert(group, Group::new(request));
    }

    /// Chooses rows and gives them blocks for the tokens they will write. `drafts` says how many drafted
    /// tokens a decoding sequence could use.
    pub(super) fn plan(
        &mut self,
        now: Instant,
        drafts: &mut dyn FnMut(&Sequence, &Request) -> usize,
    ) -> Result<Plan, PolicyError> {
        let mut plan = Plan {
            ahead: self.kept > 0,
            ..Plan::default()
        };
        self.plan_running(&mut plan, drafts)?;
        // Whoever was preempted just now would come back first and push the next one out.
        if plan.preempted == 0 {
            self.admit(&mut plan, now, drafts)?;
        }
        Ok(plan)
    }

    fn plan_running(
        &mut self,
        plan: &mut Plan,
        drafts: &mut dyn FnMut(&Sequence, &Request) -> usize,
    ) -> Result<(), PolicyError> {
        let ids: Vec<SequenceId> = self.running.iter().copied().collect();
        for (i, &id) in ids.iter().enumerate() {
            // Each later row keeps one token of the budget, so that a long prompt never stalls decoding.
            let later = ids.len() - i - 1;
            let budget = self.max_step_tokens - plan.tokens - later;
            while self.running.contains(&id) && !self.grant(id, budget, plan, drafts) {
                self.make_room(id, plan)?;
            }
        }
        Ok(())
    }

    /// Gives a running sequence a row of up to `budget` tokens, with as many drafted ones as it can use; false, and nothing
    /// done, if the pool has too few blocks.
    fn grant(
        &mut self,
        id: SequenceId,
        budget: usize,
        plan: &mut Plan,
        drafts: &mut dyn FnMut(&Sequence, &Request) -> usize,
    ) -> bool {
        let sequence = &self.sequences[&id];
        let tokens = sequence.pending().min(budget);
        let drafts = match sequence.pending() {
            1 => drafts(sequence, &self.groups[&sequence.group].request),
            _ => 0,
        };
        let drafts = match plan.ahead {
            true => drafts,
            false => drafts.min(budget - tokens),
        };
        // A guess is not worth another sequence's blocks.
        let granted = [drafts, 0]
            .into_iter()
            .find(|drafts| self.reserve(id, tokens + drafts, plan));
        if let Some(drafts) = granted {
            plan.push(id, tokens, drafts);
        }
        granted.is_some()
    }

    fn admit(
        &mut self,
        plan: &mut Plan,
        now: Instant,
        drafts: &mut dyn FnMut(&Sequence, &Request) -> usize,
    ) -> Result<(), PolicyError> {
        let ids: Vec<SequenceId> = if self.running.len() < self.max_batch {
            self.waiting.iter().copied().collect()
        } else {
            Vec::new()
        };
        for id in ids {
            let budget = self.max_step_tokens - plan.tokens;
            if self.running.len() >= self.max_batch || budget == 0 {
                break;
            }
            match self.start(id) {
                Start::Wait => continue,
                Start::NoRoom { needed } if self.running.is_empty() => {
                    return Err(self.exhausted(id, needed));
                }
                Start::NoRoom { .. } => break,
                Start::Started => {}
            }
            let Some(sequence) = self.sequences.get_mut(&id) else {
                continue;
            };
            sequence.clock.scheduled(now);
            // A fork lacks no more than the last token of its prompt, and may run ahead with those that decode; a draft has
            // not seen its prompt yet.
            match plan.ahead {
                true => self.grant(id, budget, plan, drafts),
                false => self.grant(id, budget, plan, &mut |_, _| 0),
            };
        }
        Ok(())
    }

    /// Moves a waiting sequence to the running ones, with all the keys and values that already exist.
    fn start(&mut self, id: SequenceId) -> Start {
        loop {
            match self.try_start(id) {
                // Nobody runs, so nobody else will give blocks back; groups that wait to fork can.
                Start::NoRoom { .. } if self.running.is_empty() && self.drop_hold() => {}
                outcome => return outcome,
            }
        }
    }

    fn try_start(&mut self, id: SequenceId) -> Start {
        let (Some(sequence), pool) = (self.sequences.get_mut(&id), &mut self.pool) else {
            return Start::Wait;
        };
        let Some(group) = self.groups.get_mut(&sequence.group) else {
            return Start::Wait;
        };
        if group.prefilling.is_some() {
            return Start::Wait;
        }
        let size = pool.block_size();
        // A first start has nothing but the prompt to look up, and the hold covers more of it.
        let mut blocks = match &group.hold {
            Some(_) if !sequence.started => Vec::new(),
            _ => pool.lookup(&sequence.tokens[..sequence.tokens.len() - 1]),
        };
        let mut cached = blocks.len() * size;
        let mut fork = group.hold.as_deref();
        fork = fork.filter(|_| group.shareable() > cached);
        if let Some(hold) = fork {
            pool.release_all(&mut blocks);
            blocks.extend_from_slice(hold);
            cached = group.shareable();
        }
        let copied = usize::from(!cached.is_multiple_of(size));
        let needed = pool.blocks_for(sequence.tokens.len()) - blocks.len() + copied;
        if pool.available() < needed {
            if fork.is_none() {
                pool.release_all(&mut blocks);
            }
            return Start::NoRoom { needed };
        }
        let forked = fork.is_some();
        let last = !sequence.started && group.unstarted == 1;
        if forked && !last {
            blocks.iter().for_each(|block| pool.retain(*block));
        }
        sequence.blocks = blocks;
        sequence.cached = cached;
        if !sequence.started {
            sequence.started = true;
            sequence.cached_prompt = cached;
            group.unstarted -= 1;
        }
        if group.unstarted > 0 && group.hold.is_none() && cached < group.shareable() {
            group.prefilling = Some(id);
        }
        if last && let Some(mut hold) = group.hold.take() {
            // The last one to start takes over the group's references, if it uses those blocks.
            if !forked {
                pool.release_all(&mut hold);
            }
        }
        self.waiting.remove(&id);
        self.running.insert(id);
        Start::Started
    }

    /// Gives a sequence private blocks for its next `tokens` tokens; false, and nothing done, if the pool
    /// has too few.
    fn reserve(&mut self, id: SequenceId, tokens: usize, plan: &mut Plan) -> bool {
        let Some(sequence) = self.sequences.get_mut(&id) else {
            return false;
        };
        let pool = &mut self.pool;
        let wanted = pool.blocks_for(sequence.cached + tokens);
        let new = wanted.saturating_sub(sequence.blocks.len());
        // Of the blocks that hold something, only a partly filled last one is written to.
        let partial = !sequence.cached.is_multiple_of(pool.block_size());
        let last = sequence.cached / pool.block_size();
        let written = sequence.blocks.get_mut(last).filter(|_| partial);
        let shared = written.filter(|block| !pool.make_private(**block));
        if pool.available() < new + usize::from(shared.is_some()) {
            return false;
        }
        if let Some(block) = shared
            && let Some(copy) = pool.allocate()
        {
            plan.copies.push((*block, copy));
            pool.release(*block);
            *block = copy;
        }
        let fresh = std::iter::from_fn(|| pool.allocate()).take(new);
        sequence.blocks.extend(fresh);
        true
    }

    /// Frees something for `id`: prompt blocks kept for siblings, else the youngest sequence, which may be
    /// `id` itself.
    fn make_room(&mut self, id: SequenceId, plan: &mut Plan) -> Result<(), PolicyError> {
        if self.drop_hold() {
            return Ok(());
        }
        match self.running.last() {
            Some(&youngest) if youngest != id || !plan.rows.is_empty() => {
                self.preempt(youngest);
                plan.preempted += 1;
                Ok(())
            }
            _ => Err(self.exhausted(id, 1)),
        }
    }

    fn drop_hold(&mut self) -> bool {
        let pool = &mut self.pool;
        let hold = self.groups.values_mut().rev().find_map(|g| g.hold.take());
        hold.map(|mut blocks| pool.release_all(&mut blocks))
            .is_some()
    }

    /// Takes a running sequence's blocks and puts it back in the queue; its tokens stay.
    fn preempt(&mut self, id: SequenceId) {
        self.vacate(id);
        self.waiting.insert(id);
    }

    /// Requeues everything that runs and forgets all cached prefixes: no key or value survives.
    pub(super) fn forget_kv(&mut self) {
        while let Some(&id) = self.running.last() {
            self.preempt(id);
        }
        while self.drop_hold() {}
        self.pool.clear_cache();
    }

    fn vacate(&mut self, id: SequenceId) {
        self.running.remove(&id);
        let Some(sequence) = self.sequences.get_mut(&id) else {
            return;
        };
        self.pool.release_all(&mut sequence.blocks);
        sequence.cached = 0;
        sequence.registered = 0;
        sequence.chain = ROOT;
        let group = self.groups.get_mut(&sequence.group);
        if let Some(group) = group.filter(|g| g.prefilling == Some(id)) {
            group.prefilling = None;
        }
    }

    /// Books `tokens` more tokens of `id` as cached: registers blocks they filled, and lets siblings fork
    /// once the prompt is there.
    pub(super) fn advance(&mut self, id: SequenceId, tokens: usize) {
        let Some(sequence) = self.sequences.get_mut(&id) else {
            return;
        };
        let size = self.pool.block_size();
        sequence.cached += tokens;
        // Blocks for drafted tokens that were rejected.
        let used = self.pool.blocks_for(sequence.cached + self.kept);
        let mut unused = sequence.blocks.split_off(used.min(sequence.blocks.len()));
        self.pool.release_all(&mut unused);
        while (sequence.registered + 1) * size <= sequence.cached {
            let at = sequence.registered;
            sequence.chain = self.pool.register(
                sequence.blocks[at],
                sequence.chain,
                &sequence.tokens[at * size..(at + 1) * size],
            );
            sequence.registered += 1;
        }
        let Some(group) = self.groups.get_mut(&sequence.group) else {
            return;
        };
        if group.prefilling == Some(id) && sequence.cached >= group.shareable() {
            group.prefilling = None;
            if group.unstarted > 0 {
                let count = self.pool.blocks_for(group.shareable());
                let hold = sequence.blocks[..count].to_vec();
                hold.iter().for_each(|block| self.pool.retain(*block));
                group.hold = Some(hold);
            }
        }
    }

    /// Takes a sequence out and gives its blocks back.
    pub(super) fn remove(&mut self, id: SequenceId) -> Option<Removed> {
        let sequence = self.sequences.get(&id)?;
        let used = self.pool.blocks_for(sequence.cached);
        let blocks = sequence.blocks.iter().take(used);
        let kv_blocks = blocks.map(|block| self.pool.share(*block)).sum();
        self.vacate(id);
        self.waiting.remove(&id);
        let sequence = self.sequences.remove(&id)?;
        let group = self.groups.get_mut(&sequence.group)?;
        group.live -= 1;
        group.unstarted -= u32::from(!sequence.started);
        if group.unstarted == 0
            && let Some(mut hold) = group.hold.take()
        {
            self.pool.release_all(&mut hold);
        }
        let request = Arc::clone(&group.request);
        if group.live == 0 {
            self.groups.remove(&sequence.group);
        }
        Some(Removed {
            sequence,
            request,
            kv_blocks,
        })
    }

    /// Drops everything, queued and cached.
    pub(super) fn clear(&mut self) {
        self.forget_kv();
        self.waiting.clear();
        self.sequences.clear();
        self.groups.clear();
    }

    fn exhausted(&self, id: SequenceId, needed: usize) -> PolicyError {
        let sequence = self.sequences.get(&id);
        PolicyError::KvExhausted {
            tokens: sequence.map_or(0, |s| s.tokens.len()),
            needed: needed + sequence.map_or(0, |s| s.blocks.len()),
            available: self.pool.len(),
        }
    }
}
