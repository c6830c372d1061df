//! Speculative sampling: a draft's tokens are accepted or replaced so that what comes out is distributed
//! exactly as without a draft (Leviathan et al. 2023, arXiv:2211.17192; Chen et al. 2023, arXiv:2302.01318).
//!
//! Each decision has random numbers of its own, keyed by stream and position: one for the draft's draw, one
//! for acceptance, and the one a plain draw would use for the residual and the bonus token.

use super::{Scratch, mix, sample, target::Target, uniform};
use crate::{
    backend::{SampleArgs, Sampled},
    error::PolicyError,
};

/// Keep the streams of the three kinds of decision apart.
const DRAFT_STREAM: u64 = 0x6472_6166_7400_0001;
const ACCEPT_STREAM: u64 = 0x6163_6365_7074_0001;

/// Tokens a draft proposes to follow a sequence.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Proposal {
    pub tokens: Vec<u32>,
    /// The distribution each token was drawn from, `[k]` of `[V]`. Empty for a draft that is certain of
    /// its tokens (prompt lookup): then each has probability 1.
    pub probabilities: Vec<Vec<f32>>,
}

impl Proposal {
    /// `q(token)` at position `at`.
    fn probability(&self, at: usize, token: usize) -> f64 {
        match self.probabilities.get(at) {
            Some(q) => q.get(token).map_or(0.0, |q| f64::from(*q)),
            None => f64::from(u8::from(self.tokens[at] as usize == token)),
        }
    }
}

/// A draft's draw at `position` of `stream` from its probabilities `[V]`, which need not add up to 1.
pub fn draw_proposal(probabilities: &[f32], stream: u64, position: u64) -> u32 {
    let total: f64 = probabilities.iter().map(|p| f64::from(*p)).sum();
    let mut target = uniform(mix(stream ^ DRAFT_STREAM), position) * total;
    let mut last = 0;
    for (token, p) in probabilities.iter().enumerate().filter(|(_, p)| **p > 0.0) {
        last = token;
        target -= f64::from(*p);
        if target < 0.0 {
            break;
        }
    }
    last as u32
}

/// Goes through the proposal of `args` and returns the accepted tokens and one more: the replacement of the
/// first that was rejected, or a bonus token. Row `i` of `logits` belongs to the position of proposed
/// token `i`; there is one row more than proposed tokens.
///
/// A token is accepted with probability `min(1, p/q)`, `p` and `q` after penalty, temperature and truncation.
///
/// Errors: [`PolicyError::NonFiniteLogits`].
pub fn verify<'l>(
    logits: impl Fn(usize) -> &'l [f32],
    args: &SampleArgs<'_>,
    scratch: &mut Scratch,
) -> Result<Vec<Sampled>, PolicyError> {
    let Some(proposal) = args.proposal else {
        return Ok(vec![sample(logits(0), args, scratch)?]);
    };
    let mut out = Vec::with_capacity(proposal.tokens.len() + 1);
    let mut history = args.history.to_vec();
    for (i, &token) in proposal.tokens.iter().enumerate() {
        let position = args.position + i as u64;
        let target = Target::of(logits(i), args.params, &history, scratch)?;
        let p = target.probability(token as usize);
        let q = proposal.probability(i, token as usize);
        if uniform(mix(args.stream ^ ACCEPT_STREAM), position) * q < p {
            out.push(target.sampled(token as usize, args.top));
            history.push(token);
            continue;
        }
        let q = |token| proposal.probability(i, token);
        let replacement = target.draw_residual(q, uniform(args.stream, position));
        out.push(target.sampled(replacement, args.top));
        return Ok(out);
    }
    let bonus = SampleArgs {
        position: args.position + proposal.tokens.len() as u64,
        history: &history,
        proposal: None,
        ..*args
    };
    out.push(sample(logits(proposal.tokens.len()), &bonus, scratch)?);
    Ok(out)
}
