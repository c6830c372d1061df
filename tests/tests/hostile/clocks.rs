//! Guests that do not come back: deadline, fuel, stack, and what becomes of the instance.

use super::guest::{self, ONES, Parts};
use super::{
    DEADLINE_MS, LOOP, assert_serves, error_of_load, fault_of_score, fault_of_score_within, host,
    limits, load, samples, totals, turn,
};
use grpo_host::plugin::{Call, Fault, Limits, OnFailure, PluginHost};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

pub(super) const DEADLINE: Fault = Fault::Deadline {
    limit_ms: DEADLINE_MS,
};

#[test]
fn hostile_01_infinite_loop() {
    let _turn = turn();
    assert_eq!(fault_of_score(&guest::scoring(LOOP)), DEADLINE);
    // One that lives in host calls hardly meets an epoch check of its own.
    let body = "(loop $again (call $log (i32.const 0) (i32.const 0) (i32.const 9)) (br $again)) (unreachable)";
    assert_eq!(fault_of_score(&guest::scoring(body)), DEADLINE);
    let limits = Limits {
        fuel: Some(100_000),
        deadline_ms: 10_000,
        ..Limits::default()
    };
    let fault = fault_of_score_within(&guest::scoring(LOOP), &limits);
    assert_eq!(fault, Fault::Fuel { limit: 100_000 });
}

/// The goal: killed within the deadline plus 20 ms. The median, since the machine may be busy.
#[test]
fn hostile_01_is_killed_in_time() {
    let _turn = turn();
    let host = host();
    // Not `skip`, whose breaker would answer for the guest after three.
    let strict = Limits {
        on_failure: OnFailure::Abort,
        ..limits()
    };
    let plugin = load(&host, &guest::scoring(LOOP), &strict).unwrap();
    let one = |_| {
        let begun = Instant::now();
        let error = plugin.score(&samples(&["x"])).unwrap_err();
        assert_eq!(error.fault, DEADLINE);
        begun.elapsed()
    };
    let mut times: Vec<_> = (0..11).map(one).collect();
    times.sort_unstable();
    let deadline = Duration::from_millis(DEADLINE_MS);
    assert!(times[0] >= deadline, "{times:?}");
    assert!(times[5] < deadline + Duration::from_millis(20), "{times:?}");
}

#[test]
fn hostile_02_loop_in_start() {
    let _turn = turn();
    let main = format!("(func $spin {LOOP}) (start $spin) {}", guest::score(ONES));
    let error = error_of_load(&guest::component(&main));
    assert_eq!((error.call, error.fault), (Call::Instantiate, DEADLINE));
}

#[test]
fn hostile_03_loop_in_allocator_post_return_and_destructor() {
    let _turn = turn();
    let allocator = format!(
        r#"(func (export "realloc") (param i32 i32 i32 i32) (result i32) {LOOP}) {}"#,
        guest::score(ONES)
    );
    let allocator = Parts {
        main: &allocator,
        own_allocator: true,
        ..Parts::default()
    };
    assert_eq!(fault_of_score(&allocator.build()), DEADLINE);
    let post = format!(
        r#"(func (export "post") (param i32) {LOOP}) {}"#,
        guest::score(ONES)
    );
    let post = Parts {
        main: &post,
        options: r#"(post-return (core func $main "post"))"#,
        ..Parts::default()
    };
    assert_eq!(fault_of_score(&post.build()), DEADLINE);
    let dropping = guest::score(&format!("(call $drop (call $new (i32.const 1))) {ONES}"));
    let destructor = Parts {
        around: r#"(core module $d (func (export "end") (param i32) (loop $again (br $again))))
          (core instance $d (instantiate $d))
          (type $r (resource (rep i32) (dtor (core func $d "end"))))
          (core func $new (canon resource.new $r))
          (core func $drop (canon resource.drop $r))"#,
        inner: r#"(import "r" "new" (func $new (param i32) (result i32)))
          (import "r" "drop" (func $drop (param i32)))"#,
        with: r#"(with "r" (instance (export "new" (func $new)) (export "drop" (func $drop))))"#,
        main: &dropping,
        ..Parts::default()
    };
    assert_eq!(fault_of_score(&destructor.build()), DEADLINE);
}

