//! `replay`: a run's log says what its rewards said, and what others would have said.

use std::path::{Path, PathBuf};

use grpo_host::run::{Rollout, read_rollouts, rollout_files, write_rollouts};
use serde_json::Value;

use super::lab::Lab;

const TRAIN: &str = "train --config run.yaml --steps 3 --quiet";

type Edit = fn(&mut Rollout);

/// A run of three steps in `a`.
fn trained() -> Lab {
    let lab = Lab::new();
    lab.run(&format!("{TRAIN} --out a")).fine();
    lab
}

/// Rewrites the rollouts of the second step.
fn change(lab: &Lab, edit: impl FnOnce(&mut Vec<Rollout>)) {
    let root = lab.path("a");
    let (step, path) = rollout_files(&root).unwrap().swap_remove(1);
    let mut rollouts = read_rollouts(&path).unwrap();
    edit(&mut rollouts);
    write_rollouts(&root, step, &rollouts).unwrap();
}

fn bytes(root: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let files = rollout_files(root).unwrap().into_iter();
    let mut files: Vec<PathBuf> = files.map(|(_, path)| path).collect();
    files.extend(["config.yaml", "metrics.jsonl", "plugins.lock"].map(|name| root.join(name)));
    let read = |path: PathBuf| (path.clone(), std::fs::read(path).unwrap());
    files.into_iter().map(read).collect()
}

#[test]
fn the_built_in_run_is_what_its_rewards_say() {
    let lab = Lab::new();
    // Three rewards, one of which looks at telemetry and at its siblings.
    lab.run("train --steps 2 --set eval_rows=4 --out a --quiet")
        .fine();
    let json = lab.run("replay a --json").fine().json();
    assert_eq!((&json["steps"], &json["differing"]), (&2.into(), &0.into()));
    let samples = lab.completions("a").len();
    assert!(samples > 0);
    assert_eq!(json["samples"], samples);
    assert_eq!(json["first"], Value::Null);
    let names: Vec<&Value> = json["plugins"]
        .as_array()
        .unwrap()
        .iter()
        .map(|p| &p["name"])
        .collect();
    assert_eq!(names, ["reward-math", "reward-format", "reward-inference"]);
}

#[test]
fn waves_that_were_scored_beside_generation_are_replayed() {
    let lab = Lab::new();
    lab.run("train --steps 1 --set eval_rows=4 --set scoring_waves=3 --out a --quiet")
        .fine();
    let logged = read_rollouts(&rollout_files(&lab.path("a")).unwrap()[0].1).unwrap();
    let waves: std::collections::BTreeSet<_> = logged.iter().map(|r| r.wave).collect();
    assert_eq!(waves, [Some(0), Some(1), Some(2)].into());
    let json = lab.run("replay a --json").fine().json();
    assert_eq!((&json["steps"], &json["differing"]), (&1.into(), &0.into()));
}

#[test]
fn a_group_scored_in_two_waves_is_replayed() {
    let lab = Lab::new();
    lab.run(&format!("{TRAIN} --set dynamic_sampling=respend --out a"))
        .fine();
    let files = rollout_files(&lab.path("a")).unwrap();
    let logged: Vec<Rollout> = files
        .iter()
        .flat_map(|(_, path)| read_rollouts(path).unwrap())
        .collect();
    let split = logged
        .windows(2)
        .any(|w| (w[0].step, w[0].group) == (w[1].step, w[1].group) && w[0].wave != w[1].wave);
    assert!(split, "no group was probed first");
    let ended = lab.run("replay a").fine();
    assert_eq!(
        ended.stdout,
        format!(
            "a: 3 steps, {} samples, 0 differ (reward-format)\n",
            logged.len()
        )
    );
}

/// The neighbour in the last bit.
fn flipped(x: f64) -> f64 {
    f64::from_bits(x.to_bits() ^ 1)
}

