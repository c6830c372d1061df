//! Rollouts by the weights after some steps, and what training passes make of the same tokens.

use grpo_policy::{
    backend::cuda::BLOCK_SIZE,
    engine::{Engine, EngineConfig},
    types::{Completion, Request, SamplingParams},
};

use super::*;

/// Prompts of 20 tokens and more, of each of which `n` completions of 60 tokens are asked for.
fn requests(n: u32) -> Vec<Request> {
    let request = |id| Request {
        id,
        prompt: (0..20 + id as u32).map(|i| i * 3 % 263).collect(),
        n,
        sampling: SamplingParams {
            max_tokens: 60,
            ignore_eos: true,
            ..SamplingParams::default()
        },
        seed: 11,
    };
    (0..8).map(request).collect()
}

fn completions(gpu: &mut CudaBackend, requests: &[Request]) -> Vec<Completion> {
    let mut engine = Engine::new(EngineConfig {
        block_size: BLOCK_SIZE,
        kv_blocks: 512,
        max_batch: 64,
        max_step_tokens: 1024,
        enable_prefix_cache: true,
        max_model_len: 512,
    })
    .unwrap();
    let tokenizer = grpo_host::defaults::model().unwrap().tokenizer;
    engine
        .generate(gpu, None, &tokenizer, requests.to_vec(), &mut |_| {})
        .unwrap()
}

/// Draws completions and scores them; both must be of one policy.
pub fn check_same_policy(gpu: &mut CudaBackend, n: u32) {
    let requests = requests(n);
    let completions = completions(gpu, &requests);
    let (mut packed, mut drawn) = (PackedBatch::default(), Vec::new());
    for completion in &completions {
        let prompt = &requests[completion.request as usize].prompt;
        packed.push(&[&prompt[..], &completion.tokens].concat(), prompt.len());
        drawn.extend_from_slice(&completion.policy_logprobs);
    }
    let scored = gpu.score(&packed, 1.0, Pass::Score).unwrap().logprobs;
    let deltas: Vec<f64> = drawn
        .iter()
        .zip(&scored)
        .map(|(d, s)| f64::from(s - d))
        .collect();
    let count = deltas.len() as f64;
    let mean = deltas.iter().map(|d| d.abs()).sum::<f64>() / count;
    // The k3 estimator (Schulman 2020).
    let kl = deltas.iter().map(|d| d.exp() - 1.0 - d).sum::<f64>() / count;
    let most = largest(&drawn, &scored);
    println!("{count} tokens: mean |Δlogp| {mean:.5}, largest {most:.4}, KL {kl:.2e}");
    assert!(count == f64::from(8 * n) * 60.0 && mean < 0.02 && kl < 1e-3);
}

#[test]
#[ignore = "needs a GPU"]
fn rollouts_and_training_see_the_same_policy() {
    let spec = spec(Family::Qwen2, (6, 2, 64), 263);
    let tensors = random_weights(&spec, 3).unwrap();
    let batch = batch(spec.vocab_size);
    for trainable in [FULL, lora(&["all-linear"], 16)] {
        let mut gpu = gpu(&spec, &tensors, &trainable, Kept::ACTIVATIONS);
        losses(&mut gpu, &batch, 5);
        check_same_policy(&mut gpu, 4);
    }
}
