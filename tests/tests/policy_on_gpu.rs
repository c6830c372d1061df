//! A whole [`Policy`] on a GPU beside the same one on the CPU: greedy completions, drafts, preemption, and memory. Needs a
//! GPU, so CI leaves it out; `cargo test --release --test policy_on_gpu -- --ignored --nocapture --test-threads 1`.
#![allow(
    clippy::unwrap_used,
    reason = "clippy counts only functions marked as tests as tests"
)]

use grpo_host::{
    cli::Environment,
    config::{Device, DraftKind, DraftTokens, QuantizedWeights, RunConfig},
    defaults, draft,
    placement::{Capacity, Passes, Place},
    policy::{Mode, Policy},
    types::Row,
};
use grpo_policy::{
    backend::{
        Backend, Pass,
        cuda::{Budget, CudaSizes, survey},
    },
    spec::{Family, ModelSpec},
    types::{Completion, PackedBatch, Request, SamplingParams},
    weights::{LoadedModel, Quantized, random_weights},
};

/// Compiled kernels are kept for the other tests.
fn place(device: Device) -> Place {
    Place {
        device,
        replicas: 1,
        gpu_memory_utilization: 0.5,
        cache: Some(env!("CARGO_TARGET_TMPDIR").into()),
        deterministic: false,
        quantized_weights: QuantizedWeights::Auto,
    }
}

const ROOMY: Capacity = Capacity {
    max_batch: None,
    max_model_len: 128,
    kv_tokens: None,
};

fn embedded(device: Device, capacity: Capacity) -> Policy {
    let model = defaults::model().unwrap();
    let place = place(device);
    Policy::new(
        model,
        "embedded",
        Mode::Inference,
        Passes::default(),
        capacity,
        &place,
    )
    .unwrap()
}

/// Greedy ones for the first held-out problems.
fn requests(policy: &Policy, prompts: usize, max_tokens: u32) -> Vec<Request> {
    let request = |(id, row): (usize, &Row)| {
        let question = row.json["question"].as_str().unwrap();
        Request {
            id: id as u64,
            prompt: policy.tokenizer.encode_prompt(question).unwrap(),
            n: 1,
            sampling: SamplingParams {
                temperature: 0.0,
                max_tokens,
                ignore_eos: true,
                ..SamplingParams::default()
            },
            seed: 7,
        }
    };
    let rows = defaults::heldout_rows().unwrap().rows;
    rows.iter().take(prompts).enumerate().map(request).collect()
}

/// Completions, and how many sequences lost their blocks on the way.
fn greedy(policy: &mut Policy, prompts: usize, max_tokens: u32) -> (Vec<Completion>, usize) {
    let requests = requests(policy, prompts, max_tokens);
    let mut preempted = 0;
    let completions = policy.generate(requests, &mut |p| preempted += p.preempted);
    (completions.unwrap(), preempted)
}

/// Most that two tokens may be apart, in nats by the CPU, for bf16 to take one for the other.
const NEAR: f32 = 0.2;

/// Completions with the same tokens. Two that part do so where the CPU finds both tokens nearly alike: numbers in bf16
/// depend on what else is in a batch.
fn alike(cpu: &mut Policy, a: &[Completion], b: &[Completion]) -> usize {
    assert_eq!(a.len(), b.len());
    let mut apart = Vec::new();
    for (request, (a, b)) in requests(cpu, a.len(), 1).iter().zip(a.iter().zip(b)) {
        assert_eq!(a.tokens.len(), b.tokens.len());
        let Some(at) = (0..a.tokens.len()).find(|&at| a.tokens[at] != b.tokens[at]) else {
            continue;
        };
        let mut batch = PackedBatch::default();
        for tokens in [&a.tokens, &b.tokens] {
            let text = [&request.prompt[..], &tokens[..=at]].concat();
            batch.push(&text, text.len() - 1);
        }
        let scores = cpu
            .replicas
            .first_mut()
            .backend
            .score(&batch, 1.0, Pass::Score)
            .unwrap();
        apart.push((scores.logprobs[0] - scores.logprobs[1]).abs());
    }
    println!("parted at tokens that are apart by {apart:.3?}");
    assert!(apart.iter().all(|gap| *gap < NEAR), "{apart:?}");
    a.len() - apart.len()
}

#[test]
#[ignore = "needs a GPU"]
fn greedy_completions_are_those_of_the_cpu() {
    let mut cpu = embedded(Device::Cpu, ROOMY);
    let mut gpu = embedded(Device::Auto, ROOMY);
    println!("{}", gpu.memory_plan().unwrap());
    assert!(gpu.device().starts_with("cuda:0 ") && cpu.device() == "cpu");
    let (expected, found) = (greedy(&mut cpu, 64, 24).0, greedy(&mut gpu, 64, 24).0);
    let same = alike(&mut cpu, &expected, &found);
    println!("greedy on CPU and GPU: {same} of 64 completions alike");
    assert!(same >= 58, "{same}");
}

