//! Guests that mean harm, or are broken: each gets its own typed error, within bounded time, and the
//! host goes on serving good ones.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "clippy counts only functions marked as tests as tests"
)]

mod guest;
mod load;
mod policy;
mod replay;

use grpo_host::plugin::{
    Call, Fault, Limits, LogLine, Plugin, PluginError, PluginHost, RewardPlugin,
};
use grpo_host::types::{Finish, Parsed, Sample, Score, Telemetry};
use serde_json::json;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Deadline of hostile calls, and what each may take with a margin for a busy machine.
const DEADLINE_MS: u64 = 60;
const PATIENCE: Duration = Duration::from_secs(20);

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
fn fault_of_score(bytes: &[u8]) -> Fault {
    fault_of_score_within(bytes, &limits())
}

fn fault_of_score_within(bytes: &[u8], limits: &Limits) -> Fault {
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
    assert!(begun.elapsed() < PATIENCE);
    assert_serves(&host);
    error.fault.clone()
}

fn error_of_load(bytes: &[u8]) -> PluginError {
    let host = host();
    let begun = Instant::now();
    let Err(error) = load(&host, bytes, &limits()) else {
        panic!("it loaded")
    };
    assert!(begun.elapsed() < PATIENCE);
    assert_serves(&host);
    error
}

const LOOP: &str = "(loop $again (br $again)) (unreachable)";

#[test]
fn infinite_loop() {
    let limit_ms = DEADLINE_MS;
    assert_eq!(
        fault_of_score(&guest::scoring(LOOP)),
        Fault::Deadline { limit_ms }
    );
}

#[test]
fn infinite_loop_of_host_calls() {
    let body = "(loop $again (call $log (i32.const 0) (i32.const 0) (i32.const 9)) (br $again)) (unreachable)";
    let limit_ms = DEADLINE_MS;
    assert_eq!(
        fault_of_score(&guest::scoring(body)),
        Fault::Deadline { limit_ms }
    );
}

#[test]
fn fuel_runs_out() {
    let limits = Limits {
        fuel: Some(100_000),
        deadline_ms: 10_000,
        ..Limits::default()
    };
    let fault = fault_of_score_within(&guest::scoring(LOOP), &limits);
    assert_eq!(fault, Fault::Fuel { limit: 100_000 });
}

#[test]
fn memory_bomb() {
    let body = "(loop $again
        (if (i32.eq (memory.grow (i32.const 16)) (i32.const -1)) (then (unreachable)))
        (br $again)) (unreachable)";
    let limit = 256 << 20;
    let wanted = limit + (1 << 20);
    assert_eq!(
        fault_of_score(&guest::scoring(body)),
        Fault::Memory { wanted, limit }
    );
    let small = Limits {
        memory_mib: 5,
        ..limits()
    };
    let limit = 5 << 20;
    let wanted = limit + (1 << 20);
    let fault = fault_of_score_within(&guest::scoring(body), &small);
    assert_eq!(fault, Fault::Memory { wanted, limit });
}

#[test]
fn table_bomb() {
    let main = r#"(table $t 1 funcref)
        (func (export "score") (param i32 i32 i32 i32) (result i32)
          (loop $again
            (if (i32.eq (table.grow $t (ref.null func) (i32.const 1000)) (i32.const -1))
              (then (unreachable)))
            (br $again)) (unreachable))"#;
    let (wanted, limit) = (100_001, 100_000);
    assert_eq!(
        fault_of_score(&guest::component(main)),
        Fault::Table { wanted, limit }
    );
}

#[test]
fn deep_recursion() {
    let main = r#"(func $deep (param i32) (result i32)
          (i32.add (call $deep (i32.add (local.get 0) (i32.const 1))) (local.get 0)))
        (func (export "score") (param i32 i32 i32 i32) (result i32) (call $deep (i32.const 0)))"#;
    let fault = fault_of_score(&guest::component(main));
    assert!(
        matches!(&fault, Fault::Trap { reason } if reason.contains("stack exhausted")),
        "{fault}"
    );
}

