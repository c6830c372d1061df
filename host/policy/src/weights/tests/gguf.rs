//! GGUF files written from the fixtures give back the fixtures.

use std::{collections::HashMap, path::Path};

use candle_core::{
    Device, Tensor,
    quantized::{GgmlDType, QTensor, gguf_file},
};
use gguf_file::Value;

use super::{assert_same, fixture, values};
use crate::{
    error::{Feature, PolicyError},
    spec::{Family, ModelSpec, RopeScaling},
    weights::{LoadedModel, Weights, load, load_as_stored},
};

/// Hugging Face row order to the one of Llama GGUF files, element by element: half `i`, pair `j` of a head
/// goes from row `i · d/2 + j` to row `2 j + i`.
fn interleave(tensor: &Tensor, head_dim: usize) -> Tensor {
    let (rows, columns) = tensor.dims2().unwrap();
    let source = values(tensor);
    let mut target = vec![0f32; rows * columns];
    for row in 0..rows {
        let (head, within) = (row / head_dim, row % head_dim);
        let (half, pair) = (within / (head_dim / 2), within % (head_dim / 2));
        let to = head * head_dim + 2 * pair + half;
        target[to * columns..(to + 1) * columns]
            .copy_from_slice(&source[row * columns..(row + 1) * columns]);
    }
    Tensor::from_vec(target, (rows, columns), &Device::Cpu).unwrap()
}

fn gguf_name(name: &str) -> String {
    let name = name
        .replace("model.embed_tokens", "token_embd")
        .replace("model.norm", "output_norm")
        .replace("lm_head", "output")
        .replace("model.layers.", "blk.")
        .replace("input_layernorm", "attn_norm")
        .replace("post_attention_layernorm", "ffn_norm")
        .replace("self_attn.o_proj", "attn_output")
        .replace("self_attn.", "attn_")
        .replace("mlp.", "ffn_");
    name.replace("_proj", "")
}

fn metadata(architecture: &str, model: &LoadedModel) -> HashMap<String, Value> {
    let spec = &model.spec;
    let tokenizer: serde_json::Value =
        serde_json::from_str(&model.tokenizer.to_json().unwrap()).unwrap();
    let vocab = tokenizer["model"]["vocab"].as_object().unwrap();
    let mut tokens = vec![Value::String(String::new()); vocab.len()];
    for (token, id) in vocab {
        tokens[id.as_u64().unwrap() as usize] = Value::String(token.clone());
    }
    let merges = tokenizer["model"]["merges"].as_array().unwrap();
    let merges = merges.iter().map(|m| {
        Value::String(format!(
            "{} {}",
            m[0].as_str().unwrap(),
            m[1].as_str().unwrap()
        ))
    });
    let types = (0..tokens.len()).map(|id| Value::I32(if id < 4 { 3 } else { 1 }));
    let count = |n: usize| Value::U32(n as u32);
    let text = |s: &str| Value::String(s.to_owned());
    let key = |name: &str| format!("{architecture}.{name}");
    HashMap::from([
        ("general.architecture".to_owned(), text(architecture)),
        (key("block_count"), count(spec.num_hidden_layers)),
        (key("context_length"), count(spec.max_position_embeddings)),
        (key("embedding_length"), count(spec.hidden_size)),
        (key("feed_forward_length"), count(spec.intermediate_size)),
        (key("attention.head_count"), count(spec.num_attention_heads)),
        (
            key("attention.head_count_kv"),
            count(spec.num_key_value_heads),
        ),
        (key("attention.key_length"), count(spec.head_dim)),
        (key("attention.layer_norm_rms_epsilon"), Value::F32(1e-6)),
        (key("rope.freq_base"), Value::F32(spec.rope_theta as f32)),
        ("tokenizer.ggml.model".to_owned(), text("gpt2")),
        ("tokenizer.ggml.pre".to_owned(), text("smollm")),
        ("tokenizer.ggml.tokens".to_owned(), Value::Array(tokens)),
        (
            "tokenizer.ggml.merges".to_owned(),
            Value::Array(merges.collect()),
        ),
        (
            "tokenizer.ggml.token_type".to_owned(),
            Value::Array(types.collect()),
        ),
        ("tokenizer.ggml.bos_token_id".to_owned(), count(1)),
        ("tokenizer.ggml.eos_token_id".to_owned(), count(3)),
        ("tokenizer.ggml.add_bos_token".to_owned(), Value::Bool(true)),
        ("tokenizer.chat_template".to_owned(), text("{{ messages }}")),
    ])
}

fn write_gguf(path: &Path, metadata: &HashMap<String, Value>, weights: &Weights) {
    let tensors: Vec<(String, QTensor)> = weights
        .iter()
        .map(|(name, t)| (name.clone(), QTensor::quantize(t, GgmlDType::F32).unwrap()))
        .collect();
    write_tensors(path, metadata, &tensors);
}

fn write_tensors(path: &Path, metadata: &HashMap<String, Value>, tensors: &[(String, QTensor)]) {
    let metadata: Vec<(&str, &Value)> = metadata.iter().map(|(k, v)| (k.as_str(), v)).collect();
    let tensors: Vec<(&str, &QTensor)> = tensors.iter().map(|(k, t)| (k.as_str(), t)).collect();
    let mut file = std::fs::File::create(path).unwrap();
    gguf_file::write(&mut file, &metadata, &tensors).unwrap();
}

