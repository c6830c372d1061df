//! `config.json` in and out. Reads the forms of transformers 4 (`rope_theta`, `rope_scaling`) and 5
//! (`rope_parameters`), and refuses what the decoder does not compute rather than computing something else.

use std::path::Path;

use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::{Family, ModelSpec, RopeScaling};
use crate::error::{Feature, PolicyError};

/// The keys of `config.json` that matter here. Everything is optional: which defaults apply depends on the
/// family, and unknown keys are other people's business.
#[derive(Deserialize)]
struct RawConfig {
    #[serde(default)]
    architectures: Option<Vec<String>>,
    model_type: Option<String>,
    vocab_size: Option<usize>,
    hidden_size: Option<usize>,
    intermediate_size: Option<usize>,
    num_hidden_layers: Option<usize>,
    num_attention_heads: Option<usize>,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    max_position_embeddings: Option<usize>,
    rms_norm_eps: Option<f64>,
    rope_theta: Option<f64>,
    rope_scaling: Option<Map<String, Value>>,
    rope_parameters: Option<Map<String, Value>>,
    partial_rotary_factor: Option<f64>,
    tie_word_embeddings: Option<bool>,
    attention_bias: Option<bool>,
    mlp_bias: Option<bool>,
    hidden_act: Option<String>,
    use_sliding_window: Option<bool>,
    sliding_window: Option<usize>,
    max_window_layers: Option<usize>,
    layer_types: Option<Vec<String>>,
    quantization_config: Option<Map<String, Value>>,
    num_experts: Option<usize>,
    num_local_experts: Option<usize>,
}

impl ModelSpec {
    /// Reads a `config.json`. `origin` names the file in errors.
    ///
    /// Errors: [`PolicyError::Malformed`] for JSON that is not a model config,
    /// [`PolicyError::Architecture`] and [`PolicyError::Unsupported`] for models this crate cannot run.
    pub fn from_config_json(bytes: &[u8], origin: &Path) -> Result<Self, PolicyError> {
        let malformed = |reason: String| PolicyError::Malformed {
            path: origin.to_owned(),
            reason,
        };
        let raw: RawConfig =
            serde_json::from_slice(bytes).map_err(|error| malformed(error.to_string()))?;
        let family = family(&raw)?;
        refuse_unsupported(&raw, family)?;
        let need = |name: &str, value: Option<usize>| {
            value.ok_or_else(|| malformed(format!("`{name}` is missing")))
        };
        let hidden_size = need("hidden_size", raw.hidden_size)?;
        let heads = need("num_attention_heads", raw.num_attention_heads)?;
        // transformers: Qwen3Config has a default of its own, the others divide.
        let head_dim = match (raw.head_dim, family) {
            (Some(d), _) => d,
            (None, Family::Qwen3) => 128,
            (None, _) => hidden_size.checked_div(heads).unwrap_or(0),
        };
        let attention_bias = raw.attention_bias.unwrap_or(false);
        let (rope_theta, rope_scaling) = rope(&raw, origin)?;
        let spec = Self {
            family,
            vocab_size: need("vocab_size", raw.vocab_size)?,
            hidden_size,
            intermediate_size: need("intermediate_size", raw.intermediate_size)?,
            num_hidden_layers: need("num_hidden_layers", raw.num_hidden_layers)?,
            num_attention_heads: heads,
            num_key_value_heads: raw.num_key_value_heads.unwrap_or(heads),
            head_dim,
            max_position_embeddings: raw.max_position_embeddings.unwrap_or(match family {
                Family::Llama => 2048,
                Family::Qwen2 | Family::Qwen3 => 32768,
            }),
            rms_norm_eps: raw.rms_norm_eps.unwrap_or(1e-6),
            rope_theta,
            rope_scaling,
            tie_word_embeddings: raw.tie_word_embeddings.unwrap_or(false),
            qkv_bias: attention_bias || family == Family::Qwen2,
            // Qwen2 has no bias on o whatever `attention_bias` says; it does not read that key.
            o_bias: attention_bias && family != Family::Qwen2,
            qk_norm: family == Family::Qwen3,
        };
        spec.check().map_err(malformed)?;
        Ok(spec)
    }

    /// The `config.json` of this model, in the transformers 4 form, which 5 reads as well. Token ids are
    /// the tokenizer's and are added by whoever writes the file.
    pub fn to_config_json(&self) -> Map<String, Value> {
        let (architecture, model_type) = match self.family {
            Family::Llama => ("LlamaForCausalLM", "llama"),
            Family::Qwen2 => ("Qwen2ForCausalLM", "qwen2"),
            Family::Qwen3 => ("Qwen3ForCausalLM", "qwen3"),
        };
        let mut config = Map::new();
        let mut set = |key: &str, value: Value| {
            config.insert(key.to_owned(), value);
        };
        set("architectures", json!([architecture]));
        set("model_type", json!(model_type));
        set("vocab_size", json!(self.vocab_size));
        set("hidden_size", json!(self.hidden_size));
        set("intermediate_size", json!(self.intermediate_size));
        set("num_hidden_layers", json!(self.num_hidden_layers));
        set("num_attention_heads", json!(self.num_attention_heads));
        set("num_key_value_heads", json!(self.num_key_value_heads));
        set("head_dim", json!(self.head_dim));
        set(
            "max_position_embeddings",
            json!(self.max_position_embeddings),
        );
        set("rms_norm_eps", json!(self.rms_norm_eps));
        set("rope_theta", json!(self.rope_theta));
        set(
            "rope_scaling",
            self.rope_scaling.map_or(Value::Null, |s| {
                json!({
                    "rope_type": "llama3",
                    "factor": s.factor,
                    "low_freq_factor": s.low_freq_factor,
                    "high_freq_factor": s.high_freq_factor,
                    "original_max_position_embeddings": s.original_max_position_embeddings,
                })
            }),
        );
        set("tie_word_embeddings", json!(self.tie_word_embeddings));
        if self.family != Family::Qwen2 {
            set("attention_bias", json!(self.o_bias));
        }
        set("hidden_act", json!("silu"));
        config
    }
}

