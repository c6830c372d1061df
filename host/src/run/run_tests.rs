//! Whole or not at all: torn lines, crashes between write and rename, full disks, resuming.

use serde_json::{Map, Value, json};

use super::*;
use crate::types::{Completion, Finish, Outcome, Parsed, PluginId, Role, Telemetry};

const KEEP: Keep = Keep {
    last: 2,
    best: true,
};

fn start() -> (tempfile::TempDir, RunDir) {
    let folder = tempfile::tempdir().unwrap();
    let run = RunDir::create(&folder.path().join("run"), "seed: 7\n").unwrap();
    (folder, run)
}

fn values(reward: f64) -> Map<String, Value> {
    [("reward".to_owned(), json!(reward))].into_iter().collect()
}

fn state(step: u64) -> TrainState {
    TrainState {
        step,
        seed: 7,
        tokens: 10 * step,
        curriculum: vec![0, 255, step as u8],
        outcomes: vec![Outcome {
            row: 3,
            rewards: vec![0.1, 1.0 / 3.0],
            skipped: 1,
        }],
        wall_s: 0.1 + 0.2,
        ..TrainState::default()
    }
}

fn save(run: &RunDir, state: &TrainState) -> PathBuf {
    let writer = run.checkpoint(state.step).unwrap();
    fs::write(writer.path().join("model.safetensors"), b"weights").unwrap();
    writer.commit(state, KEEP).unwrap()
}

fn names(folder: &Path) -> Vec<String> {
    let entries = atomic::entries(folder).unwrap();
    entries
        .iter()
        .map(|p| p.file_name().unwrap().to_string_lossy().into_owned())
        .collect()
}

fn rollout(step: u64, index: u32) -> Rollout {
    let plugin = PluginId {
        role: Role::Reward,
        name: "math".into(),
        digest: "sha256:ab".into(),
    };
    Rollout {
        step,
        row_id: u64::MAX,
        row: "{\"a\":\"ü\"}".into(),
        group: 1,
        wave: Some(2),
        prompt: "<b>2+2?</b>".into(),
        prompt_ids: vec![1, u32::MAX],
        completion: Completion {
            request: 9,
            index,
            tokens: (0..index).collect(),
            logprobs: vec![-0.1; index as usize],
            policy_logprobs: vec![-1.0 / 3.0; index as usize],
            text: "<script>alert(1)</script>".into(),
            finish: Finish::Length,
            telemetry: Telemetry {
                latency_ms: 1.5,
                kv_bytes: 1 << 40,
                ..Telemetry::default()
            },
            drafts: 3,
            accepted_per_pos: vec![2, 1],
            top: Vec::new(),
        },
        parsed: Parsed {
            reasoning: None,
            answer: Some(String::new()),
        },
        reward: (index > 0).then_some(0.1),
        parts: vec![("math/exact".into(), 1.0), ("math/exact".into(), 0.1)],
        advantage: -0.7,
        skip: (index == 0).then(|| "deadline".into()),
        plugins: vec![plugin],
    }
}

#[test]
fn a_run_is_never_overwritten_nor_shared() {
    let (_folder, run) = start();
    let root = run.root().to_owned();
    let again = RunDir::create(&root, "seed: 8\n").unwrap_err();
    assert!(matches!(again, RunError::Exists { .. }));
    assert!(again.hint().unwrap().contains("--resume"));
    assert!(matches!(
        RunDir::resume(&root).unwrap_err(),
        RunError::Locked { .. }
    ));
    assert_eq!(run.config().unwrap(), "seed: 7\n");
    drop(run);
    assert!(RunDir::resume(&root).unwrap().checkpoint.is_none());
    let other = RunDir::resume(root.parent().unwrap()).unwrap_err();
    assert!(matches!(other, RunError::NotARun { .. }));
}

#[test]
fn state_comes_back_bit_for_bit() {
    let (_folder, run) = start();
    let path = save(&run, &state(4));
    assert_eq!(
        names(&path),
        [
            "curriculum.bin",
            "manifest.json",
            "model.safetensors",
            "state.json"
        ]
    );
    let found = latest(run.root()).unwrap().unwrap();
    assert_eq!((found.path, found.state), (path, state(4)));
}

