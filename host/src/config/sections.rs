//! Every key of a run's config: its type, meaning and default, in the groups the code reads them in.
//!
//! This is the only place with defaults. In YAML the groups do not show: all keys stand at the top
//! level, under the names of TRL's `GRPOConfig` where TRL has one. Ranges are in `validate`.

use std::{collections::BTreeMap, path::PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::choices::{
    Device, DynamicSampling, ImportanceMode, KlEstimator, LossType, LrSchedule, MomentType,
    QuantizedWeights, ScaleRewards,
};
use super::draft::{DraftKind, DraftTokens};
use grpo_policy::backend::OptimStep;

use crate::types::SamplingParams;

/// What is trained, and on which rows.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct InputConfig {
    /// Model: a folder, a GGUF file, or a hub id. `null`: the model embedded in the binary.
    pub model: Option<String>,
    /// Branch, tag or commit of a hub model.
    pub revision: String,
    /// Training rows: a JSONL or Parquet file, a folder of them, or a hub id. `null`: the embedded data.
    pub data: Option<String>,
    /// Split of a hub dataset to train on.
    pub data_split: String,
    /// Subset (configuration) of a hub dataset that has several.
    pub data_subset: Option<String>,
    /// Renames columns: the name plugins see → the name in the data.
    pub columns: BTreeMap<String, String>,
    /// Held-out rows, as `data`. `null`: `eval_rows` rows are set aside from `data`.
    pub eval_data: Option<String>,
    /// Split of a hub dataset to evaluate on.
    pub eval_data_split: String,
    /// Subset of a hub dataset to evaluate on.
    pub eval_data_subset: Option<String>,
}

impl Default for InputConfig {
    fn default() -> Self {
        Self {
            model: None,
            revision: "main".to_owned(),
            data: None,
            data_split: "train".to_owned(),
            data_subset: None,
            columns: BTreeMap::new(),
            eval_data: None,
            eval_data_split: "test".to_owned(),
            eval_data_subset: None,
        }
    }
}

/// One plugin of the run. Its role is read from the component.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct PluginConfig {
    /// A component file, the name of a built-in plugin, or a reference into a registry. Required.
    pub source: String,
    /// Factor of a reward in the sum of rewards; other roles ignore it. Negative makes a penalty.
    pub weight: f64,
    /// Handed to the plugin's `configure` as JSON.
    pub config: Map<String, Value>,
    /// What it gets beyond its arguments, by the names of the plugin host's `Grants`; the host checks them.
    pub grants: Map<String, Value>,
    /// Limits of one call, by the names of the plugin host's `Limits`; the host checks them.
    pub limits: Map<String, Value>,
    /// Keeps instances for further requests, by the names of the plugin host's `Warm`; `null`: every request gets a
    /// fresh one.
    pub warm: Option<Map<String, Value>>,
}

impl Default for PluginConfig {
    fn default() -> Self {
        Self {
            source: String::new(),
            weight: 1.0,
            config: Map::new(),
            grants: Map::new(),
            limits: Map::new(),
            warm: None,
        }
    }
}

/// The plugins of the run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct PluginsConfig {
    /// Several rewards add up by weight. A role without a plugin gets the built-in one.
    pub plugins: Vec<PluginConfig>,
    /// minisign public keys, each with the place it is trusted for after a space (`RWQ… ghcr.io/me`), or without one for all.
    /// A plugin from a registry that one of them covers must be signed by one that does.
    pub trusted_keys: Vec<String>,
    /// Makes a plugin's file that changes during the run a candidate for its place.
    pub watch_plugins: bool,
    /// Steps that a candidate shadows unless its swap says otherwise, 0 to 1000.
    pub swap_shadow_steps: u32,
    /// Share of samples on which a candidate or a promoted reward may fail, 0 to 1.
    pub swap_max_failure_rate: f64,
}

impl Default for PluginsConfig {
    fn default() -> Self {
        Self {
            plugins: Vec::new(),
            trusted_keys: Vec::new(),
            watch_plugins: false,
            swap_shadow_steps: 2,
            swap_max_failure_rate: 0.1,
        }
    }
}

