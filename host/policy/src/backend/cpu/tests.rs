//! The whole network against finite differences, on tiny random models of every family, and the rollout
//! path against the scoring path.

mod early_exit;
mod shared_prompts;

use super::*;
use crate::{
    backend::SampleArgs,
    spec::{Family, RopeScaling},
    types::{SamplingParams, TopTokens},
};
use candle_core::Device;

pub(crate) fn tiny_spec(family: Family) -> ModelSpec {
    ModelSpec {
        family,
        vocab_size: 23,
        hidden_size: 16,
        intermediate_size: 24,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 6,
        max_position_embeddings: 64,
        rms_norm_eps: 1e-5,
        rope_theta: 1e4,
        rope_scaling: (family == Family::Llama).then_some(RopeScaling {
            factor: 4.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 32,
        }),
        tie_word_embeddings: family != Family::Llama,
        qkv_bias: family == Family::Qwen2,
        o_bias: false,
        qk_norm: family == Family::Qwen3,
    }
}

/// Random weights under the names of a checkpoint.
pub(crate) fn random_weights(spec: &ModelSpec) -> BTreeMap<String, Tensor> {
    let (h, d) = (spec.hidden_size, spec.head_dim);
    let (q, kv) = (spec.num_attention_heads * d, spec.num_key_value_heads * d);
    let mut shapes = vec![
        (
            "model.embed_tokens.weight".to_owned(),
            vec![spec.vocab_size, h],
        ),
        ("model.norm.weight".to_owned(), vec![h]),
        ("lm_head.weight".to_owned(), vec![spec.vocab_size, h]),
    ];
    for i in 0..spec.num_hidden_layers {
        let mut add = |name: &str, shape: Vec<usize>| {
            shapes.push((format!("model.layers.{i}.{name}"), shape))
        };
        for (name, out) in [("q", q), ("k", kv), ("v", kv)] {
            add(&format!("self_attn.{name}_proj.weight"), vec![out, h]);
            add(&format!("self_attn.{name}_proj.bias"), vec![out]);
        }
        add("self_attn.o_proj.weight", vec![h, q]);
        add("self_attn.q_norm.weight", vec![d]);
        add("self_attn.k_norm.weight", vec![d]);
        add("input_layernorm.weight", vec![h]);
        add("post_attention_layernorm.weight", vec![h]);
        add("mlp.gate_proj.weight", vec![spec.intermediate_size, h]);
        add("mlp.up_proj.weight", vec![spec.intermediate_size, h]);
        add("mlp.down_proj.weight", vec![h, spec.intermediate_size]);
    }
    let mut state = 17u32;
    let mut next = move || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 24) as f32 - 0.5
    };
    let tensor = |shape: Vec<usize>, next: &mut dyn FnMut() -> f32| {
        let norm = shape.len() == 1;
        let data: Vec<f32> = (0..shape.iter().product())
            .map(|_| next() + f32::from(norm))
            .collect();
        Tensor::from_vec(data, shape, &Device::Cpu).unwrap()
    };
    shapes
        .into_iter()
        .map(|(name, shape)| (name, tensor(shape, &mut next)))
        .collect()
}

fn batch() -> PackedBatch {
    let mut batch = PackedBatch::default();
    batch.push(&[3, 7, 1, 22, 9, 4, 4], 2);
    batch.push(&[5, 11], 0);
    batch.push(&[8, 2, 19, 6, 10, 0, 21, 13, 1], 5);
    batch
}

const TEMPERATURE: f32 = 0.8;

fn coefficients(batch: &PackedBatch) -> Vec<f32> {
    (0..batch.n_scored())
        .map(|i| (i as f32 * 1.7).cos())
        .collect()
}

fn objective(backend: &mut CpuBackend, pass: Pass) -> f64 {
    let scores = backend.score(&batch(), TEMPERATURE, pass).unwrap();
    let terms = scores.logprobs.iter().zip(coefficients(&batch()));
    terms.map(|(l, c)| f64::from(*l) * f64::from(c)).sum()
}

