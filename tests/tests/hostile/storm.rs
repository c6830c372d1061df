//! Many calls at once, and failure after failure.

use super::policy::picky;
use super::{LOOP, PATIENCE, assert_serves, guest, host, limits, load, samples, totals, turn};
use grpo_host::plugin::{Fault, Limits, OnFailure, PluginHost, RewardSet, Weighted};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// 1000 threads on 16 instances: callers wait, none is refused, none overtakes (which the queue's own
/// test counts out), and a trap or a deadline of one is no other's.
#[test]
fn hostile_41_a_herd_of_callers() {
    let _turn = turn();
    let host = host();
    let plugin = load(&host, &picky(), &Limits::default()).unwrap();
    let begun = Instant::now();
    std::thread::scope(|scope| {
        for caller in 0..1000 {
            let plugin = &plugin;
            scope.spawn(move || {
                for _ in 0..5 {
                    let scoring = plugin.score(&samples(&["a", "b"])).unwrap();
                    assert_eq!(totals(&scoring.scores), [Some(1.0); 2]);
                }
                if caller % 50 == 0 {
                    let scoring = plugin.score(&samples(&["a", "trp"])).unwrap();
                    assert_eq!(totals(&scoring.scores), [Some(1.0), None]);
                }
            });
        }
    });
    assert!(begun.elapsed() < PATIENCE);
    assert_serves(&host);
}

/// Every instance is taken by a guest that hangs: whoever waits gives up at its own wall clock, and is
/// served once they have gone.
#[test]
fn hostile_41_waiting_ends_at_the_wall_clock() {
    let _turn = turn();
    let host = host();
    let slow = Limits {
        deadline_ms: 2000,
        ..Limits::default()
    };
    let hanging = load(&host, &guest::scoring(LOOP), &slow).unwrap();
    let hasty = Limits {
        wall_ms: 100,
        ..Limits::default()
    };
    let hasty = load(&host, &guest::scoring_after_ones(""), &hasty).unwrap();
    let waited = std::thread::scope(|scope| {
        for _ in 0..16 {
            scope.spawn(|| hanging.score(&samples(&["x"])).unwrap());
        }
        // They are all in once a call that needs an instance is refused for the first time.
        let begun = Instant::now();
        loop {
            let asked = Instant::now();
            let scoring = hasty.score(&samples(&["a"])).unwrap();
            if let Some(error) = scoring.faults.first() {
                assert_eq!(error.fault, Fault::Wall { limit_ms: 100 });
                return asked.elapsed();
            }
            assert!(begun.elapsed() < Duration::from_secs(1), "none had to wait");
        }
    });
    assert!(waited >= Duration::from_millis(100), "{waited:?}");
    assert!(waited < Duration::from_millis(1000), "{waited:?}");
    let scoring = hasty.score(&samples(&["a"])).unwrap();
    assert_eq!(totals(&scoring.scores), [Some(1.0)]);
    assert_serves(&host);
}

/// The breaker: after three requests without a score the plugin is called less and less often, and again
/// as before once it scores. Other rewards do not notice.
#[test]
fn hostile_42_trap_storm() {
    let _turn = turn();
    let calls = Arc::new(AtomicU32::new(0));
    let seen = Arc::clone(&calls);
    let host = PluginHost::new(Arc::new(move |_| {
        seen.fetch_add(1, Ordering::Relaxed);
    }))
    .unwrap();
    // Says that it was called, and traps at a completion of 3 bytes.
    let noisy = guest::scoring_after_ones(
        "(call $log (i32.const 1) (i32.const 0) (i32.const 0))
         (if (i32.eq (i32.load offset=8 (local.get $samples)) (i32.const 3)) (then (unreachable)))",
    );
    let watched = Weighted {
        reward: load(&host, &noisy, &limits()).unwrap(),
        weight: 0.0,
    };
    let good = Weighted {
        reward: load(&host, &guest::scoring_after_ones(""), &limits()).unwrap(),
        weight: 1.0,
    };
    let rewards = RewardSet::new(vec![watched, good]).unwrap();
    let mut rests = 0;
    for _ in 0..100 {
        let scoring = rewards.score(&samples(&["trp"])).unwrap();
        assert_eq!(totals(&scoring.scores), [Some(1.0)]);
        assert_eq!(scoring.skipped, [1, 0]);
        let [error] = scoring.faults.as_slice() else {
            panic!("{scoring:?}")
        };
        match &error.fault {
            Fault::Trap { .. } => assert!(error.to_string().contains("row 100")),
            Fault::Resting { .. } => rests += 1,
            other => panic!("{other}"),
        }
        assert!(error.hint().is_some());
    }
    // Requests 0, 1, 2, then after pauses of 1, 2, 4, 8, 16 and 32: 4, 7, 12, 21, 38 and 71.
    assert_eq!((calls.swap(0, Ordering::Relaxed), rests), (9, 91));
    // The pause of 64 began after request 71, so 36 requests are left of it.
    for _ in 0..36 {
        let scoring = rewards.score(&samples(&["a"])).unwrap();
        assert_eq!(scoring.skipped, [1, 0]);
    }
    assert_eq!(calls.load(Ordering::Relaxed), 0);
    for made in 1..5 {
        let scoring = rewards.score(&samples(&["a"])).unwrap();
        assert_eq!((scoring.faults, scoring.skipped), (vec![], vec![0, 0]));
        assert_eq!(calls.load(Ordering::Relaxed), made);
    }
    // A policy that stops the run at the first failure needs no breaker.
    let strict = Limits {
        on_failure: OnFailure::Abort,
        ..limits()
    };
    let strict = load(&host, &noisy, &strict).unwrap();
    for _ in 0..10 {
        let error = strict.score(&samples(&["trp"])).unwrap_err();
        assert!(matches!(error.fault, Fault::Trap { .. }), "{error}");
    }
    assert_serves(&host);
}

/// More failures of every kind than there are instances: each gives its place back.
#[test]
fn hostile_42_every_failure_gives_its_instance_back() {
    let _turn = turn();
    let host = host();
    let quick = Limits {
        deadline_ms: 5,
        memory_mib: 8,
        on_failure: OnFailure::Abort,
        ..Limits::default()
    };
    let bomb = "(if (i32.eq (memory.grow (i32.const 1000)) (i32.const -1)) (then (unreachable)))";
    for (bytes, completion) in [
        (picky(), "trp"),
        (picky(), "spin"),
        (guest::scoring_after_ones(bomb), "a"),
        (guest::scoring("(i32.const -8)"), "a"),
    ] {
        let plugin = load(&host, &bytes, &quick).unwrap();
        for _ in 0..40 {
            assert!(plugin.score(&samples(&[completion])).is_err());
        }
        assert_serves(&host);
    }
}
