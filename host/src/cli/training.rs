//! Arguments of the commands that run a model on rows or prompts, and the config keys they set.

use std::path::PathBuf;

use clap::Args;

use super::{DraftArgs, GpuArgs, ModelArgs, OutputArgs, PluginArg, set, set_plugins};
use crate::config::{ConfigError, RawConfig};

#[derive(Args, Debug, Default)]
pub struct TrainArgs {
    /// Plugin component or built-in name, a reward with its weight; replaces the config's list
    #[arg(long = "plugin", value_name = "FILE|REF[=WEIGHT]")]
    pub plugins: Vec<PluginArg>,
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub gpus: GpuArgs,
    #[command(flatten)]
    pub draft: DraftArgs,
    /// Training rows: JSONL, Parquet or a hub id [default: the built-in rows]
    #[arg(long, value_name = "PATH|HUB-ID")]
    pub data: Option<String>,
    /// Steps of the run
    #[arg(long, value_name = "N")]
    pub steps: Option<u64>,
    /// Run directory [default: a new one under runs/]
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Make a plugin's file that changes during the run a candidate for its place
    #[arg(long)]
    pub watch_plugins: bool,
    /// Go on with the run in this directory, from its last checkpoint
    #[arg(long, value_name = "DIR", conflicts_with_all = ["out", "config", "model", "data"])]
    pub resume: Option<PathBuf>,
    #[command(flatten)]
    pub output: OutputArgs,
}

impl TrainArgs {
    /// `base` (the embedded run, or the `config.yaml` of a resumed one), then the file, then the flags.
    pub fn over(&self, base: RawConfig) -> Result<RawConfig, ConfigError> {
        let base = self.gpus.over(self.model.over(base)?)?;
        let mut raw = self.draft.over(base)?;
        set_plugins(&mut raw, &self.plugins)?;
        set(&mut raw, "data", "--data", self.data.as_ref())?;
        set(&mut raw, "max_steps", "--steps", self.steps)?;
        set(&mut raw, "output_dir", "--out", self.out.as_ref())?;
        let watch = self.watch_plugins.then_some(true);
        set(&mut raw, "watch_plugins", "--watch-plugins", watch)?;
        Ok(raw)
    }
}

#[derive(Args, Debug, Default)]
pub struct EvalArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub gpus: GpuArgs,
    #[command(flatten)]
    pub draft: DraftArgs,
    /// Rows to evaluate on [default: held-out built-in rows]
    #[arg(long, value_name = "PATH|HUB-ID")]
    pub data: Option<String>,
    /// Split of a hub dataset
    #[arg(long, value_name = "NAME")]
    pub split: Option<String>,
    /// Completions per row: 1 is greedy, more samples and adds pass@k
    #[arg(long, value_name = "K")]
    pub samples: Option<u32>,
    /// Rows, at most
    #[arg(long, value_name = "N")]
    pub limit: Option<u32>,
    #[command(flatten)]
    pub sampling: SamplingArgs,
    /// Plugin component or built-in name; replaces the config's list
    #[arg(long = "plugin", value_name = "FILE|REF[=WEIGHT]")]
    pub plugins: Vec<PluginArg>,
    #[command(flatten)]
    pub output: OutputArgs,
}

impl EvalArgs {
    /// `base`, then the file, then the flags.
    pub fn over(&self, base: RawConfig) -> Result<RawConfig, ConfigError> {
        let base = self.gpus.over(self.model.over(base)?)?;
        let base = self.draft.over(base)?;
        let mut raw = self.sampling.over(base)?;
        set_plugins(&mut raw, &self.plugins)?;
        set(&mut raw, "eval_data", "--data", self.data.as_ref())?;
        set(&mut raw, "eval_data_split", "--split", self.split.as_ref())?;
        set(&mut raw, "eval_samples", "--samples", self.samples)?;
        set(&mut raw, "eval_rows", "--limit", self.limit)?;
        Ok(raw)
    }
}

