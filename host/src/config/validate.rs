//! Unknown keys and ranges. Types are serde's work, defaults those of `sections`.

use serde::Serialize;
use serde_norway::{Mapping, Value};

use super::{
    ConfigError, DraftKind, Origin, RawConfig, RunConfig,
    choices::{Device, DynamicSampling},
    judges::{self, JudgeConfig},
    sections::{
        GenerationConfig, ImportanceCorrection, LoraConfig, LossConfig, OptimizerConfig,
        PluginConfig, PluginsConfig,
    },
};

/// Keys of other trainers (or of our own flags) whose namesake here a spelling distance cannot find.
const FOREIGN_KEYS: [(&str, &str); 10] = [
    ("steps", "max_steps"),
    ("out", "output_dir"),
    ("num_train_epochs", "max_steps"),
    ("model_name_or_path", "model"),
    ("dataset_name", "data"),
    ("per_device_train_batch_size", "micro_batch_tokens"),
    ("generation_batch_size", "prompts_per_step"),
    ("reward_weights", "plugins"),
    (
        "vllm_importance_sampling_mode",
        "importance_correction: {mode: …}",
    ),
    (
        "vllm_importance_sampling_clip_max",
        "importance_correction: {max: …}",
    ),
];

/// GPUs of one host, generously.
const MOST_GPUS: u32 = 64;

/// Least Jaro-Winkler similarity of a suggestion: `lerning_rate` passes, `foo` does not.
const SIMILAR: f64 = 0.8;

/// The keys a section reads, taken from its default so that they are written down once.
pub(super) fn known_keys<T: Serialize + Default>() -> Vec<String> {
    match serde_norway::to_value(T::default()) {
        Ok(Value::Mapping(mapping)) => mapping
            .keys()
            .filter_map(|key| key.as_str().map(str::to_owned))
            .collect(),
        _ => Vec::new(),
    }
}

/// A config text under its name, to tell where a key stands.
pub(super) struct Document<'a> {
    pub(super) text: &'a str,
    pub(super) name: &'a str,
}

