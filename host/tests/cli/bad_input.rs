//! Bad input of every kind: one line that says what is wrong, one that says what to do, an exit code,
//! and nothing of it left on disk.

use super::lab::{Ended, Lab};

/// Exit codes: the command line or config is to be mended, or something else is.
const USAGE: i32 = 2;
const FAILURE: i32 = 1;

/// `args` are refused with these two lines, and nothing else is printed.
#[track_caller]
fn refuses(lab: &Lab, args: &str, code: i32, error: &str, hint: &str) {
    let ended = lab.run(args);
    let (found, next) = ended.refused(code);
    assert_eq!(
        (without_digest(found).as_str(), next),
        (error, hint),
        "{args}"
    );
    assert_eq!(
        (ended.stderr.lines().count(), ended.stdout.as_str()),
        (2, "")
    );
    assert!(!lab.path("out").exists(), "{args}: a run directory is left");
}

/// The component's digest as `DIGEST`.
fn without_digest(text: &str) -> String {
    match text.split_once("(sha256:") {
        Some((before, after)) => {
            let (digest, rest) = after.split_once(')').unwrap();
            assert_eq!(digest.len(), 12, "{text}");
            format!("{before}(DIGEST){rest}")
        }
        None => text.to_owned(),
    }
}

const TRAIN: &str = "--config run.yaml --out out";

/// Whoever opened it would wait for somebody to write.
#[test]
fn a_pipe_is_no_component() {
    let lab = Lab::new();
    let made = std::process::Command::new("mkfifo")
        .arg(lab.path("pipe.wasm"))
        .status();
    assert!(made.unwrap().success());
    for command in [
        "plugin check pipe.wasm",
        "plugin inspect pipe.wasm",
        "--config run.yaml --out out --plugin pipe.wasm",
    ] {
        let ended = lab.run(command);
        let (error, _) = ended.refused(USAGE);
        let expected = "cannot read plugin `pipe.wasm`: it is a pipe, not a file";
        assert_eq!(error, expected, "{command}");
    }
}

#[test]
fn missing_files() {
    let lab = Lab::new();
    let no_such = "No such file or directory (os error 2)";
    refuses(
        &lab,
        &format!("{TRAIN} --data none.jsonl"),
        FAILURE,
        "no such file: none.jsonl",
        "pass a .jsonl, .json or .parquet file, a folder of them, or a hub id `org/name`",
    );
    refuses(
        &lab,
        &format!("{TRAIN} --model ./none"),
        FAILURE,
        &format!("model `./none`: cannot read ./none/config.json: {no_such}"),
        "a model is a Hugging Face folder (config.json, tokenizer.json, model.safetensors) or a .gguf file",
    );
    refuses(
        &lab,
        "--config none.yaml --out out",
        USAGE,
        &format!("cannot read config none.yaml: {no_such}"),
        "give the path of a YAML file",
    );
    refuses(
        &lab,
        &format!("{TRAIN} --plugin none.wasm"),
        USAGE,
        &format!("cannot read plugin `none.wasm`: {no_such}"),
        "give the path of a .wasm component, a reference such as ghcr.io/me/reward:1.2, or one of reward-math, reward-format, reward-inference, reward-math-inference, reward-length, reward-math-length, reward-repetition, reward-judge, reward-geo, formatter-chat, curriculum-uniform, curriculum-kde, reward-code",
    );
    refuses(
        &lab,
        "--resume none",
        FAILURE,
        "none is not a run directory: it has no config.yaml",
        "give the folder that `--out` named",
    );
}

#[test]
fn unknown_architecture() {
    let lab = Lab::new();
    std::fs::create_dir(lab.path("mamba")).unwrap();
    lab.write(
        "mamba/config.json",
        r#"{"architectures": ["MambaForCausalLM"], "model_type": "mamba"}"#,
    );
    refuses(
        &lab,
        &format!("{TRAIN} --model ./mamba"),
        FAILURE,
        "model `./mamba`: unsupported model architecture `MambaForCausalLM`",
        "Qwen2, Qwen3 and Llama decoders are supported",
    );
}

