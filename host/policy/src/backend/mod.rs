//! The border between device-free code (engine, trainer) and a device.
//!
//! A backend owns weights, KV pool, gradients and optimizer state. It knows token ids, block tables and
//! per-token coefficients; it does not know requests, rewards, losses or files.

mod any;
pub mod cpu;
pub mod cuda;
mod group;

pub use any::AnyBackend;
pub use group::Group;

use crate::{
    engine::sampler::{Distribution, Proposal},
    error::PolicyError,
    spec::ModelSpec,
    types::{PackedBatch, SamplingParams, Span, TokenScores, TopTokens},
};

/// Index of one block of the KV pool.
pub type BlockId = u32;

/// One sequence's share of an engine step.
#[derive(Clone, Debug)]
pub struct StepRow<'a> {
    /// Name of the sequence, of no other from [`Backend::init_kv`] on.
    pub sequence: u64,
    /// Tokens not yet in the KV cache: a prompt chunk, or the one last sampled. Never empty.
    pub tokens: &'a [u32],
    /// Position of `tokens[0]`, which is the number of tokens of this sequence already cached.
    pub position: usize,
    /// KV blocks of the sequence in order; covers `position + tokens.len()` slots.
    pub blocks: &'a [BlockId],
    /// Sample a successor of the last token, or only fill the cache.
    pub sample: Option<SampleArgs<'a>>,
}

/// What the sampler needs to know beside the logits.
#[derive(Clone, Debug)]
pub struct SampleArgs<'a> {
    pub params: &'a SamplingParams,
    /// Key of the counter-based generator: stream of the completion, and position of the token to draw.
    pub stream: u64,
    pub position: u64,
    /// All tokens so far, prompt included and proposal not (repetition penalty).
    pub history: &'a [u32],
    /// Drafted tokens to verify. They are the last ones of the row's `tokens`.
    pub proposal: Option<&'a Proposal>,
    /// How many of the most likely tokens to report with each one drawn.
    pub top: usize,
    /// Tokens the backend may draw beyond the one asked for, without a proposal; blocks are there for them.
    pub ahead: usize,
}

/// A drawn token with its log-probs (see [`crate::types::Completion`]).
#[derive(Clone, Debug, PartialEq)]
pub struct Sampled {
    pub token: u32,
    pub logprob: f32,
    pub policy_logprob: f32,
    /// As many as [`SampleArgs::top`] asks for.
    pub top: TopTokens,
}

/// A draft's draw: the token and what it was drawn from.
#[derive(Clone, Debug, PartialEq)]
pub struct Drafted {
    pub token: u32,
    pub distribution: Distribution,
}

/// Which weights a scoring pass uses and whether it can be followed by [`Backend::backward`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    /// Keep what `backward` needs.
    Train,
    /// Current policy, nothing kept.
    Score,
    /// Reference policy: adapters off for LoRA, the frozen copy for full fine-tuning.
    Reference,
}

/// AdamW and clipping for one step (Loshchilov & Hutter 2019).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct OptimStep {
    pub learning_rate: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
    pub weight_decay: f64,
    /// Gradients are scaled so that their global 2-norm is at most this; `0` is off.
    pub max_grad_norm: f64,
}

/// Where the distribution of the next token leaves a model.
///
/// A backend has at most one early exit, made together with it by its own constructor: a head over the first
/// layers that drafts for the whole model and learns to (self-speculation). An enum and not the head's
/// weights, because these stay on the device, as do the hidden states that it reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Exit {
    /// Behind the last layer.
    Final,
    /// Behind the layers of the early exit. Its head trains by [`Backend::distill`] alone, with gradients and
    /// an optimizer of its own; the layers below do not learn from it.
    Early,
}

/// A device that runs the policy: [`cpu::CpuBackend`], [`cuda::CudaBackend`], either of them as [`AnyBackend`], and a
/// scripted one in the engine's tests.
pub trait Backend {
    fn spec(&self) -> &ModelSpec;

    /// Bytes of keys and values of one token over all layers.
    fn kv_bytes_per_token(&self) -> usize;

    /// Tokens the backend likes to draw beyond the one a step asks for, so that it need not wait for the host
    /// after each ([`SampleArgs::ahead`]). It may go on with those that it has not returned yet while the host is at work:
    /// a sequence keeps the blocks that it was given for them until it ends or is preempted.
    fn max_ahead(&self) -> usize {
        0
    }

    /// Makes the KV pool: `blocks` blocks of `block_size` tokens. Contents start undefined.
    fn init_kv(&mut self, blocks: usize, block_size: usize) -> Result<(), PolicyError>;