impl Document<'_> {
    /// Refuses keys no section reads, also inside the keys that hold a map of their own.
    pub(super) fn refuse_unknown_keys(&self, mapping: &Mapping) -> Result<(), ConfigError> {
        self.refuse_others(mapping, &[], &known_keys::<RunConfig>())?;
        for (key, value) in mapping {
            match (key.as_str(), value) {
                (Some("lora"), Value::Mapping(inner)) => {
                    self.refuse_others(inner, &["lora"], &known_keys::<LoraConfig>())?;
                }
                (Some(key @ "importance_correction"), Value::Mapping(inner)) => {
                    self.refuse_others(inner, &[key], &known_keys::<ImportanceCorrection>())?;
                }
                (Some("plugins"), Value::Sequence(plugins)) => {
                    for plugin in plugins.iter().filter_map(Value::as_mapping) {
                        self.refuse_others(plugin, &["plugins"], &known_keys::<PluginConfig>())?;
                    }
                }
                (Some(key @ "judges"), Value::Mapping(judges)) => {
                    for (name, judge) in judges {
                        if let (Some(name), Value::Mapping(judge)) = (name.as_str(), judge) {
                            self.refuse_others(judge, &[key, name], &known_keys::<JudgeConfig>())?;
                        }
                    }
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn refuse_others(
        &self,
        mapping: &Mapping,
        parents: &[&str],
        known: &[String],
    ) -> Result<(), ConfigError> {
        for key in mapping.keys() {
            let text = match key {
                Value::String(text) => text.clone(),
                Value::Number(number) => number.to_string(),
                Value::Bool(flag) => flag.to_string(),
                other => format!("{other:?}"),
            };
            if key.is_string() && known.contains(&text) {
                continue;
            }
            let path: Vec<&str> = parents.iter().copied().chain([text.as_str()]).collect();
            return Err(ConfigError::UnknownKey {
                origin: self.origin(&path),
                nearest: nearest(&text, known),
                key: path.join("."),
            });
        }
        Ok(())
    }

    /// The line of `path`'s last key, looked for below the lines of the keys before it. Flow style
    /// (`{a: 1}`) hides keys inside lines; those get no line.
    pub(super) fn origin(&self, path: &[&str]) -> Origin {
        let mut lines = self.text.lines().enumerate();
        let mut found = None;
        for (depth, key) in path.iter().enumerate() {
            found = lines.find(|(_, line)| {
                let line = match depth {
                    0 => line,
                    _ => line.trim_start_matches([' ', '-']),
                };
                line.trim_start_matches(['"', '\''])
                    .strip_prefix(key)
                    .is_some_and(|rest| rest.trim_start_matches(['"', '\'', ' ']).starts_with(':'))
            });
        }
        Origin::File {
            name: self.name.to_owned(),
            line: found.map(|(index, _)| index + 1),
        }
    }
}

/// Refuses a number inside a list or map that is not finite. One that is a key's whole value is left to the key's
/// own range.
pub(super) fn refuse_non_finite(
    value: &Value,
    path: &str,
    origin: &dyn Fn(&str) -> Origin,
) -> Result<(), ConfigError> {
    let inner: Vec<(String, &Value)> = match value {
        Value::Sequence(items) => {
            let numbered = items.iter().enumerate();
            numbered.map(|(i, v)| (format!("{path}[{i}]"), v)).collect()
        }
        Value::Mapping(keys) => keys
            .iter()
            .filter_map(|(key, v)| Some((format!("{path}.{}", key.as_str()?), v)))
            .collect(),
        _ => Vec::new(),
    };
    for (path, value) in inner {
        match value.as_f64() {
            Some(number) if !number.is_finite() => {
                return Err(ConfigError::OutOfRange {
                    origin: origin(&path),
                    value: number.to_string(),
                    allowed: "a finite number",
                    key: path,
                });
            }
            _ => refuse_non_finite(value, &path, origin)?,
        }
    }
    Ok(())
}

fn nearest(key: &str, known: &[String]) -> Option<String> {
    if let Some((_, ours)) = FOREIGN_KEYS.iter().find(|(foreign, _)| *foreign == key) {
        return Some((*ours).to_owned());
    }
    known
        .iter()
        .map(|known| (strsim::jaro_winkler(key, known), known))
        .filter(|(similarity, _)| *similarity >= SIMILAR)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, known)| known.clone())
}

/// Checks values one by one and names where the first bad one was set.
pub(super) struct Ranges<'a> {
    raw: &'a RawConfig,
}

impl Ranges<'_> {
    pub(super) fn check<V: ToString>(
        &self,
        key: &str,
        value: V,
        allowed: &'static str,
        fits: bool,
    ) -> Result<(), ConfigError> {
        if fits {
            return Ok(());
        }
        Err(ConfigError::OutOfRange {
            key: key.to_owned(),
            value: value.to_string(),
            allowed,
            origin: self.raw.origin(key),
        })
    }

    fn positive(&self, key: &str, value: f64) -> Result<(), ConfigError> {
        self.check(key, value, "a number > 0", value > 0.0 && value.is_finite())
    }

    pub(super) fn not_negative(&self, key: &str, value: f64) -> Result<(), ConfigError> {
        self.check(
            key,
            value,
            "a number ≥ 0",
            value >= 0.0 && value.is_finite(),
        )
    }

    pub(super) fn within(
        &self,
        key: &str,
        value: u32,
        most: u32,
        allowed: &'static str,
    ) -> Result<(), ConfigError> {
        self.check(key, value, allowed, (1..=most).contains(&value))
    }

    fn at_least_one(&self, key: &str, value: u32) -> Result<(), ConfigError> {
        self.check(key, value, "1 or more", value >= 1)
    }
}

