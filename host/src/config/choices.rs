//! The closed choices of a run's config: one enum per key whose value is a word.
//!
//! Owns their spelling in YAML and nothing about what they mean; `grpo` and `trainer` map them.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// GRPO variant: per-token objective and how tokens are averaged. Spelled as in TRL.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LossType {
    /// Mean over each completion, then over completions (Shao et al. 2024, arXiv 2402.03300).
    Grpo,
    /// Sum over tokens, divided by a constant length (Liu et al. 2025, arXiv 2503.20783).
    DrGrpo,
    /// Mean over all tokens of the step (Yu et al. 2025, arXiv 2503.14476).
    #[default]
    Dapo,
    /// Mean over all tokens of the local batch.
    Bnpo,
    /// One ratio per sequence (Zheng et al. 2025, arXiv 2507.18071).
    Gspo,
    /// Clipped ratio as a constant weight of the log-prob (MiniMax-M1, arXiv 2506.13585).
    Cispo,
}

/// Estimator of KL(policy ‖ reference) per token (Schulman 2020).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KlEstimator {
    /// `logp − ref`.
    K1,
    /// `(logp − ref)² / 2`.
    K2,
    /// `exp(ref − logp) − (ref − logp) − 1`.
    #[default]
    K3,
}

/// What rewards are divided by before they become advantages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ScaleRewards {
    /// Standard deviation of the completion's group.
    #[default]
    Group,
    /// Standard deviation of the whole step.
    Batch,
    /// One.
    None,
}

/// Correction for the gap between the distribution sampled from and the policy that is trained.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ImportanceMode {
    Off,
    /// Per-token ratio, capped at `max`.
    TokenTruncate,
    /// Per-token ratio, tokens above `max` dropped.
    TokenMask,
    /// Ratio of the whole completion, capped at `max`.
    SequenceTruncate,
    /// Ratio of the whole completion, completions above `max` dropped.
    #[default]
    SequenceMask,
}

/// Learning rate over the steps after warm-up. Spelled as in transformers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LrSchedule {
    Constant,
    /// Down to 0 at the last step.
    #[default]
    Linear,
    /// Half a cosine, down to 0 at the last step.
    Cosine,
}

/// Where the policy runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Device {
    /// The first GPU if this build and machine have one, else the CPU.
    #[default]
    Auto,
    Cpu,
    /// The GPU of this index.
    Cuda(usize),
}

impl FromStr for Device {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => return Ok(Self::Auto),
            "cpu" => return Ok(Self::Cpu),
            "cuda" => return Ok(Self::Cuda(0)),
            _ => {}
        }
        text.strip_prefix("cuda:")
            .and_then(|index| index.parse().ok())
            .map(Self::Cuda)
            .ok_or_else(|| format!("`{text}` is not a device; use auto, cpu or cuda:N"))
    }
}

impl TryFrom<String> for Device {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(index) => write!(f, "cuda:{index}"),
        }
    }
}

impl From<Device> for String {
    fn from(device: Device) -> Self {
        device.to_string()
    }
}
