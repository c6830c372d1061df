//! `grpo-host plugin new|build|test`: from an empty folder to a component that gives the rewards it should.

use std::path::{Path, PathBuf};
use std::time::Instant;

use serde_json::json;

use super::{accounts::settle, guest_log::guest_log, sources_on_trial};
use crate::{
    authoring::{self, AuthoringError},
    cases,
    cli::{Environment, PluginBuildArgs, PluginNewArgs, PluginTestArgs},
    plugin::{PluginHost, printable},
    role_cases::{self, Outcome},
    setup::{self, Component},
    types::Role,
};

/// Bytes of a case's name and of a difference that are printed; both may hold a guest's text.
const SHOWN: usize = 400;

/// Failed cases that are printed; all are counted.
const FAILURES: usize = 20;

/// Cases that the plugin got wrong; which and how has been printed.
#[derive(Debug, thiserror::Error)]
#[error("{failed} of {all} cases failed")]
pub struct CasesFailed {
    failed: usize,
    all: usize,
}

impl CasesFailed {
    /// What the reader can do about it.
    pub fn hint(&self) -> Option<String> {
        Some("correct the plugin and build it again, or the cases".to_owned())
    }
}

/// A project without a component.
#[derive(Debug, thiserror::Error)]
#[error("`{}` is not built", dir.display())]
pub struct NotBuilt {
    dir: PathBuf,
}

impl NotBuilt {
    /// What the reader can do about it.
    pub fn hint(&self) -> Option<String> {
        Some(format!("grpo-host plugin build {}", self.dir.display()))
    }
}

/// Writes a project and says what to do with it.
pub(super) fn new(args: &PluginNewArgs) -> anyhow::Result<()> {
    let dir = &args.name;
    authoring::create(args.language, args.role, dir)?;
    if args.output.json {
        let main_file = args.language.main_file();
        let role = args.role;
        outln!(
            "{}",
            json!({ "dir": dir, "main_file": main_file, "role": role })
        );
        return Ok(());
    }
    let (language, dir) = (args.language, dir.display());
    outln!("{dir}: a {} in {language}", args.role);
    if !args.output.quiet {
        let grants = match args.language {
            authoring::Language::Go => r#" --grants '{"wasi": true}'"#,
            _ => "",
        };
        outln!(" next: grpo-host plugin build {dir} && grpo-host plugin test {dir}{grants}");
    }
    Ok(())
}

/// Compiles a project and says where the component is.
pub(super) fn build(args: &PluginBuildArgs) -> anyhow::Result<()> {
    let begun = Instant::now();
    let built = authoring::build(&args.dir)?;
    let seconds = begun.elapsed().as_secs_f64();
    if args.output.json {
        let object = json!({
            "component": built.path,
            "language": built.language.to_string(),
            "bytes": built.bytes,
            "seconds": seconds,
        });
        outln!("{object}");
        return Ok(());
    }
    let path = built.path.display();
    outln!("{path}: {} bytes, {seconds:.1} s", built.bytes);
    Ok(())
}

/// Scores the cases and prints those that differ, and with them how.
pub(super) fn test(args: &PluginTestArgs, environment: &Environment) -> anyhow::Result<()> {
    let (source, beside) = component_and_cases(&args.plugin)?;
    let beside = args.cases.as_ref().unwrap_or(&beside);
    let limits = cases::strict(&setup::limits(&source, &args.limits())?);
    let sources = sources_on_trial(&args.access, args.output.quiet, environment)?;
    let Component { name, bytes, .. } = sources.component(&source, &limits)?;
    let access = sources.access(&name, &args.access.grants)?;
    let prepared = PluginHost::new(guest_log())?.prepare_with(&name, &bytes, &limits, access)?;
    let outcomes: Vec<Outcome> = match prepared.id().role {
        Role::Reward => {
            let told = cases::run(&prepared, &cases::read(beside)?)?;
            told.into_iter()
                .map(Outcome::of_reward)
                .collect::<Result<_, _>>()?
        }
        Role::Formatter => role_cases::run_formatter(&prepared, &cases::read_as(beside)?)?,
        Role::Curriculum => role_cases::run_curriculum(&prepared, &cases::read_as(beside)?)?,
    };
    let asked = settle(sources.judges());
    let failed = outcomes
        .iter()
        .filter(|o| !o.differences.is_empty())
        .count();
    if args.output.json {
        let passed = outcomes.len() - failed;
        let object =
            json!({ "passed": passed, "failed": failed, "cases": outcomes, "judges": asked });
        outln!("{object}");
    } else {
        let mut failures = 0;
        for outcome in &outcomes {
            failures += usize::from(!outcome.differences.is_empty());
            if outcome.differences.is_empty() || failures <= FAILURES {
                print(outcome, args.output.quiet);
            }
        }
        if failures > FAILURES {
            outln!("… and {} more that failed", failures - FAILURES);
        }
        for (judge, asked) in asked.iter().filter(|_| !args.output.quiet) {
            outln!("judge  {}", asked.show(judge));
        }
        outln!("{} passed, {failed} failed", outcomes.len() - failed);
    }
    let all = outcomes.len();
    match failed {
        0 => Ok(()),
        failed => Err(CasesFailed { failed, all }.into()),
    }
}

fn print(outcome: &Outcome, quiet: bool) {
    let name = printable(&outcome.name, SHOWN);
    if outcome.differences.is_empty() {
        if !quiet {
            outln!("  ok  {:>4}  {name}", outcome.line);
        }
        return;
    }
    outln!("FAIL  {:>4}  {name}", outcome.line);
    for difference in &outcome.differences {
        outln!("            {}", printable(difference, SHOWN));
    }
}

/// The component that `plugin` means, and the file of cases that is its own.
fn component_and_cases(plugin: &str) -> anyhow::Result<(String, PathBuf)> {
    let path = Path::new(plugin);
    if !path.is_dir() {
        let folder = path.parent().unwrap_or(Path::new(""));
        return Ok((plugin.to_owned(), folder.join("cases.jsonl")));
    }
    authoring::Language::of(path)?;
    let component = authoring::component_path(path)?;
    if !component.is_file() {
        let dir = path.to_owned();
        return Err(NotBuilt { dir }.into());
    }
    let text = component.to_str().map(str::to_owned);
    let source = text.ok_or_else(|| AuthoringError::Name {
        name: component.to_string_lossy().into_owned(),
    })?;
    Ok((source, path.join("cases.jsonl")))
}
