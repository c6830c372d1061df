//! Groups of different sizes, from the draw to the record: what `dynamic_sampling: respend` and
//! `curriculum-kde` leave behind, held to numbers worked out from the completions themselves.

use std::collections::BTreeMap;

use grpo_host::{
    run::{Rollout, read_curriculum, read_rollouts, rollout_files},
    types::Outcome,
};
use serde_json::{Map, Value};

use super::lab::Lab;

/// Completions of a step: 5 prompts of 6.
const BUDGET: f64 = 30.0;

const RESPEND: &str = "--config run.yaml --quiet --out a --set prompts_per_step=5 \
    --set num_generations=6 --set dynamic_sampling=respend";

/// The logged groups of a step, completions in their order.
fn groups(lab: &Lab, step: u64) -> Vec<Vec<Rollout>> {
    let files = rollout_files(&lab.path("a")).unwrap();
    let (_, path) = files.iter().find(|(found, _)| *found == step).unwrap();
    let mut groups: BTreeMap<u32, Vec<Rollout>> = BTreeMap::new();
    for rollout in read_rollouts(path).unwrap() {
        groups.entry(rollout.group).or_default().push(rollout);
    }
    groups.into_values().collect()
}

fn number(line: &Map<String, Value>, name: &str) -> f64 {
    line[name].as_f64().unwrap_or_else(|| panic!("{name}"))
}

#[test]
fn a_budget_is_spent_on_groups_that_teach_and_never_passed() {
    let lab = Lab::new();
    lab.run(RESPEND).fine();
    let (mut dropped, mut respent, mut sizes) = (0.0, 0.0, Vec::new());
    for line in &lab.metrics("a")[1..] {
        let of = |name: &str| number(line, &format!("sampling/{name}"));
        assert!(of("completions") <= BUDGET, "{line:?}");
        let groups = groups(&lab, line["step"].as_u64().unwrap());
        let taught: usize = groups.iter().map(Vec::len).sum();
        assert_eq!(of("teaching_groups"), groups.len() as f64);
        assert_eq!(of("teaching_fraction"), taught as f64 / of("completions"));
        // Each is trained on for having different rewards.
        assert_eq!(number(line, "frac_reward_zero_std"), 0.0);
        dropped += of("dropped_groups");
        respent += of("respent_completions");
        sizes.extend(groups.iter().map(Vec::len));
        for group in &groups {
            assert_group(group);
        }
    }
    assert!(dropped > 0.0 && respent > 0.0, "{dropped} {respent}");
    sizes.sort_unstable();
    sizes.dedup();
    assert!(sizes.len() > 1 && sizes.iter().all(|n| (3..=12).contains(n)));
}

/// Places 0, 1, 2, … in the group, one prompt, and the advantages of its own rewards.
fn assert_group(group: &[Rollout]) {
    let rewards: Vec<f64> = group.iter().map(|r| r.reward.unwrap()).collect();
    let n = rewards.len() as f64;
    let mean = rewards.iter().sum::<f64>() / n;
    let squares: f64 = rewards.iter().map(|r| (r - mean).powi(2)).sum();
    let std = (squares / (n - 1.0)).sqrt();
    assert!(std > 0.0, "{rewards:?}");
    for (place, (rollout, reward)) in group.iter().zip(&rewards).enumerate() {
        assert_eq!(rollout.completion.index as usize, place);
        assert_eq!(rollout.row_id, group[0].row_id);
        assert_eq!(rollout.prompt_ids, group[0].prompt_ids);
        let advantage = (reward - mean) / (std + 1e-4);
        assert!((rollout.advantage - advantage).abs() < 1e-12, "{rewards:?}");
    }
    // The probe and the rest have draws of their own.
    let texts: std::collections::BTreeSet<_> = group.iter().map(|r| &r.completion.tokens).collect();
    assert_eq!(texts.len(), group.len(), "no completion comes twice");
}

