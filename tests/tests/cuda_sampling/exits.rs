//! What drafts draw from: the early exit, and a penalty.

use std::collections::BTreeMap;

use candle_core::Tensor;
use grpo_policy::{
    backend::{
        Backend, Drafted, Exit, SampleArgs, StepRow,
        cpu::{CpuBackend, Trainable},
        cuda::BLOCK_SIZE,
    },
    spec::Family,
    types::SamplingParams,
};

use crate::{
    args, backend,
    cuda_models::{spec, weights},
};

/// The exit's head on the device is the CPU's: trained weights, its layers, its formula.
#[test]
#[ignore = "needs a GPU"]
fn the_early_exit_is_that_of_the_cpu() {
    for family in [Family::Qwen2, Family::Llama] {
        let spec = spec(family, (14, 2, 64), 1009);
        let tensors = weights(&spec, 30);
        let mut cpu = CpuBackend::new(spec.clone(), &tensors, &Trainable::Nothing, false).unwrap();
        let mut gpu = backend(&spec, &tensors);
        cpu.init_kv(256, BLOCK_SIZE).unwrap();
        let h = spec.hidden_size;
        let wave = |n: usize| (0..n).map(|i| ((i * 37) % 101) as f32 / 101.0 - 0.5);
        let adapter: Vec<f32> = wave(h * h).map(|x| x * 0.2).collect();
        let norm: Vec<f32> = wave(h).map(|x| 1.0 + x).collect();
        let device = candle_core::Device::Cpu;
        let head = BTreeMap::from([
            (
                "draft_head.adapter.weight".to_owned(),
                Tensor::from_vec(adapter, (h, h), &device).unwrap(),
            ),
            (
                "draft_head.norm.weight".to_owned(),
                Tensor::from_vec(norm, h, &device).unwrap(),
            ),
        ]);
        for trained in [None, Some(&head)] {
            cpu.add_early_exit(2, trained).unwrap();
            gpu.add_early_exit(2, trained).unwrap();
            let params = SamplingParams::default();
            let text: Vec<u32> = (0..40).map(|i| i * 7919 % 1009).collect();
            // A prompt, a single token, two tokens.
            for (from, to) in [(0, 20), (20, 21), (21, 23)] {
                let blocks: Vec<[u32; 2]> = (0..11).map(|b| [2 * b, 2 * b + 1]).collect();
                let row = |s: usize| StepRow {
                    sequence: s as u64,
                    tokens: &text[from + s..to + s],
                    position: from,
                    blocks: &blocks[s],
                    sample: Some(args(&params, s as u64, to, None, 0)),
                };
                let rows: Vec<StepRow<'_>> = (0..11).map(row).collect();
                let expected = cpu.propose(&rows, Exit::Early).unwrap();
                let found = gpu.propose(&rows, Exit::Early).unwrap();
                let mut worst = 0f32;
                for (e, f) in expected.iter().zip(&found) {
                    let (e, f) = (
                        e.distribution.dense().unwrap(),
                        f.distribution.dense().unwrap(),
                    );
                    let apart: f32 = e.iter().zip(&f[..]).map(|(a, b)| (a - b).abs()).sum();
                    worst = worst.max(apart / 2.0);
                }
                println!(
                    "{family:?}, trained {}, tokens {from}..{to}: total variation {worst:.4}",
                    trained.is_some()
                );
                assert!(worst < 0.06, "{worst}");
            }
        }
        assert!(gpu.add_early_exit(0, None).is_err() && gpu.add_early_exit(3, None).is_err());
    }
}

/// A penalty needs the text, so such a draft is drawn on the host: with the CPU's probabilities.
#[test]
#[ignore = "needs a GPU"]
fn a_draft_with_a_penalty_has_the_probabilities_of_the_cpu() {
    let spec = spec(Family::Qwen2, (14, 2, 64), 1009);
    let tensors = weights(&spec, 30);
    let mut cpu = CpuBackend::new(spec.clone(), &tensors, &Trainable::Nothing, false).unwrap();
    let mut gpu = backend(&spec, &tensors);
    cpu.init_kv(256, BLOCK_SIZE).unwrap();
    let params = SamplingParams {
        repetition_penalty: 1.5,
        ..SamplingParams::default()
    };
    let text: Vec<u32> = (0..12).map(|i| i * 7919 % 1009).collect();
    let row = |history| StepRow {
        sequence: 0,
        tokens: &text,
        position: 0,
        blocks: &[0],
        sample: Some(SampleArgs {
            history,
            ..args(&params, 3, 12, None, 0)
        }),
    };
    let tokens: Vec<u32> = (0..1009).filter(|t| t % 2 == 0).collect();
    let of = |drafted: Vec<Drafted>| drafted[0].distribution.dense().unwrap().into_owned();
    let expected = of(cpu.propose(&[row(&tokens)], Exit::Final).unwrap());
    let found = of(gpu.propose(&[row(&tokens)], Exit::Final).unwrap());
    let without = of(gpu.propose(&[row(&[])], Exit::Final).unwrap());
    let variation =
        |a: &[f32], b: &[f32]| -> f32 { a.iter().zip(b).map(|(a, b)| (a - b).abs() / 2.0).sum() };
    let (same, other) = (variation(&expected, &found), variation(&expected, &without));
    println!("total variation {same:.4}, without the penalty {other:.4}");
    assert!(same < 0.06 && other > 0.1);
}
