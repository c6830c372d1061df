//! An update whose groups share their prompts beside the same without.

use grpo_policy::{backend::cpu::Trainable, types::Telemetry};

use super::*;

fn completion(index: u32, tokens: &[u32]) -> Completion {
    let logprobs = vec![-2.0; tokens.len()];
    Completion {
        request: 0,
        index,
        tokens: tokens.to_vec(),
        logprobs: logprobs.clone(),
        policy_logprobs: logprobs,
        text: String::new(),
        finish: Finish::Stop,
        telemetry: Telemetry::default(),
        drafts: 0,
        accepted_per_pos: Vec::new(),
        top: Vec::new(),
    }
}

const PROMPTS: [&[u32]; 3] = [&[40, 41, 42, 43], &[50, 51], &[60]];

/// Completions of the prompts, by number of the prompt.
fn completions() -> Vec<(usize, Completion)> {
    let all: [(usize, &[u32]); 6] = [
        (0, &[70, 71, 72]),
        (0, &[73]),
        (0, &[74, 75]),
        (1, &[76, 77]),
        (2, &[78, 79, 80]),
        (2, &[81, 82]),
    ];
    let numbered = all.into_iter().enumerate();
    numbered
        .map(|(i, (prompt, tokens))| (prompt, completion(i as u32, tokens)))
        .collect()
}

fn sequences(completions: &[(usize, Completion)]) -> Vec<Sequence<'_>> {
    let numbered = completions.iter().enumerate();
    numbered
        .map(|(i, (prompt, completion))| Sequence {
            prompt_ids: PROMPTS[*prompt],
            completion,
            advantage: if i % 2 == 0 { 1.0 } else { -0.5 },
        })
        .collect()
}

#[test]
fn a_shared_prompt_is_packed_once_and_counts_once() {
    let completions = completions();
    let all = sequences(&completions);
    let ids: Vec<_> = all.iter().map(Sequence::ids).collect();
    let batch = pack(&ids, true);
    assert_eq!(batch.cu_seqlens, [0, 4, 7, 8, 10, 14, 15, 18, 20]);
    let prefixes = [
        None,
        Some(0),
        Some(0),
        Some(0),
        None,
        None,
        Some(5),
        Some(5),
    ];
    assert_eq!(batch.prefixes, prefixes);
    let whole = pack(&ids, false);
    assert_eq!(whole.prefixes, [None; 6]);
    let targets = |b: &PackedBatch| b.targets().map(|t| b.ids[t]).collect::<Vec<u32>>();
    assert_eq!(targets(&batch), targets(&whole));
    assert_eq!(targets(&batch), (70..83).collect::<Vec<u32>>());
    let sizes =
        |limit, share| -> Vec<usize> { split(&all, limit, share).map(<[_]>::len).collect() };
    assert_eq!(sizes(10, true), [3, 3]);
    assert_eq!(sizes(10, false), [1, 1, 2, 2]);
    assert_eq!(sizes(9, true), [2, 1, 2, 1]);
    assert_eq!(sizes(1, true), [1; 6]);
}

#[test]
fn the_update_is_the_same_with_fewer_tokens() {
    let model = crate::defaults::model().unwrap();
    let completions = completions();
    let trainable = Trainable::Full {
        keep_reference: true,
    };
    let report = |share_prompts: bool| {
        let mut backend =
            AnyBackend::cpu(model.spec.clone(), &model.tensors, &trainable, false).unwrap();
        let config = UpdateConfig {
            loss: LossConfig {
                beta: 0.1,
                ..LossConfig::default()
            },
            micro_batch_tokens: 12,
            share_prompts,
            num_iterations: 2,
            recompute_old_logprobs: true,
            temperature: 0.9,
            max_completion_length: 3,
        };
        let optimizer = OptimStep {
            learning_rate: 1e-4,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.0,
            max_grad_norm: 1.0,
        };
        let all = sequences(&completions);
        let normalisers = normalisers(&all, &config);
        update_share(&mut backend, (&all, &normalisers), &config, &optimizer).unwrap()
    };
    let (whole, shared) = (report(false), report(true));
    assert_eq!((whole.tokens, shared.tokens), (2 * 29, 2 * 20));
    for (name, a, b) in [
        ("loss", whole.loss, shared.loss),
        ("gradient", whole.grad_norm, shared.grad_norm),
        ("entropy", whole.stats.entropy.sum, shared.stats.entropy.sum),
    ] {
        assert!((a - b).abs() < 1e-4 * a.abs(), "{name}: {a} and {b}");
    }
    assert!(whole.grad_norm > 0.1, "{}", whole.grad_norm);
}
