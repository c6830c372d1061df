//! The GRPO loss and its gradient with respect to every token's log-prob.
//!
//! Owns the configuration, the input and output structs and the walk over sequences; the per-token
//! formulas are in `objective`, the counters in `stats`. No model and no autograd: a backend propagates
//! `dlogp` further.

use serde::{Deserialize, Serialize};

use super::{
    objective::{self, Term},
    stats::LossStats,
};

/// The published variants. Each is one [`Objective`] with one [`Aggregation`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LossType {
    /// Shao et al. 2024: clipped token ratio, mean of the sequences' means.
    Grpo,
    /// Liu et al. 2025: clipped token ratio, divided by the constant `B · max_completion_length`.
    DrGrpo,
    /// Yu et al. 2025: clipped token ratio, mean over all tokens of the step. TRL's default and ours.
    #[default]
    Dapo,
    /// As `dapo`, but the mean is taken over each rank's own tokens first.
    Bnpo,
    /// Zheng et al. 2025: clipped length-normalised sequence ratio, mean over sequences.
    Gspo,
    /// MiniMax 2025: REINFORCE weighted with a capped, constant ratio, mean over all tokens of the step.
    Cispo,
}

/// What is maximised per token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Objective {
    TokenRatio,
    SequenceRatio,
    CappedReinforce,
}

/// How token losses become one number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Aggregation {
    SequenceMean,
    Constant,
    StepTokens,
    RankTokens,
}

impl LossType {
    pub(super) fn objective(self) -> Objective {
        match self {
            Self::Grpo | Self::DrGrpo | Self::Dapo | Self::Bnpo => Objective::TokenRatio,
            Self::Gspo => Objective::SequenceRatio,
            Self::Cispo => Objective::CappedReinforce,
        }
    }

    fn aggregation(self) -> Aggregation {
        match self {
            Self::Grpo | Self::Gspo => Aggregation::SequenceMean,
            Self::DrGrpo => Aggregation::Constant,
            Self::Dapo | Self::Cispo => Aggregation::StepTokens,
            Self::Bnpo => Aggregation::RankTokens,
        }
    }
}

/// Estimator of KL(policy ‖ reference) from one sampled token (Schulman 2020), d = logp − ref.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KlEstimator {
    /// d: unbiased, high variance, may be negative.
    K1,
    /// d²/2: biased, always ≥ 0.
    K2,
    /// e⁻ᵈ − 1 + d: unbiased, always ≥ 0.
    #[default]
    K3,
}

/// Correction for tokens drawn from another distribution than `old`, with ρ = exp(old − behaviour).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Correction {
    Off,
    /// Each token's ρ, at most `c_max`.
    TokenTruncate,
    /// Each token's ρ, 0 above `c_max`.
    TokenMask,
    /// The sequence's product of ρ, at most `c_max`.
    SequenceTruncate,
    /// The sequence's product of ρ, 0 above `c_max`. TRL's default.
    #[default]
    SequenceMask,
}

/// Everything that picks the loss. Names and defaults follow TRL 1.16.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LossConfig {
    pub loss_type: LossType,
    /// Lower clip: ratios below `1 − epsilon` stop earning when the advantage is negative.
    pub epsilon: f64,
    /// Upper clip `1 + epsilon_high`; `epsilon` when unset. For `cispo` it is the cap of the ratio itself,
    /// as in TRL, and 5 when unset.
    pub epsilon_high: Option<f64>,
    /// Two-sided clip: the unclipped ratio is at most `delta` (INTELLECT-2). Off when unset.
    pub delta: Option<f64>,
    /// Weight of the KL term. 0 needs no reference log-probs.
    pub beta: f64,
    pub kl_estimator: KlEstimator,
    /// Multiply the KL estimate by the token ratio, differentiated through, which makes its gradient
    /// unbiased off-policy (DeepSeek-V3.2). Always the token ratio, also for `gspo`.
    pub kl_bias_correction: bool,
    pub importance_correction: Correction,
    /// C_max of the correction.
    pub importance_c_max: f64,
    /// Leave sequences that hit the length limit out of the loss.
    pub mask_truncated_completions: bool,
}

impl Default for LossConfig {
    fn default() -> Self {
        Self {
            loss_type: LossType::default(),
            epsilon: 0.2,
            epsilon_high: None,
            delta: None,
            beta: 0.0,
            kl_estimator: KlEstimator::K3,
            kl_bias_correction: true,
            importance_correction: Correction::SequenceMask,
            importance_c_max: 3.0,
            mask_truncated_completions: false,
        }
    }
}

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
            Self::Shape { .. } | Self::Offsets { .. } => return None,
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

#[cfg(test)]
#[path = "loss_tests.rs"]
mod tests;
