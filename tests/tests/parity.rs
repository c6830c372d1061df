//! The decoder against Hugging Face transformers (`tests/fixtures`) and against candle's own models:
//! logits, log-probs, entropies, greedy text, gradients of every weight, and LoRA adapters.

mod oracle;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use candle_core::Tensor;
use grpo_policy::{
    backend::{
        Backend, Exit, Pass,
        cpu::{CpuBackend, Trainable},
    },
    engine::{Engine, EngineConfig},
    types::{PackedBatch, Request, SamplingParams},
    weights::{self, LoadedModel, Weights},
};
use serde_json::Value;

const FAMILIES: [&str; 3] = ["qwen2", "qwen3", "llama"];

// Promised are 1e-4 and 1e-3; these are what f32 gives with room for other orders of summation.

/// Largest distance of a logit, log-prob or entropy; those of the fixtures reach about 10.
const LOGIT: f32 = 3e-5;
/// Largest distance of a gradient, relative to the largest of its weight.
const GRADIENT: f32 = 1e-4;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fixtures")
        .join(name)
}

/// A fixture with what transformers makes of it.
struct Case {
    model: LoadedModel,
    expected: Weights,
    sequences: Vec<Vec<u32>>,
    greedy: Vec<Vec<u32>>,
    cold: f32,
}

impl Case {
    fn load(name: &str) -> Self {
        let text = std::fs::read(fixture(name).join("expected.json")).unwrap();
        let mut json: Value = serde_json::from_slice(&text).unwrap();
        let mut lists = |key: &str| serde_json::from_value(json[key].take()).unwrap();
        Self {
            model: weights::load(&fixture(name)).unwrap(),
            expected: weights::read_safetensors(&fixture(name).join("expected.safetensors"))
                .unwrap(),
            sequences: lists("sequences"),
            greedy: lists("greedy"),
            cold: json["temperature_cold"].as_f64().unwrap() as f32,
        }
    }

    fn backend(&self, trainable: &Trainable, checkpointing: bool) -> CpuBackend {
        let spec = self.model.spec.clone();
        CpuBackend::new(spec, &self.model.tensors, trainable, checkpointing).unwrap()
    }

