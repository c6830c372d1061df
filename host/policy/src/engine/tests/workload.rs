//! Random workloads: any mix of prompts, parameters and pool sizes gives what naive generation gives.

use super::scripted::{Expected, ScriptedBackend, TOKENS, mix, naive, tokenizer};
use crate::{
    engine::{Engine, EngineConfig},
    types::{Completion, Request, SamplingParams},
};

/// A small counter-based generator.
pub(super) struct Dice(pub(super) u64);

impl Dice {
    /// In `low..=high`.
    pub(super) fn roll(&mut self, low: usize, high: usize) -> usize {
        self.0 += 1;
        low + (mix(self.0) % (high - low + 1) as u64) as usize
    }

    fn pick<T: Clone>(&mut self, of: &[T]) -> T {
        of[self.roll(0, of.len() - 1)].clone()
    }

    fn tokens(&mut self, count: usize) -> Vec<u32> {
        (0..count)
            .map(|_| self.roll(0, TOKENS.len() - 2) as u32)
            .collect()
    }

    fn params(&mut self) -> SamplingParams {
        SamplingParams {
            temperature: self.pick(&[0.0, 0.6, 1.0, 1.0, 1.7]),
            top_p: self.pick(&[1.0, 1.0, 0.8]),
            top_k: self.pick(&[0, 0, 5]),
            min_p: self.pick(&[0.0, 0.0, 0.1]),
            repetition_penalty: self.pick(&[1.0, 1.0, 1.3]),
            max_tokens: self.roll(1, 24) as u32,
            stop: self.pick(&[
                vec![],
                vec![],
                vec!["STOP".to_owned()],
                vec!["€".to_owned(), "é a".to_owned()],
                vec!["ab".to_owned(), "12".to_owned()],
            ]),
            ignore_eos: self.roll(0, 2) == 0,
        }
    }

    pub(super) fn requests(&mut self) -> Vec<Request> {
        let prefixes: Vec<Vec<u32>> = (0..3)
            .map(|_| {
                let length = self.roll(0, 30);
                self.tokens(length)
            })
            .collect();
        (0..self.roll(1, 8))
            .map(|id| {
                let mut prompt = self.pick(&prefixes);
                let own = self.roll(1, 10);
                prompt.extend(self.tokens(own));
                Request {
                    id: id as u64,
                    prompt,
                    n: self.roll(1, 8) as u32,
                    sampling: self.params(),
                    seed: self.roll(0, 1000) as u64,
                }
            })
            .collect()
    }

    pub(super) fn config(&mut self, requests: &[Request]) -> EngineConfig {
        let block_size = self.pick(&[1, 2, 4, 5, 16]);
        let max_model_len = self.roll(41, 70);
        let longest = requests
            .iter()
            .map(|r| max_model_len.min(r.prompt.len() + r.sampling.max_tokens as usize) - 1)
            .max()
            .unwrap();
        let max_batch = self.roll(1, 12);
        let spare = self.pick(&[0, 1, 3, 20, 400]);
        EngineConfig {
            block_size,
            kv_blocks: longest.div_ceil(block_size) + spare,
            max_batch,
            max_step_tokens: max_batch + self.pick(&[0, 3, 17, 100]),
            enable_prefix_cache: self.roll(0, 2) > 0,
            max_model_len,
        }
    }
}

fn observed(completion: &Completion) -> Expected {
    Expected {
        tokens: completion.tokens.clone(),
        logprobs: completion.logprobs.clone(),
        policy_logprobs: completion.policy_logprobs.clone(),
        text: completion.text.clone(),
        finish: completion.finish,
    }
}

/// True if the engine's completions are those of naive generation.
fn agrees(
    engine: &mut Engine,
    backend: &mut ScriptedBackend,
    requests: &[Request],
    preempted: &mut usize,
) -> bool {
    let tokenizer = tokenizer();
    let completions = engine
        .generate(
            backend,
            None,
            &tokenizer,
            requests.to_vec(),
            &mut |progress| {
                *preempted += progress.preempted;
            },
        )
        .unwrap();
    let mut completions = completions.iter();
    let same = requests.iter().all(|request| {
        (0..request.n).all(|index| {
            let completion = completions.next().unwrap();
            assert_eq!((completion.request, completion.index), (request.id, index));
            let expected = naive(backend.salt, request, index, engine.config(), &tokenizer);
            observed(completion) == expected
        })
    });
    assert!(completions.next().is_none() || !same);
    same
}

/// Every block is unreferenced, and free or cached.
pub(super) fn assert_no_leak(engine: &Engine) {
    let (refs, idle, free) = engine.scheduler.pool.census();
    assert!(refs.iter().all(|r| *r == 0), "referenced blocks: {refs:?}");
    assert_eq!(idle + free, refs.len());
    assert!(engine.scheduler.groups.is_empty() && engine.scheduler.waiting.is_empty());
    assert!(engine.scheduler.running.is_empty());
}

#[test]
fn engine_equals_naive_generation_on_random_workloads() {
    let (mut preempted, mut copies, mut late_chunks, mut cached) = (0, 0, 0, 0);
    for seed in 0..400u64 {
        let mut dice = Dice(mix(seed));
        let requests = dice.requests();
        let config = dice.config(&requests);
        let mut engine = Engine::new(config.clone()).unwrap();
        let mut backend = ScriptedBackend::new(mix(seed));
        let mut check = |backend: &mut ScriptedBackend, engine: &mut Engine| {
            let same = agrees(engine, backend, &requests, &mut preempted);
            assert!(same, "seed {seed} with {config:?}");
            assert_eq!(backend.violations, 0, "seed {seed}");
            assert_no_leak(engine);
        };
        check(&mut backend, &mut engine);
        let first = backend.computed;
        // Again with whatever is cached, then with other weights.
        check(&mut backend, &mut engine);
        cached += usize::from(backend.computed < 2 * first);
        backend.salt = mix(seed + 1_000_000);
        engine.invalidate_prefix_cache();
        check(&mut backend, &mut engine);
        assert!(backend.widest <= config.max_batch);
        assert!(backend.most_tokens <= config.max_step_tokens);
        copies += backend.copies;
        late_chunks += backend.late_chunks;
    }
    // The workloads reach what they are meant to reach.
    assert!(preempted > 500, "{preempted} preemptions");
    assert!(copies > 500, "{copies} copies");
    assert!(late_chunks > 500, "{late_chunks} late chunks");
    assert!(cached > 100, "{cached} runs with a warm cache");
}

#[test]
fn the_comparison_notices_a_missing_copy_and_a_stale_cache() {
    let (mut missing_copy, mut stale) = (0, 0);
    for seed in 0..60u64 {
        let mut dice = Dice(mix(seed));
        let requests = dice.requests();
        let config = EngineConfig {
            enable_prefix_cache: true,
            ..dice.config(&requests)
        };
        let mut engine = Engine::new(config.clone()).unwrap();
        let mut backend = ScriptedBackend::new(seed);
        backend.skip_copies = true;
        missing_copy += usize::from(!agrees(&mut engine, &mut backend, &requests, &mut 0));
        let mut engine = Engine::new(config).unwrap();
        let mut backend = ScriptedBackend::new(seed);
        assert!(agrees(&mut engine, &mut backend, &requests, &mut 0));
        backend.salt += 1;
        stale += usize::from(!agrees(&mut engine, &mut backend, &requests, &mut 0));
    }
    assert!(missing_copy > 20, "{missing_copy}");
    assert!(stale > 20, "{stale}");
}
