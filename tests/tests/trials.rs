//! Formatters and curricula that took another's place and fail: the step is what it would have been without them.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "clippy counts only functions marked as tests as tests"
)]

#[path = "hostile/guest.rs"]
#[allow(dead_code, reason = "the hostile suite uses the rest")]
mod guest;
#[path = "hostile/role_guests.rs"]
mod role_guests;

use std::sync::Arc;

use grpo_host::{
    cli::Environment,
    config::{PluginConfig, RunConfig},
    grpo::filter::DynamicSampling,
    judge::Panel,
    placement::{Passes, Place},
    plugin::{Limits, LogLine, Plugin, PluginHost},
    policy::{Mode, Policy},
    run::TrainState,
    setup,
    trainer::{RolledBack, StepReport, Supervision, Trainer},
    types::{PluginId, Role, Seat},
};
use serde_json::json;

use role_guests::{formatting, planning};

fn run_config() -> RunConfig {
    let mut config = RunConfig::default();
    config.generation.prompts_per_step = 4;
    config.generation.num_generations = 4;
    config.generation.max_completion_length = 8;
    config.eval.eval_rows = 2;
    config
}

fn trainer(config: &RunConfig) -> Trainer<'_> {
    let environment = Environment::default();
    let quiet = Arc::new(|_: LogLine<'_>| {});
    let plugins = setup::plugins(config, &environment, &mut |_| {}, quiet).unwrap();
    let model = setup::model(config, &environment, &mut |_| {}).unwrap();
    let capacity = setup::capacity(&config.generation, model.spec.max_position_embeddings);
    let policy = Policy::new(
        model,
        "embedded",
        Mode::of(config),
        Passes::of(config),
        capacity,
        &Place::of(config, &environment),
    );
    Trainer {
        swaps: Supervision::new(config, &plugins.locked),
        config,
        policy: policy.unwrap(),
        plugins,
        rows: setup::rows(config, &environment, &mut |_| {}).unwrap(),
        state: TrainState::default(),
        judges: Panel::default(),
    }
}

