//! Drafting with a model: a smaller one beside the policy, or the policy up to its early exit.

use std::collections::HashMap;

use super::{Ask, PromptPart};
use crate::{
    backend::{Backend, BlockId, Exit, SampleArgs, StepRow},
    engine::{sampler::Proposal, sequence::SequenceId},
    error::PolicyError,
    spec::ModelSpec,
};

/// A smaller model and what its pool holds. The pool mirrors the policy's block for block.
pub struct Model<B> {
    backend: B,
    /// Leading tokens of a sequence whose keys and values the pool has. A sequence without an entry was
    /// forked or found in the prefix cache: then they are those of the policy.
    cached: HashMap<SequenceId, usize>,
}

impl<B: Backend> Model<B> {
    /// # Errors
    /// [`PolicyError::DraftVocabulary`] when it does not speak of the policy's tokens. Compare the tokenizers
    /// too: equal sizes need not mean equal tokens.
    pub fn new(backend: B, policy: &ModelSpec) -> Result<Self, PolicyError> {
        let (draft, policy) = (backend.spec().vocab_size, policy.vocab_size);
        if draft != policy {
            return Err(PolicyError::DraftVocabulary { draft, policy });
        }
        let cached = HashMap::new();
        Ok(Self { backend, cached })
    }

    pub(super) fn backend_ref(&self) -> &B {
        &self.backend
    }

    pub(super) fn backend(&mut self) -> &mut B {
        &mut self.backend
    }

    /// Longest sequence it can run.
    pub(super) fn context(&self) -> usize {
        self.backend.spec().max_position_embeddings
    }

    pub(super) fn forget(&mut self, id: SequenceId) {
        self.cached.remove(&id);
    }

    pub(super) fn follow(
        &mut self,
        copies: &[(BlockId, BlockId)],
        parts: &[PromptPart<'_>],
    ) -> Result<(), PolicyError> {
        if !copies.is_empty() {
            self.backend.copy_kv(copies)?;
        }
        let (mut rows, context) = (Vec::new(), self.context());
        for part in parts {
            // A single token is decoding without a guess; the next guess catches up with it.
            if part.tokens.len() == 1 {
                self.cached.entry(part.id).or_insert(part.position);
                continue;
            }
            // Nothing is drafted behind the draft's context, so what lies there is never missed.
            let fit = part.tokens.len().min(context.saturating_sub(part.position));
            self.cached.insert(part.id, part.position + fit);
            if fit == 0 {
                continue;
            }
            rows.push(StepRow {
                sequence: part.id,
                tokens: &part.tokens[..fit],
                position: part.position,
                blocks: part.blocks,
                sample: None,
            });
        }
        if !rows.is_empty() {
            self.backend.step(&rows)?;
        }
        Ok(())
    }

    pub(super) fn propose(&mut self, asks: &[Ask<'_>]) -> Result<Vec<Proposal>, PolicyError> {
        // Of what it drafted last time, the policy kept `ask.cached` tokens at most.
        let from = |ask: &Ask<'_>| {
            let cached = self.cached.get(&ask.id).copied();
            cached.unwrap_or(ask.cached).min(ask.cached)
        };
        let from: Vec<usize> = asks.iter().map(from).collect();
        let proposals = autoregress(&mut self.backend, Exit::Final, asks, from)?;
        for (ask, proposal) in asks.iter().zip(&proposals) {
            // The last proposed token was never run.
            let run = ask.tokens.len() + proposal.tokens.len().saturating_sub(1);
            self.cached.insert(ask.id, run);
        }
        Ok(proposals)
    }
}

/// Draws up to `most` tokens for every ask, one round of the model per token. `from`: tokens whose keys and
/// values it has.
pub(super) fn autoregress(
    backend: &mut impl Backend,
    exit: Exit,
    asks: &[Ask<'_>],
    mut from: Vec<usize>,
) -> Result<Vec<Proposal>, PolicyError> {
    let mut texts: Vec<Vec<u32>> = asks.iter().map(|ask| ask.tokens.to_vec()).collect();
    let mut probabilities = vec![Vec::new(); asks.len()];
    let rounds = asks.iter().map(|ask| ask.most).max().unwrap_or(0);
    for round in 0..rounds {
        let live: Vec<usize> = (0..asks.len()).filter(|i| asks[*i].most > round).collect();
        let row = |&i: &usize| StepRow {
            sequence: asks[i].id,
            tokens: &texts[i][from[i]..],
            position: from[i],
            blocks: asks[i].blocks,
            sample: Some(SampleArgs {
                params: asks[i].params,
                stream: asks[i].stream,
                position: texts[i].len() as u64,
                history: &texts[i],
                proposal: None,
                top: 0,
                ahead: 0,
            }),
        };
        let rows: Vec<StepRow<'_>> = live.iter().map(row).collect();
        let drawn = backend.propose(&rows, exit)?;
        for (i, drafted) in live.into_iter().zip(drawn) {
            from[i] = texts[i].len();
            texts[i].push(drafted.token);
            probabilities[i].push(drafted.distribution);
        }
    }
    let proposal = |((ask, text), probabilities): ((&Ask<'_>, Vec<u32>), _)| Proposal {
        tokens: text[ask.tokens.len()..].to_vec(),
        probabilities,
    };
    Ok(asks
        .iter()
        .zip(texts)
        .zip(probabilities)
        .map(proposal)
        .collect())
}
