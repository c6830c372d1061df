//! Runs that are killed at some moment and resumed equal a run that nobody disturbed: the same metrics
//! but for the clock, the same completions, the same bytes of weights.

use std::{os::unix::process::ExitStatusExt, path::Path};

use super::lab::Lab;

const SIGKILL: i32 = 9;
const SIGXFSZ: i32 = 25;

fn kill_after(lab: &Lab, step: u64, args: &str) {
    let mut child = lab.run_until(step, "b", args);
    child.kill().unwrap();
    let status = child.wait().unwrap();
    assert_eq!(status.signal(), Some(SIGKILL), "it was still at work");
}

/// Ends the process in the middle of writing the first file larger than 64 KiB, which is in a checkpoint.
fn kill_in_checkpoint(lab: &Lab, step: u64, args: &str) {
    let status = lab.limited(64, false, args).status().unwrap();
    assert_eq!(status.signal(), Some(SIGXFSZ));
    let half = lab.path(&format!("b/checkpoints/.tmp-step-{step}"));
    assert!(half.is_dir(), "half a checkpoint is left");
}

#[track_caller]
fn assert_same_files(lab: &Lab, names: &[&str]) {
    for name in names {
        let read = |run: &str| std::fs::read(lab.path(run).join(name)).unwrap();
        assert!(read("a") == read("b"), "{name} differs");
    }
}

fn disturbed_equals_undisturbed(flags: &str, files: &[&str]) {
    disturbed_equals_undisturbed_in(&Lab::new(), flags, files);
}

fn disturbed_equals_undisturbed_in(lab: &Lab, flags: &str, files: &[&str]) {
    let start = |run: &str| format!("--config run.yaml --quiet --out {run} {flags}");
    lab.run(&start("a")).fine();
    let learned = |line: &serde_json::Map<_, serde_json::Value>| line["grad_norm"].as_f64();
    let lines = lab.metrics("a");
    assert!(lines[1..].iter().all(|line| learned(line) > Some(0.0)));

    // Before the first checkpoint there is nothing to go on from but the config.
    kill_after(lab, 0, &start("b"));
    kill_after(lab, 1, "--quiet --resume b");
    kill_in_checkpoint(lab, 2, "--quiet --resume b");
    assert_eq!(lab.checkpoints("b"), [".tmp-step-2"]);
    kill_after(lab, 3, "--quiet --resume b");
    kill_in_checkpoint(lab, 4, "--quiet --resume b");
    kill_after(lab, 5, "--quiet --resume b");
    // A line torn by the kill; and files of a step that will be made again.
    let metrics = lab.path("b/metrics.jsonl");
    let mut text = std::fs::read(&metrics).unwrap();
    text.extend_from_slice(b"{\"step\": 6, \"rew");
    std::fs::write(&metrics, text).unwrap();
    lab.run("--quiet --resume b").fine();

    assert_eq!(lab.metrics("b"), lab.metrics("a"));
    assert_eq!(lab.completions("b"), lab.completions("a"));
    assert_eq!(lab.checkpoints("b"), lab.checkpoints("a"));
    assert_same_files(lab, files);
    assert_same_files(lab, &["checkpoints/step-6/optimizer.safetensors"]);
    let changed = |run: &Path| std::fs::read(run.join("model/model.safetensors")).unwrap();
    let before = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/llama");
    let before = std::fs::read(before.join("model.safetensors")).unwrap();
    assert!(changed(&lab.path("a")) != before, "the weights moved");
}

#[test]
fn waves_that_are_scored_beside_generation() {
    disturbed_equals_undisturbed("--set scoring_waves=2", &["model/model.safetensors"]);
}

#[test]
fn full_fine_tuning_goes_on_as_if_never_killed() {
    disturbed_equals_undisturbed(
        "--set beta=0.05 --set num_iterations=2",
        &[
            "model/model.safetensors",
            "checkpoints/step-6/model/model.safetensors",
        ],
    );
}

#[test]
fn lora_goes_on_as_if_never_killed() {
    disturbed_equals_undisturbed(
        "--set lora={}",
        &[
            "model/model.safetensors",
            "adapter/adapter_model.safetensors",
            "checkpoints/step-6/adapter/adapter_model.safetensors",
        ],
    );
}

#[test]
fn a_budget_and_a_curriculum_go_on_as_if_never_killed() {
    let lab = Lab::new();
    lab.with_kde();
    disturbed_equals_undisturbed_in(
        &lab,
        "--set dynamic_sampling=respend --set prompts_per_step=6",
        &["model/model.safetensors", "curriculum.jsonl"],
    );
    let reports = grpo_host::run::read_curriculum(&lab.path("b")).unwrap();
    assert!(reports.len() > 1 && reports.iter().any(|r| r.step > 2));
}

