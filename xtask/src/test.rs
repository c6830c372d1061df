//! `cargo xtask test`: what CI runs, step by step, in the one release profile.
//!
//! Installs nothing but the registry that the tests of sharing speak to, from Debian, and the compilers of `languages` into target/. Another missing
//! tool ends the run with the command that installs it; without nextest
//! the tests run under `cargo test`. The last line is always `N passed, N failed`.

use std::{
    io::{BufRead, BufReader, Read, Write},
    path::Path,
    process::{Command, Stdio},
    time::Instant,
};

use anyhow::{Context, bail};

use crate::plugins;

/// Tests seen so far, over all runners.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Tally {
    passed: u64,
    failed: u64,
}

/// Runs all steps; the first that fails ends the run.
pub(crate) fn run() -> anyhow::Result<()> {
    let mut tally = Tally::default();
    let outcome = steps(&mut tally);
    if let Err(error) = &outcome {
        eprintln!("error: {error:#}");
    }
    println!("{} passed, {} failed", tally.passed, tally.failed);
    if outcome.is_err() {
        // Already reported, above the closing line.
        std::process::exit(1);
    }
    Ok(())
}

fn steps(tally: &mut Tally) -> anyhow::Result<()> {
    let root = xtask::tidy::workspace_root();
    let guests = root.join("plugins/Cargo.toml").is_file();
    // A workspace of its own is the one with an interpreter in it.
    let in_guests = [
        ("plugins", ["--manifest-path", "plugins/Cargo.toml"]),
        (
            "reward-code",
            ["--manifest-path", "plugins/reward-code/Cargo.toml"],
        ),
    ];
    let clippy = ["clippy", "--quiet", "--release", "--all-targets"];
    let deny = ["--", "-D", "warnings"];

    need(
        "rustfmt",
        &["fmt", "--version"],
        "rustup component add rustfmt",
    )?;
    need(
        "clippy",
        &["clippy", "--version"],
        "rustup component add clippy",
    )?;
    let mut step = |name: &str, args: &[&str]| cargo(&root, name, args, tally);

    step("format", &["fmt", "--all", "--check"])?;
    step("clippy", &[&clippy[..], &["--workspace"], &deny].concat())?;
    for (name, place) in in_guests.iter().filter(|_| guests) {
        let format = [&["fmt", "--all", "--check"], &place[..]].concat();
        step(&format!("format of {name}"), &format)?;
        let lints = [&clippy[..], place, &deny].concat();
        step(&format!("clippy of {name}"), &lints)?;
    }
    timed("plugins --check", || plugins::run(true))?;
    timed("docker-registry", registry)?;
    if found(&["nextest", "--version"]) {
        step(
            "tests",
            &[
                "nextest",
                "run",
                "--release",
                "--workspace",
                "--no-fail-fast",
            ],
        )?;
    } else {
        let all = [
            "test",
            "--release",
            "--workspace",
            "--lib",
            "--bins",
            "--tests",
        ];
        step("tests", &[&all[..], &["--no-fail-fast"]].concat())?;
    }
    timed("kernels", crate::kernels::run)?;
    timed("languages", || crate::languages::run(false))?;
    step("doc tests", &["test", "--release", "--workspace", "--doc"])?;
    for (name, place) in in_guests.iter().filter(|_| guests) {
        let tests = [&["test", "--release"], &place[..]].concat();
        step(&format!("tests of {name}"), &tests)?;
    }
    Ok(())
}

/// Makes sure of `docker-registry`, which `tests/tests/registry.rs` starts.
fn registry() -> anyhow::Result<()> {
    let runs = |program: &str, args: &[&str]| {
        let mut command = Command::new(program);
        command.args(args).stdout(Stdio::null());
        command.status().is_ok_and(|status| status.success())
    };
    let there = || runs("docker-registry", &["--version"]);
    // The lists of packages of a new machine are empty or old.
    let install =
        || runs("apt-get", &["update"]) && runs("apt-get", &["install", "-y", "docker-registry"]);
    if there() || (install() && there()) {
        return Ok(());
    }
    bail!("docker-registry is not installed; run `apt-get install docker-registry`")
}

