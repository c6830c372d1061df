//! `cargo xtask bench`: our binary and the transformers peer (`xtask/bench/peer_cpu.py`) on the same model,
//! one after the other on this machine, and the ratio of their speeds.
//!
//! Measures nothing itself: both sides print one JSON object per measurement.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::Command,
    thread::available_parallelism,
};

use anyhow::{Context, bail, ensure};
use serde_json::Value;

pub(crate) const USAGE: &str = "\
  bench --model DIR [--python EXE] [--exe FILE] [--threads N] [--repeats N] [--rounds N]
        [--what decode,train]
                    our speed (of a binary built now, or of --exe) beside transformers' on a
                    Hugging Face folder";

/// Measurements of the two sides that mean the same: label, unit, whether less is better.
const PAIRS: [(&str, &str, bool); 4] = [
    ("decode", "tokens/s", false),
    ("decode_only", "tokens/s", false),
    ("train", "s/step", true),
    ("train_micro", "s/step", true),
];
/// The peer's training shape: 8 sequences of 256 tokens, all together or one at a time.
const BATCH_TOKENS: usize = 8 * 256;
const SEQUENCE_TOKENS: usize = 256;

struct Options {
    model: String,
    python: String,
    exe: Option<PathBuf>,
    threads: usize,
    repeats: usize,
    rounds: usize,
    decode: bool,
    train: bool,
}

/// The best of all rounds, by label.
type Best = BTreeMap<&'static str, f64>;

/// Builds the binary, measures round by round, prints the table and as the last line one JSON object.
pub(crate) fn run(args: &[&str]) -> anyhow::Result<()> {
    let options = Options::parse(args)?;
    let exe = options.exe.clone().map_or_else(build, Ok)?;
    let (mut ours, mut peer) = (Best::new(), Best::new());
    for round in 1..=options.rounds {
        eprintln!("round {round} of {}", options.rounds);
        if options.decode {
            measure(&options.rollout(&exe)?, &mut ours)?;
            measure(&options.peer("decode")?, &mut peer)?;
        }
        if options.train {
            measure(&options.step(&exe, "train", BATCH_TOKENS)?, &mut ours)?;
            measure(&options.peer("train")?, &mut peer)?;
            measure(
                &options.step(&exe, "train_micro", SEQUENCE_TOKENS)?,
                &mut ours,
            )?;
            measure(&options.peer("train_micro")?, &mut peer)?;
        }
    }
    print(&options, &ours, &peer);
    Ok(())
}

/// Our binary, which stands beside this one.
fn build() -> anyhow::Result<PathBuf> {
    let built = Command::new(env!("CARGO"))
        .args(["build", "--release", "--quiet", "--package", "grpo-host"])
        .current_dir(xtask::tidy::workspace_root())
        .status()
        .context("cannot run cargo")?;
    ensure!(built.success(), "building grpo-host failed");
    Ok(std::env::current_exe()?.with_file_name("grpo-host"))
}

impl Options {
    fn parse(args: &[&str]) -> anyhow::Result<Self> {
        let mut options = Self {
            model: String::new(),
            python: "python3".to_owned(),
            exe: None,
            threads: available_parallelism()?.get(),
            repeats: 3,
            rounds: 1,
            decode: true,
            train: true,
        };
        let mut rest = args.iter();
        while let Some(flag) = rest.next() {
            let value = *rest
                .next()
                .with_context(|| format!("{flag} needs a value\n{USAGE}"))?;
            let number = || {
                let n: usize = value.parse().with_context(|| format!("{flag} {value}"))?;
                ensure!(n > 0, "{flag} must be at least 1");
                Ok(n)
            };
            match *flag {
                "--model" => value.clone_into(&mut options.model),
                "--python" => value.clone_into(&mut options.python),
                "--exe" => options.exe = Some(PathBuf::from(value)),
                "--threads" => options.threads = number()?,
                "--repeats" => options.repeats = number()?,
                "--rounds" => options.rounds = number()?,
                "--what" => {
                    let what: Vec<&str> = value.split(',').collect();
                    let unknown = what.iter().find(|w| !["decode", "train"].contains(w));
                    ensure!(unknown.is_none(), "--what {value}\n{USAGE}");
                    options.decode = what.contains(&"decode");
                    options.train = what.contains(&"train");
                }
                _ => bail!("unknown flag {flag}\n{USAGE}"),
            }
        }
        ensure!(!options.model.is_empty(), "no --model\n{USAGE}");
        Ok(options)
    }

    fn rollout(&self, exe: &Path) -> anyhow::Result<Vec<(&'static str, f64)>> {
        let flags = ["--repeats", &self.repeats.to_string()].map(str::to_owned);
        let lines = self.grpo_host(exe, "rollout", &flags)?;
        let last = lines.last().context("bench rollout printed nothing")?;
        Ok(vec![
            ("decode", number(last, "value")?),
            ("decode_only", number(last, "decode_only")?),
        ])
    }