#[test]
fn rows_without_the_column_or_not_json() {
    let lab = Lab::new();
    let rows = |row: &str| [row; 8].join("\n");
    lab.write(
        "problems.jsonl",
        rows(r#"{"problem": "1 + 1", "solution": "2"}"#),
    );
    refuses(
        &lab,
        &format!("{TRAIN} --data problems.jsonl"),
        FAILURE,
        "plugin `formatter-chat` (DIGEST) format, row 0: row has no column `question`; it has problem, solution",
        "rename the dataset's columns with `columns`, or configure the plugin",
    );
    let config = std::fs::read_to_string(lab.path("run.yaml")).unwrap();
    lab.write("map.yaml", config + "columns: { question: task }\n");
    refuses(
        &lab,
        "--config map.yaml --out out --data problems.jsonl",
        FAILURE,
        "row 0 of problems.jsonl has no column `task`; columns found: problem, solution",
        "the config key `columns` maps names: `columns: {question: problem}`",
    );
    lab.write(
        "torn.jsonl",
        "{\"question\": \"1\", \"answer\": \"1\"}\n\n{\"question\": \"2\n",
    );
    refuses(
        &lab,
        &format!("{TRAIN} --data torn.jsonl"),
        FAILURE,
        "torn.jsonl line 3: EOF while parsing a string at column 15",
        "every line must hold one complete JSON object",
    );
}

#[test]
fn a_component_of_another_world() {
    let lab = Lab::new();
    let other = r#"(component (instance $i) (export "acme:tools/greet@1.0.0" (instance $i)))"#;
    lab.write("other.wasm", wat::parse_str(other).unwrap());
    refuses(
        &lab,
        &format!("{TRAIN} --plugin other.wasm"),
        FAILURE,
        "plugin `other` (DIGEST) load: exports `acme:tools/greet@1.0.0`; expected one of grpo:plugin/scoring@0.1.0, grpo:plugin/formatting@0.1.0, grpo:plugin/planning@0.1.0",
        "build against one world of wit/v0.1: reward, formatter or curriculum",
    );
}

#[test]
fn unknown_keys_and_flags() {
    let lab = Lab::new();
    lab.write("slip.yaml", "max_steps: 3\nlearning_rat: 1e-5\n");
    refuses(
        &lab,
        "--config slip.yaml --out out",
        USAGE,
        "slip.yaml:2: unknown key `learning_rat`",
        "did you mean `learning_rate`?",
    );
    refuses(
        &lab,
        "--set num_generation=4 --out out",
        USAGE,
        "--set: unknown key `num_generation`",
        "did you mean `num_generations`?",
    );
    refuses(
        &lab,
        "--set num_generations=many --out out",
        USAGE,
        "--set: `num_generations`: invalid type: string \"many\", expected u32",
        "config.yaml of any run directory shows the form of every key",
    );
    refuses(
        &lab,
        "--stepz 4 --out out",
        USAGE,
        "unexpected argument '--stepz' found",
        "did you mean `--steps`?",
    );
}

#[test]
fn a_run_directory_is_never_overwritten() {
    let lab = Lab::new();
    lab.run("--config run.yaml --out a --steps 1 --quiet")
        .fine();
    let before = std::fs::read(lab.path("a/metrics.jsonl")).unwrap();
    refuses(
        &lab,
        "--config run.yaml --out a",
        FAILURE,
        "a already holds a run",
        "continue it with `--resume a`, or give another `--out`",
    );
    assert_eq!(std::fs::read(lab.path("a/metrics.jsonl")).unwrap(), before);
}

#[test]
fn more_than_the_machine_has() {
    let lab = Lab::new();
    let ended = lab.run(&format!("{TRAIN} --set kv_cache_tokens=1000000000000"));
    let (error, hint) = ended.refused(FAILURE);
    assert!(
        error.starts_with("the KV pool needs ") && error.ends_with(" GiB are free"),
        "{error}"
    );
    assert!(hint.starts_with("lower kv_cache_tokens"), "{hint}");
    let ended = lab.run(&format!("{TRAIN} --threads 100000"));
    assert_eq!(ended.status.code(), Some(FAILURE));
    assert!(
        ended.stderr.contains("100000 threads are too many for "),
        "{ended:?}"
    );
    assert!(!lab.path("out").exists());
}

#[test]
fn adapters_for_layers_that_do_not_exist() {
    let lab = Lab::new();
    let config = std::fs::read_to_string(lab.path("run.yaml")).unwrap();
    lab.write("lora.yaml", config + "lora: { target_modules: [foo] }\n");
    refuses(
        &lab,
        "--config lora.yaml --out out",
        FAILURE,
        "LoRA target `foo` names no linear layer",
        "use q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj or all-linear",
    );
}

/// Nobody reads the results any more, or nobody can.
#[test]
fn a_closed_and_a_full_stdout() {
    let run = |script: &str| -> Ended {
        let program = env!("CARGO_BIN_EXE_grpo-host");
        let script = script.replace("PROGRAM", program);
        std::process::Command::new("bash")
            .args(["-c", &script])
            .output()
            .unwrap()
            .into()
    };
    // `sleep` lets the reader go away first.
    let closed = run("(sleep 0.2; PROGRAM doctor; echo $? >&2) | true");
    assert_eq!(closed.stderr, "0\n");
    let full = run("PROGRAM doctor > /dev/full");
    assert_eq!(full.status.code(), Some(FAILURE));
    assert_eq!(
        full.stderr,
        "error: cannot write to stdout: No space left on device (os error 28)\n"
    );
}

#[test]
fn runs_that_start_together_get_a_folder_each() {
    let lab = Lab::new();
    let start = || {
        let mut command = lab.command("--config run.yaml --steps 1 --quiet --json");
        command.stdout(std::process::Stdio::piped());
        command.spawn().unwrap()
    };
    let children: Vec<_> = (0..3).map(|_| start()).collect();
    for child in children {
        let ended = Ended::from(child.wait_with_output().unwrap()).fine();
        assert!(
            ended.json()["run_dir"]
                .as_str()
                .unwrap()
                .starts_with("runs/000")
        );
    }
    let folders = std::fs::read_dir(lab.path("runs")).unwrap().count();
    assert_eq!(folders, 3);
}
