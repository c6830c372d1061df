//! Training on a GPU beside the same on the CPU: gradients of every family, AdamW's steps, adapters, distillation, exact
//! resumption, and rollouts by the weights that train. Needs a GPU, so CI leaves it out;
//! `cargo test --release --test cuda_training -- --ignored --nocapture --test-threads 1`.
#![allow(
    clippy::unwrap_used,
    reason = "clippy counts only functions marked as tests as tests"
)]

mod arithmetic;
#[path = "../cuda_models/mod.rs"]
mod cuda_models;
mod distances;
mod rollouts;
mod shared_prompts;
mod unmerged;

use std::collections::BTreeMap;

use candle_core::{DType, Tensor};
use cuda_models::{SIZES, cache, spec, weights};
use distances::{apart, bits, largest, spread};
use grpo_policy::{
    backend::{
        Backend, Exit, OptimStep, Pass,
        cpu::{CpuBackend, Trainable},
        cuda::{CudaBackend, CudaWeights, Kept, Learns},
    },
    error::PolicyError,
    spec::{Family, ModelSpec},
    types::{PackedBatch, TopTokens},
    weights::{LoraConfig, random_weights},
};

type Tensors = BTreeMap<String, Tensor>;

const FULL: Trainable = Trainable::Full {
    keep_reference: true,
};

const STEP: OptimStep = OptimStep {
    learning_rate: 1e-3,
    beta1: 0.9,
    beta2: 0.99,
    eps: 1e-8,
    weight_decay: 0.1,
    max_grad_norm: 1.0,
};

fn lora(targets: &[&str], r: usize) -> Trainable {
    let config = LoraConfig {
        r,
        alpha: 2.0 * r as f64,
        targets: targets.iter().map(|t| (*t).to_owned()).collect(),
    };
    Trainable::Lora { config, seed: 5 }
}

fn shapes() -> Vec<ModelSpec> {
    vec![
        spec(Family::Qwen2, (14, 2, 64), 1009),
        spec(Family::Qwen2, (4, 4, 32), 263),
        spec(Family::Qwen3, (8, 1, 128), 1024),
        spec(Family::Qwen3, (6, 3, 32), 777),
        spec(Family::Llama, (9, 3, 64), 515),
        spec(Family::Llama, (16, 1, 96), 1536),
    ]
}

/// Sequences around the tiles of attention, with prompts of which nothing is scored.
fn batch(vocab: usize) -> PackedBatch {
    let mut batch = PackedBatch::default();
    for (s, (n, prompt)) in [
        (2, 1),
        (130, 7),
        (128, 100),
        (33, 1),
        (300, 20),
        (1, 1),
        (127, 64),
    ]
    .into_iter()
    .enumerate()
    {
        let ids: Vec<u32> = (0..n)
            .map(|i| ((i * i * 31 + i * 7 + s * 131) % vocab) as u32)
            .collect();
        batch.push(&ids, prompt);
    }
    batch
}

fn gpu(spec: &ModelSpec, tensors: &Tensors, trainable: &Trainable, kept: Kept) -> CudaBackend {
    let mut gpu = CudaBackend::new(0, spec.clone(), tensors, SIZES, cache()).unwrap();
    let given = CudaWeights::dense(tensors);
    gpu.train(given, Learns::of(trainable), (1024, kept))
        .unwrap();
    gpu
}

fn cpu(spec: &ModelSpec, tensors: &Tensors, trainable: &Trainable) -> CpuBackend {
    CpuBackend::new(spec.clone(), tensors, trainable, false).unwrap()
}

