//! Logged steps scored again by guests that look at their batch, or fail on some of it.

use super::{guest, host, limits, load, totals};
use grpo_host::{
    grpo::advantage::ScaleRewards,
    plugin::{Fault, RewardSet, Weighted},
    replay::{Comparison, rescore},
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
    let reward = load(&host(), bytes, &limits()).unwrap();
    RewardSet::new(vec![Weighted {
        reward,
        weight: 1.0,
    }])
    .unwrap()
}

#[test]
fn waves_are_the_batches_and_groups_the_questions() {
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
    let logged = [
        rollout(0, 0, "a"),
        rollout(0, 0, "trp"),
        rollout(1, 0, "trp"),
    ];
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir(folder.path().join("rollouts")).unwrap();
    let path = write_rollouts(folder.path(), 1, &logged).unwrap();
    let rescored = rescore(1, &path, &alone(&super::policy::picky())).unwrap();
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
