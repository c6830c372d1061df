//! Guests that mean harm, or are broken: each gets its own typed error, within bounded time and memory, and
//! the host goes on serving good ones.
//!
//! `hostile_NN` is case NN of the list of 48 that the plugin platform is held to. Case 24, which needs
//! the program, is in the tests of the command line; docs/state.md says which cases wait for what.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "clippy counts only functions marked as tests as tests"
)]

mod abi;
mod clocks;
mod granted;
mod grants;
mod guest;
mod http;
mod judge;
mod judging;
mod list;
mod load;
mod logs;
mod memory;
mod policy;
mod registry_server;
mod replay;
mod results;
#[allow(dead_code, reason = "the tests of swaps use the rest")]
mod role_guests;
mod roles;
mod sharing;
mod storm;
mod warm;
mod wasi;
mod wasi_guest;
mod wire;

use grpo_host::plugin::{Call, Fault, Limits, Plugin, PluginError, PluginHost, RewardPlugin};
use grpo_host::types::{Finish, Parsed, Sample, Score, Telemetry};
use serde_json::json;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Deadline of hostile calls, and what each may take with a margin for a busy machine.
pub(crate) const DEADLINE_MS: u64 = 60;
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// One test at a time: what they measure, time and memory, belongs to the whole process.
pub(crate) fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(crate) fn host() -> PluginHost {
    PluginHost::new(Arc::new(|_| {})).unwrap()
}

pub(crate) fn limits() -> Limits {
    Limits {
        deadline_ms: DEADLINE_MS,
        ..Limits::default()
    }
}

pub(crate) fn load(
    host: &PluginHost,
    bytes: &[u8],
    limits: &Limits,
) -> Result<RewardPlugin, PluginError> {
    match host.load("evil", bytes, &json!({}), limits)? {
        Plugin::Reward(plugin) => Ok(plugin),
        other => panic!("{:?}", other.id()),
    }
}

pub(crate) static NOT_PARSED: Parsed = Parsed {
    reasoning: None,
    answer: None,
};

/// Samples with rows 100, 101, …
pub(crate) fn samples<'a>(completions: &[&'a str]) -> Vec<Sample<'a>> {
    let sample = |(i, completion): (usize, &&'a str)| Sample {
        row_id: 100 + i as u64,
        row_json: "{}",
        prompt: "p",
        completion,
        parsed: &NOT_PARSED,
        finish: Finish::Stop,
        telemetry: Telemetry::default(),
    };
    completions.iter().enumerate().map(sample).collect()
}

pub(crate) fn totals(scores: &[Score]) -> Vec<Option<f64>> {
    let total = |score: &Score| match score {
        Score::Value(scored) => Some(scored.total),
        Score::Skip(_) => None,
    };
    scores.iter().map(total).collect()
}

/// A good guest loads and scores on this host.
pub(crate) fn assert_serves(host: &PluginHost) {
    let good = load(host, &guest::scoring_after_ones(""), &Limits::default()).unwrap();
    let scoring = good.score(&samples(&["a", "b", "c"])).unwrap();
    assert_eq!(totals(&scoring.scores), [Some(1.0); 3]);
    assert_eq!(scoring.faults, []);
}

/// What a guest that loads does when it must score one sample.
pub(crate) fn fault_of_score(bytes: &[u8]) -> Fault {
    fault_of_score_within(bytes, &limits())
}

pub(crate) fn fault_of_score_within(bytes: &[u8], limits: &Limits) -> Fault {
    let host = host();
    let begun = Instant::now();
    let plugin = load(&host, bytes, limits).unwrap();
    let scoring = plugin.score(&samples(&["x"])).unwrap();
    assert!(
        matches!(scoring.scores.as_slice(), [Score::Skip(_)]),
        "{scoring:?}"
    );
    let [error] = scoring.faults.as_slice() else {
        panic!("{scoring:?}")
    };
    assert_eq!(
        (&*error.plugin, error.call, error.row),
        ("evil", Call::Score, Some(100))
    );
    assert_eq!(*error.digest, grpo_host::plugin::digest(bytes));
    assert!(error.hint().is_some(), "no hint: {error}");
    assert!(begun.elapsed() < PATIENCE);
    assert_serves(&host);
    error.fault.clone()
}

pub(crate) fn error_of_load(bytes: &[u8]) -> PluginError {
    let host = host();
    let begun = Instant::now();
    let Err(error) = load(&host, bytes, &limits()) else {
        panic!("it loaded")
    };
    assert!(error.hint().is_some(), "no hint: {error}");
    assert!(begun.elapsed() < PATIENCE);
    assert_serves(&host);
    error
}

/// A body that never ends.
pub(crate) const LOOP: &str = "(loop $again (br $again)) (unreachable)";
