//! Steps over small datasets: who gets how many completions, and what the state carries on.

use super::*;
use crate::buckets::Bucket;
use std::collections::BTreeMap;

const BUDGET: Budget = Budget {
    rows: 12,
    prompts: 4,
    group_size: 8,
    seed: 3,
};

fn next(state: &[u8], outcomes: &[(u64, Vec<f64>)]) -> Planned {
    let outcomes = outcomes.iter().map(|(row, r)| (*row, r.as_slice()));
    plan(&Config::default(), state, outcomes, &BUDGET).unwrap()
}

/// Rows 0 to 3 are always wrong, the others mostly right.
fn answer(planned: &Planned) -> Vec<(u64, Vec<f64>)> {
    let rewards = |&(row, n): &(u64, u32)| {
        let right = if row < 4 {
            0.0
        } else {
            1.0 - row as f64 / 100.0
        };
        (row, vec![right; n as usize])
    };
    planned.picks.iter().map(rewards).collect()
}

#[test]
fn the_second_epoch_spends_more_on_hard_rows_within_the_budget() {
    let mut planned = next(&[], &[]);
    let mut first: Vec<(u64, u32)> = Vec::new();
    loop {
        first.extend(&planned.picks);
        if first.len() == 12 {
            break;
        }
        // Nothing is known: the step is curriculum-uniform's.
        assert_eq!(planned.picks.len(), 4);
        let none = [
            ("buckets", 1.0),
            ("seen", 0.0),
            ("bucket_0/n", 0.0),
            ("bucket_0/rollouts", 8.0),
            ("completions", 32.0),
        ];
        assert_eq!(planned.metrics, none.map(|(n, v)| (n.to_owned(), v)));
        planned = next(&planned.state, &answer(&planned));
    }
    assert!(first.iter().all(|(_, n)| *n == 8));
    first.sort_unstable();
    assert!(first.iter().map(|p| p.0).eq(0..12));
    let mut second = BTreeMap::new();
    while second.len() < 12 {
        planned = next(&planned.state, &answer(&planned));
        let total: u32 = planned.picks.iter().map(|p| p.1).sum();
        assert!(total <= 32 && total + 10 > 32, "{planned:?}");
        second.extend(planned.picks.iter().copied().take(12 - second.len()));
    }
    // Easy rows average 0.925 of a range from 0 to 0.96: round(4·(1 + 1.5·(1 - 0.9636))) = 4.
    for (row, n) in second {
        assert_eq!(n, if row < 4 { 10 } else { 4 }, "row {row}");
    }
    let metric = |name: &str| planned.metrics.iter().find(|m| m.0 == name).unwrap().1;
    assert_eq!((metric("buckets"), metric("seen")), (2.0, 12.0));
    assert_eq!((metric("bucket_0/n"), metric("bucket_1/n")), (4.0, 8.0));
    assert_eq!(
        (metric("bucket_0/rollouts"), metric("bucket_1/rollouts")),
        (10.0, 4.0)
    );
    assert!((metric("balance") - 2.0 / 3.0).abs() < 1e-12);
    assert!((metric("bucket_1/reward_mean") - 0.925).abs() < 1e-12);
    assert_eq!(metric("boundary_0"), metric("bucket_0/hi"));
}

#[test]
fn an_epoch_is_reported_once_when_it_begins() {
    let mut planned = next(&[], &[]);
    let mut reports = planned.reports.clone();
    assert_eq!(reports[0].title, "Epoch 0: average rewards of 0 of 12 rows");
    for _ in 0..4 {
        planned = next(&planned.state, &answer(&planned));
        reports.extend(planned.reports.clone());
    }
    let [_, second] = reports.as_slice() else {
        panic!("{reports:#?}")
    };
    assert_eq!(second.title, "Epoch 1: average rewards of 12 of 12 rows");
    let names: Vec<_> = second.rows.iter().map(|row| row[0].as_str()).collect();
    assert_eq!(names, ["hard", "easy", "all"]);
    assert_eq!(second.rows[0][3..6], ["4", "33.3 %", "10"]);
    assert_eq!(second.rows[1][3..6], ["8", "66.7 %", "4"]);
    assert_eq!(second.notes.last().unwrap(), "balance 0.67: ok");
}

#[test]
fn a_step_over_many_epochs_reports_what_the_interface_allows() {
    let budget = Budget {
        rows: 1,
        prompts: 9,
        group_size: 1,
        ..BUDGET
    };
    let planned = plan(&Config::default(), &[], [], &budget).unwrap();
    assert_eq!((planned.picks.len(), planned.reports.len()), (9, 8));
}

#[test]
fn averages_move_by_the_decay() {
    let mut averages = vec![None, Some(0.5)];
    learn(&mut averages, 0.7, 0, &[0.0, 1.0]).unwrap();
    learn(&mut averages, 0.7, 1, &[1.0]).unwrap();
    // All completions skipped: nothing new is known.
    learn(&mut averages, 0.7, 1, &[]).unwrap();
    assert_eq!(averages[0], Some(0.5));
    assert!((averages[1].unwrap() - 0.65).abs() < 1e-12);
    learn(&mut averages, 0.7, 0, &[f64::MAX, f64::MAX, -f64::MAX]).unwrap();
    let refuse = |row, rewards: &[f64]| learn(&mut [None; 2], 0.7, row, rewards).unwrap_err();
    assert_eq!(refuse(2, &[1.0]), "an outcome of row 2, the dataset has 2");
    assert_eq!(
        refuse(1, &[1.0, f64::NAN]),
        "a reward of row 1 is not finite"
    );
}

#[test]
fn a_tiny_budget_gets_one_pick_within_the_cap() {
    let budget = Budget {
        prompts: 1,
        group_size: 1,
        ..BUDGET
    };
    let config = Config {
        base: Some(4),
        ..Config::default()
    };
    let outcomes: Vec<(u64, Vec<f64>)> = (0..12)
        .map(|row| (row, vec![f64::from(u8::from(row > 5))]))
        .collect();
    let outcomes = outcomes.iter().map(|(row, r)| (*row, r.as_slice()));
    let planned = plan(&config, &[], outcomes, &budget).unwrap();
    let [(row, n)] = planned.picks.as_slice() else {
        panic!("{planned:?}")
    };
    // 10 for a hard row, but no plan may be more than 8 times its budget.
    assert_eq!(*n, if *row > 5 { 4 } else { 8 });
}

#[test]
fn metrics_stay_within_the_interfaces_64() {
    let bucket = Bucket {
        lo: 0.0,
        hi: 1.0,
        n: 1,
        rollouts: 4,
        mean: 0.5,
        std: 0.0,
        min: 0.5,
        max: 0.5,
    };
    let profile = Profile {
        buckets: vec![bucket; crate::buckets::MAX_BUCKETS as usize],
        spread: Some(0.1),
    };
    // And `completions`.
    assert_eq!(metrics(&profile, 8).len() + 1, 64);
}