/// Weights as they are at the start of training, as bf16 holds them, with norms and biases that are not all alike.
fn fresh(spec: &ModelSpec, seed: u64) -> Tensors {
    let all = random_weights(spec, seed).unwrap();
    let varied = |tensor: &Tensor| {
        let n = tensor.elem_count();
        let wave = (0..n)
            .map(|i| ((i * 37) % 19) as f32 / 40.0 - 0.2)
            .collect();
        let wave = Tensor::from_vec(wave, n, tensor.device()).unwrap();
        tensor.add(&wave).unwrap()
    };
    let rounded = |tensor: Tensor| {
        let tensor = tensor.to_dtype(DType::BF16).unwrap();
        tensor.to_dtype(DType::F32).unwrap()
    };
    all.iter()
        .map(|(name, tensor)| match tensor.dims().len() {
            1 => (name.clone(), varied(tensor)),
            _ => (name.clone(), rounded(tensor.clone())),
        })
        .collect()
}

/// Coefficients as a policy gradient has them: of both signs, most sequences alike.
fn coefficients(n: usize) -> Vec<f32> {
    (0..n)
        .map(|i| ((i * 37 % 19) as f32 / 19.0 - 0.45) / n as f32)
        .collect()
}

/// Gradients of two micro-batches on both devices: relative distance of all together, and of the furthest.
fn gradients_apart(spec: &ModelSpec, tensors: &Tensors) -> (f64, f64) {
    let batch = batch(spec.vocab_size);
    let (mut cpu, mut gpu) = (
        cpu(spec, tensors, &FULL),
        gpu(spec, tensors, &FULL, Kept::ACTIVATIONS),
    );
    let dlogp = coefficients(batch.n_scored());
    for temperature in [1.0, 0.7] {
        let expected = cpu.score(&batch, temperature, Pass::Train).unwrap();
        let found = gpu.score(&batch, temperature, Pass::Train).unwrap();
        let logp = spread(&expected, &found);
        let entropy = largest(&expected.entropy, &found.entropy);
        println!("{:?} logp {logp:.4} entropy {entropy:.4}", spec.family);
        assert!(logp < 0.05 && entropy < 0.15);
        cpu.backward(&dlogp).unwrap();
        gpu.backward(&dlogp).unwrap();
    }
    let (expected, found) = (
        cpu.export_gradients().unwrap(),
        gpu.export_gradients().unwrap(),
    );
    let (all, worst, name) = apart(&expected, &found);
    println!(
        "{:?} {}x{}x{}: gradients apart {all:.4}, worst {worst:.4} {name}",
        spec.family, spec.num_attention_heads, spec.num_key_value_heads, spec.head_dim
    );
    (all, worst)
}

#[test]
#[ignore = "needs a GPU"]
fn gradients_are_those_of_the_cpu() {
    for spec in shapes() {
        let (all, worst) = gradients_apart(&spec, &fresh(&spec, 7));
        // The worst is the bias of keys, which hardly moves the softmax: its gradient is the rest of a cancellation.
        assert!(all < 0.01 && worst < 0.1, "{:?}", spec.family);
    }
}

/// Far from uniform attention and logits make more of what bf16 rounds.
#[test]
#[ignore = "needs a GPU"]
fn gradients_of_large_weights_are_near_those_of_the_cpu() {
    for spec in shapes() {
        let (all, worst) = gradients_apart(&spec, &weights(&spec, 7));
        assert!(all < 0.04 && worst < 0.1, "{:?}", spec.family);
    }
}

