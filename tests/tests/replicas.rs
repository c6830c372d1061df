//! Two and three replicas beside one: completions, losses, gradient norms and weights are the same but for rounding, also of a
//! draft that learns; and one that fails ends the work of all. On the CPU here, and on GPUs where there are two:
//! `cargo test --release --test replicas -- --ignored --nocapture --test-threads 1`.
#![allow(
    clippy::unwrap_used,
    reason = "clippy counts only functions marked as tests as tests"
)]

use std::{
    collections::BTreeMap,
    sync::{Mutex, mpsc},
    time::Duration,
};

use anyhow::Context;
use candle_core::Tensor;
use grpo_host::{
    cli::Environment,
    config::{Device, DraftKind, DraftTokens, QuantizedWeights, RawConfig, RunConfig},
    defaults, draft,
    placement::{Capacity, Passes, Place},
    policy::{Mode, Policy},
    replicas::Replica,
    sft::{self, Example},
    trainer::update_config,
    types::Completion,
    update::{Sequence, UpdateReport, update},
};
use grpo_policy::{
    backend::{Backend, Exit, OptimStep, Pass},
    error::PolicyError,
    types::{PackedBatch, Request, SamplingParams},
    weights::LoraConfig,
};

/// An eps as large as gradients makes a small one a small step, so that what rounding does to it stays small.
const STEP: OptimStep = OptimStep {
    learning_rate: 1e-3,
    beta1: 0.9,
    beta2: 0.99,
    eps: 1e-3,
    weight_decay: 0.1,
    max_grad_norm: 0.1,
};

fn full() -> Mode {
    Mode::Full {
        keep_reference: true,
    }
}

fn lora() -> Mode {
    let config = LoraConfig {
        r: 8,
        alpha: 16.0,
        targets: vec!["all-linear".to_owned()],
    };
    Mode::Lora { config, seed: 5 }
}

/// The embedded model; micro-batches are short, so that there are several.
fn policy(device: Device, replicas: usize, mode: Mode) -> Policy {
    let place = Place {
        device,
        replicas,
        gpu_memory_utilization: 0.5,
        cache: Some(env!("CARGO_TARGET_TMPDIR").into()),
        deterministic: false,
        quantized_weights: QuantizedWeights::Auto,
    };
    let passes = Passes {
        micro_batch_tokens: 128,
        gradient_checkpointing: false,
        ..Passes::default()
    };
    let capacity = Capacity {
        max_batch: Some(32),
        max_model_len: 96,
        kv_tokens: None,
    };
    let model = defaults::model().unwrap();
    Policy::new(model, "embedded", mode, passes, capacity, &place).unwrap()
}

fn config() -> RunConfig {
    let yaml = "beta: 0.1\nloss_type: bnpo\nmicro_batch_tokens: 128\nmax_completion_length: 24\ndraft_learning_rate: 1e-3\n";
    let raw = RawConfig::from_yaml(yaml, "test").unwrap();
    raw.validate().unwrap()
}

/// Groups of different sizes.
fn requests(policy: &Policy) -> Vec<Request> {
    let rows = defaults::heldout_rows().unwrap().rows;
    let request = |(id, n): (usize, &u32)| Request {
        id: id as u64,
        prompt: policy
            .tokenizer
            .encode_prompt(rows[id].json["question"].as_str().unwrap())
            .unwrap(),
        n: *n,
        sampling: SamplingParams {
            max_tokens: 24,
            ..SamplingParams::default()
        },
        seed: 7 + id as u64,
    };
    let sizes = [2, 5, 1, 4, 3];
    sizes.iter().enumerate().map(request).collect()
}

/// One alone has drawn them, for all to learn from.
fn completions(device: Device) -> (Vec<Request>, Vec<Completion>) {
    let mut policy = policy(device, 1, Mode::Inference);
    let requests = requests(&policy);
    let completions = policy.generate(requests.clone(), &mut |_| {}).unwrap();
    (requests, completions)
}

