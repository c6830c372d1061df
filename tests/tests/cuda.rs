//! The CUDA backend beside the CPU one, on random models of every family and many shapes. Needs a GPU, so CI leaves it
//! out; run it with `cargo test --release --test cuda -- --ignored --nocapture --test-threads 1`.

mod cuda_models;

use cuda_models::{SIZES, cache, spec, weights};
use grpo_policy::{
    backend::{
        Backend, Drafted, Exit, Pass, SampleArgs, Sampled, StepRow,
        cpu::{CpuBackend, Trainable},
        cuda::{BLOCK_SIZE, CudaBackend, CudaSizes},
    },
    engine::{Engine, EngineConfig},
    spec::{Family, ModelSpec},
    tokenizer::Tokenizer,
    types::{Completion, PackedBatch, Request, SamplingParams},
};

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

/// `[V]` log-probs less their mean, whose relative error says how far two models are apart.
fn centred(probabilities: &[f32]) -> Vec<f64> {
    let logs: Vec<f64> = probabilities
        .iter()
        .map(|p| f64::from(*p).max(1e-30).ln())
        .collect();
    let mean = logs.iter().sum::<f64>() / logs.len() as f64;
    logs.iter().map(|x| x - mean).collect()
}

fn distance(a: &[f32], b: &[f32]) -> f64 {
    let (a, b) = (centred(a), centred(b));
    let square = |x: f64| x * x;
    let apart: f64 = a.iter().zip(&b).map(|(x, y)| square(x - y)).sum();
    (apart / a.iter().map(|x| square(*x)).sum::<f64>()).sqrt()
}

/// Prompts in which blocks are empty, just full and just begun.
const LENGTHS: [usize; 8] = [1, 2, 31, 32, 33, 64, 97, 200];

/// Tokens and first position of every sequence: the prompts, two single tokens, then several at once, as verification
/// brings them.
fn round_of(round: usize, vocab: usize) -> (Vec<Vec<u32>>, Vec<usize>) {
    let text = |s: usize, from: usize, n: usize| -> Vec<u32> {
        (from..from + n)
            .map(|i| ((i * 7919 + s * 131) % vocab) as u32)
            .collect()
    };
    let of_sequence = |(s, n): (usize, &usize)| match round {
        0 => (text(s, 0, *n), 0),
        3 => (text(s, n + 2, 5), n + 2),
        _ => (text(s, n + round - 1, 1), n + round - 1),
    };
    LENGTHS.iter().enumerate().map(of_sequence).unzip()
}

/// Prompts of awkward lengths, then single tokens after them, on scattered blocks.
#[test]
#[ignore = "needs a GPU"]
fn distributions_are_those_of_the_cpu() {
    for spec in shapes() {
        let tensors = weights(&spec, 7);
        let mut cpu = CpuBackend::new(spec.clone(), &tensors, &Trainable::Nothing, false).unwrap();
        let mut gpu = CudaBackend::new(0, spec.clone(), &tensors, SIZES, cache()).unwrap();
        cpu.init_kv(128, BLOCK_SIZE).unwrap();
        gpu.init_kv(128, BLOCK_SIZE).unwrap();
        let params = SamplingParams::default();
        // Every 11th block from a different start: no two sequences share one and none is in order.
        let blocks: Vec<Vec<u32>> = (0..LENGTHS.len())
            .map(|s| (0..10).map(|b| ((s * 10 + b) * 11 % 127) as u32).collect())
            .collect();
        let mut worst = 0f64;
        for round in 0..4 {
            let (tokens, positions) = round_of(round, spec.vocab_size);
            let rows: Vec<StepRow<'_>> = tokens
                .iter()
                .enumerate()
                .map(|(s, tokens)| StepRow {
                    sequence: s as u64,
                    tokens,
                    position: positions[s],
                    blocks: &blocks[s],
                    sample: Some(SampleArgs {
                        params: &params,
                        stream: s as u64,
                        position: 0,
                        history: &[],
                        proposal: None,
                        top: 0,
                        ahead: 0,
                    }),
                })
                .collect();
            let dense = |drafted: Vec<Drafted>| -> Vec<Vec<f32>> {
                let dense = |d: Drafted| d.distribution.dense().unwrap().into_owned();
                drafted.into_iter().map(dense).collect()
            };
            let (expected, found) = (
                dense(cpu.propose(&rows, Exit::Final).unwrap()),
                dense(gpu.propose(&rows, Exit::Final).unwrap()),
            );
            for (s, (e, f)) in expected.iter().zip(&found).enumerate() {
                let d = distance(e, f);
                assert!(
                    d < 0.03,
                    "{:?} round {round} sequence {s}: {d}",
                    spec.family
                );
                worst = worst.max(d);
            }
        }
        println!(
            "{:?} {}x{}x{}: worst relative distance {worst:.4}",
            spec.family, spec.num_attention_heads, spec.num_key_value_heads, spec.head_dim
        );
    }
}

