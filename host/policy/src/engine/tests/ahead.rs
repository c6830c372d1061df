//! A backend that goes on drawing while the host is at work, as the CUDA one does.

use super::{
    scripted::{KV_BYTES, ScriptedBackend, mix, tokenizer},
    workload::{Dice, assert_no_leak},
};
use crate::{
    backend::{Backend, BlockId, Drafted, Exit, OptimStep, Pass, SampleArgs, Sampled, StepRow},
    engine::{Engine, EngineConfig},
    error::PolicyError,
    spec::ModelSpec,
    types::{Completion, PackedBatch, Request, SamplingParams, TokenScores, TopTokens},
};

/// What has been drawn and not yet been returned.
struct Flown {
    sequence: u64,
    position: u64,
    sampled: Vec<Sampled>,
}

/// The toy model, up to `burst` tokens at a time, with a burst of every row always under way.
struct RunsAhead {
    model: ScriptedBackend,
    burst: usize,
    flown: Vec<Flown>,
    /// Tokens that came from a burst under way.
    landed: usize,
}

impl RunsAhead {
    /// Draws `count` tokens behind the row's, whose keys go to the row's blocks.
    fn draw(&mut self, row: &StepRow<'_>, count: usize) -> Result<Vec<Sampled>, PolicyError> {
        let args = row.sample.as_ref().unwrap();
        let (mut tokens, mut position) = (row.tokens.to_vec(), row.position);
        let mut history = args.history.to_vec();
        let mut out: Vec<Sampled> = Vec::new();
        for _ in 0..count {
            let next = StepRow {
                sequence: row.sequence,
                tokens: &tokens,
                position,
                blocks: row.blocks,
                sample: Some(SampleArgs {
                    position: args.position + out.len() as u64,
                    history: &history,
                    ahead: 0,
                    ..args.clone()
                }),
            };
            let drawn = self.model.step(&[next])?.concat().remove(0);
            position += tokens.len();
            tokens = vec![drawn.token];
            history.push(drawn.token);
            out.push(drawn);
        }
        Ok(out)
    }

    fn land(&mut self, flown: &[Flown], row: &StepRow<'_>) -> Option<Vec<Sampled>> {
        let args = row.sample.as_ref()?;
        let same = |f: &&Flown| f.sequence == row.sequence && f.position == args.position;
        let landed = flown.iter().find(same).filter(|_| row.tokens.len() == 1)?;
        let most = landed.sampled.len().min(args.ahead + 1);
        self.landed += most;
        Some(landed.sampled[..most].to_vec())
    }

    /// Starts the burst behind `sampled`, as far as the row may go.
    fn fly(&mut self, row: &StepRow<'_>, sampled: &[Sampled]) -> Result<(), PolicyError> {
        let args = row.sample.as_ref().unwrap();
        let count = (args.ahead + 1 - sampled.len()).min(self.burst);
        let last = [sampled.last().unwrap().token];
        let history = args.history.iter().copied();
        let history = history
            .chain(sampled.iter().map(|s| s.token))
            .collect::<Vec<_>>();
        let position = args.position + sampled.len() as u64;
        let next = StepRow {
            sequence: row.sequence,
            tokens: &last,
            position: position as usize - 1,
            blocks: row.blocks,
            sample: Some(SampleArgs {
                position,
                history: &history,
                ..args.clone()
            }),
        };
        let sampled = self.draw(&next, count)?;
        self.flown.extend((count > 0).then_some(Flown {
            sequence: row.sequence,
            position,
            sampled,
        }));
        Ok(())
    }
}

impl Backend for RunsAhead {
    fn spec(&self) -> &ModelSpec {
        self.model.spec()
    }

    fn kv_bytes_per_token(&self) -> usize {
        KV_BYTES
    }

    fn max_ahead(&self) -> usize {
        2 * self.burst - 1
    }

    fn init_kv(&mut self, blocks: usize, block_size: usize) -> Result<(), PolicyError> {
        self.model.init_kv(blocks, block_size)
    }

    fn copy_kv(&mut self, copies: &[(BlockId, BlockId)]) -> Result<(), PolicyError> {
        self.model.copy_kv(copies)
    }

