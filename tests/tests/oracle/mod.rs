//! candle-transformers' models on a fixture folder: a second oracle beside transformers, which shares
//! neither the reader of the files nor a line of the network with this project.

use std::{collections::HashMap, path::Path};

use candle_core::{DType, Device, Tensor};
use candle_nn::{Activation, VarBuilder};
use candle_transformers::models::{llama, qwen2, qwen3};

/// Logits after the last of `ids`.
pub fn last_logits(family: &str, folder: &Path, ids: &[u32]) -> Vec<f32> {
    let input = Tensor::new(ids, &Device::Cpu)
        .unwrap()
        .unsqueeze(0)
        .unwrap();
    let weights = weights(folder);
    let logits = match family {
        "qwen2" => qwen2::ModelForCausalLM::new(&qwen2(), weights)
            .unwrap()
            .forward(&input, 0),
        "qwen3" => qwen3::ModelForCausalLM::new(&qwen3(), weights)
            .unwrap()
            .forward(&input, 0),
        "llama" => {
            let config = llama();
            let mut cache = llama::Cache::new(true, DType::F32, &config, &Device::Cpu).unwrap();
            llama::Llama::load(weights, &config)
                .unwrap()
                .forward(&input, 0, &mut cache)
        }
        other => panic!("no oracle for {other}"),
    };
    logits.unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn weights(folder: &Path) -> VarBuilder<'static> {
    let mut tensors = HashMap::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if name.starts_with("model") && name.ends_with(".safetensors") {
            tensors.extend(candle_core::safetensors::load(&path, &Device::Cpu).unwrap());
        }
    }
    VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu)
}

// The shapes of `fixtures/make.py`; the models of candle do not read configs of transformers 5.

fn qwen2() -> qwen2::Config {
    qwen2::Config {
        vocab_size: 272,
        hidden_size: 32,
        intermediate_size: 40,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        max_position_embeddings: 256,
        sliding_window: 256,
        max_window_layers: 2,
        tie_word_embeddings: false,
        rope_theta: 1e4,
        rms_norm_eps: 1e-6,
        use_sliding_window: false,
        hidden_act: Activation::Silu,
    }
}

fn qwen3() -> qwen3::Config {
    qwen3::Config {
        vocab_size: 272,
        hidden_size: 32,
        intermediate_size: 40,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        head_dim: 16,
        attention_bias: false,
        num_key_value_heads: 2,
        max_position_embeddings: 256,
        sliding_window: None,
        max_window_layers: 2,
        tie_word_embeddings: true,
        rope_theta: 1e6,
        rms_norm_eps: 1e-6,
        use_sliding_window: false,
        hidden_act: Activation::Silu,
    }
}

fn llama() -> llama::Config {
    llama::Config {
        hidden_size: 32,
        intermediate_size: 40,
        vocab_size: 272,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: 1,
        use_flash_attn: false,
        rms_norm_eps: 1e-6,
        rope_theta: 1e4,
        bos_token_id: Some(1),
        eos_token_id: None,
        rope_scaling: Some(llama::Llama3RopeConfig {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 128,
            rope_type: llama::Llama3RopeType::Llama3,
        }),
        max_position_embeddings: 256,
        tie_word_embeddings: false,
    }
}