/// How completions are drawn.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct GenerationConfig {
    /// Completions per prompt: the size of a group. At least 2.
    pub num_generations: u32,
    /// Prompts per step; a step samples `prompts_per_step × num_generations` completions.
    pub prompts_per_step: u32,
    /// Waves that a step's prompts come in; each is scored while the next one generates, 1 to 64.
    pub scoring_waves: u32,
    /// Softmax temperature, > 0. Training scores at the same temperature.
    pub temperature: f64,
    /// Nucleus mass, in (0, 1]. `1` is off.
    pub top_p: f64,
    /// Most likely tokens kept. `0` is off.
    pub top_k: u32,
    /// Least probability relative to the most likely token, in [0, 1]. `0` is off.
    pub min_p: f64,
    /// Penalty on tokens already seen, > 0. `1` is off.
    pub repetition_penalty: f64,
    /// Most tokens of a completion.
    pub max_completion_length: u32,
    /// Most tokens of a prompt; rows with a longer one are left out and counted. `null`: no limit.
    pub max_prompt_length: Option<u32>,
    /// Texts that end a completion, beside those of the formatter.
    pub stop: Vec<String>,
    /// Tokens the KV pool holds. `null`: enough for `max_batch_size` sequences of the longest kind, as far as memory
    /// goes.
    pub kv_cache_tokens: Option<u64>,
    /// Sequences decoded at the same time, at most. `null`: 128 on a CPU, 256 on a GPU.
    pub max_batch_size: Option<u32>,
    /// What drafts for speculative decoding.
    pub draft: DraftKind,
    /// Tokens drafted at a time.
    pub draft_tokens: DraftTokens,
    /// Learning rate at which a draft model is distilled on the run's own rollouts, 0 to 1. `0`: it stays.
    pub draft_learning_rate: f64,
}

impl Default for GenerationConfig {
    fn default() -> Self {
        Self {
            num_generations: 8,
            prompts_per_step: 16,
            scoring_waves: 1,
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            max_completion_length: 512,
            max_prompt_length: None,
            stop: Vec::new(),
            kv_cache_tokens: None,
            max_batch_size: None,
            draft: DraftKind::None,
            draft_tokens: DraftTokens::Auto,
            draft_learning_rate: 1e-4,
        }
    }
}

impl GenerationConfig {
    /// The engine's parameters, without the formatter's stop strings.
    pub fn sampling(&self) -> SamplingParams {
        SamplingParams {
            temperature: self.temperature as f32,
            top_p: self.top_p as f32,
            top_k: self.top_k,
            min_p: self.min_p as f32,
            repetition_penalty: self.repetition_penalty as f32,
            max_tokens: self.max_completion_length,
            stop: self.stop.clone(),
            ignore_eos: false,
        }
    }
}

/// Correction for the gap between rollout and training log-probs.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ImportanceCorrection {
    pub mode: ImportanceMode,
    /// Cap of the ratio, > 0.
    pub max: f64,
}

impl Default for ImportanceCorrection {
    fn default() -> Self {
        Self {
            mode: ImportanceMode::default(),
            max: 3.0,
        }
    }
}

/// The objective.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct LossConfig {
    pub loss_type: LossType,
    /// Weight of the KL to the reference model, ≥ 0. `0` needs no reference pass.
    pub beta: f64,
    pub kl_estimator: KlEstimator,
    /// Clip range of the ratio below 1, in [0, 1].
    pub epsilon: f64,
    /// Clip range above 1. `null`: `epsilon`.
    pub epsilon_high: Option<f64>,
    /// Cap of the ratio where the advantage is negative (two-sided clipping), > 1. `null`: none.
    pub delta: Option<f64>,
    pub scale_rewards: ScaleRewards,
    pub importance_correction: ImportanceCorrection,
    /// Leave completions that hit `max_completion_length` out of the loss.
    pub mask_truncated_completions: bool,
    /// Optimizer steps on the same completions (μ).
    pub num_iterations: u32,
    /// What becomes of groups whose rewards are all equal.
    pub dynamic_sampling: DynamicSampling,
    /// Rounds of new prompts per step, at most.
    pub max_refills: u32,
    /// With `respend`: share of a group drawn before it is judged, above 0 and below 1; 2 at least.
    pub probe_fraction: f64,
    /// Take `old` log-probs from a scoring pass instead of the rollout.
    pub recompute_old_logprobs: bool,
}

impl Default for LossConfig {
    fn default() -> Self {
        Self {
            loss_type: LossType::default(),
            beta: 0.0,
            kl_estimator: KlEstimator::default(),
            epsilon: 0.2,
            epsilon_high: None,
            delta: None,
            scale_rewards: ScaleRewards::default(),
            importance_correction: ImportanceCorrection::default(),
            mask_truncated_completions: false,
            num_iterations: 1,
            dynamic_sampling: DynamicSampling::default(),
            max_refills: 3,
            probe_fraction: 0.5,
            recompute_old_logprobs: false,
        }
    }
}

/// AdamW (Loshchilov & Hutter 2019) and its schedule.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct OptimizerConfig {
    /// Peak, > 0.
    pub learning_rate: f64,
    pub lr_scheduler_type: LrSchedule,
    /// Steps over which the rate rises from 0 to its peak.
    pub warmup_steps: u64,
    /// Decoupled weight decay, ≥ 0.
    pub weight_decay: f64,
    pub adam_beta1: f64,
    pub adam_beta2: f64,
    pub adam_epsilon: f64,
    /// Global gradient norm is clipped to this. `0` is off.
    pub max_grad_norm: f64,
    pub moments: MomentType,
}