    /// Without gradient checkpointing, which the peer does not do either.
    fn step(
        &self,
        exe: &Path,
        label: &'static str,
        micro_batch: usize,
    ) -> anyhow::Result<Vec<(&'static str, f64)>> {
        let micro_batch = format!("micro_batch_tokens={micro_batch}");
        let steps = self.repeats.to_string();
        let flags = [
            "--steps",
            &steps,
            "--set",
            "gradient_checkpointing=false",
            "--set",
            &micro_batch,
        ];
        let lines = self.grpo_host(exe, "train", &flags.map(str::to_owned))?;
        let last = lines.last().context("bench train printed nothing")?;
        Ok(vec![(label, number(last, "value")?)])
    }

    fn peer(&self, what: &str) -> anyhow::Result<Vec<(&'static str, f64)>> {
        let script = xtask::tidy::workspace_root().join("xtask/bench/peer_cpu.py");
        let (threads, repeats) = (self.threads.to_string(), self.repeats.to_string());
        let mut command = Command::new(&self.python);
        command.arg(script).arg(&self.model);
        command.args(["--threads", &threads, "--repeats", &repeats, "--what", what]);
        let mut found = Vec::new();
        for line in objects(command)? {
            let name = line["name"].as_str().context("a peer line has no name")?;
            let label = PAIRS
                .iter()
                .find(|(label, ..)| name.strip_prefix("peer_") == Some(*label));
            let (label, ..) = label.with_context(|| format!("unknown peer line {name}"))?;
            found.push((*label, number(&line, "value")?));
        }
        Ok(found)
    }

    fn grpo_host(&self, exe: &Path, what: &str, flags: &[String]) -> anyhow::Result<Vec<Value>> {
        let mut command = Command::new(exe);
        command.args(["bench", what, "--json", "--quiet", "--model", &self.model]);
        command.args(["--threads", &self.threads.to_string()]);
        command.args(flags);
        objects(command)
    }
}

/// Runs a command and reads the JSON objects among the lines of its stdout.
fn objects(mut command: Command) -> anyhow::Result<Vec<Value>> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command
        .stderr(std::process::Stdio::inherit())
        .output()
        .with_context(|| format!("cannot run {program}"))?;
    ensure!(output.status.success(), "{program}: {}", output.status);
    let text = String::from_utf8_lossy(&output.stdout);
    let lines = text.lines().filter(|line| line.starts_with('{'));
    lines
        .map(|line| serde_json::from_str(line).with_context(|| format!("{program} printed {line}")))
        .collect()
}

fn number(object: &Value, key: &str) -> anyhow::Result<f64> {
    object[key]
        .as_f64()
        .with_context(|| format!("no number `{key}` in {object}"))
}

fn measure(found: &[(&'static str, f64)], best: &mut Best) -> anyhow::Result<()> {
    for (label, value) in found {
        let less = PAIRS.iter().any(|(l, _, less)| l == label && *less);
        let kept = best.entry(*label).or_insert(*value);
        *kept = if less {
            kept.min(*value)
        } else {
            kept.max(*value)
        };
        ensure!(*kept > 0.0, "{label} is {kept}");
    }
    Ok(())
}

/// How many times as fast we are.
fn ratio(ours: f64, peer: f64, less_is_better: bool) -> f64 {
    if less_is_better {
        peer / ours
    } else {
        ours / peer
    }
}

fn print(options: &Options, ours: &Best, peer: &Best) {
    let mut object = serde_json::json!({
        "name": "peer", "unit": "ratio", "model": options.model, "threads": options.threads,
        "repeats": options.repeats, "rounds": options.rounds,
    });
    println!(
        "{:>12} {:>9} {:>10} {:>12} {:>6}",
        "", "unit", "grpo-host", "transformers", "ratio"
    );
    let mut least = f64::INFINITY;
    for (label, unit, less) in PAIRS {
        if let (Some(a), Some(b)) = (ours.get(label), peer.get(label)) {
            let r = ratio(*a, *b, less);
            least = least.min(r);
            println!("{label:>12} {unit:>9} {a:>10.3} {b:>12.3} {r:>6.2}");
            object[label] = serde_json::json!({"unit": unit, "ours": a, "peer": b, "ratio": r});
        }
    }
    object["value"] = least.into();
    println!("{object}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_of_all_rounds_is_kept_and_a_ratio_above_1_means_faster() {
        let mut best = Best::new();
        measure(&[("decode", 10.0), ("train", 2.0)], &mut best).unwrap();
        measure(&[("decode", 30.0), ("train", 4.0)], &mut best).unwrap();
        assert_eq!(best, Best::from([("decode", 30.0), ("train", 2.0)]));
        assert_eq!(ratio(30.0, 10.0, false), 3.0);
        assert_eq!(ratio(2.0, 3.0, true), 1.5);
    }

    #[test]
    fn flags_are_read_and_unknown_ones_refused() {
        let options =
            Options::parse(&["--model", "m", "--what", "train", "--rounds", "2"]).unwrap();
        assert_eq!((options.model.as_str(), options.rounds), ("m", 2));
        assert!(options.train && !options.decode);
        for bad in [
            &["--model"][..],
            &[],
            &["--model", "m", "--fast", "1"],
            &["--model", "m", "--repeats", "0"],
            &["--model", "m", "--what", "sleep"],
        ] {
            assert!(Options::parse(bad).is_err(), "{bad:?}");
        }
    }
}
