//! The shipped `reward-code` on the host: programs of a batch, each of which costs itself only.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "clippy counts only functions marked as tests as tests"
)]

use grpo_host::defaults;
use grpo_host::plugin::{Isolation, Limits, Plugin, PluginHost, RewardPlugin};
use grpo_host::types::{Finish, Parsed, Sample, Score, Telemetry};
use serde_json::{Value, json};
use std::sync::Arc;

/// A program, its tests, and what is expected: total, `passed`, `runs` and `limited`, or a part of the reason to skip.
type Case = (&'static str, Value, Result<[f64; 4], &'static str>);

fn cases() -> Vec<Case> {
    let square = json!(["assert f(2) == 4", "assert f(3) == 9"]);
    let endless = json!([
        "assert f(0) == 0",
        "assert f(1) == 1",
        "assert f(0) == 0",
        "assert f(0) == 0"
    ]);
    let ran_out = Ok([0.0, 0.0, 0.0, 1.0]);
    let mut all = vec![
        (
            "def f(x):\n    return x ** 2",
            square.clone(),
            Ok([1.0, 2.0, 1.0, 0.0]),
        ),
        (
            "def f(x):\n    return x + 2",
            square.clone(),
            Ok([0.5, 1.0, 1.0, 0.0]),
        ),
        ("def f(x:", square.clone(), Ok([0.0; 4])),
        (
            "def f(x):\n    while x:\n        pass\n    return x",
            endless,
            Ok([0.25, 1.0, 1.0, 1.0]),
        ),
        ("while True:\n    pass", square.clone(), ran_out),
        (
            "def f(x):\n    return f(x)",
            square.clone(),
            Ok([0.0, 0.0, 1.0, 0.0]),
        ),
    ];
    all.extend(hogs(&square));
    all.extend([
        // After those there is room for a sound one.
        (
            "x = list(range(100000))",
            json!(["assert len(x) == 100000"]),
            Ok([1.0, 1.0, 1.0, 0.0]),
        ),
        // Order of a set, names of objects, and the time: nothing that differs from run to run.
        (
            "class A:\n    pass\nx = list({'b', 'a', 'c', A, 7})[0]",
            json!(["assert x == 'b'"]),
            Ok([1.0, 1.0, 1.0, 0.0]),
        ),
        (
            "import datetime\nx = datetime.datetime.now()",
            square.clone(),
            Ok([0.0; 4]),
        ),
        ("def f(x):\n    yield x", square.clone(), Err("yield")),
        ("import random", square, Err("random")),
        (
            "def add(a, b):\n    return a + b",
            json!([{"input": [1, 2], "expected": 3}, {"input": {"a": "x", "b": "y"}, "expected": "xy"}]),
            Ok([1.0, 2.0, 1.0, 0.0]),
        ),
        ("x = 1", json!([]), Err("holds no test")),
    ]);
    all
}

/// Programs that want more memory or stack than there is.
fn hogs(square: &Value) -> Vec<Case> {
    let ran_out = Ok([0.0, 0.0, 0.0, 1.0]);
    vec![
        // Memory bit by bit, at once, doubled, as a number and inside of a built-in function.
        (
            "x = []\nwhile True:\n    x.append('a' * 1000)",
            square.clone(),
            ran_out,
        ),
        ("x = 'a' * 10 ** 9", square.clone(), ran_out),
        ("x = 'a'\nwhile True:\n    x += x", square.clone(), ran_out),
        ("x = 10 ** 10 ** 9", square.clone(), ran_out),
        ("x = sorted(range(10 ** 8))", square.clone(), ran_out),
        // Built-in functions that take memory and look afterwards.
        (
            "x = 'a' * 50_000_000\ny = x.upper()\nz = x.lower()",
            square.clone(),
            ran_out,
        ),
        (
            "x = {i: i for i in range(50_000)}\ny = []\nwhile True:\n    y.append({**x, **x})",
            square.clone(),
            ran_out,
        ),
        // Trees that would take more stack than there is.
        (
            format!("x = {}", ["1"].repeat(50_000).join("+")).leak(),
            square.clone(),
            Ok([0.0; 4]),
        ),
        (
            format!("x = 'a'{}", ".strip()".repeat(50_000)).leak(),
            square.clone(),
            Ok([0.0; 4]),
        ),
    ]
}