/// The weights of `model` as a GGUF file of its family holds them.
fn gguf_weights(model: &LoadedModel) -> Weights {
    let interleaved = |name: &str| {
        model.spec.family == Family::Llama && (name.contains("q_proj") || name.contains("k_proj"))
    };
    model
        .tensors
        .iter()
        .map(|(name, tensor)| {
            let tensor = if interleaved(name) {
                interleave(tensor, model.spec.head_dim)
            } else {
                tensor.clone()
            };
            (gguf_name(name), tensor)
        })
        .collect()
}

#[test]
fn gguf_files_give_the_model_of_the_folder() {
    let folder = tempfile::tempdir().unwrap();
    for architecture in ["llama", "qwen2", "qwen3"] {
        let model = load(&fixture(architecture)).unwrap();
        let path = folder.path().join(format!("{architecture}.gguf"));
        write_gguf(
            &path,
            &metadata(architecture, &model),
            &gguf_weights(&model),
        );
        let found = load(&path).unwrap();
        // The file has no `rope_freqs.weight`; that one has its own test.
        let expected = ModelSpec {
            rope_scaling: None,
            ..model.spec
        };
        assert_eq!(found.spec, expected);
        assert_same(&found.tensors, &model.tensors);
        let text = "The answer: 3+14 is seventeen, naïve 日本 🦀.";
        assert_eq!(
            found.tokenizer.encode_prompt(text).unwrap(),
            model.tokenizer.encode_prompt(text).unwrap()
        );
        assert_eq!(found.tokenizer.eos_ids(), [3]);
        assert_eq!(found.tokenizer.decode(&[1, 55, 75, 3]).unwrap(), "Th");
        assert_eq!(
            found.tokenizer.chat_template_source(),
            Some("{{ messages }}")
        );
    }
}

/// Quantised matrices stay as they are until they are asked for, and are then what they were before: dequantised as they
/// lie in the file, and brought into order.
#[test]
fn quantised_matrices_stay_as_stored() {
    let folder = tempfile::tempdir().unwrap();
    for architecture in ["llama", "qwen2"] {
        let model = load(&fixture(architecture)).unwrap();
        let path = folder.path().join(format!("{architecture}.gguf"));
        let weights = gguf_weights(&model);
        let stored: Vec<(String, QTensor)> = weights
            .iter()
            .map(|(name, tensor)| {
                let in_blocks = tensor.dims().len() == 2 && tensor.dims()[1].is_multiple_of(32);
                let format = match in_blocks {
                    true => GgmlDType::Q4_1,
                    false => GgmlDType::F32,
                };
                (name.clone(), QTensor::quantize(tensor, format).unwrap())
            })
            .collect();
        write_tensors(&path, &metadata(architecture, &model), &stored);
        let found = load_as_stored(&path).unwrap();
        assert!(!found.quantized.is_empty());
        for (name, matrix) in &found.quantized {
            assert_eq!(matrix.format(), GgmlDType::Q4_1, "{name}");
            assert!(!found.tensors.contains_key(name));
        }
        let dense = load(&path).unwrap();
        assert!(dense.quantized.is_empty());
        let expected: Weights = stored
            .into_iter()
            .map(|(name, tensor)| (name, tensor.dequantize(&Device::Cpu).unwrap()))
            .collect();
        let all = gguf_weights(&dense);
        assert_same(&all, &expected);
    }
}

#[test]
fn gguf_rope_factors_become_llama3_scaling() {
    let model = load(&fixture("llama")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    let published = RopeScaling {
        factor: 32.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 8192,
    };
    let mut metadata = metadata("llama", &model);
    metadata.insert("llama.rope.freq_base".to_owned(), Value::F32(500_000.0));
    let write = |divisors: &[f64]| {
        let factors: Vec<f32> = divisors.iter().map(|f| *f as f32).collect();
        let mut weights = gguf_weights(&model);
        weights.insert(
            "rope_freqs.weight".to_owned(),
            Tensor::from_vec(factors, 4, &Device::Cpu).unwrap(),
        );
        write_gguf(&path, &metadata, &weights);
        load(&path)
    };
    let divisors = published.divisors(8, 500_000.0);
    assert_eq!(write(&divisors).unwrap().spec.rope_scaling, Some(published));
    let error = write(&[1.0, 1.0, 3.0, 4.0]).unwrap_err();
    assert!(matches!(
        error,
        PolicyError::Unsupported {
            feature: Feature::RopeScaling,
            ..
        }
    ));
}

#[test]
fn gguf_files_that_cannot_run_are_refused() {
    let model = load(&fixture("llama")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    let message = |key: &str, value: Value| {
        let mut metadata = metadata("llama", &model);
        metadata.insert(key.to_owned(), value);
        write_gguf(&path, &metadata, &gguf_weights(&model));
        load(&path).unwrap_err().to_string()
    };
    let text = |s: &str| Value::String(s.to_owned());
    assert_eq!(
        message("general.architecture", text("gemma")),
        "unsupported model architecture `gemma`"
    );
    assert_eq!(
        message("llama.expert_count", Value::U32(8)),
        "the model needs mixture of experts `8 experts`, which is not supported"
    );
    assert_eq!(
        message("tokenizer.ggml.pre", text("tekken")),
        "the model needs GGUF pre-tokenizer `tekken`, which is not supported"
    );
    assert_eq!(
        message("tokenizer.ggml.model", text("llama")),
        "the model needs GGUF tokenizer model `llama`, which is not supported"
    );
    assert!(
        message("llama.block_count", text("2")).ends_with("`llama.block_count` is not a count")
    );
    std::fs::write(&path, b"GGUFxxxx").unwrap();
    assert!(matches!(load(&path), Err(PolicyError::Malformed { .. })));
}
