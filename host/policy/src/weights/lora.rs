//! LoRA adapters in PEFT's folder format, and merging them (Hu et al. 2021: `W + alpha / r · B A`).
//! Inside this crate adapter tensors are named `model.layers.0.self_attn.q_proj.lora_A.weight` (`[r, in]`)
//! and `….lora_B.weight` (`[out, r]`); PEFT puts `base_model.model.` before that.

use std::{collections::BTreeSet, path::Path};

use rand_chacha::{ChaCha8Rng, rand_core::RngCore};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::{
    SaveType, Weights, read,
    save::{write_json, write_safetensors},
};
use crate::error::{Feature, PolicyError};

const PEFT_PREFIX: &str = "base_model.model.";
const A: &str = ".lora_A.weight";
const B: &str = ".lora_B.weight";

/// PEFT's word for every linear layer but the LM head.
pub const ALL_LINEAR: &str = "all-linear";

/// Linear layers of a decoder that can have an adapter.
const LINEARS: [&str; 7] = [
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
];

/// Rank, scale and place of an adapter.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoraConfig {
    /// Rank, at least 1.
    pub r: usize,
    /// The update is scaled by `alpha / r`.
    pub alpha: f64,
    /// Last parts of module names (`q_proj`), or [`ALL_LINEAR`].
    pub targets: Vec<String>,
}

impl LoraConfig {
    /// `alpha / r`.
    pub fn scale(&self) -> f64 {
        self.alpha / self.r as f64
    }

    /// Whether the linear layer `module` (`model.layers.0.self_attn.q_proj`) gets an adapter.
    pub fn targets_module(&self, module: &str) -> bool {
        let last = module.rsplit('.').next().unwrap_or(module);
        self.targets
            .iter()
            .any(|t| t == last || (t == ALL_LINEAR && last.ends_with("_proj")))
    }
}

impl LoraConfig {
    /// Refuses a target that fits no layer: it would train less than was asked for, or nothing, without a word.
    ///
    /// # Errors
    /// [`PolicyError::LoraTarget`].
    pub(crate) fn check_targets(&self) -> Result<(), PolicyError> {
        let known = |target: &&String| *target == ALL_LINEAR || LINEARS.contains(&target.as_str());
        match self.targets.iter().find(|target| !known(target)) {
            None => Ok(()),
            Some(target) => Err(PolicyError::LoraTarget {
                target: target.clone(),
                known: LINEARS.join(", "),
            }),
        }
    }
}

/// What an adapter's `A` starts as, `[r, inputs]`: uniform in ±1/√inputs, PEFT's default.
pub(crate) fn random_a(rng: &mut ChaCha8Rng, r: usize, inputs: usize) -> Vec<f32> {
    let bound = 1.0 / (inputs as f32).sqrt();
    let unit = |rng: &mut ChaCha8Rng| (rng.next_u32() >> 8) as f32 / (1 << 24) as f32;
    (0..r * inputs)
        .map(|_| (2.0 * unit(rng) - 1.0) * bound)
        .collect()
}

/// An adapter read from a PEFT folder.
#[derive(Debug)]
pub struct Adapter {
    pub config: LoraConfig,
    /// `base_model_name_or_path` as it stands in the file.
    pub base: Option<String>,
    pub tensors: Weights,
}

/// What of `adapter_config.json` changes what is computed.
#[derive(Deserialize)]
struct PeftConfig {
    peft_type: Option<String>,
    base_model_name_or_path: Option<String>,
    r: Option<usize>,
    lora_alpha: Option<f64>,
    target_modules: Option<Value>,
    bias: Option<String>,
    #[serde(default)]
    use_dora: bool,
    #[serde(default)]
    use_rslora: bool,
    rank_pattern: Option<Map<String, Value>>,
    alpha_pattern: Option<Map<String, Value>>,
    modules_to_save: Option<Value>,
}

/// Writes `adapter_config.json` and `adapter_model.safetensors` (f32) into `folder`, which exists.
/// `base` is the model's name or path as the user gave it.
pub fn save_adapter(
    folder: &Path,
    config: &LoraConfig,
    base: &str,
    tensors: &Weights,
) -> Result<(), PolicyError> {
    let targets = if config.targets.iter().any(|t| t == ALL_LINEAR) {
        json!(ALL_LINEAR)
    } else {
        json!(config.targets)
    };
    let peft = json!({
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.r,
        "lora_alpha": config.alpha,
        "lora_dropout": 0.0,
        "target_modules": targets,
        "bias": "none",
        "fan_in_fan_out": false,
        "inference_mode": true,
        "init_lora_weights": true,
        "use_dora": false,
        "use_rslora": false,
        "modules_to_save": null,
    });
    let Value::Object(peft) = peft else {
        return Err(PolicyError::Misuse("adapter_config.json is an object"));
    };
    write_json(&folder.join("adapter_config.json"), &peft)?;
    let named: Weights = tensors
        .iter()
        .map(|(name, tensor)| (format!("{PEFT_PREFIX}{name}"), tensor.clone()))
        .collect();
    write_safetensors(
        &folder.join("adapter_model.safetensors"),
        &named,
        SaveType::F32,
    )
}

