//! Guests that were granted WASI and try what it is good for elsewhere: time, chance, waiting, files, sockets, output.

use super::granted::{listening, load_with, manifested};
use super::guest::{Parts, score};
use super::wasi_guest::importing;
use super::{assert_serves, error_of_load, guest, host, limits, samples, totals, turn};
use grpo_host::plugin::{Access, Call, Fault, Grants, Limits, Mismatch, PluginHost};
use serde_json::json;
use std::time::Instant;

/// Leaves an f64 as the first sample's total.
fn total(value: &str) -> String {
    format!("(f64.store offset=8 (i32.const 4096) {value})")
}

/// The same of an i64, but for its billions: totals are at most a billion.
fn modulo(value: &str) -> String {
    total(&format!(
        "(f64.convert_i64_u (i64.rem_u {value} (i64.const 1000000000)))"
    ))
}

fn granted() -> Access {
    Access {
        grants: Grants {
            wasi: true,
            ..Grants::default()
        },
        ..Access::default()
    }
}

/// The totals of two requests, each to a fresh instance.
fn twice(host: &PluginHost, bytes: &[u8]) -> [f64; 2] {
    let plugin = load_with(host, bytes, &limits(), granted()).unwrap();
    [(); 2].map(|()| {
        let scoring = plugin.score(&samples(&["a"])).unwrap();
        assert_eq!(scoring.faults, []);
        totals(&scoring.scores)[0].unwrap()
    })
}

fn total_of(more: &str, body: &str) -> f64 {
    let host = host();
    let [first, second] = twice(&host, &importing(more, body));
    assert_eq!(first.to_bits(), second.to_bits());
    assert_serves(&host);
    first
}

/// How a guest ends that is granted WASI, and that it ends in time.
fn fault(body: &str) -> Fault {
    let host = host();
    let begun = Instant::now();
    let plugin = load_with(&host, &importing("", body), &limits(), granted()).unwrap();
    let loaded = begun.elapsed();
    let scoring = plugin.score(&samples(&["a"])).unwrap();
    assert!(begun.elapsed() - loaded < super::PATIENCE);
    let [error] = scoring.faults.as_slice() else {
        panic!("{scoring:?}")
    };
    assert_eq!((error.call, error.row), (Call::Score, Some(100)));
    assert!(error.hint().is_some(), "{error}");
    assert_serves(&host);
    error.fault.clone()
}

/// A loop that waits for 5 ms ends after as many looks in every run, and both clocks go on from there.
#[test]
fn hostile_32_clocks_show_the_same_in_every_run() {
    let _turn = turn();
    let wait = r"(global.set $from (call $now))
        (loop $again
          (global.set $looks (i32.add (global.get $looks) (i32.const 1)))
          (br_if $again (i64.lt_u (i64.sub (call $now) (global.get $from)) (i64.const 5000000))))
        (call $date (i32.const 2000))";
    let globals = "(global $from (mut i64) (i64.const 0)) (global $looks (mut i32) (i32.const 0))";
    let looks = total_of(
        globals,
        &format!(
            "{wait} {}",
            total("(f64.convert_i32_u (global.get $looks))")
        ),
    );
    assert_eq!(looks, 5000.0);
    let now = modulo("(call $now)");
    assert_eq!(total_of(globals, &format!("{wait} {now}")), 5_003_000.0);
    let seconds = modulo("(i64.load (i32.const 2000))");
    let date = total_of(globals, &format!("{wait} {seconds}"));
    assert_eq!(date, 735_689_601.0, "2025-01-01, one second after midnight");
    let nanos = "(f64.convert_i32_u (i32.load offset=8 (i32.const 2000)))";
    assert_eq!(
        total_of(globals, &format!("{wait} {}", total(nanos))),
        5_002_000.0
    );
}

/// A sleep of an hour is over at once, by either call, and one that never ends as well; the clock knows of it.
#[test]
fn hostile_32_sleeping_takes_no_time() {
    let _turn = turn();
    let hour = "(call $timer (i64.const 3600000000000))";
    let elapsed = total("(f64.convert_i64_u (i64.div_u (call $now) (i64.const 1000000000)))");
    assert_eq!(
        total_of("", &format!("(call $block {hour}) {elapsed}")),
        3601.0
    );
    let both = format!(
        "(i32.store (i32.const 2000) (call $timer (i64.const -1)))
         (i32.store (i32.const 2004) {hour})
         (call $poll (i32.const 2000) (i32.const 2) (i32.const 2008))"
    );
    assert_eq!(total_of("", &format!("{both} {elapsed}")), 3601.0);
    let which = "(f64.convert_i32_u (i32.add
        (i32.mul (i32.load (i32.const 2012)) (i32.const 10)) (i32.load (i32.load (i32.const 2008)))))";
    assert_eq!(
        total_of("", &format!("{both} {}", total(which))),
        11.0,
        "one of them, the second"
    );
    let forever = "(call $block (call $timer (i64.const -1)))";
    let end = modulo("(call $now)");
    assert_eq!(total_of("", &format!("{forever} {end}")), 709_551_615.0);
    // Asleep again and again: the deadline is the wall's, not the guest's clock.
    let again = "(local.set $at (call $timer (i64.const 1)))
        (loop $again (call $block (local.get $at)) (br $again))";
    assert_eq!(fault(again), super::clocks::DEADLINE);
    let nothing = "(call $poll (i32.const 0) (i32.const 0) (i32.const 2000))";
    let Fault::Trap { reason } = fault(nothing) else {
        panic!("it went on")
    };
    assert!(reason.contains("polled nothing"), "{reason}");
}