/// Central differences of a few numbers of every trainable weight against the gradient.
fn check_gradients(family: Family, trainable: &Trainable, checkpointing: bool) {
    let spec = tiny_spec(family);
    let weights = random_weights(&spec);
    let mut backend = CpuBackend::new(spec, &weights, trainable, checkpointing).unwrap();
    // Seven scored tokens: two full chunks of logits and one that is not.
    backend.decoder.head.chunk_rows = 3;
    if matches!(trainable, Trainable::Lora { .. }) {
        // B = 0 would leave A without a gradient to check.
        for id in 0..backend.params.len() {
            backend
                .params
                .nudge(id, |name, i| match name.ends_with("lora_B.weight") {
                    true => (i as f32).sin() * 0.2,
                    false => 0.0,
                });
        }
    }
    objective(&mut backend, Pass::Train);
    backend.backward(&coefficients(&batch())).unwrap();
    let h = 4e-3f32;
    for id in (0..backend.params.len())
        .filter(|id| backend.params.trainable(*id))
        .collect::<Vec<_>>()
    {
        let n = backend.params.data(id).len();
        for i in [0, n / 3, n - 1] {
            let found = f64::from(backend.grads.get(id).unwrap().data()[i]);
            let mut at = |by: f32| {
                backend
                    .params
                    .nudge(id, |_, j| if i == j { by } else { 0.0 });
                let value = objective(&mut backend, Pass::Score);
                backend
                    .params
                    .nudge(id, |_, j| if i == j { -by } else { 0.0 });
                value
            };
            let numeric = (at(h) - at(-h)) / (2.0 * f64::from(h));
            let close = (found - numeric).abs() < 1e-2 * (0.1 + numeric.abs());
            assert!(
                close,
                "{family:?} weight {id}[{i}]: {found} is not {numeric}"
            );
        }
    }
}

#[test]
fn gradients_of_full_fine_tuning() {
    for family in [Family::Llama, Family::Qwen2, Family::Qwen3] {
        for checkpointing in [false, true] {
            check_gradients(
                family,
                &Trainable::Full {
                    keep_reference: false,
                },
                checkpointing,
            );
        }
    }
}

#[test]
fn gradients_of_lora() {
    let targets = vec![
        "q_proj".to_owned(),
        "v_proj".to_owned(),
        "down_proj".to_owned(),
    ];
    let config = LoraConfig {
        r: 3,
        alpha: 6.0,
        targets,
    };
    check_gradients(Family::Qwen2, &Trainable::Lora { config, seed: 1 }, false);
}

/// Takes a tiny model to a target in a hundred steps or so.
pub(crate) const STEP: OptimStep = OptimStep {
    learning_rate: 0.02,
    beta1: 0.9,
    beta2: 0.99,
    eps: 1e-8,
    weight_decay: 0.0,
    max_grad_norm: 1.0,
};

/// Likely tokens of each scored token, of different numbers.
fn soft_targets(batch: &PackedBatch) -> Vec<TopTokens> {
    let target = |i: usize| TopTokens {
        ids: (0..=i as u32 % 3)
            .map(|j| (i as u32 * 5 + j * 7) % 23)
            .collect(),
        probabilities: (0..=i % 3).map(|j| 0.5 / (1.0 + j as f32)).collect(),
    };
    (0..batch.n_scored()).map(target).collect()
}

/// Mean entropy of targets: the least that a cross-entropy from them can be.
fn entropy(targets: &[TopTokens]) -> f64 {
    let entropy = |t: &TopTokens| {
        let total: f32 = t.probabilities.iter().sum();
        let h = |p: &f32| f64::from(-p / total) * f64::from(p / total).ln();
        t.probabilities.iter().map(h).sum::<f64>()
    };
    targets.iter().map(entropy).sum::<f64>() / targets.len() as f64
}

#[test]
fn gradients_of_distillation() {
    let spec = tiny_spec(Family::Llama);
    let trainable = Trainable::Full {
        keep_reference: false,
    };
    let mut backend =
        CpuBackend::new(spec.clone(), &random_weights(&spec), &trainable, true).unwrap();
    backend.decoder.head.chunk_rows = 3;
    let (batch, weight) = (batch(), 0.3);
    let targets = soft_targets(&batch);
    let value = |backend: &mut CpuBackend| {
        backend.grads.clear();
        backend
            .distill(&batch, &targets, TEMPERATURE, weight, Exit::Final)
            .unwrap()
    };
    value(&mut backend);
    let found: Vec<Vec<f32>> = (0..backend.params.len())
        .map(|id| backend.grads.get(id).unwrap().data().to_vec())
        .collect();
    let h = 4e-3f32;
    for (id, found) in found.iter().enumerate() {
        for i in [0, found.len() / 3, found.len() - 1] {
            let mut at = |by: f32| {
                backend
                    .params
                    .nudge(id, |_, j| if i == j { by } else { 0.0 });
                let value = value(&mut backend);
                backend
                    .params
                    .nudge(id, |_, j| if i == j { -by } else { 0.0 });
                value
            };
            let numeric = (at(h) - at(-h)) / (2.0 * f64::from(h));
            let off = (f64::from(found[i]) - numeric).abs();
            assert!(
                off < 1e-2 * (0.1 + numeric.abs()),
                "weight {id}[{i}]: {} is not {numeric}",
                found[i]
            );
        }
    }
}

