//! Arguments of the commands that look and measure: `results`, `replay`, `bench`, `doctor`, `plugin`.

use std::path::{Path, PathBuf};

use clap::{ArgGroup, Args, Subcommand};
use serde_json::{Map, Value};

use super::{GpuArgs, ModelArgs, OutputArgs, PluginArg, SharingCommand, set};
use crate::authoring::Language;
use crate::config::{ConfigError, DraftKind, DraftTokens, PluginConfig, RawConfig};
use crate::swap::MAX_SHADOW;
use crate::types::Role;

#[derive(Args, Debug)]
pub struct ResultsArgs {
    /// Run directory
    #[arg(value_name = "RUN")]
    pub run: PathBuf,
    #[command(flatten)]
    pub output: OutputArgs,
}

#[derive(Args, Debug)]
#[command(group(ArgGroup::new("other").args(["plugins", "config"]).multiple(true)))]
pub struct ReplayArgs {
    /// Run directory
    #[arg(value_name = "RUN")]
    pub run: PathBuf,
    /// Reward to compare with the run's own, with its weight; may be given several times
    #[arg(long = "plugin", value_name = "FILE|REF[=WEIGHT]")]
    pub plugins: Vec<PluginArg>,
    /// YAML file whose `plugins` has the rewards to compare with, settings, limits and grants included
    #[arg(long, value_name = "FILE", conflicts_with = "plugins")]
    pub config: Option<PathBuf>,
    /// JSON object with what each `--plugin` is granted, as under `grants` in a config
    #[arg(long, value_name = "JSON", requires = "plugins", value_parser = json_object)]
    pub grants: Option<Map<String, Value>>,
    /// Judges that may be granted, as `plugin check` takes them [default: those of the run]
    #[arg(long, value_name = "FILE|JSON", requires = "grants")]
    pub judges: Option<String>,
    /// Draw the comparison into an HTML file
    #[arg(long, value_name = "FILE.html", requires = "other", value_parser = html_file)]
    pub out: Option<PathBuf>,
    #[command(flatten)]
    pub output: OutputArgs,
}

impl ReplayArgs {
    /// The config whose rewards are compared with the run's; `None` to check the run's own.
    pub fn other(&self) -> Result<Option<RawConfig>, ConfigError> {
        if let Some(path) = &self.config {
            return RawConfig::from_file(path).map(Some);
        }
        if self.plugins.is_empty() {
            return Ok(None);
        }
        let granted = |plugin: &PluginArg| PluginConfig {
            grants: self.grants.clone().unwrap_or_default(),
            ..plugin.config()
        };
        let mut raw = RawConfig::default();
        let plugins: Vec<PluginConfig> = self.plugins.iter().map(granted).collect();
        raw.set("plugins", "--plugin", plugins)?;
        Ok(Some(raw))
    }
}

/// What a plugin gets beyond its arguments, for the commands that try one without a run.
#[derive(Args, Debug)]
pub struct GrantArgs {
    /// JSON object with what it is granted, as under `grants` in a config
    #[arg(long, value_name = "JSON", default_value = "{}", value_parser = json_object)]
    pub grants: Map<String, Value>,
    /// Judges that it may be granted: a config file that has `judges`, or a JSON object of them
    #[arg(long, value_name = "FILE|JSON")]
    pub judges: Option<String>,
}

impl GrantArgs {
    /// The config that has the judges: no others than those of `--judges`.
    pub fn config(&self) -> Result<RawConfig, ConfigError> {
        self.judges
            .as_deref()
            .map_or_else(|| Ok(RawConfig::default()), judges)
    }
}

/// The config of `--judges FILE|JSON`. No name of a config file begins with a brace.
pub fn judges(given: &str) -> Result<RawConfig, ConfigError> {
    match given.trim_start().starts_with('{') {
        true => RawConfig::from_pair("judges", given, "--judges"),
        false => RawConfig::from_file(Path::new(given)),
    }
}

fn html_file(text: &str) -> Result<PathBuf, String> {
    let path = PathBuf::from(text);
    if path.extension().is_some_and(|end| end == "html") {
        Ok(path)
    } else {
        Err("the name must end in .html".to_owned())
    }
}

