//! Truncated draws, verification and drafting on the GPU beside the CPU's, on the same logits and from end to end. Needs a
//! GPU, so CI leaves it out; run it with `cargo test --release --test cuda_sampling -- --ignored --nocapture
//! --test-threads 1`.

mod cuda_models;

use std::{collections::BTreeMap, path::Path, time::Instant};

use candle_core::Tensor;
use cuda_models::{SIZES, cache, spec, weights};
use grpo_policy::{
    backend::{
        Backend, Drafted, Exit, SampleArgs, Sampled, StepRow,
        cpu::{CpuBackend, Trainable},
        cuda::{BLOCK_SIZE, CudaBackend, CudaSizes},
    },
    engine::{
        Engine, EngineConfig,
        draft::{Draft, Length, Model, Source, Suffix},
        sampler::{Distribution, Proposal},
    },
    spec::{Family, ModelSpec},
    types::{Completion, Request, SamplingParams},
    weights::random_weights,
};

/// Parameters that differ from row to row of one batch.
fn params() -> Vec<SamplingParams> {
    let of = |temperature: f32, top_k: u32, top_p: f32, min_p: f32| SamplingParams {
        temperature,
        top_k,
        top_p,
        min_p,
        ..SamplingParams::default()
    };
    vec![
        of(1.0, 0, 0.9, 0.0),
        of(0.7, 1, 1.0, 0.0),
        of(1.3, 20, 1.0, 0.0),
        of(1.0, 0, 1e-4, 0.0),
        of(1.0, 0, 1.0, 0.05),
        of(2.5, 1_000_000, 1.0, 0.0),
        of(1.0, 0, 1.0, 0.0),
        of(0.8, 50, 0.95, 0.02),
        of(0.0, 5, 0.5, 0.1),
        of(3.0, 0, 0.999, 0.0),
        of(1.0, 7000, 0.6, 0.0),
        of(0.2, 0, 0.5, 1.0),
        of(10.0, 12, 0.3, 1e-7),
    ]
}

fn backend(spec: &ModelSpec, tensors: &BTreeMap<String, Tensor>) -> CudaBackend {
    let mut gpu = CudaBackend::new(0, spec.clone(), tensors, SIZES, cache()).unwrap();
    gpu.init_kv(256, BLOCK_SIZE).unwrap();
    gpu
}

/// How two lists of draws compare.
#[derive(Default)]
struct Agreement {
    all: usize,
    other: usize,
    apart: f32,
}

impl Agreement {
    fn add(&mut self, device: &[Sampled], host: &[Sampled]) {
        self.all += 1;
        if device.len() != host.len() || device.iter().zip(host).any(|(d, h)| d.token != h.token) {
            self.other += 1;
            return;
        }
        for (d, h) in device.iter().zip(host) {
            let apart = (d.logprob - h.logprob).abs();
            let policy = (d.policy_logprob - h.policy_logprob).abs();
            assert!(apart.is_finite() && policy.is_finite());
            self.apart = self.apart.max(apart).max(policy);
        }
    }

    /// A number within rounding of a border may fall on either side: one draw in so many.
    fn check(&self, name: &str, one_in: usize) {
        println!(
            "{name}: {} of {} differ, log-probs within {:.1e}",
            self.other, self.all, self.apart
        );
        assert!(
            self.other <= 2 + self.all / one_in,
            "{name}: {} of {}",
            self.other,
            self.all
        );
        assert!(self.apart < 2e-4, "{name}: {}", self.apart);
    }
}

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

/// Sequences of eight tokens in the cache, and proposals of one to eight tokens behind most of them.
struct Verification {
    blocks: Vec<Vec<u32>>,
    tokens: Vec<Vec<u32>>,
    proposals: Vec<Proposal>,
    params: Vec<SamplingParams>,
}

const CACHED: usize = 8;

