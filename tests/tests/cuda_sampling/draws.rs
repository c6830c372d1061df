//! Draws from logits: truncated, tied, not finite, in bursts.

use candle_core::Tensor;
use grpo_policy::{
    backend::{Backend, SampleArgs, Sampled, StepRow, cuda::CudaBackend},
    engine::sampler::Proposal,
    spec::Family,
    types::SamplingParams,
    weights::random_weights,
};

use crate::{
    Agreement, args, backend,
    cuda_models::{spec, weights},
    params,
};

/// Draws for rows of three tokens; what wants likely tokens too is drawn by the CPU's sampler on the same logits.
fn draw(
    gpu: &mut CudaBackend,
    params: &[SamplingParams],
    round: usize,
    top: usize,
) -> Vec<Vec<Sampled>> {
    const ROWS: usize = 39;
    let tokens = [round as u32 % 17, 3, 11];
    let blocks: Vec<[u32; 1]> = (0..ROWS as u32).map(|b| [b]).collect();
    let row = |s: usize| StepRow {
        sequence: s as u64,
        tokens: &tokens,
        position: 0,
        blocks: &blocks[s],
        sample: Some(SampleArgs {
            params: &params[s % params.len()],
            stream: (round * ROWS + s) as u64,
            position: 3,
            history: &tokens,
            proposal: None,
            top,
            ahead: 0,
        }),
    };
    let rows: Vec<StepRow<'_>> = (0..ROWS).map(row).collect();
    gpu.step(&rows).unwrap()
}

#[test]
#[ignore = "needs a GPU"]
fn truncated_draws_are_those_of_the_cpu() {
    for (vocab, flat, rounds) in [
        (17, false, 40),
        (600, false, 40),
        (5003, false, 40),
        (32_000, false, 12),
        (151_936, false, 6),
        (151_936, true, 6),
    ] {
        let spec = spec(Family::Qwen2, (4, 2, 32), vocab);
        let tensors = match flat {
            true => random_weights(&spec, 5).unwrap(),
            false => weights(&spec, 5),
        };
        let mut gpu = backend(&spec, &tensors);
        let params = params();
        let mut agreement = Agreement::default();
        for round in 0..rounds {
            let device = draw(&mut gpu, &params, round, 0);
            for (d, h) in device.iter().zip(&draw(&mut gpu, &params, round, 1)) {
                agreement.add(d, h);
            }
        }
        agreement.check(&format!("vocabulary {vocab}, flat {flat}"), 200);
    }
}

/// Ties: the ranking among equal logits is that of ids, and every id can be drawn.
#[test]
#[ignore = "needs a GPU"]
fn equal_logits_are_ranked_by_id() {
    for vocab in [17, 5003, 20_011] {
        let spec = spec(Family::Qwen2, (4, 2, 32), vocab);
        let mut tensors = weights(&spec, 5);
        let shape = [vocab, spec.hidden_size];
        let ones = Tensor::ones(&shape, candle_core::DType::F32, &candle_core::Device::Cpu);
        tensors.insert("model.embed_tokens.weight".to_owned(), ones.unwrap());
        let mut gpu = backend(&spec, &tensors);
        let params = params();
        let (mut agreement, mut largest) = (Agreement::default(), 0);
        for round in 0..20 {
            let device = draw(&mut gpu, &params, round, 0);
            for (d, h) in device.iter().zip(&draw(&mut gpu, &params, round, 1)) {
                agreement.add(d, h);
                largest = largest.max(d[0].token);
            }
        }
        agreement.check(&format!("vocabulary {vocab}, all equal"), 1000);
        assert!(largest as usize > vocab * 9 / 10, "{largest} of {vocab}");
    }
}

#[test]
#[ignore = "needs a GPU"]
fn logits_that_are_not_finite_are_an_error_and_never_a_token() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let spec = spec(Family::Llama, (4, 2, 32), 600);
        let mut tensors = weights(&spec, 5);
        let head = tensors["lm_head.weight"].flatten_all().unwrap();
        let mut head: Vec<f32> = head.to_vec1().unwrap();
        head[321 * spec.hidden_size] = bad;
        let shape = [spec.vocab_size, spec.hidden_size];
        let head = Tensor::from_vec(head, &shape, &candle_core::Device::Cpu).unwrap();
        tensors.insert("lm_head.weight".to_owned(), head);
        let mut gpu = backend(&spec, &tensors);
        let tokens = [1, 2, 3, 4];
        let proposal = Proposal {
            tokens: vec![3, 4],
            probabilities: Vec::new(),
        };
        for params in params() {
            for proposal in [None, Some(&proposal)] {
                let row = StepRow {
                    sequence: 0,
                    tokens: &tokens,
                    position: 0,
                    blocks: &[0],
                    sample: Some(SampleArgs {
                        params: &params,
                        stream: 1,
                        position: 4,
                        history: &tokens[..2],
                        proposal,
                        top: 0,
                        ahead: 0,
                    }),
                };
                let error = gpu.step(std::slice::from_ref(&row)).unwrap_err();
                assert!(error.to_string().contains("finite"), "{bad}: {error}");
            }
        }
    }
}

/// Single tokens, truncated, in bursts, are those that the host draws one by one.
#[test]
#[ignore = "needs a GPU"]
fn truncated_bursts_are_single_draws_in_a_row() {
    let spec = spec(Family::Qwen2, (14, 2, 64), 1009);
    let mut gpu = backend(&spec, &weights(&spec, 4));
    let params = params();
    let blocks: Vec<[u32; 2]> = (0..21).map(|b| [2 * b, 2 * b + 1]).collect();
    let mut run = |ahead: usize, tokens: &[u32], position: usize| -> Vec<Vec<Sampled>> {
        let row = |s: usize| StepRow {
            sequence: s as u64,
            tokens: &tokens[s..=s],
            position,
            blocks: &blocks[s],
            sample: Some(SampleArgs {
                ahead,
                ..args(&params[s % params.len()], s as u64, position + 1, None, 0)
            }),
        };
        let rows: Vec<StepRow<'_>> = (0..blocks.len()).map(row).collect();
        gpu.step(&rows).unwrap()
    };
    let first: Vec<u32> = (0..21).map(|s| s * 31 % 1009).collect();
    let burst = run(15, &first, 0);
    let mut last = first;
    for step in 0..16 {
        let single = run(0, &last, step);
        for ((single, burst), last) in single.iter().zip(&burst).zip(&mut last) {
            assert_eq!(single[0], burst[step], "step {step}");
            *last = single[0].token;
        }
    }
}