#[derive(Debug, Subcommand)]
pub enum BenchCommand {
    /// Tokens per second of sampling
    Rollout(BenchRolloutArgs),
    /// Time of one forward, backward and optimizer step
    Train(BenchTrainArgs),
    /// Time of one whole GRPO step: rollout, reward, update
    Step(BenchStepArgs),
    /// Time of one plugin call
    Plugin(BenchPluginArgs),
    /// What speculative decoding brings, draft by draft
    Spec(BenchSpecArgs),
}

/// A model of nothing but a shape: speed does not depend on what the weights are.
#[derive(Args, Debug)]
pub struct ShapeArgs {
    /// Measure random weights of the shape given by `--shape` instead of `--model`
    #[arg(long, requires = "shape", conflicts_with = "model")]
    pub random_weights: bool,
    /// The `config.json` of a model, or one of qwen2.5-0.5b, qwen2.5-1.5b, qwen3-0.6b, smollm2-135m
    #[arg(long, value_name = "NAME|FILE", requires = "random_weights")]
    pub shape: Option<PathBuf>,
}

#[derive(Args, Debug)]
pub struct BenchRolloutArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// Prompts of a call
    #[arg(long, alias = "batch", value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub prompts: u32,
    /// Completions of each prompt; all are decoded together
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub n: u32,
    /// Tokens of each prompt [default: 128, or half of a shorter context]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub prompt_tokens: Option<u32>,
    /// Tokens of each completion [default: 64, or what is left of a shorter context]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(2..))]
    pub new_tokens: Option<u32>,
    /// Runs measured, after one to warm up; the best counts
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    pub repeats: u32,
    /// Go on behind an end-of-text token. It is always so here; the flag is for scripts that run vLLM's benchmark too
    #[arg(long)]
    pub ignore_eos: bool,
    /// Time the kernels of a decoding step too, on a GPU
    #[arg(long)]
    pub profile: bool,
    #[command(flatten)]
    pub shape: ShapeArgs,
    #[command(flatten)]
    pub output: OutputArgs,
}

#[derive(Args, Debug)]
pub struct BenchSpecArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// Rows whose prompts are continued [default: the built-in rows]
    #[arg(long, value_name = "PATH|HUB-ID")]
    pub data: Option<String>,
    /// Tokens guessed at a time [default: auto]
    #[arg(long, value_name = "auto|N")]
    pub draft_tokens: Option<DraftTokens>,
    /// Drafts to compare with plain decoding
    #[arg(
        long,
        value_name = "KIND,…",
        value_delimiter = ',',
        default_value = "ngram,suffix"
    )]
    pub drafts: Vec<DraftKind>,
    /// Sequences decoded together
    #[arg(long, value_name = "N,…", value_delimiter = ',', default_value = "1,4,16", value_parser = clap::value_parser!(u32).range(1..))]
    pub batches: Vec<u32>,
    /// Tokens of each completion
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(2..))]
    pub new_tokens: u32,
    /// Runs measured, after one to warm up; the best counts
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..))]
    pub repeats: u32,
    #[command(flatten)]
    pub output: OutputArgs,
}

impl BenchSpecArgs {
    /// The config these flags lay over `base`.
    pub fn over(&self, base: RawConfig) -> Result<RawConfig, ConfigError> {
        let mut raw = self.model.over(base)?;
        set(&mut raw, "data", "--data", self.data.as_ref())?;
        let at_a_time = self.draft_tokens;
        set(&mut raw, "draft_tokens", "--draft-tokens", at_a_time)?;
        let tokens = Some(self.new_tokens);
        set(&mut raw, "max_completion_length", "--new-tokens", tokens)?;
        Ok(raw)
    }
}

#[derive(Args, Debug)]
pub struct BenchTrainArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub gpus: GpuArgs,
    /// Sequences of a step
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..))]
    pub batch: u32,
    /// Tokens of each sequence [default: 256, or a shorter context]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(2..))]
    pub tokens: Option<u32>,
    #[command(flatten)]
    pub shape: ShapeArgs,
    /// Steps measured, after one to warm up; the best counts
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    pub steps: u32,
    /// Time the parts of one more step, on a GPU
    #[arg(long)]
    pub profile: bool,
    #[command(flatten)]
    pub output: OutputArgs,
}