#[test]
fn hostile_04_deep_recursion() {
    let _turn = turn();
    // Straight, and through a table with many locals in each frame.
    let straight = r#"(func $deep (param i32) (result i32)
        (i32.add (call $deep (i32.add (local.get 0) (i32.const 1))) (local.get 0)))"#
        .to_owned();
    let locals = "(local i64)".repeat(500);
    let through_a_table = format!(
        r#"(table funcref (elem $deep)) (type $t (func (param i32) (result i32)))
        (func $deep (param i32) (result i32) {locals}
          (i32.add (call_indirect (type $t) (local.get 0) (i32.const 0)) (local.get 0)))"#
    );
    for deep in [straight, through_a_table] {
        let main = deep + &guest::score("(call $deep (i32.const 0))");
        let fault = fault_of_score(&guest::component(&main));
        assert!(
            matches!(&fault, Fault::Trap { reason } if reason.contains("stack exhausted")),
            "{fault}"
        );
    }
}

/// A store is of no use after a failed call; asking it again is an error and no panic.
#[test]
fn hostile_39_a_failed_instance_used_again() {
    let _turn = turn();
    let host = host();
    let plugin = load(&host, &super::policy::picky(), &limits()).unwrap();
    for (completion, word) in [("trp", "unreachable"), ("spin", "deadline")] {
        let mut warm = plugin.warm().unwrap();
        assert_eq!(totals(&warm.score(&samples(&["a"])).unwrap()), [Some(1.0)]);
        let error = warm.score(&samples(&[completion])).unwrap_err();
        assert!(error.to_string().contains(word), "{error}");
        let again = warm.score(&samples(&["a"])).unwrap_err();
        assert!(
            matches!(&again.fault, Fault::Trap { reason } if reason.contains("cannot enter")),
            "{again}"
        );
    }
    assert_serves(&host);
}

/// A host that is slow to take a line is not the guest's fault; a guest that is slow besides still is.
#[test]
fn hostile_40_time_in_the_host_is_not_the_guests() {
    let _turn = turn();
    let lines = Arc::new(AtomicU32::new(0));
    let seen = Arc::clone(&lines);
    let host = PluginHost::new(Arc::new(move |_| {
        seen.fetch_add(1, Ordering::Relaxed);
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_millis(10) {
            std::thread::yield_now();
        }
    }))
    .unwrap();
    let log = "(call $log (i32.const 1) (i32.const 0) (i32.const 1))";
    let patient = guest::scoring_after_ones(&log.repeat(30));
    let plugin = load(&host, &patient, &limits()).unwrap();
    let begun = Instant::now();
    let scoring = plugin.score(&samples(&["a"])).unwrap();
    assert_eq!(
        (totals(&scoring.scores), scoring.faults),
        (vec![Some(1.0)], vec![])
    );
    assert!(begun.elapsed() >= Duration::from_millis(300));
    assert_eq!(lines.swap(0, Ordering::Relaxed), 30);
    let slow = guest::scoring(&format!("{log} {LOOP}"));
    let plugin = load(&host, &slow, &limits()).unwrap();
    let scoring = plugin.score(&samples(&["a"])).unwrap();
    assert_eq!(scoring.faults[0].fault, DEADLINE);
    // The wall clock counts all of it.
    let limits = Limits {
        wall_ms: 100,
        ..limits()
    };
    let plugin = load(&host, &patient, &limits).unwrap();
    let scoring = plugin.score(&samples(&["a"])).unwrap();
    assert_eq!(scoring.faults[0].fault, Fault::Wall { limit_ms: 100 });
    assert_serves(&host);
}