fn family(raw: &RawConfig) -> Result<Family, PolicyError> {
    let architecture = raw.architectures.as_ref().and_then(|a| a.first());
    // `architectures` decides; `model_type` speaks for configs written without it.
    let name = architecture.or(raw.model_type.as_ref());
    match name.map(String::as_str) {
        Some("LlamaForCausalLM" | "llama") => Ok(Family::Llama),
        Some("Qwen2ForCausalLM" | "qwen2") => Ok(Family::Qwen2),
        Some("Qwen3ForCausalLM" | "qwen3") => Ok(Family::Qwen3),
        other => Err(PolicyError::Architecture {
            found: other.unwrap_or("none").to_owned(),
        }),
    }
}

fn refuse_unsupported(raw: &RawConfig, family: Family) -> Result<(), PolicyError> {
    let refuse = |feature, found: &str| {
        Err(PolicyError::Unsupported {
            feature,
            found: found.to_owned(),
        })
    };
    if let Some(q) = &raw.quantization_config {
        let method = q.get("quant_method").and_then(Value::as_str);
        return refuse(Feature::QuantizedWeights, method.unwrap_or("unknown"));
    }
    if let Some(n) = raw.num_experts.or(raw.num_local_experts).filter(|n| *n > 0) {
        return refuse(Feature::MixtureOfExperts, &format!("{n} experts"));
    }
    if let Some(act) = raw.hidden_act.as_deref().filter(|a| *a != "silu") {
        return refuse(Feature::Activation, act);
    }
    if raw.mlp_bias == Some(true) {
        return refuse(Feature::MlpBias, "true");
    }
    // Llama has no such keys; a window at least as long as the context never hides anything.
    let window = raw
        .sliding_window
        .filter(|w| raw.max_position_embeddings.is_none_or(|max| *w < max));
    if let (Some(window), Some(true), true) =
        (window, raw.use_sliding_window, family != Family::Llama)
    {
        let slides = match &raw.layer_types {
            Some(types) => types.iter().any(|t| t == "sliding_attention"),
            None => raw.max_window_layers.unwrap_or(28) < raw.num_hidden_layers.unwrap_or(0),
        };
        if slides {
            return refuse(Feature::SlidingWindow, &window.to_string());
        }
    }
    Ok(())
}

/// Base and scaling of the rotary embedding. `rope_parameters` (transformers 5) wins over the older pair.
fn rope(raw: &RawConfig, origin: &Path) -> Result<(f64, Option<RopeScaling>), PolicyError> {
    let parameters = raw.rope_parameters.as_ref().or(raw.rope_scaling.as_ref());
    let number = |key: &str| parameters.and_then(|p| p.get(key)).and_then(Value::as_f64);
    let theta = number("rope_theta").or(raw.rope_theta).unwrap_or(10_000.0);
    if let Some(factor) = number("partial_rotary_factor")
        .or(raw.partial_rotary_factor)
        .filter(|f| *f != 1.0)
    {
        return Err(PolicyError::Unsupported {
            feature: Feature::PartialRotary,
            found: factor.to_string(),
        });
    }
    let kind = parameters
        .and_then(|p| p.get("rope_type").or_else(|| p.get("type")))
        .and_then(Value::as_str);
    match kind {
        None | Some("default") => Ok((theta, None)),
        Some("llama3") => {
            let need = |key: &str| {
                number(key).ok_or_else(|| PolicyError::Malformed {
                    path: origin.to_owned(),
                    reason: format!("`{key}` of llama3 RoPE scaling is missing"),
                })
            };
            let scaling = RopeScaling {
                factor: need("factor")?,
                low_freq_factor: need("low_freq_factor")?,
                high_freq_factor: need("high_freq_factor")?,
                original_max_position_embeddings: need("original_max_position_embeddings")?
                    as usize,
            };
            if scaling.factor < 1.0 || scaling.high_freq_factor <= scaling.low_freq_factor {
                return Err(PolicyError::Malformed {
                    path: origin.to_owned(),
                    reason: format!("llama3 RoPE scaling makes no sense: {scaling:?}"),
                });
            }
            Ok((theta, Some(scaling)))
        }
        Some(other) => Err(PolicyError::Unsupported {
            feature: Feature::RopeScaling,
            found: other.to_owned(),
        }),
    }
}
