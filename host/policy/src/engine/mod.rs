//! Rollout engine: continuous batching over a paged KV pool, on any [`Backend`].
//!
//! A step is schedule → run → commit. This file holds that loop and its border; [`sampler`] is what a
//! backend calls on its logits. Device-free: no tensor crosses it. Knows nothing of rewards, rows of a
//! dataset or training.
//!
//! A completion depends on its prompt, its parameters and its stream of random numbers, never on what else
//! was in the batch: the scheduler only decides when a token is computed.

pub mod draft;
mod kv;
pub mod sampler;
mod scheduler;
mod sequence;
mod stop;
mod telemetry;

use std::time::Instant;

use crate::{
    backend::{Backend, SampleArgs, Sampled, StepRow},
    error::PolicyError,
    tokenizer::Tokenizer,
    types::{Completion, Finish, Request},
};
use draft::{Ask, Draft, PromptPart, StepCost};
use sampler::Proposal;
use scheduler::{Plan, Scheduler};
use sequence::{Sequence, SequenceId};

/// Sizes of an engine.
#[derive(Clone, Debug, PartialEq)]
pub struct EngineConfig {
    /// Tokens per KV block.
    pub block_size: usize,
    /// Blocks of the KV pool; one completion of the greatest length must fit.
    pub kv_blocks: usize,
    /// Most sequences in one step.
    pub max_batch: usize,
    /// Most tokens in one step, prompt chunks and decoding together; at least `max_batch`.
    pub max_step_tokens: usize,
    /// Keep the blocks of finished sequences for later prompts with the same beginning.
    pub enable_prefix_cache: bool,
    /// Most tokens of one sequence, prompt included.
    pub max_model_len: usize,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            block_size: 16,
            kv_blocks: 1024,
            max_batch: 64,
            max_step_tokens: 512,
            enable_prefix_cache: true,
            max_model_len: 2048,
        }
    }
}

/// State after one step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    pub running: usize,
    pub waiting: usize,
    /// Completions that ended in this step.
    pub finished: usize,
    /// Tokens whose keys and values this step computed, prompts included.
    pub computed_tokens: usize,
    pub sampled_tokens: usize,
    /// Sequences that had to give their blocks back.
    pub preempted: usize,
    /// Blocks in use, and all there are.
    pub kv_used: usize,
    pub kv_blocks: usize,
}

/// A queue of requests and the block pool they share. One engine belongs to one backend.
#[derive(Clone, Debug)]
pub struct Engine {
    config: EngineConfig,
    scheduler: Scheduler,
    /// Bytes of one block, known once the backend has made the pool.
    block_bytes: Option<usize>,
    progress: Progress,
}

type Finished = (SequenceId, Completion);

impl Engine {
    /// Errors: [`PolicyError::Misuse`] when a size is 0 or `max_step_tokens < max_batch`.
    pub fn new(config: EngineConfig) -> Result<Self, PolicyError> {
        if [config.block_size, config.kv_blocks, config.max_batch].contains(&0)
            || config.max_model_len < 2
        {
            return Err(PolicyError::Misuse(
                "engine sizes must be positive and max_model_len at least 2",
            ));
        }
        if config.max_step_tokens < config.max_batch {
            return Err(PolicyError::Misuse(
                "max_step_tokens must be at least max_batch: each running row needs a token",
            ));
        }
        Ok(Self {
            scheduler: Scheduler::new(&config),
            config,
            block_bytes: None,
            progress: Progress::default(),
        })
    }

    pub fn config(&self) -> &EngineConfig {
        &self.config
    }

    /// Runs `requests` to the end. Completions come in the order of the requests, then by index; `on_event`
    /// is called after every step.
    ///
    /// Errors: those of [`Self::add`] before anything runs, of [`Self::step`] afterwards; the engine is empty
    /// and usable after either. [`PolicyError::Misuse`] when requests are under way already.
    pub fn generate<B: Backend>(
        &mut self,
        backend: &mut B,
        mut draft: Option<&mut Draft<B>>,
        tokenizer: &Tokenizer,
        requests: Vec<Request>,
        on_event: &mut dyn FnMut(Progress),
    ) -> Result<Vec<Completion>, PolicyError> {
        if !self.is_idle() {
            return Err(PolicyError::Misuse(
                "generate was called while requests are under way",
            ));
        }
        for request in &requests {
            sequence::validate(request, &self.config)?;
        }
        let now = Instant::now();
        for request in requests {
            self.scheduler.add(request, now);
        }
        let mut finished = Vec::new();
        while !self.is_idle() {
            finished.extend(self.advance(backend, draft.as_deref_mut(), tokenizer)?);
            on_event(self.progress);
        }
        finished.sort_by_key(|(id, _)| *id);
        Ok(finished.into_iter().map(|(_, c)| c).collect())
    }

