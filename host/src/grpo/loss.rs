//! The GRPO loss and its gradient with respect to every token's log-prob.
//!
//! Owns the input and output structs and the walk over sequences; the choices are in `config`, the
//! per-token formulas in `objective`, the counters in `stats`. No model and no autograd: a backend
//! propagates `dlogp` further.

use super::{
    config::{Aggregation, LossConfig},
    objective::{self, Term},
    stats::LossStats,
};

/// One micro-batch. `T` completion tokens of `B` sequences laid end to end; log-probs in nats at the
/// sampling temperature.
#[derive(Clone, Copy, Debug)]
pub struct LossInput<'a> {
    /// Start of each sequence and `T` at the end, `[B + 1]`.
    pub offsets: &'a [usize],
    /// Current policy, `[T]`: the variable of the gradient.
    pub logp: &'a [f32],
    /// Policy that the rollout came from, full softmax, `[T]`.
    pub old: &'a [f32],
    /// Reference policy, `[T]`; needed when `beta > 0`.
    pub reference: Option<&'a [f32]>,
    /// Distribution really sampled from, `[T]`; without it the correction is off.
    pub behaviour: Option<&'a [f32]>,
    /// Entropy of the current policy, `[T]`, for the statistics only.
    pub entropy: Option<&'a [f32]>,
    /// One per sequence, `[B]`.
    pub advantages: &'a [f64],
    /// Tokens that count, `[T]`. Build it with [`loss_mask`].
    pub mask: &'a [bool],
}

/// Denominators of one optimizer step, over all its micro-batches and ranks, so that micro-batch losses
/// simply add up.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Normalisers {
    /// Sequences of the step, masked ones included (as TRL's mean over the batch does).
    pub sequences: f64,
    /// Tokens of the step that count.
    pub tokens: f64,
    /// `bnpo`: tokens that count on this rank, times the number of ranks.
    pub rank_tokens: f64,
    /// `dr_grpo`: the configured limit, not what was reached.
    pub max_completion_length: f64,
}

impl Normalisers {
    /// Those of a step on a single rank, from the mask of the whole step.
    pub fn single_rank(sequences: usize, mask: &[bool], max_completion_length: usize) -> Self {
        let tokens = mask.iter().filter(|m| **m).count() as f64;
        Self {
            sequences: sequences as f64,
            tokens,
            rank_tokens: tokens,
            max_completion_length: max_completion_length as f64,
        }
    }
}

/// Value, gradient and statistics of one micro-batch.
#[derive(Clone, Debug, PartialEq)]
pub struct LossOutput {
    /// This micro-batch's summand of the step's loss, KL term included.
    pub value: f64,
    /// ∂loss/∂logp per token, `[T]`; 0 where masked.
    pub dlogp: Vec<f32>,
    pub stats: LossStats,
}

/// Input that no loss can be computed from.
#[derive(Debug, PartialEq, thiserror::Error)]
pub enum LossError {
    #[error("loss input `{field}` has {found} entries, expected {expected}")]
    Shape {
        field: &'static str,
        found: usize,
        expected: usize,
    },
    #[error("sequence offsets must rise from 0 to {tokens}")]
    Offsets { tokens: usize },
    #[error("beta is {beta} but the batch has no reference log-probs")]
    MissingReference { beta: f64 },
    #[error("`{field}` of token {token} of sequence {sequence} is {value}")]
    Input {
        field: &'static str,
        sequence: usize,
        token: usize,
        value: f64,
    },
    #[error("`{field}` is {value}, expected {expected}")]
    Config {
        field: &'static str,
        value: f64,
        expected: &'static str,
    },
    #[error("the loss gradient of token {token} of sequence {sequence} is {value}")]
    NonFinite {
        sequence: usize,
        token: usize,
        value: f64,
    },
}

impl LossError {
    /// What the reader can do about it, if there is something.
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            Self::NonFinite { .. } => {
                "the policy drifted too far from the rollout: lower learning_rate or num_iterations, \
                 or set delta"
            }
            Self::MissingReference { .. } => "set beta to 0, or keep a reference model",
            Self::Input { .. } => "the model's output is broken: check its weights, or lower learning_rate",
                Self::Config { .. } | Self::Shape { .. } | Self::Offsets { .. } => return None,
        }
        .to_owned())
    }
}

/// Which of the `offsets.last()` tokens count: all, except those of sequences with `truncated[b]` when
/// [`LossConfig::mask_truncated_completions`] is set.
pub fn loss_mask(offsets: &[usize], truncated: &[bool], config: &LossConfig) -> Vec<bool> {
    offsets
        .windows(2)
        .zip(truncated)
        .flat_map(|(ends, cut)| {
            let keep = !(config.mask_truncated_completions && *cut);
            std::iter::repeat_n(keep, ends[1].saturating_sub(ends[0]))
        })
        .collect()
}