    /// Copies whole blocks, `(from, to)`, in this order: the private copy of a shared, partly filled block.
    /// A block copied from may be copied to later in the same list.
    fn copy_kv(&mut self, copies: &[(BlockId, BlockId)]) -> Result<(), PolicyError>;

    /// Runs all rows, writes their keys and values, and samples where asked. Returns one entry per row:
    /// empty where nothing was asked, else the accepted tokens of the proposal and one more
    /// ([`crate::engine::sampler::verify`]), or without a proposal up to `ahead` more.
    fn step(&mut self, rows: &[StepRow<'_>]) -> Result<Vec<Vec<Sampled>>, PolicyError>;

    /// Runs all rows as [`Backend::step`] does, but only up to `exit`, and draws the next token of each as a draft
    /// does ([`crate::engine::sampler::draft`]). Every row must sample.
    fn propose(&mut self, rows: &[StepRow<'_>], exit: Exit) -> Result<Vec<Drafted>, PolicyError>;

    /// Log-prob and entropy of every scored token at `temperature` (> 0). This pass, and those of the methods below, may use the
    /// memory of keys and values: whoever generates afterwards begins without any ([`crate::engine::Engine::invalidate_prefix_cache`]).
    fn score(
        &mut self,
        batch: &PackedBatch,
        temperature: f32,
        pass: Pass,
    ) -> Result<TokenScores, PolicyError>;

    /// Accumulates gradients of `Σ dlogp[i] · logp[i]` over the scored tokens of the last
    /// [`Pass::Train`] batch. A trainable weight left without a gradient is an error.
    fn backward(&mut self, dlogp: &[f32]) -> Result<(), PolicyError>;

    /// Accumulates gradients of `weight · Σ CE` over the scored tokens of the batch, where CE is the
    /// cross-entropy from the targets, renormalised, to the distribution at `exit` and `temperature`
    /// (distillation, Hinton et al. 2015). Returns the value. At [`Exit::Early`] nothing of the policy
    /// changes: neither weights and gradients nor what a [`Pass::Train`] keeps.
    fn distill(
        &mut self,
        batch: &PackedBatch,
        targets: &[TopTokens],
        temperature: f32,
        weight: f64,
        exit: Exit,
    ) -> Result<f64, PolicyError>;

    /// Says that the next [`Backend::backward`] is the last one before [`Backend::optimizer_step`], so that a rank of a
    /// [`Group`] may begin to sum gradients in it. It is never needed: what is not summed by then is in the update.
    fn expect_update(&mut self) {}

    /// Clips, applies AdamW and clears gradients, of the model or of its early exit; returns the gradient norm
    /// before clipping. The gradients of a [`Group`]'s rank are those of all ranks together, and each must call it; one that
    /// had no batch adds nothing.
    fn optimizer_step(&mut self, step: &OptimStep, exit: Exit) -> Result<f64, PolicyError>;
}

/// Refuses a batch that no backend can run: without scored tokens, with lengths or prefixes that do not match, sequences
/// beyond `longest` tokens with their prefixes, or ids outside the vocabulary.
pub(crate) fn check_batch(
    batch: &PackedBatch,
    vocab: usize,
    longest: usize,
) -> Result<(), PolicyError> {
    if !batch.is_consistent() || batch.n_scored() == 0 {
        return Err(PolicyError::Misuse(
            "a packed batch needs scored tokens, matching lengths and prefixes just before what continues them",
        ));
    }
    let unfit = |Span { tokens, prefix }: &Span| {
        let unpredicted = prefix.is_empty() && !tokens.is_empty() && batch.scored[tokens.start];
        tokens.len() + prefix.len() > longest || unpredicted
    };
    if batch.spans().iter().any(unfit) {
        return Err(PolicyError::Misuse(
            "a packed sequence is too long or scores its first token",
        ));
    }
    if batch.ids.iter().any(|id| *id as usize >= vocab) {
        return Err(PolicyError::Misuse(
            "a packed batch has a token outside the vocabulary",
        ));
    }
    Ok(())
}

/// Refuses targets of a distillation that are not a distribution of likely tokens for every scored token.
pub(crate) fn check_targets(
    batch: &PackedBatch,
    targets: &[TopTokens],
    vocab: usize,
) -> Result<(), PolicyError> {
    let fits = |t: &TopTokens| {
        let known = t.ids.iter().all(|id| (*id as usize) < vocab);
        known && t.ids.len() == t.probabilities.len() && t.probabilities.iter().any(|p| *p > 0.0)
    };
    if targets.len() != batch.n_scored() || !targets.iter().all(fits) {
        return Err(PolicyError::Misuse(
            "distillation needs the likely tokens of every scored token",
        ));
    }
    Ok(())
}
