//! Fifty steps of supervised fine-tuning of the arithmetic model, from random weights: the loss falls as it does on the CPU.

use grpo_host::defaults;
use grpo_policy::{
    backend::{
        Backend, Exit, OptimStep, Pass,
        cuda::{CudaBackend, CudaWeights, Kept, Learns, Moments},
    },
    tokenizer::Tokenizer,
    types::PackedBatch,
    weights::random_weights,
};
use serde_json::Value;

use super::{
    FULL, STEP, cpu,
    cuda_models::{SIZES, cache},
    gpu, lora,
};

const STEPS: usize = 50;
const BATCH: usize = 32;

const RATE: OptimStep = OptimStep {
    learning_rate: 2e-3,
    ..STEP
};

/// A batch for each step, of examples that come only once.
fn batches(tokenizer: &Tokenizer) -> Vec<PackedBatch> {
    let lines: Vec<Value> = include_str!("../../../examples/arith/sft.jsonl")
        .lines()
        .take(STEPS * BATCH)
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let text = |line: &Value, key: &str| line[key].as_str().unwrap().to_owned();
    let packed = |lines: &[Value]| {
        let mut batch = PackedBatch::default();
        for line in lines {
            let prompt = text(line, "question") + "=";
            let prompt = tokenizer.encode(&prompt, false).unwrap();
            let answer = tokenizer.encode(&text(line, "completion"), false).unwrap();
            let ids = [&prompt[..], &answer, &tokenizer.eos_ids()[..1]].concat();
            batch.push(&ids, prompt.len());
        }
        batch
    };
    lines.chunks(BATCH).map(packed).collect()
}

/// Mean negative log-likelihood of each batch before the step that learns from it.
fn curve(backend: &mut impl Backend, batches: &[PackedBatch]) -> Vec<f64> {
    let step = |batch: &PackedBatch| {
        let n = batch.n_scored();
        let scores = backend.score(batch, 1.0, Pass::Train).unwrap();
        backend.backward(&vec![-1.0 / n as f32; n]).unwrap();
        backend.optimizer_step(&RATE, Exit::Final).unwrap();
        -scores.logprobs.iter().map(|x| f64::from(*x)).sum::<f64>() / n as f64
    };
    batches.iter().map(step).collect()
}

#[test]
#[ignore = "needs a GPU"]
fn fifty_steps_of_the_arithmetic_model_follow_the_cpu() {
    let model = defaults::model().unwrap();
    let tensors = random_weights(&model.spec, 1).unwrap();
    let batches = batches(&model.tokenizer);
    assert_eq!(batches.len(), STEPS);
    for trainable in [FULL, lora(&["all-linear"], 16)] {
        let expected = curve(&mut cpu(&model.spec, &tensors, &trainable), &batches);
        let mut gpu = gpu(&model.spec, &tensors, &trainable, Kept::ACTIVATIONS);
        let found = curve(&mut gpu, &batches);
        let drop = expected[0] - expected[STEPS - 1];
        let apart: Vec<f64> = expected
            .iter()
            .zip(&found)
            .map(|(e, f)| (e - f).abs())
            .collect();
        let (mean, most) = (
            apart.iter().sum::<f64>() / STEPS as f64,
            apart.iter().copied().fold(0.0, f64::max),
        );
        for step in [0, 9, 24, 49] {
            println!(
                "step {}: CPU {:.4}, GPU {:.4}",
                step + 1,
                expected[step],
                found[step]
            );
        }
        println!(
            "apart: mean {:.4}, most {:.4} of the drop",
            mean / drop,
            most / drop
        );
        assert!(drop > 0.5, "nothing is learnt: {expected:?}");
        assert!(mean < 0.02 * drop && most < 0.06 * drop);
    }
}

/// With moments of half the size the loss falls as far, and a resumed run goes on with the same bits.
#[test]
#[ignore = "needs a GPU"]
fn moments_of_bf16_learn_and_resume() {
    let model = defaults::model().unwrap();
    let tensors = random_weights(&model.spec, 1).unwrap();
    let batches = batches(&model.tokenizer);
    let trained = |moments| {
        let sizes = (model.spec.clone(), SIZES);
        let mut gpu = CudaBackend::new(0, sizes.0, &tensors, sizes.1, cache()).unwrap();
        let learns = Learns {
            moments,
            ..Learns::of(&FULL)
        };
        let given = CudaWeights::dense(&tensors);
        gpu.train(given, learns, (1024, Kept::ACTIVATIONS)).unwrap();
        gpu
    };
    let exact = curve(&mut trained(Moments::F32), &batches);
    let mut first = trained(Moments::Bf16);
    let found = curve(&mut first, &batches[..40]);
    let (weights, state) = (
        first.export_trainable().unwrap(),
        first.export_optimizer().unwrap(),
    );
    let rest = curve(&mut first, &batches[40..]);
    println!(
        "f32 {:.4} → {:.4}, bf16 {:.4}",
        exact[0],
        exact[STEPS - 1],
        rest[9]
    );
    assert!(rest[9] - exact[STEPS - 1] < 0.1 * (exact[0] - exact[STEPS - 1]));
    assert_ne!(found, exact[..40], "moments are not what was asked for");
    let mut second = trained(Moments::Bf16);
    second.import(&weights).unwrap();
    second.import_optimizer(&state).unwrap();
    assert_eq!(curve(&mut second, &batches[40..]), rest);
}
