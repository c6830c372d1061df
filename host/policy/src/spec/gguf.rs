//! A [`ModelSpec`] from GGUF metadata (keys of the GGUF specification, `general.architecture` as prefix).
//! What a GGUF file says only through its tensors (biases, tied embeddings, Llama 3 RoPE factors) is read there.

use super::{Family, ModelSpec, RopeScaling};
use crate::{
    error::{Feature, PolicyError},
    gguf::Gguf,
};

impl ModelSpec {
    /// Errors as [`ModelSpec::from_config_json`].
    pub(crate) fn from_gguf(file: &mut Gguf) -> Result<Self, PolicyError> {
        let architecture = file
            .text("general.architecture")?
            .unwrap_or("none")
            .to_owned();
        let family = match architecture.as_str() {
            "llama" => Family::Llama,
            "qwen2" => Family::Qwen2,
            "qwen3" => Family::Qwen3,
            _ => {
                return Err(PolicyError::Architecture {
                    found: architecture,
                });
            }
        };
        let key = |name: &str| format!("{architecture}.{name}");
        refuse_unsupported(file, &architecture)?;
        let need = |name: &str| {
            file.integer(&key(name))?
                .ok_or_else(|| file.malformed(format!("`{}` is missing", key(name))))
        };
        let hidden_size = need("embedding_length")?;
        let heads = need("attention.head_count")?;
        let vocab_size = match file.integer(&key("vocab_size"))? {
            Some(n) => n,
            None => file.texts("tokenizer.ggml.tokens")?.len(),
        };
        let head_dim = match file.integer(&key("attention.key_length"))? {
            Some(d) => d,
            None => hidden_size.checked_div(heads).unwrap_or(0),
        };
        let has = |name: &str| file.content.tensor_infos.contains_key(name);
        let mut spec = Self {
            family,
            vocab_size,
            hidden_size,
            intermediate_size: need("feed_forward_length")?,
            num_hidden_layers: need("block_count")?,
            num_attention_heads: heads,
            num_key_value_heads: file
                .integer(&key("attention.head_count_kv"))?
                .unwrap_or(heads),
            head_dim,
            max_position_embeddings: need("context_length")?,
            rms_norm_eps: file
                .float(&key("attention.layer_norm_rms_epsilon"))?
                .unwrap_or(1e-6),
            rope_theta: file.float(&key("rope.freq_base"))?.unwrap_or(10_000.0),
            rope_scaling: None,
            tie_word_embeddings: !has("output.weight"),
            qkv_bias: has("blk.0.attn_q.bias"),
            o_bias: has("blk.0.attn_output.bias"),
            qk_norm: family == Family::Qwen3,
        };
        spec.check().map_err(|reason| file.malformed(reason))?;
        if has("rope_freqs.weight") {
            spec.rope_scaling = Some(scaling_from_factors(file, &spec)?);
        }
        Ok(spec)
    }
}

fn refuse_unsupported(file: &Gguf, architecture: &str) -> Result<(), PolicyError> {
    let key = |name: &str| format!("{architecture}.{name}");
    let refuse = |feature, found: String| Err(PolicyError::Unsupported { feature, found });
    if let Some(n) = file.integer(&key("expert_count"))?.filter(|n| *n > 0) {
        return refuse(Feature::MixtureOfExperts, format!("{n} experts"));
    }
    if let Some(kind) = file
        .text(&key("rope.scaling.type"))?
        .filter(|k| *k != "none")
    {
        return refuse(Feature::RopeScaling, kind.to_owned());
    }
    let context = file.integer(&key("context_length"))?.unwrap_or(usize::MAX);
    if let Some(w) = file
        .integer(&key("attention.sliding_window"))?
        .filter(|w| (1..context).contains(w))
    {
        return refuse(Feature::SlidingWindow, w.to_string());
    }
    Ok(())
}

/// Llama 3.1+ GGUF files hold the divisors of the frequencies instead of the four numbers they follow from.
/// All published models agree on three of the numbers, and the fourth is the largest divisor; if these do
/// not give back the tensor, the scaling is one we do not know.
fn scaling_from_factors(file: &mut Gguf, spec: &ModelSpec) -> Result<RopeScaling, PolicyError> {
    let found: Vec<f32> = file.tensor("rope_freqs.weight")?.flatten_all()?.to_vec1()?;
    let scaling = RopeScaling {
        factor: found.iter().copied().fold(1.0, f32::max).into(),
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 8192,
    };
    let expected = scaling.divisors(spec.head_dim, spec.rope_theta);
    let same = found.len() == expected.len()
        && found
            .iter()
            .zip(&expected)
            .all(|(f, e)| (f64::from(*f) / e - 1.0).abs() < 1e-4);
    if !same {
        return Err(PolicyError::Unsupported {
            feature: Feature::RopeScaling,
            found: "rope_freqs".to_owned(),
        });
    }
    Ok(scaling)
}
