//! The command line, and the only reader of the environment.
//!
//! Owns flags and how they map to config keys. Commands get parsed arguments and an [`Environment`];
//! what a command does is in `commands`.

mod environment;
mod plugin_arg;
mod sharing;
#[cfg(test)]
mod tests;
mod tools;
mod training;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::config::{ConfigError, Device, DraftKind, DraftTokens, PluginConfig, RawConfig};

pub use environment::Environment;
pub use plugin_arg::PluginArg;
pub use sharing::{
    PluginPullArgs, PluginPushArgs, PluginSearchArgs, PluginSignArgs, PluginVerifyArgs,
    SharingCommand,
};
pub use tools::{
    BenchCommand, BenchPluginArgs, BenchRolloutArgs, BenchSpecArgs, BenchStepArgs, BenchTrainArgs,
    COMPILE_TRIAL, DoctorArgs, GrantArgs, PluginBuildArgs, PluginCheckArgs, PluginCommand,
    PluginFileArgs, PluginNewArgs, PluginSwapArgs, PluginTestArgs, ReplayArgs, ResultsArgs,
    ShapeArgs, judges,
};
pub use training::{EvalArgs, RolloutArgs, SftArgs, TrainArgs};

/// Trains language models with GRPO; rewards, prompt formats and curricula are WebAssembly plugins.
///
/// With no argument at all it trains a tiny built-in model on arithmetic.
#[derive(Debug, Parser)]
#[command(name = "grpo-host", version, args_conflicts_with_subcommands = true)]
pub struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    train: TrainArgs,
}

impl Cli {
    /// The command; `train` if none is named.
    pub fn into_command(self) -> Command {
        self.command.unwrap_or(Command::Train(self.train))
    }
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Train a model with GRPO (the default command)
    Train(TrainArgs),
    /// Measure a model's accuracy on held-out rows
    Eval(EvalArgs),
    /// Train a model on prompt/answer rows
    Sft(SftArgs),
    /// Continue one prompt, without training
    Rollout(RolloutArgs),
    /// Summarise a run directory
    Results(ResultsArgs),
    /// Score a run's completions again: with its own rewards, or with others to compare
    Replay(ReplayArgs),
    /// Measure this machine's speed
    #[command(subcommand, arg_required_else_help = false)]
    Bench(BenchCommand),
    /// Show what this build and machine can do
    Doctor(DoctorArgs),
    /// Make, build, test and look at plugins
    #[command(subcommand, arg_required_else_help = false)]
    Plugin(PluginCommand),
}

impl Command {
    /// What the command prints, and how.
    pub fn output(&self) -> OutputArgs {
        match self {
            Self::Train(args) => args.output,
            Self::Eval(args) => args.output,
            Self::Sft(args) => args.output,
            Self::Rollout(args) => args.output,
            Self::Results(args) => args.output,
            Self::Replay(args) => args.output,
            Self::Bench(BenchCommand::Rollout(args)) => args.output,
            Self::Bench(BenchCommand::Train(args)) => args.output,
            Self::Bench(BenchCommand::Plugin(args)) => args.output,
            Self::Bench(BenchCommand::Spec(args)) => args.output,
            Self::Bench(BenchCommand::Step(args)) => args.output,
            Self::Doctor(args) => args.output,
            Self::Plugin(PluginCommand::New(args)) => args.output,
            Self::Plugin(PluginCommand::Build(args)) => args.output,
            Self::Plugin(PluginCommand::Test(args)) => args.output,
            Self::Plugin(PluginCommand::Inspect(args)) => args.output,
            Self::Plugin(PluginCommand::Check(args)) => args.output,
            Self::Plugin(PluginCommand::Swap(args)) => args.output,
            Self::Plugin(PluginCommand::Sharing(command)) => command.output(),
            Self::Plugin(PluginCommand::CompileTrial { .. }) => OutputArgs::default(),
        }
    }
}

/// Flags of every command. Not clap's `global`: a flag before the subcommand would conflict with it.
#[derive(Args, Clone, Copy, Debug, Default)]
pub struct OutputArgs {
    /// Print one JSON object as the last line of stdout
    #[arg(long)]
    pub json: bool,
    /// Print results and errors only
    #[arg(long, short)]
    pub quiet: bool,
}