/// Tokens of the completions, and how far their log-probs are from those the CPU gives them: on average, and at most.
fn gaps(cpu: &mut CpuBackend, work: &[Request], completions: &[Completion]) -> (usize, f64, f64) {
    let mut batch = PackedBatch::default();
    for c in completions {
        let prompt = &work[c.request as usize].prompt;
        batch.push(&[prompt.as_slice(), &c.tokens].concat(), prompt.len());
    }
    let scores = cpu.score(&batch, 1.0, Pass::Score).unwrap();
    let found = completions.iter().flat_map(|c| &c.logprobs);
    let gaps: Vec<f64> = found
        .zip(&scores.logprobs)
        .map(|(a, b)| f64::from((a - b).abs()))
        .collect();
    assert_eq!(gaps.len(), scores.logprobs.len());
    let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
    (gaps.len(), mean, gaps.into_iter().fold(0.0, f64::max))
}

fn generate(
    backend: &mut impl Backend,
    requests: Vec<Request>,
    max_batch: usize,
) -> Vec<Completion> {
    generate_up_to(backend, requests, max_batch, 512)
}

fn generate_up_to(
    backend: &mut impl Backend,
    requests: Vec<Request>,
    max_batch: usize,
    max_model_len: usize,
) -> Vec<Completion> {
    let mut engine = Engine::new(EngineConfig {
        block_size: BLOCK_SIZE,
        kv_blocks: 1024,
        max_batch,
        max_step_tokens: 1024,
        enable_prefix_cache: true,
        max_model_len,
    })
    .unwrap();
    engine
        .generate(backend, None, &tokenizer(), requests, &mut |_| {})
        .unwrap()
}

fn tokenizer() -> Tokenizer {
    grpo_host::defaults::model().unwrap().tokenizer
}

fn requests(spec: &ModelSpec, prompts: u64, n: u32, new: u32) -> Vec<Request> {
    let prompt = |id: u64| {
        (0..20 + 13 * id)
            .map(|i| ((i * 31 + id * 7) % spec.vocab_size as u64) as u32)
            .collect()
    };
    (0..prompts)
        .map(|id| Request {
            id,
            prompt: prompt(id),
            n,
            sampling: SamplingParams {
                max_tokens: new - (id as u32 % 5),
                ignore_eos: true,
                ..SamplingParams::default()
            },
            seed: 100 + id,
        })
        .collect()
}

/// The engine on the GPU: forked prompts, bursts, ragged ends. The CPU scores what came out.
#[test]
#[ignore = "needs a GPU"]
fn log_probs_of_completions_are_those_of_the_cpu() {
    for spec in shapes() {
        let tensors = weights(&spec, 3);
        let mut cpu = CpuBackend::new(spec.clone(), &tensors, &Trainable::Nothing, false).unwrap();
        let mut gpu = CudaBackend::new(0, spec.clone(), &tensors, SIZES, cache()).unwrap();
        let work = requests(&spec, 6, 7, 70);
        let completions = generate(&mut gpu, work.clone(), 40);
        let (tokens, mean, max) = gaps(&mut cpu, &work, &completions);
        println!(
            "{:?}: {tokens} tokens, mean |Δlogp| {mean:.5}, max {max:.4}",
            spec.family,
        );
        assert!(
            mean < 0.03 && max < 0.5,
            "{:?}: mean {mean}, max {max}",
            spec.family
        );
    }
}