impl Verification {
    /// Drafted by the model itself at its own temperature, or by nobody (`certain`).
    fn new(gpu: &mut CudaBackend, rows: usize, certain: bool) -> Self {
        let vocab = gpu.spec().vocab_size as u32;
        let text = |s: usize| -> Vec<u32> {
            let of = |i: usize| ((s * 131 + i * 7919) % 1000) as u32 % vocab;
            (0..=CACHED).map(of).collect()
        };
        let mut all = Self {
            blocks: (0..rows as u32).map(|b| vec![2 * b, 2 * b + 1]).collect(),
            tokens: (0..rows).map(text).collect(),
            proposals: vec![Proposal::default(); rows],
            params: params(),
        };
        let sharper = SamplingParams {
            temperature: 0.8,
            top_k: 40,
            ..SamplingParams::default()
        };
        // The texts before go into the cache with the first round.
        for round in 0..8 {
            let from = if round == 0 { 0 } else { CACHED + round };
            let row = |s: usize| StepRow {
                tokens: &all.tokens[s][from..],
                position: from,
                blocks: &all.blocks[s],
                sample: Some(args(&sharper, s as u64, CACHED + 1 + round, None, 0)),
            };
            let step: Vec<StepRow<'_>> = (0..rows).map(row).collect();
            let drafted = gpu.propose(&step, Exit::Final).unwrap();
            for (s, drafted) in drafted.into_iter().enumerate() {
                all.tokens[s].push(drafted.token);
                let proposal = &mut all.proposals[s];
                if proposal.tokens.len() < s % 9 {
                    proposal.tokens.push(drafted.token);
                    // Every third on the host, as from a draft elsewhere.
                    let q = match s % 3 {
                        0 => Distribution::Host(drafted.distribution.dense().unwrap().into_owned()),
                        _ => drafted.distribution,
                    };
                    proposal.probabilities.extend((!certain).then_some(q));
                }
            }
        }
        for (s, tokens) in all.tokens.iter_mut().enumerate() {
            tokens.truncate(CACHED + 1 + s % 9);
        }
        all
    }

    /// `beside`: a row that keeps the graph away, so that device and host see the same logits.
    fn run(
        &self,
        gpu: &mut CudaBackend,
        round: u64,
        top: usize,
        beside: bool,
    ) -> Vec<Vec<Sampled>> {
        let row = |s: usize| {
            let proposal = (s % 9 > 0).then_some(&self.proposals[s]);
            let params = &self.params[s % self.params.len()];
            let stream = round * 1000 + s as u64;
            StepRow {
                tokens: &self.tokens[s][CACHED..],
                position: CACHED,
                blocks: &self.blocks[s],
                sample: Some(args(params, stream, CACHED + 1, proposal, top)),
            }
        };
        let mut rows: Vec<StepRow<'_>> = (0..self.tokens.len()).map(row).collect();
        let last = [200];
        if beside {
            rows.push(StepRow {
                tokens: &[1, 2],
                position: 0,
                blocks: &last,
                sample: None,
            });
        }
        let mut out = gpu.step(&rows).unwrap();
        out.truncate(self.tokens.len());
        out
    }
}

fn args<'a>(
    params: &'a SamplingParams,
    stream: u64,
    position: usize,
    proposal: Option<&'a Proposal>,
    top: usize,
) -> SampleArgs<'a> {
    SampleArgs {
        params,
        stream,
        position: position as u64,
        history: &[],
        proposal,
        top,
        ahead: 0,
    }
}