#[test]
fn resuming_cuts_what_lies_after_the_checkpoint() {
    let (_folder, run) = start();
    let root = run.root().to_owned();
    let mut metrics = run.metrics().unwrap();
    for step in 1..=5 {
        metrics.append(step, &values(step as f64 / 10.0)).unwrap();
        write_rollouts(&root, step, &[rollout(step, 1)]).unwrap();
        if step == 3 {
            save(&run, &state(3));
        }
    }
    let locked = |name: &str, since_step| LockedPlugin {
        id: PluginId {
            role: Role::Reward,
            name: name.into(),
            digest: "sha256:00".into(),
        },
        source: "embedded".into(),
        weight: Some(0.5),
        since_step,
        grants: None,
    };
    run.write_plugins_lock(&[locked("a", 1), locked("b", 3), locked("c", 4)])
        .unwrap();
    let whole = fs::read_to_string(root.join("metrics.jsonl")).unwrap();
    let first_three: String = whole.split_inclusive('\n').take(3).collect();
    // Torn by a kill: no line feed, and not even JSON.
    fs::write(
        root.join("metrics.jsonl"),
        format!("{whole}{{\"step\":6,\"rew"),
    )
    .unwrap();
    // Killed between writing and renaming.
    fs::create_dir(root.join("checkpoints/.tmp-step-5")).unwrap();
    fs::write(root.join("rollouts/.tmp-x"), "half").unwrap();
    drop((run, metrics));

    assert_eq!(read_metrics(&root).unwrap().len(), 5);
    let resumed = RunDir::resume(&root).unwrap();
    assert_eq!(resumed.checkpoint.unwrap().state, state(3));
    assert_eq!(
        fs::read_to_string(root.join("metrics.jsonl")).unwrap(),
        first_three
    );
    let files = [
        "step-000001.parquet",
        "step-000002.parquet",
        "step-000003.parquet",
    ];
    assert_eq!(names(&root.join("rollouts")), files);
    assert_eq!(names(&root.join("checkpoints")), ["step-3"]);
    assert_eq!(
        read_plugins_lock(&root).unwrap(),
        [locked("a", 1), locked("b", 3)]
    );

    // Going on gives the file that an uninterrupted run has.
    let mut metrics = resumed.dir.metrics().unwrap();
    for step in 4..=5 {
        metrics.append(step, &values(step as f64 / 10.0)).unwrap();
    }
    assert_eq!(
        fs::read_to_string(root.join("metrics.jsonl")).unwrap(),
        whole
    );
}

#[test]
fn a_run_killed_before_its_first_checkpoint_starts_over() {
    let (_folder, run) = start();
    let root = run.root().to_owned();
    run.metrics().unwrap().append(1, &values(0.5)).unwrap();
    write_rollouts(&root, 1, &[rollout(1, 1)]).unwrap();
    drop(run);
    assert!(RunDir::resume(&root).unwrap().checkpoint.is_none());
    assert_eq!(
        read_metrics(&root).unwrap(),
        Vec::<Map<String, Value>>::new()
    );
    assert!(names(&root.join("rollouts")).is_empty());
}

fn tables(cell: &str) -> Map<String, Value> {
    let table = json!({"title": "<t>", "columns": ["n"], "rows": [[cell]], "notes": ["fine"]});
    let line = json!({"epoch": 0.5, "tables": [table]});
    line.as_object().unwrap().clone()
}

#[test]
fn reports_of_the_curriculum_are_cut_with_the_metrics() {
    let (_folder, run) = start();
    let root = run.root().to_owned();
    let mut log = run.curriculum().unwrap();
    for step in [1, 3, 4] {
        log.append(step, &tables(&step.to_string())).unwrap();
    }
    save(&run, &state(3));
    drop(run);
    let torn = fs::read(root.join("curriculum.jsonl")).unwrap();
    fs::write(root.join("curriculum.jsonl"), &torn[..torn.len() - 1]).unwrap();
    let run = RunDir::resume(&root).unwrap().dir;
    let found = read_curriculum(&root).unwrap();
    let steps: Vec<u64> = found.iter().map(|report| report.step).collect();
    assert_eq!(steps, [1, 3]);
    assert_eq!(found[1].tables[0].rows, [["3"]]);
    let mut log = run.curriculum().unwrap();
    log.append(4, &tables("<b>4</b>")).unwrap();
    run.metrics().unwrap().append(4, &values(0.5)).unwrap();
    assert_eq!(summarise(&root).unwrap().curriculum.unwrap().step, 4);
    write_report(&root).unwrap();
    let html = fs::read_to_string(root.join("report.html")).unwrap();
    assert!(html.contains("<h3>&lt;t&gt;</h3>") && html.contains("<p>fine</p>"));
    assert!(html.contains("<td>&lt;b&gt;4&lt;/b&gt;</td>"), "{html}");
    assert!(!html.contains("<td class=\"n\">3</td></tr></table>\n<p>"));
}