#[test]
#[ignore = "needs a GPU"]
fn gradients_of_adapters_are_those_of_the_cpu() {
    for (family, targets, r) in [
        (Family::Qwen2, vec!["all-linear"], 8),
        (Family::Qwen3, vec!["q_proj", "v_proj", "down_proj"], 5),
        (Family::Llama, vec!["up_proj", "o_proj", "k_proj"], 16),
    ] {
        let spec = spec(family, (6, 3, 64), 521);
        let (tensors, trainable) = (weights(&spec, 9), lora(&targets, r));
        let (mut cpu, mut gpu) = (
            cpu(&spec, &tensors, &trainable),
            gpu(&spec, &tensors, &trainable, Kept::ACTIVATIONS),
        );
        let start = cpu.export_adapter().unwrap();
        assert_eq!(bits(&start), bits(&gpu.export_adapter().unwrap()));
        assert_eq!(cpu.parameters(), gpu.parameters());
        assert_eq!(cpu.trainable_parameters(), gpu.trainable_parameters());
        // B is 0 at first, which leaves A without a gradient.
        let moved = |(name, tensor): (&String, &Tensor)| {
            let n = tensor.elem_count();
            let wave: Vec<f32> = (0..n)
                .map(|i| ((i * 29) % 23) as f32 / 400.0 - 0.0275)
                .collect();
            let wave = Tensor::from_vec(wave, tensor.dims(), tensor.device()).unwrap();
            (name.clone(), tensor.add(&wave).unwrap())
        };
        let adapter: Tensors = start.iter().map(moved).collect();
        cpu.import(&adapter, Exit::Final).unwrap();
        gpu.import(&adapter).unwrap();
        let batch = batch(spec.vocab_size);
        let expected = cpu.score(&batch, 1.0, Pass::Reference).unwrap();
        let reference = gpu.score(&batch, 1.0, Pass::Reference).unwrap();
        assert!(spread(&expected, &reference) < 0.1);
        let expected = cpu.score(&batch, 1.0, Pass::Train).unwrap();
        let found = gpu.score(&batch, 1.0, Pass::Train).unwrap();
        let (with, without) = (spread(&expected, &found), spread(&expected, &reference));
        println!("{family:?} logp {with:.4}, without the adapter {without:.4}");
        assert!(with < 0.1 && without > 4.0 * with);
        let dlogp = coefficients(batch.n_scored());
        cpu.backward(&dlogp).unwrap();
        gpu.backward(&dlogp).unwrap();
        let (expected, found) = (
            cpu.export_gradients().unwrap(),
            gpu.export_gradients().unwrap(),
        );
        let (all, worst, name) = apart(&expected, &found);
        println!("{family:?} r {r}: gradients apart {all:.4}, worst {worst:.4} {name}");
        assert!(all < 0.03 && worst < 0.15);
        // What does not train comes out as it went in.
        assert_eq!(
            bits(&cpu.export_weights().unwrap()),
            bits(&gpu.export_weights().unwrap())
        );
    }
}

/// Mean negative log-likelihood before each of some steps.
fn losses(backend: &mut impl Backend, batch: &PackedBatch, steps: usize) -> Vec<f64> {
    let n = batch.n_scored();
    let step = |_| {
        let scores = backend.score(batch, 1.0, Pass::Train).unwrap();
        let dlogp = vec![-1.0 / n as f32; n];
        backend.backward(&dlogp).unwrap();
        let norm = backend.optimizer_step(&STEP, Exit::Final).unwrap();
        assert!(norm.is_finite() && norm > 0.0);
        -scores.logprobs.iter().map(|x| f64::from(*x)).sum::<f64>() / n as f64
    };
    (0..steps).map(step).collect()
}

#[test]
#[ignore = "needs a GPU"]
fn twenty_steps_follow_the_cpu() {
    let spec = spec(Family::Qwen2, (6, 2, 64), 263);
    let tensors = random_weights(&spec, 3).unwrap();
    let batch = batch(spec.vocab_size);
    for trainable in [FULL, lora(&["all-linear"], 16)] {
        let expected = losses(&mut cpu(&spec, &tensors, &trainable), &batch, 20);
        let mut gpu = gpu(&spec, &tensors, &trainable, Kept::INPUTS);
        let before = gpu.score(&batch, 1.0, Pass::Reference).unwrap();
        let found = losses(&mut gpu, &batch, 20);
        let last = (expected[19], found[19]);
        println!(
            "losses {:.4} → {:.4} and {:.4}",
            expected[0], last.0, last.1
        );
        assert!(
            expected[0] - last.0 > 0.1,
            "nothing is learnt: {expected:?}"
        );
        // AdamW makes as much of a small gradient as of a large one: after some steps what bf16 rounds is no longer small.
        for (step, (e, f)) in expected.iter().zip(&found).enumerate() {
            let near = match step {
                0..7 => 0.003,
                _ => 0.02 + 0.05 * (expected[0] - e),
            };
            assert!((e - f).abs() < near, "{step}: {expected:?} {found:?}");
        }
        // The reference has not moved.
        let after = gpu.score(&batch, 1.0, Pass::Reference).unwrap();
        assert_eq!(before, after);
    }
}

