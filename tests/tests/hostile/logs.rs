//! Guests that write too much, or what a terminal would obey.

use super::{assert_serves, fault_of_score, guest, limits, load, samples, totals, turn};
use grpo_host::plugin::{Fault, GuestErrorKind, Limits, LogLine, PluginHost};
use std::sync::{Arc, Mutex};

#[test]
fn hostile_18_log_flood() {
    let _turn = turn();
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

/// A million lines cost no more than their time, and a line of 100 MB is not even copied.
#[test]
fn hostile_18_a_million_lines_and_one_of_100_mb() {
    let _turn = turn();
    let count = Arc::new(Mutex::new(0));
    let seen = Arc::clone(&count);
    let host = PluginHost::new(Arc::new(move |_| *seen.lock().unwrap() += 1)).unwrap();
    let body = "(loop $again (call $log (i32.const 1) (i32.const 0) (i32.const 60))
        (local.set $i (i32.add (local.get $i) (i32.const 1)))
        (br_if $again (i32.lt_u (local.get $i) (i32.const 1000000))))";
    let patient = Limits {
        deadline_ms: 10_000,
        ..limits()
    };
    let plugin = load(&host, &guest::scoring_after_ones(body), &patient).unwrap();
    let scoring = plugin.score(&samples(&["a"])).unwrap();
    assert_eq!(totals(&scoring.scores), [Some(1.0)]);
    assert_eq!(*count.lock().unwrap(), 201);
    assert_serves(&host);
    let long = "(drop (memory.grow (i32.const 1600)))
        (call $log (i32.const 1) (i32.const 65536) (i32.const 100000000))";
    let fault = fault_of_score(&guest::scoring_after_ones(long));
    assert!(
        matches!(&fault, Fault::Abi { reason } if reason.contains("fuel")),
        "{fault}"
    );
}

/// 200 lines a call are no limit for a plugin that is called again and again.
#[test]
fn hostile_18_a_flood_over_many_calls() {
    let _turn = turn();
    let lines = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&lines);
    let host = PluginHost::new(Arc::new(move |line: LogLine<'_>| {
        seen.lock().unwrap().push(line.text.to_owned());
    }))
    .unwrap();
    let body = "(call $log (i32.const 1) (i32.const 0) (i32.const 0))".repeat(150);
    let plugin = load(&host, &guest::scoring_after_ones(&body), &limits()).unwrap();
    let begun = std::time::Instant::now();
    for _ in 0..100 {
        plugin.score(&samples(&["a"])).unwrap();
    }
    // 15 000 lines: 2000 at once, 20 for each second that passed, and a word on the others.
    let most = 2001 + 21 * (begun.elapsed().as_secs() as usize + 1);
    let lines = lines.lock().unwrap();
    assert!((2001..=most).contains(&lines.len()), "{}", lines.len());
    assert_eq!(lines[2000], "lines are dropped: more than 20 a second");
    drop(lines);
    assert_serves(&host);
}

#[test]
fn hostile_18_errors_of_the_guest_are_escaped() {
    let _turn = turn();
    let main = r#"(data (i32.const 1024) "no\1b[2J")
        (func (export "score") (param i32 i32 i32 i32) (result i32)
          (i32.store8 (i32.const 0) (i32.const 1))
          (i32.store8 offset=4 (i32.const 0) (i32.const 2))
          (i32.store offset=8 (i32.const 0) (i32.const 1024))
          (i32.store offset=12 (i32.const 0) (i32.const 6))
          (i32.const 0))"#;
    let kind = GuestErrorKind::Internal;
    let message = "no\\u{1b}[2J".to_owned();
    assert_eq!(
        fault_of_score(&guest::component(main)),
        Fault::Guest { kind, message }
    );
}