#[test]
fn a_run_out_of_patience_does_no_further_step() {
    let lab = Lab::new();
    // Without one right answer no evaluation is better than the first.
    let patience = "--set early_stopping_patience=2 --set eval_steps=1";
    let start = format!("--config run.yaml --out a --json {patience}");
    let ended = lab.run(&start).fine().json();
    assert_eq!(
        (&ended["steps"], &ended["stopped_early"]),
        (&2.into(), &true.into())
    );
    let resumed = lab.run("--resume a --json").fine().json();
    assert_eq!(
        (&resumed["steps"], &resumed["stopped_early"]),
        (&2.into(), &true.into())
    );
    assert_eq!(lab.metrics("a").len(), 3);
}

#[test]
fn settings_that_make_history_cannot_change_and_others_are_taken_in() {
    let lab = Lab::new();
    lab.run("--config run.yaml --out a --steps 2 --quiet")
        .fine();
    let before = lab.metrics("a");
    let ended = lab.run("--resume a --steps 4 --set learning_rate=0.5 --set beta=0.1");
    let (error, hint) = ended.refused(2);
    assert_eq!(error, "a resumed run cannot change `beta`, `learning_rate`");
    assert!(hint.contains("start a new run"), "{hint}");
    let ended = lab.run("--resume a --steps 4 --plugin reward-math");
    let (error, _) = ended.refused(2);
    assert_eq!(error, "a resumed run cannot change `plugins`");
    let ended = lab.run("--resume a --steps 4 --set eval_rows=5");
    let (error, _) = ended.refused(2);
    assert_eq!(error, "a resumed run cannot change `eval_rows`");
    assert_eq!(lab.metrics("a"), before);
    lab.run("--resume a --steps 3 --quiet").fine();
    let config = std::fs::read_to_string(lab.path("a/config.yaml")).unwrap();
    assert!(config.contains("\nmax_steps: 3\n"), "{config}");
    assert_eq!(lab.metrics("a").len(), 4);
}

#[test]
fn a_run_whose_checkpoints_are_damaged_is_left_alone() {
    let lab = Lab::new();
    lab.run("--config run.yaml --out a --quiet").fine();
    let (metrics, saved) = (lab.metrics("a"), lab.checkpoints("a"));
    for step in &saved {
        lab.write(&format!("a/checkpoints/{step}/state.json"), "{");
    }
    let ended = lab.run("--resume a");
    let (error, hint) = ended.refused(1);
    let expected = "a has 2 checkpoints and none of them is whole: \
                    a/checkpoints/step-6/state.json has 1 bytes instead of ";
    assert!(error.starts_with(expected), "{error}");
    assert!(hint.starts_with("nothing was changed"), "{hint}");
    assert_eq!((lab.metrics("a"), lab.checkpoints("a")), (metrics, saved));
}

#[test]
fn a_run_that_no_longer_says_what_it_ran_with_is_left_alone() {
    let lab = Lab::new();
    lab.run("--config run.yaml --out a --quiet").fine();
    let metrics = lab.metrics("a");
    std::fs::remove_file(lab.path("a/plugins.lock")).unwrap();
    for command in ["--resume a --steps 9", "replay a"] {
        let ended = lab.run(command);
        let (error, hint) = ended.refused(1);
        assert_eq!(error, "a has no plugins.lock, which says what it ran with");
        assert!(hint.starts_with("put it back"), "{hint}");
    }
    assert_eq!(lab.metrics("a"), metrics);
}

#[test]
fn cut_weights_cost_the_steps_since_the_checkpoint_before_them_and_no_more() {
    let lab = Lab::new();
    lab.run("--config run.yaml --out a --quiet").fine();
    let before = (lab.metrics("a"), lab.completions("a"));
    let weights = "a/checkpoints/step-6/model/model.safetensors";
    let bytes = std::fs::read(lab.path(weights)).unwrap();
    lab.write(weights, &bytes[..1000]);
    let stderr = lab.run("--quiet --resume a").fine().stderr;
    let warning = format!(
        "warning: {weights} has 1000 bytes instead of {}: going back to the checkpoint of step 4\n",
        bytes.len()
    );
    assert_eq!(stderr, warning);
    assert_eq!((lab.metrics("a"), lab.completions("a")), before);
    assert_eq!(std::fs::read(lab.path(weights)).unwrap(), bytes);
}