#[test]
fn hostile_15_timers_without_end() {
    let _turn = turn();
    let hoard = "(loop $again (drop (call $timer (i64.const 1))) (br $again))";
    let fault = fault(hoard);
    assert!(
        matches!(&fault, Fault::Abi { reason } if reason.contains("handle")),
        "{fault}"
    );
}

#[test]
fn hostile_33_randomness_is_the_same_in_fresh_instances() {
    let _turn = turn();
    let low = |word: &str| {
        total(&format!(
            "(f64.convert_i64_u (i64.shr_u {word} (i64.const 35)))"
        ))
    };
    let bytes = "(call $bytes (i64.const 16) (i32.const 2000))";
    let drawn = low("(i64.load (i32.load (i32.const 2000)))");
    let first = total_of("", &format!("{bytes} {drawn}"));
    let second = total_of("", &format!("{bytes} {bytes} {drawn}"));
    let word = total_of("", &low("(call $word)"));
    assert!(first > 0.0 && first != second);
    assert_eq!(first, word, "both are the first eight bytes");
    let length = total("(f64.convert_i32_u (i32.load offset=4 (i32.const 2000)))");
    assert_eq!(total_of("", &format!("{bytes} {length}")), 16.0);
    for (asked, number) in [(-1, u64::MAX), ((1 << 20) + 1, (1 << 20) + 1)] {
        let Fault::Trap { reason } =
            fault(&format!("(call $bytes (i64.const {asked}) (i32.const 0))"))
        else {
            panic!("{asked} bytes")
        };
        let whole =
            format!("it asked `get-random-bytes` for {number} bytes at once; at most 1048576");
        assert_eq!(reason, whole);
    }
}

#[test]
fn hostile_34_wasi_has_no_environment_files_or_input() {
    let _turn = turn();
    let length = total("(f64.convert_i32_u (i32.load offset=4 (i32.const 2000)))");
    for list in ["variables", "arguments", "folders"] {
        let body = format!(
            "(i32.store (i32.const 2004) (i32.const 9)) (call ${list} (i32.const 2000)) {length}"
        );
        assert_eq!(total_of("", &body), 0.0, "{list}");
    }
    let read = "(call $read (call $stdin) (i64.const 100) (i32.const 2000))";
    let answer =
        "(f64.convert_i32_u (i32.add (i32.mul (i32.const 10) (i32.load8_u (i32.const 2000)))
        (i32.load8_u offset=4 (i32.const 2000))))";
    assert_eq!(
        total_of("", &format!("{read} {}", total(answer))),
        11.0,
        "closed"
    );
}

#[test]
fn hostile_35_wasi_denies_sockets() {
    let _turn = turn();
    let answer = total(
        "(f64.convert_i32_u (i32.add (i32.mul (i32.const 10) (i32.load8_u (i32.const 2000)))
        (i32.load8_u offset=4 (i32.const 2000))))",
    );
    let create = format!("(call $socket (i32.const 0) (i32.const 2000)) {answer}");
    assert_eq!(total_of("", &create), 11.0, "access-denied");
    let name = r#"(data (i32.const 3000) "example.com")"#;
    let resolve = format!(
        "(call $resolve (call $net) (i32.const 3000) (i32.const 11) (i32.const 2000)) {answer}"
    );
    assert_eq!(total_of(name, &resolve), 11.0, "access-denied");
}