    /// Queues one request.
    ///
    /// Errors: [`PolicyError::Request`] for an empty prompt, `n = 0`, a prompt that fills the context, an empty
    /// stop string or a parameter out of range; [`PolicyError::KvExhausted`] when its longest completion
    /// could not fit into the whole pool.
    pub fn add(&mut self, request: Request) -> Result<(), PolicyError> {
        sequence::validate(&request, &self.config)?;
        self.scheduler.add(request, Instant::now());
        Ok(())
    }

    /// Runs one step and returns what it finished. An error drops everything queued.
    pub fn step<B: Backend>(
        &mut self,
        backend: &mut B,
        draft: Option<&mut Draft<B>>,
        tokenizer: &Tokenizer,
    ) -> Result<Vec<Completion>, PolicyError> {
        let finished = self.advance(backend, draft, tokenizer)?;
        Ok(finished.into_iter().map(|(_, c)| c).collect())
    }

    /// Nothing queued and nothing running.
    pub fn is_idle(&self) -> bool {
        self.scheduler.sequences.is_empty()
    }

    /// State after the last step.
    pub fn progress(&self) -> Progress {
        self.progress
    }

    /// Cancels what is left of the requests with this id and returns it, as far as it got.
    pub fn abort(
        &mut self,
        request: u64,
        tokenizer: &Tokenizer,
    ) -> Result<Vec<Completion>, PolicyError> {
        let groups = &self.scheduler.groups;
        let ids: Vec<SequenceId> = self
            .scheduler
            .sequences
            .iter()
            .filter(|(_, s)| {
                groups
                    .get(&s.group)
                    .is_some_and(|g| g.request.id == request)
            })
            .map(|(id, _)| *id)
            .collect();
        let mut aborted = Vec::with_capacity(ids.len());
        for id in ids {
            aborted.extend(self.finish(id, Finish::Abort, tokenizer)?);
        }
        Ok(aborted.into_iter().map(|(_, c)| c).collect())
    }

    /// To be called after every change of the weights: cached keys and values belong to the old ones. What is
    /// running is computed again.
    pub fn invalidate_prefix_cache(&mut self) {
        self.scheduler.forget_kv();
    }

    fn advance<B: Backend>(
        &mut self,
        backend: &mut B,
        draft: Option<&mut Draft<B>>,
        tokenizer: &Tokenizer,
    ) -> Result<Vec<Finished>, PolicyError> {
        let outcome = self.try_advance(backend, draft, tokenizer);
        if outcome.is_err() {
            // A failed step leaves blocks half written; nothing of them may be found later.
            self.scheduler.clear();
        }
        outcome
    }

