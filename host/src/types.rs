//! Plain structs that cross rooms: data → plugin → grpo → run. Std and serde only.
//!
//! Rooms (`data`, `plugin`, `grpo`, `run`) never import each other; they meet here, and `trainer` and
//! `commands` put them together.

use serde::{Deserialize, Serialize};

pub use grpo_policy::types::{Completion, Finish, Request, SamplingParams, Telemetry};

/// One dataset row: its position in the dataset and the row itself as a JSON object, columns already
/// renamed by the column mapping of the config.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    pub id: u64,
    pub json: serde_json::Map<String, serde_json::Value>,
}

/// One chat message, as chat templates expect it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Message {
    pub role: String,
    pub content: String,
}

/// What a formatter makes of a row: text as is, or messages for the model's chat template.
#[derive(Clone, Debug, PartialEq)]
pub enum PromptBody {
    Text(String),
    Messages(Vec<Message>),
}

/// One prompt, before tokenising.
#[derive(Clone, Debug, PartialEq)]
pub struct Prompt {
    pub body: PromptBody,
    /// Stop strings in addition to the configured ones.
    pub stop: Vec<String>,
}

/// What a formatter reads out of a completion.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Parsed {
    pub reasoning: Option<String>,
    pub answer: Option<String>,
}

/// One completion as a reward sees it.
#[derive(Clone, Debug)]
pub struct Sample<'a> {
    /// Dataset position, for error messages; not shown to the guest.
    pub row_id: u64,
    /// The row as JSON text.
    pub row_json: &'a str,
    pub prompt: &'a str,
    pub completion: &'a str,
    pub parsed: &'a Parsed,
    pub finish: Finish,
    pub telemetry: Telemetry,
}

/// A reward plugin's word on one sample.
#[derive(Clone, Debug, PartialEq)]
pub enum Score {
    Value(Scored),
    /// Excluded from its group and counted, with the plugin's reason. Never a silent 0.
    Skip(String),
}

/// A reward and the named parts it is made of.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Scored {
    pub total: f64,
    pub parts: Vec<(String, f64)>,
}

/// What became of one row's group; goes to the curriculum.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    pub row: u64,
    /// Total reward of every completion that was scored (skipped ones are missing).
    pub rewards: Vec<f64>,
    pub skipped: u32,
}

/// What a curriculum may spend on the next step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Budget {
    /// Step about to be planned, from 0.
    pub step: u64,
    /// Rows in the dataset; picks are `0..rows`.
    pub rows: u64,
    /// Prompts wanted.
    pub prompts: u32,
    /// Completions per prompt, unless the curriculum knows better.
    pub group_size: u32,
    /// The run's seed.
    pub seed: u64,
}

/// One row chosen by a curriculum.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pick {
    pub row: u64,
    pub rollouts: u32,
}

/// A curriculum's decision.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Plan {
    pub picks: Vec<Pick>,
    /// Passes over the dataset so far, fractions included.
    pub epoch: f64,
    /// Opaque; comes back at the next call and is kept in checkpoints.
    pub state: Vec<u8>,
    /// Named numbers for the metrics file (`curriculum/NAME`).
    pub metrics: Vec<(String, f64)>,
    /// Tables for people; empty at most steps.
    pub report: Vec<Table>,
}

/// A table for people, from a plugin: every row has one cell per column, no text has control characters.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Table {
    pub title: String,
    pub columns: Vec<String>,
    pub rows: Vec<Vec<String>>,
    /// Lines below it.
    pub notes: Vec<String>,
}

impl Table {
    /// Which columns hold numbers (with or without a percent sign) and blanks (`–`) only, and one number
    /// at least; they are set flush right. One flag per column.
    pub fn numeric_columns(&self) -> Vec<bool> {
        let number = |cell: &str| {
            let digits = cell.trim_end_matches('%').trim();
            digits.parse::<f64>().is_ok()
        };
        let blank = |cell: &str| matches!(cell.trim(), "" | "–" | "-");
        let column = |i: usize| {
            let cells = || {
                self.rows
                    .iter()
                    .filter_map(move |row| row.get(i).map(String::as_str))
            };
            cells().any(number) && cells().all(|cell| number(cell) || blank(cell))
        };
        (0..self.columns.len()).map(column).collect()
    }
}

/// Which part of the loop a component plays, read from its exports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    Reward,
    Formatter,
    Curriculum,
}

impl std::fmt::Display for Role {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Reward => "reward",
            Self::Formatter => "formatter",
            Self::Curriculum => "curriculum",
        })
    }
}

/// What a component of a run has to itself: a role, and of several rewards a place among them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Seat {
    pub role: Role,
    /// 0 for roles of which a run has one.
    pub slot: usize,
}

/// Identity of a loaded component, as it stands in `plugins.lock`, logs and JSON output.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PluginId {
    pub role: Role,
    pub name: String,
    /// `sha256:` and 64 hex digits of the component's bytes.
    pub digest: String,
}