#[test]
fn the_curriculum_hears_of_every_completion_once() {
    let lab = Lab::new();
    lab.run(RESPEND).fine();
    let state = std::fs::read(lab.path("a/checkpoints/step-6/state.json")).unwrap();
    let state: Value = serde_json::from_slice(&state).unwrap();
    let outcomes: Vec<Outcome> = serde_json::from_value(state["outcomes"].clone()).unwrap();
    let last = lab.metrics("a").pop().unwrap();
    let heard: usize = outcomes.iter().map(|o| o.rewards.len()).sum();
    assert_eq!(heard as f64, number(&last, "sampling/completions"));
    let groups = groups(&lab, 6);
    let flat = outcomes.len() - groups.len();
    assert_eq!(flat as f64, number(&last, "sampling/dropped_groups"));
    // Dropped groups come first, with what their probe was given: half of what was planned for them.
    for outcome in &outcomes[..flat] {
        let rewards = &outcome.rewards;
        assert!((1..=3).contains(&rewards.len()), "{outcome:?}");
        assert!(rewards.iter().all(|r| *r == rewards[0]), "{outcome:?}");
    }
    for (outcome, group) in outcomes[flat..].iter().zip(&groups) {
        let rewards: Vec<f64> = group.iter().map(|r| r.reward.unwrap()).collect();
        assert_eq!((outcome.row, &outcome.rewards), (group[0].row_id, &rewards));
    }
}

#[test]
fn refilling_costs_more_and_nothing_costs_what_it_says() {
    let lab = Lab::new();
    let run = |mode: &str, out: &str| {
        let args = RESPEND.replace("respend", mode).replace(" a ", out);
        lab.run(&args).fine();
        lab.metrics(out.trim()).split_off(1)
    };
    for line in run("false", " b ") {
        assert_eq!(number(&line, "sampling/completions"), BUDGET);
        let flat = number(&line, "frac_reward_zero_std");
        // Of groups that are all of one size the share that teaches is the rest.
        let taught = number(&line, "sampling/teaching_fraction");
        assert!((taught - (1.0 - flat)).abs() < 1e-12);
    }
    let (refilled, same) = (run("true", " c "), run("refill", " d "));
    assert_eq!(refilled, same);
    assert!(
        refilled
            .iter()
            .any(|line| number(line, "sampling/completions") > BUDGET)
    );
}

/// What a step draws in vain is counted where the metric says all that is drawn, and nowhere else.
#[test]
fn drafts_and_plans_are_those_of_every_draw_of_a_step() {
    let lab = Lab::new();
    let draft = format!("--draft model:{} --draft-tokens 2", lab.model().display());
    let args = RESPEND.replace("respend", "refill");
    lab.run(&format!("{args} {draft}")).fine();
    let mut dropped = 0.0;
    for line in &lab.metrics("a")[1..] {
        let drawn = number(line, "sampling/completions");
        assert_eq!(number(line, "curriculum/completions"), drawn);
        let kept = groups(&lab, line["step"].as_u64().unwrap());
        let kept = || kept.iter().flatten().map(|r| &r.completion);
        let logged: u32 = kept().map(|c| c.telemetry.draft_tokens).sum();
        let counted = number(line, "spec_decode/num_draft_tokens");
        let all_are_kept = drawn == kept().count() as f64;
        assert_eq!(counted == f64::from(logged), all_are_kept, "{line:?}");
        assert!(counted >= f64::from(logged), "{line:?}");
        let at = |i: u32| {
            number(
                line,
                &format!("spec_decode/num_accepted_tokens_per_pos/{i}"),
            )
        };
        assert_eq!(
            at(0) + at(1),
            number(line, "spec_decode/num_accepted_tokens")
        );
        dropped += number(line, "sampling/dropped_groups");
    }
    assert!(dropped > 0.0);
}

