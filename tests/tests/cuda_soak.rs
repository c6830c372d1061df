//! The engine under random load for a while: arrivals, lengths, parameters, drafts, aborts, and so few KV blocks that
//! sequences lose theirs all the time. Every request ends once and as asked, and nothing leaks.
//!
//! On a GPU: `cargo test --release -p grpo-host -p grpo-tests --test cuda_soak -- --ignored --nocapture soak_a_minute`, or
//! `soak_ten_minutes`, or `soak_a_moment`. CI lets the CPU soak for a moment.
#![allow(
    clippy::unwrap_used,
    reason = "clippy counts only functions marked as tests as tests"
)]

mod cuda_models;

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Instant,
};

use cuda_models::{SIZES, cache, spec, weights};
use grpo_host::rollout::mix;
use grpo_policy::{
    backend::{
        Backend,
        cpu::{CpuBackend, Trainable},
        cuda::{BLOCK_SIZE, CudaBackend, survey},
    },
    engine::{
        Engine, EngineConfig,
        draft::{Draft, Length, Model, Source},
    },
    spec::{Family, ModelSpec},
    tokenizer::Tokenizer,
    types::{Completion, Finish, Request, SamplingParams},
};

const VOCAB: usize = 1009;

/// Sequences that are on their way, from which on no new ones arrive.
const CROWD: usize = 80;

/// Growth of the GPU's memory between warm-up and end that is no leak: graphs of sizes not met before. A leak of some
/// hundred bytes a step is more.
const GROWTH: usize = 32 << 20;

/// Fewer blocks than a quarter of what the sequences of a step would like.
const CONFIG: EngineConfig = EngineConfig {
    block_size: BLOCK_SIZE,
    kv_blocks: 72,
    max_batch: 48,
    max_step_tokens: 256,
    enable_prefix_cache: true,
    max_model_len: 512,
};

/// Random numbers, a function of the seed.
struct Dice {
    seed: u64,
    thrown: u64,
}

impl Dice {
    fn below(&mut self, n: u64) -> u64 {
        self.thrown += 1;
        mix(self.seed, self.thrown) % n
    }

    fn between(&mut self, least: u64, most: u64) -> u64 {
        least + self.below(most - least + 1)
    }

    fn sampling(&mut self) -> SamplingParams {
        let plain = SamplingParams {
            max_tokens: self.between(1, 120) as u32,
            ignore_eos: true,
            ..SamplingParams::default()
        };
        match self.below(8) {
            0..=2 => plain,
            3..=4 => SamplingParams {
                temperature: 0.0,
                ..plain
            },
            5 => SamplingParams {
                top_p: 0.9,
                temperature: 0.7,
                ..plain
            },
            6 => SamplingParams {
                top_k: 20,
                min_p: 0.02,
                ..plain
            },
            _ => SamplingParams {
                repetition_penalty: 1.1,
                ..plain
            },
        }
    }

    /// Half of the prompts begin as others do.
    fn prompt(&mut self) -> Vec<u32> {
        let id = |seed, at| (mix(seed, at) % VOCAB as u64) as u32;
        let (stock, own) = (self.below(8), self.between(1, 120));
        let shared = if stock < 4 { 20 + 45 * stock } else { 0 };
        let seed = self.below(u64::MAX);
        let begin = (0..shared).map(|at| id(stock, at));
        begin.chain((0..own).map(|at| id(seed, at))).collect()
    }
}

/// A request on its way.
struct Live {
    n: u32,
    max_tokens: usize,
    ended: BTreeSet<u32>,
}

#[derive(Debug, Default)]
struct Counts {
    requests: usize,
    completions: usize,
    aborted: usize,
    tokens: usize,
    preempted: usize,
    drafted: u64,
    accepted: u64,
    steps: usize,
}

/// One engine on its backend.
struct Side<B> {
    backend: B,
    engine: Engine,
    draft: Draft<B>,
    /// Of three steps, how many have the draft.
    drafting: u64,
    tokenizer: Tokenizer,
    live: BTreeMap<u64, Live>,
    dice: Dice,
    counts: Counts,
}