/// Checks every range of a typed config. NaN fits no range.
pub(super) fn ranges(config: &RunConfig, raw: &RawConfig) -> Result<(), ConfigError> {
    let ranges = Ranges { raw };
    plugins(&ranges, &config.plugins)?;
    judges::ranges(&ranges, &config.judges)?;
    generation(&ranges, &config.generation)?;
    loss(&ranges, &config.loss)?;
    ranges.check(
        "dynamic_sampling",
        "respend",
        "respend with num_generations of 3 or more, since a probe takes 2",
        config.loss.dynamic_sampling != DynamicSampling::Respend
            || config.generation.num_generations >= 3,
    )?;
    let waves = config.generation.scoring_waves;
    ranges.within("scoring_waves", waves, 64, "1 to 64")?;
    ranges.check(
        "scoring_waves",
        waves,
        "1 with dynamic_sampling, whose rounds wait for scores",
        waves == 1 || config.loss.dynamic_sampling == DynamicSampling::Off,
    )?;
    optimizer(&ranges, &config.optimizer)?;
    run(&ranges, config)
}

fn plugins(ranges: &Ranges<'_>, config: &PluginsConfig) -> Result<(), ConfigError> {
    let steps = config.swap_shadow_steps;
    ranges.check("swap_shadow_steps", steps, "0 to 1000", steps <= 1000)?;
    let rate = config.swap_max_failure_rate;
    let fits = (0.0..=1.0).contains(&rate);
    ranges.check("swap_max_failure_rate", rate, "0 to 1", fits)?;
    for (index, plugin) in config.plugins.iter().enumerate() {
        ranges.check(
            &format!("plugins[{index}].source"),
            "empty",
            "a component file or a built-in plugin's name",
            !plugin.source.is_empty(),
        )?;
        ranges.check(
            &format!("plugins[{index}].weight"),
            plugin.weight,
            "a number within ±1e9",
            plugin.weight.abs() <= 1e9,
        )?;
    }
    Ok(())
}

fn generation(ranges: &Ranges<'_>, config: &GenerationConfig) -> Result<(), ConfigError> {
    ranges.check(
        "num_generations",
        config.num_generations,
        "2 to 65536 (one completion has nothing to be compared with)",
        (2..=1 << 16).contains(&config.num_generations),
    )?;
    let prompts = config.prompts_per_step;
    ranges.within("prompts_per_step", prompts, 1 << 16, "1 to 65536")?;
    ranges.positive("temperature", config.temperature)?;
    ranges.check(
        "top_p",
        config.top_p,
        "above 0, up to 1",
        config.top_p > 0.0 && config.top_p <= 1.0,
    )?;
    ranges.check(
        "min_p",
        config.min_p,
        "0 to 1",
        (0.0..=1.0).contains(&config.min_p),
    )?;
    ranges.positive("repetition_penalty", config.repetition_penalty)?;
    ranges.at_least_one("max_completion_length", config.max_completion_length)?;
    if let Some(length) = config.max_prompt_length {
        ranges.at_least_one("max_prompt_length", length)?;
    }
    let empty = config.stop.iter().any(String::is_empty);
    ranges.check(
        "stop",
        "an empty string",
        "texts of one character or more",
        !empty,
    )?;
    if let Some(tokens) = config.kv_cache_tokens {
        ranges.check("kv_cache_tokens", tokens, "1 or more", tokens >= 1)?;
    }
    if let Some(sequences) = config.max_batch_size {
        ranges.at_least_one("max_batch_size", sequences)?;
    }
    ranges.check(
        "draft_learning_rate",
        config.draft_learning_rate,
        "0 to 1",
        (0.0..=1.0).contains(&config.draft_learning_rate),
    )
}

