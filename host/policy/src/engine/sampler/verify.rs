//! Speculative sampling: a draft's tokens are accepted or replaced so that what comes out is distributed
//! exactly as without a draft (Leviathan et al. 2023, arXiv:2211.17192; Chen et al. 2023, arXiv:2302.01318).
//!
//! Each decision has random numbers of its own, keyed by stream and position: one for the draft's draw, one
//! for acceptance, and the one a plain draw would use for the residual and the bonus token.

use std::borrow::Cow;

use super::{Scratch, distribution, mix, sample, target::Target, uniform};
use crate::{
    backend::{Drafted, SampleArgs, Sampled, cuda::DeviceRow},
    error::PolicyError,
};

/// Keep the streams of the three kinds of decision apart.
const DRAFT_STREAM: u64 = 0x6472_6166_7400_0001;
const ACCEPT_STREAM: u64 = 0x6163_6365_7074_0001;

/// Tokens a draft proposes to follow a sequence.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Proposal {
    pub tokens: Vec<u32>,
    /// What each token was drawn from, `[k]`. Empty for a draft that is certain of its tokens (prompt lookup): then
    /// each has probability 1.
    pub probabilities: Vec<Distribution>,
}

/// Probabilities `[V]` that a draft drew a token from.
#[derive(Clone, Debug, PartialEq)]
pub enum Distribution {
    Host(Vec<f32>),
    /// Left on the GPU that drafted, for a policy that verifies there.
    Gpu(DeviceRow),
}

impl Distribution {
    /// The numbers, fetched if they are on a GPU.
    ///
    /// # Errors
    /// What the driver says.
    pub fn dense(&self) -> Result<Cow<'_, [f32]>, PolicyError> {
        Ok(match self {
            Self::Host(values) => Cow::Borrowed(values),
            Self::Gpu(row) => Cow::Owned(row.fetch()?),
        })
    }
}

/// A draft's draw from logits `[V]`, at the stream and position of `args`.
///
/// Errors: [`PolicyError::NonFiniteLogits`].
pub fn draft(logits: &[f32], args: &SampleArgs<'_>) -> Result<Drafted, PolicyError> {
    let q = distribution(logits, args.params, args.history)?;
    Ok(Drafted {
        token: draw_proposal(&q, args.stream, args.position),
        distribution: Distribution::Host(q),
    })
}

/// The number that decides what a draft draws at `position` of `stream`.
pub fn draft_uniform(stream: u64, position: u64) -> f64 {
    uniform(mix(stream ^ DRAFT_STREAM), position)
}

/// The number that decides whether the token drafted for `position` of `stream` is accepted.
pub fn accept_uniform(stream: u64, position: u64) -> f64 {
    uniform(mix(stream ^ ACCEPT_STREAM), position)
}

/// A draft's draw at `position` of `stream` from its probabilities `[V]`, which need not add up to 1.
fn draw_proposal(probabilities: &[f32], stream: u64, position: u64) -> u32 {
    let total: f64 = probabilities.iter().map(|p| f64::from(*p)).sum();
    let mut target = draft_uniform(stream, position) * total;
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
        let dense = proposal
            .probabilities
            .get(i)
            .map(Distribution::dense)
            .transpose()?;
        let q = |id: usize| match &dense {
            Some(q) => q.get(id).map_or(0.0, |q| f64::from(*q)),
            None => f64::from(u8::from(token as usize == id)),
        };
        if accept_uniform(args.stream, position) * q(token as usize) < p {
            out.push(target.sampled(token as usize, args.top));
            history.push(token);
            continue;
        }
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
