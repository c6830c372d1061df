//! The closed choices of a run's config: one enum per key whose value is a word.
//!
//! Those of the loss are `grpo`'s own types, so that a spelling exists once; the device is the host's.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

pub use crate::grpo::{
    advantage::ScaleRewards,
    config::{Correction as ImportanceMode, KlEstimator, LossType},
    filter::DynamicSampling,
    schedule::Schedule as LrSchedule,
};

/// Where the policy runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Device {
    /// For what generates the first GPU that can be used, else the CPU; the CPU for what trains.
    #[default]
    Auto,
    Cpu,
    /// The GPU of this index.
    Cuda(usize),
}

/// Which numbers AdamW's moments are on a GPU; on a CPU they are f32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MomentType {
    #[default]
    F32,
    Bf16,
}

/// What becomes on a GPU of matrices that a GGUF file has quantised.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum QuantizedWeights {
    /// Kept where the model in bf16 would take more than half of the memory, else made bf16.
    #[default]
    Auto,
    /// Kept, in the formats that kernels read.
    Keep,
    /// Made bf16 when loaded.
    Dequantize,
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
            // One spelling each: no sign, no leading zero.
            .filter(|device| device.to_string() == text)
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