fn loss(ranges: &Ranges<'_>, config: &LossConfig) -> Result<(), ConfigError> {
    ranges.not_negative("beta", config.beta)?;
    ranges.check(
        "epsilon",
        config.epsilon,
        "0 to 1",
        (0.0..=1.0).contains(&config.epsilon),
    )?;
    if let Some(high) = config.epsilon_high {
        ranges.not_negative("epsilon_high", high)?;
    }
    if let Some(delta) = config.delta {
        let fits = delta > 1.0 && delta.is_finite();
        ranges.check("delta", delta, "a number > 1, or null", fits)?;
    }
    ranges.positive(
        "importance_correction.max",
        config.importance_correction.max,
    )?;
    ranges.check(
        "probe_fraction",
        config.probe_fraction,
        "a number above 0 and below 1",
        config.probe_fraction > 0.0 && config.probe_fraction < 1.0,
    )?;
    ranges.at_least_one("num_iterations", config.num_iterations)
}

fn optimizer(ranges: &Ranges<'_>, config: &OptimizerConfig) -> Result<(), ConfigError> {
    ranges.positive("learning_rate", config.learning_rate)?;
    ranges.not_negative("weight_decay", config.weight_decay)?;
    for (key, beta) in [
        ("adam_beta1", config.adam_beta1),
        ("adam_beta2", config.adam_beta2),
    ] {
        ranges.check(key, beta, "0 or more, below 1", (0.0..1.0).contains(&beta))?;
    }
    ranges.positive("adam_epsilon", config.adam_epsilon)?;
    ranges.not_negative("max_grad_norm", config.max_grad_norm)
}

fn gpus(ranges: &Ranges<'_>, config: &RunConfig) -> Result<(), ConfigError> {
    let gpus = config.hardware.gpus;
    ranges.within("gpus", gpus, MOST_GPUS, "1 to 64")?;
    ranges.check(
        "gpus",
        gpus,
        "1 with device cpu",
        gpus == 1 || config.hardware.device != Device::Cpu,
    )?;
    // It remembers completions of all prompts, and each GPU sees those of its own.
    let draft = &config.generation.draft;
    ranges.check(
        "draft",
        draft,
        "none, ngram, model:PATH or layers:K with several gpus",
        gpus == 1 || *draft != DraftKind::Suffix,
    )
}

fn run(ranges: &Ranges<'_>, config: &RunConfig) -> Result<(), ConfigError> {
    let training = &config.training;
    ranges.check(
        "max_steps",
        training.max_steps,
        "1 or more",
        training.max_steps >= 1,
    )?;
    ranges.at_least_one("micro_batch_tokens", training.micro_batch_tokens)?;
    if let Some(lora) = &training.lora {
        ranges.within("lora.r", lora.r, 4096, "1 to 4096")?;
        ranges.positive("lora.alpha", lora.alpha)?;
        ranges.check(
            "lora.target_modules",
            "empty",
            "projection names, or all-linear",
            !lora.target_modules.is_empty(),
        )?;
    }
    ranges.at_least_one("eval_rows", config.eval.eval_rows)?;
    ranges.within("eval_samples", config.eval.eval_samples, 1024, "1 to 1024")?;
    if let Some(patience) = config.eval.early_stopping_patience {
        ranges.at_least_one("early_stopping_patience", patience)?;
    }
    ranges.at_least_one("save_total_limit", config.output.save_total_limit)?;
    gpus(ranges, config)?;
    let hardware = &config.hardware;
    let share = hardware.gpu_memory_utilization;
    ranges.check(
        "gpu_memory_utilization",
        share,
        "a number above 0, up to 1",
        share > 0.0 && share <= 1.0,
    )?;
    if let Some(threads) = hardware.threads {
        ranges.at_least_one("threads", threads)?;
    }
    // Accepting more would train copies that never meet.
    ranges.check(
        "world_size",
        hardware.world_size,
        "1 (training over several processes is not built yet)",
        hardware.world_size == 1,
    )?;
    ranges.check(
        "rank",
        hardware.rank,
        "0 or more, below world_size",
        hardware.rank < hardware.world_size,
    )
}
