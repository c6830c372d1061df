//! What a step costs, by how it draws and how much it verifies.

use std::{path::Path, time::Instant};

use grpo_policy::{
    backend::{
        Backend, Exit, SampleArgs, StepRow,
        cuda::{BLOCK_SIZE, CudaBackend, CudaSizes},
    },
    engine::sampler::Proposal,
    spec::ModelSpec,
    types::SamplingParams,
    weights::random_weights,
};

use crate::{args, cuda_models::cache};

/// One shape of step to be timed.
struct Timed<'a> {
    params: &'a SamplingParams,
    proposals: Option<&'a [Proposal]>,
    ahead: usize,
    draft: Option<Exit>,
}

const TOKENS: [u32; 5] = [1, 2, 3, 4, 5];

/// Tokens in the cache of every sequence.
const CONTEXT: usize = 256;

/// Milliseconds of a step of the batch.
fn milliseconds(gpu: &mut CudaBackend, batch: usize, timed: &Timed<'_>) -> f64 {
    let blocks = blocks(batch);
    let row = |s: usize| {
        let proposal = timed.proposals.map(|p| &p[s]);
        StepRow {
            sequence: s as u64,
            tokens: &TOKENS[..1 + proposal.map_or(0, |p| p.tokens.len())],
            position: CONTEXT,
            blocks: &blocks[s],
            sample: Some(SampleArgs {
                ahead: timed.ahead,
                ..args(timed.params, s as u64, CONTEXT + 1, proposal, 0)
            }),
        }
    };
    let rows: Vec<StepRow<'_>> = (0..batch).map(row).collect();
    let mut run = || match timed.draft {
        None => drop(gpu.step(&rows).unwrap()),
        Some(exit) => drop(gpu.propose(&rows, exit).unwrap()),
    };
    const ROUNDS: usize = 20;
    (0..3).for_each(|_| run());
    let started = Instant::now();
    (0..ROUNDS).for_each(|_| run());
    started.elapsed().as_secs_f64() * 1e3 / ROUNDS as f64 / (timed.ahead + 1) as f64
}

fn blocks(batch: usize) -> Vec<Vec<u32>> {
    let of = |s: u32| (0..16).map(|b| s * 16 + b).collect();
    (0..batch as u32).map(of).collect()
}

/// Proposals of [`TOKENS`] with probabilities that stay on the GPU.
fn by_model(gpu: &mut CudaBackend, batch: usize, params: &SamplingParams) -> Vec<Proposal> {
    let (blocks, mut all) = (blocks(batch), vec![Proposal::default(); batch]);
    for i in 1..TOKENS.len() {
        let row = |s: usize| StepRow {
            sequence: s as u64,
            tokens: &TOKENS[i - 1..i],
            position: CONTEXT + i - 1,
            blocks: &blocks[s],
            sample: Some(args(params, s as u64, CONTEXT + i, None, 0)),
        };
        let rows: Vec<StepRow<'_>> = (0..batch).map(row).collect();
        for (proposal, drafted) in all.iter_mut().zip(gpu.propose(&rows, Exit::Final).unwrap()) {
            proposal.tokens.push(TOKENS[i]);
            proposal.probabilities.push(drafted.distribution);
        }
    }
    all
}

/// A Qwen2.5-0.5B with random weights: what a step costs, and what a verification.
#[test]
#[ignore = "needs a GPU"]
fn what_steps_cost() {
    let shape = include_bytes!("../../../host/src/commands/shapes/qwen2.5-0.5b.json");
    let spec = ModelSpec::from_config_json(shape, Path::new("qwen2.5-0.5b.json")).unwrap();
    let sizes = CudaSizes {
        max_step_tokens: 8192,
        max_batch: 64,
        max_model_len: 1024,
    };
    let tensors = random_weights(&spec, 1).unwrap();
    let mut gpu = CudaBackend::new(0, spec.clone(), &tensors, sizes, cache()).unwrap();
    gpu.add_early_exit(6, None).unwrap();
    gpu.init_kv(64 * 16, BLOCK_SIZE).unwrap();
    let of = |temperature: f32, top_p: f32, min_p: f32| SamplingParams {
        temperature,
        top_p,
        min_p,
        ..SamplingParams::default()
    };
    // The logits are nearly flat: at 0.1 few tokens are left, as with a trained model, at 1 a hundred thousand.
    let (plain, few, minimum) = (of(1.0, 1.0, 0.0), of(0.1, 0.95, 0.0), of(0.1, 1.0, 0.05));
    let many = of(1.0, 0.95, 0.0);
    for batch in [1, 16, 64] {
        let certain = Proposal {
            tokens: TOKENS[1..].to_vec(),
            probabilities: Vec::new(),
        };
        let certain = vec![certain; batch];
        let drafted = by_model(&mut gpu, batch, &plain);
        let step = |params, ahead| Timed {
            params,
            proposals: None,
            ahead,
            draft: None,
        };
        let verify = |params, proposals| Timed {
            proposals: Some(proposals),
            ..step(params, 0)
        };
        let draft = |exit| Timed {
            draft: Some(exit),
            ..step(&plain, 0)
        };
        for (name, timed) in [
            ("plain", step(&plain, 0)),
            ("nucleus", step(&few, 0)),
            ("min-p", step(&minimum, 0)),
            ("nucleus of 100,000", step(&many, 0)),
            ("plain, in bursts", step(&plain, 15)),
            ("nucleus, in bursts", step(&few, 15)),
            ("verify 4 of ngram", verify(&plain, &certain)),
            ("the same, nucleus", verify(&few, &certain)),
            ("verify 4 of a model", verify(&plain, &drafted)),
            ("draft", draft(Exit::Final)),
            ("draft, layers:6", draft(Exit::Early)),
        ] {
            let took = milliseconds(&mut gpu, batch, &timed);
            println!("batch {batch:2} {name:20} {took:.3} ms");
            assert!(took < 50.0);
        }
    }
}