#[test]
fn one_changed_bit_or_byte_is_noticed() {
    let lab = trained();
    let logged = read_rollouts(&rollout_files(&lab.path("a")).unwrap()[1].1).unwrap();
    let place = 5;
    let edits: [(&str, Edit); 4] = [
        ("total is", |r| r.reward = r.reward.map(flipped)),
        ("reward-format is", |r| r.parts[0].1 = flipped(r.parts[0].1)),
        ("reward-format/gone is nothing", |r| {
            r.parts.push(("reward-format/gone".to_owned(), 1.0))
        }),
        ("was logged as nothing", |r| r.reward = None),
    ];
    for (says, edit) in edits {
        change(&lab, |rollouts| edit(&mut rollouts[place]));
        let ended = lab.run("replay a --json");
        let (error, _) = ended.refused(1);
        assert!(
            error.starts_with("1 of 48 samples differ, the first: step 2 row ")
                && error.contains(says),
            "{error}"
        );
        let first = &ended.json()["first"];
        assert_eq!(
            (&first["step"], &first["row"]),
            (&2.into(), &logged[place].row_id.into())
        );
        change(&lab, |rollouts| rollouts.clone_from(&logged));
    }
    lab.run("replay a").fine();
    // The reward of this run asks for a letter from a to m.
    let letter = |c: char| ('a'..='m').contains(&c);
    let with = logged
        .iter()
        .position(|r| r.completion.text.chars().filter(|c| letter(*c)).count() == 1);
    let with = with.unwrap();
    change(&lab, |rollouts| {
        let text = &mut rollouts[with].completion.text;
        *text = text.replace(letter, "z");
    });
    let error = lab.run("replay a").refused(1).0.to_owned();
    assert!(error.starts_with("1 of 48 samples differ"), "{error}");
    change(&lab, |rollouts| rollouts[0].row.push(' '));
    let ended = lab.run("replay a");
    let (error, hint) = ended.refused(1);
    assert!(
        error.ends_with("samples of group 0 differ in row or prompt"),
        "{error}"
    );
    assert_eq!(hint, "the file was changed after the run wrote it");
}