impl<B: Backend> Side<B> {
    fn new(backend: B, source: Source<B>, drafting: u64) -> Self {
        Self {
            backend,
            engine: Engine::new(CONFIG).unwrap(),
            draft: Draft::new(source, Length::Fixed(3)).unwrap(),
            drafting,
            tokenizer: grpo_host::defaults::model().unwrap().tokenizer,
            live: BTreeMap::new(),
            dice: Dice {
                seed: drafting,
                thrown: 0,
            },
            counts: Counts::default(),
        }
    }

    fn crowd(&self) -> usize {
        let left = |live: &Live| live.n as usize - live.ended.len();
        self.live.values().map(left).sum()
    }

    fn arrive(&mut self) {
        let id = self.counts.requests as u64;
        let request = Request {
            id,
            prompt: self.dice.prompt(),
            n: self.dice.between(1, 8) as u32,
            sampling: self.dice.sampling(),
            seed: self.dice.below(u64::MAX),
        };
        let live = Live {
            n: request.n,
            max_tokens: request.sampling.max_tokens as usize,
            ended: BTreeSet::new(),
        };
        self.live.insert(id, live);
        self.counts.requests += 1;
        self.engine.add(request).unwrap();
    }

    fn abort(&mut self) {
        let nth = self.dice.below(self.live.len() as u64) as usize;
        let id = *self.live.keys().nth(nth).unwrap();
        let aborted = self.engine.abort(id, &self.tokenizer).unwrap();
        assert!(!aborted.is_empty());
        self.counts.aborted += aborted.len();
        for completion in aborted {
            assert_eq!(completion.finish, Finish::Abort);
            self.end(&completion);
        }
        assert!(!self.live.contains_key(&id), "a part of {id} lives on");
    }

    /// Books a completion: of a request on its way, for the first time, with tokens that can be.
    fn end(&mut self, completion: &Completion) {
        let (id, tokens) = (completion.request, &completion.tokens);
        let live = self.live.get_mut(&id);
        let live = live.unwrap_or_else(|| panic!("request {id} had ended"));
        assert!(completion.index < live.n && live.ended.insert(completion.index));
        assert!(tokens.len() <= live.max_tokens);
        assert!(tokens.iter().all(|id| (*id as usize) < VOCAB));
        for logprobs in [&completion.logprobs, &completion.policy_logprobs] {
            assert_eq!(logprobs.len(), tokens.len());
            assert!(logprobs.iter().all(|l| l.is_finite() && *l < 1e-3));
        }
        if completion.finish != Finish::Abort {
            assert_eq!(completion.finish, Finish::Length);
            assert_eq!(tokens.len(), live.max_tokens, "request {id}");
            self.counts.completions += 1;
        }
        if live.ended.len() == live.n as usize {
            self.live.remove(&id);
        }
        self.counts.tokens += tokens.len();
        self.counts.drafted += u64::from(completion.telemetry.draft_tokens);
        self.counts.accepted += u64::from(completion.telemetry.accepted_tokens);
    }

    fn step(&mut self) {
        let drafts = self.dice.below(3) < self.drafting;
        let draft = drafts.then_some(&mut self.draft);
        let ended = self.engine.step(&mut self.backend, draft, &self.tokenizer);
        ended.unwrap().iter().for_each(|ended| self.end(ended));
        let progress = self.engine.progress();
        assert!(
            progress.computed_tokens > 0 || self.engine.is_idle(),
            "{progress:?}"
        );
        self.counts.preempted += progress.preempted;
        self.counts.steps += 1;
    }

    fn turn(&mut self) {
        if self.crowd() < CROWD && self.dice.below(2) == 0 {
            self.arrive();
        }
        if !self.live.is_empty() && self.dice.below(60) == 0 {
            self.abort();
        }
        self.step();
    }

