//! Drafting with a trained early exit of a real, if tiny, model: greedy completions token for token, sampled
//! ones in distribution.

use super::scripted::{TOKENS, tokenizer};
use crate::{
    backend::{
        Backend, Exit,
        cpu::{
            CpuBackend, Trainable,
            tests::{STEP, random_weights, tiny_spec},
        },
    },
    engine::{
        Engine, EngineConfig,
        draft::{Draft, Length, Source},
        sampler::{
            distribution,
            tests::{DRAWS, p_value},
        },
    },
    spec::Family,
    types::{Completion, PackedBatch, Request, SamplingParams},
};

const LESSONS: usize = 60;

fn policy() -> CpuBackend {
    let mut spec = tiny_spec(Family::Qwen3);
    spec.vocab_size = TOKENS.len();
    let weights = random_weights(&spec);
    let mut policy = CpuBackend::new(spec, &weights, &Trainable::Nothing, false).unwrap();
    policy.add_early_exit(1, None).unwrap();
    policy
}

fn draft(length: usize) -> Draft<CpuBackend> {
    let mut draft = Draft::new(Source::EarlyExit, Length::Fixed(length)).unwrap();
    draft.learn_from(24);
    draft
}

fn generate(
    engine: &mut Engine,
    policy: &mut CpuBackend,
    draft: Option<&mut Draft<CpuBackend>>,
    request: Request,
) -> Vec<Completion> {
    let requests = vec![request];
    engine
        .generate(policy, draft, &tokenizer(), requests, &mut |_| ())
        .unwrap()
}

fn request(seed: u64, n: u32, temperature: f32, max_tokens: u32) -> Request {
    let sampling = SamplingParams {
        temperature,
        max_tokens,
        ignore_eos: true,
        ..SamplingParams::default()
    };
    Request {
        id: seed,
        prompt: vec![4, 5, 6, (seed % 20) as u32],
        n,
        sampling,
        seed,
    }
}

fn acceptance(completions: &[Completion]) -> f64 {
    let total = |of: fn(&Completion) -> u32| -> u32 { completions.iter().map(of).sum() };
    let drafted = total(|c| c.telemetry.draft_tokens);
    assert!(drafted > 100, "{drafted} drafted tokens");
    f64::from(total(|c| c.telemetry.accepted_tokens)) / f64::from(drafted)
}

/// Distils the exit on completions at temperature 1; their acceptance before and after.
fn train(engine: &mut Engine, policy: &mut CpuBackend) -> (f64, f64) {
    let mut rates = Vec::new();
    for lesson in 0..LESSONS as u64 {
        let mut draft = draft(2);
        let request = request(lesson, 32, 1.0, 16);
        let completions = generate(engine, policy, Some(&mut draft), request.clone());
        rates.push(acceptance(&completions));
        let mut batch = PackedBatch::default();
        for c in &completions {
            batch.push(
                &[&request.prompt[..], &c.tokens].concat(),
                request.prompt.len(),
            );
        }
        let targets: Vec<_> = completions.into_iter().flat_map(|c| c.top).collect();
        let weight = 1.0 / targets.len() as f64;
        let (learner, exit) = draft.learner_mut(policy).unwrap();
        assert_eq!(exit, Exit::Early);
        learner
            .distill(&batch, &targets, 1.0, weight, exit)
            .unwrap();
        learner.optimizer_step(&STEP, exit).unwrap();
    }
    (rates[0], rates[LESSONS - 1])
}

#[test]
fn a_trained_exit_is_accepted_more_and_changes_nothing() {
    let (mut engine, mut policy) = (Engine::new(EngineConfig::default()).unwrap(), policy());
    let (first, last) = train(&mut engine, &mut policy);
    assert!(last > first + 0.1, "acceptance {first} to {last}");

    let mut accepted = 0;
    for seed in 0..40 {
        let request = request(seed, 1, 0.0, 30);
        let plain = generate(&mut engine, &mut policy, None, request.clone());
        let length = 1 + seed as usize % 4;
        let drafted = generate(&mut engine, &mut policy, Some(&mut draft(length)), request);
        assert_eq!(drafted[0].tokens, plain[0].tokens, "seed {seed}");
        accepted += drafted[0].telemetry.accepted_tokens;
    }
    assert!(accepted > 100, "{accepted} tokens accepted");

    let exact = second_token(&policy);
    let mut tokens = Vec::new();
    for batch in 0..DRAWS / 500 {
        let mut request = request(0, 500, 0.8, 3);
        request.seed = 1000 + batch;
        let completions = generate(&mut engine, &mut policy, Some(&mut draft(1)), request);
        tokens.extend(completions.iter().map(|c| c.tokens[1]));
    }
    let p = p_value(&exact, |at| tokens[at as usize]);
    assert!(p > 0.01, "p = {p}");
}

/// Exact probabilities of the second token that `request(0, …)` samples at temperature 0.8.
fn second_token(policy: &CpuBackend) -> Vec<f64> {
    let request = request(0, 1, 0.8, 3);
    let after = |tokens: &[u32]| {
        let history = [&request.prompt[..], tokens].concat();
        let logits = policy.logits(&history).unwrap();
        let last = &logits[logits.len() - TOKENS.len()..];
        distribution(last, &request.sampling, &history).unwrap()
    };
    let mut exact = vec![0.0; TOKENS.len()];
    for (first, p1) in after(&[]).iter().enumerate() {
        for (total, p2) in exact.iter_mut().zip(after(&[first as u32])) {
            *total += f64::from(*p1) * f64::from(p2);
        }
    }
    exact
}