#[derive(Args, Debug)]
pub struct BenchStepArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub gpus: GpuArgs,
    /// Prompts of a step
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub prompts: u32,
    /// Completions of each prompt
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(2..=1024))]
    pub n: u32,
    /// Tokens of each prompt [default: 128, or half of a shorter context]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub prompt_tokens: Option<u32>,
    /// Tokens of each completion [default: 256, or what is left of a shorter context]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub new_tokens: Option<u32>,
    /// Reward to call [default: reward-math]
    #[arg(long, value_name = "FILE|REF")]
    pub plugin: Option<PluginArg>,
    /// Steps measured, after one to warm up; the best counts
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    pub steps: u32,
    #[command(flatten)]
    pub shape: ShapeArgs,
    #[command(flatten)]
    pub output: OutputArgs,
}

#[derive(Args, Debug)]
pub struct BenchPluginArgs {
    /// Reward to call [default: reward-format with every check off, which leaves the bare call]
    #[arg(long, value_name = "FILE|REF")]
    pub plugin: Option<PluginArg>,
    /// Samples of a call
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
    pub samples: u32,
    /// Bytes of each sample
    #[arg(long, value_name = "N", default_value_t = 2500, value_parser = clap::value_parser!(u32).range(1..))]
    pub bytes: u32,
    /// Calls measured
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..))]
    pub calls: u32,
    /// JSON object for its `configure`
    #[arg(long, value_name = "JSON", requires = "plugin", value_parser = json_object)]
    pub config: Option<Map<String, Value>>,
    #[command(flatten)]
    pub access: GrantArgs,
    #[command(flatten)]
    pub output: OutputArgs,
}

#[derive(Args, Debug)]
pub struct DoctorArgs {
    #[command(flatten)]
    pub output: OutputArgs,
}

#[derive(Debug, Subcommand)]
pub enum PluginCommand {
    /// Write a new project for a plugin: source, WIT, README, test cases
    New(PluginNewArgs),
    /// Compile a project with its language's own tool
    Build(PluginBuildArgs),
    /// Run the cases of a file and compare with what is expected: rewards, prompts and answers, or plans
    Test(PluginTestArgs),
    /// Print a component's role, digest, imports and exports
    Inspect(PluginFileArgs),
    /// Load a component as a run would: limits, a trial instance, its `configure`
    Check(PluginCheckArgs),
    /// Put another plugin into a run that is going on, and say what became of it
    Swap(PluginSwapArgs),
    #[command(flatten)]
    Sharing(SharingCommand),
    /// Compile the component on stdin and throw the code away: the child process of every command that
    /// is given a component's file
    #[command(hide = true)]
    CompileTrial {
        /// Mebibytes of address space for it
        mib: u32,
        /// Milliseconds for it
        ms: u64,
    },
}

#[derive(Args, Debug)]
pub struct PluginNewArgs {
    /// Language of the project
    #[arg(value_name = "LANGUAGE")]
    pub language: Language,
    /// Folder to be made; its last part is the plugin's name
    #[arg(value_name = "NAME")]
    pub name: PathBuf,
    /// What it is to be: `reward`, `formatter` or `curriculum`
    #[arg(long, value_name = "ROLE", default_value = "reward", value_parser = role)]
    pub role: Role,
    #[command(flatten)]
    pub output: OutputArgs,
}

fn role(text: &str) -> Result<Role, String> {
    let all = [Role::Reward, Role::Formatter, Role::Curriculum];
    let mut named = all.into_iter().filter(|role| role.to_string() == text);
    let unknown = "a plugin is a `reward`, a `formatter` or a `curriculum`";
    named.next().ok_or_else(|| unknown.to_owned())
}

#[derive(Args, Debug)]
pub struct PluginBuildArgs {
    /// Folder of the project
    #[arg(value_name = "DIR", default_value = ".")]
    pub dir: PathBuf,
    #[command(flatten)]
    pub output: OutputArgs,
}