    /// All sequences in one batch, every token but the first scored.
    fn batch(&self) -> PackedBatch {
        let mut batch = PackedBatch::default();
        for sequence in &self.sequences {
            batch.push(sequence, 1);
        }
        batch
    }
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

/// The tensors `KEY.0`, `KEY.1`, … end to end.
fn joined(expected: &Weights, key: &str) -> Vec<f32> {
    (0..3)
        .flat_map(|i| values(&expected[&format!("{key}.{i}")]))
        .collect()
}

#[track_caller]
fn assert_close(found: &[f32], expected: &[f32], tolerance: f32, what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (i, (f, e)) in found.iter().zip(expected).enumerate() {
        // A NaN compares false, so it fails.
        assert!(
            (f - e).abs() <= tolerance && f.is_finite(),
            "{what}[{i}]: {f}, expected {e}"
        );
    }
}

/// Every gradient of `expected` (named `grad.…`), and no other.
#[track_caller]
fn assert_gradients(found: &BTreeMap<String, Tensor>, expected: &Weights, what: &str) {
    let names = expected.keys().filter_map(|k| k.strip_prefix("grad."));
    assert!(found.keys().map(String::as_str).eq(names), "{what}");
    for (name, gradient) in found {
        let wanted = &expected[&format!("grad.{name}")];
        assert_eq!(gradient.dims(), wanted.dims(), "{name}");
        let wanted = values(wanted);
        let largest = wanted.iter().fold(0f32, |m, x| m.max(x.abs()));
        assert!(largest > 0.0, "{name}: the fixture proves nothing");
        let what = format!("{what} {name}");
        assert_close(&values(gradient), &wanted, GRADIENT * largest, &what);
    }
}

#[test]
fn logits_are_those_of_transformers() {
    for name in FAMILIES {
        let case = Case::load(name);
        let backend = case.backend(&Trainable::Nothing, false);
        for (i, sequence) in case.sequences.iter().enumerate() {
            let expected = values(&case.expected[&format!("logits.{i}")]);
            let found = backend.logits(sequence).unwrap();
            assert_close(&found, &expected, LOGIT, &format!("{name} logits.{i}"));
        }
    }
}

#[test]
fn log_probs_and_entropies_are_those_of_transformers() {
    for name in FAMILIES {
        let case = Case::load(name);
        let mut backend = case.backend(&Trainable::Nothing, false);
        let scores = backend.score(&case.batch(), 1.0, Pass::Score).unwrap();
        for (key, found) in [("logprobs", &scores.logprobs), ("entropy", &scores.entropy)] {
            let what = format!("{name} {key}");
            assert_close(found, &joined(&case.expected, key), LOGIT, &what);
        }
        let cold = backend
            .score(&case.batch(), case.cold, Pass::Score)
            .unwrap();
        let expected = joined(&case.expected, "logprobs_cold");
        assert_close(&cold.logprobs, &expected, LOGIT, &format!("{name} cold"));
        assert_ne!(
            cold.entropy, scores.entropy,
            "{name}: the temperature counts"
        );
    }
}

#[test]
fn greedy_text_is_that_of_transformers() {
    for name in FAMILIES {
        let case = Case::load(name);
        let mut backend = case.backend(&Trainable::Nothing, false);
        // Blocks smaller than the prompts and steps shorter than the longest: all of paging takes part.
        let mut engine = Engine::new(EngineConfig {
            block_size: 4,
            kv_blocks: 32,
            max_batch: 3,
            max_step_tokens: 8,
            enable_prefix_cache: true,
            max_model_len: 64,
        })
        .unwrap();
        let request = |(id, prompt): (usize, &Vec<u32>)| Request {
            id: id as u64,
            prompt: prompt.clone(),
            n: 1,
            sampling: SamplingParams {
                temperature: 0.0,
                max_tokens: 16,
                ignore_eos: true,
                ..SamplingParams::default()
            },
            seed: 0,
        };
        let requests = case.sequences.iter().enumerate().map(request).collect();
        let completions = engine
            .generate(
                &mut backend,
                None,
                &case.model.tokenizer,
                requests,
                &mut |_| {},
            )
            .unwrap();
        for (i, completion) in completions.iter().enumerate() {
            assert_eq!(completion.tokens, case.greedy[i], "{name} greedy {i}");
            let prompt = &case.sequences[i];
            let mut batch = PackedBatch::default();
            batch.push(&[&prompt[..], &completion.tokens].concat(), prompt.len());
            let scored = backend.score(&batch, 1.0, Pass::Score).unwrap().logprobs;
            let what = format!("{name}: rollout and scoring pass of {i}");
            assert_close(&completion.policy_logprobs, &scored, LOGIT, &what);
        }
    }
}

#[test]
fn gradients_of_all_weights_are_those_of_torch() {
    for (name, checkpointing) in FAMILIES.into_iter().flat_map(|n| [(n, false), (n, true)]) {
        let case = Case::load(name);
        let full = Trainable::Full {
            keep_reference: false,
        };
        let mut backend = case.backend(&full, checkpointing);
        backend.score(&case.batch(), 1.0, Pass::Train).unwrap();
        let coefficients = joined(&case.expected, "coef");
        backend.backward(&coefficients).unwrap();
        let whole = backend.export_gradients().unwrap();
        let what = format!("{name}, checkpointing {checkpointing}:");
        assert_gradients(&whole, &case.expected, &what);
        assert_eq!(whole.len(), case.model.tensors.len());

        // The same in a micro-batch per sequence.
        let mut backend = case.backend(&full, checkpointing);
        for (i, sequence) in case.sequences.iter().enumerate() {
            let mut batch = PackedBatch::default();
            batch.push(sequence, 1);
            backend.score(&batch, 1.0, Pass::Train).unwrap();
            let coefficients = values(&case.expected[&format!("coef.{i}")]);
            backend.backward(&coefficients).unwrap();
        }
        let summed = backend.export_gradients().unwrap();
        assert_gradients(&summed, &case.expected, &format!("{what} micro-batches"));
    }
}

/// The llama fixture with PEFT's adapter on it.
fn adapted() -> (Case, weights::Adapter, Weights, CpuBackend) {
    let case = Case::load("llama");
    let adapter = weights::load_adapter(&fixture("llama/adapter")).unwrap();
    let expected = fixture("llama/adapter/expected.safetensors");
    let expected = weights::read_safetensors(&expected).unwrap();
    let mut backend = case.backend(&lora(&adapter), false);
    backend.import(&adapter.tensors, Exit::Final).unwrap();
    (case, adapter, expected, backend)
}

fn lora(adapter: &weights::Adapter) -> Trainable {
    Trainable::Lora {
        config: adapter.config.clone(),
        seed: 0,
    }
}

#[test]
fn a_lora_adapter_computes_and_learns_as_in_peft() {
    let (case, _, expected, mut backend) = adapted();
    for (i, sequence) in case.sequences.iter().enumerate() {
        let found = backend.logits(sequence).unwrap();
        let wanted = values(&expected[&format!("logits.{i}")]);
        assert_close(&found, &wanted, LOGIT, &format!("adapted logits.{i}"));
    }
    let reference = backend.score(&case.batch(), 1.0, Pass::Reference).unwrap();
    let base = joined(&case.expected, "logprobs");
    assert_close(&reference.logprobs, &base, LOGIT, "adapter off");
    let scores = backend.score(&case.batch(), 1.0, Pass::Train).unwrap();
    let wanted = joined(&expected, "logprobs");
    assert_close(&scores.logprobs, &wanted, LOGIT, "adapted logprobs");
    backend.backward(&joined(&expected, "coef")).unwrap();
    let gradients = backend.export_gradients().unwrap();
    assert_gradients(&gradients, &expected, "adapter");
    assert_eq!(
        gradients.len(),
        2 * 2 * 3,
        "two halves, two layers, q v down"
    );
}

#[test]
fn an_exported_adapter_is_the_same_policy_loaded_or_merged() {
    let (case, adapter, expected, backend) = adapted();
    let folder = tempfile::tempdir().unwrap();
    let exported = backend.export_adapter().unwrap();
    weights::save_adapter(folder.path(), &adapter.config, "tiny-llama", &exported).unwrap();
    let back = weights::load_adapter(folder.path()).unwrap();
    let mut loaded = case.backend(&lora(&back), false);
    loaded.import(&back.tensors, Exit::Final).unwrap();
    let tensors = weights::merge(&case.model.tensors, &back.tensors, &back.config).unwrap();
    let spec = case.model.spec.clone();
    let merged = CpuBackend::new(spec, &tensors, &Trainable::Nothing, false).unwrap();
    for (i, sequence) in case.sequences.iter().enumerate() {
        let logits = backend.logits(sequence).unwrap();
        assert_eq!(loaded.logits(sequence).unwrap(), logits, "loaded {i}");
        let wanted = values(&expected[&format!("logits.{i}")]);
        let found = merged.logits(sequence).unwrap();
        assert_close(&found, &wanted, LOGIT, &format!("merged logits.{i}"));
    }
}

#[test]
fn logits_are_those_of_candle() {
    for name in FAMILIES {
        let case = Case::load(name);
        let backend = case.backend(&Trainable::Nothing, false);
        // Longer than the fixtures' sequences, so that every rotation of RoPE is used.
        let ids: Vec<u32> = (0..200).map(|i| 4 + i * 37 % 268).collect();
        let all = backend.logits(&ids).unwrap();
        let vocabulary = case.model.spec.vocab_size;
        for length in [2, 3, 64, 200] {
            let theirs = oracle::last_logits(name, &fixture(name), &ids[..length]);
            let ours = &all[(length - 1) * vocabulary..length * vocabulary];
            assert_close(ours, &theirs, LOGIT, &format!("{name} after {length}"));
        }
    }
}
