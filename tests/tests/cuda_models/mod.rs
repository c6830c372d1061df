//! Random models for the tests on a GPU.

use std::{collections::BTreeMap, path::Path, sync::OnceLock};

use candle_core::{DType, Tensor};
use grpo_policy::{
    backend::cuda::CudaSizes,
    spec::{Family, ModelSpec, RopeScaling},
    weights::random_weights,
};

/// A folder in which the models of one run share their compiled kernels.
pub fn cache() -> Option<&'static Path> {
    static FOLDER: OnceLock<tempfile::TempDir> = OnceLock::new();
    Some(FOLDER.get_or_init(|| tempfile::tempdir().unwrap()).path())
}

/// A decoder with `query` and `key` heads of `dim`.
pub fn spec(family: Family, (query, key, dim): (usize, usize, usize), vocab: usize) -> ModelSpec {
    ModelSpec {
        family,
        vocab_size: vocab,
        hidden_size: 160,
        intermediate_size: 288,
        num_hidden_layers: 3,
        num_attention_heads: query,
        num_key_value_heads: key,
        head_dim: dim,
        max_position_embeddings: 1024,
        rms_norm_eps: 1e-6,
        rope_theta: 1e4,
        rope_scaling: (family == Family::Llama).then_some(RopeScaling {
            factor: 4.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 128,
        }),
        tie_word_embeddings: family != Family::Llama,
        qkv_bias: family == Family::Qwen2,
        o_bias: false,
        qk_norm: family == Family::Qwen3,
    }
}

/// Weights that bf16 holds exactly, large enough for attention and logits to be far from uniform, with norms and
/// biases that are not all alike.
pub fn weights(spec: &ModelSpec, seed: u64) -> BTreeMap<String, Tensor> {
    let varied = |tensor: Tensor, name: &str| -> candle_core::Result<Tensor> {
        let n = tensor.elem_count();
        let wave = |i: usize| ((i * 37 + name.len()) % 19) as f32 / 19.0 - 0.5;
        let waves = Tensor::from_vec((0..n).map(wave).collect::<Vec<_>>(), n, tensor.device())?;
        let tensor = match tensor.dims().len() {
            1 => tensor.add(&waves.affine(0.6, 0.0)?)?,
            _ if name.contains("embed") || name.contains("lm_head") => tensor.affine(8.0, 0.0)?,
            _ => tensor.affine(5.0, 0.0)?,
        };
        tensor.to_dtype(DType::BF16)?.to_dtype(DType::F32)
    };
    let all = random_weights(spec, seed).unwrap();
    all.into_iter()
        .map(|(name, tensor)| (name.clone(), varied(tensor, &name).unwrap()))
        .collect()
}

/// Sizes that the models of the tests fit in.
pub const SIZES: CudaSizes = CudaSizes {
    max_step_tokens: 1024,
    max_batch: 64,
    max_model_len: 512,
};
