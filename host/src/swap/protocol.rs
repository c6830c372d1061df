//! What goes over the control channel: one request, then events, each a line of JSON.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::shadow::ShadowReport;

/// Asks for another plugin in the place of one.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// `reward`, `formatter` or `curriculum`, or the name of one that the run has.
    pub role: String,
    /// A component file, by its absolute path, or the name of a built-in plugin.
    pub source: String,
    /// Steps to shadow; `None`: as the run's config says.
    #[serde(default)]
    pub shadow: Option<u32>,
    /// Settings and limits; `None`: those of the plugin it replaces.
    #[serde(default)]
    pub config: Option<Map<String, Value>>,
    #[serde(default)]
    pub limits: Option<Map<String, Value>>,
}

/// What becomes of a request.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum Event {
    Compiled {
        name: String,
        digest: String,
        milliseconds: f64,
    },
    Refused {
        reason: String,
        hint: Option<String>,
    },
    Shadowed {
        step: u32,
        of: u32,
        report: ShadowReport,
    },
    Promoted {
        /// First step that it takes part in.
        step: u64,
        digest: String,
    },
    /// Something that happened on the way.
    Note {
        text: String,
    },
    /// Its first step has ended well.
    Kept {
        step: u64,
    },
    RolledBack {
        step: u64,
        reason: String,
    },
    /// The run ended before.
    Ended {},
}

impl Event {
    /// Whether nothing comes after it.
    pub fn is_last(&self) -> bool {
        !matches!(
            self,
            Self::Compiled { .. }
                | Self::Shadowed { .. }
                | Self::Promoted { .. }
                | Self::Note { .. }
        )
    }
}

impl std::fmt::Display for Event {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Compiled {
                name,
                digest,
                milliseconds,
            } => write!(
                f,
                "compiled and checked `{name}` {digest} in {milliseconds:.0} ms"
            ),
            Self::Refused { reason, .. } => write!(f, "refused: {reason}"),
            Self::Shadowed { step, of, report } => {
                write!(f, "shadowed step {step} of {of}: {report}")
            }
            Self::Promoted { step, digest } => write!(f, "promoted at step {step}: {digest}"),
            Self::Note { text } => f.write_str(text),
            Self::Kept { step } => write!(f, "kept after step {step}"),
            Self::RolledBack { step, reason } => write!(f, "rolled back at step {step}: {reason}"),
            Self::Ended {} => f.write_str("the run ended before anything came of it"),
        }
    }
}

/// Something to tell the run's user.
pub enum Line {
    Note(String),
    Warning(String),
}

impl Line {
    pub(super) fn of(event: &Event) -> Self {
        let text = format!("swap: {event}");
        match event {
            Event::Refused { .. } | Event::RolledBack { .. } => Self::Warning(text),
            _ => Self::Note(text),
        }
    }
}