/// What is printed is the plugin's log, however it is cut to pieces, and no terminal obeys it.
#[test]
fn hostile_18_printing_is_logging() {
    let _turn = turn();
    let (host, lines) = listening();
    let text = r#"(data (i32.const 3000) "no\1b[2J\0d\0aforged \ff line")"#;
    let print = |from: u32, length: u32| {
        format!(
            "(call $write (call $stdout) (i32.const {from}) (i32.const {length}) (i32.const 2000))"
        )
    };
    let body = [print(3000, 2), print(3002, 10), print(3012, 9)].concat();
    let plugin = load_with(&host, &importing(text, &body), &limits(), granted()).unwrap();
    plugin.score(&samples(&["a"])).unwrap();
    let seen = lines.lock().unwrap().split_off(0);
    assert_eq!(seen, ["no\\u{1b}[2J\\r", "forged \u{fffd} line"]);
    // 300 lines of one byte, then one that is printed byte by byte and never ends.
    let flood = r"(loop $again
          (call $write (call $once) (i32.const 3006) (i32.const 2) (i32.const 2000))
          (local.set $i (i32.add (local.get $i) (i32.const 1)))
          (br_if $again (i32.lt_u (local.get $i) (i32.const 300))))
        (loop $on
          (call $write (call $once) (i32.const 4096) (i32.const 1000) (i32.const 2000))
          (local.set $i (i32.add (local.get $i) (i32.const 1)))
          (br_if $on (i32.lt_u (local.get $i) (i32.const 2000))))";
    let once = format!(
        r#"{text} (global $out (mut i32) (i32.const 0))
        (func $once (result i32)
          (if (i32.eqz (global.get $out)) (then (global.set $out (call $stdout))))
          (global.get $out))"#
    );
    let patient = Limits {
        deadline_ms: 10_000,
        ..limits()
    };
    let plugin = load_with(&host, &importing(&once, flood), &patient, granted()).unwrap();
    plugin.score(&samples(&["a"])).unwrap();
    let seen = lines.lock().unwrap().split_off(0);
    assert_eq!(seen.len(), 201);
    assert_eq!(seen[200], "101 more lines were dropped");
    let large = "(call $write (call $stdout) (i32.const 0) (i32.const 65537) (i32.const 2000))";
    let Fault::Trap { reason } = fault(large) else {
        panic!("it was written")
    };
    assert!(reason.contains("65537 bytes at once"), "{reason}");
    assert_serves(&host);
}

#[test]
fn a_guest_that_ends_itself() {
    let _turn = turn();
    let reason = "it ended itself with exit status 1".to_owned();
    assert_eq!(fault("(call $exit (i32.const 1))"), Fault::Trap { reason });
}

#[test]
fn hostile_46_wasi_must_be_asked_for_granted_and_imported() {
    let _turn = turn();
    let host = host();
    let refused = |bytes: &[u8], access: Access| {
        let error = load_with(&host, bytes, &limits(), access).err().unwrap();
        assert_eq!(error.call, Call::Load);
        assert!(
            error
                .hint()
                .is_some_and(|hint| hint.to_lowercase().contains("wasi")),
            "{error}"
        );
        error.fault
    };
    let asking = importing("", "");
    let (key, reason) = ("wasi".to_owned(), "its runtime imports it".to_owned());
    assert_eq!(
        refused(&asking, Access::default()),
        Fault::Grants(Mismatch::NotGranted {
            key: key.clone(),
            reason
        })
    );
    let plain = guest::scoring_after_ones("");
    let error = load_with(&host, &plain, &limits(), granted())
        .err()
        .unwrap();
    assert_eq!(error.fault, Fault::Grants(Mismatch::NotAsked { key }));
    let asks = json!({ "wasi": "for nothing" });
    let error = load_with(&host, &manifested(&plain, &asks), &limits(), granted());
    let unused = Fault::Grants(Mismatch::Unused { key: "wasi" });
    assert_eq!(error.err().unwrap().fault, unused);
    let importing = |import: &str| {
        let main = score(guest::ONES);
        let parts = Parts {
            imports: import,
            main: &main,
            ..Parts::default()
        };
        parts.build()
    };
    let clock = r#"(import "wasi:clocks/wall-clock@0.2.0" (instance))"#;
    // Without a manifest the grant changes nothing: the import is unknown.
    let imports = vec!["wasi:clocks/wall-clock@0.2.0".to_owned()];
    assert_eq!(
        refused(&importing(clock), granted()),
        Fault::UnknownImports { imports }
    );
    for unknown in [
        "wasi:http/types@0.2.0",
        "wasi:clocks/wall-clock@0.3.0",
        "wasi:clocks/evil@0.2.0",
    ] {
        let import = format!(r#"{clock} (import "{unknown}" (instance))"#);
        let imports = vec![unknown.to_owned()];
        let found = refused(&manifested(&importing(&import), &asks), granted());
        assert_eq!(found, Fault::UnknownImports { imports });
    }
    let more = r#"(import "wasi:clocks/wall-clock@0.2.0" (instance (export "wind-back" (func))))"#;
    let error = load_with(
        &host,
        &manifested(&importing(more), &asks),
        &limits(),
        granted(),
    );
    let error = error.err().unwrap();
    assert!(
        matches!(&error.fault, Fault::Signature { reason } if reason.contains("wind-back")),
        "{error}"
    );
    assert_serves(&host);
}

/// As a function of the root, WASI stays what nobody has.
#[test]
fn hostile_23_wasi_that_is_no_interface() {
    let _turn = turn();
    let bytes = wat::parse_str(
        r#"(component (import "wasi:filesystem/types@0.2.0" (func))
        (instance $i) (export "grpo:plugin/scoring@0.1.0" (instance $i)))"#,
    );
    let bytes = manifested(&bytes.unwrap(), &json!({ "wasi": "x" }));
    assert!(matches!(
        error_of_load(&bytes).fault,
        Fault::UnknownImports { .. }
    ));
}
