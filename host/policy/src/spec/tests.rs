//! Specs read from `config.json` and from GGUF metadata, and what is refused.

use std::path::Path;

use serde_json::{Value, json};

use super::*;
use crate::error::{Feature, PolicyError};

fn read(config: &Value) -> Result<ModelSpec, PolicyError> {
    ModelSpec::from_config_json(config.to_string().as_bytes(), Path::new("config.json"))
}

fn config(architecture: &str, extra: Value) -> Value {
    let mut config = json!({
        "architectures": [architecture], "vocab_size": 100, "hidden_size": 64,
        "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
    });
    let Value::Object(extra) = extra else {
        panic!("extra keys come as an object");
    };
    config.as_object_mut().unwrap().extend(extra);
    config
}

fn llama3_numbers() -> Value {
    json!({
        "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    })
}

#[test]
fn both_rope_forms_mean_the_same() {
    let old = read(&config(
        "LlamaForCausalLM",
        json!({ "rope_theta": 500000, "rope_scaling": llama3_numbers() }),
    ))
    .unwrap();
    let mut parameters = llama3_numbers();
    parameters["rope_theta"] = json!(500000.0);
    let new = read(&config(
        "LlamaForCausalLM",
        json!({ "rope_parameters": parameters }),
    ))
    .unwrap();
    assert_eq!(old, new);
    assert_eq!(old.rope_theta, 500_000.0);
    assert_eq!(old.rope_scaling.unwrap().factor, 32.0);
}

#[test]
fn families_differ_in_head_dim_bias_and_norm() {
    let llama = read(&config("LlamaForCausalLM", json!({}))).unwrap();
    assert_eq!(
        (llama.head_dim, llama.qkv_bias, llama.o_bias, llama.qk_norm),
        (16, false, false, false)
    );
    let biased = read(&config(
        "LlamaForCausalLM",
        json!({ "attention_bias": true }),
    ))
    .unwrap();
    assert!(biased.qkv_bias && biased.o_bias);
    let qwen2 = read(&config("Qwen2ForCausalLM", json!({}))).unwrap();
    assert_eq!(
        (qwen2.head_dim, qwen2.qkv_bias, qwen2.o_bias),
        (16, true, false)
    );
    let qwen3 = read(&config("Qwen3ForCausalLM", json!({}))).unwrap();
    assert_eq!(
        (qwen3.head_dim, qwen3.qkv_bias, qwen3.qk_norm),
        (128, false, true)
    );
}

#[test]
fn a_written_config_reads_back() {
    for (architecture, extra) in [
        (
            "LlamaForCausalLM",
            json!({ "attention_bias": true, "rope_scaling": llama3_numbers() }),
        ),
        (
            "Qwen2ForCausalLM",
            json!({ "tie_word_embeddings": true, "rope_theta": 1e6 }),
        ),
        ("Qwen3ForCausalLM", json!({ "head_dim": 32 })),
    ] {
        let spec = read(&config(architecture, extra)).unwrap();
        assert_eq!(read(&Value::Object(spec.to_config_json())).unwrap(), spec);
    }
}

#[test]
fn what_would_be_computed_wrongly_is_refused() {
    let cases = [
        (
            json!({ "quantization_config": { "quant_method": "gptq" } }),
            Feature::QuantizedWeights,
            "gptq",
        ),
        (
            json!({ "num_experts": 8 }),
            Feature::MixtureOfExperts,
            "8 experts",
        ),
        (json!({ "hidden_act": "gelu" }), Feature::Activation, "gelu"),
        (
            json!({ "rope_scaling": { "type": "yarn", "factor": 4.0 } }),
            Feature::RopeScaling,
            "yarn",
        ),
        (
            json!({ "rope_parameters": { "rope_type": "dynamic", "rope_theta": 1.0 } }),
            Feature::RopeScaling,
            "dynamic",
        ),
        (
            json!({ "partial_rotary_factor": 0.5 }),
            Feature::PartialRotary,
            "0.5",
        ),
        (
            json!({ "use_sliding_window": true, "sliding_window": 16, "max_window_layers": 1 }),
            Feature::SlidingWindow,
            "16",
        ),
        (
            json!({
                "use_sliding_window": true, "sliding_window": 16,
                "layer_types": ["full_attention", "sliding_attention"],
            }),
            Feature::SlidingWindow,
            "16",
        ),
    ];
    for (extra, feature, operand) in cases {
        let error = read(&config("Qwen2ForCausalLM", extra)).unwrap_err();
        let PolicyError::Unsupported { feature: f, found } = &error else {
            panic!("{error:?}");
        };
        assert_eq!((*f, found.as_str()), (feature, operand));
        assert!(error.hint().is_some());
    }
}

#[test]
fn a_sliding_window_that_hides_nothing_is_accepted() {
    for extra in [
        json!({ "use_sliding_window": false, "sliding_window": 16, "max_window_layers": 1 }),
        json!({ "use_sliding_window": true, "sliding_window": 16, "max_window_layers": 2 }),
        json!({
            "use_sliding_window": true, "sliding_window": 512, "max_window_layers": 0,
            "max_position_embeddings": 512,
        }),
    ] {
        assert_eq!(
            read(&config("Qwen2ForCausalLM", extra)).unwrap().head_dim,
            16
        );
    }
}

#[test]
fn other_architectures_and_impossible_sizes_are_named() {
    let error = read(&config("MixtralForCausalLM", json!({}))).unwrap_err();
    assert_eq!(
        error.to_string(),
        "unsupported model architecture `MixtralForCausalLM`"
    );
    for (extra, part) in [
        (json!({ "num_key_value_heads": 3 }), "4 is not a multiple"),
        (
            json!({ "num_attention_heads": 0 }),
            "`num_attention_heads` is 0",
        ),
        (json!({ "head_dim": 5 }), "head_dim 5 is odd"),
        (json!({ "vocab_size": null }), "`vocab_size` is missing"),
        (json!({ "rope_theta": -1.0 }), "rope_theta -1"),
    ] {
        let error = read(&config("LlamaForCausalLM", extra))
            .unwrap_err()
            .to_string();
        assert!(
            error.contains(part) && error.starts_with("config.json: "),
            "{error}"
        );
    }
}

/// Reference: transformers 5.23, `_compute_llama3_parameters` with these numbers.
#[test]
fn llama3_divisors_match_transformers() {
    let scaling = RopeScaling {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 128,
    };
    let expected = [1.0, 2.339_116_8, 8.0, 8.0];
    let found = scaling.divisors(8, 10_000.0);
    assert_eq!(found.len(), expected.len());
    for (f, e) in found.iter().zip(expected) {
        assert!((f / e - 1.0).abs() < 1e-5, "{found:?}");
    }
}