#[test]
#[ignore = "needs a GPU"]
fn resuming_is_exact_and_so_is_making_activations_again() {
    let spec = spec(Family::Qwen3, (6, 2, 64), 263);
    let tensors = random_weights(&spec, 3).unwrap();
    let batch = batch(spec.vocab_size);
    for trainable in [FULL, lora(&["all-linear"], 12)] {
        let mut first = gpu(&spec, &tensors, &trainable, Kept::ACTIVATIONS);
        losses(&mut first, &batch, 3);
        let (weights, optimizer) = (
            first.export_trainable().unwrap(),
            first.export_optimizer().unwrap(),
        );
        let expected = losses(&mut first, &batch, 3);
        let end = |backend: &CudaBackend| {
            let state = backend.export_optimizer().unwrap();
            (bits(&backend.export_trainable().unwrap()), bits(&state))
        };
        // All three layers are made again, or the first of them.
        for kept in [Kept::INPUTS, Kept::AllBut(1)] {
            let mut second = gpu(&spec, &tensors, &trainable, kept);
            second.import(&weights).unwrap();
            second.import_optimizer(&optimizer).unwrap();
            assert_eq!(losses(&mut second, &batch, 3), expected);
            assert!(end(&first) == end(&second));
            if trainable != FULL {
                // The base comes out as it went in, though bf16 does not hold it.
                assert!(bits(&second.export_weights().unwrap()) == bits(&tensors));
            }
        }
        assert!(bits(&first.export_trainable().unwrap()) != bits(&weights));
    }
}

/// The four tokens after each scored one, unevenly likely.
fn likely(batch: &PackedBatch, vocab: usize) -> Vec<TopTokens> {
    let scored = (0..batch.ids.len()).filter(|t| batch.scored[*t]);
    scored
        .map(|t| TopTokens {
            ids: (0..1 + t % 4)
                .map(|i| (batch.ids[t] + i as u32) % vocab as u32)
                .collect(),
            probabilities: (0..1 + t % 4).map(|i| 0.5 / (i + 1) as f32).collect(),
        })
        .collect()
}

