//! The distribution one position is sampled from: penalised, tempered, truncated, renormalised; and the
//! policy's own beside it.

use super::{
    Scratch, is_greedy,
    softmax::Softmax,
    truncate::{self, Candidate},
};
use crate::{
    backend::Sampled,
    error::PolicyError,
    types::{SamplingParams, TopTokens},
};

/// Which tokens can be drawn.
enum Support<'a> {
    /// Greedy: this one.
    Best(usize),
    /// The whole vocabulary, with the mass of each chunk of it.
    Whole(&'a [f64]),
    /// What top-k, top-p and min-p left, most likely first, and its unnormalised mass.
    Truncated(&'a [Candidate], f64),
}

/// See the file header.
pub(super) struct Target<'a> {
    logits: &'a [f32],
    /// Softmax of the logits at the sampling temperature.
    policy: Softmax,
    /// The logits after the penalty.
    shaped: &'a [f32],
    full: Softmax,
    support: Support<'a>,
}

impl<'a> Target<'a> {
    /// From logits `[V]` and all tokens before the position.
    pub(super) fn of(
        logits: &'a [f32],
        params: &SamplingParams,
        history: &[u32],
        scratch: &'a mut Scratch,
    ) -> Result<Self, PolicyError> {
        let temperature = softmax_temperature(params);
        let Scratch {
            penalised,
            seen,
            sums,
            candidates,
        } = scratch;
        let policy = finite_softmax(logits, temperature, sums, history.len())?;
        let (shaped, full) = if penalty_is_on(params) {
            penalise(logits, params.repetition_penalty, history, penalised, seen);
            let full = finite_softmax(penalised, temperature, sums, history.len())?;
            (&penalised[..], full)
        } else {
            (logits, policy)
        };
        let support = if is_greedy(params) {
            Support::Best(full.first_max(shaped))
        } else if truncate::is_on(params) {
            truncate::survivors(shaped, &full, params, candidates);
            Support::Truncated(candidates, truncate::mass(candidates))
        } else {
            Support::Whole(sums)
        };
        Ok(Self {
            logits,
            policy,
            shaped,
            full,
            support,
        })
    }

    /// The token at `u` in `[0, 1)` of the cumulated distribution.
    pub(super) fn draw(&self, u: f64) -> usize {
        match &self.support {
            Support::Best(token) => *token,
            Support::Whole(sums) => self.full.draw(self.shaped, sums, u),
            Support::Truncated(candidates, total) => truncate::draw(candidates, u * total),
        }
    }

    /// `p(token)`, 0 for one that cannot be drawn.
    pub(super) fn probability(&self, token: usize) -> f64 {
        match &self.support {
            Support::Best(best) => f64::from(u8::from(*best == token)),
            Support::Whole(_) => self
                .shaped
                .get(token)
                .map_or(0.0, |logit| self.full.logprob(*logit).exp()),
            Support::Truncated(candidates, total) => candidates
                .iter()
                .find(|c| c.token as usize == token)
                .map_or(0.0, |c| c.scaled.exp() / total),
        }
    }

    /// The token at `u` of `max(p − q, 0)`, renormalised: what is drawn where a draft was rejected
    /// (Leviathan et al. 2023, eq. 2). `q` gives the draft's probability of a token.
    pub(super) fn draw_residual(&self, q: impl Fn(usize) -> f64, u: f64) -> usize {
        let weights: Vec<(usize, f64)> = self
            .drawable()
            .map(|(token, p)| (token, p - q(token)))
            .filter(|(_, weight)| *weight > 0.0)
            .collect();
        let total: f64 = weights.iter().map(|(_, weight)| weight).sum();
        let mut target = u * total;
        for (token, weight) in &weights {
            target -= weight;
            if target < 0.0 {
                return *token;
            }
        }
        // Rounding: either the last weight was just missed, or p and q are equal to the last bit.
        weights
            .last()
            .map_or_else(|| self.draw(u), |(token, _)| *token)
    }

    /// All probabilities, `[V]`.
    pub(super) fn dense(&self) -> Vec<f32> {
        let mut dense = vec![0.0; self.logits.len()];
        for (token, p) in self.drawable() {
            dense[token] = p as f32;
        }
        dense
    }

    fn drawable(&self) -> Box<dyn Iterator<Item = (usize, f64)> + '_> {
        match &self.support {
            Support::Best(token) => Box::new(std::iter::once((*token, 1.0))),
            Support::Whole(_) => {
                let p = |(token, logit): (usize, &f32)| (token, self.full.logprob(*logit).exp());
                Box::new(self.shaped.iter().enumerate().map(p))
            }
            Support::Truncated(candidates, total) => {
                let p = move |c: &Candidate| (c.token as usize, c.scaled.exp() / total);
                Box::new(candidates.iter().map(p))
            }
        }
    }

    /// The policy's `top` most likely tokens.
    fn top(&self, top: usize) -> TopTokens {
        if top == 0 {
            return TopTokens::default();
        }
        let params = SamplingParams {
            top_k: top as u32,
            ..SamplingParams::default()
        };
        let mut candidates = Vec::new();
        truncate::survivors(self.logits, &self.policy, &params, &mut candidates);
        let p = |c: &Candidate| (c.scaled.exp() / self.policy.total) as f32;
        TopTokens {
            ids: candidates.iter().map(|c| c.token).collect(),
            probabilities: candidates.iter().map(p).collect(),
        }
    }

    /// The token with its two log-probs. Greedy draws have the log-prob of the whole softmax.
    pub(super) fn sampled(&self, token: usize, top: usize) -> Sampled {
        let logprob = match &self.support {
            Support::Truncated(candidates, total) => candidates
                .iter()
                .find(|c| c.token as usize == token)
                .map_or(f64::NEG_INFINITY, |c| c.scaled - total.ln()),
            Support::Best(_) | Support::Whole(_) => self.full.logprob(self.shaped[token]),
        };
        Sampled {
            token: token as u32,
            logprob: logprob as f32,
            policy_logprob: self.policy.logprob(self.logits[token]) as f32,
            top: self.top(top),
        }
    }
}

fn softmax_temperature(params: &SamplingParams) -> f32 {
    if is_greedy(params) {
        1.0
    } else {
        params.temperature
    }
}

fn penalty_is_on(params: &SamplingParams) -> bool {
    params.repetition_penalty != 1.0
}

fn finite_softmax(
    logits: &[f32],
    temperature: f32,
    sums: &mut Vec<f64>,
    position: usize,
) -> Result<Softmax, PolicyError> {
    Softmax::of(logits, temperature, sums).ok_or(PolicyError::NonFiniteLogits { position })
}

/// CTRL's penalty (Keskar et al. 2019, §4.1): once per distinct token, away from being likely.
fn penalise(
    logits: &[f32],
    penalty: f32,
    history: &[u32],
    penalised: &mut Vec<f32>,
    seen: &mut Vec<bool>,
) {
    penalised.clear();
    penalised.extend_from_slice(logits);
    seen.resize(logits.len(), false);
    for &token in history {
        let token = token as usize;
        // A padded vocabulary may know ids that this LM head has no logit for.
        if let (Some(logit), Some(seen)) = (penalised.get_mut(token), seen.get_mut(token))
            && !std::mem::replace(seen, true)
        {
            *logit = if *logit > 0.0 {
                *logit / penalty
            } else {
                *logit * penalty
            };
        }
    }
    for &token in history {
        if let Some(seen) = seen.get_mut(token as usize) {
            *seen = false;
        }
    }
}
