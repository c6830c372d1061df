//! Two sets of rewards against numbers worked by hand.

use super::*;
use crate::types::{Completion, Finish, Parsed, Scored, Telemetry};

fn rollout(group: u32, index: u32, reward: Option<f64>) -> Rollout {
    Rollout {
        step: 1,
        row_id: 7,
        row: "{}".to_owned(),
        group,
        wave: Some(0),
        prompt: "?".to_owned(),
        prompt_ids: Vec::new(),
        completion: Completion {
            request: 0,
            index,
            tokens: Vec::new(),
            logprobs: Vec::new(),
            policy_logprobs: Vec::new(),
            text: format!("one\n\u{1b}[31m two {index}"),
            finish: Finish::Stop,
            telemetry: Telemetry::default(),
            drafts: 0,
            accepted_per_pos: Vec::new(),
            top: Vec::new(),
        },
        parsed: Parsed::default(),
        reward,
        parts: Vec::new(),
        advantage: 0.0,
        skip: None,
        plugins: Vec::new(),
    }
}

/// Group, logged total, new total.
type Case = (u32, Option<f64>, Option<f64>);

fn step(cases: &[Case]) -> Rescored {
    let score = |new: &Option<f64>| match new {
        Some(total) => Score::Value(Scored {
            total: *total,
            parts: Vec::new(),
        }),
        None => Score::Skip("no".to_owned()),
    };
    let numbered = cases.iter().zip(0..);
    Rescored {
        rollouts: numbered
            .map(|((g, old, _), i)| rollout(*g, i, *old))
            .collect(),
        scores: cases.iter().map(|(_, _, new)| score(new)).collect(),
        faults: Vec::new(),
    }
}

fn report(steps: &[&[Case]]) -> Report {
    let mut comparison = Comparison::new(ScaleRewards::Group);
    for (cases, number) in steps.iter().zip(1..) {
        comparison.add(number, &step(cases)).unwrap();
    }
    comparison.report()
}

#[test]
fn signs_and_skips_by_hand() {
    let found = report(&[&[
        // Means 0.5 and 0.5: both flip.
        (0, Some(0.0), Some(1.0)),
        (0, Some(1.0), Some(0.0)),
        // Flat before, mean 1 after: two leave 0, the third stays on it.
        (1, Some(2.0), Some(0.0)),
        (1, Some(2.0), Some(1.0)),
        (1, Some(2.0), Some(2.0)),
        // One skip on each side: nothing to compare, and the rest of the group is alone.
        (2, Some(1.0), None),
        (2, None, Some(3.0)),
    ]]);
    let expected = Advantages {
        compared: 5,
        sign_flips: 2,
        sign_flip_share: Some(0.4),
        to_or_from_zero: 2,
        groups: 3,
        // Group 2 has one scored sample on each side, which is flat.
        flat_groups_old: 2,
        flat_groups_new: 1,
    };
    assert_eq!(found.advantages, expected);
    assert_eq!((found.newly_skipped, found.newly_scored), (1, 1));
    assert_eq!((found.old.skipped, found.new.skipped), (1, 1));
    assert_eq!(found.old.skipped_share, 1.0 / 7.0);
    assert_eq!(found.old.totals.unwrap().mean, 8.0 / 6.0);
}

#[test]
fn the_most_changed_come_first_and_are_printable() {
    let many: Vec<Case> = (0..30)
        .map(|i| (0, Some(0.0), Some(f64::from(i))))
        .collect();
    let found = report(&[&many, &[(0, Some(5.0), Some(-95.0))]]);
    let changes: Vec<f64> = found.most_changed.iter().map(|c| c.new - c.old).collect();
    let expected: Vec<f64> = [-100.0]
        .into_iter()
        .chain((11..30).rev().map(f64::from))
        .collect();
    assert_eq!(changes, expected);
    assert_eq!(found.most_changed[1].completion, "one [31m two 29");
    assert_eq!((found.steps, found.samples), (2, 31));
}

#[test]
fn equal_rewards_and_no_rewards_have_no_nan() {
    let equal: &[Case] = &[(0, Some(0.1), Some(0.1)), (0, Some(0.1), Some(0.1))];
    let none: &[Case] = &[(0, None, None)];
    for steps in [&[equal] as &[&[Case]], &[none], &[&[]], &[]] {
        let found = report(steps);
        assert_eq!((found.pearson, found.spearman), (None, None));
        assert!(found.most_changed.is_empty());
        let json = serde_json::to_value(&found).unwrap();
        // serde_json writes NaN as null, where a number belongs.
        assert!(json["old"]["skipped_share"].is_number(), "{json}");
        if let Some(totals) = json["old"]["totals"].as_object() {
            assert!(totals.values().all(serde_json::Value::is_number), "{json}");
        }
    }
}

#[test]
fn a_total_whose_square_overflows_is_refused() {
    for case in [
        (0, Some(1e150), Some(0.0)),
        (0, Some(0.0), Some(f64::INFINITY)),
        (0, Some(f64::NAN), None),
    ] {
        let refused = Comparison::new(ScaleRewards::None).add(3, &step(&[case]));
        let step_and_row = match refused {
            Err(ReplayError::TooLarge { step, row, .. }) => Some((step, row)),
            _ => None,
        };
        assert_eq!(step_and_row, Some((3, 7)));
    }
}
