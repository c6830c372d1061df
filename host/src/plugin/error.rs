//! The one error of this room: who failed (plugin, digest, call, row) and how ([`Fault`]).
//! What to do about it is in [`hint`].

mod hint;

use super::grants::{ManifestError, Mismatch};
use crate::types::Role;
use std::fmt;
use std::sync::Arc;

/// What was being asked of a plugin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    Load,
    Instantiate,
    Configure,
    Score,
    Format,
    Parse,
    Plan,
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Load => "load",
            Self::Instantiate => "instantiate",
            Self::Configure => "configure",
            Self::Score => "score",
            Self::Format => "format",
            Self::Parse => "parse",
            Self::Plan => "plan",
        })
    }
}

/// A failure of a plugin, attributed.
#[derive(Clone, Debug, PartialEq)]
pub struct PluginError {
    pub plugin: Arc<str>,
    /// `sha256:` and 64 hex digits; empty if nothing was loaded.
    pub digest: Arc<str>,
    pub call: Call,
    /// Dataset position of the row concerned, if it is known.
    pub row: Option<u64>,
    pub fault: Fault,
}

impl std::error::Error for PluginError {}

impl PluginError {
    /// One line for each kind of failure among those of a batch of `samples`, in order of appearance.
    pub fn lines(errors: &[Self], samples: usize) -> Vec<String> {
        let mut kinds: Vec<(&Self, usize)> = Vec::new();
        for error in errors {
            let alike = |known: &Self| {
                let (a, b) = (known, error);
                (&a.plugin, &a.digest, a.call, &a.fault) == (&b.plugin, &b.digest, b.call, &b.fault)
            };
            match kinds.iter_mut().find(|(known, _)| alike(known)) {
                Some((_, count)) => *count += 1,
                None => kinds.push((error, 1)),
            }
        }
        let line = |(first, count): (&Self, usize)| match count {
            1 => first.to_string(),
            // Not "samples failed": with retries one sample fails several times.
            _ => format!("{count} failures in {samples} samples, the first: {first}"),
        };
        kinds.into_iter().map(line).collect()
    }
}

impl fmt::Display for PluginError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "plugin `{}`", self.plugin)?;
        if let Some(hex) = self.digest.get(..19) {
            write!(f, " ({hex})")?;
        }
        write!(f, " {}", self.call)?;
        if let Some(row) = self.row {
            write!(f, ", row {row}")?;
        }
        write!(f, ": {}", self.fault)
    }
}

/// Which of the guest's own errors it returned; see `plugin-error` in the WIT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestErrorKind {
    Config,
    Input,
    Internal,
}

/// How a plugin failed. Texts that come from a guest are escaped and cut.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Fault {
    #[error("is {found}, not a WebAssembly component")]
    NotAComponent { found: &'static str },
    #[error("has more than the {limit} bytes that are compiled")]
    TooLarge { limit: usize },
    #[error("has a name that cannot stand in logs, metrics and files")]
    Name,
    #[error("has a config of {bytes} bytes of JSON, more than the limit of {limit}")]
    ConfigSize { bytes: usize, limit: usize },
    #[error("took longer than {limit_ms} ms to compile")]
    CompileTime { limit_ms: u64 },
    #[error("brought down the compiler, which had {limit_mib} MiB of address space ({how})")]
    CompileCrash { how: String, limit_mib: u32 },
    #[error("could not be compiled on trial in a process of its own: {reason}")]
    Trial { reason: String },
    #[error("does not compile: {reason}")]
    Compile { reason: String },
    #[error(
        "exports {}; expected one of {}",
        list(exports),
        super::inspect::ROLE_EXPORTS.join(", ")
    )]
    WrongWorld { exports: Vec<String> },
    #[error("exports the interfaces of {} roles ({roles:?}); expected one", roles.len())]
    ManyRoles { roles: Vec<Role> },
    #[error("imports {}, which this host does not offer", list(imports))]
    UnknownImports { imports: Vec<String> },
    #[error("has a manifest that {0}")]
    Manifest(ManifestError),
    #[error("{0}")]
    Grants(Mismatch),
    #[error("does not fit the interface: {reason}")]
    Signature { reason: String },
    #[error("declares {found} {what}, more than the limit of {limit}")]
    Declares {
        what: &'static str,
        found: u64,
        limit: u64,
    },
    #[error("limit `{key}` is {value}, outside {min} to {max}")]
    LimitRange {
        key: &'static str,
        value: u64,
        min: u64,
        max: u64,
    },
    #[error("limit `on_failure` has the score {value}, which is not finite or beyond ±{limit:e}")]
    FailureScore { value: f64, limit: f64 },
    #[error("warm.{key} is {value}, outside 1 to {max}")]
    WarmRange {
        key: &'static str,
        value: u32,
        max: u32,
    },
    #[error(
        "the warm pools of all plugins have {wanted} instances, more than the limit of {limit}"
    )]
    WarmSlots { wanted: u32, limit: u32 },
    #[error("cannot have a warm pool: {why}")]
    NotWarm { why: &'static str },
    #[error("ran past its deadline of {limit_ms} ms")]
    Deadline { limit_ms: u64 },
    #[error("the request took longer than its wall-clock limit of {limit_ms} ms")]
    Wall { limit_ms: u64 },
    #[error("waited longer than its limit of {limit_ms} ms for `judge` and `http`")]
    Wait { limit_ms: u64 },
    #[error("used up its fuel of {limit}")]
    Fuel { limit: u64 },
    #[error("wanted {wanted} bytes of memory in all, more than the limit of {limit}")]
    Memory { wanted: usize, limit: usize },
    #[error("wanted {wanted} table elements in all, more than the limit of {limit}")]
    Table { wanted: usize, limit: usize },
    #[error("trapped: {reason}")]
    Trap { reason: String },
    #[error("broke the component ABI: {reason}")]
    Abi { reason: String },
    #[error("returned {found} results for {expected} inputs")]
    Length { expected: usize, found: usize },
    #[error("returned {what} = {value}, which is not finite or beyond ±{limit:e}")]
    Number {
        what: String,
        value: f64,
        limit: f64,
    },
    #[error("returned {what}: {found}, limit {limit}")]
    Size {
        what: &'static str,
        found: u64,
        limit: u64,
    },
    #[error("returned {what}")]
    BadResult { what: String },
    #[error("is left alone for some requests after {failures} in a row without a score")]
    Resting { failures: u32 },
    #[error("{message}")]
    Guest {
        kind: GuestErrorKind,
        message: String,
    },
    #[error("the WebAssembly engine did not start: {reason}")]
    Engine { reason: String },
}

