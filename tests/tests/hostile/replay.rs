//! Logged steps scored again by guests that look at their batch, or fail on some of it.

use super::{guest, host, limits, load, policy, totals, turn};
use grpo_host::{
    grpo::advantage::ScaleRewards,
    plugin::{Fault, Isolation, Limits, RewardSet, Weighted},
    replay::{Comparison, difference, rescore},
    run::{Rollout, write_rollouts},
    types::{Completion, Finish, Parsed, Telemetry},
};

fn rollout(group: u32, wave: u32, completion: &str) -> Rollout {
    Rollout {
        step: 1,
        row_id: 40 + u64::from(group),
        row: "{}".to_owned(),
        group,
        wave: Some(wave),
        prompt: "p".to_owned(),
        prompt_ids: Vec::new(),
        completion: Completion {
            request: 0,
            index: 0,
            tokens: Vec::new(),
            logprobs: Vec::new(),
            policy_logprobs: Vec::new(),
            text: completion.to_owned(),
            finish: Finish::Stop,
            telemetry: Telemetry::default(),
            drafts: 0,
            accepted_per_pos: Vec::new(),
            top: Vec::new(),
        },
        parsed: Parsed::default(),
        reward: Some(0.5),
        parts: Vec::new(),
        advantage: 0.0,
        skip: None,
        plugins: Vec::new(),
    }
}

fn alone(bytes: &[u8]) -> RewardSet {
    alone_within(bytes, &limits())
}

fn alone_within(bytes: &[u8], limits: &Limits) -> RewardSet {
    let reward = load(&host(), bytes, limits).unwrap();
    RewardSet::new(vec![Weighted {
        reward,
        weight: 1.0,
    }])
    .unwrap()
}

#[test]
fn waves_are_the_batches_and_groups_the_questions() {
    let _turn = turn();
    // 100 for each sample of the batch and 1 for each question.
    let counts = guest::scoring_after_ones(
        "(loop $next
           (f64.store offset=8
             (i32.add (i32.const 4096) (i32.mul (local.get $i) (i32.const 24)))
             (f64.convert_i32_u
               (i32.add (i32.mul (local.get $n) (i32.const 100)) (local.get $asked))))
           (local.set $i (i32.add (local.get $i) (i32.const 1)))
           (br_if $next (i32.lt_u (local.get $i) (local.get $n))))",
    );
    // As respending leaves it: probes of two groups, then more of the first. Both have the same texts.
    let logged = [
        rollout(0, 0, "a"),
        rollout(0, 0, "b"),
        rollout(0, 2, "c"),
        rollout(0, 2, "d"),
        rollout(0, 2, "e"),
        rollout(1, 0, "f"),
        rollout(1, 0, "g"),
    ];
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir(folder.path().join("rollouts")).unwrap();
    let path = write_rollouts(folder.path(), 1, &logged).unwrap();
    let rescored = rescore(1, &path, &alone(&counts)).unwrap();
    let expected = [402.0, 402.0, 301.0, 301.0, 301.0, 402.0, 402.0].map(Some);
    assert_eq!(totals(&rescored.scores), expected);
}

#[test]
fn failing_samples_are_skips_with_a_fault_and_no_number() {
    let _turn = turn();
    let logged = [
        rollout(0, 0, "a"),
        rollout(0, 0, "trp"),
        rollout(1, 0, "trp"),
    ];
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir(folder.path().join("rollouts")).unwrap();
    let path = write_rollouts(folder.path(), 1, &logged).unwrap();
    let rescored = rescore(1, &path, &alone(&policy::picky())).unwrap();
    assert_eq!(totals(&rescored.scores), [Some(1.0), None, None]);
    let rows: Vec<_> = rescored.faults.iter().map(|fault| fault.row).collect();
    assert_eq!(rows, [Some(40), Some(41)]);
    assert!(matches!(rescored.faults[0].fault, Fault::Trap { .. }));
    let mut comparison = Comparison::new(ScaleRewards::Group);
    comparison.add(1, &rescored).unwrap();
    let report = comparison.report();
    assert_eq!((report.new.skipped, report.newly_skipped), (2, 2));
    assert_eq!(report.advantages.compared, 1);
    assert_eq!(report.new.totals.unwrap().mean, 1.0);
    assert_eq!(report.pearson, None);
}

/// A reward that depends on more than its sample, here on how many were scored before it, says something
/// else when it is asked again. A reward whose numbers are lies in the log is found as well.
#[test]
fn hostile_30_what_cannot_be_repeated_is_detected() {
    let _turn = turn();
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir(folder.path().join("rollouts")).unwrap();
    // As the run logged them with an instance for each sample: 1 each.
    let logged = ["a", "b", "c"].map(|text| Rollout {
        reward: Some(1.0),
        parts: vec![("evil".to_owned(), 1.0)],
        ..rollout(0, 0, text)
    });
    let path = write_rollouts(folder.path(), 1, &logged).unwrap();
    let differing = |rewards: &RewardSet| {
        let again = rescore(1, &path, rewards).unwrap();
        let pairs = again.rollouts.iter().zip(&again.scores);
        let found: Vec<_> = pairs.map(|(r, s)| difference(r, s)).collect();
        found
            .iter()
            .map(|d| d.as_ref()?.replayed)
            .collect::<Vec<_>>()
    };
    let apart = Limits {
        isolation: Isolation::Sample,
        ..limits()
    };
    assert_eq!(
        differing(&alone_within(&policy::counting(), &apart)),
        [None; 3]
    );
    // The same component on the same input, with state between the samples of a batch.
    let leaking = differing(&alone(&policy::counting()));
    assert_eq!(leaking, [None, Some(2.0), Some(3.0)]);
    // Twice the same is the same to the bit, on one host and on two.
    let twice = [(); 2].map(|()| {
        rescore(1, &path, &alone(&policy::counting()))
            .unwrap()
            .scores
    });
    assert_eq!(twice[0], twice[1]);
}