#[test]
fn wrong_length() {
    // Scores as many samples as there are, plus a difference; 0 is minus one for one sample.
    for (change, found) in [(-1, 0), (1, 2)] {
        let body = format!("(call $ones (i32.add (local.get $n) (i32.const {change})))");
        let expected = 1;
        assert_eq!(
            fault_of_score(&guest::scoring(&body)),
            Fault::Length { expected, found }
        );
    }
    // In a batch whose samples fail alone as well, each is named.
    let host = host();
    let plugin = load(
        &host,
        &guest::scoring("(call $ones (i32.const 2))"),
        &limits(),
    )
    .unwrap();
    let scoring = plugin.score(&samples(&["a", "b", "c"])).unwrap();
    assert_eq!(totals(&scoring.scores), [None; 3]);
    let rows: Vec<_> = scoring.faults.iter().map(|fault| fault.row).collect();
    assert_eq!(rows, [Some(100), Some(101), Some(102)]);
}

#[test]
fn numbers_that_are_none() {
    for (text, check) in [
        ("nan", f64::is_nan as fn(f64) -> bool),
        ("inf", |v| v == f64::INFINITY),
        ("-inf", |v| v == f64::NEG_INFINITY),
        ("1e308", |v| v == 1e308),
    ] {
        let body = format!("(f64.store offset=8 (i32.const 4096) (f64.const {text}))");
        let fault = fault_of_score(&guest::scoring_after_ones(&body));
        let Fault::Number { what, value, .. } = fault else {
            panic!("{fault}")
        };
        assert!(what == "total" && check(value), "{text}: {what} {value}");
    }
    // One part `x`, at 2048, with NaN as its value.
    let body = "(i32.store8 (i32.const 2040) (i32.const 120))
        (i32.store offset=0 (i32.const 2048) (i32.const 2040))
        (i32.store offset=4 (i32.const 2048) (i32.const 1))
        (f64.store offset=8 (i32.const 2048) (f64.const nan))
        (i32.store offset=16 (i32.const 4096) (i32.const 2048))
        (i32.store offset=20 (i32.const 4096) (i32.const 1))";
    let fault = fault_of_score(&guest::scoring_after_ones(body));
    assert!(
        matches!(&fault, Fault::Number { what, .. } if what == "part `x`"),
        "{fault}"
    );
}

fn assert_breaks_the_abi(body: &str, word: &str) {
    let fault = fault_of_score(&guest::scoring_after_ones(body));
    assert!(
        matches!(&fault, Fault::Abi { reason } if reason.contains(word)),
        "{fault}"
    );
}

#[test]
fn text_that_is_not_utf8() {
    let skip = "(i32.store8 (i32.const 4096) (i32.const 1))
        (i32.store8 (i32.const 2048) (i32.const 0xff))
        (i32.store offset=8 (i32.const 4096) (i32.const 2048))
        (i32.store offset=12 (i32.const 4096) (i32.const 1))";
    assert_breaks_the_abi(skip, "utf-8");
}

#[test]
fn lists_outside_memory() {
    assert_breaks_the_abi(
        "(i32.store offset=4 (i32.const 0) (i32.const 0xfffffff0))",
        "list",
    );
    assert_breaks_the_abi(
        "(i32.store offset=8 (i32.const 0) (i32.const 0x7fffffff))",
        "list",
    );
    assert_breaks_the_abi(
        "(i32.store offset=4 (i32.const 0) (i32.const 4097))",
        "align",
    );
}

#[test]
fn a_case_that_does_not_exist() {
    assert_breaks_the_abi(
        "(i32.store8 (i32.const 4096) (i32.const 7))",
        "discriminant",
    );
}