// `Number` holds an `f64`, so equality is not total; `PartialEq` is there for tests and for counting.

fn list(names: &[String]) -> String {
    match names {
        [] => "nothing".to_owned(),
        names => format!("`{}`", names.join("`, `")),
    }
}

impl Fault {
    /// The kind of a failed call in one word, as `plugin test` compares it: `config`, `input` and `internal` for the
    /// guest's own errors, `trap`, `deadline`, `wall`, `wait`, `fuel`, `memory`, `table` for the walls, `abi` and `result` for what it
    /// returned; `load` for all that comes before a call.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Guest { kind, .. } => match kind {
                GuestErrorKind::Config => "config",
                GuestErrorKind::Input => "input",
                GuestErrorKind::Internal => "internal",
            },
            Self::Trap { .. } => "trap",
            Self::Deadline { .. } => "deadline",
            Self::Wall { .. } => "wall",
            Self::Wait { .. } => "wait",
            Self::Fuel { .. } => "fuel",
            Self::Memory { .. } => "memory",
            Self::Table { .. } => "table",
            Self::Abi { .. } => "abi",
            Self::Length { .. }
            | Self::Number { .. }
            | Self::Size { .. }
            | Self::BadResult { .. } => "result",
            _ => "load",
        }
    }

    /// Whether what a call was about made it fail, and not how long others took or what its plugin returned.
    pub(super) fn is_of_the_sample(&self) -> bool {
        matches!(
            self,
            Self::Trap { .. }
                | Self::Deadline { .. }
                | Self::Fuel { .. }
                | Self::Memory { .. }
                | Self::Table { .. }
        )
    }
}

impl PluginError {
    /// Whether the config asks for what the plugin or the host refuses.
    pub fn is_of_the_config(&self) -> bool {
        matches!(
            self.fault,
            Fault::LimitRange { .. }
                | Fault::FailureScore { .. }
                | Fault::WarmRange { .. }
                | Fault::WarmSlots { .. }
                | Fault::NotWarm { .. }
                | Fault::Grants(
                    Mismatch::NotGranted { .. } | Mismatch::NotAsked { .. } | Mismatch::Host { .. }
                )
                | Fault::ConfigSize { .. }
                | Fault::Guest {
                    kind: GuestErrorKind::Config,
                    ..
                }
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_of_a_batch_are_a_line_a_kind() {
        let error = |row, limit_ms| PluginError {
            plugin: "slow".into(),
            digest: "".into(),
            call: Call::Score,
            row: Some(row),
            fault: Fault::Deadline { limit_ms },
        };
        let errors = [error(7, 50), error(9, 50), error(7, 60), error(8, 50)];
        let lines = PluginError::lines(&errors, 64);
        let deadline = "plugin `slow` score, row 7: ran past its deadline of";
        assert_eq!(
            lines,
            [
                format!("3 failures in 64 samples, the first: {deadline} 50 ms"),
                format!("{deadline} 60 ms")
            ]
        );
        assert!(PluginError::lines(&[], 64).is_empty());
    }
}