fn sequences<'a>(requests: &'a [Request], completions: &'a [Completion]) -> Vec<Sequence<'a>> {
    let advantage = |place: usize| [1.5, -0.5, 0.0, -1.0, 0.75][place % 5];
    let sequence = |(place, completion): (usize, &'a Completion)| Sequence {
        prompt_ids: &requests[completion.request as usize].prompt,
        completion,
        advantage: advantage(place),
    };
    completions.iter().enumerate().map(sequence).collect()
}

type Tensors = BTreeMap<String, Tensor>;

fn numbers(tensors: &Tensors) -> Vec<f32> {
    let of = |tensor: &Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    tensors.values().flat_map(of).collect()
}

/// What `of` a replica trains, which is the same in all to the bit.
fn equal(
    policy: &mut Policy,
    of: impl Fn(&mut Replica) -> Result<Tensors, PolicyError> + Sync,
) -> Vec<f32> {
    let export = |_, replica: &mut Replica| Ok(numbers(&of(replica)?));
    let all = policy.replicas.each(export).unwrap();
    let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<u32>>();
    assert!(all.iter().all(|one| bits(one) == bits(&all[0])));
    all.into_iter().next().unwrap()
}

fn trained(policy: &mut Policy) -> Vec<f32> {
    equal(policy, |replica| {
        replica.backend.export_trainable(Exit::Final)
    })
}

/// The same of what is distilled.
fn learner(policy: &mut Policy) -> Vec<f32> {
    equal(policy, |replica| {
        let (model, exit) = replica.learning_draft().unwrap();
        model.export_trainable(exit)
    })
}