/// The loss of a micro-batch, minimised, and its gradient. Exact under splitting: the values of the parts
/// of a step add up to the value of the whole, and `dlogp` does not depend on the split.
pub fn loss(
    input: &LossInput<'_>,
    config: &LossConfig,
    normalisers: &Normalisers,
) -> Result<LossOutput, LossError> {
    check(input, config)?;
    let mut out = LossOutput {
        value: 0.0,
        dlogp: vec![0.0; input.logp.len()],
        stats: LossStats::default(),
    };
    for (sequence, ends) in input.offsets.windows(2).enumerate() {
        let tokens: Vec<usize> = (ends[0]..ends[1]).filter(|t| input.mask[*t]).collect();
        if tokens.is_empty() {
            continue;
        }
        check_finite(input, sequence, ends[0], &tokens)?;
        let weight = token_weight(config.loss_type.aggregation(), normalisers, tokens.len());
        let terms = objective::sequence(input, config, sequence, &tokens, &mut out.stats);
        for (&t, Term { value, slope }) in tokens.iter().zip(terms) {
            let gradient = weight * slope;
            if !(gradient as f32).is_finite() {
                let token = t - ends[0];
                return Err(LossError::NonFinite {
                    sequence,
                    token,
                    value: gradient,
                });
            }
            out.value += weight * value;
            out.dlogp[t] = gradient as f32;
        }
    }
    Ok(out)
}

/// What each token of a sequence with `n` counted tokens is multiplied by.
fn token_weight(aggregation: Aggregation, norm: &Normalisers, n: usize) -> f64 {
    let divisor = match aggregation {
        Aggregation::SequenceMean => norm.sequences * n as f64,
        Aggregation::Constant => norm.sequences * norm.max_completion_length,
        Aggregation::StepTokens => norm.tokens,
        Aggregation::RankTokens => norm.rank_tokens,
    };
    divisor.max(1.0).recip()
}

fn check(input: &LossInput<'_>, config: &LossConfig) -> Result<(), LossError> {
    let tokens = input.logp.len();
    let rising = input.offsets.windows(2).all(|w| w[0] <= w[1]);
    if input.offsets.first() != Some(&0) || input.offsets.last() != Some(&tokens) || !rising {
        return Err(LossError::Offsets { tokens });
    }
    let optional = |s: Option<&[f32]>| s.map_or(tokens, <[f32]>::len);
    let sizes = [
        ("old", input.old.len(), tokens),
        ("mask", input.mask.len(), tokens),
        ("reference", optional(input.reference), tokens),
        ("behaviour", optional(input.behaviour), tokens),
        ("entropy", optional(input.entropy), tokens),
        (
            "advantages",
            input.advantages.len(),
            input.offsets.len() - 1,
        ),
    ];
    for (field, found, expected) in sizes {
        if found != expected {
            return Err(LossError::Shape {
                field,
                found,
                expected,
            });
        }
    }
    if config.beta != 0.0 && input.reference.is_none() {
        return Err(LossError::MissingReference { beta: config.beta });
    }
    Ok(())
}

/// Minimum and maximum swallow NaN, so a broken log-prob could pass through a clip unseen.
fn check_finite(
    input: &LossInput<'_>,
    sequence: usize,
    start: usize,
    tokens: &[usize],
) -> Result<(), LossError> {
    let fields = [
        ("logp", Some(input.logp)),
        ("old", Some(input.old)),
        ("reference", input.reference),
        ("behaviour", input.behaviour),
    ];
    for (field, values) in fields
        .into_iter()
        .filter_map(|(field, v)| Some((field, v?)))
    {
        if let Some(&t) = tokens.iter().find(|t| !values[**t].is_finite()) {
            let (token, value) = (t - start, f64::from(values[t]));
            return Err(LossError::Input {
                field,
                sequence,
                token,
                value,
            });
        }
    }
    let value = input.advantages[sequence];
    if !value.is_finite() {
        return Err(LossError::Input {
            field: "advantages",
            sequence,
            token: 0,
            value,
        });
    }
    Ok(())
}

#[cfg(test)]
#[path = "loss_fixture.rs"]
mod fixture;
#[cfg(test)]
#[path = "loss_gradient_tests.rs"]
mod gradient_tests;
#[cfg(test)]
#[path = "loss_input_tests.rs"]
mod input_tests;
#[cfg(test)]
#[path = "loss_tests.rs"]
mod tests;