/// Flags of every command that runs a model, each over a config key.
#[derive(Args, Debug, Default)]
pub struct ModelArgs {
    /// YAML file of config keys; flags win over it
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Set any config key, the value in YAML; a.b is the key b inside of a; may be given several times
    #[arg(long, value_name = "KEY=VALUE", value_parser = key_and_value)]
    pub set: Vec<(String, String)>,
    /// Model folder, GGUF file or hub id [default: the built-in model]
    #[arg(long, value_name = "PATH|HUB-ID")]
    pub model: Option<String>,
    /// Branch, tag or commit of a hub model
    #[arg(long, value_name = "REV")]
    pub revision: Option<String>,
    /// Where to run; auto is the first usable GPU, else the CPU [default: auto]
    #[arg(long, value_name = "auto|cpu|cuda:N")]
    pub device: Option<Device>,
    /// Of a GPU's memory, what this process may use, up to 1 [default: 0.9]
    #[arg(long, value_name = "FRACTION")]
    pub gpu_memory_utilization: Option<f64>,
    /// On a GPU, make logits independent of what else is in the batch; slower
    #[arg(long)]
    pub deterministic: bool,
    /// Whether matrices that a GGUF file has quantised stay so on a GPU [default: auto]
    #[arg(long, value_name = "auto|keep|dequantize")]
    pub quantized_weights: Option<String>,
    /// CPU threads [default: one per core]
    #[arg(long, value_name = "N")]
    pub threads: Option<u32>,
    /// Source of every random choice
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
}

impl ModelArgs {
    /// `base`, then the config file, then these flags.
    pub fn over(&self, mut base: RawConfig) -> Result<RawConfig, ConfigError> {
        if let Some(path) = &self.config {
            base.overlay(RawConfig::from_file(path)?);
        }
        for (key, value) in &self.set {
            base.set_pair(key, value, "--set")?;
        }
        set(&mut base, "model", "--model", self.model.as_ref())?;
        set(&mut base, "revision", "--revision", self.revision.as_ref())?;
        set(&mut base, "device", "--device", self.device)?;
        set(
            &mut base,
            "gpu_memory_utilization",
            "--gpu-memory-utilization",
            self.gpu_memory_utilization,
        )?;
        let deterministic = self.deterministic.then_some(true);
        set(&mut base, "deterministic", "--deterministic", deterministic)?;
        set(
            &mut base,
            "quantized_weights",
            "--quantized-weights",
            self.quantized_weights.as_ref(),
        )?;
        set(&mut base, "threads", "--threads", self.threads)?;
        set(&mut base, "seed", "--seed", self.seed)?;
        Ok(base)
    }
}

/// Several GPUs, for the commands that divide their work among them.
#[derive(Args, Clone, Copy, Debug, Default)]
pub struct GpuArgs {
    /// GPUs of this machine that share the work, from --device on [default: 1]
    #[arg(long, value_name = "N")]
    pub gpus: Option<u32>,
}

impl GpuArgs {
    /// These flags over `base`.
    pub fn over(self, mut base: RawConfig) -> Result<RawConfig, ConfigError> {
        set(&mut base, "gpus", "--gpus", self.gpus)?;
        Ok(base)
    }
}

/// Speculative decoding, for the commands that generate. The others must not take the flags and ignore
/// them.
#[derive(Args, Debug, Default)]
pub struct DraftArgs {
    /// Speculative decoding: who guesses; `model:embedded` is the built-in model's draft [default: none,
    /// with the built-in model model:embedded]
    #[arg(long, value_name = "none|ngram|suffix|model:PATH|layers:K")]
    pub draft: Option<DraftKind>,
    /// Tokens guessed at a time [default: auto]
    #[arg(long, value_name = "auto|N")]
    pub draft_tokens: Option<DraftTokens>,
}

impl DraftArgs {
    /// These flags over `base`.
    pub fn over(&self, mut base: RawConfig) -> Result<RawConfig, ConfigError> {
        set(&mut base, "draft", "--draft", self.draft.as_ref())?;
        set(
            &mut base,
            "draft_tokens",
            "--draft-tokens",
            self.draft_tokens,
        )?;
        Ok(base)
    }
}

fn key_and_value(text: &str) -> Result<(String, String), String> {
    text.split_once('=')
        .map(|(key, value)| (key.trim().to_owned(), value.to_owned()))
        .ok_or_else(|| "no `=` between key and value".to_owned())
}

fn set<V: serde::Serialize>(
    raw: &mut RawConfig,
    key: &'static str,
    flag: &'static str,
    value: Option<V>,
) -> Result<(), ConfigError> {
    value.map_or(Ok(()), |value| raw.set(key, flag, value))
}

fn set_plugins(raw: &mut RawConfig, plugins: &[PluginArg]) -> Result<(), ConfigError> {
    if plugins.is_empty() {
        return Ok(());
    }
    let plugins: Vec<PluginConfig> = plugins.iter().map(PluginArg::config).collect();
    raw.set("plugins", "--plugin", plugins)
}