    /// Runs what is on its way to its end; no block is in use then.
    fn drain(&mut self) {
        while !self.engine.is_idle() {
            self.step();
        }
        self.step();
        assert!(
            self.live.is_empty(),
            "{} requests are lost",
            self.live.len()
        );
        let progress = self.engine.progress();
        assert_eq!(
            (progress.kv_used, progress.running, progress.waiting),
            (0, 0, 0)
        );
        assert!(self.draft.fault().is_none());
    }

    fn report(&self, name: &str, seconds: f64) {
        let c = &self.counts;
        println!(
            "{name}: {} requests, {} completions, {} aborted, {} tokens ({:.0} a second), {} steps, {} preemptions, {} of {} draft tokens accepted",
            c.requests,
            c.completions,
            c.aborted,
            c.tokens,
            c.tokens as f64 / seconds,
            c.steps,
            c.preempted,
            c.accepted,
            c.drafted
        );
        assert!(c.completions > 20 && c.aborted > 0 && c.preempted > 0 && c.drafted > 0);
    }
}

/// How long to go on.
#[derive(Clone, Copy)]
enum Until {
    Seconds(f64),
    Turns(usize),
}

impl Until {
    /// From 0 to 1.
    fn progress(self, start: Instant, turns: usize) -> f64 {
        match self {
            Self::Seconds(all) => start.elapsed().as_secs_f64() / all,
            Self::Turns(all) => turns as f64 / all as f64,
        }
    }
}

/// Two engines turn by turn, one with ngram in one step of three, the other with a model that drafts in all. `free`: bytes of
/// the device.
fn soak<B: Backend>(
    until: Until,
    build: impl Fn(&ModelSpec, u64) -> B,
    free: Option<&dyn Fn() -> usize>,
) {
    let shape = spec(Family::Qwen2, (14, 2, 64), VOCAB);
    let draft = Source::Model(Box::new(Model::new(build(&shape, 2), &shape).unwrap()));
    let mut sides = [
        (
            "ngram at times",
            Side::new(build(&shape, 1), Source::Ngram, 1),
        ),
        ("model", Side::new(build(&shape, 1), draft, 3)),
    ];
    let (start, mut turns) = (Instant::now(), 0);
    let mut samples = Vec::new();
    while until.progress(start, turns) < 1.0 {
        sides.iter_mut().for_each(|(_, side)| side.turn());
        turns += 1;
        if 4.0 * until.progress(start, turns) > (samples.len() + 1) as f64 {
            samples.push(free.map(|free| free()));
        }
    }
    sides.iter_mut().for_each(|(_, side)| side.drain());
    samples.push(free.map(|free| free()));
    let seconds = start.elapsed().as_secs_f64();
    sides
        .iter()
        .for_each(|(name, side)| side.report(name, seconds));
    let samples: Vec<usize> = samples.into_iter().flatten().collect();
    if let [warm, .., end] = samples[..] {
        let mib: Vec<usize> = samples.iter().map(|bytes| bytes >> 20).collect();
        println!("{seconds:.0} s; MiB free at each quarter and at the end: {mib:?}");
        assert!(warm.saturating_sub(end) < GROWTH, "memory grows: {mib:?}");
    }
}

fn soak_on_a_gpu(seconds: f64) {
    let build = |spec: &ModelSpec, seed| {
        CudaBackend::new(0, spec.clone(), &weights(spec, seed), SIZES, cache()).unwrap()
    };
    let free = || survey().unwrap().gpus[0].memory.0;
    soak(Until::Seconds(seconds), build, Some(&free));
}

#[test]
#[ignore = "needs a GPU"]
fn soak_a_moment() {
    soak_on_a_gpu(8.0);
}

#[test]
#[ignore = "needs a GPU"]
fn soak_a_minute() {
    soak_on_a_gpu(60.0);
}

#[test]
#[ignore = "needs a GPU"]
fn soak_ten_minutes() {
    soak_on_a_gpu(600.0);
}

#[test]
fn soak_the_cpu() {
    let build = |spec: &ModelSpec, seed| {
        CpuBackend::new(
            spec.clone(),
            &weights(spec, seed),
            &Trainable::Nothing,
            false,
        )
        .unwrap()
    };
    soak(Until::Turns(150), build, None);
}
