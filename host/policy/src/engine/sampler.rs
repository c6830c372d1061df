//! From logits to a token: penalty, temperature, truncation, draw, log-probs. Pure functions over slices, the
//! oracle of every device sampler. Knows nothing of sequences or batches.
//!
//! Order of the steps: repetition penalty → temperature → top-k → top-p → min-p, each on the renormalised
//! survivors of the one before, as transformers 5 builds its logits processors (`generation/utils.py`).
//! Tokens are ranked by (logit falling, id rising), so equal logits never make a result depend on a sort.

mod softmax;
mod target;
mod truncate;
mod verify;

pub use verify::{Distribution, Proposal, accept_uniform, draft, draft_uniform, verify};

use rand_chacha::{
    ChaCha8Rng,
    rand_core::{RngCore, SeedableRng},
};

use crate::{
    backend::{SampleArgs, Sampled},
    error::PolicyError,
    types::SamplingParams,
};
use target::Target;
use truncate::Candidate;

/// Below this temperature the draw is greedy. vLLM's `_SAMPLING_EPS`: dividing by less overflows f32.
pub const GREEDY_BELOW: f32 = 1e-5;

/// Buffers of [`sample`], kept between calls so that a draw allocates nothing.
#[derive(Clone, Debug, Default)]
pub struct Scratch {
    /// Logits after the penalty, `[V]`; untouched while the penalty is off.
    penalised: Vec<f32>,
    /// Tokens whose penalty is already applied, `[V]`; all false between calls.
    seen: Vec<bool>,
    /// Mass of each chunk of the vocabulary.
    sums: Vec<f64>,
    candidates: Vec<Candidate>,
}

/// Draws the successor of `args.history` from `logits` (`[V]`); ignores `args.proposal`.
///
/// The draw is an inverse CDF of one uniform number. The Gumbel trick was rejected: it needs `V` random
/// numbers, and a device could not be checked against this function by handing it the same single number.
///
/// Errors: [`PolicyError::NonFiniteLogits`].
pub fn sample(
    logits: &[f32],
    args: &SampleArgs<'_>,
    scratch: &mut Scratch,
) -> Result<Sampled, PolicyError> {
    let target = Target::of(logits, args.params, args.history, scratch)?;
    let token = target.draw(uniform(args.stream, args.position));
    Ok(target.sampled(token, args.top))
}

/// The probabilities [`sample`] draws from, `[V]`; one-hot when greedy. Speculative decoding compares these
/// for target and draft (Leviathan et al. 2023: after temperature and truncation).
///
/// Errors: [`PolicyError::NonFiniteLogits`].
pub fn distribution(
    logits: &[f32],
    params: &SamplingParams,
    history: &[u32],
) -> Result<Vec<f32>, PolicyError> {
    Ok(Target::of(logits, params, history, &mut Scratch::default())?.dense())
}

/// Stream of completion `index` of a request with `seed`. The SplitMix64 finaliser (Steele, Lea, Flood 2014)
/// is a bijection, so the streams of one seed never collide.
pub fn stream_key(seed: u64, index: u32) -> u64 {
    mix(mix(seed) ^ u64::from(index))
}

/// The uniform number in `[0, 1)` that decides the token at `position` of `stream`.
///
/// ChaCha8 keyed by the stream, with the position as its nonce: any number is reachable without drawing the
/// ones before, which makes a draw independent of batching, and neighbouring keys share no structure. A
/// hash of (stream, position) would be cheaper, but 100 ns a token are nothing beside a forward pass.
pub fn uniform(stream: u64, position: u64) -> f64 {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&stream.to_le_bytes());
    let mut rng = ChaCha8Rng::from_seed(key);
    rng.set_stream(position);
    // The 53 bits an f64 can hold.
    (rng.next_u64() >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
}

fn mix(value: u64) -> u64 {
    let z = value.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

fn is_greedy(params: &SamplingParams) -> bool {
    params.temperature < GREEDY_BELOW
}

#[cfg(test)]
pub(super) mod tests;