fn load(bytes: &[u8]) -> Plugin {
    let host = PluginHost::new(Arc::new(|_: LogLine<'_>| {})).unwrap();
    host.load("evil", bytes, &json!({}), &Limits::default())
        .unwrap()
}

/// Puts a guest in the place of the one of its role for the coming step.
fn promote(trainer: &mut Trainer<'_>, bytes: &[u8]) {
    let settings = PluginConfig {
        source: "evil.wasm".to_owned(),
        ..PluginConfig::default()
    };
    let since = trainer.state.step + 1;
    trainer.promote(0, load(bytes), settings, since);
}

/// Row, prompt, tokens, log-probs and reward of a completion.
type Drawn = (u64, String, Vec<u32>, Vec<f32>, String);

/// Every completion of a step.
fn drawn(report: &StepReport) -> Vec<Drawn> {
    let mut all = Vec::new();
    for group in &report.groups {
        let rollouts = &group.rollouts;
        for (c, score) in rollouts.completions.iter().zip(&group.scores) {
            let (tokens, logprobs) = (c.tokens.clone(), c.logprobs.clone());
            let (prompt, score) = (rollouts.prompt.clone(), format!("{score:?}"));
            all.push((rollouts.row, prompt, tokens, logprobs, score));
        }
    }
    all
}

/// The formatter that the log is to name for each wave.
fn formatters_of(report: &StepReport) -> Vec<(u32, &str)> {
    let of = |ids: &'_ [PluginId]| {
        ids.iter()
            .position(|id| id.role == Role::Formatter)
            .unwrap()
    };
    let waves = report.scored_by.iter();
    waves
        .map(|(wave, ids)| (*wave, ids[of(ids)].name.as_str()))
        .collect()
}

fn one(rolled_back: Vec<RolledBack>) -> RolledBack {
    assert_eq!(rolled_back.len(), 1, "{rolled_back:?}");
    rolled_back.into_iter().next().unwrap()
}

#[test]
fn a_formatter_that_fails_gives_way_and_the_wave_is_made_anew() {
    let trap = "(unreachable)";
    let guests = [
        (formatting(trap, "", 1), "format, row"),
        (formatting("", trap, 1), "parse: trapped"),
        // More than the context holds.
        (formatting("", "", 60_000), "the prompts of all"),
    ];
    for waves in [1, 2] {
        let mut config = run_config();
        config.generation.scoring_waves = waves;
        let expected = drawn(&trainer(&config).step(&mut |_| {}).unwrap());
        assert_eq!(expected.len(), 16);
        for (bytes, reason) in &guests {
            let mut trainer = trainer(&config);
            promote(&mut trainer, bytes);
            let report = trainer.step(&mut |_| {}).unwrap();
            assert_eq!(drawn(&report), expected, "{reason}, {waves} waves");
            for (_, name) in formatters_of(&report) {
                assert_eq!(name, "formatter-chat");
            }
            let gone = one(trainer.take_rolled_back());
            let seat = Seat {
                role: Role::Formatter,
                slot: 0,
            };
            assert_eq!((gone.step, gone.wave, gone.seat), (1, 0, seat));
            assert_eq!(
                (gone.from.id.name.as_str(), gone.from.since_step),
                ("evil", 1)
            );
            assert_eq!(gone.to.id.name, "formatter-chat");
            assert_eq!(gone.settings.source, "formatter-chat");
            assert!(gone.reason.contains(reason), "{}", gone.reason);
            assert!(trainer.plugins.locked.contains(&gone.to));
            assert!(trainer.plugins.locked.iter().all(|l| l.id.name != "evil"));
        }
    }
}

/// A formatter that is not on trial ends the run, as ever.
#[test]
fn a_formatter_without_one_before_ends_the_step() {
    let config = run_config();
    let mut trainer = trainer(&config);
    promote(&mut trainer, &formatting("(unreachable)", "", 1));
    let formatter = Role::Formatter;
    trainer.forget_predecessor(Seat {
        role: formatter,
        slot: 0,
    });
    let error = trainer.step(&mut |_| {}).err().unwrap().to_string();
    assert!(error.contains("trapped"), "{error}");
}

#[test]
fn a_promoted_formatter_makes_the_prompts_and_an_evaluation_rolls_it_back_too() {
    let config = run_config();
    let mut trainer = trainer(&config);
    // Two rows are those of an evaluation.
    let traps_at_two = "(if (i32.eq (local.get $n) (i32.const 2)) (then (unreachable)))";
    promote(&mut trainer, &formatting(traps_at_two, "", 1));
    let report = trainer.step(&mut |_| {}).unwrap();
    assert!(drawn(&report).iter().all(|(_, prompt, ..)| prompt == "x"));
    assert_eq!(formatters_of(&report), [(0, "evil")]);
    assert!(trainer.take_rolled_back().is_empty());
    trainer.evaluate(&mut |_| {}).unwrap();
    let gone = one(trainer.take_rolled_back());
    assert_eq!((gone.step, gone.wave), (2, 0));
    let report = trainer.step(&mut |_| {}).unwrap();
    assert_eq!(formatters_of(&report), [(0, "formatter-chat")]);
    assert!(drawn(&report).iter().all(|(_, prompt, ..)| prompt != "x"));
}

/// The probe of a group has a prompt; what follows it after a rollback would have another.
#[test]
fn a_rollback_between_probe_and_rest_mixes_no_prompts_in_a_group() {
    let mut config = run_config();
    config.loss.dynamic_sampling = DynamicSampling::Respend;
    config.loss.max_refills = 0;
    config.generation.num_generations = 8;
    let settings = json!({"tags": [], "answer": false, "pattern": "[0-4]"});
    config.plugins.plugins.push(PluginConfig {
        source: "reward-format".to_owned(),
        config: settings.as_object().unwrap().clone(),
        ..PluginConfig::default()
    });
    let mut trainer = trainer(&config);
    // Four groups are probed, and of those that differ the rest is drawn.
    let late = "(if (i32.ne (local.get $n) (i32.const 4)) (then (unreachable)))";
    promote(&mut trainer, &formatting(late, "", 1));
    for _ in 0..40 {
        let report = trainer.step(&mut |_| {}).unwrap();
        let gone = trainer.take_rolled_back();
        for group in &report.groups {
            assert_eq!(group.rollouts.completions.len(), group.scores.len());
            assert_eq!(
                group.rollouts.completions.len(),
                group.rollouts.parsed.len()
            );
        }
        if gone.is_empty() {
            continue;
        }
        assert_eq!(one(gone).wave, 1);
        assert!(report.groups.iter().all(|g| g.rollouts.prompt == "x"));
        assert!(report.groups.iter().all(|g| g.scores.len() == 4));
        return;
    }
    panic!("no group had a rest in 40 steps");
}

#[test]
fn a_curriculum_gets_the_state_or_begins_anew_and_gives_way_to_the_one_before() {
    let config = run_config();
    let (mut plain, mut swapped) = (trainer(&config), trainer(&config));
    for trainer in [&mut plain, &mut swapped] {
        trainer.step(&mut |_| {}).unwrap();
    }
    let state = swapped.state.curriculum.clone();
    // Refuses every state but an empty one by trapping, and at step 3 that too.
    let picky = "(if (local.get 1) (then (unreachable)))
        (if (i64.ge_u (local.get 4) (i64.const 3)) (then (unreachable)))";
    promote(&mut swapped, &planning(picky, ""));
    let report = swapped.step(&mut |_| {}).unwrap();
    assert_eq!(report.groups.len(), 1);
    assert_eq!(
        (report.groups[0].rollouts.row, report.groups[0].scores.len()),
        (0, 4)
    );
    let notes = std::mem::take(&mut swapped.swaps.notes);
    assert!(
        notes.len() == 1 && notes[0].starts_with("`evil` begins with an empty state"),
        "{notes:?}"
    );
    assert!(notes[0].contains("trapped"), "{notes:?}");
    assert_eq!(swapped.state.curriculum, b"");
    assert_eq!(swapped.state.curriculum_before.as_ref(), Some(&state));
    swapped.step(&mut |_| {}).unwrap();
    assert!(swapped.take_rolled_back().is_empty());
    let report = swapped.step(&mut |_| {}).unwrap();
    let gone = one(swapped.take_rolled_back());
    assert_eq!(
        (gone.step, gone.wave, gone.seat.role),
        (4, 0, Role::Curriculum)
    );
    assert!(gone.reason.contains("plan: trapped"), "{}", gone.reason);
    assert_eq!(gone.to.id.name, "curriculum-uniform");
    // Where it left off, as if the other had not been.
    let rows = |report: &StepReport| {
        report
            .groups
            .iter()
            .map(|g| g.rollouts.row)
            .collect::<Vec<_>>()
    };
    assert_eq!(rows(&report), rows(&plain.step(&mut |_| {}).unwrap()));
    let names: Vec<&str> = report.scored_by[0]
        .1
        .iter()
        .map(|id| id.name.as_str())
        .collect();
    assert!(
        names.contains(&"curriculum-uniform") && !names.contains(&"evil"),
        "{names:?}"
    );
}

#[test]
fn a_curriculum_that_fails_at_once_leaves_the_run_as_it_was() {
    let config = run_config();
    let (mut plain, mut swapped) = (trainer(&config), trainer(&config));
    promote(
        &mut swapped,
        &planning("(i32.store (i32.const 12) (i32.const 0))", ""),
    );
    for _ in 0..2 {
        let (a, b) = (
            plain.step(&mut |_| {}).unwrap(),
            swapped.step(&mut |_| {}).unwrap(),
        );
        assert_eq!(drawn(&a), drawn(&b));
    }
    let gone = one(swapped.take_rolled_back());
    assert!(
        gone.reason.contains("a plan without picks"),
        "{}",
        gone.reason
    );
    assert_eq!(plain.state.curriculum, swapped.state.curriculum);
    assert!(swapped.swaps.notes.is_empty());
}

/// One that understands the state goes on from it.
#[test]
fn a_curriculum_of_the_same_kind_goes_on_where_the_one_before_stood() {
    let config = run_config();
    let (mut plain, mut swapped) = (trainer(&config), trainer(&config));
    for trainer in [&mut plain, &mut swapped] {
        trainer.step(&mut |_| {}).unwrap();
    }
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../plugins/dist/curriculum-uniform.wasm");
    promote(&mut swapped, &std::fs::read(path).unwrap());
    let (a, b) = (
        plain.step(&mut |_| {}).unwrap(),
        swapped.step(&mut |_| {}).unwrap(),
    );
    assert_eq!(drawn(&a), drawn(&b));
    assert!(swapped.swaps.notes.is_empty() && swapped.take_rolled_back().is_empty());
    assert_eq!(plain.state.curriculum, swapped.state.curriculum);
}
