//! Warm pools: what stays in an instance, for how long, and what becomes of one that failed.

use super::guest;
use super::policy::counting;
use super::{DEADLINE_MS, LOOP, assert_serves, host, limits, samples, totals, turn};
use grpo_host::cases;
use grpo_host::plugin::{
    Fault, Isolation, Limits, Plugin, PluginError, PluginHost, RewardPlugin, Warm,
};
use serde_json::json;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

fn warm_within(
    host: &PluginHost,
    bytes: &[u8],
    warm: Warm,
    limits: &Limits,
) -> Result<RewardPlugin, PluginError> {
    let prepared = host.prepare("evil", bytes, limits)?;
    match prepared.configure(&json!({}), Some(warm))? {
        Plugin::Reward(plugin) => Ok(plugin),
        other => panic!("{:?}", other.id()),
    }
}

fn warm(host: &PluginHost, bytes: &[u8], size: u32, max_calls: u32) -> RewardPlugin {
    warm_within(host, bytes, Warm { size, max_calls }, &limits()).unwrap()
}

fn score(plugin: &RewardPlugin) -> Option<f64> {
    let scoring = plugin.score(&samples(&["a"])).unwrap();
    totals(&scoring.scores)[0]
}

/// The guest counts its calls in a global.
#[test]
fn an_instance_serves_as_often_as_it_may_and_is_then_replaced() {
    let _turn = turn();
    let host = host();
    let plugin = warm(&host, &counting(), 1, 3);
    let seen: Vec<_> = (0..7).map(|_| score(&plugin).unwrap()).collect();
    assert_eq!(seen, [1.0, 2.0, 3.0, 1.0, 2.0, 3.0, 1.0]);
    let once = warm(&host, &counting(), 1, 1);
    assert_eq!([score(&once), score(&once)], [Some(1.0); 2]);
}

/// Every third call traps, or returns what is refused: the instance goes, and the sample is tried in a fresh one.
#[test]
fn an_instance_that_failed_serves_nobody() {
    let _turn = turn();
    let global = "(global $calls (mut i32) (i32.const 0))";
    let third = |body: &str| {
        let text = format!(
            "(global.set $calls (i32.add (global.get $calls) (i32.const 1)))
             (drop (call $ones (local.get $n)))
             (f64.store (i32.const 4104) (f64.convert_i32_u (global.get $calls)))
             (if (i32.eq (global.get $calls) (i32.const 3)) (then {body})) (i32.const 0)"
        );
        guest::component(&format!("{global} {}", guest::score(&text)))
    };
    for body in [
        "(unreachable)",
        "(f64.store (i32.const 4104) (f64.const nan))",
    ] {
        let host = host();
        let plugin = warm(&host, &third(body), 1, 100);
        // Of a batch of one the failure stands: there is nobody else to blame.
        let seen: Vec<_> = (0..5).map(|_| score(&plugin)).collect();
        assert_eq!(
            seen,
            [Some(1.0), Some(2.0), None, Some(1.0), Some(2.0)],
            "{body}"
        );
        assert_serves(&host);
    }
}

#[test]
fn a_deadline_holds_in_a_pool_too_and_the_wall_clock_begins_anew() {
    let _turn = turn();
    let host = host();
    let plugin = warm(&host, &guest::scoring(LOOP), 1, 100);
    let scoring = plugin.score(&samples(&["a"])).unwrap();
    let limit_ms = DEADLINE_MS;
    assert_eq!(scoring.faults[0].fault, Fault::Deadline { limit_ms });
    let short = Limits {
        wall_ms: 200,
        ..limits()
    };
    let most = Warm {
        size: 1,
        max_calls: 1000,
    };
    let plugin = warm_within(&host, &counting(), most, &short).unwrap();
    let (begun, mut calls) = (Instant::now(), 0_u32);
    while begun.elapsed() < Duration::from_millis(500) {
        assert_eq!(score(&plugin), Some(f64::from(calls % 1000 + 1)));
        calls += 1;
    }
}

