//! `--device` and what goes with it. GPUs are played by a driver library that the test compiles: it answers the first
//! questions that the program asks, as an old driver and as one without a GPU do.

use std::process::Command;

use super::lab::{Ended, Lab};

/// Exit codes: the command line or config is to be mended, or something else is.
const USAGE: i32 = 2;
const FAILURE: i32 = 1;

const ROLLOUT: &str =
    "rollout --config run.yaml --raw --prompt abcabcab -n 2 --max-tokens 8 --json";

/// What a driver answers.
#[derive(Clone, Copy)]
struct Driver {
    version: i32,
    /// Status of its start.
    init: i32,
    gpus: i32,
}

const OLD: Driver = Driver {
    version: 11_040,
    init: 0,
    gpus: 1,
};

fn lab_with(driver: Driver) -> Lab {
    let lab = Lab::new();
    let Driver {
        version,
        init,
        gpus,
    } = driver;
    lab.write(
        "driver.c",
        format!(
            "int cuInit(unsigned flags) {{ return {init}; }}
             int cuDriverGetVersion(int *version) {{ *version = {version}; return 0; }}
             int cuDeviceGetCount(int *count) {{ *count = {gpus}; return 0; }}
             int cuGetErrorString(int status, const char **text) {{ *text = \"in words\"; return 0; }}"
        ),
    );
    let compiled = Command::new("cc")
        .args(["-shared", "-fPIC", "-o"])
        .args([lab.path("libcuda.so"), lab.path("driver.c")])
        .status();
    assert!(compiled.unwrap().success());
    lab
}

fn run(lab: &Lab, args: &str) -> Ended {
    let mut command = lab.command(args);
    let ended = command.env("LD_LIBRARY_PATH", lab.path(""));
    ended.output().unwrap().into()
}

/// Tokens and log-probs of all completions.
fn tokens(ended: &Ended) -> Vec<(serde_json::Value, serde_json::Value)> {
    let json = ended.json();
    let completions = json["completions"].as_array().unwrap();
    completions
        .iter()
        .map(|c| (c["tokens"].clone(), c["logprobs"].clone()))
        .collect()
}

#[test]
fn auto_passes_over_a_gpu_with_an_old_driver_and_says_so() {
    let lab = lab_with(OLD);
    let expected = "warning: running on the CPU: the NVIDIA driver is made for CUDA 11.4; 12.4 or later is needed\n\
                    hint: install a later NVIDIA driver (550 or later), or use --device cpu\n";
    let auto = run(&lab, ROLLOUT).fine();
    assert_eq!(auto.stderr, expected);
    let cpu = run(&lab, &format!("{ROLLOUT} --device cpu")).fine();
    assert_eq!(cpu.stderr, "");
    assert_eq!(tokens(&auto), tokens(&cpu));
    assert_eq!(tokens(&cpu).len(), 2);
    for command in [
        "eval --config run.yaml --data rows.jsonl --limit 2 --quiet",
        "bench spec --config run.yaml --drafts ngram --batches 1 --new-tokens 4 --repeats 1 --quiet",
        "bench rollout --config run.yaml --prompts 1 --new-tokens 2 --prompt-tokens 4 --repeats 1 --quiet",
        "train --config run.yaml --out out --steps 1 --quiet",
        "bench train --config run.yaml --batch 1 --tokens 4 --steps 1 --quiet",
    ] {
        let ended = run(&lab, command).fine();
        assert!(ended.stderr.contains(expected), "{command}: {ended:?}");
    }
}

#[test]
fn several_gpus_that_are_not_there_are_refused() {
    let lab = lab_with(OLD);
    let few = (
        "gpus is 2, and from cuda:0 on there are 1",
        "use --gpus 1 or fewer",
    );
    for command in [
        "train --config run.yaml --out out",
        "eval --config run.yaml --data rows.jsonl",
        "sft --config run.yaml --data rows.jsonl --out out",
        "bench train --config run.yaml",
        "bench step --config run.yaml",
    ] {
        let ended = run(&lab, &format!("{command} --gpus 2"));
        assert_eq!(ended.refused(FAILURE), few, "{command}");
        assert!(!lab.path("out").exists(), "{command}");
        let ended = run(&lab, &format!("{command} --gpus 2 --device cpu"));
        let (error, _) = ended.refused(USAGE);
        assert_eq!(error, "--gpus: `gpus` is 2; allowed: 1 with device cpu");
    }
    let ended = run(&lab, "train --config run.yaml --gpus 2 --device cuda:1");
    let none = "gpus is 2, and from cuda:1 on there are 0";
    assert_eq!(ended.refused(FAILURE).0, none);
    let ended = run(&lab, &format!("{ROLLOUT} --set gpus=2 --device auto")).fine();
    assert!(
        ended
            .stderr
            .starts_with("warning: gpus has no effect here: one is used\n")
    );
}

#[test]
fn several_gpus_want_nccl_for_training() {
    let lab = lab_with(Driver { gpus: 2, ..OLD });
    // Hides one that is installed.
    for name in ["libnccl.so.2", "libnccl.so"] {
        lab.write(name, "no library");
    }
    let ended = run(&lab, "train --config run.yaml --out out --gpus 2");
    assert_eq!(
        ended.refused(FAILURE),
        (
            "CUDA library `nccl` was not found",
            "several GPUs need NCCL: install it (also from PyPI: nvidia-nccl-cu13 with its lib folder on LD_LIBRARY_PATH), or use --gpus 1"
        )
    );
    let lab = lab_with(Driver { gpus: 0, ..OLD });
    let doctor = run(&lab, "doctor --json").fine().json();
    let libraries = doctor["cuda"]["libraries"].as_array().unwrap();
    let nccl = libraries.iter().find(|library| library["name"] == "nccl");
    assert_eq!(nccl.unwrap()["package"], "nvidia-nccl-cu13");
}

#[test]
fn a_gpu_that_is_named_is_not_passed_over() {
    let lab = lab_with(OLD);
    for command in [
        ROLLOUT,
        "eval --config run.yaml --data rows.jsonl",
        "bench spec --config run.yaml",
        "bench rollout --config run.yaml --new-tokens 2",
        "train --config run.yaml --out out",
        "sft --config run.yaml --data rows.jsonl --out out",
        "bench train --config run.yaml",
    ] {
        let ended = run(&lab, &format!("{command} --device cuda:0"));
        assert_eq!(
            ended.refused(FAILURE),
            (
                "the NVIDIA driver is made for CUDA 11.4; 12.4 or later is needed",
                "install a later NVIDIA driver (550 or later), or use --device cpu"
            ),
            "{command}"
        );
        assert_eq!(
            (ended.stderr.lines().count(), ended.stdout.as_str()),
            (2, "")
        );
        assert!(!lab.path("out").exists(), "{command}");
    }
}

#[test]
fn a_machine_without_a_gpu_is_not_worth_a_word() {
    // CUDA_ERROR_NO_DEVICE: the library is there, as in many containers.
    let lab = lab_with(Driver {
        init: 100,
        gpus: 0,
        ..OLD
    });
    let auto = run(&lab, ROLLOUT).fine();
    assert_eq!(auto.stderr, "");
    let json = run(&lab, "doctor --json").fine().json();
    assert_eq!(json["devices"], serde_json::json!(["cpu"]));
    assert_eq!(json["cuda"]["driver"], 11040);
    let bench = "bench rollout --config run.yaml --prompts 1 --new-tokens 2 --prompt-tokens 4 --repeats 1 --json";
    let json = run(&lab, bench).fine().json();
    assert_eq!(
        (&json["device"], &json["memory"]),
        (&"cpu".into(), &serde_json::Value::Null)
    );
}

#[test]
fn a_driver_that_does_not_start_is_not_taken_for_no_gpu() {
    // CUDA_ERROR_SYSTEM_DRIVER_MISMATCH.
    let lab = lab_with(Driver {
        version: 13_000,
        init: 803,
        gpus: 0,
    });
    let hint = "`nvidia-smi` says whether the driver works; --device cpu needs none";
    let error = "CUDA driver: DriverError(CUDA_ERROR_SYSTEM_DRIVER_MISMATCH, \"in words\")";
    let auto = run(&lab, ROLLOUT).fine();
    let expected = format!("warning: running on the CPU: {error}\nhint: {hint}\n");
    assert_eq!(auto.stderr, expected);
    let named = run(&lab, &format!("{ROLLOUT} --device cuda:0"));
    assert_eq!(named.refused(FAILURE), (error, hint));
}

#[test]
fn a_gpu_that_is_not_there_is_refused() {
    let lab = lab_with(Driver {
        version: 13_000,
        gpus: 0,
        ..OLD
    });
    let named = run(&lab, &format!("{ROLLOUT} --device cuda:3"));
    assert_eq!(
        named.refused(FAILURE),
        ("no CUDA device 3: there are 0", "use --device cpu")
    );
}

#[test]
fn a_profile_needs_a_gpu_and_a_speed_does_not() {
    let lab = Lab::new();
    let bench = "bench train --config run.yaml --device cpu --batch 1 --tokens 4 --steps 1";
    let ended = lab.run(&format!("{bench} --profile"));
    assert_eq!(
        ended.refused(FAILURE),
        (
            "--profile shows the kernels of a GPU, and this runs on `cpu`",
            "use --device cuda:0 on a machine with a GPU, or leave --profile out"
        )
    );
    let json = lab.run(&format!("{bench} --json")).fine().json();
    assert_eq!(json["device"], "cpu");
    assert!(json["flops_per_second"].as_f64().unwrap() > 0.0);
    assert!(json["mfu"].is_null() && json["memory"].is_null() && json["profile"].is_null());
}

#[test]
fn a_whole_step_is_divided_into_its_parts() {
    let lab = Lab::new();
    let bench =
        "bench step --config run.yaml --device cpu --prompts 2 --n 2 --prompt-tokens 4 --steps 2";
    let json = lab
        .run(&format!("{bench} --new-tokens 6 --json"))
        .fine()
        .json();
    let part = |name: &str| json[name].as_f64().unwrap();
    let parts = [part("rollout"), part("reward"), part("update")];
    assert!(parts.iter().all(|seconds| *seconds > 0.0));
    assert!((parts.iter().sum::<f64>() - part("value")).abs() < 1e-9);
    assert!((part("reward_share") - parts[1] / part("value")).abs() < 1e-9);
    let best = json["steps"].as_array().unwrap().iter();
    let seconds: Vec<f64> = best.map(|s| s["seconds"].as_f64().unwrap()).collect();
    assert_eq!(seconds.len(), 2);
    assert!(seconds.iter().all(|s| *s >= part("value")));
    let ended = lab.run(&format!("{bench} --new-tokens 6 --plugin curriculum-kde"));
    assert_eq!(
        ended.refused(FAILURE),
        (
            "`curriculum-kde` is not a reward",
            "give a reward component, reward-math or reward-format"
        )
    );
    let ended = lab.run(&format!("{bench} --new-tokens 6000"));
    assert!(
        ended.stderr.starts_with(
            "error: --prompt-tokens and --new-tokens ask for sequences of 6004 tokens"
        )
    );
}

#[test]
fn the_share_of_the_memory_is_a_fraction() {
    let lab = Lab::new();
    for wrong in ["0", "1.01", "-1", ".nan"] {
        let ended = lab.run(&format!("{ROLLOUT} --set gpu_memory_utilization={wrong}"));
        let (error, hint) = ended.refused(USAGE);
        assert!(
            error.starts_with("--set: `gpu_memory_utilization` is ")
                && error.ends_with("; allowed: a number above 0, up to 1"),
            "{error}"
        );
        assert!(hint.contains("gpu_memory_utilization"));
    }
    let ended = lab.run(&format!("{ROLLOUT} --gpu-memory-utilization 2"));
    assert_eq!(
        ended.refused(USAGE),
        (
            "--gpu-memory-utilization: `gpu_memory_utilization` is 2; allowed: a number above 0, up to 1",
            "`--gpu-memory-utilization` sets the config key `gpu_memory_utilization`"
        )
    );
    lab.run(&format!(
        "{ROLLOUT} --gpu-memory-utilization 0.5 --device cpu"
    ))
    .fine();
}