fn length(of: impl Iterator<Item = f32>) -> f64 {
    of.map(|x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt()
}

/// Distance of two ends of a way from one start, relative to the way.
fn apart(start: &[f32], [a, b]: [&[f32]; 2]) -> f64 {
    let way = length(start.iter().zip(a).map(|(s, a)| a - s));
    assert!(way > 0.0);
    length(a.iter().zip(b).map(|(a, b)| a - b)) / way
}

fn near(a: f64, b: f64, tolerance: f64) -> bool {
    (a - b).abs() <= tolerance * a.abs().max(b.abs())
}

fn completions_do_not_depend_on_the_number(device: Device, numbers: &[usize]) -> f64 {
    let (requests, alone) = completions(device);
    let mut equal = (0, 0);
    for replicas in numbers {
        let mut policy = policy(device, *replicas, Mode::Inference);
        assert_eq!(policy.replicas.count(), *replicas);
        let mut steps = 0;
        let together = policy
            .generate(requests.clone(), &mut |_| steps += 1)
            .unwrap();
        assert!(steps > 0 && together.len() == 15);
        for (a, b) in alone.iter().zip(&together) {
            assert_eq!((a.request, a.index), (b.request, b.index));
            equal = (equal.0 + usize::from(a.tokens == b.tokens), equal.1 + 1);
        }
    }
    println!("{} of {} completions are equal", equal.0, equal.1);
    f64::from(equal.0 as u32) / f64::from(equal.1 as u32)
}

#[test]
fn completions_do_not_depend_on_the_number_of_replicas() {
    assert_eq!(
        completions_do_not_depend_on_the_number(Device::Cpu, &[2, 3]),
        1.0
    );
}

#[test]
#[ignore = "needs two GPUs"]
fn completions_do_not_depend_on_the_number_of_gpus() {
    // Rounding differs with what else is in a step, and a draw now and then falls on the other side of it.
    assert!(completions_do_not_depend_on_the_number(Device::Auto, &[2]) > 0.6);
}

/// Reports of some updates, and the weights before and after them.
fn updates(
    policy: &mut Policy,
    sequences: &[Sequence<'_>],
    count: usize,
) -> (Vec<UpdateReport>, [Vec<f32>; 2]) {
    let settings = update_config(&config());
    let before = trained(policy);
    let reports = (0..count)
        .map(|_| update(&mut policy.replicas, sequences, &settings, &STEP).unwrap())
        .collect();
    (reports, [before, trained(policy)])
}

/// `(loss, norm, weights)`: what one update may differ by, relative to the loss, the norm and the way.
fn updates_do_not_depend_on_the_number(
    device: Device,
    numbers: &[usize],
    (loss, norm, weights): (f64, f64, f64),
) {
    let (requests, completions) = completions(device);
    let sequences = sequences(&requests, &completions);
    let prompts = sequences.iter().map(|s| s.prompt_ids.len());
    let longest = prompts.max().unwrap();
    for mode in [full(), lora()] {
        // All sequences, and so few that a replica has none.
        for share in [&sequences[..], &sequences[..1]] {
            let mut one = policy(device, 1, mode.clone());
            let (expected, [start, end]) = updates(&mut one, share, 1);
            drop(one);
            for replicas in numbers {
                let mut several = policy(device, *replicas, mode.clone());
                let (found, [its_start, its_end]) = updates(&mut several, share, 1);
                assert!(start == its_start);
                let (e, f) = (&expected[0], &found[0]);
                let distance = apart(&start, [&end, &its_end]);
                println!(
                    "{replicas} replicas, {} sequences: loss {:.6} {:.6}, norm {:.6} {:.6}, weights {distance:.1e}",
                    share.len(),
                    e.loss,
                    f.loss,
                    e.grad_norm,
                    f.grad_norm
                );
                // A prompt whose completions are divided is run by both.
                let again = (replicas - 1) * longest;
                assert!((e.tokens..=e.tokens + again).contains(&f.tokens));
                assert!((e.loss - f.loss).abs() < loss);
                assert!(near(e.grad_norm, f.grad_norm, norm) && e.grad_norm > 0.0);
                assert!(distance < weights);
            }
        }
    }
}

#[test]
fn an_update_does_not_depend_on_the_number_of_replicas() {
    updates_do_not_depend_on_the_number(Device::Cpu, &[2, 3], (1e-6, 1e-5, 1e-4));
}

#[test]
#[ignore = "needs two GPUs"]
fn an_update_does_not_depend_on_the_number_of_gpus() {
    updates_do_not_depend_on_the_number(Device::Auto, &[2], (2e-3, 0.02, 0.05));
}

/// Losses of ten supervised steps.
fn curve(policy: &mut Policy) -> Vec<f64> {
    let ids = |row: u32| {
        (0..10 + 3 * row)
            .map(|i| 4 + (i * i + 7 * row) % 40)
            .collect()
    };
    let examples: Vec<Example> = (0..7).map(|row| Example::new(ids(row), 2)).collect();
    let batch: Vec<&Example> = examples.iter().collect();
    let mut step = || sft::step(&mut policy.replicas, &batch, &config(), &STEP).unwrap();
    (0..10).map(|_| step().loss).collect()
}

fn curves_agree(device: Device, tolerance: f64) {
    for mode in [full(), lora()] {
        let expected = curve(&mut policy(device, 1, mode.clone()));
        let found = curve(&mut policy(device, 2, mode));
        println!("{expected:.4?}\n{found:.4?}");
        assert!(expected[0] - expected[9] > 0.05);
        let agree = |(e, f): (&f64, &f64)| near(*e, *f, tolerance);
        assert!(expected.iter().zip(&found).all(agree));
    }
}

#[test]
fn ten_steps_of_two_replicas_are_those_of_one() {
    curves_agree(Device::Cpu, 1e-4);
}

#[test]
#[ignore = "needs two GPUs"]
fn ten_steps_of_two_gpus_are_those_of_one() {
    curves_agree(Device::Auto, 0.01);
}

/// A lesson of each draft that learns.
fn lessons_agree(device: Device, tolerance: f64) {
    for kind in [
        DraftKind::Model("embedded".to_owned()),
        DraftKind::Layers(1),
    ] {
        let mut config = config();
        config.generation.draft = kind;
        config.generation.draft_tokens = DraftTokens::Fixed(2);
        let lesson = |replicas: usize, taught: usize| {
            let mut policy = policy(device, replicas, full());
            let environment = Environment::default();
            draft::attach(&mut policy, &config, true, &environment, &mut |_| {}).unwrap();
            let requests = requests(&policy);
            let completions = policy.generate(requests.clone(), &mut |_| {}).unwrap();
            let sequences = sequences(&requests, &completions);
            let before = learner(&mut policy);
            let lesson = draft::distil(&mut policy, &sequences[..taught], &config);
            let lesson = lesson.unwrap().unwrap();
            let weights = [before, learner(&mut policy)];
            (lesson, weights)
        };
        for taught in [15, 1] {
            let ((one, [start, a]), (two, [_, b])) = (lesson(1, taught), lesson(2, taught));
            println!(
                "{:?}: loss {:.5} {:.5}, norm {:.5} {:.5}",
                config.generation.draft, one.loss, two.loss, one.grad_norm, two.grad_norm
            );
            assert!(near(one.loss, two.loss, tolerance));
            assert!(near(one.grad_norm, two.grad_norm, 5.0 * tolerance));
            assert!(apart(&start, [&a, &b]) < 10.0 * tolerance);
        }
    }
}

#[test]
fn drafts_of_two_replicas_learn_what_that_of_one_does() {
    lessons_agree(Device::Cpu, 1e-4);
}

#[test]
#[ignore = "needs two GPUs"]
fn drafts_of_two_gpus_learn_what_that_of_one_does() {
    lessons_agree(Device::Auto, 0.05);
}

/// After so many updates that both have made, the first replica has its gradients and waits for those of the other, which never
/// come.
fn a_failure_ends_all(
    device: Device,
    updates: usize,
    fails: impl Fn() -> anyhow::Result<f64> + Sync,
) -> String {
    let (requests, completions) = completions(device);
    let mut policy = policy(device, 2, full());
    let mut packed = PackedBatch::default();
    let ids = [&requests[1].prompt[..], &completions[3].tokens].concat();
    packed.push(&ids, requests[1].prompt.len());
    let (arrive, arrived) = mpsc::channel();
    let arrived = Mutex::new(arrived);
    let step = |failing: Option<usize>, rank: usize, replica: &mut Replica| {
        let backend = &mut replica.backend;
        let scores = backend.score(&packed, 1.0, Pass::Train)?;
        if failing == Some(rank) {
            let other = arrived.lock().unwrap();
            let waited = other.recv_timeout(Duration::from_secs(20));
            waited.context("rank 0 does not come to its sums")?;
            return fails();
        }
        backend.expect_update();
        backend.backward(&vec![-0.1; scores.logprobs.len()])?;
        if failing.is_some() {
            arrive.send(()).unwrap();
        }
        Ok(backend.optimizer_step(&STEP, Exit::Final)?)
    };
    for _ in 0..updates {
        let norms = policy.replicas.each(|rank, r| step(None, rank, r)).unwrap();
        assert!(norms[0] > 0.0 && norms[0] == norms[1]);
    }
    let error = policy.replicas.each(|rank, r| step(Some(1), rank, r));
    let error = error.unwrap_err();
    let again = policy.replicas.each(|_, replica| {
        let backend = &mut replica.backend;
        Ok(backend.optimizer_step(&STEP, Exit::Final)?)
    });
    assert!(again.is_err());
    println!("after {updates} updates: {error:#}");
    format!("{error:#}")
}

fn failures_end_all(device: Device) {
    for updates in [0, 2] {
        let broken = || anyhow::bail!("the reward of rank 1 is broken");
        assert_eq!(
            a_failure_ends_all(device, updates, broken),
            "replica 1: the reward of rank 1 is broken"
        );
        let panics = || -> anyhow::Result<f64> { std::panic::panic_any("killed") };
        assert_eq!(
            a_failure_ends_all(device, updates, panics),
            "replica 1: its thread ended with a panic"
        );
    }
}

#[test]
fn a_replica_that_fails_ends_the_others() {
    failures_end_all(Device::Cpu);
}

#[test]
#[ignore = "needs two GPUs"]
fn a_gpu_whose_thread_fails_ends_the_others() {
    failures_end_all(Device::Auto);
}
