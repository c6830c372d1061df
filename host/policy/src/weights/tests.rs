//! Round trips through folders and adapters, against the fixtures made by transformers and PEFT.

mod gguf;

use std::path::PathBuf;

use candle_core::Device;
use serde_json::json;

use super::*;
use crate::{error::Feature, spec::Family};

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
    let error = load(folder.path()).unwrap_err();
    assert!(error.to_string().starts_with("cannot read "), "{error}");
    assert!(error.hint().unwrap().contains(".gguf"));
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
