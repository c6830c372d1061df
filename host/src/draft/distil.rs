//! Keeps a draft near the policy while that learns: distillation on the run's own completions.

use grpo_policy::{
    backend::{AnyBackend, Backend, Exit},
    engine::draft::DraftFault,
    error::PolicyError,
    types::TopTokens,
};

use crate::{
    config::RunConfig,
    policy::Policy,
    replicas::divide,
    update::{Sequence, pack, split},
};

/// What a draft learnt from a step.
#[derive(Clone, Copy, Debug)]
pub struct Lesson {
    /// Cross-entropy from the policy's likely tokens to the draft, nats a token, before the update.
    pub loss: f64,
    /// Gradient norm before clipping.
    pub grad_norm: f64,
}

/// Distils the draft on completions of the policy as it was when it drew them: one optimizer step towards
/// the distributions that verification has computed anyway. `None` for a draft that does not learn, and for
/// one that is given up here because its loss or gradient is not finite: the policy does not need it.
///
/// # Errors
/// Those of [`Backend::distill`] and [`Backend::optimizer_step`] but a gradient that is not finite.
pub fn distil(
    policy: &mut Policy,
    sequences: &[Sequence<'_>],
    config: &RunConfig,
) -> anyhow::Result<Option<Lesson>> {
    let replicas = &mut policy.replicas;
    let Some((model, _)) = replicas.first_mut().learning_draft() else {
        return Ok(None);
    };
    let context = model.spec().max_position_embeddings;
    let taught = lessons(sequences, context);
    if taught.is_empty() {
        return Ok(None);
    }
    let tokens: usize = taught.iter().map(|s| fit(s, context)).sum();
    let weight = 1.0 / tokens as f64;
    let sizes: Vec<usize> = taught.iter().map(Sequence::tokens).collect();
    let shares = divide(&sizes, replicas.count());
    let taught = replicas.each(|rank, replica| {
        let share = &taught[shares[rank].clone()];
        let Some((model, exit)) = replica.learning_draft() else {
            return Ok(None);
        };
        match teach(model, exit, (share, weight), config) {
            Ok(lesson) => Ok(Some(lesson)),
            // It is the gradient of all replicas, and no other has another.
            Err(PolicyError::NonFiniteGradient { .. }) => Ok(None),
            Err(error) => Err(error.into()),
        }
    })?;
    let lesson = taught.into_iter().flatten().reduce(|all, part| Lesson {
        loss: all.loss + part.loss,
        ..all
    });
    match lesson.filter(|lesson| lesson.loss.is_finite()) {
        Some(lesson) => Ok(Some(lesson)),
        None => {
            policy.give_up_draft(DraftFault::Gradient);
            Ok(None)
        }
    }
}

/// The sequences that teach: those whose completion, as far as a context of `context` tokens holds it, has
/// tokens with their likely alternatives.
fn lessons<'a>(sequences: &[Sequence<'a>], context: usize) -> Vec<Sequence<'a>> {
    let teaches = |s: &&Sequence<'_>| !s.completion.top.is_empty() && s.prompt_ids.len() < context;
    sequences.iter().filter(teaches).copied().collect()
}

/// Tokens of a completion within a context of `context` tokens, which holds more than the prompt.
fn fit(s: &Sequence<'_>, context: usize) -> usize {
    s.completion.tokens.len().min(context - s.prompt_ids.len())
}

/// One update by a share of the sequences, a token of which weighs `weight`. Without any it has the gradients of the others.
fn teach<'a>(
    model: &mut AnyBackend,
    exit: Exit,
    (taught, weight): (&[Sequence<'a>], f64),
    config: &RunConfig,
) -> Result<Lesson, PolicyError> {
    let context = model.spec().max_position_embeddings;
    let mut loss = 0.0;
    let limit = config.training.micro_batch_tokens as usize;
    let share = config.training.share_prompts;
    for part in split(taught, limit, share) {
        let cut = |s: &Sequence<'a>| (s.prompt_ids, &s.completion.tokens[..fit(s, context)]);
        let batch = pack(&part.iter().map(cut).collect::<Vec<_>>(), share);
        let top = part
            .iter()
            .flat_map(|s| &s.completion.top[..fit(s, context)]);
        let targets: Vec<TopTokens> = top.cloned().collect();
        let temperature = config.generation.temperature as f32;
        loss += model.distill(&batch, &targets, temperature, weight, exit)?;
    }
    let step = config.optimizer.step(config.generation.draft_learning_rate);
    let grad_norm = model.optimizer_step(&step, exit)?;
    Ok(Lesson { loss, grad_norm })
}
