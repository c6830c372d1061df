//! Why there is no swap, and what to do about it.

use std::path::PathBuf;

use super::protocol::Event;
use crate::types::Role;

/// Why there is no swap.
#[derive(Debug, thiserror::Error)]
pub enum SwapError {
    #[error("no run is going on in {}", run.display())]
    NotRunning { run: PathBuf },
    #[error("{}: {reason}", run.display())]
    Channel { run: PathBuf, reason: String },
    #[error("{event}")]
    Refused { event: Event, hint: Option<String> },
    #[error("`{name}` is a {role}, not a {wanted}")]
    AnotherRole {
        name: String,
        role: Role,
        wanted: Role,
    },
    #[error("it failed on {failed} of {samples} samples")]
    Fails { failed: u64, samples: u64 },
    #[error("plugin `{name}` of an earlier swap is {found} and was {expected}")]
    Changed {
        name: String,
        found: String,
        expected: String,
    },
}

impl SwapError {
    /// What the reader can do about it.
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            Self::NotRunning { run } => format!(
                "begin or go on with it: `grpo-host --resume {}`; a swap is for a run that is going on",
                run.display()
            ),
            Self::Channel { .. } => "is it this user's run, on this machine?".to_owned(),
            Self::Refused { hint, .. } => return hint.clone(),
            Self::AnotherRole { role, .. } => {
                format!("it can take the place of a {role}: `plugin swap RUN {role} FILE`")
            }
            Self::Fails { .. } => {
                "`failures/` in the run has such calls once it counts; swap_max_failure_rate is the limit".to_owned()
            }
            Self::Changed { .. } => "bring the file in the run's plugins/ back".to_owned(),
        })
    }
}