/// 40 000 skips whose reasons are all the same 3 MiB of memory: 120 GB for the host to copy.
#[test]
fn amplified_result() {
    let body = "(loop $next
          (local.set $at (i32.add (i32.const 65536) (i32.mul (local.get $i) (i32.const 24))))
          (i32.store8 (local.get $at) (i32.const 1))
          (i32.store offset=8 (local.get $at) (i32.const 1100000))
          (i32.store offset=12 (local.get $at) (i32.const 3000000))
          (local.set $i (i32.add (local.get $i) (i32.const 1)))
          (br_if $next (i32.lt_u (local.get $i) (i32.const 40000))))
        (i32.store8 (i32.const 0) (i32.const 0))
        (i32.store offset=4 (i32.const 0) (i32.const 65536))
        (i32.store offset=8 (i32.const 0) (i32.const 40000))
        (i32.const 0)";
    let fault = fault_of_score(&guest::scoring(body));
    assert!(
        matches!(&fault, Fault::Abi { reason } if reason.contains("fuel")),
        "{fault}"
    );
}

#[test]
fn log_flood() {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let sink = {
        let seen = Arc::clone(&seen);
        move |line: LogLine<'_>| {
            let attributed = (
                line.plugin.to_owned(),
                line.digest.len(),
                line.text.to_owned(),
            );
            seen.lock().unwrap().push(attributed);
        }
    };
    let host = PluginHost::new(Arc::new(sink)).unwrap();
    // 1000 lines of a clear-screen sequence and a forged line, then one of 3 MB.
    let body = r#"(i64.store (i32.const 2048) (i64.const 0x21696b4a325b1b0a))
        (loop $again
          (call $log (i32.const 2) (i32.const 2048) (i32.const 5))
          (local.set $i (i32.add (local.get $i) (i32.const 1)))
          (br_if $again (i32.lt_u (local.get $i) (i32.const 1000))))"#;
    let limits = Limits::default();
    let plugin = load(&host, &guest::scoring_after_ones(body), &limits).unwrap();
    let scoring = plugin.score(&samples(&["a"])).unwrap();
    assert_eq!(totals(&scoring.scores), [Some(1.0)]);
    let lines = seen.lock().unwrap().split_off(0);
    assert_eq!(lines.len(), 201);
    assert_eq!(
        lines[0],
        ("evil".to_owned(), 71, "\\n\\u{1b}[2J".to_owned())
    );
    assert_eq!(lines[200].2, "800 more lines were dropped");
    let long = "(call $log (i32.const 0) (i32.const 1100000) (i32.const 3000000))
        (call $log (i32.const 3) (i32.const 2040) (i32.const 0))";
    let plugin = load(&host, &guest::scoring_after_ones(long), &limits).unwrap();
    plugin.score(&samples(&["a"])).unwrap();
    let lines = seen.lock().unwrap().split_off(0);
    let sizes: Vec<usize> = lines.iter().map(|line| line.2.len()).collect();
    assert!(
        sizes[0] <= 2048 + '…'.len_utf8() && sizes[0] > 2000,
        "{sizes:?}"
    );
    assert_eq!(sizes[1..], [0]);
}

#[test]
fn errors_of_the_guest_are_escaped() {
    let main = r#"(data (i32.const 1024) "no\1b[2J")
        (func (export "score") (param i32 i32 i32 i32) (result i32)
          (i32.store8 (i32.const 0) (i32.const 1))
          (i32.store8 offset=4 (i32.const 0) (i32.const 2))
          (i32.store offset=8 (i32.const 0) (i32.const 1024))
          (i32.store offset=12 (i32.const 0) (i32.const 6))
          (i32.const 0))"#;
    let kind = grpo_host::plugin::GuestErrorKind::Internal;
    let message = "no\\u{1b}[2J".to_owned();
    assert_eq!(
        fault_of_score(&guest::component(main)),
        Fault::Guest { kind, message }
    );
}