#[test]
fn a_ragged_table_in_a_file_is_an_error() {
    let (_folder, run) = start();
    let line =
        r#"{"step":1,"epoch":0,"tables":[{"title":"t","columns":["a"],"rows":[[]],"notes":[]}]}"#;
    fs::write(run.root().join("curriculum.jsonl"), format!("{line}\n")).unwrap();
    let error = read_curriculum(run.root()).unwrap_err().to_string();
    assert!(
        error.ends_with("curriculum.jsonl line 1: table `t` is ragged"),
        "{error}"
    );
}

#[test]
fn the_report_draws_a_line_for_every_bucket() {
    let (_folder, run) = start();
    let mut metrics = run.metrics().unwrap();
    let bucket = |i: u32, name: &str| format!("curriculum/bucket_{i}/{name}");
    for (step, buckets) in [(1, 1), (2, 6)] {
        let values = (0..buckets).flat_map(|i| {
            [("rollouts", 4.0), ("share", 0.25)].map(|(n, v)| (bucket(i, n), json!(v)))
        });
        metrics.append(step, &values.collect()).unwrap();
    }
    write_report(run.root()).unwrap();
    let html = fs::read_to_string(run.root().join("report.html")).unwrap();
    for title in [
        "Rollouts per row of a bucket",
        "Share of the rows in a bucket",
    ] {
        let figure = html.split("<figure>").find(|f| f.contains(title)).unwrap();
        assert_eq!(figure.matches("<polyline").count(), 6, "{figure}");
        let colours: std::collections::BTreeSet<_> =
            figure.split("color:").skip(1).map(|c| &c[..7]).collect();
        assert_eq!(colours.len(), 6, "{colours:?}");
    }
}

#[test]
fn malformed_metrics_before_the_end_are_an_error() {
    let (_folder, run) = start();
    fs::write(
        run.root().join("metrics.jsonl"),
        "{\"step\":1}\n{\"step\":\n{\"step\":3}\n",
    )
    .unwrap();
    let error = read_metrics(run.root()).unwrap_err();
    assert!(
        matches!(error, RunError::StepLog { line: 2, .. }),
        "{error}"
    );
}

#[test]
fn damaged_checkpoints_are_passed_over() {
    let (_folder, run) = start();
    save(&run, &state(1));
    let second = save(&run, &state(2));
    let newest = |run: &RunDir| latest(run.root()).unwrap().unwrap().state.step;
    assert_eq!(newest(&run), 2);
    // The curriculum of another time, a cut state, a folder under a false name.
    fs::write(second.join("curriculum.bin"), b"other").unwrap();
    assert_eq!(newest(&run), 1);
    fs::write(second.join("state.json"), "{\"format\": 2,").unwrap();
    assert_eq!(newest(&run), 1);
    let first = second.with_file_name("step-1");
    fs::create_dir(second.with_file_name("step-9")).unwrap();
    for file in names(&first) {
        fs::copy(
            first.join(&file),
            second.with_file_name("step-9").join(file),
        )
        .unwrap();
    }
    assert_eq!(newest(&run), 1);
}

/// One rule for every file: a checkpoint is as it was written or it is not used.
#[test]
fn a_resumed_run_goes_back_behind_any_damage() {
    for (file, bytes, reason) in [
        ("curriculum.bin", Some("\0\0\0"), "is not what was written"),
        (
            "model.safetensors",
            Some("weight"),
            "has 6 bytes instead of 7",
        ),
        (
            "model.safetensors",
            Some("wejghts"),
            "is not what was written",
        ),
        ("model.safetensors", None, "cannot be read"),
        ("state.json", Some("{"), "has 1 bytes instead of "),
        ("manifest.json", Some("{"), "is not what was written"),
        ("manifest.json", None, "is missing"),
    ] {
        let (_folder, run) = start();
        save(&run, &state(1));
        let path = save(&run, &state(2)).join(file);
        match bytes {
            Some(bytes) => fs::write(&path, bytes).unwrap(),
            None => fs::remove_file(&path).unwrap(),
        }
        let root = run.root().to_owned();
        drop(run);
        let Resumed {
            checkpoint,
            damages,
            ..
        } = RunDir::resume(&root).unwrap();
        assert_eq!(checkpoint.unwrap().state, state(1), "{file}");
        let [damage] = &damages[..] else {
            panic!("{damages:?}")
        };
        assert_eq!(damage.path, path);
        assert!(damage.reason.starts_with(reason), "{damage}");
        assert_eq!(names(&root.join("checkpoints")), ["step-1"]);
    }
}

