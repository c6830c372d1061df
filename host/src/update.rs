//! Steps 9 to 11 of the loop: pack sequences into micro-batches, score them, ask the loss for ∂L/∂logp,
//! propagate, step the optimizer. Knows tokens and advantages, not texts or rewards.

use grpo_policy::{
    backend::{AnyBackend, Backend, Exit, OptimStep, Pass},
    types::{Finish, PackedBatch},
};

use crate::{
    grpo::{
        config::LossConfig,
        loss::{LossInput, Normalisers, loss, loss_mask},
        stats::LossStats,
    },
    replicas::{Replicas, divide},
    types::Completion,
};

/// One completion as the update sees it.
#[derive(Clone, Copy, Debug)]
pub struct Sequence<'a> {
    pub prompt_ids: &'a [u32],
    pub completion: &'a Completion,
    pub advantage: f64,
}

impl<'a> Sequence<'a> {
    /// Tokens of the prompt and of the completion.
    fn ids(&self) -> (&'a [u32], &'a [u32]) {
        (self.prompt_ids, &self.completion.tokens)
    }

    /// How many they are together.
    pub(crate) fn tokens(&self) -> usize {
        self.prompt_ids.len() + self.completion.tokens.len()
    }
}

/// What stays the same over the updates of a run.
#[derive(Clone, Debug)]
pub struct UpdateConfig {
    pub loss: LossConfig,
    /// Most tokens packed into one forward pass; a longer sequence goes alone.
    pub micro_batch_tokens: usize,
    /// Run the prompt of completions that follow one another once in a forward pass, for all of them.
    pub share_prompts: bool,
    /// Optimizer steps on each batch of rollouts (μ of the paper).
    pub num_iterations: u32,
    /// Score the rollouts once more instead of taking the engine's log-probs as `old`.
    pub recompute_old_logprobs: bool,
    pub temperature: f32,
    pub max_completion_length: usize,
}

/// What an update did.
#[derive(Clone, Debug, Default)]
pub struct UpdateReport {
    /// Loss of the last iteration.
    pub loss: f64,
    /// Gradient norm before clipping, of the last iteration.
    pub grad_norm: f64,
    /// Of all iterations.
    pub stats: LossStats,
    /// Prompt and completion tokens through the training pass; a shared prompt counts once.
    pub tokens: usize,
}

impl UpdateReport {
    /// Together with that of another replica, whose gradients are the same.
    fn with(mut self, other: Self) -> Self {
        self.loss += other.loss;
        self.stats.merge(&other.stats);
        self.tokens += other.tokens;
        self
    }
}

/// A run of sequences that are scored together, with the per-token inputs of the loss.
struct MicroBatch {
    packed: PackedBatch,
    offsets: Vec<usize>,
    old: Vec<f32>,
    behaviour: Vec<f32>,
    reference: Option<Vec<f32>>,
    advantages: Vec<f64>,
    mask: Vec<bool>,
}

