//! From logits to a token: penalty, temperature, truncation, draw, log-probs. Pure functions over slices, the
//! oracle of every device sampler. Knows nothing of sequences or batches.
//!
//! Order of the steps: repetition penalty → temperature → top-k → top-p → min-p, each on the renormalised
//! survivors of the one before, as transformers 5 builds its logits processors (`generation/utils.py`).
//! Tokens are ranked by (logit falling, id rising), so equal logits never make a result depend on a sort.

mod softmax;
mod truncate;

use rand_chacha::{
    ChaCha8Rng,
    rand_core::{RngCore, SeedableRng},
};

use crate::{
    backend::{SampleArgs, Sampled},
    error::PolicyError,
    types::SamplingParams,
};
use softmax::Softmax;
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

/// Draws the successor of `args.history` from `logits` (`[V]`).
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
    let params = args.params;
    let temperature = softmax_temperature(params);
    let Scratch {
        penalised,
        seen,
        sums,
        candidates,
    } = scratch;
    let policy = finite_softmax(logits, temperature, sums, args.history.len())?;
    let (shaped, full) = if penalty_is_on(params) {
        penalise(
            logits,
            params.repetition_penalty,
            args.history,
            penalised,
            seen,
        );
        let full = finite_softmax(penalised, temperature, sums, args.history.len())?;
        (&penalised[..], full)
    } else {
        (logits, policy)
    };
    let (token, logprob) = if is_greedy(params) {
        let token = full.first_max(shaped);
        (token, full.logprob(shaped[token]))
    } else {
        let u = uniform(args.stream, args.position);
        if truncate::is_on(params) {
            truncate::survivors(shaped, &full, params, candidates);
            truncate::draw(candidates, u)
        } else {
            let token = full.draw(shaped, sums, u);
            (token, full.logprob(shaped[token]))
        }
    };
    Ok(Sampled {
        token: token as u32,
        logprob: logprob as f32,
        policy_logprob: policy.logprob(logits[token]) as f32,
    })
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
    let Scratch {
        mut penalised,
        mut seen,
        mut sums,
        mut candidates,
    } = Scratch::default();
    let shaped = if penalty_is_on(params) {
        penalise(
            logits,
            params.repetition_penalty,
            history,
            &mut penalised,
            &mut seen,
        );
        &penalised[..]
    } else {
        logits
    };
    let full = finite_softmax(
        shaped,
        softmax_temperature(params),
        &mut sums,
        history.len(),
    )?;
    let mut probabilities = vec![0.0; logits.len()];
    if is_greedy(params) {
        probabilities[full.first_max(shaped)] = 1.0;
    } else if truncate::is_on(params) {
        truncate::survivors(shaped, &full, params, &mut candidates);
        let total = truncate::mass(&candidates);
        for candidate in &candidates {
            probabilities[candidate.token as usize] = (candidate.scaled.exp() / total) as f32;
        }
    } else {
        for (p, logit) in probabilities.iter_mut().zip(shaped) {
            *p = full.logprob(*logit).exp() as f32;
        }
    }
    Ok(probabilities)
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

#[cfg(test)]
mod tests;