    fn try_advance<B: Backend>(
        &mut self,
        backend: &mut B,
        mut draft: Option<&mut Draft<B>>,
        tokenizer: &Tokenizer,
    ) -> Result<Vec<Finished>, PolicyError> {
        if self.block_bytes.is_none() {
            backend.init_kv(self.config.kv_blocks, self.config.block_size)?;
            if let Some(draft) = &mut draft {
                draft.init_kv(self.config.kv_blocks, self.config.block_size)?;
            }
            self.block_bytes = Some(backend.kv_bytes_per_token() * self.config.block_size);
        }
        let (rows, context) = (self.scheduler.running.len(), self.config.max_model_len);
        let ahead = backend.max_ahead();
        self.scheduler.kept = if draft.is_none() { ahead } else { 0 };
        let mut drafts = |sequence: &Sequence, request: &Request| {
            // The last token a completion may have is never guessed: it comes with the step itself.
            let tokens = request.sampling.max_tokens as usize - sequence.generated();
            let room = tokens.min(context - sequence.tokens.len());
            let wanted = match &mut draft {
                Some(draft) => {
                    let length = draft.length(sequence.drafting.acceptance(), rows);
                    length.min(draft.room(sequence.tokens.len()))
                }
                None => ahead,
            };
            wanted.min(room.saturating_sub(1))
        };
        let plan = self.scheduler.plan(Instant::now(), &mut drafts)?;
        if plan.rows.is_empty() {
            self.progress = self.progress_after(&plan, &[], 0);
            return Ok(Vec::new());
        }
        if !plan.copies.is_empty() {
            backend.copy_kv(&plan.copies)?;
        }
        let proposals = match &mut draft {
            Some(draft) => self.propose(backend, draft, &plan)?,
            None => vec![None; plan.rows.len()],
        };
        let started = Instant::now();
        let top = draft.as_ref().map_or(0, |draft| draft.top());
        let sampled = self.run(backend, &plan, &proposals, (draft.is_some(), top))?;
        if let Some(draft) = &mut draft {
            draft.verified(&cost(&plan, &proposals, &sampled, started));
        }
        let ended = self.commit(&plan, &proposals, &sampled, tokenizer)?;
        let mut finished = Vec::with_capacity(ended.len());
        for (id, finish) in ended {
            if let (Some(draft), Some(s)) = (&mut draft, self.scheduler.sequences.get(&id)) {
                draft.finished(id, &s.tokens, s.prompt_len);
            }
            finished.extend(self.finish(id, finish, tokenizer)?);
        }
        self.progress = self.progress_after(&plan, &sampled, finished.len());
        Ok(finished)
    }

    /// Asks the draft for all rows that have room for a guess; tells it about the others.
    fn propose<B: Backend>(
        &self,
        backend: &mut B,
        draft: &mut Draft<B>,
        plan: &Plan,
    ) -> Result<Vec<Option<Proposal>>, PolicyError> {
        let (mut asks, mut others) = (Vec::new(), Vec::new());
        for planned in &plan.rows {
            let sequence = &self.scheduler.sequences[&planned.id];
            let request = &self.scheduler.groups[&sequence.group].request;
            if planned.drafts > 0 {
                asks.push(Ask {
                    id: planned.id,
                    tokens: &sequence.tokens,
                    prompt: sequence.prompt_len,
                    cached: sequence.cached,
                    blocks: &sequence.blocks,
                    params: &request.sampling,
                    stream: sequence.stream,
                    most: planned.drafts,
                });
            } else {
                others.push(PromptPart {
                    id: planned.id,
                    tokens: &sequence.tokens[sequence.cached..sequence.cached + planned.tokens],
                    position: sequence.cached,
                    blocks: &sequence.blocks,
                });
            }
        }
        draft.follow(&plan.copies, &others)?;
        let mut proposals = if asks.is_empty() {
            Vec::new()
        } else {
            draft.propose(backend, &asks)?
        }
        .into_iter();
        let mut next = |drafts| (drafts > 0).then(|| proposals.next()).flatten();
        let by_row = plan.rows.iter().map(|planned| next(planned.drafts));
        Ok(by_row
            .map(|proposal| proposal.filter(|p| !p.tokens.is_empty()))
            .collect())
    }

    fn run(
        &self,
        backend: &mut impl Backend,
        plan: &Plan,
        proposals: &[Option<Proposal>],
        (drafting, top): (bool, usize),
    ) -> Result<Vec<Vec<Sampled>>, PolicyError> {
        let tokens = |(planned, proposal): (&scheduler::Planned, &Option<Proposal>)| {
            let sequence = &self.scheduler.sequences[&planned.id];
            let mut tokens =
                sequence.tokens[sequence.cached..sequence.cached + planned.tokens].to_vec();
            tokens.extend(proposal.iter().flat_map(|p| &p.tokens));
            tokens
        };
        let tokens: Vec<Vec<u32>> = plan.rows.iter().zip(proposals).map(tokens).collect();
        let mut rows = Vec::with_capacity(plan.rows.len());
        for ((planned, proposal), tokens) in plan.rows.iter().zip(proposals).zip(&tokens) {
            let sequence = &self.scheduler.sequences[&planned.id];
            let request = &self.scheduler.groups[&sequence.group].request;
            let samples = sequence.cached + planned.tokens == sequence.tokens.len();
            rows.push(StepRow {
                sequence: planned.id,
                tokens,
                position: sequence.cached,
                blocks: &sequence.blocks,
                sample: samples.then(|| SampleArgs {
                    ahead: if drafting { 0 } else { planned.drafts },
                    ..sequence.sample_args(request, proposal.as_ref(), top)
                }),
            });
        }
        let sampled = backend.step(&rows)?;
        let answered = |(row, sampled): (&StepRow<'_>, &Vec<Sampled>)| match &row.sample {
            None => sampled.is_empty(),
            Some(args) => {
                let proposed = args.proposal.map_or(args.ahead, |p| p.tokens.len());
                (1..=proposed + 1).contains(&sampled.len())
            }
        };
        if sampled.len() == rows.len() && rows.iter().zip(&sampled).all(answered) {
            Ok(sampled)
        } else {
            Err(PolicyError::Misuse(
                "the backend sampled other rows than it was asked to",
            ))
        }
    }

