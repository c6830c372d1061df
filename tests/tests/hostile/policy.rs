//! What becomes of the good samples beside a guilty one, under each policy and isolation.

use super::{assert_serves, guest, host, limits, load, samples, totals, turn};
use grpo_host::plugin::{Fault, Isolation, Limits, OnFailure};
use grpo_host::types::Score;

/// Traps at a completion of 3 bytes, spins at one of 4; the length of completion `i` stands at byte
/// 8 of sample `i`, and a sample takes 40 bytes.
pub(crate) fn picky() -> Vec<u8> {
    guest::scoring_after_ones(
        "(block $done (loop $next
           (br_if $done (i32.ge_u (local.get $i) (local.get $n)))
           (local.set $len (i32.load offset=8
             (i32.add (local.get $samples) (i32.mul (local.get $i) (i32.const 40)))))
           (if (i32.eq (local.get $len) (i32.const 3)) (then (unreachable)))
           (if (i32.eq (local.get $len) (i32.const 4)) (then (loop $spin (br $spin))))
           (local.set $i (i32.add (local.get $i) (i32.const 1)))
           (br $next)))",
    )
}

#[test]
fn skip_excludes_the_guilty_only() {
    let _turn = turn();
    let host = host();
    for isolation in [Isolation::Batch, Isolation::Sample] {
        let limits = Limits {
            isolation,
            ..limits()
        };
        let plugin = load(&host, &picky(), &limits).unwrap();
        let scoring = plugin
            .score(&samples(&["a", "trp", "b", "spin", "c"]))
            .unwrap();
        let expected = [Some(1.0), None, Some(1.0), None, Some(1.0)];
        assert_eq!(totals(&scoring.scores), expected);
        let rows: Vec<_> = scoring.faults.iter().map(|fault| fault.row).collect();
        assert_eq!(rows, [Some(101), Some(103)]);
        assert!(matches!(scoring.faults[0].fault, Fault::Trap { .. }));
        assert_eq!(scoring.faults[1].fault, Fault::Deadline { limit_ms: 60 });
        let Score::Skip(reason) = &scoring.scores[3] else {
            panic!("{scoring:?}")
        };
        assert_eq!(reason, "ran past its deadline of 60 ms");
    }
    assert_serves(&host);
}

