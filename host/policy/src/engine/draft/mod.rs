//! Drafts: cheap guesses of the next tokens, which the policy verifies several at a time. Whatever a draft
//! proposes, completions keep their distribution ([`super::sampler::verify`]); a bad draft only costs time.
//!
//! A draft that runs a model uses the policy's block tables on a pool of its own with as many blocks (or, for
//! [`Source::EarlyExit`], on the policy's pool itself). So prefix sharing, copies and preemption hold for it
//! without a second scheduler. What it may find stale there makes a guess worse, never a completion wrong.

mod model;
mod ngram;
mod pace;
mod suffix;

use std::time::{Duration, Instant};

pub use model::Model;
pub use pace::Length;
use serde::{Deserialize, Serialize};
pub use suffix::Suffix;

use super::{sampler::Proposal, sequence::SequenceId};
use crate::{
    backend::{Backend, BlockId, Exit},
    error::PolicyError,
    types::SamplingParams,
};
use pace::Pace;

/// Where guesses come from.
pub enum Source<B> {
    /// Prompt lookup (Saxena 2023): what followed the last tokens when they stood in the text before.
    Ngram,
    /// What followed the last tokens in earlier completions of the same prompt (SuffixDecoding, Oliaro et
    /// al. 2024), else as [`Source::Ngram`].
    Suffix(Suffix),
    /// A smaller model with the same tokenizer.
    Model(Box<Model<B>>),
    /// The policy's own first layers under its early exit (self-speculation: Zhang et al. 2023; with an exit
    /// that is trained: LayerSkip, Elhoushi et al. 2024). Its backend must have one.
    EarlyExit,
}

/// Why a draft was given up. Its weights are its own, so the policy and its completions are not touched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DraftFault {
    /// Its logits are not finite: the weights are damaged or have diverged.
    Logits,
    /// What it is distilled with is not finite.
    Gradient,
}

/// A source, and how many tokens it is asked for.
pub struct Draft<B> {
    source: Source<B>,
    pace: Pace,
    spent: Duration,
    top: usize,
    fault: Option<DraftFault>,
}

/// One running sequence that could use a guess.
pub(super) struct Ask<'a> {
    pub(super) id: SequenceId,
    /// Prompt and everything sampled.
    pub(super) tokens: &'a [u32],
    pub(super) prompt: usize,
    /// Tokens whose keys and values the policy has; all but the last.
    pub(super) cached: usize,
    pub(super) blocks: &'a [BlockId],
    pub(super) params: &'a SamplingParams,
    pub(super) stream: u64,
    /// Tokens wanted, at most; blocks are there for so many.
    pub(super) most: usize,
}

impl<B: Backend> Draft<B> {
    /// # Errors
    /// [`PolicyError::Misuse`] for a fixed length of 0.
    pub fn new(source: Source<B>, length: Length) -> Result<Self, PolicyError> {
        if length == Length::Fixed(0) {
            return Err(PolicyError::Misuse("a draft of no token"));
        }
        let pace = Pace::new(length);
        Ok(Self {
            source,
            pace,
            spent: Duration::ZERO,
            top: 0,
            fault: None,
        })
    }

    /// Has every completion come with the policy's `top` most likely tokens of each position, for
    /// distilling the draft. Nothing changes for a source that is not distilled.
    pub fn learn_from(&mut self, top: usize) {
        self.top = match self.source {
            Source::Model(_) | Source::EarlyExit => top,
            Source::Ngram | Source::Suffix(_) => 0,
        };
    }

    /// How many; 0 for a draft that is not distilled.
    pub(super) fn top(&self) -> usize {
        self.top
    }

    /// Neither drafts nor learns from now on.
    pub fn give_up(&mut self, fault: DraftFault) {
        self.fault = Some(fault);
        self.top = 0;
    }

    /// Why it was given up, if it was.
    pub fn fault(&self) -> Option<DraftFault> {
        self.fault
    }

