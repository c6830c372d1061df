//! Runs that are told to stop and runs out of disk: what was done is kept, and the way on is printed.

use super::lab::{Ended, Lab, signal};

const START: &str = "--config run.yaml --set eval_steps=0 --set save_steps=0";

fn assert_equal_runs(lab: &Lab, found: &str, expected: &str) {
    assert_eq!(lab.metrics(found), lab.metrics(expected));
    let weights = |run: &str| std::fs::read(lab.path(run).join("model/model.safetensors"));
    assert!(weights(found).unwrap() == weights(expected).unwrap());
}

#[test]
fn ctrl_c_finishes_the_step_and_says_how_to_resume() {
    for name in ["INT", "TERM"] {
        let lab = Lab::new();
        lab.run(&format!("{START} --out a --steps 24")).fine();
        let child = lab.run_until(2, "b", &format!("{START} --out b --steps 24"));
        signal(&child, name);
        let ended = Ended::from(child.wait_with_output().unwrap());
        let (error, hint) = ended.refused(1);
        assert_eq!(error, "stopped on request; the state is in b");
        assert_eq!(hint, "continue with `grpo-host --resume b`");
        assert!(
            ended.stderr.contains("stopping after this step"),
            "{ended:?}"
        );

        // There is no model yet to look for.
        let run = ended.stdout.lines().last().unwrap();
        assert_eq!(run, "      run  b (report.html)");

        let last = lab.metrics("b").last().unwrap()["step"].as_u64().unwrap();
        assert!((2..24).contains(&last), "stopped at step {last}");
        assert_eq!(lab.checkpoints("b"), [format!("step-{last}")]);
        lab.run("--quiet --resume b").fine();
        assert_equal_runs(&lab, "b", "a");
    }
}

#[test]
fn a_full_disk_leaves_the_last_checkpoint_and_the_run_goes_on() {
    let lab = Lab::new();
    let start = |run: &str| format!("{START} --quiet --out {run} --steps 24");
    lab.run(&start("a")).fine();
    let child = lab.run_until(2, "b", &start("b"));
    signal(&child, "INT");
    Ended::from(child.wait_with_output().unwrap()).refused(1);
    let kept = lab.checkpoints("b");

    // No file may grow beyond 64 KiB, and the weights have 124.
    let resume = "--quiet --resume b";
    let ended: Ended = lab.limited(64, true, resume).output().unwrap().into();
    let (error, hint) = ended.refused(1);
    assert!(
        error.starts_with(
            "cannot write b/checkpoints/.tmp-step-24/model/model.safetensors: File too large"
        ),
        "{error}"
    );
    assert!(
        hint.contains("free some space") && hint.contains("--resume"),
        "{hint}"
    );
    assert_eq!(
        lab.checkpoints("b"),
        kept,
        "the previous one stays, nothing half"
    );

    lab.run(resume).fine();
    assert_equal_runs(&lab, "b", "a");
}
