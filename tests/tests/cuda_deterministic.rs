//! `CudaBackend::set_deterministic`: a completion is the same to the bit whatever else is computed beside it. Needs a Hopper
//! GPU; run it with `cargo test --release --test cuda_deterministic -- --ignored --nocapture --test-threads 1`.

mod cuda_models;

use cuda_models::{SIZES, cache, spec, weights};
use grpo_policy::{
    backend::cuda::{BLOCK_SIZE, CudaBackend},
    engine::{
        Engine, EngineConfig,
        draft::{Draft, Length, Source},
    },
    spec::{Family, ModelSpec},
    types::{Completion, Request, SamplingParams},
};

const PLAIN: EngineConfig = EngineConfig {
    block_size: BLOCK_SIZE,
    kv_blocks: 1024,
    max_batch: 64,
    max_step_tokens: 1024,
    enable_prefix_cache: true,
    max_model_len: 512,
};

fn requests(spec: &ModelSpec, temperature: f32) -> Vec<Request> {
    let prompt = |id: u64| {
        (0..20 + 23 * id)
            .map(|i| ((i % 11 * 31 + id * 7) % spec.vocab_size as u64) as u32)
            .collect()
    };
    (0..8)
        .map(|id| Request {
            id,
            prompt: prompt(id),
            n: 8,
            sampling: SamplingParams {
                max_tokens: 60 - 3 * id as u32,
                ignore_eos: true,
                temperature,
                ..SamplingParams::default()
            },
            seed: 100 + id,
        })
        .collect()
}

fn generate(
    gpu: &mut CudaBackend,
    requests: Vec<Request>,
    config: EngineConfig,
    mut draft: Option<Draft<CudaBackend>>,
) -> Vec<Completion> {
    let tokenizer = grpo_host::defaults::model().unwrap().tokenizer;
    let mut engine = Engine::new(config).unwrap();
    engine
        .generate(gpu, draft.as_mut(), &tokenizer, requests, &mut |_| {})
        .unwrap()
}

/// Of two sets of completions: those with other tokens, and those with the same tokens and other log-probs.
fn differences(a: &[Completion], b: &[Completion]) -> (usize, usize) {
    assert_eq!(a.len(), b.len());
    let pairs = || a.iter().zip(b);
    let tokens = pairs().filter(|(a, b)| a.tokens != b.tokens).count();
    let logprobs = pairs().filter(|(a, b)| a.tokens == b.tokens && a.logprobs != b.logprobs);
    (tokens, logprobs.count())
}

fn ngram() -> Option<Draft<CudaBackend>> {
    Some(Draft::new(Source::Ngram, Length::Fixed(4)).unwrap())
}

#[test]
#[ignore = "needs a Hopper GPU"]
fn completions_depend_on_nothing_but_their_prompt() {
    let one = EngineConfig {
        max_batch: 1,
        ..PLAIN
    };
    let pieces = EngineConfig {
        max_step_tokens: 64,
        enable_prefix_cache: false,
        ..PLAIN
    };
    let scarce = EngineConfig {
        kv_blocks: 40,
        ..PLAIN
    };
    for spec in [
        spec(Family::Qwen2, (14, 2, 64), 1009),
        spec(Family::Qwen3, (8, 1, 128), 1024),
        spec(Family::Llama, (9, 3, 64), 515),
    ] {
        let tensors = weights(&spec, 3);
        let mut gpu = CudaBackend::new(0, spec.clone(), &tensors, SIZES, cache()).unwrap();
        for deterministic in [false, true] {
            if deterministic {
                gpu.set_deterministic().unwrap();
            }
            for temperature in [0.0, 1.0] {
                let work = requests(&spec, temperature);
                let expected = generate(&mut gpu, work.clone(), PLAIN, None);
                let mut compare = |config: &EngineConfig, draft| {
                    let found = generate(&mut gpu, work.clone(), config.clone(), draft);
                    differences(&expected, &found)
                };
                let found = [&one, &pieces, &scarce].map(|config| compare(config, None));
                let drafted = compare(&PLAIN, ngram());
                println!(
                    "{:?} deterministic {deterministic}, temperature {temperature}: of {} completions differ in tokens (or only log-probs): one at a time {:?}, in pieces {:?}, preempted {:?}, with ngram {drafted:?}",
                    spec.family,
                    expected.len(),
                    found[0],
                    found[1],
                    found[2]
                );
                if deterministic {
                    assert_eq!(found, [(0, 0); 3]);
                    // Verification sums a row's exponentials in another order than plain drawing, so only log-probs may
                    // differ, and only where a draft may change the draw itself (temperature above 0) tokens.
                    assert!(temperature > 0.0 || drafted.0 == 0);
                }
            }
        }
    }
}