    fn step(&mut self, rows: &[StepRow<'_>]) -> Result<Vec<Vec<Sampled>>, PolicyError> {
        let flown = std::mem::take(&mut self.flown);
        let mut out = Vec::new();
        for row in rows {
            if row.sample.is_none() {
                out.extend(self.model.step(std::slice::from_ref(row))?);
                continue;
            }
            let sampled = match self.land(&flown, row) {
                Some(landed) => landed,
                None => {
                    let most = row.sample.as_ref().unwrap().ahead + 1;
                    self.draw(row, most.min(self.burst))?
                }
            };
            self.fly(row, &sampled)?;
            out.push(sampled);
        }
        Ok(out)
    }

    fn propose(&mut self, rows: &[StepRow<'_>], exit: Exit) -> Result<Vec<Drafted>, PolicyError> {
        self.model.propose(rows, exit)
    }

    fn score(&mut self, b: &PackedBatch, t: f32, p: Pass) -> Result<TokenScores, PolicyError> {
        self.model.score(b, t, p)
    }

    fn backward(&mut self, dlogp: &[f32]) -> Result<(), PolicyError> {
        self.model.backward(dlogp)
    }

    fn distill(
        &mut self,
        batch: &PackedBatch,
        targets: &[TopTokens],
        temperature: f32,
        weight: f64,
        exit: Exit,
    ) -> Result<f64, PolicyError> {
        self.model
            .distill(batch, targets, temperature, weight, exit)
    }

    fn optimizer_step(&mut self, step: &OptimStep, exit: Exit) -> Result<f64, PolicyError> {
        self.model.optimizer_step(step, exit)
    }
}

fn generate<B: Backend>(
    engine: &mut Engine,
    backend: &mut B,
    requests: &[Request],
    preempted: &mut usize,
) -> Vec<Completion> {
    let mut count = |p: crate::engine::Progress| *preempted += p.preempted;
    let done = engine.generate(backend, None, &tokenizer(), requests.to_vec(), &mut count);
    assert_no_leak(engine);
    done.unwrap()
}

#[test]
fn running_ahead_changes_no_completion() {
    let (mut landed, mut preempted) = (0, 0);
    for seed in 0..300u64 {
        let mut dice = Dice(mix(seed + 77));
        let mut requests = dice.requests();
        // Random numbers may be the same for all.
        if seed % 2 == 0 {
            requests.iter_mut().for_each(|request| request.seed = 9);
        }
        let config = dice.config(&requests);
        let mut plain = ScriptedBackend::new(seed);
        let mut engine = Engine::new(config.clone()).unwrap();
        let expected = generate(&mut engine, &mut plain, &requests, &mut 0);
        let mut ahead = RunsAhead {
            model: ScriptedBackend::new(seed),
            burst: dice.roll(1, 7),
            flown: Vec::new(),
            landed: 0,
        };
        let mut engine = Engine::new(config.clone()).unwrap();
        // Twice: what is left of the first call must not be taken for the second's.
        for _ in 0..2 {
            let found = generate(&mut engine, &mut ahead, &requests, &mut preempted);
            for (e, f) in expected.iter().zip(&found) {
                let of = |c: &Completion| (c.tokens.clone(), c.logprobs.clone(), c.text.clone());
                assert_eq!(of(e), of(f), "seed {seed} with {config:?}");
            }
            assert_eq!((expected.len(), ahead.model.violations), (found.len(), 0));
        }
        landed += ahead.landed;
    }
    assert!(landed > 5000 && preempted > 100, "{landed}, {preempted}");
}

/// A step's tokens are limited because they are run together; what is drawn one after the other is not.
#[test]
fn every_row_runs_ahead_however_few_tokens_a_step_may_have() {
    const ROWS: u32 = 16;
    let config = EngineConfig {
        max_batch: ROWS as usize,
        max_step_tokens: ROWS as usize,
        ..EngineConfig::default()
    };
    let sampling = SamplingParams {
        max_tokens: 41,
        ignore_eos: true,
        ..SamplingParams::default()
    };
    let request = Request {
        id: 0,
        prompt: vec![1, 2, 3],
        n: ROWS,
        sampling,
        seed: 5,
    };
    let mut backend = RunsAhead {
        model: ScriptedBackend::new(1),
        burst: 8,
        flown: Vec::new(),
        landed: 0,
    };
    let mut engine = Engine::new(config).unwrap();
    generate(&mut engine, &mut backend, &[request], &mut 0);
    // Of a row's 41 tokens the prompt brings one, and every second burst of the rest was under way already.
    assert!(backend.landed >= 30 * ROWS as usize, "{}", backend.landed);
}