/// Long prompts of some completions each, whose first blocks are read once for several; ragged ends. The CPU scores what came
/// out.
#[test]
#[ignore = "needs a GPU"]
fn completions_that_share_long_prompts_are_those_of_the_cpu() {
    const SIZES: CudaSizes = CudaSizes {
        max_model_len: 1300,
        ..cuda_models::SIZES
    };
    for (heads, together) in [
        ((14, 2, 64), true),
        ((8, 1, 128), true),
        ((6, 3, 32), true),
        ((16, 1, 96), false),
    ] {
        let spec = ModelSpec {
            max_position_embeddings: 2048,
            ..spec(Family::Qwen2, heads, 515)
        };
        let tensors = weights(&spec, 3);
        let mut cpu = CpuBackend::new(spec.clone(), &tensors, &Trainable::Nothing, false).unwrap();
        let mut gpu = CudaBackend::new(0, spec.clone(), &tensors, SIZES, cache()).unwrap();
        let mut work = requests(&spec, 8, 7, 45);
        for (id, request) in work.iter_mut().enumerate() {
            let more = (0..1030 + 20 * id).map(|i| ((i * 17 + id * 5) % 515) as u32);
            request
                .prompt
                .extend(more.take(1200 - request.prompt.len()));
        }
        let completions = generate_up_to(&mut gpu, work.clone(), 64, SIZES.max_model_len);
        assert_eq!(gpu.reads_prompts_together(), together, "{heads:?}");
        let (tokens, mean, max) = gaps(&mut cpu, &work, &completions);
        println!("{heads:?}: {tokens} tokens, mean |Δlogp| {mean:.5}, max {max:.4}");
        assert!(
            mean < 0.03 && max < 0.5,
            "{heads:?}: mean {mean}, max {max}"
        );
    }
}

/// What the sampling kernel draws is what the CPU's sampler draws from the same logits and the same number: a row that
/// wants likely tokens too is drawn on the host, from a pass that is the same otherwise.
#[test]
#[ignore = "needs a GPU"]
fn draws_are_those_of_the_cpu_sampler() {
    const ROWS: usize = 60;
    for (vocab, temperature) in [(17, 1.0), (600, 0.7), (5003, 1.0), (5004, 1.3), (700, 0.0)] {
        let spec = spec(Family::Qwen2, (4, 2, 32), vocab);
        let mut gpu =
            CudaBackend::new(0, spec.clone(), &weights(&spec, 5), SIZES, cache()).unwrap();
        gpu.init_kv(ROWS, BLOCK_SIZE).unwrap();
        let params = SamplingParams {
            temperature,
            ..SamplingParams::default()
        };
        let blocks: Vec<Vec<u32>> = (0..ROWS as u32).map(|b| vec![b]).collect();
        let (mut alike, mut apart, mut all) = (0, 0f32, 0);
        for round in 0..50 {
            let prompt = [round as u32 % 17, 3, 11];
            let mut draw = |top: usize| -> Vec<Sampled> {
                let args = |s: usize| SampleArgs {
                    params: &params,
                    stream: (round * ROWS + s) as u64,
                    position: 3,
                    history: &prompt,
                    proposal: None,
                    top,
                    ahead: 0,
                };
                let rows: Vec<StepRow<'_>> = blocks
                    .iter()
                    .enumerate()
                    .map(|(s, blocks)| StepRow {
                        sequence: s as u64,
                        tokens: &prompt,
                        position: 0,
                        blocks,
                        sample: Some(args(s)),
                    })
                    .collect();
                gpu.step(&rows).unwrap().concat()
            };
            for (device, host) in draw(0).into_iter().zip(draw(1)) {
                all += 1;
                if device.token == host.token {
                    alike += 1;
                    apart = apart.max((device.logprob - host.logprob).abs());
                }
            }
        }
        println!(
            "vocabulary {vocab}, temperature {temperature}: {alike} of {all} alike, log-probs within {apart:.1e}"
        );
        // A number within rounding of a border may fall on either side.
        assert!(all == 50 * ROWS && alike + 3 >= all, "{alike} of {all}");
        assert!(apart < 1e-4, "{apart}");
    }
}