/// Arguments of `sft`.
#[derive(Args, Debug)]
pub struct SftArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub gpus: GpuArgs,
    /// Train a new model of this shape (a `config.json`) from random weights instead of `--model`.
    #[arg(
        long,
        value_name = "FILE",
        conflicts_with = "model",
        requires = "tokenizer"
    )]
    pub init_shape: Option<PathBuf>,
    /// Folder with the `tokenizer.json` and `tokenizer_config.json` of a new model.
    #[arg(long, value_name = "DIR", requires = "init_shape")]
    pub tokenizer: Option<PathBuf>,
    /// Rows to learn from; the formatter makes their prompts.
    #[arg(long, value_name = "PATH|HUB-ID")]
    pub data: String,
    /// Split of a hub dataset.
    #[arg(long, value_name = "NAME", default_value = "train")]
    pub split: String,
    /// Column that holds what the model should answer.
    #[arg(long, value_name = "NAME", default_value = "answer")]
    pub answer_column: String,
    /// Optimizer steps.
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..))]
    pub steps: u64,
    /// Rows of a step.
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..))]
    pub batch: u32,
    /// Peak learning rate.
    #[arg(long, value_name = "RATE", default_value_t = 1e-5)]
    pub learning_rate: f64,
    /// Steps over which the learning rate rises.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub warmup_steps: u64,
    /// Plugins; only a formatter is used.
    #[arg(long = "plugin", value_name = "FILE|REF")]
    pub plugins: Vec<PluginArg>,
    /// Folder for the result, which must not exist: `model/`, and `adapter/` with LoRA.
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    #[command(flatten)]
    pub output: OutputArgs,
}

impl SftArgs {
    /// The config these flags lay over `base`.
    pub fn over(&self, base: RawConfig) -> Result<RawConfig, ConfigError> {
        let mut raw = self.gpus.over(self.model.over(base)?)?;
        set_plugins(&mut raw, &self.plugins)?;
        set(&mut raw, "data", "--data", Some(&self.data))?;
        set(&mut raw, "data_split", "--split", Some(&self.split))?;
        set(&mut raw, "max_steps", "--steps", Some(self.steps))?;
        set(
            &mut raw,
            "learning_rate",
            "--learning-rate",
            Some(self.learning_rate),
        )?;
        set(
            &mut raw,
            "warmup_steps",
            "--warmup-steps",
            Some(self.warmup_steps),
        )?;
        Ok(raw)
    }
}

#[derive(Args, Debug)]
pub struct RolloutArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub draft: DraftArgs,
    /// Text to continue; goes through the model's chat template if it has one
    #[arg(long, value_name = "TEXT")]
    pub prompt: String,
    /// Take the prompt as it is, without the chat template
    #[arg(long)]
    pub raw: bool,
    /// Completions
    #[arg(short, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=65536))]
    pub n: u32,
    #[command(flatten)]
    pub sampling: SamplingArgs,
    #[command(flatten)]
    pub output: OutputArgs,
}

impl RolloutArgs {
    /// `base`, then the file, then the flags. `--temperature 0` is not for the config, whose temperature
    /// is that of training: see [`RolloutArgs::greedy`].
    pub fn over(&self, base: RawConfig) -> Result<RawConfig, ConfigError> {
        let temperature = self.sampling.temperature.filter(|_| !self.greedy());
        let sampling = SamplingArgs {
            temperature,
            ..self.sampling.clone()
        };
        sampling.over(self.draft.over(self.model.over(base)?)?)
    }

    /// Always take the most likely token.
    pub fn greedy(&self) -> bool {
        self.sampling.temperature == Some(0.0)
    }
}

/// How completions are sampled.
#[derive(Args, Clone, Debug, Default)]
pub struct SamplingArgs {
    /// Softmax temperature; 0 in `rollout` is greedy
    #[arg(long, value_name = "T")]
    pub temperature: Option<f64>,
    /// Nucleus mass
    #[arg(long, value_name = "P")]
    pub top_p: Option<f64>,
    /// Most likely tokens kept; 0 is off
    #[arg(long, value_name = "K")]
    pub top_k: Option<u32>,
    /// Least probability relative to the most likely token
    #[arg(long, value_name = "P")]
    pub min_p: Option<f64>,
    /// Tokens of a completion, at most
    #[arg(long, value_name = "N")]
    pub max_tokens: Option<u32>,
    /// Text that ends a completion; may be given several times
    #[arg(long, value_name = "TEXT")]
    pub stop: Vec<String>,
}

impl SamplingArgs {
    fn over(&self, mut raw: RawConfig) -> Result<RawConfig, ConfigError> {
        set(&mut raw, "temperature", "--temperature", self.temperature)?;
        set(&mut raw, "top_p", "--top-p", self.top_p)?;
        set(&mut raw, "top_k", "--top-k", self.top_k)?;
        set(&mut raw, "min_p", "--min-p", self.min_p)?;
        set(
            &mut raw,
            "max_completion_length",
            "--max-tokens",
            self.max_tokens,
        )?;
        let stop = (!self.stop.is_empty()).then_some(&self.stop);
        set(&mut raw, "stop", "--stop", stop)?;
        Ok(raw)
    }
}