#[test]
#[ignore = "needs a GPU"]
fn verification_is_that_of_the_cpu() {
    for (vocab, rows, rounds) in [(17, 63, 12), (1009, 63, 12), (40_013, 45, 4)] {
        let spec = spec(Family::Qwen2, (14, 2, 64), vocab);
        let mut gpu = backend(&spec, &weights(&spec, 9));
        for certain in [true, false] {
            let work = Verification::new(&mut gpu, rows, certain);
            let (mut agreement, mut graph) = (Agreement::default(), (0, 0));
            let (mut proposed, mut accepted) = (0, 0);
            for round in 0..rounds {
                let device = work.run(&mut gpu, round, 0, true);
                let host = work.run(&mut gpu, round, 1, true);
                let captured = work.run(&mut gpu, round, 0, false);
                for (s, (d, h)) in device.iter().zip(&host).enumerate() {
                    agreement.add(d, h);
                    proposed += s % 9;
                    accepted += d.len() - 1;
                    let ids = |all: &[Sampled]| all.iter().map(|s| s.token).collect::<Vec<_>>();
                    graph.0 += 1;
                    graph.1 += usize::from(ids(d) != ids(&captured[s]));
                }
            }
            println!(
                "vocabulary {vocab}, certain {certain}: {accepted} of {proposed} accepted, the graph differs in {} of {}",
                graph.1, graph.0
            );
            agreement.check(&format!("vocabulary {vocab}, certain {certain}"), 200);
            // Its products run in another order, so logits differ by what bf16 leaves out.
            assert!(graph.1 * 10 <= graph.0, "{} of {}", graph.1, graph.0);
            assert!(accepted * 10 > proposed && accepted < proposed);
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
        for (s, drawn) in single.iter().enumerate() {
            assert_eq!(drawn[0], burst[s][step], "row {s}, step {step}");
            last[s] = drawn[0].token;
        }
    }
}

fn engine(max_batch: usize) -> Engine {
    Engine::new(EngineConfig {
        block_size: BLOCK_SIZE,
        kv_blocks: 1024,
        max_batch,
        max_step_tokens: 1024,
        enable_prefix_cache: true,
        max_model_len: 512,
    })
    .unwrap()
}

fn generate(
    gpu: &mut CudaBackend,
    draft: Option<&mut Draft<CudaBackend>>,
    requests: Vec<Request>,
) -> Vec<Completion> {
    let tokenizer = grpo_host::defaults::model().unwrap().tokenizer;
    engine(48)
        .generate(gpu, draft, &tokenizer, requests, &mut |_| {})
        .unwrap()
}

fn requests(vocab: usize, prompts: u64, n: u32, sampling: &SamplingParams) -> Vec<Request> {
    let prompt =
        |id: u64| (0..20 + 13 * id).map(move |i| ((i * 31 + id * 7) % vocab as u64 % 300) as u32);
    (0..prompts)
        .map(|id| Request {
            id,
            prompt: prompt(id).collect(),
            n,
            sampling: sampling.clone(),
            seed: 100 + id,
        })
        .collect()
}

/// Every kind of draft for a policy of this shape.
fn sources(spec: &ModelSpec) -> Vec<(&'static str, Source<CudaBackend>)> {
    let model = |seed| {
        let gpu = CudaBackend::new(0, spec.clone(), &weights(spec, seed), SIZES, cache()).unwrap();
        Source::Model(Box::new(Model::new(gpu, spec).unwrap()))
    };
    vec![
        ("ngram", Source::Ngram),
        ("suffix", Source::Suffix(Suffix::default())),
        ("model: itself", model(21)),
        ("model: a stranger", model(22)),
        ("layers", Source::EarlyExit),
    ]
}

/// Probabilities `[V]` behind a text, by the CPU.
fn next(cpu: &mut CpuBackend, text: &[u32], params: &SamplingParams) -> Vec<f32> {
    let blocks: Vec<u32> = (0..16).collect();
    let row = StepRow {
        tokens: text,
        position: 0,
        blocks: &blocks,
        sample: Some(args(params, 0, 0, None, 0)),
    };
    let drafted: Drafted = cpu.propose(&[row], Exit::Final).unwrap().remove(0);
    drafted.distribution.dense().unwrap().into_owned()
}

/// Greedy with each draft is plain greedy; where one differs from the other, the two tokens are as good as equal.
#[test]
#[ignore = "needs a GPU"]
fn greedy_with_drafts_is_plain_greedy() {
    let spec = spec(Family::Qwen2, (14, 2, 64), 1009);
    let tensors = weights(&spec, 21);
    let mut gpu = CudaBackend::new(0, spec.clone(), &tensors, SIZES, cache()).unwrap();
    gpu.add_early_exit(2, None).unwrap();
    let mut cpu = CpuBackend::new(spec.clone(), &tensors, &Trainable::Nothing, false).unwrap();
    cpu.init_kv(64, BLOCK_SIZE).unwrap();
    let greedy = SamplingParams {
        temperature: 0.0,
        max_tokens: 60,
        ignore_eos: true,
        ..SamplingParams::default()
    };
    let work = requests(spec.vocab_size, 12, 2, &greedy);
    let plain = generate(&mut gpu, None, work.clone());
    for (name, source) in sources(&spec) {
        let mut draft = Draft::new(source, Length::Fixed(4)).unwrap();
        let found = generate(&mut gpu, Some(&mut draft), work.clone());
        assert!(draft.fault().is_none());
        let (mut differ, mut widest) = (0, 0f32);
        for (p, f) in plain.iter().zip(&found) {
            let Some(at) = (0..p.tokens.len()).find(|&i| p.tokens[i] != f.tokens[i]) else {
                continue;
            };
            differ += 1;
            let text = [&work[p.request as usize].prompt[..], &p.tokens[..at]].concat();
            let likely = next(&mut cpu, &text, &SamplingParams::default());
            let of = |c: &Completion| likely[c.tokens[at] as usize].ln();
            widest = widest.max((of(p) - of(f)).abs());
        }
        let sum = |of: fn(&Completion) -> u32| found.iter().map(of).sum::<u32>();
        let (drafted, accepted) = (
            sum(|c| c.telemetry.draft_tokens),
            sum(|c| c.telemetry.accepted_tokens),
        );
        println!(
            "{name}: {differ} of {} differ, first where log-probs are at most {widest:.3} apart; {accepted} of {drafted} accepted",
            plain.len()
        );
        // bf16 leaves a relative error of about 1 % in logits whose spread is about 10.
        assert!(widest < 0.3 && differ * 2 <= plain.len(), "{name}");
        assert!(drafted > 0);
    }
}

/// A statistic X² of `freedom` degrees as a standard normal number (Wilson & Hilferty 1931).
fn normal(statistic: f64, freedom: f64) -> f64 {
    let share = 2.0 / (9.0 * freedom);
    ((statistic / freedom).cbrt() - (1.0 - share)) / share.sqrt()
}

/// What is drawn with a draft is distributed as without, and a draft that is trusted too much would be noticed.
#[test]
#[ignore = "needs a GPU"]
fn sampling_with_drafts_keeps_the_distribution() {
    let spec = spec(Family::Qwen2, (4, 2, 32), 17);
    let tensors = weights(&spec, 21);
    let mut gpu = CudaBackend::new(0, spec.clone(), &tensors, SIZES, cache()).unwrap();
    gpu.add_early_exit(2, None).unwrap();
    let mut plain = backend(&spec, &tensors);
    let sampling = SamplingParams {
        temperature: 1.2,
        top_p: 0.97,
        max_tokens: 3,
        ignore_eos: true,
        ..SamplingParams::default()
    };
    const N: u32 = 4000;
    let work = requests(spec.vocab_size, 1, N, &sampling);
    let exact = |gpu: &mut CudaBackend, params: &SamplingParams| -> Vec<f64> {
        let mut second = vec![0.0; spec.vocab_size];
        let mut of = |text: &[u32]| -> Vec<f32> {
            let row = StepRow {
                tokens: text,
                position: 0,
                blocks: &[0, 1],
                sample: Some(args(params, 0, 0, None, 0)),
            };
            let drafted = gpu.propose(&[row], Exit::Final).unwrap().remove(0);
            drafted.distribution.dense().unwrap().into_owned()
        };
        for (token, p) in of(&work[0].prompt)
            .iter()
            .enumerate()
            .filter(|(_, p)| **p > 0.0)
        {
            let text = [&work[0].prompt[..], &[token as u32]].concat();
            let then = of(&text);
            second
                .iter_mut()
                .zip(&then)
                .for_each(|(s, q)| *s += f64::from(*p) * f64::from(*q));
        }
        second
    };
    let wrong = SamplingParams {
        temperature: 1.5,
        ..sampling.clone()
    };
    let (right, wrong) = (exact(&mut plain, &sampling), exact(&mut plain, &wrong));
    for (name, source) in sources(&spec) {
        let mut draft = Draft::new(source, Length::Fixed(2)).unwrap();
        let found = generate(&mut gpu, Some(&mut draft), work.clone());
        let mut counts = vec![0.0; spec.vocab_size];
        found
            .iter()
            .for_each(|c| counts[c.tokens[1] as usize] += 1.0);
        let score = |exact: &[f64]| {
            let cells = exact
                .iter()
                .zip(&counts)
                .filter(|(p, _)| **p * f64::from(N) >= 5.0);
            let of = |(p, n): (&f64, &f64)| (n - p * f64::from(N)).powi(2) / (p * f64::from(N));
            let freedom = cells.clone().count() as f64 - 1.0;
            normal(cells.map(of).sum(), freedom)
        };
        let accepted: u32 = found.iter().map(|c| c.telemetry.accepted_tokens).sum();
        println!(
            "{name}: z {:.2}, at a wrong temperature {:.2}; {accepted} accepted",
            score(&right),
            score(&wrong)
        );
        assert!(score(&right) < 3.5 && score(&wrong) > 3.5, "{name}");
    }
}

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

/// A Qwen2.5-0.5B with random weights, what a step costs.
#[test]
#[ignore = "needs a GPU"]
fn what_steps_cost() {
    let shape = include_bytes!("../../host/src/commands/shapes/qwen2.5-0.5b.json");
    let spec = ModelSpec::from_config_json(shape, Path::new("qwen2.5-0.5b.json")).unwrap();
    let tensors = random_weights(&spec, 1).unwrap();
    let sizes = CudaSizes {
        max_step_tokens: 8192,
        max_batch: 64,
        max_model_len: 1024,
    };
    let mut gpu = CudaBackend::new(0, spec.clone(), &tensors, sizes, cache()).unwrap();
    gpu.add_early_exit(6, None).unwrap();
    gpu.init_kv(64 * 16, BLOCK_SIZE).unwrap();
    println!(
        "ms per step, cache of 256 tokens: plain | nucleus | min-p | burst/16 | nucleus burst/16 | verify 4 | draft | layers:6 | verify 4 by model"
    );
    for batch in [1, 16, 64] {
        let of = |temperature: f32, top_p: f32, min_p: f32| SamplingParams {
            temperature,
            top_p,
            min_p,
            ..SamplingParams::default()
        };
        // At 0.3 the nucleus of these flat logits is about as large as a trained model's.
        let (plain, nucleus, minimum) = (of(1.0, 1.0, 0.0), of(0.1, 0.95, 0.0), of(0.1, 1.0, 0.05));
        let blocks: Vec<Vec<u32>> = (0..batch as u32)
            .map(|s| (0..16).map(|b| s * 16 + b).collect())
            .collect();
        let tokens = [1, 2, 3, 4, 5];
        let certain = Proposal {
            tokens: tokens[1..].to_vec(),
            probabilities: Vec::new(),
        };
        let rows = |params, proposal: Option<&'static [Proposal]>, ahead| (params, proposal, ahead);
        let certain: &'static [Proposal] = Vec::leak(vec![certain; batch]);
        let mut drafted = vec![Proposal::default(); batch];
        let time = |gpu: &mut CudaBackend,
                    (params, proposals, ahead): (&SamplingParams, Option<&[Proposal]>, usize),
                    exit: Option<Exit>| {
            let row = |s: usize| StepRow {
                tokens: if proposals.is_some() {
                    &tokens
                } else {
                    &tokens[..1]
                },
                position: 256,
                blocks: &blocks[s],
                sample: Some(SampleArgs {
                    ahead,
                    ..args(params, s as u64, 257, proposals.map(|p| &p[s]), 0)
                }),
            };
            let rows: Vec<StepRow<'_>> = (0..batch).map(row).collect();
            let mut run = || match exit {
                None => drop(gpu.step(&rows).unwrap()),
                Some(exit) => drop(gpu.propose(&rows, exit).unwrap()),
            };
            (0..3).for_each(|_| run());
            let started = Instant::now();
            const ROUNDS: usize = 20;
            (0..ROUNDS).for_each(|_| run());
            started.elapsed().as_secs_f64() * 1e3 / ROUNDS as f64 / (ahead + 1) as f64
        };
        let costs = [
            time(&mut gpu, rows(&plain, None, 0), None),
            time(&mut gpu, rows(&nucleus, None, 0), None),
            time(&mut gpu, rows(&minimum, None, 0), None),
            time(&mut gpu, rows(&plain, None, 15), None),
            time(&mut gpu, rows(&nucleus, None, 15), None),
            time(&mut gpu, rows(&plain, Some(certain), 0), None),
            time(&mut gpu, rows(&plain, None, 0), Some(Exit::Final)),
            time(&mut gpu, rows(&plain, None, 0), Some(Exit::Early)),
        ];
        for i in 1..tokens.len() {
            let row = |s: usize| StepRow {
                tokens: &tokens[i - 1..i],
                position: 256 + i - 1,
                blocks: &blocks[s],
                sample: Some(args(&plain, s as u64, 256 + i, None, 0)),
            };
            let rows: Vec<StepRow<'_>> = (0..batch).map(row).collect();
            let proposed = gpu.propose(&rows, Exit::Final).unwrap();
            for (proposal, d) in drafted.iter_mut().zip(proposed) {
                proposal.tokens.push(tokens[i]);
                proposal.probabilities.push(d.distribution);
            }
        }
        let by_model = time(&mut gpu, (&plain, Some(&drafted), 0), None);
        let flat = time(&mut gpu, (&of(1.0, 0.95, 0.0), None, 0), None);
        let costs: Vec<String> = costs
            .iter()
            .chain([&by_model, &flat])
            .map(|c| format!("{c:.3}"))
            .collect();
        println!(
            "batch {batch:2}: {} (last: nucleus of 100,000 tokens)",
            costs.join(" | ")
        );
    }
}
