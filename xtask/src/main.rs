//! `cargo xtask NAME`: the chores of this repository. Owns the dispatch only.

mod bench;
mod fuzz;
mod kernels;
mod languages;
mod plugins;
mod test;

use std::process::ExitCode;

use anyhow::{Context, bail};

const USAGE: &str = "\
usage: cargo xtask <command>
  test              everything CI runs: format, lints, plugins, tests
  plugins [--check] build the shipped plugins into plugins/dist, or check that dist is up to date
  component IN OUT  make a component of a guest's core module, as `plugins` does for ours
  compose WRAPPER INNER OUT  make one component of two: INNER answers what WRAPPER imports
  languages [--write]  build and test a plugin of every template of `plugin new`; --write: into plugins/dist
  fuzz [--seconds N] [TARGET]  libFuzzer against the plugin API: component, verdicts
  kernels           compile every CUDA kernel for every GPU; needs none
  tidy              the layering, size and naming rules alone";

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> anyhow::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match args[..] {
        ["test"] => test::run(),
        ["plugins"] => plugins::run(false),
        ["plugins", "--check"] => plugins::run(true),
        ["component", module, out] => plugins::component(module.as_ref(), out.as_ref()),
        ["compose", wrapper, inner, out] => {
            plugins::compose(wrapper.as_ref(), inner.as_ref(), out.as_ref())
        }
        ["languages"] => languages::run(false),
        ["languages", "--write"] => languages::run(true),
        ["fuzz", ref rest @ ..] => fuzz::run(rest),
        ["kernels"] => kernels::run(),
        ["tidy"] => tidy(),
        ["bench", ref rest @ ..] => bench::run(rest),
        _ => bail!("unknown arguments {args:?}\n{USAGE}\n{}", bench::USAGE),
    }
}

fn tidy() -> anyhow::Result<()> {
    let root = xtask::tidy::workspace_root();
    let findings =
        xtask::tidy::check(&root).with_context(|| format!("reading {}", root.display()))?;
    for finding in &findings {
        eprintln!("{finding}");
    }
    if !findings.is_empty() {
        bail!("{} tidy findings", findings.len());
    }
    println!("tidy: nothing found");
    Ok(())
}