/// A reward that asks for nothing gives every completion the same.
#[test]
fn a_step_without_a_group_has_no_reward_and_says_so() {
    let plugins = r#"[{"source":"reward-format","config":{"tags":[],"answer":false}}]"#;
    for (mode, drawn) in [("respend", 7), ("refill", 16), ("false", 4)] {
        let lab = Lab::new();
        let mode_flag = format!("--set dynamic_sampling={mode}");
        let args =
            format!("--config run.yaml --out a --steps 2 --set plugins={plugins} {mode_flag}");
        let ended = lab.run(&args).fine();
        let text = std::fs::read_to_string(lab.path("a/metrics.jsonl")).unwrap();
        assert!(!text.contains("-0.0,") && !text.contains("-0,"), "{text}");
        let undefined = [
            "reward",
            "reward_std",
            "frac_reward_zero_std",
            "completions/clipped_ratio",
            "loss",
            "grad_norm",
        ];
        for line in &lab.metrics("a")[1..] {
            for key in undefined {
                assert_eq!(line.contains_key(key), mode == "false", "{mode} {key}");
            }
            assert_eq!(number(line, "sampling/teaching_fraction"), 0.0);
            let groups = number(line, "sampling/dropped_groups");
            assert_eq!(groups == 0.0, mode == "false");
        }
        for step in [1, 2] {
            let line =
                format!("step {step}: no group teaches: all {drawn} drawn have equal rewards\n");
            assert!(ended.stderr.contains(&line), "{line}: {ended:?}");
        }
        let steps = "    steps  2, 2 of them with nothing to learn from\n";
        assert!(ended.stdout.contains(steps), "{ended:?}");
        let best = "     best  0.0 % at step 0: the model it started from\n";
        assert!(ended.stdout.contains(best), "{ended:?}");
        let results = lab.run("results a --json").fine().json();
        let metrics = results["metrics"].as_array().unwrap();
        let has = metrics.iter().any(|m| m["name"] == "reward");
        assert_eq!(has, mode == "false");
    }
}

#[test]
fn a_bucket_without_rows_does_not_count_them() {
    let lab = Lab::new();
    lab.with_kde();
    let run = |flags: &str| {
        lab.run(&format!("--config run.yaml --quiet --steps 1 {flags}"))
            .fine()
    };
    let table = run("--out a").stdout;
    assert!(table.contains("\n rollouts  all 4 each\n"), "{table}");
    let json = run("--out b --json").json();
    let expected = serde_json::json!([{"rows": null, "rollouts": 4.0}]);
    assert_eq!(json["buckets"], expected);
}

#[test]
fn an_epoch_is_shown_kept_and_quiet_in_json() {
    let lab = Lab::new();
    lab.with_kde();
    let run = |flags: &str| {
        lab.run(&format!("--config run.yaml --steps 8 {flags}"))
            .fine()
    };
    let ended = run("--out a");
    for text in [
        "Epoch 0: average rewards of 0 of 20 rows",
        "  bucket  ",
        "Epoch 1: ",
    ] {
        assert!(ended.stderr.contains(text), "{text}: {ended:?}");
    }
    let json = run("--out b --json");
    assert!(!json.stderr.contains("Epoch"), "{json:?}");
    let reports = read_curriculum(&lab.path("a")).unwrap();
    assert_eq!(reports, read_curriculum(&lab.path("b")).unwrap());
    assert_eq!(reports.first().unwrap().step, 1);
    let last = reports.last().unwrap();
    let table = &last.tables[0];
    assert!(
        table
            .title
            .starts_with("Epoch 1: average rewards of 20 of 20 rows")
    );
    let html = std::fs::read_to_string(lab.path("a/report.html")).unwrap();
    assert!(html.contains(&format!("<h3>{}</h3>", table.title)));
    assert!(html.contains("Rollouts per row of a bucket"));
    let results = lab.run("results a").fine().stdout;
    assert!(results.contains(&table.title), "{results}");
    let results = lab.run("results a --json").fine().json();
    assert_eq!(
        results["curriculum"]["tables"][0]["title"],
        table.title.as_str()
    );
}

#[test]
fn a_warning_is_said_once_a_run() {
    let lab = Lab::new();
    let plugins = "--plugin reward-math --plugin reward-inference";
    let ended = lab.run(&format!("--config run.yaml --quiet --out a {plugins}"));
    let stderr = ended.fine().stderr;
    let warning = "[reward-inference] Warn: accept_rate is undefined, no token was drafted: left out of \
        the total, not taken for 0 (hint: --draft ngram, or accept_weight: 0)";
    // Six steps and three evaluations.
    let lines: Vec<&str> = stderr.lines().collect();
    assert_eq!(lines, [warning, &format!("{warning} (said 9 times)")]);
}

#[test]
fn a_patience_that_cannot_run_out_is_warned_of() {
    let lab = Lab::new();
    let args = "--config run.yaml --quiet --out a --set eval_steps=0";
    let ended = lab.run(&format!("{args} --set early_stopping_patience=1"));
    let warning = "warning: early_stopping_patience 1 cannot end this run: with eval_steps 0 it has 0 \
                   evaluations before its last step\n";
    assert_eq!(ended.fine().stderr, warning);
}
