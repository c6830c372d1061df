//! Round trips through every file form, against the fixtures made by transformers and PEFT.

use std::{collections::HashMap, path::PathBuf};

use candle_core::{
    Device,
    quantized::{GgmlDType, QTensor, gguf_file},
};
use gguf_file::Value;
use serde_json::json;

use super::*;
use crate::{
    error::Feature,
    spec::{Family, RopeScaling},
};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../tests/fixtures")
        .join(name)
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

fn assert_same(found: &Weights, expected: &Weights) {
    assert!(found.keys().eq(expected.keys()));
    for (name, tensor) in expected {
        assert_eq!(found[name].dims(), tensor.dims(), "{name}");
        assert_eq!(values(&found[name]), values(tensor), "{name}");
    }
}

/// Copies a fixture's top-level files, so that a test can break one.
fn copy(name: &str) -> tempfile::TempDir {
    let target = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(fixture(name)).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            std::fs::copy(&path, target.path().join(path.file_name().unwrap())).unwrap();
        }
    }
    target
}

fn edit_config(folder: &Path, key: &str, value: serde_json::Value) {
    let path = folder.join("config.json");
    let mut config: serde_json::Value =
        serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    config[key] = value;
    std::fs::write(path, config.to_string()).unwrap();
}

#[test]
fn folders_of_all_families_load() {
    let llama = load(&fixture("llama")).unwrap();
    assert_eq!(llama.spec.family, Family::Llama);
    assert_eq!(llama.spec.rope_scaling.unwrap().factor, 8.0);
    assert!(!llama.spec.tie_word_embeddings && llama.tensors.contains_key("lm_head.weight"));
    let qwen3 = load(&fixture("qwen3")).unwrap();
    assert_eq!((qwen3.spec.head_dim, qwen3.spec.rope_theta), (16, 1e6));
    assert!(qwen3.spec.tie_word_embeddings && qwen3.spec.qk_norm);
    // Two shards and an index.
    let qwen2 = load(&fixture("qwen2")).unwrap();
    assert!(fixture("qwen2/model.safetensors.index.json").exists());
    assert_eq!(
        qwen2.tensors["model.layers.1.self_attn.k_proj.bias"].dims(),
        [16]
    );
    for model in [llama, qwen3, qwen2] {
        let names: Vec<String> = model.tensors.into_keys().collect();
        let mut expected: Vec<String> = model
            .spec
            .weight_shapes()
            .into_iter()
            .map(|w| w.0)
            .collect();
        expected.sort_unstable();
        assert_eq!(names, expected);
        assert_eq!(model.tokenizer.eos_ids(), [3, 0]);
    }
}

#[test]
fn a_saved_model_loads_back_bit_for_bit() {
    for name in ["llama", "qwen2", "qwen3"] {
        let model = load(&fixture(name)).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let save = |save_type| {
            save_model(
                folder.path(),
                &model.spec,
                &model.tensors,
                &model.tokenizer,
                save_type,
            )
            .unwrap();
            load(folder.path()).unwrap()
        };
        let back = save(SaveType::F32);
        assert_eq!(back.spec, model.spec);
        assert_same(&back.tensors, &model.tensors);
        assert_eq!(back.tokenizer.eos_ids(), model.tokenizer.eos_ids());
        assert_eq!(
            back.tokenizer.chat_template_source(),
            model.tokenizer.chat_template_source()
        );
        // bf16 keeps 8 significant bits: relative error at most 2^-9 + rounding to even.
        for (name, tensor) in save(SaveType::Bf16).tensors {
            for (b, f) in values(&tensor).iter().zip(values(&model.tensors[&name])) {
                assert!((b - f).abs() <= f.abs() / 256.0, "{name}: {b} {f}");
            }
        }
    }
}

#[test]
fn a_model_in_memory_is_the_one_in_the_folder() {
    let read = |file: &str| std::fs::read(fixture("llama").join(file)).unwrap();
    let model = from_bytes(
        &read("config.json"),
        &read("model.safetensors"),
        &read("tokenizer.json"),
        &read("tokenizer_config.json"),
    )
    .unwrap();
    let folder = load(&fixture("llama")).unwrap();
    assert_eq!(model.spec, folder.spec);
    assert_same(&model.tensors, &folder.tensors);
}

#[test]
fn weights_and_config_that_do_not_belong_together() {
    let folder = copy("llama");
    let error = |key: &str, value| {
        let original = std::fs::read(folder.path().join("config.json")).unwrap();
        edit_config(folder.path(), key, value);
        let error = load(folder.path()).unwrap_err();
        std::fs::write(folder.path().join("config.json"), original).unwrap();
        assert!(error.hint().is_some(), "{error}");
        error.to_string()
    };
    assert_eq!(
        error("intermediate_size", json!(41)),
        "weight `model.layers.0.mlp.gate_proj.weight` has shape [40, 32], expected [41, 32]"
    );
    assert_eq!(
        error("num_hidden_layers", json!(3)),
        "weight `model.layers.2.self_attn.q_proj.weight` is missing"
    );
    assert_eq!(
        error("num_hidden_layers", json!(1)),
        "weight `model.layers.1.input_layernorm.weight` is not part of this architecture"
    );
    edit_config(folder.path(), "tie_word_embeddings", json!(true));
    let error = load(folder.path()).unwrap_err().to_string();
    assert!(
        error.ends_with("lm_head.weight differs from the embedding"),
        "{error}"
    );
}