#[test]
fn distillation_brings_a_draft_to_its_target() {
    let spec = tiny_spec(Family::Qwen2);
    let trainable = Trainable::Full {
        keep_reference: false,
    };
    let mut backend =
        CpuBackend::new(spec.clone(), &random_weights(&spec), &trainable, false).unwrap();
    let batch = batch();
    let targets = soft_targets(&batch);
    let least = entropy(&targets);
    let weight = 1.0 / targets.len() as f64;
    let mut losses = Vec::new();
    for _ in 0..120 {
        losses.push(
            backend
                .distill(&batch, &targets, 1.0, weight, Exit::Final)
                .unwrap(),
        );
        backend.optimizer_step(&STEP, Exit::Final).unwrap();
    }
    let (first, last) = (losses[0], losses[119]);
    assert!(
        first > least + 1.0 && last < least + 0.1 && last > least,
        "{first} to {last}, at least {least}"
    );
    let wrong = backend.distill(&batch, &targets[1..], 1.0, weight, Exit::Final);
    assert!(matches!(wrong, Err(PolicyError::Misuse(_))));
}

#[test]
fn reference_stays_while_the_policy_moves() {
    let config = LoraConfig {
        r: 2,
        alpha: 4.0,
        targets: vec!["all-linear".to_owned()],
    };
    for trainable in [
        Trainable::Full {
            keep_reference: true,
        },
        Trainable::Lora { config, seed: 3 },
    ] {
        let spec = tiny_spec(Family::Qwen3);
        let weights = random_weights(&spec);
        let mut backend = CpuBackend::new(spec, &weights, &trainable, false).unwrap();
        let before = objective(&mut backend, Pass::Score);
        assert_eq!(
            before,
            objective(&mut backend, Pass::Reference),
            "a fresh adapter changes nothing"
        );
        objective(&mut backend, Pass::Train);
        backend.backward(&coefficients(&batch())).unwrap();
        let step = OptimStep {
            learning_rate: 0.05,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.0,
            max_grad_norm: 1.0,
        };
        backend.optimizer_step(&step, Exit::Final).unwrap();
        assert_eq!(before, objective(&mut backend, Pass::Reference));
        // A step along −gradient of Σ c·logp lowers it.
        assert!(objective(&mut backend, Pass::Score) < before);
    }
}

#[test]
fn rollout_logprobs_equal_scoring_logprobs() {
    for family in [Family::Llama, Family::Qwen2, Family::Qwen3] {
        let spec = tiny_spec(family);
        let mut backend = CpuBackend::new(
            spec.clone(),
            &random_weights(&spec),
            &Trainable::Nothing,
            false,
        )
        .unwrap();
        backend.init_kv(8, 4).unwrap();
        let params = SamplingParams {
            temperature: TEMPERATURE,
            ..SamplingParams::default()
        };
        let mut ids = vec![3u32, 7, 1, 22, 9];
        let blocks = [6, 2, 0, 5];
        let mut drawn = Vec::new();
        let mut cached = 0;
        for position in 0..6 {
            let history = ids.clone();
            let args = SampleArgs {
                params: &params,
                stream: 9,
                position,
                history: &history,
                proposal: None,
                top: 0,
                ahead: 0,
            };
            let row = StepRow {
                sequence: 0,
                tokens: &history[cached..],
                position: cached,
                blocks: &blocks,
                sample: Some(args),
            };
            let sampled = backend.step(&[row]).unwrap()[0][0].clone();
            cached = ids.len();
            ids.push(sampled.token);
            drawn.push(sampled.policy_logprob);
        }
        let mut batch = PackedBatch::default();
        batch.push(&ids, 5);
        let scores = backend.score(&batch, TEMPERATURE, Pass::Score).unwrap();
        for (rollout, scored) in drawn.iter().zip(&scores.logprobs) {
            assert!((rollout - scored).abs() < 1e-4, "{rollout} is not {scored}");
        }
        assert!(
            scores
                .entropy
                .iter()
                .all(|e| *e > 0.0 && *e <= (23f32).ln())
        );
    }
}

#[test]
fn misuse_is_an_error_and_not_a_panic() {
    let spec = tiny_spec(Family::Llama);
    let weights = random_weights(&spec);
    let mut backend = CpuBackend::new(spec.clone(), &weights, &Trainable::Nothing, false).unwrap();
    assert!(matches!(
        backend.backward(&[1.0]),
        Err(PolicyError::Misuse(_))
    ));
    assert!(matches!(backend.step(&[]), Err(PolicyError::Misuse(_))));
    let mut outside = PackedBatch::default();
    outside.push(&[1, 99], 1);
    assert!(matches!(
        backend.score(&outside, 1.0, Pass::Score),
        Err(PolicyError::Misuse(_))
    ));
    let mut fewer = weights;
    fewer.remove("model.layers.1.mlp.up_proj.weight");
    let error = CpuBackend::new(spec, &fewer, &Trainable::Nothing, false)
        .err()
        .unwrap();
    assert!(
        matches!(error, PolicyError::MissingWeight { name } if name.contains("layers.1.mlp.up_proj"))
    );
}
