//! Which loss: variant, clipping, KL and importance correction. Names and defaults follow TRL 1.16.

use serde::{Deserialize, Serialize};

use super::loss::LossError;

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
pub(super) enum Aggregation {
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

    pub(super) fn aggregation(self) -> Aggregation {
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

impl LossConfig {
    /// Refuses numbers that make no loss. Called once, when the configuration is read.
    pub fn validate(&self) -> Result<(), LossError> {
        let high = self.epsilon_high.unwrap_or(self.epsilon);
        // `None` stands for its default, so an infinite δ is as good as any.
        let delta = self.delta.unwrap_or(f64::INFINITY);
        let floor = match self.loss_type.objective() {
            Objective::CappedReinforce => 0.0,
            Objective::TokenRatio | Objective::SequenceRatio => 1.0 + high,
        };
        let checks = [
            (
                "epsilon",
                self.epsilon,
                (0.0..=1.0).contains(&self.epsilon),
                "0 to 1",
            ),
            ("epsilon_high", high, high >= 0.0, "at least 0"),
            ("delta", delta, delta > floor, "more than 1 + epsilon_high"),
            (
                "beta",
                self.beta,
                self.beta >= 0.0 && self.beta.is_finite(),
                "at least 0",
            ),
            (
                "importance_c_max",
                self.importance_c_max,
                self.importance_c_max > 0.0,
                "more than 0",
            ),
        ];
        match checks.into_iter().find(|(_, _, ok, _)| !ok) {
            Some((field, value, _, expected)) => Err(LossError::Config {
                field,
                value,
                expected,
            }),
            None => Ok(()),
        }
    }
}
