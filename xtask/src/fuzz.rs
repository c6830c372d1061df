//! `xtask fuzz`: libFuzzer against the plugin API, with the targets in `tests/fuzz`.
//!
//! Not by cargo-fuzz: that wants a nightly compiler and builds every dependency anew with coverage, wasmtime and all, which
//! takes half an hour on two cores. Here only the crates of the workspace are instrumented, with flags that stable
//! rustc has, and all else is what the other commands have built. What a sanitizer would find is left out: there is no
//! `unsafe` in what is tested.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

/// Name of a target, and the longest input that can mean something to it.
const TARGETS: [(&str, &str); 2] = [("component", "16384"), ("verdicts", "65281")];
const SECONDS: &str = "30";

/// Builds the targets and runs each, or the one that is named, for some seconds.
pub(crate) fn run(args: &[&str]) -> Result<()> {
    let (mut seconds, mut only) = (SECONDS, None);
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        match *arg {
            "--seconds" => seconds = args.next().context("`--seconds` wants a number")?,
            name if TARGETS.iter().any(|(target, _)| *target == name) => only = Some(name),
            other => bail!("`{other}` is neither `--seconds N` nor a target: component, verdicts"),
        }
    }
    seconds
        .parse::<u32>()
        .with_context(|| format!("`--seconds {seconds}` is no number of seconds"))?;
    let root = xtask::tidy::workspace_root();
    build(&root)?;
    for (target, max_len) in TARGETS {
        if only.is_none_or(|name| name == target) {
            fuzz(&root, target, max_len, seconds)?;
        }
    }
    Ok(())
}

fn build(root: &Path) -> Result<()> {
    let mut cargo = Command::new("cargo");
    cargo
        .args(["build", "--release", "-p", "grpo-host", "-p", "grpo-tests"])
        .args(["--features", "grpo-tests/fuzz"])
        .env(
            "RUSTC_WORKSPACE_WRAPPER",
            root.join("tests/fuzz/instrument.sh"),
        )
        .current_dir(root);
    for (target, _) in TARGETS {
        cargo.args(["--example", &format!("fuzz-{target}")]);
    }
    let status = cargo.status().context("cannot run cargo")?;
    ensure!(status.success(), "the fuzz targets do not build");
    Ok(())
}

/// New inputs go to `target/fuzz/TARGET`, where the next run begins; those in `tests/fuzz/corpus` are read only.
fn fuzz(root: &Path, target: &str, max_len: &str, seconds: &str) -> Result<()> {
    let found = root.join("target/fuzz").join(target);
    std::fs::create_dir_all(&found)
        .with_context(|| format!("cannot create {}", found.display()))?;
    let program = root.join(format!("target/release/examples/fuzz-{target}"));
    let status = Command::new(&program)
        .arg(format!("-max_total_time={seconds}"))
        .arg(format!("-max_len={max_len}"))
        .args(["-timeout=30", "-rss_limit_mb=4096", "-print_final_stats=1"])
        .arg(format!(
            "-artifact_prefix={}/",
            root.join("target/fuzz").display()
        ))
        .arg(&found)
        .arg(root.join("tests/fuzz/corpus").join(target))
        .status()
        .with_context(|| format!("cannot run {}", program.display()))?;
    ensure!(
        status.success(),
        "`{target}` found something: its input is named above; copy it to tests/fuzz/corpus/{target}, and \
         `cargo test --release -p grpo-host -p grpo-tests --test fuzz_corpus` shows it again"
    );
    Ok(())
}