    /// Appends what was sampled; returns the sequences that ended with it.
    fn commit(
        &mut self,
        plan: &Plan,
        proposals: &[Option<Proposal>],
        sampled: &[Vec<Sampled>],
        tokenizer: &Tokenizer,
    ) -> Result<Vec<(SequenceId, Finish)>, PolicyError> {
        let now = Instant::now();
        let mut ended = Vec::new();
        for ((planned, sampled), proposal) in plan.rows.iter().zip(sampled).zip(proposals) {
            let Some(sequence) = self.scheduler.sequences.get_mut(&planned.id) else {
                continue;
            };
            let request = &self.scheduler.groups[&sequence.group].request;
            let mut finish = None;
            let mut pushed = 0;
            for token in sampled {
                sequence.clock.sampled(now);
                finish = sequence.push(token.clone(), request, &self.config, tokenizer)?;
                pushed += 1;
                if finish.is_some() {
                    break;
                }
            }
            let accepted = pushed.min(sampled.len().saturating_sub(1));
            if let Some(proposal) = proposal {
                sequence.drafting.add(proposal.tokens.len(), accepted);
            }
            ended.extend(finish.map(|finish| (planned.id, finish)));
            // The keys and values of the last token pushed are not there, unless it is an accepted one.
            let cached = (planned.tokens + pushed).min(planned.tokens + sampled.len().max(1) - 1);
            self.scheduler.advance(planned.id, cached);
        }
        Ok(ended)
    }

    fn finish(
        &mut self,
        id: SequenceId,
        finish: Finish,
        tokenizer: &Tokenizer,
    ) -> Result<Option<Finished>, PolicyError> {
        let Some(removed) = self.scheduler.remove(id) else {
            return Ok(None);
        };
        let block_bytes = self.block_bytes.unwrap_or(0) as f64;
        let kv_bytes = (removed.kv_blocks * block_bytes).round() as u64;
        let completion =
            removed
                .sequence
                .into_completion(&removed.request, finish, kv_bytes, tokenizer)?;
        Ok(Some((id, completion)))
    }

    fn progress_after(&self, plan: &Plan, sampled: &[Vec<Sampled>], finished: usize) -> Progress {
        let pool = &self.scheduler.pool;
        Progress {
            running: self.scheduler.running.len(),
            waiting: self.scheduler.waiting.len(),
            finished,
            computed_tokens: plan.rows.iter().map(|row| row.tokens).sum(),
            sampled_tokens: sampled.iter().map(Vec::len).sum(),
            preempted: plan.preempted,
            kv_used: pool.len() - pool.available(),
            kv_blocks: pool.len(),
        }
    }
}

/// What the step just made cost and brought.
fn cost(
    plan: &Plan,
    proposals: &[Option<Proposal>],
    sampled: &[Vec<Sampled>],
    started: Instant,
) -> StepCost {
    let verified = proposals.iter().zip(sampled);
    // Tokens proposed and accepted of each proposal.
    let counts = verified.filter_map(|(p, sampled)| {
        let proposed = p.as_ref()?.tokens.len();
        Some((proposed, sampled.len() - 1))
    });
    let proposed = counts.clone().map(|(proposed, _)| proposed).sum();
    StepCost {
        rows: plan.rows.len(),
        tokens: plan.rows.iter().map(|row| row.tokens).sum::<usize>() + proposed,
        proposals: counts.clone().count(),
        proposed,
        accepted: counts.clone().map(|(_, accepted)| accepted).sum(),
        rejected: counts
            .filter(|(proposed, accepted)| accepted < proposed)
            .count(),
        seconds: started.elapsed().as_secs_f64(),
    }
}

#[cfg(test)]
mod tests;
