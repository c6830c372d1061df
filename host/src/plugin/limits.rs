//! What a plugin may use, as the run's config says it, and the caps nobody can raise.
//!
//! Numbers only: the sandbox enforces them, `check` applies those on results.

use super::check::MAX_REWARD;
use super::error::Fault;
use serde::{Deserialize, Serialize};

/// Largest component that is compiled, in bytes.
pub const MAX_COMPONENT_BYTES: usize = 64 << 20;
/// Bytes of a plugin's config as JSON text.
pub(super) const MAX_CONFIG_BYTES: usize = 1 << 20;
/// Bytes of a plugin's name.
pub(super) const MAX_PLUGIN_NAME_BYTES: usize = 128;
/// Bytes a guest may hand to the host in one call.
pub(super) const MAX_RESULT_BYTES: usize = 32 << 20;
/// Memories, tables and core instances of one component. Compilers and composers need a handful.
pub(super) const MAX_MEMORIES: usize = 8;
pub(super) const MAX_TABLES: usize = 32;
pub(super) const MAX_CORE_INSTANCES: usize = 64;
/// Elements of all tables of an instance together.
pub(super) const MAX_TABLE_ELEMENTS: usize = 100_000;
/// Component-model handles of one instance. No interface of ours has resources.
pub(super) const MAX_HANDLES: usize = 64;

/// Whether samples of a batch share an instance.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Isolation {
    /// A fresh instance for each batch.
    #[default]
    Batch,
    /// A fresh instance for each sample: nothing can leak from one into another.
    Sample,
}

/// What happens when a plugin fails, by trap, limit, bad result or an error of its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnFailure {
    /// The guilty samples are left out of their groups and counted. Formatters and curricula have
    /// nothing to leave out; for them it is `abort`.
    #[default]
    Skip,
    /// The run stops with the error.
    Abort,
    /// The failed call is made again up to `retries` times, then `abort`.
    Retry,
    /// A sample that ends its call by a trap or uses up the guest's time or memory, alone too, has this total; others are
    /// skipped. For rewards that run what a model wrote, which must gain nothing by it.
    Score(f64),
}

/// Limits of one plugin. Every key has a default; an unknown key is an error.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// Most milliseconds one call into the guest may take, enforced within 10 ms; 1 to 3 600 000.
    pub deadline_ms: u64,
    /// Most milliseconds one request to the plugin may take, with instantiation, retries and the
    /// search for a guilty sample; 1 to 86 400 000.
    pub wall_ms: u64,
    /// Most milliseconds that one call into the guest may wait for `judge` and `http`, which `deadline_ms` does not count;
    /// 1 to 86 400 000.
    pub wait_ms: u64,
    /// Most milliseconds that compiling a component of one's own may take, in a child process;
    /// 1 to 3 600 000. Shipped components are compiled without a limit.
    pub compile_ms: u64,
    /// Mebibytes of address space of that process, 256 to 65 536.
    pub compile_mib: u32,
    /// Mebibytes of all memories of an instance together, 1 to 4096.
    pub memory_mib: u32,
    /// Wasm instructions (roughly) one call may execute. Unlike the deadline this is the same on
    /// every machine, and makes the guest slower by a quarter. Off by default.
    pub fuel: Option<u64>,
    pub isolation: Isolation,
    pub on_failure: OnFailure,
    /// Used by `on_failure: retry`, 0 to 100.
    pub retries: u32,
    /// A trap's error names all functions that led to it and not only the last one.
    pub guest_backtrace: bool,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            deadline_ms: 1000,
            wall_ms: 30_000,
            wait_ms: 20_000,
            compile_ms: 60_000,
            compile_mib: 4096,
            memory_mib: 256,
            fuel: None,
            isolation: Isolation::Batch,
            on_failure: OnFailure::Skip,
            retries: 2,
            guest_backtrace: false,
        }
    }
}

impl Limits {
    /// Refuses values outside the ranges above.
    pub fn check(&self) -> Result<(), Fault> {
        for (key, value, min, max) in [
            ("deadline_ms", self.deadline_ms, 1, 3_600_000),
            ("wall_ms", self.wall_ms, 1, 86_400_000),
            ("wait_ms", self.wait_ms, 1, 86_400_000),
            ("compile_ms", self.compile_ms, 1, 3_600_000),
            ("compile_mib", u64::from(self.compile_mib), 256, 65_536),
            ("memory_mib", u64::from(self.memory_mib), 1, 4096),
            ("fuel", self.fuel.unwrap_or(1), 1, u64::MAX),
            ("retries", u64::from(self.retries), 0, 100),
        ] {
            if !(min..=max).contains(&value) {
                return Err(Fault::LimitRange {
                    key,
                    value,
                    min,
                    max,
                });
            }
        }
        match self.on_failure {
            // NaN is in no range.
            OnFailure::Score(value) if !(-MAX_REWARD..=MAX_REWARD).contains(&value) => {
                Err(Fault::FailureScore {
                    value,
                    limit: MAX_REWARD,
                })
            }
            _ => Ok(()),
        }
    }

    /// The memory cap in bytes.
    pub(super) fn memory_bytes(&self) -> usize {
        // 64-bit targets only: wasmtime's pooling allocator needs the address space.
        (self.memory_mib as usize) << 20
    }
}