#[test]
fn the_last_ones_and_the_best_stay() {
    let (_folder, run) = start();
    let best = Some(Best {
        step: 2,
        accuracy: 0.75,
    });
    for step in 1..=5 {
        save(
            &run,
            &TrainState {
                best,
                ..state(step)
            },
        );
    }
    let folder = run.root().join("checkpoints");
    assert_eq!(names(&folder), ["step-2", "step-4", "step-5"]);
    // Again at the same step: replaced, nothing left aside.
    save(
        &run,
        &TrainState {
            tokens: 99,
            ..state(5)
        },
    );
    assert_eq!(names(&folder), ["step-4", "step-5"]);
    assert_eq!(latest(run.root()).unwrap().unwrap().state.tokens, 99);
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_leaves_the_previous_checkpoint() {
    let (_folder, run) = start();
    save(&run, &state(1));
    let writer = run.checkpoint(2).unwrap();
    // Every write to this device fails with ENOSPC.
    std::os::unix::fs::symlink("/dev/full", writer.path().join("state.json")).unwrap();
    let error = writer.commit(&state(2), KEEP).unwrap_err();
    assert!(
        matches!(&error, RunError::Write { path, source }
            if path.ends_with("state.json") && source.kind() == std::io::ErrorKind::StorageFull),
        "{error}"
    );
    assert!(error.hint().unwrap().contains("last checkpoint is intact"));
    assert_eq!(names(&run.root().join("checkpoints")), ["step-1"]);
    assert_eq!(latest(run.root()).unwrap().unwrap().state, state(1));
}

#[test]
fn a_writer_that_is_dropped_leaves_nothing() {
    let (_folder, run) = start();
    let writer = run.checkpoint(1).unwrap();
    fs::write(writer.path().join("half"), b"x").unwrap();
    drop(writer);
    assert!(names(&run.root().join("checkpoints")).is_empty());
}

#[test]
fn a_failing_atomic_write_keeps_the_old_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("f");
    atomic::write(&path, b"old").unwrap();
    let full = || std::io::Error::from(std::io::ErrorKind::StorageFull);
    atomic::write_with(&path, |_| Err(full())).unwrap_err();
    assert_eq!(fs::read(&path).unwrap(), b"old");
    assert_eq!(names(folder.path()), ["f"]);
}

#[test]
fn rollouts_come_back_as_they_were() {
    let (_folder, run) = start();
    let written: Vec<Rollout> = (0..4).map(|i| rollout(12, i)).collect();
    let path = write_rollouts(run.root(), 12, &written).unwrap();
    assert!(path.ends_with("rollouts/step-000012.parquet"));
    assert_eq!(read_rollouts(&path).unwrap(), written);
    assert_eq!(rollout_files(run.root()).unwrap(), [(12, path.clone())]);
    // A step in which everything was dropped still has a file.
    let path = write_rollouts(run.root(), 13, &[]).unwrap();
    assert_eq!(read_rollouts(&path).unwrap(), []);
    fs::write(&path, "PAR1").unwrap();
    assert!(matches!(
        read_rollouts(&path).unwrap_err(),
        RunError::Parquet { .. }
    ));
}

#[test]
fn results_and_report() {
    let (_folder, run) = start();
    let root = run.root();
    let mut metrics = run.metrics().unwrap();
    for (step, reward) in [(1, 0.25), (2, 1.0), (3, 0.5)] {
        metrics.append(step, &values(reward)).unwrap();
    }
    let extra = [
        ("eval_accuracy_strict".to_owned(), json!(0.5)),
        ("spec_decode/acceptance_rate".to_owned(), json!(0.75)),
        ("nan".to_owned(), json!(null)),
    ];
    metrics.append(4, &extra.into_iter().collect()).unwrap();
    write_rollouts(root, 4, &[rollout(4, 0), rollout(4, 3)]).unwrap();
    let summary = summarise(root).unwrap();
    assert_eq!(summary.steps, 4);
    let reward = summary.metric("reward").unwrap();
    assert_eq!(
        (reward.first, reward.last, reward.min, reward.max),
        (0.25, 0.5, 0.25, 1.0)
    );
    assert_eq!((reward.mean, reward.count), (1.75 / 3.0, 3));
    assert!(summary.metric("nan").is_none());

    write_report(root).unwrap();
    let html = fs::read_to_string(root.join("report.html")).unwrap();
    assert!(!html.contains("<script") && html.contains("&lt;script&gt;alert(1)&lt;/script&gt;"));
    assert_eq!(
        html.matches("<svg").count(),
        3,
        "reward, evaluation, acceptance"
    );
    assert!(html.contains("<figcaption>Draft tokens accepted (share)"));
    assert!(html.contains("skipped: deadline"));
    assert!(html.contains("<pre>seed: 7\n</pre>"));
    // Self-contained: nothing is fetched from anywhere.
    assert!(!html.contains("http"), "{html}");
}