#[test]
fn another_reward_is_compared_and_the_run_left_alone() {
    let lab = trained();
    let before = bytes(&lab.path("a"));
    let other = "plugins:\n  - source: reward-format\n    weight: -2\n    config: { tags: [], answer: false, pattern: \"[a-m]\" }\n";
    lab.write("other.yaml", other);
    let json = lab
        .run("replay a --config other.yaml --json --out c.html")
        .fine()
        .json();
    // Minus twice the run's own reward.
    assert_eq!(json["old"]["skipped"], 0);
    let mean = |side: &str| json[side]["totals"]["mean"].as_f64().unwrap();
    assert!(mean("old") > 0.0, "{json}");
    assert!((mean("new") + 2.0 * mean("old")).abs() < 1e-12);
    assert!((json["pearson"].as_f64().unwrap() + 1.0).abs() < 1e-12);
    let taught = lab.path("a");
    let files = rollout_files(&taught).unwrap();
    let logged = files
        .iter()
        .flat_map(|(_, path)| read_rollouts(path).unwrap());
    let advantages = logged.filter(|r| r.advantage != 0.0).count();
    assert_eq!(json["advantages"]["sign_flips"], advantages);
    assert_eq!(json["advantages"]["to_or_from_zero"], 0);
    assert_eq!(json["per_step"].as_array().unwrap().len(), 3);
    assert!(json["most_changed"].as_array().unwrap().len() <= 20);
    let html = std::fs::read_to_string(lab.path("c.html")).unwrap();
    assert_eq!(html.matches("<svg").count(), 4);
    assert!(!html.contains("NaN") && !html.contains("inf"));
    let text = lab.run("replay a --plugin reward-math").fine().stdout;
    for part in [
        "logged ",
        "new ",
        "correlation of totals",
        "change their sign",
        "groups of equal reward",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert!(!text.contains("NaN"), "{text}");
    assert_eq!(bytes(&taught), before);
}

#[test]
fn what_cannot_be_replayed_is_said_so() {
    let lab = trained();
    let error = lab.run("replay none").refused(1).0.to_owned();
    assert_eq!(error, "none is not a run directory: it has no config.yaml");
    std::fs::create_dir(lab.path("young")).unwrap();
    lab.write("young/config.yaml", "");
    assert_eq!(
        lab.run("replay young").refused(1),
        (
            "young has no rollouts",
            "a run writes them at the end of each step"
        )
    );
    assert_eq!(
        lab.run("replay a --plugin formatter-chat").refused(2).0,
        "--plugin names no reward"
    );
    lab.run("replay a --out c.html").refused(2);
    lab.run("replay a --plugin reward-math --out c.svg")
        .refused(2);
    // What a killed run leaves is no rollout file; a step that went missing is told of.
    lab.write("a/rollouts/.tmp-x", "PAR1");
    std::fs::remove_file(lab.path("a/rollouts/step-000001.parquet")).unwrap();
    let ended = lab.run("replay a --json").fine();
    assert_eq!(
        (&ended.json()["steps"], &ended.json()["missing_steps"]),
        (&2.into(), &1.into())
    );
    assert!(
        ended
            .stderr
            .contains("1 steps have no rollouts, the first of them step 1"),
        "{ended:?}"
    );
    let last = lab.path("a/rollouts/step-000003.parquet");
    let whole = std::fs::read(&last).unwrap();
    std::fs::write(&last, &whole[..whole.len() / 2]).unwrap();
    let ended = lab.run("replay a");
    let (error, hint) = ended.refused(1);
    assert!(
        error.starts_with("a/rollouts/step-000003.parquet: "),
        "{error}"
    );
    assert!(hint.starts_with("the file is damaged"), "{hint}");
    std::fs::write(&last, &whole).unwrap();
    let (step, path) = rollout_files(&lab.path("a")).unwrap().swap_remove(0);
    let mut old = read_rollouts(&path).unwrap();
    old.iter_mut().for_each(|r| r.wave = None);
    write_rollouts(&lab.path("a"), step, &old).unwrap();
    let error = lab.run("replay a").refused(1).0.to_owned();
    assert!(
        error.ends_with("has no column `wave`, which says what rewards saw in one batch"),
        "{error}"
    );
}

#[test]
fn a_component_that_has_changed_is_refused() {
    let lab = Lab::new();
    let dist = Path::new(env!("CARGO_MANIFEST_DIR")).join("../plugins/dist");
    let put = |name: &str| std::fs::copy(dist.join(name), lab.path("own.wasm")).unwrap();
    put("reward-math.wasm");
    lab.run(&format!("{TRAIN} --plugin own.wasm --out a"))
        .fine();
    lab.run("replay a").fine();
    put("reward-format.wasm");
    let ended = lab.run("replay a");
    let (error, hint) = ended.refused(1);
    assert!(
        error.starts_with("plugin `own` has changed since the run began: it is sha256:"),
        "{error}"
    );
    assert!(hint.starts_with("put the component back"), "{hint}");
}

#[test]
fn figures_never_go_into_the_run_and_nothing_is_scored_for_a_place_that_cannot_be() {
    let lab = Lab::new();
    lab.run(&format!("{TRAIN} --out a")).fine();
    let before = std::fs::read(lab.path("a/report.html")).unwrap();
    std::fs::create_dir(lab.path("folder.html")).unwrap();
    for (out, reason) in [
        (
            "a/report.html",
            "it is inside the run, which replay leaves as it is",
        ),
        (
            "a/rollouts/x.html",
            "it is inside the run, which replay leaves as it is",
        ),
        ("nosuch/x.html", "its folder does not exist"),
        ("folder.html", "it is a folder"),
    ] {
        let ended = lab.run(&format!("replay a --plugin reward-math --out {out}"));
        let (error, hint) = ended.refused(1);
        assert_eq!(error, format!("cannot write {out}: {reason}"));
        assert_eq!(hint, "give --out a file in another folder, one that exists");
        assert_eq!(ended.stdout, "");
    }
    assert_eq!(std::fs::read(lab.path("a/report.html")).unwrap(), before);
    lab.run("replay a --plugin reward-math --out x.html").fine();
    assert!(lab.path("x.html").exists());
}
