//! `curriculum-kde` through the real host: epochs, budgets, logs, refusals, and its price.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "clippy counts only functions marked as tests as tests"
)]

use grpo_host::defaults;
use grpo_host::plugin::{
    Call, CurriculumPlugin, Fault, GuestErrorKind, Limits, LogLevel, Plugin, PluginHost,
};
use grpo_host::types::{Budget, Outcome, Plan};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

/// What plugins said, as level and text.
type Lines = Arc<Mutex<Vec<(LogLevel, String)>>>;

fn curriculum(config: &Value) -> (CurriculumPlugin, Lines) {
    limited(config, &Limits::default())
}

fn limited(config: &Value, limits: &Limits) -> (CurriculumPlugin, Lines) {
    let lines = Lines::default();
    let sink = Arc::clone(&lines);
    let host = PluginHost::new(Arc::new(move |line| {
        let line = (line.level, line.text.to_owned());
        sink.lock().unwrap().push(line);
    }));
    let bytes = defaults::component("curriculum-kde").unwrap();
    let loaded = host.unwrap().load("curriculum-kde", bytes, config, limits);
    match loaded.unwrap() {
        Plugin::Curriculum(plugin) => (plugin, lines),
        other => panic!("{:?}", other.id()),
    }
}

const BUDGET: Budget = Budget {
    step: 0,
    rows: 30,
    prompts: 5,
    group_size: 8,
    seed: 3,
};

/// Rows below 10 are never answered, those below 20 by half, the rest always.
fn outcomes(plan: &Plan) -> Vec<Outcome> {
    let outcome = |row: u64, n: u32| Outcome {
        row,
        rewards: vec![[0.0, 0.5, 1.0][row as usize / 10]; n as usize],
        skipped: 0,
    };
    plan.picks
        .iter()
        .map(|pick| outcome(pick.row, pick.rollouts))
        .collect()
}

/// Plans until `epochs` are over; every plan, in order.
fn walk(plugin: &CurriculumPlugin, epochs: f64) -> Vec<Plan> {
    let mut plans = vec![plugin.plan(&[], &[], &BUDGET).unwrap()];
    while let Some(last) = plans.last().filter(|plan| plan.epoch < epochs) {
        let budget = Budget {
            step: plans.len() as u64,
            ..BUDGET
        };
        let next = plugin.plan(&last.state, &outcomes(last), &budget).unwrap();
        plans.push(next);
    }
    plans
}

#[test]
fn hard_rows_get_more_of_the_same_budget() {
    let (plugin, lines) = curriculum(&json!({}));
    let plans = walk(&plugin, 2.0);
    let first: Vec<_> = plans.iter().flat_map(|p| &p.picks).take(30).collect();
    assert!(first.iter().all(|pick| pick.rollouts == 8));
    let picks: Vec<_> = plans.iter().flat_map(|p| &p.picks).collect();
    let second: BTreeMap<u64, u32> = picks[30..60].iter().map(|p| (p.row, p.rollouts)).collect();
    // Means 0, 0.5 and 1: round(4·2.5), round(4·1.75), round(4·1).
    let expected = (0..30).map(|row| (row, [10, 7, 4][row as usize / 10]));
    assert!(
        second.iter().map(|(r, n)| (*r, *n)).eq(expected),
        "{second:?}"
    );
    for plan in &plans {
        let total: u32 = plan.picks.iter().map(|p| p.rollouts).sum();
        assert!(total <= 40 && total > 30, "{total}");
    }
    let metrics: BTreeMap<_, _> = plans.last().unwrap().metrics.iter().cloned().collect();
    assert_eq!(metrics["buckets"], 3.0);
    for (i, mean) in [0.0, 0.5, 1.0].into_iter().enumerate() {
        let of = |name| metrics[&format!("bucket_{i}/{name}")];
        assert!((of("reward_mean") - mean).abs() < 1e-12, "{metrics:?}");
        assert_eq!((of("n"), of("reward_std")), (10.0, 0.0));
        assert!((of("share") - 1.0 / 3.0).abs() < 1e-12);
    }
    assert!((metrics["balance"] - 1.0).abs() < 1e-12);
    // Of ten each at 0, 0.5 and 1.
    assert!((metrics["spread"] - (1.0_f64 / 6.0).sqrt()).abs() < 1e-12);
    assert!(metrics["boundary_0"] > 0.1 && metrics["boundary_1"] < 0.9);
    let reported: Vec<_> = plans.iter().flat_map(|plan| &plan.report).collect();
    assert_eq!(
        reported[0].title,
        "Epoch 0: average rewards of 0 of 30 rows"
    );
    let second = reported[1];
    assert_eq!(second.title, "Epoch 1: average rewards of 30 of 30 rows");
    let column = |head: &str| {
        let at = second.columns.iter().position(|c| c == head).unwrap();
        second
            .rows
            .iter()
            .map(|row| row[at].as_str())
            .collect::<Vec<_>>()
    };
    assert_eq!(column("bucket"), ["hard", "medium", "easy", "all"]);
    assert_eq!(column("rollouts"), ["10", "7", "4", "–"]);
    assert_eq!(column("mean"), ["0.000", "0.500", "1.000", "0.500"]);
    assert_eq!(column("share")[1..], ["33.3 %", "33.3 %", "100.0 %"]);
    assert_eq!(second.notes[1..], ["spread 0.41: ok", "balance 1.00: ok"]);
    assert!(lines.lock().unwrap().is_empty());
}

