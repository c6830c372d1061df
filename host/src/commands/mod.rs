//! One file per subcommand; this one chooses, and holds what several of them begin with.

/// `print!` for results: see [`output::write`].
macro_rules! out {
    ($($text:tt)*) => { $crate::commands::output::write(&format!($($text)*)) };
}
/// `println!` for results.
macro_rules! outln {
    () => { $crate::commands::output::write("\n") };
    ($($text:tt)*) => { $crate::commands::output::write(&format!("{}\n", format_args!($($text)*))) };
}

mod accounts;
mod bench_flops;
mod bench_gpu;
mod bench_model;
mod bench_plugin;
mod bench_rollout;
mod bench_spec;
mod bench_step;
mod bench_train;
mod doctor;
mod eval;
mod guest_log;
mod output;
mod plugin;
mod plugin_project;
mod plugin_swap;
mod progress;
mod replay;
mod results;
mod rollout;
mod sft;
mod sharing;
mod table;
mod train;

use crate::{
    cli::{BenchCommand, Command, Environment, GrantArgs},
    config::{ConfigError, DraftKind, RawConfig, RunConfig},
    defaults,
    draft::{self, Untrained},
    judge::Panel,
    policy::Policy,
    setup::PluginSources,
};

pub use bench_gpu::NothingToProfile;
pub use bench_plugin::PluginBenchError;
pub use plugin_project::{CasesFailed, NotBuilt};
pub use sharing::FileExists;
pub use train::{GrantsChanged, Interrupted, LockMissing, PluginChanged, ResumeChanges};

/// Runs a command to its end. Results go to stdout, progress to stderr.
pub fn run(command: Command, environment: &Environment) -> anyhow::Result<()> {
    match command {
        Command::Train(args) => train::run(&args, environment),
        Command::Eval(args) => eval::run(&args, environment),
        Command::Sft(args) => sft::run(&args, environment),
        Command::Rollout(args) => rollout::run(&args, environment),
        Command::Bench(BenchCommand::Rollout(args)) => bench_rollout::run(&args, environment),
        Command::Bench(BenchCommand::Train(args)) => bench_train::run(&args, environment),
        Command::Bench(BenchCommand::Step(args)) => bench_step::run(&args, environment),
        Command::Bench(BenchCommand::Spec(args)) => bench_spec::run(&args, environment),
        Command::Results(args) => results::run(&args),
        Command::Replay(args) => replay::run(&args, environment),
        Command::Doctor(args) => doctor::run(&args),
        Command::Plugin(command) => plugin::run(&command, environment),
        Command::Bench(BenchCommand::Plugin(args)) => bench_plugin::run(&args, environment),
    }
}

/// Validates what `over` lays over the defaults: those of the arithmetic example while no model is
/// named, plain ones otherwise.
fn config_over_defaults(
    over: impl Fn(RawConfig) -> Result<RawConfig, ConfigError>,
) -> Result<RunConfig, ConfigError> {
    let plain = over(RawConfig::default())?;
    match plain.validate()?.input.model {
        Some(_) => plain.validate(),
        None => over(defaults::config()?)?.validate(),
    }
}

/// The same for a command that asks no draft of the config. One that was asked for by key or file has no effect
/// and is told of; the one of the arithmetic example nobody asked for.
fn config_without_draft(
    command: &str,
    over: impl Fn(RawConfig) -> Result<RawConfig, ConfigError>,
) -> Result<RunConfig, ConfigError> {
    let asked = over(RawConfig::default())?.validate()?.generation.draft;
    if asked != DraftKind::None {
        warn(&format!("draft has no effect on {command}"));
    }
    config_over_defaults(over)
}

/// For a command that has no use for several GPUs: it says so, and uses one.
fn use_one_gpu(config: &mut RunConfig) {
    if config.hardware.gpus > 1 {
        warn("gpus has no effect here: one is used");
        config.hardware.gpus = 1;
    }
}

/// Sizes the thread pool that all tensor work runs on.
fn set_threads(threads: Option<u32>) -> anyhow::Result<()> {
    let Some(threads) = threads else {
        return Ok(());
    };
    let cores = std::thread::available_parallelism()?.get();
    // The workers of a matrix product wait for each other by spinning: with many more of them than cores
    // a step takes minutes.
    anyhow::ensure!(
        threads as usize <= 4 * cores,
        "{threads} threads are too many for {cores} cores; allowed: 1 to {}",
        4 * cores
    );
    Ok(grpo_policy::backend::cpu::set_threads(threads as usize)?)
}

/// Gives the policy the config's draft, for a command that only generates with it.
fn attach_draft(
    policy: &mut Policy,
    config: &RunConfig,
    environment: &Environment,
    quiet: bool,
) -> anyhow::Result<()> {
    let mut on_download = progress::downloads(quiet);
    let attached = draft::attach(policy, config, false, environment, &mut on_download)?;
    attached.odd.iter().for_each(|odd| warn(odd));
    tell_of_head(draft::untrained_head(policy, config, false), quiet);
    tell_of_device(policy, quiet);
    Ok(())
}

/// Says how a GPU's memory is used, or why one was passed over.
fn tell_of_device(policy: &Policy, quiet: bool) {
    if let Some(reason) = policy.passed_over() {
        let hint = reason.hint().map(|hint| format!("\nhint: {hint}"));
        let hint = hint.unwrap_or_default();
        warn(&format!("running on the CPU: {reason}{hint}"));
    }
    for plan in policy.memory_plans().filter(|_| !quiet) {
        eprintln!("{plan}");
    }
}

/// Where plugins come from for a command that tries one without a run, with the judges that it was given.
fn sources_on_trial(
    access: &GrantArgs,
    quiet: bool,
    environment: &Environment,
) -> anyhow::Result<PluginSources> {
    let config = access.config()?.validate()?;
    let judges = Panel::of(&config, environment, &mut progress::downloads(quiet))?;
    tell_of_judges(&judges, quiet);
    Ok(PluginSources::new(environment, &[])?.with_judges(judges))
}

/// Says what judges in this process take.
fn tell_of_judges(judges: &Panel, quiet: bool) {
    for line in judges.in_this_process().filter(|_| !quiet) {
        eprintln!("{line}");
    }
}

fn warn(text: &str) {
    eprintln!("warning: {text}");
}

fn tell_of_head(untrained: Option<Untrained>, quiet: bool) {
    match untrained {
        Some(Untrained::Odd(text)) => warn(&text),
        Some(Untrained::Learns(text)) if !quiet => eprintln!("{text}"),
        Some(Untrained::Learns(_)) | None => {}
    }
}

/// Tells the user, once, that the draft was given up.
fn tell_of_fault(policy: &mut Policy, config: &RunConfig) {
    if let Some(fault) = draft::take_fault(policy, config) {
        warn(&fault);
    }
}