/// A model's code that brings its judge down gains nothing by it, and the judge goes on.
#[test]
fn the_guilty_may_have_a_score_of_the_config() {
    let _turn = turn();
    let host = host();
    let limits = Limits {
        on_failure: OnFailure::Score(-0.5),
        ..limits()
    };
    let plugin = load(&host, &picky(), &limits).unwrap();
    let scoring = plugin.score(&samples(&["a", "trp", "spin"])).unwrap();
    assert_eq!(totals(&scoring.scores), [Some(1.0), Some(-0.5), Some(-0.5)]);
    let Score::Value(scored) = &scoring.scores[1] else {
        panic!("{scoring:?}")
    };
    assert_eq!(scored.parts, [("failed".to_owned(), 1.0)]);
    assert_eq!((scoring.faults.len(), scoring.failed), (2, 0));
    // It is not left alone, however many of them there are.
    for _ in 0..5 {
        let scoring = plugin.score(&samples(&["trp"])).unwrap();
        assert_eq!(totals(&scoring.scores), [Some(-0.5)]);
    }
    // What is the plugin's own fault is no sample's.
    let wrong = guest::scoring(
        "(i32.store8 (i32.const 0) (i32.const 0)) (i32.store offset=4 (i32.const 0) (i32.const 0)) (i32.store offset=8 (i32.const 0) (i32.const 0)) (i32.const 0)",
    );
    let plugin = load(&host, &wrong, &limits).unwrap();
    let scoring = plugin.score(&samples(&["a"])).unwrap();
    assert_eq!((totals(&scoring.scores), scoring.failed), (vec![None], 1));
    let given = serde_json::from_str::<Limits>(r#"{"on_failure": {"score": 0}}"#).unwrap();
    assert_eq!(given.on_failure, OnFailure::Score(0.0));
    for value in [f64::NAN, f64::INFINITY, -1.1e9] {
        let limits = Limits {
            on_failure: OnFailure::Score(value),
            ..limits.clone()
        };
        let error = load(&host, &picky(), &limits).err().unwrap();
        assert!(error.is_of_the_config(), "{error}");
        assert!(
            error
                .hint()
                .unwrap()
                .contains("on_failure: {score: NUMBER}")
        );
    }
}

#[test]
fn abort_names_the_guilty_row() {
    let _turn = turn();
    let host = host();
    let limits = Limits {
        on_failure: OnFailure::Abort,
        ..limits()
    };
    let plugin = load(&host, &picky(), &limits).unwrap();
    let error = plugin
        .score(&samples(&["a", "b", "trp", "spin"]))
        .unwrap_err();
    assert_eq!(error.row, Some(102));
    let digest = grpo_host::plugin::digest(&picky());
    let text = format!(
        "plugin `evil` ({}) score, row 102: trapped: wasm `unreachable` instruction executed in `score`",
        &digest[..19]
    );
    assert_eq!(error.to_string(), text);
    assert_eq!(
        totals(&plugin.score(&samples(&["a"])).unwrap().scores),
        [Some(1.0)]
    );
}

#[test]
fn a_backtrace_names_the_way_to_a_trap() {
    let _turn = turn();
    let host = host();
    let main = "(func $inner unreachable) (func $outer (call $inner))".to_owned()
        + &guest::score("(call $outer) (i32.const 0)");
    let reason = |guest_backtrace| {
        let limits = Limits {
            on_failure: OnFailure::Abort,
            guest_backtrace,
            ..limits()
        };
        let plugin = load(&host, &guest::component(&main), &limits).unwrap();
        match plugin.score(&samples(&["a"])).unwrap_err().fault {
            Fault::Trap { reason } => reason,
            other => panic!("{other}"),
        }
    };
    let what = "wasm `unreachable` instruction executed in";
    assert_eq!(reason(false), format!("{what} `inner`"));
    let way = format!("{what} `inner` called by `outer` called by `");
    let whole = reason(true);
    assert!(whole.starts_with(&way) && whole.ends_with('`'), "{whole}");
}

#[test]
fn retry_tries_and_then_aborts() {
    let _turn = turn();
    let host = host();
    let limits = Limits {
        on_failure: OnFailure::Retry,
        retries: 3,
        ..limits()
    };
    let plugin = load(&host, &picky(), &limits).unwrap();
    let error = plugin.score(&samples(&["a", "trp"])).unwrap_err();
    assert_eq!(error.row, Some(101));
    // A guest that cannot take two samples at once is cured by asking for one at a time.
    let lonely = guest::scoring_after_ones(
        "(if (i32.gt_u (local.get $n) (i32.const 1)) (then (unreachable)))",
    );
    let plugin = load(&host, &lonely, &limits).unwrap();
    let scoring = plugin.score(&samples(&["a", "b"])).unwrap();
    assert_eq!(totals(&scoring.scores), [Some(1.0); 2]);
    assert_eq!(scoring.faults.len(), 1);
    assert_eq!(scoring.faults[0].row, None);
}

/// Every sample spins: the request ends at its wall clock, not after each sample's deadline.
#[test]
fn the_wall_clock_bounds_the_search() {
    let _turn = turn();
    let host = host();
    let limits = Limits {
        wall_ms: 250,
        ..limits()
    };
    let plugin = load(&host, &picky(), &limits).unwrap();
    let begun = std::time::Instant::now();
    let scoring = plugin.score(&samples(&["spin"; 1000])).unwrap();
    assert!(begun.elapsed() < super::PATIENCE);
    assert_eq!(totals(&scoring.scores), [None; 1000]);
    let last = scoring.faults.last().unwrap();
    assert_eq!(
        (last.row, &last.fault),
        (Some(1099), &Fault::Wall { limit_ms: 250 })
    );
    assert_serves(&host);
}

/// The reward is the number of samples scored since instantiation.
pub(crate) fn counting() -> Vec<u8> {
    guest::component(
        r#"(global $count (mut f64) (f64.const 0))
           (func (export "score") (param i32 i32) (param $samples i32) (param $n i32) (result i32)
             (local $i i32)
             (drop (call $ones (local.get $n)))
             (loop $next
               (global.set $count (f64.add (global.get $count) (f64.const 1)))
               (f64.store offset=8
                 (i32.add (i32.const 4096) (i32.mul (local.get $i) (i32.const 24)))
                 (global.get $count))
               (local.set $i (i32.add (local.get $i) (i32.const 1)))
               (br_if $next (i32.lt_u (local.get $i) (local.get $n))))
             (i32.const 0))"#,
    )
}

/// A global counts the samples scored since instantiation; only as much of it leaks as was allowed.
#[test]
fn hostile_31_nothing_outlives_an_instance() {
    let _turn = turn();
    let counting = counting();
    let host = host();
    for (isolation, expected) in [
        (Isolation::Batch, [Some(1.0), Some(2.0), Some(3.0)]),
        (Isolation::Sample, [Some(1.0); 3]),
    ] {
        let limits = Limits {
            isolation,
            ..limits()
        };
        let plugin = load(&host, &counting, &limits).unwrap();
        for _ in 0..3 {
            let scoring = plugin.score(&samples(&["a", "b", "c"])).unwrap();
            assert_eq!(totals(&scoring.scores), expected);
        }
        let mut warm = plugin.warm().unwrap();
        warm.score(&samples(&["a"])).unwrap();
        let scores = warm.score(&samples(&["a"])).unwrap();
        assert_eq!(totals(&scores), [Some(2.0)]);
    }
}

#[test]
fn limits_are_checked() {
    let _turn = turn();
    let host = host();
    let zero = Limits {
        deadline_ms: 0,
        ..Limits::default()
    };
    let error = load(&host, &picky(), &zero).err().unwrap();
    let range = |key, value, min, max| Fault::LimitRange {
        key,
        value,
        min,
        max,
    };
    assert_eq!(error.fault, range("deadline_ms", 0, 1, 3_600_000));
    assert_eq!(
        error.hint().unwrap(),
        "set limits.deadline_ms of `evil` to 1 to 3600000"
    );
    let stubborn = Limits {
        retries: u32::MAX,
        ..Limits::default()
    };
    let error = load(&host, &picky(), &stubborn).err().unwrap();
    assert_eq!(error.fault, range("retries", 4_294_967_295, 0, 100));
    let unknown = serde_json::from_str::<Limits>(r#"{"deadline": 5}"#).unwrap_err();
    assert!(unknown.to_string().contains("unknown field `deadline`"));
    let given = r#"{"memory_mib": 64, "isolation": "sample", "on_failure": "abort"}"#;
    let given: Limits = serde_json::from_str(given).unwrap();
    assert_eq!((given.memory_mib, given.wall_ms), (64, 30_000));
    assert_eq!(
        (given.isolation, given.on_failure),
        (Isolation::Sample, OnFailure::Abort)
    );
}