/// Reads a PEFT folder. Errors: [`PolicyError::Unsupported`] for variants of LoRA that compute something
/// else, [`PolicyError::UnexpectedWeight`] for tensors that are not LoRA's.
pub fn load_adapter(folder: &Path) -> Result<Adapter, PolicyError> {
    let config_path = folder.join("adapter_config.json");
    let malformed = |reason: String| PolicyError::Malformed {
        path: config_path.clone(),
        reason,
    };
    let peft: PeftConfig = serde_json::from_slice(&read::file(&config_path)?)
        .map_err(|error| malformed(error.to_string()))?;
    refuse_variants(&peft)?;
    let weights_path = folder.join("adapter_model.safetensors");
    let mut named = Weights::new();
    read::safetensors(&read::file(&weights_path)?, &weights_path, &mut named)?;
    let mut tensors = Weights::new();
    for (name, tensor) in named {
        match name.strip_prefix(PEFT_PREFIX) {
            Some(inner) if inner.ends_with(A) || inner.ends_with(B) => {
                tensors.insert(inner.to_owned(), tensor);
            }
            _ => return Err(PolicyError::UnexpectedWeight { name }),
        }
    }
    let targets = match &peft.target_modules {
        Some(Value::Array(names)) => names
            .iter()
            .filter_map(Value::as_str)
            .map(str::to_owned)
            .collect(),
        Some(Value::String(word)) if word == ALL_LINEAR => vec![word.clone()],
        // A regular expression, or nothing: the tensors say what it selected.
        _ => tensors
            .keys()
            .filter_map(|name| name.strip_suffix(A)?.rsplit('.').next())
            .map(str::to_owned)
            .collect::<BTreeSet<_>>()
            .into_iter()
            .collect(),
    };
    Ok(Adapter {
        config: LoraConfig {
            r: peft
                .r
                .filter(|r| *r > 0)
                .ok_or_else(|| malformed("`r` is missing or 0".to_owned()))?,
            alpha: peft
                .lora_alpha
                .ok_or_else(|| malformed("`lora_alpha` is missing".to_owned()))?,
            targets,
        },
        base: peft.base_model_name_or_path,
        tensors,
    })
}

/// The base model an adapter folder names.
pub(super) fn base_model(config: &[u8], path: &Path) -> Result<String, PolicyError> {
    let peft: PeftConfig =
        serde_json::from_slice(config).map_err(|error| PolicyError::Malformed {
            path: path.to_owned(),
            reason: error.to_string(),
        })?;
    Ok(peft
        .base_model_name_or_path
        .unwrap_or_else(|| "an unnamed model".to_owned()))
}

/// The weights with the adapter added in: `W + alpha / r · B A` for every adapted layer, the rest shared.
///
/// Errors: [`PolicyError::MissingWeight`] when half of a pair is missing,
/// [`PolicyError::UnexpectedWeight`] when the model has no such layer, [`PolicyError::WeightShape`].
pub fn merge(
    weights: &Weights,
    adapter: &Weights,
    config: &LoraConfig,
) -> Result<Weights, PolicyError> {
    let mut merged = weights.clone();
    for name in adapter.keys() {
        let module = name.strip_suffix(A).or_else(|| name.strip_suffix(B));
        let target = module.map(|m| format!("{m}.weight"));
        let Some((module, weight)) = module.zip(target.and_then(|t| merged.get_mut(&t))) else {
            return Err(PolicyError::UnexpectedWeight { name: name.clone() });
        };
        // Each pair is merged once, at its A; a B without A is noticed here.
        let half = |suffix: &str| {
            let name = format!("{module}{suffix}");
            adapter
                .get(&name)
                .ok_or(PolicyError::MissingWeight { name })
        };
        let (a, b) = (half(A)?, half(B)?);
        if name.ends_with(B) {
            continue;
        }
        let (out, input) = weight.dims2()?;
        for (suffix, tensor, expected) in
            [(A, a, vec![config.r, input]), (B, b, vec![out, config.r])]
        {
            if tensor.dims() != expected {
                return Err(PolicyError::WeightShape {
                    name: format!("{module}{suffix}"),
                    found: tensor.dims().to_vec(),
                    expected,
                });
            }
        }
        *weight = (&*weight + (b.matmul(a)? * config.scale())?)?;
    }
    Ok(merged)
}

fn refuse_variants(peft: &PeftConfig) -> Result<(), PolicyError> {
    let full = |map: &Option<Map<String, Value>>| map.as_ref().is_some_and(|m| !m.is_empty());
    let found = match peft {
        p if p.peft_type.as_deref().is_some_and(|t| t != "LORA") => {
            p.peft_type.clone().unwrap_or_default()
        }
        p if p.use_dora => "DoRA".to_owned(),
        p if p.use_rslora => "rank-stabilised LoRA".to_owned(),
        p if full(&p.rank_pattern) => "rank_pattern".to_owned(),
        p if full(&p.alpha_pattern) => "alpha_pattern".to_owned(),
        p if p.modules_to_save.as_ref().is_some_and(|m| !m.is_null()) => {
            "modules_to_save".to_owned()
        }
        p if p.bias.as_deref().is_some_and(|b| b != "none") => {
            format!("bias {}", p.bias.as_deref().unwrap_or_default())
        }
        _ => return Ok(()),
    };
    Err(PolicyError::Unsupported {
        feature: Feature::Adapter,
        found,
    })
}