#[derive(Args, Debug)]
pub struct PluginTestArgs {
    /// Component file, folder of a project that is built, or the name of a built-in plugin
    #[arg(value_name = "FILE|DIR|REF")]
    pub plugin: String,
    /// Cases, one JSON object a line [default: cases.jsonl beside the component]
    #[arg(long, value_name = "FILE")]
    pub cases: Option<PathBuf>,
    /// JSON object with limits other than the default, as under `limits` in a config
    #[arg(long, value_name = "JSON", default_value = "{}", value_parser = json_object)]
    pub limits: Map<String, Value>,
    /// Name all functions that led to a trap
    #[arg(long)]
    pub guest_backtrace: bool,
    #[command(flatten)]
    pub access: GrantArgs,
    #[command(flatten)]
    pub output: OutputArgs,
}

impl PluginTestArgs {
    /// Those of the command line, as under `limits` in a config.
    pub fn limits(&self) -> Map<String, Value> {
        with_backtrace(&self.limits, self.guest_backtrace)
    }
}

impl PluginCheckArgs {
    /// As [`PluginTestArgs::limits`].
    pub fn limits(&self) -> Map<String, Value> {
        with_backtrace(&self.limits, self.guest_backtrace)
    }
}

fn with_backtrace(limits: &Map<String, Value>, asked: bool) -> Map<String, Value> {
    let mut limits = limits.clone();
    if asked {
        limits.insert("guest_backtrace".to_owned(), true.into());
    }
    limits
}

#[derive(Args, Debug)]
pub struct PluginCheckArgs {
    /// Component file, name of a built-in plugin, or reference into a registry
    #[arg(value_name = "FILE|REF")]
    pub plugin: String,
    /// JSON object for its `configure`
    #[arg(long, value_name = "JSON", default_value = "{}", value_parser = json_object)]
    pub config: Map<String, Value>,
    /// JSON object with limits other than the default, as under `limits` in a config
    #[arg(long, value_name = "JSON", default_value = "{}", value_parser = json_object)]
    pub limits: Map<String, Value>,
    /// Name all functions that led to a trap
    #[arg(long)]
    pub guest_backtrace: bool,
    #[command(flatten)]
    pub access: GrantArgs,
    #[command(flatten)]
    pub output: OutputArgs,
}

#[derive(Args, Debug)]
pub struct PluginSwapArgs {
    /// Run directory
    #[arg(value_name = "RUN")]
    pub run: PathBuf,
    /// `reward`, `formatter` or `curriculum`, or the name of one of the run's plugins
    #[arg(value_name = "ROLE")]
    pub role: String,
    /// Component file, or the name of a built-in plugin
    #[arg(value_name = "FILE|REF")]
    pub plugin: String,
    /// Steps that it works on beside the run, without counting [default: swap_shadow_steps of the run's config]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(0..=i64::from(MAX_SHADOW)))]
    pub shadow: Option<u32>,
    /// Promote it at the next step, without shadowing
    #[arg(long, conflicts_with = "shadow")]
    pub now: bool,
    /// JSON object for its `configure` [default: that of the plugin it replaces]
    #[arg(long, value_name = "JSON", value_parser = json_object)]
    pub config: Option<Map<String, Value>>,
    /// JSON object with its limits [default: those of the plugin it replaces]
    #[arg(long, value_name = "JSON", value_parser = json_object)]
    pub limits: Option<Map<String, Value>>,
    #[command(flatten)]
    pub output: OutputArgs,
}

/// The arguments that call [`PluginCommand::CompileTrial`], less its numbers.
pub const COMPILE_TRIAL: [&str; 2] = ["plugin", "compile-trial"];

fn json_object(text: &str) -> Result<Map<String, Value>, String> {
    serde_json::from_str(text).map_err(|error| format!("not a JSON object: {error}"))
}

#[derive(Args, Debug)]
pub struct PluginFileArgs {
    /// Component file, name of a built-in plugin, or reference into a registry
    #[arg(value_name = "FILE|REF")]
    pub plugin: String,
    #[command(flatten)]
    pub output: OutputArgs,
}