    /// What is distilled: the model that drafts, or the early exit of `policy`. `None` for a draft that is not.
    pub fn learner<'a>(&'a self, policy: &'a B) -> Option<(&'a B, Exit)> {
        match &self.source {
            _ if self.top == 0 => None,
            Source::Model(model) => Some((model.backend_ref(), Exit::Final)),
            Source::EarlyExit => Some((policy, Exit::Early)),
            Source::Ngram | Source::Suffix(_) => None,
        }
    }

    /// [`Draft::learner`], for training it.
    pub fn learner_mut<'a>(&'a mut self, policy: &'a mut B) -> Option<(&'a mut B, Exit)> {
        match &mut self.source {
            _ if self.top == 0 => None,
            Source::Model(model) => Some((model.backend(), Exit::Final)),
            Source::EarlyExit => Some((policy, Exit::Early)),
            Source::Ngram | Source::Suffix(_) => None,
        }
    }

    /// Takes what was learnt from completions out of the draft, for [`Draft::put_back`]. Weights of a model stay.
    pub fn take_learnt(&mut self) -> Suffix {
        match &mut self.source {
            Source::Suffix(suffix) => std::mem::take(suffix),
            Source::Ngram | Source::Model(_) | Source::EarlyExit => Suffix::default(),
        }
    }

    /// The inverse of [`Draft::take_learnt`]; what was learnt since is dropped.
    pub fn put_back(&mut self, learnt: Suffix) {
        if let Source::Suffix(suffix) = &mut self.source {
            *suffix = learnt;
        }
    }

    /// What the draft has learnt, for a checkpoint; empty for one that learns nothing.
    pub fn export(&self) -> Vec<u32> {
        match &self.source {
            Source::Suffix(suffix) => suffix.export(),
            Source::Ngram | Source::Model(_) | Source::EarlyExit => Vec::new(),
        }
    }

    /// The inverse of [`Draft::export`].
    ///
    /// # Errors
    /// [`PolicyError::Misuse`] for what another draft has learnt.
    pub fn import(&mut self, learnt: &[u32]) -> Result<(), PolicyError> {
        let foreign = PolicyError::Misuse("the checkpoint holds what another draft has learnt");
        match &mut self.source {
            Source::Suffix(suffix) => *suffix = Suffix::import(learnt).ok_or(foreign)?,
            _ if learnt.is_empty() => {}
            Source::Ngram | Source::Model(_) | Source::EarlyExit => return Err(foreign),
        }
        Ok(())
    }

    /// Time spent drafting so far.
    pub fn spent(&self) -> Duration {
        self.spent
    }

    /// Tokens to draft for a sequence that accepted `acceptance` of its drafted tokens so far, with `rows`
    /// sequences in the step. 0: drafting does not pay.
    pub(super) fn length(&mut self, acceptance: Option<f64>, rows: usize) -> usize {
        match self.fault {
            Some(_) => 0,
            None => self.pace.length(acceptance, rows),
        }
    }

    /// One proposal per ask, perhaps shorter than asked or empty. A draft whose logits are not finite is given
    /// up instead of ending the rollout: completions do not need it.
    pub(super) fn propose(
        &mut self,
        policy: &mut B,
        asks: &[Ask<'_>],
    ) -> Result<Vec<Proposal>, PolicyError> {
        let started = Instant::now();
        let proposals = match self.guess(policy, asks) {
            Err(PolicyError::NonFiniteLogits { .. }) => {
                self.give_up(DraftFault::Logits);
                vec![Proposal::default(); asks.len()]
            }
            guessed => guessed?,
        };
        let rounds = proposals.iter().map(|p| p.tokens.len()).max().unwrap_or(0);
        self.spent += started.elapsed();
        self.pace.drafted(rounds, asks.len(), started.elapsed());
        Ok(proposals)
    }

    fn guess(&mut self, policy: &mut B, asks: &[Ask<'_>]) -> Result<Vec<Proposal>, PolicyError> {
        let certain = |tokens| Proposal {
            tokens,
            probabilities: Vec::new(),
        };
        Ok(match &mut self.source {
            Source::Ngram => asks
                .iter()
                .map(|ask| certain(ngram::lookup(ask.tokens, ask.most)))
                .collect(),
            Source::Suffix(suffix) => asks
                .iter()
                .map(|ask| certain(suffix.propose(ask.tokens, ask.prompt, ask.most)))
                .collect(),
            Source::Model(model) => model.propose(asks)?,
            Source::EarlyExit => {
                let from: Vec<usize> = asks.iter().map(|ask| ask.cached).collect();
                model::autoregress(policy, Exit::Early, asks, from)?
            }
        })
    }

    /// Told of every step the policy is about to make: `copies` of blocks, and the rows without a guess.
    pub(super) fn follow(
        &mut self,
        copies: &[(BlockId, BlockId)],
        prompts: &[PromptPart<'_>],
    ) -> Result<(), PolicyError> {
        match &mut self.source {
            Source::Model(model) if self.fault.is_none() => model.follow(copies, prompts),
            Source::Model(_) => Ok(()),
            Source::Ngram | Source::Suffix(_) | Source::EarlyExit => Ok(()),
        }
    }

    /// Tokens it can draft behind `tokens` tokens before its own context ends; the policy's may be longer.
    pub(super) fn room(&self, tokens: usize) -> usize {
        match &self.source {
            // The last drafted token is not run.
            Source::Model(model) => (model.context() + 1).saturating_sub(tokens),
            Source::Ngram | Source::Suffix(_) | Source::EarlyExit => usize::MAX,
        }
    }

    /// Told of the pool's size before the first step.
    pub(super) fn init_kv(&mut self, blocks: usize, block_size: usize) -> Result<(), PolicyError> {
        match &mut self.source {
            Source::Model(model) => model.backend().init_kv(blocks, block_size),
            Source::Ngram | Source::Suffix(_) | Source::EarlyExit => Ok(()),
        }
    }

    /// The model that drafts, if it is one of its own.
    pub fn model(&self) -> Option<&B> {
        match &self.source {
            Source::Model(model) => Some(model.backend_ref()),
            Source::Ngram | Source::Suffix(_) | Source::EarlyExit => None,
        }
    }

    /// Told what a step took.
    pub(super) fn verified(&mut self, step: &StepCost) {
        self.pace.verified(step);
    }

    /// Told that a sequence ended: `tokens` are its prompt of `prompt` tokens and what was sampled.
    pub(super) fn finished(&mut self, id: SequenceId, tokens: &[u32], prompt: usize) {
        match &mut self.source {
            Source::Suffix(suffix) => suffix.learn(&tokens[..prompt], &tokens[prompt..]),
            Source::Model(model) => model.forget(id),
            Source::Ngram | Source::EarlyExit => {}
        }
    }
}

/// Tokens the policy runs in a step without a guess behind them: a part of a prompt, or the last token.
pub(super) struct PromptPart<'a> {
    pub(super) id: SequenceId,
    pub(super) tokens: &'a [u32],
    pub(super) position: usize,
    pub(super) blocks: &'a [BlockId],
}

/// What a step of the policy cost and brought.
pub(super) struct StepCost {
    /// Sequences in it.
    pub(super) rows: usize,
    /// Tokens the policy ran, prompts and proposals included.
    pub(super) tokens: usize,
    /// Sequences with a proposal, and its tokens.
    pub(super) proposals: usize,
    pub(super) proposed: usize,
    /// Proposed tokens accepted, and proposals that were not accepted to their end.
    pub(super) accepted: usize,
    pub(super) rejected: usize,
    pub(super) seconds: f64,
}