#[test]
#[ignore = "needs a GPU"]
fn drafts_leave_greedy_completions_as_they_are() {
    let mut cpu = embedded(Device::Cpu, ROOMY);
    let (plain, _) = greedy(&mut embedded(Device::Cuda(0), ROOMY), 64, 24);
    let environment = Environment::default();
    for kind in ["ngram", "suffix", "model:embedded"] {
        let mut policy = embedded(Device::Cuda(0), ROOMY);
        let mut config = RunConfig::default();
        config.generation.draft = kind.parse::<DraftKind>().unwrap();
        config.generation.draft_tokens = DraftTokens::Fixed(3);
        draft::attach(&mut policy, &config, false, &environment, &mut |_| {}).unwrap();
        let (found, _) = greedy(&mut policy, 64, 24);
        let total = |of: fn(&Completion) -> u32| found.iter().map(of).sum::<u32>();
        let (drafted, accepted) = (
            total(|c| c.telemetry.draft_tokens),
            total(|c| c.telemetry.accepted_tokens),
        );
        let same = alike(&mut cpu, &plain, &found);
        println!("{kind}: {same} of 64 alike, {accepted} of {drafted} accepted");
        assert!(drafted > 0 && accepted > 0 && same >= 58, "{kind}: {same}");
        assert_eq!(
            policy.memory_plan().unwrap().draft > 0,
            kind == "model:embedded"
        );
    }
}

/// Forty blocks for 64 sequences of up to three: some give theirs back and are computed again.
#[test]
#[ignore = "needs a GPU"]
fn preempted_sequences_end_with_the_same_tokens() {
    let mut cpu = embedded(Device::Cpu, ROOMY);
    let mut roomy = embedded(Device::Cuda(0), ROOMY);
    let few = Capacity {
        kv_tokens: Some(40 * 32),
        ..ROOMY
    };
    let mut tight = embedded(Device::Cuda(0), few);
    assert_eq!(tight.memory_plan().unwrap().kv_blocks, 40);
    let (expected, none) = greedy(&mut roomy, 64, 64);
    let (found, preempted) = greedy(&mut tight, 64, 64);
    let same = alike(&mut cpu, &expected, &found);
    println!("preempted {preempted} times: {same} of 64 completions alike");
    assert!(none == 0 && preempted > 10 && same >= 54, "{same}");
}

/// A model large enough for its memory to be seen.
fn half_billion() -> LoadedModel {
    let spec = ModelSpec {
        family: Family::Qwen2,
        vocab_size: 151_936,
        hidden_size: 896,
        intermediate_size: 4864,
        num_hidden_layers: 24,
        num_attention_heads: 14,
        num_key_value_heads: 2,
        head_dim: 64,
        max_position_embeddings: 1 << 20,
        rms_norm_eps: 1e-6,
        rope_theta: 1e6,
        rope_scaling: None,
        tie_word_embeddings: true,
        qkv_bias: true,
        o_bias: false,
        qk_norm: false,
    };
    LoadedModel {
        tensors: random_weights(&spec, 1).unwrap(),
        quantized: Quantized::new(),
        tokenizer: defaults::model().unwrap().tokenizer,
        spec,
    }
}

/// The plan is what the driver says afterwards, and a share that is too small is refused with numbers.
#[test]
#[ignore = "needs a GPU"]
fn memory_is_as_planned() {
    let free = || survey().unwrap().gpus[0].memory.0;
    let model = half_billion();
    let capacity = Capacity {
        max_model_len: 2048,
        ..ROOMY
    };
    let build = |share: f64, capacity: Capacity| {
        let model = LoadedModel {
            spec: model.spec.clone(),
            tensors: model.tensors.clone(),
            quantized: Quantized::new(),
            tokenizer: defaults::model().unwrap().tokenizer,
        };
        let place = Place {
            gpu_memory_utilization: share,
            ..place(Device::Cuda(0))
        };
        Policy::new(
            model,
            "random",
            Mode::Inference,
            Passes::default(),
            capacity,
            &place,
        )
    };
    let total = survey().unwrap().gpus[0].memory.1 as f64;
    let long = Capacity {
        max_model_len: 1 << 20,
        ..capacity
    };
    for (share, capacity, words) in [
        (1e9, capacity, "the model needs "),
        (4e9, long, "one sequence of 1048576 tokens needs "),
    ] {
        let error = build(share / total, capacity).err().unwrap().to_string();
        println!("{:.0} MB: {error}", share / 1e6);
        assert!(error.starts_with(words), "{error}");
    }
    let mut policy = build(0.9, capacity).unwrap();
    let plan = policy.memory_plan().unwrap().clone();
    println!("{plan}");
    // What `placement.rs` asks for. What the estimate leaves out must fit in the reserve of 256 MiB.
    let sizes = CudaSizes {
        max_step_tokens: 8192,
        max_batch: 256,
        max_model_len: 2048,
    };
    let estimate = Budget::open(0, 0.9).unwrap().workspace(&model.spec, &sizes);
    println!("workspace estimated at {} MiB", estimate >> 20);
    assert!(plan.workspace >= estimate && plan.workspace - estimate < 256 << 20);
    for batch in [1, 3, 8, 24, 64, 200] {
        greedy(&mut policy, batch, 40);
    }
    let (planned, found) = (plan.free >> 20, free() >> 20);
    println!("planned {planned} MiB free, found {found} MiB");
    assert!(planned.abs_diff(found) < 64);
    drop(policy);
    // What is left is graphs' and the driver's own.
    println!(
        "{} MiB free of {} without the policy",
        free() >> 20,
        plan.total >> 20
    );
}