/// Whether `cargo ARGS` runs at all.
fn found(args: &[&str]) -> bool {
    Command::new("cargo")
        .args(args)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

fn need(tool: &str, version: &[&str], install: &str) -> anyhow::Result<()> {
    if !found(version) {
        bail!("{tool} is not installed; run `{install}`");
    }
    Ok(())
}

fn timed(name: &str, step: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<()> {
    println!("── {name}");
    let start = Instant::now();
    step().with_context(|| format!("step `{name}` failed"))?;
    println!("── {name}: ok, {:.1} s", start.elapsed().as_secs_f64());
    Ok(())
}

/// Runs cargo, passes its output on and counts the tests it reports.
fn cargo(root: &Path, name: &str, args: &[&str], tally: &mut Tally) -> anyhow::Result<()> {
    timed(name, || {
        let mut child = Command::new("cargo")
            .args(args)
            .current_dir(root)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("starting cargo")?;
        let (out, err) = (child.stdout.take(), child.stderr.take());
        // One thread a pipe: a child blocks once either is full.
        let (counted_out, counted_err) = std::thread::scope(|scope| {
            let err = scope.spawn(|| relay(err, std::io::stderr()));
            let out = relay(out, std::io::stdout());
            (out, err.join())
        });
        for counted in [
            counted_out?,
            counted_err.map_err(|_panic| anyhow::anyhow!("the relay of stderr panicked"))??,
        ] {
            tally.passed += counted.passed;
            tally.failed += counted.failed;
        }
        let status = child.wait()?;
        if !status.success() {
            bail!("`cargo {}`: {status}", args.join(" "));
        }
        Ok(())
    })
}

fn relay(from: Option<impl Read>, mut to: impl Write) -> anyhow::Result<Tally> {
    let mut tally = Tally::default();
    let Some(from) = from else { return Ok(tally) };
    let mut from = BufReader::new(from);
    let mut line = Vec::new();
    // Bytes, not strings: tests may print what is not UTF-8.
    while from.read_until(b'\n', &mut line)? > 0 {
        to.write_all(&line)?;
        let counted = count(&String::from_utf8_lossy(&line));
        tally.passed += counted.passed;
        tally.failed += counted.failed;
        line.clear();
    }
    to.flush()?;
    Ok(tally)
}

/// Reads a summary line of nextest (`Summary [ 1.0s] 5 tests run: 4 passed, 1 failed, …`) or of libtest
/// (`test result: ok. 4 passed; 0 failed; …`); any other line counts nothing.
fn count(line: &str) -> Tally {
    // nextest repeats a failed test's own `test result: …`, indented: not to be counted again.
    if !line.trim_start().starts_with("Summary [") && !line.starts_with("test result: ") {
        return Tally::default();
    }
    let words: Vec<&str> = line
        .split([' ', ',', ';', '.'])
        .filter(|word| !word.is_empty())
        .collect();
    let before = |name: &str| {
        words
            .windows(2)
            .filter(|pair| pair[1] == name)
            .find_map(|pair| pair[0].parse().ok())
            .unwrap_or(0)
    };
    Tally {
        passed: before("passed"),
        failed: before("failed") + before("timed"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn summaries_of_both_runners_are_counted() {
        let counts = |line| {
            let tally = count(line);
            (tally.passed, tally.failed)
        };
        assert_eq!(
            counts(
                "     Summary [   1.234s] 5 tests run: 4 passed (1 slow), 1 failed, 2 skipped\n"
            ),
            (4, 1)
        );
        assert_eq!(
            counts("     Summary [   0.004s] 5 tests run: 5 passed, 0 skipped"),
            (5, 0)
        );
        assert_eq!(
            counts("test result: FAILED. 3 passed; 2 failed; 0 ignored; 0 measured"),
            (3, 2)
        );
        assert_eq!(
            counts("    test result: FAILED. 0 passed; 1 failed;"),
            (0, 0)
        );
        assert_eq!(counts("test result_is_7 passed ... ok"), (0, 0));
    }

    #[test]
    fn relay_passes_bytes_on_unchanged() {
        let bytes = b"a\xff\ntest result: ok. 2 passed; 0 failed;\nno newline";
        let mut to = Vec::new();
        let tally = relay(Some(&bytes[..]), &mut to).unwrap();
        assert_eq!(to, bytes);
        assert_eq!(
            tally,
            Tally {
                passed: 2,
                failed: 0
            }
        );
    }
}