#[test]
fn a_second_copy_of_tied_embeddings_and_rope_buffers_are_dropped() {
    let mut model = load(&fixture("qwen3")).unwrap();
    let expected = model.tensors.clone();
    let embedding = model.tensors["model.embed_tokens.weight"].clone();
    model.tensors.insert("lm_head.weight".to_owned(), embedding);
    let buffer = Tensor::zeros(8, candle_core::DType::F32, &Device::Cpu).unwrap();
    model.tensors.insert(
        "model.layers.0.self_attn.rotary_emb.inv_freq".to_owned(),
        buffer,
    );
    let folder = copy("qwen3");
    let path = folder.path().join("model.safetensors");
    write_safetensors(&path, &model.tensors, SaveType::F32).unwrap();
    assert_same(&load(folder.path()).unwrap().tensors, &expected);
}

#[test]
fn broken_files_are_named() {
    let folder = copy("qwen2");
    let path = |file: &str| folder.path().join(file);
    let message = || load(folder.path()).unwrap_err().to_string();
    let shard = "model-00002-of-00002.safetensors";
    let bytes = std::fs::read(path(shard)).unwrap();
    std::fs::write(path(shard), &bytes[..bytes.len() - 1]).unwrap();
    assert!(message().contains(shard), "{}", message());
    std::fs::remove_file(path(shard)).unwrap();
    assert!(message().starts_with("cannot read "), "{}", message());
    let index = path("model.safetensors.index.json");
    std::fs::write(index, r#"{"weight_map": {"a": "../a.safetensors"}}"#).unwrap();
    assert!(message().ends_with("`../a.safetensors` is not a file name"));
    std::fs::write(path("config.json"), "{").unwrap();
    assert!(message().contains("config.json: EOF"), "{}", message());
}

#[test]
fn an_adapter_of_peft_loads_saves_and_merges() {
    let error = load(&fixture("llama/adapter")).unwrap_err();
    assert!(
        error
            .to_string()
            .ends_with("is a LoRA adapter of `tiny-llama`, not a model")
    );
    assert!(error.hint().is_some());

    let adapter = load_adapter(&fixture("llama/adapter")).unwrap();
    assert_eq!((adapter.config.r, adapter.config.scale()), (4, 2.5));
    assert_eq!(adapter.base.as_deref(), Some("tiny-llama"));
    assert_eq!(adapter.tensors.len(), 2 * 2 * 3);
    assert!(
        adapter
            .config
            .targets_module("model.layers.0.mlp.down_proj")
    );
    assert!(!adapter.config.targets_module("model.layers.0.mlp.up_proj"));

    let folder = tempfile::tempdir().unwrap();
    save_adapter(
        folder.path(),
        &adapter.config,
        "tiny-llama",
        &adapter.tensors,
    )
    .unwrap();
    let back = load_adapter(folder.path()).unwrap();
    assert_eq!(back.config, adapter.config);
    assert_same(&back.tensors, &adapter.tensors);

    let model = load(&fixture("llama")).unwrap();
    let merged = merge(&model.tensors, &adapter.tensors, &adapter.config).unwrap();
    let q = "model.layers.1.self_attn.q_proj";
    let (w, a, b) = (
        values(&model.tensors[&format!("{q}.weight")]),
        values(&adapter.tensors[&format!("{q}.lora_A.weight")]),
        values(&adapter.tensors[&format!("{q}.lora_B.weight")]),
    );
    let found = values(&merged[&format!("{q}.weight")]);
    for (row, column) in [(0, 0), (31, 31), (7, 19)] {
        let product: f32 = (0..4).map(|k| b[row * 4 + k] * a[k * 32 + column]).sum();
        let expected = w[row * 32 + column] + 2.5 * product;
        assert!((found[row * 32 + column] - expected).abs() < 1e-6);
    }
    let untouched = "model.layers.1.self_attn.k_proj.weight";
    assert_eq!(
        values(&merged[untouched]),
        values(&model.tensors[untouched])
    );
}

#[test]
fn adapters_that_do_not_fit_are_refused() {
    let model = load(&fixture("llama")).unwrap();
    let adapter = load_adapter(&fixture("llama/adapter")).unwrap();
    let without = |name: &str| {
        let mut tensors = adapter.tensors.clone();
        tensors.remove(name).unwrap();
        merge(&model.tensors, &tensors, &adapter.config)
            .unwrap_err()
            .to_string()
    };
    for half in ["A", "B"] {
        let name = format!("model.layers.0.mlp.down_proj.lora_{half}.weight");
        assert_eq!(without(&name), format!("weight `{name}` is missing"));
    }
    let config = LoraConfig {
        r: 8,
        ..adapter.config.clone()
    };
    let error = merge(&model.tensors, &adapter.tensors, &config).unwrap_err();
    assert!(error.to_string().contains("expected [8, 40]"), "{error}");

    let folder = copy("llama/adapter");
    let path = folder.path().join("adapter_config.json");
    let mut peft: serde_json::Value =
        serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    peft["use_dora"] = json!(true);
    std::fs::write(path, peft.to_string()).unwrap();
    let error = load_adapter(folder.path()).unwrap_err();
    assert!(matches!(
        error,
        PolicyError::Unsupported {
            feature: Feature::Adapter,
            ..
        }
    ));
}

#[test]
fn all_linear_spares_the_head() {
    let config = LoraConfig {
        r: 1,
        alpha: 1.0,
        targets: vec![ALL_LINEAR.to_owned()],
    };
    let spec = load(&fixture("qwen3")).unwrap().spec;
    assert!(spec.linears(0).iter().all(|l| config.targets_module(&l.0)));
    assert!(!config.targets_module("lm_head") && !config.targets_module("model.embed_tokens"));
}

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