impl OptimizerConfig {
    /// One optimizer step at a learning rate already scheduled.
    pub fn step(&self, learning_rate: f64) -> OptimStep {
        OptimStep {
            learning_rate,
            beta1: self.adam_beta1,
            beta2: self.adam_beta2,
            eps: self.adam_epsilon,
            weight_decay: self.weight_decay,
            max_grad_norm: self.max_grad_norm,
        }
    }
}

impl Default for OptimizerConfig {
    fn default() -> Self {
        Self {
            learning_rate: 1e-6,
            lr_scheduler_type: LrSchedule::default(),
            warmup_steps: 0,
            weight_decay: 0.0,
            adam_beta1: 0.9,
            adam_beta2: 0.999,
            adam_epsilon: 1e-8,
            max_grad_norm: 1.0,
            moments: MomentType::default(),
        }
    }
}

/// Low-rank adapters (Hu et al. 2021); names as in PEFT.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct LoraConfig {
    /// Rank.
    pub r: u32,
    /// Updates are scaled by `alpha / r`.
    pub alpha: f64,
    /// Projection names (`q_proj`, …) or `all-linear`.
    pub target_modules: Vec<String>,
    /// On a GPU, merge adapters into the weights after every update, or apply them beside the weights. `null`: merge unless
    /// the weights stay quantised.
    pub merge: Option<bool>,
}

impl Default for LoraConfig {
    fn default() -> Self {
        Self {
            r: 16,
            alpha: 32.0,
            target_modules: vec!["all-linear".to_owned()],
            merge: None,
        }
    }
}

/// The run as a whole.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct TrainingConfig {
    /// Steps of the run.
    pub max_steps: u64,
    /// Every random choice of the run derives from it.
    pub seed: u64,
    /// Tokens of one forward and backward pass; a longer sequence is a batch of its own.
    pub micro_batch_tokens: u32,
    /// In an update and in distillation, run a prompt once for the completions of it that are in the same micro-batch. The gradients are the
    /// same but for rounding.
    pub share_prompts: bool,
    /// Recompute activations in the backward pass: less memory, about a third more time.
    pub gradient_checkpointing: bool,
    /// Layers, the first so many, that `gradient_checkpointing` is for on a GPU; `null`: as many as memory asks for.
    pub recompute_layers: Option<u32>,
    /// `null`: full fine-tuning.
    pub lora: Option<LoraConfig>,
}

impl Default for TrainingConfig {
    fn default() -> Self {
        Self {
            max_steps: 100,
            seed: 42,
            micro_batch_tokens: 4096,
            share_prompts: true,
            gradient_checkpointing: true,
            recompute_layers: None,
            lora: None,
        }
    }
}

/// Evaluation on held-out rows.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct EvalConfig {
    /// Evaluate every so many steps. `0`: not during the run.
    pub eval_steps: u64,
    /// Held-out rows used, at most.
    pub eval_rows: u32,
    /// Completions per row: `1` is greedy, `k > 1` samples and reports pass@k.
    pub eval_samples: u32,
    /// Evaluations without improvement after which the run ends. `null`: never.
    pub early_stopping_patience: Option<u32>,
    pub eval_on_start: bool,
    pub eval_on_end: bool,
}

impl Default for EvalConfig {
    fn default() -> Self {
        Self {
            eval_steps: 0,
            eval_rows: 200,
            eval_samples: 1,
            early_stopping_patience: None,
            eval_on_start: true,
            eval_on_end: true,
        }
    }
}

/// The run directory.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct OutputConfig {
    /// Run directory. `null`: a new one under `runs/`.
    pub output_dir: Option<PathBuf>,
    /// Checkpoint every so many steps, and after the last. `0`: only after the last.
    pub save_steps: u64,
    /// Checkpoints kept beside the best, ≥ 1.
    pub save_total_limit: u32,
}

impl Default for OutputConfig {
    fn default() -> Self {
        Self {
            output_dir: None,
            save_steps: 20,
            save_total_limit: 2,
        }
    }
}

/// The machine, and this process's place among the others of the run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct HardwareConfig {
    pub device: Device,
    /// GPUs that share the work, from `device` on. Above 1 there must be so many.
    pub gpus: u32,
    /// Of a GPU's memory, what this process may use, above 0 and up to 1.
    pub gpu_memory_utilization: f64,
    /// On a GPU, make logits independent of what else is computed beside them. On a CPU they always are.
    pub deterministic: bool,
    /// Whether matrices that a GGUF file has quantised stay so on a GPU.
    pub quantized_weights: QuantizedWeights,
    /// CPU threads. `null`: one per core.
    pub threads: Option<u32>,
    /// Index of this process, below `world_size`.
    pub rank: u32,
    /// Processes of the run.
    pub world_size: u32,
}

impl Default for HardwareConfig {
    fn default() -> Self {
        Self {
            device: Device::default(),
            gpus: 1,
            gpu_memory_utilization: 0.9,
            deterministic: false,
            quantized_weights: QuantizedWeights::default(),
            threads: None,
            rank: 0,
            world_size: 1,
        }
    }
}