#[test]
#[ignore = "needs a GPU"]
fn distillation_is_that_of_the_cpu_for_the_model_and_its_early_exit() {
    let spec = spec(Family::Llama, (6, 2, 64), 263);
    let tensors = weights(&spec, 3);
    let (mut cpu, mut gpu) = (
        cpu(&spec, &tensors, &FULL),
        gpu(&spec, &tensors, &FULL, Kept::ACTIVATIONS),
    );
    let batch = batch(spec.vocab_size);
    let targets = likely(&batch, spec.vocab_size);
    let weight = 1.0 / batch.n_scored() as f64;
    let expected = cpu
        .distill(&batch, &targets, 0.8, weight, Exit::Final)
        .unwrap();
    let found = gpu
        .distill(&batch, &targets, 0.8, weight, Exit::Final)
        .unwrap();
    println!("cross-entropy {expected:.4} and {found:.4}");
    assert!((expected - found).abs() < 0.01 * expected);
    let (e, f) = (
        cpu.export_gradients().unwrap(),
        gpu.export_gradients().unwrap(),
    );
    let (all, worst, name) = apart(&e, &f);
    println!("gradients apart {all:.4}, worst {worst:.4} {name}");
    assert!(all < 0.04 && worst < 0.1);
    cpu.add_early_exit(2, None).unwrap();
    gpu.add_early_exit(2, None).unwrap();
    assert_eq!(
        bits(&cpu.export_trainable(Exit::Early).unwrap()),
        bits(&gpu.export_exit().unwrap())
    );
    // What a training pass has kept is still there afterwards.
    let kept = gpu.score(&batch, 1.0, Pass::Train).unwrap();
    for step in 0..10 {
        let expected = cpu
            .distill(&batch, &targets, 1.0, weight, Exit::Early)
            .unwrap();
        let found = gpu
            .distill(&batch, &targets, 1.0, weight, Exit::Early)
            .unwrap();
        println!("exit, step {step}: {expected:.4} and {found:.4}");
        assert!((expected - found).abs() < 0.02 * expected, "step {step}");
        cpu.optimizer_step(&STEP, Exit::Early).unwrap();
        gpu.optimizer_step(&STEP, Exit::Early).unwrap();
    }
    gpu.backward(&coefficients(kept.logprobs.len())).unwrap();
    let (head, state) = (
        gpu.export_exit().unwrap(),
        gpu.export_exit_optimizer().unwrap(),
    );
    let (all, ..) = apart(&cpu.export_trainable(Exit::Early).unwrap(), &head);
    println!("heads apart {all:.4}");
    assert!(all < 0.05);
    let mut again = self::gpu(&spec, &tensors, &FULL, Kept::INPUTS);
    again.add_early_exit(2, Some(&head)).unwrap();
    again.import_exit_optimizer(&state).unwrap();
    for backend in [&mut gpu, &mut again] {
        backend
            .distill(&batch, &targets, 1.0, weight, Exit::Early)
            .unwrap();
        backend.optimizer_step(&STEP, Exit::Early).unwrap();
    }
    assert!(bits(&gpu.export_exit().unwrap()) == bits(&again.export_exit().unwrap()));
}

#[test]
#[ignore = "needs a GPU"]
fn what_is_wrong_is_refused_and_changes_nothing() {
    let spec = spec(Family::Qwen2, (6, 2, 64), 263);
    let tensors = weights(&spec, 3);
    let mut plain = CudaBackend::new(0, spec.clone(), &tensors, SIZES, cache()).unwrap();
    let batch = batch(spec.vocab_size);
    let scores = plain.score(&batch, 1.0, Pass::Score).unwrap();
    let mut gpu = gpu(&spec, &tensors, &FULL, Kept::ACTIVATIONS);
    assert_eq!(scores, gpu.score(&batch, 1.0, Pass::Score).unwrap());
    let misuse = |e: Result<(), PolicyError>| matches!(e, Err(PolicyError::Misuse(_)));
    assert!(misuse(gpu.backward(&[0.0])));
    assert!(misuse(plain.backward(&[0.0])));
    gpu.score(&batch, 1.0, Pass::Train).unwrap();
    assert!(misuse(gpu.backward(&[0.0])));
    let before = bits(&gpu.export_trainable().unwrap());
    let missing = gpu.optimizer_step(&STEP, Exit::Final).unwrap_err();
    assert!(
        matches!(missing, PolicyError::MissingGradient { .. }),
        "{missing}"
    );
    let mut broken = coefficients(batch.n_scored());
    broken[3] = f32::INFINITY;
    gpu.backward(&broken).unwrap();
    let error = gpu.optimizer_step(&STEP, Exit::Final).unwrap_err();
    assert!(
        matches!(error, PolicyError::NonFiniteGradient { .. }),
        "{error}"
    );
    assert!(bits(&gpu.export_trainable().unwrap()) == before);
    let long = vec![1; SIZES.max_model_len + 1];
    let mut too_long = PackedBatch::default();
    too_long.push(&long, 1);
    assert!(gpu.score(&too_long, 1.0, Pass::Score).is_err());
}
