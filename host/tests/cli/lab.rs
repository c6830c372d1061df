//! A folder with a tiny model, rows and a config, and the program run inside it.

use std::{
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Output, Stdio},
    time::{Duration, Instant},
};

use grpo_host::run::{read_metrics, read_rollouts, rollout_files};
use serde_json::{Map, Value};
use tempfile::TempDir;

/// Row, token ids, log-probs and reward of one logged completion.
pub(super) type CompletionRow = (u64, Vec<u32>, Vec<f32>, Option<f64>);

/// Most time anything here is waited for.
const PATIENCE: Duration = Duration::from_secs(60);

/// Rewards any letter from a to m: about every second completion of the untrained model has one.
const CONFIG: &str = r#"
model: MODEL
data: rows.jsonl
plugins:
  - source: reward-format
    config: { tags: [], answer: false, pattern: "[a-m]" }
prompts_per_step: 4
num_generations: 4
max_completion_length: 16
learning_rate: 1.0e-3
loss_type: dapo
max_steps: 6
save_steps: 2
eval_steps: 3
eval_rows: 4
seed: 5
threads: 2
"#;

/// What a finished program left.
#[derive(Debug)]
pub(super) struct Ended {
    pub(super) status: ExitStatus,
    pub(super) stdout: String,
    pub(super) stderr: String,
}

impl From<Output> for Ended {
    fn from(output: Output) -> Self {
        Self {
            status: output.status,
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }
}

impl Ended {
    /// It succeeded.
    #[track_caller]
    pub(super) fn fine(self) -> Self {
        assert!(self.status.success(), "{self:?}");
        self
    }

    /// It failed with this code, and its last two lines are an error and a hint: their texts.
    #[track_caller]
    pub(super) fn refused(&self, code: i32) -> (&str, &str) {
        assert_eq!(self.status.code(), Some(code), "{self:?}");
        let mut lines = self.stderr.lines().rev();
        let mut next = |prefix: &str| {
            let line = lines.next().and_then(|line| line.strip_prefix(prefix));
            line.unwrap_or_else(|| panic!("no `{prefix}` line: {self:?}"))
        };
        let hint = next("hint: ");
        (next("error: "), hint)
    }

    /// The last line of stdout as JSON.
    #[track_caller]
    pub(super) fn json(&self) -> Value {
        let last = self.stdout.lines().last().unwrap_or_default();
        serde_json::from_str(last).unwrap_or_else(|e| panic!("{e}: {self:?}"))
    }
}

/// A folder to run the program in.
pub(super) struct Lab(TempDir);

impl Lab {
    /// With `run.yaml` (the config above) and `rows.jsonl`.
    pub(super) fn new() -> Self {
        let lab = Self(tempfile::tempdir().unwrap());
        let model = lab.model();
        lab.write("run.yaml", CONFIG.replace("MODEL", model.to_str().unwrap()));
        let row = |i: usize| {
            format!(
                "{{\"question\": \"{i} + 1 =\", \"answer\": \"{}\"}}\n",
                i + 1
            )
        };
        lab.write("rows.jsonl", (0..24).map(row).collect::<String>());
        lab
    }

    /// Adds `curriculum-kde` to `run.yaml`.
    pub(super) fn with_kde(&self) {
        let yaml = std::fs::read_to_string(self.path("run.yaml")).unwrap();
        let plugin = "  - source: curriculum-kde\nprompts_per_step";
        self.write("run.yaml", yaml.replacen("prompts_per_step", plugin, 1));
    }

    /// The model of `run.yaml`.
    pub(super) fn model(&self) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/llama")
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub(super) fn write(&self, name: &str, text: impl AsRef<[u8]>) {
        std::fs::write(self.path(name), text).unwrap();
    }

    /// The program with `args`, separated by spaces.
    pub(super) fn command(&self, args: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_grpo-host"));
        command.args(args.split_whitespace());
        self.here(&mut command);
        command
    }

    /// The same in a shell where no file can grow beyond `kib` KiB. The kernel ends a process that tries
    /// (a kill in the middle of a write), or fails its write if `survives` (a full disk).
    pub(super) fn limited(&self, kib: u32, survives: bool, args: &str) -> Command {
        let trap = if survives { "trap '' XFSZ;" } else { "" };
        let program = env!("CARGO_BIN_EXE_grpo-host");
        let mut command = Command::new("bash");
        command.arg("-c").arg(format!(
            "ulimit -c 0; {trap} ulimit -f {kib}; exec {program} {args}"
        ));
        self.here(&mut command);
        command
    }

    fn here(&self, command: &mut Command) {
        command.current_dir(self.0.path()).stdin(Stdio::null());
        command
            .env("HF_HOME", self.path("hub"))
            .env("HF_HUB_OFFLINE", "1")
            .env("XDG_CACHE_HOME", self.path("cache"))
            .env("XDG_CONFIG_HOME", self.path("settings"));
    }

    /// Runs the program to its end.
    pub(super) fn run(&self, args: &str) -> Ended {
        self.command(args).output().unwrap().into()
    }

    /// Starts the program and returns once `run` has a metrics line of step `step`.
    pub(super) fn run_until(&self, step: u64, run: &str, args: &str) -> Child {
        let mut command = self.command(args);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let started = Instant::now();
        while self.last_step(run) < Some(step) {
            assert!(started.elapsed() < PATIENCE, "no step {step} in time");
            if let Some(status) = child.try_wait().unwrap() {
                let ended = Ended::from(child.wait_with_output().unwrap());
                panic!("ended before step {step}: {status} {ended:?}");
            }
            std::thread::park_timeout(Duration::from_millis(1));
        }
        child
    }

    fn last_step(&self, run: &str) -> Option<u64> {
        read_metrics(&self.path(run)).unwrap().last()?["step"].as_u64()
    }

    /// Metrics lines without what depends on the clock.
    pub(super) fn metrics(&self, run: &str) -> Vec<Map<String, Value>> {
        let timed = |key: &str| {
            matches!(key, "step_time" | "tokens_per_second")
                || key.starts_with("time/")
                || key.starts_with("telemetry/")
                || (key.starts_with("judge/") && key.ends_with("/seconds"))
        };
        let mut lines = read_metrics(&self.path(run)).unwrap();
        for line in &mut lines {
            line.retain(|key, _| !timed(key));
        }
        lines
    }

    /// Step, tokens, log-probs and reward of every completion of a run.
    pub(super) fn completions(&self, run: &str) -> Vec<CompletionRow> {
        let files = rollout_files(&self.path(run)).unwrap();
        let rollouts = files
            .iter()
            .flat_map(|(_, path)| read_rollouts(path).unwrap());
        rollouts
            .map(|r| (r.step, r.completion.tokens, r.completion.logprobs, r.reward))
            .collect()
    }

    /// The steps that have a checkpoint, and no left-over of one.
    pub(super) fn checkpoints(&self, run: &str) -> Vec<String> {
        let entries = std::fs::read_dir(self.path(run).join("checkpoints")).unwrap();
        let mut names: Vec<String> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }
}

/// Sends a signal by its name.
pub(super) fn signal(child: &Child, name: &str) {
    let kill = format!("kill -{name} {}", child.id());
    assert!(
        Command::new("sh")
            .arg("-c")
            .arg(kill)
            .status()
            .unwrap()
            .success()
    );
}