fn load(config: Value, isolation: Isolation) -> RewardPlugin {
    let host = PluginHost::new(Arc::new(|line| panic!("it logs: {line:?}"))).unwrap();
    let bytes = defaults::shipped("reward-code").unwrap().unwrap();
    let limits = Limits {
        deadline_ms: 60_000,
        wall_ms: 600_000,
        isolation,
        ..Limits::default()
    };
    match host.load("reward-code", &bytes, &config, &limits).unwrap() {
        Plugin::Reward(plugin) => plugin,
        other => panic!("{:?}", other.id()),
    }
}

fn scores(plugin: &RewardPlugin, texts: &[(String, String)]) -> Vec<Score> {
    let parsed = Parsed::default();
    let samples: Vec<_> = (0..)
        .zip(texts)
        .map(|(row_id, (row_json, completion))| Sample {
            row_id,
            row_json,
            prompt: "",
            completion,
            parsed: &parsed,
            finish: Finish::Stop,
            telemetry: Telemetry::default(),
        })
        .collect();
    let scoring = plugin.score(&samples).unwrap();
    assert_eq!(scoring.faults, []);
    scoring.scores
}

fn texts() -> Vec<(String, String)> {
    let fenced = |(code, tests, _): Case| {
        (
            json!({"tests": tests}).to_string(),
            format!("So:\n```python\n{code}\n```\n"),
        )
    };
    cases().into_iter().map(fenced).collect()
}

#[test]
fn every_program_costs_itself_only() {
    let scores = scores(&load(json!({}), Isolation::Batch), &texts());
    for ((code, tests, expected), score) in cases().into_iter().zip(scores) {
        match (expected, score) {
            (Err(reason), Score::Skip(found)) => assert!(found.contains(reason), "{code}: {found}"),
            (Ok([total, passed, runs, limited]), Score::Value(scored)) => {
                let count = tests.as_array().unwrap().len() as f64;
                let parts = [
                    ("passed", passed),
                    ("tests", count),
                    ("runs", runs),
                    ("limited", limited),
                ];
                let parts = parts.map(|(name, value)| (name.to_owned(), value));
                assert_eq!(
                    (scored.total, &scored.parts[..]),
                    (total, &parts[..]),
                    "{code}"
                );
            }
            (expected, found) => panic!("{code}: {expected:?}, not {found:?}"),
        }
    }
}

/// What a program leaves in the instance changes nothing for those after it.
#[test]
fn alone_and_in_a_batch_are_the_same() {
    let batch = scores(&load(json!({}), Isolation::Batch), &texts());
    assert_eq!(scores(&load(json!({}), Isolation::Sample), &texts()), batch);
}

#[test]
fn columns_and_rewards_as_configured() {
    let config = json!({"tests": "test", "setup": "prompt", "all": true, "missing": -1, "unsupported": -0.5});
    let row = json!({
        "prompt": "from typing import List\n\n\ndef top(xs: List[int]) -> int:\n    \"\"\"The largest.\"\"\"\n",
        "test": "def check(candidate):\n    assert candidate([1, 3, 2]) == 3\n",
        "entry_point": "top",
    });
    let fenced = |code: &str| (row.to_string(), format!("```\n{code}\n```"));
    let given = [
        fenced("def top(xs: List[int]) -> int:\n    return max(xs)"),
        fenced("def top(xs):\n    return xs[0]"),
        fenced("def top(xs):\n    yield max(xs)"),
        (row.to_string(), "max(xs)".to_owned()),
    ];
    let totals = scores(&load(config, Isolation::Batch), &given)
        .into_iter()
        .map(|score| match score {
            Score::Value(scored) => scored.total,
            Score::Skip(reason) => panic!("{reason}"),
        });
    assert_eq!(totals.collect::<Vec<_>>(), [1.0, 0.0, -0.5, -1.0]);
}
