//! What a decoder looks like, whichever file said so: `config.json` ([`config`]) or GGUF metadata.
//! Owns the shape of every weight that follows from it; reads no file and holds no tensor.

mod config;
mod gguf;

use serde::{Deserialize, Serialize};

/// Decoder family. All three are pre-norm, RoPE, SwiGLU; they differ in biases and qk-norm.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    Llama,
    Qwen2,
    Qwen3,
}

/// RoPE frequency scaling of Llama 3.1 (`rope_type: "llama3"` in `config.json`).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct RopeScaling {
    pub factor: f64,
    pub low_freq_factor: f64,
    pub high_freq_factor: f64,
    pub original_max_position_embeddings: usize,
}

/// Shape and constants of one decoder. Field names are those of Hugging Face's `config.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelSpec {
    pub family: Family,
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub num_key_value_heads: usize,
    pub head_dim: usize,
    pub max_position_embeddings: usize,
    pub rms_norm_eps: f64,
    pub rope_theta: f64,
    pub rope_scaling: Option<RopeScaling>,
    /// LM head is the embedding matrix.
    pub tie_word_embeddings: bool,
    /// q, k, v projections have a bias (Qwen2; Llama with `attention_bias`).
    pub qkv_bias: bool,
    /// o projection has a bias (Llama with `attention_bias`).
    pub o_bias: bool,
    /// RMSNorm on each head's q and k (Qwen3).
    pub qk_norm: bool,
}

/// Far beyond any decoder; a damaged config must not make a list of a billion weights.
const MOST_LAYERS: usize = 10_000;

/// Four times the longest context that a model has had. Each position has a row in the rotation table.
const MOST_POSITIONS: usize = 1 << 22;

impl ModelSpec {
    /// Width of the concatenated query heads, the output of `q_proj`.
    pub fn q_dim(&self) -> usize {
        self.num_attention_heads * self.head_dim
    }

    /// Width of the concatenated key (or value) heads, the output of `k_proj` and `v_proj`.
    pub fn kv_dim(&self) -> usize {
        self.num_key_value_heads * self.head_dim
    }

    /// The linear layers of block `layer`: Hugging Face name without `.weight`, rows (out), columns (in)
    /// and whether there is a bias.
    pub fn linears(&self, layer: usize) -> [(String, usize, usize, bool); 7] {
        let (h, q, kv, ff) = (
            self.hidden_size,
            self.q_dim(),
            self.kv_dim(),
            self.intermediate_size,
        );
        let block = |name: &str| format!("model.layers.{layer}.{name}");
        [
            (block("self_attn.q_proj"), q, h, self.qkv_bias),
            (block("self_attn.k_proj"), kv, h, self.qkv_bias),
            (block("self_attn.v_proj"), kv, h, self.qkv_bias),
            (block("self_attn.o_proj"), h, q, self.o_bias),
            (block("mlp.gate_proj"), ff, h, false),
            (block("mlp.up_proj"), ff, h, false),
            (block("mlp.down_proj"), h, ff, false),
        ]
    }

    /// Name and shape of every weight, Hugging Face names.
    pub fn weight_shapes(&self) -> Vec<(String, Vec<usize>)> {
        let (h, vocab) = (self.hidden_size, self.vocab_size);
        let mut shapes = vec![
            ("model.embed_tokens.weight".to_owned(), vec![vocab, h]),
            ("model.norm.weight".to_owned(), vec![h]),
        ];
        if !self.tie_word_embeddings {
            shapes.push(("lm_head.weight".to_owned(), vec![vocab, h]));
        }
        for layer in 0..self.num_hidden_layers {
            for (name, rows, columns, bias) in self.linears(layer) {
                if bias {
                    shapes.push((format!("{name}.bias"), vec![rows]));
                }
                shapes.push((format!("{name}.weight"), vec![rows, columns]));
            }
            let mut norm =
                |name: &str, n| shapes.push((format!("model.layers.{layer}.{name}"), vec![n]));
            norm("input_layernorm.weight", h);
            norm("post_attention_layernorm.weight", h);
            if self.qk_norm {
                norm("self_attn.q_norm.weight", self.head_dim);
                norm("self_attn.k_norm.weight", self.head_dim);
            }
        }
        shapes
    }

    /// Number of all weights.
    pub fn parameters(&self) -> usize {
        let shapes = self.weight_shapes();
        let sizes = shapes
            .iter()
            .map(|(_, shape)| shape.iter().product::<usize>());
        sizes.sum()
    }

    /// Refuses sizes that no decoder can have, so that later arithmetic on them cannot fail.
    fn check(&self) -> Result<(), String> {
        let positive = [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", self.num_attention_heads),
            ("num_key_value_heads", self.num_key_value_heads),
            ("head_dim", self.head_dim),
            ("max_position_embeddings", self.max_position_embeddings),
        ];
        if let Some((name, _)) = positive.iter().find(|(_, n)| *n == 0) {
            return Err(format!("`{name}` is 0"));
        }
        for (name, found, most) in [
            ("num_hidden_layers", self.num_hidden_layers, MOST_LAYERS),
            (
                "max_position_embeddings",
                self.max_position_embeddings,
                MOST_POSITIONS,
            ),
        ] {
            if found > most {
                return Err(format!("{name} {found} is more than {most}"));
            }
        }
        if !self
            .num_attention_heads
            .is_multiple_of(self.num_key_value_heads)
        {
            return Err(format!(
                "num_attention_heads {} is not a multiple of num_key_value_heads {}",
                self.num_attention_heads, self.num_key_value_heads
            ));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(format!("head_dim {} is odd", self.head_dim));
        }
        let finite = |x: f64| x.is_finite() && x > 0.0;
        if !finite(self.rope_theta) || !finite(self.rms_norm_eps) {
            return Err(format!(
                "rope_theta {} or rms_norm_eps {} is not a positive number",
                self.rope_theta, self.rms_norm_eps
            ));
        }
        Ok(())
    }
}

impl RopeScaling {
    /// What each of the `head_dim / 2` inverse frequencies is divided by (Llama 3.1: wavelengths beyond
    /// `original / low_freq_factor` by `factor`, those below `original / high_freq_factor` by 1, linear
    /// in `original / wavelength` between).
    pub fn divisors(&self, head_dim: usize, rope_theta: f64) -> Vec<f64> {
        let original = self.original_max_position_embeddings as f64;
        (0..head_dim / 2)
            .map(|i| {
                let wavelength =
                    std::f64::consts::TAU * rope_theta.powf(2.0 * i as f64 / head_dim as f64);
                let smooth = (original / wavelength - self.low_freq_factor)
                    / (self.high_freq_factor - self.low_freq_factor);
                let smooth = smooth.clamp(0.0, 1.0);
                1.0 / (smooth + (1.0 - smooth) / self.factor)
            })
            .collect()
    }
}

#[cfg(test)]
mod tests;