/// Callers beyond the pool get instances of their own, and nobody waits for idle ones.
#[test]
fn many_callers_share_a_small_pool() {
    let _turn = turn();
    let host = host();
    let plugin = warm(&host, &counting(), 2, 50);
    let idle: Vec<_> = (0..6).map(|_| warm(&host, &counting(), 1, 50)).collect();
    let (fresh, wrong) = (AtomicU32::new(0), AtomicU32::new(0));
    std::thread::scope(|scope| {
        for _ in 0..24 {
            scope.spawn(|| {
                for _ in 0..100 {
                    match score(&plugin) {
                        Some(1.0) => fresh.fetch_add(1, Ordering::Relaxed),
                        Some(calls) if calls <= 50.0 => 0,
                        _ => wrong.fetch_add(1, Ordering::Relaxed),
                    };
                }
            });
        }
    });
    assert_eq!(wrong.into_inner(), 0);
    // 2400 calls fill an instance of 50 calls at least 48 times, if no caller were ever alone.
    assert!(fresh.into_inner() >= 48);
    assert_eq!(idle.iter().map(score).collect::<Vec<_>>(), [Some(1.0); 6]);
    assert_serves(&host);
}

#[test]
fn pools_are_small_and_for_roles_that_are_called_often() {
    let _turn = turn();
    let host = host();
    let counting = counting();
    let refusal = |size, max_calls, limits: &Limits| {
        let error = warm_within(&host, &counting, Warm { size, max_calls }, limits);
        let error = error.err().unwrap();
        assert!(
            error.hint().is_some() && error.is_of_the_config(),
            "{error}"
        );
        error.fault
    };
    for (size, max_calls, key, value, max) in [
        (0, 1, "size", 0, 8),
        (9, 1, "size", 9, 8),
        (1, 0, "max_calls", 0, 1_000_000),
        (1, 1_000_001, "max_calls", 1_000_001, 1_000_000),
    ] {
        let expected = Fault::WarmRange { key, value, max };
        assert_eq!(refusal(size, max_calls, &limits()), expected);
    }
    let by_sample = Limits {
        isolation: Isolation::Sample,
        ..limits()
    };
    assert!(matches!(refusal(1, 1, &by_sample), Fault::NotWarm { .. }));
    let first = warm(&host, &counting, 5, 1);
    let (wanted, limit) = (9, 8);
    assert_eq!(refusal(4, 1, &limits()), Fault::WarmSlots { wanted, limit });
    let second = warm(&host, &counting, 3, 1);
    drop(first);
    let third = warm(&host, &counting, 5, 1);
    assert_eq!([score(&second), score(&third)], [Some(1.0); 2]);
    drop((second, third));
    let bytes = grpo_host::defaults::component("curriculum-uniform").unwrap();
    let prepared = host.prepare("c", bytes, &limits()).unwrap();
    let error = prepared.configure(&json!({}), Some(Warm::default())).err();
    assert!(matches!(error.unwrap().fault, Fault::NotWarm { .. }));
}

/// The formatter that we ship gives the same from warm instances.
#[test]
fn formatters_can_be_warm() {
    let _turn = turn();
    let host = host();
    let bytes = grpo_host::defaults::component("formatter-chat").unwrap();
    let prepared = host.prepare("f", bytes, &limits()).unwrap();
    let of = |warm| match prepared.configure(&json!({}), warm).unwrap() {
        Plugin::Formatter(plugin) => plugin,
        other => panic!("{:?}", other.id()),
    };
    let (fresh, kept) = (
        of(None),
        of(Some(Warm {
            size: 1,
            max_calls: 2,
        })),
    );
    let row = grpo_host::plugin::RowText {
        id: 1,
        json: r#"{"question": "2+2?"}"#,
    };
    let bad = grpo_host::plugin::RowText { json: "{}", ..row };
    for _ in 0..5 {
        assert_eq!(kept.format(&[row]).unwrap(), fresh.format(&[row]).unwrap());
        let completions = ["<think>a</think> 4", "5"];
        assert_eq!(
            kept.parse(&completions).unwrap(),
            fresh.parse(&completions).unwrap()
        );
        assert_eq!(kept.format(&[bad]).unwrap_err().row, Some(1));
    }
}

/// `plugin test` scores in one call what it scored alone: a reward that counts is found out.
#[test]
fn a_verdict_that_depends_on_the_others_is_found_out() {
    let _turn = turn();
    let host = host();
    let strict = cases::strict(&limits());
    let prepared = host.prepare("evil", &counting(), &strict).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("cases.jsonl");
    let line = r#"{"completion": "a", "expect": {"total": 1}}"#;
    std::fs::write(&path, format!("{line}\n{line}\n{line}\n")).unwrap();
    let outcomes = cases::run(&prepared, &cases::read(&path).unwrap()).unwrap();
    let found: Vec<_> = outcomes.iter().map(|o| o.differences.join("; ")).collect();
    let together = "in one call with 2 others: total: expected 1.0, got";
    assert_eq!(
        found,
        [
            String::new(),
            format!("{together} 2.0 (off by 1e0)"),
            format!("{together} 3.0 (off by 2e0)")
        ]
    );
}