#[test]
fn a_plan_follows_from_seed_and_state_alone() {
    let (plugin, _) = curriculum(&json!({}));
    let plans = walk(&plugin, 1.5);
    assert_eq!(plans, walk(&plugin, 1.5));
    let (unknown, last) = (plans[0].state.clone(), plans.last().unwrap());
    let other_seed = Budget { seed: 4, ..BUDGET };
    let other = plugin.plan(&[], &[], &other_seed).unwrap();
    assert_ne!(other.picks, plans[0].picks);
    let refuse = |state: &[u8], outcomes: &[Outcome], budget: &Budget| {
        let error = plugin.plan(state, outcomes, budget).unwrap_err();
        let Fault::Guest { kind, message } = error.fault else {
            panic!("{error}")
        };
        assert_eq!((error.call, kind), (Call::Plan, GuestErrorKind::Input));
        message
    };
    let grown = Budget { rows: 31, ..BUDGET };
    assert_eq!(
        refuse(&last.state, &[], &grown),
        "state was made for 30 rows, the dataset has 31"
    );
    assert!(refuse(&last.state, &[], &other_seed).contains("seed 3, the run has 4"));
    let mut newer = last.state.clone();
    newer[4] += 1;
    assert_eq!(
        refuse(&newer, &[], &BUDGET),
        "state has version 2, this plugin writes 1"
    );
    let uniform = [b"unif", &last.state[4..]].concat();
    assert!(refuse(&uniform, &[], &BUDGET).contains("another curriculum"));
    let strange = Outcome {
        row: 30,
        rewards: vec![1.0],
        skipped: 0,
    };
    assert_eq!(
        refuse(&unknown, &[strange], &BUDGET),
        "an outcome of row 30, the dataset has 30"
    );
}

#[test]
fn base_can_follow_the_budget_and_order_the_dataset() {
    let (plugin, _) = curriculum(&json!({"base": null, "alpha": 1, "shuffle": false}));
    let plans = walk(&plugin, 2.0);
    let picks: Vec<_> = plans.iter().flat_map(|p| &p.picks).collect();
    assert!(
        picks
            .iter()
            .take(60)
            .map(|p| p.row)
            .eq((0..30).chain(0..30))
    );
    let rollouts: Vec<u32> = picks[30..60].iter().map(|p| p.rollouts).collect();
    assert_eq!((rollouts[0], rollouts[10], rollouts[20]), (16, 12, 8));
}

/// The most expensive step, the start of an epoch, in instructions: a limit that is the same on every
/// machine. An exponential for each row and grid point would be past it.
#[test]
fn a_large_dataset_is_read_in_few_instructions() {
    let limits = Limits {
        fuel: Some(400_000_000),
        ..Limits::default()
    };
    let (plugin, _) = limited(&json!({}), &limits);
    let rows = 20_000;
    let budget = Budget {
        rows,
        prompts: 64,
        ..BUDGET
    };
    let outcomes: Vec<Outcome> = (0..rows)
        .map(|row| Outcome {
            row,
            rewards: vec![(row as f64 * 0.618_033_988_749).fract()],
            skipped: 0,
        })
        .collect();
    let plan = plugin.plan(&[], &outcomes, &budget).unwrap();
    let metrics: BTreeMap<_, _> = plan.metrics.iter().cloned().collect();
    assert_eq!(metrics["seen"], 20_000.0);
    assert!(metrics.values().all(|value| value.is_finite()));
}