/// Trains on the sequences, `num_iterations` optimizer steps.
///
/// A sequence whose advantage is 0 has a gradient of exactly 0 while there is no KL term. It counts in
/// the normalisers but is not run, which is what makes late training, when most groups are solved, cheap.
/// Without anything to run the weights stay as they are.
///
/// Replicas have a share of the sequences each, about as many tokens; what divides the loss is counted over all of them, also
/// for `bnpo`, which by its definition is a mean over each rank's own tokens: the result does not depend on their number.
///
/// # Errors
/// A loss or gradient that is not finite; the weights are then as before the failing step.
pub fn update(
    replicas: &mut Replicas,
    sequences: &[Sequence<'_>],
    config: &UpdateConfig,
    optimizer: &OptimStep,
) -> anyhow::Result<UpdateReport> {
    let normalisers = normalisers(sequences, config);
    let teaches = |s: &&Sequence<'_>| s.advantage != 0.0 || config.loss.beta > 0.0;
    let taught: Vec<Sequence<'_>> = sequences.iter().filter(teaches).copied().collect();
    if !counts(&taught, &config.loss).contains(&true) {
        return Ok(UpdateReport::default());
    }
    let sizes: Vec<usize> = taught.iter().map(Sequence::tokens).collect();
    let shares = divide(&sizes, replicas.count());
    let reports = replicas.each(|rank, replica| {
        let share = &taught[shares[rank].clone()];
        let backend = &mut replica.backend;
        update_share(backend, (share, &normalisers), config, optimizer)
    })?;
    Ok(reports
        .into_iter()
        .reduce(UpdateReport::with)
        .unwrap_or_default())
}

/// A replica's part in an update. Without sequences it has no gradients but those of the others.
fn update_share(
    backend: &mut AnyBackend,
    (ours, normalisers): (&[Sequence<'_>], &Normalisers),
    config: &UpdateConfig,
    optimizer: &OptimStep,
) -> anyhow::Result<UpdateReport> {
    let (limit, share) = (config.micro_batch_tokens, config.share_prompts);
    let mut batches: Vec<MicroBatch> = split(ours, limit, share)
        .map(|part| MicroBatch::new(part, &config.loss, share))
        .filter(|batch| batch.mask.contains(&true))
        .collect();
    let mut report = UpdateReport::default();
    for batch in &mut batches {
        batch.score_fixed(backend, config)?;
    }
    for _ in 0..config.num_iterations {
        report.loss = 0.0;
        for (index, batch) in batches.iter().enumerate() {
            let is_last = index + 1 == batches.len();
            let (value, stats) = batch.accumulate(backend, config, (normalisers, is_last))?;
            report.loss += value;
            report.stats.merge(&stats);
            report.tokens += batch.packed.ids.len();
        }
        report.grad_norm = backend.optimizer_step(optimizer, Exit::Final)?;
    }
    Ok(report)
}

/// Which completion tokens count, of all sequences one after the other.
fn counts(sequences: &[Sequence<'_>], config: &LossConfig) -> Vec<bool> {
    let lengths = sequences.iter().map(|s| s.completion.tokens.len());
    let offsets: Vec<usize> = std::iter::once(0)
        .chain(lengths.scan(0, |end, n| {
            *end += n;
            Some(*end)
        }))
        .collect();
    loss_mask(&offsets, &truncated(sequences), config)
}

fn normalisers(sequences: &[Sequence<'_>], config: &UpdateConfig) -> Normalisers {
    let mask = counts(sequences, &config.loss);
    Normalisers::single_rank(sequences.len(), &mask, config.max_completion_length)
}

fn truncated(sequences: &[Sequence<'_>]) -> Vec<bool> {
    sequences
        .iter()
        .map(|s| s.completion.finish == Finish::Length)
        .collect()
}

/// Consecutive sequences of at most `limit` tokens together; with `share` a prompt counts once for those that have it one
/// after the other.
pub(crate) fn split<'a, 's>(
    sequences: &'a [Sequence<'s>],
    limit: usize,
    share: bool,
) -> impl Iterator<Item = &'a [Sequence<'s>]> {
    let mut rest = sequences;
    std::iter::from_fn(move || {
        let (mut tokens, mut prompt) = (0, None);
        let fits = rest.iter().take_while(|s| {
            let before = prompt.replace(s.prompt_ids);
            let shared = share && before == Some(s.prompt_ids);
            tokens += if shared { 0 } else { s.prompt_ids.len() };
            tokens += s.completion.tokens.len();
            tokens <= limit
        });
        let count = fits.count().max(1).min(rest.len());
        let (part, later) = rest.split_at(count);
        rest = later;
        (!part.is_empty()).then_some(part)
    })
}

/// Prompts and completions one after the other, a prompt once for each or, with `share`, once for those that have it one after
/// the other. What is scored comes in the same order.
pub(crate) fn pack(sequences: &[(&[u32], &[u32])], share: bool) -> PackedBatch {
    let mut packed = PackedBatch::default();
    for group in sequences.chunk_by(|a, b| share && a.0 == b.0) {
        match group {
            [(prompt, completion)] => {
                packed.push(&[*prompt, *completion].concat(), prompt.len());
            }
            _ => packed.push_group(group[0].0, group.iter().map(|(_, completion)| *completion)),
        }
    }
    packed
}

impl MicroBatch {
    fn new(sequences: &[Sequence<'_>], config: &LossConfig, share: bool) -> Self {
        let (mut offsets, mut old, mut behaviour) = (vec![0], Vec::new(), Vec::new());
        for s in sequences {
            old.extend_from_slice(&s.completion.policy_logprobs);
            behaviour.extend_from_slice(&s.completion.logprobs);
            offsets.push(old.len());
        }
        Self {
            mask: loss_mask(&offsets, &truncated(sequences), config),
            packed: pack(
                &sequences.iter().map(Sequence::ids).collect::<Vec<_>>(),
                share,
            ),
            offsets,
            old,
            behaviour,
            reference: None,
            advantages: sequences.iter().map(|s| s.advantage).collect(),
        }
    }

    /// Log-probs that do not change over the iterations: the reference's, and `old` when recomputed.
    fn score_fixed(
        &mut self,
        backend: &mut impl Backend,
        config: &UpdateConfig,
    ) -> anyhow::Result<()> {
        if config.loss.beta > 0.0 {
            let scores = backend.score(&self.packed, config.temperature, Pass::Reference)?;
            self.reference = Some(scores.logprobs);
        }
        if config.recompute_old_logprobs {
            self.old = backend
                .score(&self.packed, config.temperature, Pass::Score)?
                .logprobs;
        }
        Ok(())
    }

    fn accumulate(
        &self,
        backend: &mut impl Backend,
        config: &UpdateConfig,
        (normalisers, is_last): (&Normalisers, bool),
    ) -> anyhow::Result<(f64, LossStats)> {
        let scores = backend.score(&self.packed, config.temperature, Pass::Train)?;
        let input = LossInput {
            offsets: &self.offsets,
            logp: &scores.logprobs,
            old: &self.old,
            reference: self.reference.as_deref(),
            behaviour: Some(&self.behaviour),
            entropy: Some(&scores.entropy),
            advantages: &self.advantages,
            mask: &self.mask,
        };
        let out = loss(&input, &config.loss, normalisers)?;
        if is_last {
            backend.expect_update();
        }
        backend.backward(&out.dlogp)?;
        Ok((out.value, out.stats))
    }
}

#[cfg(test)]
mod tests;
