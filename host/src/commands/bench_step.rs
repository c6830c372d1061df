//! `grpo-host bench step`: seconds of one GRPO step, divided into rollout, reward and update, on prompts and completions of fixed
//! lengths.
//!
//! Random weights write no text, so the reward reads sentences as long as such completions are, with the right answer in every
//! second one: every group teaches something, and every sequence is trained on.

use std::time::Instant;

use grpo_policy::types::{Completion, Request, SamplingParams};
use serde_json::{Value, json};

use super::{
    bench_model::{Measured, check_fits},
    bench_plugin::{load_reward, words},
};
use crate::{
    cli::{BenchStepArgs, Environment},
    config::RunConfig,
    grpo::advantage::advantages,
    placement::{Capacity, Passes, Place},
    plugin::{RewardSet, Weighted},
    policy::{Mode, Policy},
    rollout::mix,
    trainer::update_config,
    types::{Finish, Parsed, Sample, Score},
    update::{Sequence, update},
};

const PROMPT_TOKENS: usize = 128;
const NEW_TOKENS: usize = 256;

/// Bytes of a token of English text, about.
const TOKEN_BYTES: usize = 4;

/// Seconds of the parts of a step.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Phases {
    rollout: f64,
    reward: f64,
    /// Advantages, forward and backward passes, optimizer.
    update: f64,
}

impl Phases {
    fn total(&self) -> f64 {
        self.rollout + self.reward + self.update
    }
}

/// What every step does.
struct Step<'a> {
    config: &'a RunConfig,
    prompts: Vec<Vec<u32>>,
    n: u32,
    new_tokens: usize,
    rewards: RewardSet,
}

/// Measures, and prints a table or one JSON object.
pub(super) fn run(args: &BenchStepArgs, environment: &Environment) -> anyhow::Result<()> {
    let (model, shape) = ((&args.model, args.gpus), &args.shape);
    let mut measured = Measured::load("bench step", model, shape, args.output, environment)?;
    let context = measured.context();
    let tokens = |asked: Option<u32>, usual: usize| asked.map_or(usual, |n| n as usize);
    let prompt_tokens = tokens(args.prompt_tokens, PROMPT_TOKENS.min(context / 2));
    let left = context.saturating_sub(prompt_tokens).max(1);
    let new_tokens = tokens(args.new_tokens, NEW_TOKENS.min(left));
    let flags = "--prompt-tokens and --new-tokens";
    check_fits(prompt_tokens + new_tokens, context, flags)?;
    let source = args.plugin.as_ref().map_or("reward-math", |p| &p.source);
    let (reward, weight) = (load_reward(source, &json!({}), environment)?, 1.0);
    measured.config.generation.max_completion_length = new_tokens as u32;
    let prompts = measured.sequences(args.prompts, prompt_tokens);
    let Measured {
        config,
        name,
        model,
        threads,
    } = measured;
    let step = Step {
        config: &config,
        prompts,
        n: args.n,
        new_tokens,
        rewards: RewardSet::new(vec![Weighted { reward, weight }])?,
    };
    let capacity = Capacity {
        max_batch: Some(step.sequences()),
        max_model_len: prompt_tokens + new_tokens,
        kv_tokens: None,
    };
    let (place, passes) = (Place::of(&config, environment), Passes::of(&config));
    let mut policy = Policy::new(model, &name, Mode::of(&config), passes, capacity, &place)?;
    super::tell_of_device(&policy, args.output.quiet);
    // The first makes graphs, buffers and caches.
    step.run(&mut policy, 0)?;
    let steps: Vec<Phases> = (1..=u64::from(args.steps))
        .map(|number| step.run(&mut policy, number))
        .collect::<Result<_, _>>()?;
    let best = fastest(&steps);
    if args.output.json {
        let mut object = report(&steps, &best);
        object["model"] = json!(name);
        object["plugin"] = json!(source);
        object["device"] = json!(policy.device());
        object["gpus"] = json!(policy.replicas.count());
        object["memory"] = json!(policy.memory_plan());
        object["threads"] = json!(threads);
        object["prompts"] = json!(args.prompts);
        object["n"] = json!(args.n);
        object["prompt_tokens"] = json!(prompt_tokens);
        object["new_tokens"] = json!(new_tokens);
        outln!("{object}");
        return Ok(());
    }
    let devices = policy.devices();
    outln!("    model  {name}, {devices}, {threads} threads");
    outln!(
        "     work  {} prompts × {} completions × ({prompt_tokens} prompt + {new_tokens} new tokens), best of {} steps",
        args.prompts,
        args.n,
        args.steps
    );
    print(&best, source);
    Ok(())
}

fn fastest(steps: &[Phases]) -> Phases {
    let by_total = |a: &&Phases, b: &&Phases| a.total().total_cmp(&b.total());
    steps.iter().min_by(by_total).copied().unwrap_or_default()
}

fn report(steps: &[Phases], best: &Phases) -> Value {
    let object = |p: &Phases| json!({"seconds": p.total(), "rollout": p.rollout, "reward": p.reward, "update": p.update});
    json!({
        "name": "step", "unit": "s", "value": best.total(),
        "rollout": best.rollout, "reward": best.reward, "update": best.update,
        "reward_share": best.reward / best.total(),
        "steps": steps.iter().map(object).collect::<Vec<_>>(),
    })
}

fn print(best: &Phases, source: &str) {
    let line = |name: &str, seconds: f64| {
        let share = 100.0 * seconds / best.total();
        outln!("{name:>9}  {:>9.2} ms  {share:>5.1} %", 1e3 * seconds);
    };
    line("rollout", best.rollout);
    line("reward", best.reward);
    line("update", best.update);
    outln!("     step  {:>9.2} ms  with {source}", 1e3 * best.total());
}

impl Step<'_> {
    fn sequences(&self) -> usize {
        self.prompts.len() * self.n as usize
    }

    /// One step; `number` gives it draws of its own.
    fn run(&self, policy: &mut Policy, number: u64) -> anyhow::Result<Phases> {
        policy.forget_kv();
        let mut clock = Instant::now();
        let mut lap = || {
            std::mem::replace(&mut clock, Instant::now())
                .elapsed()
                .as_secs_f64()
        };
        let completions = policy.generate(self.requests(number), &mut |_| {})?;
        let rollout = lap();
        let texts = self.texts(completions.len());
        lap();
        let rewards = self.score(&texts, &completions)?;
        let reward = lap();
        self.update(policy, &completions, &rewards)?;
        policy.forget_kv();
        Ok(Phases {
            rollout,
            reward,
            update: lap(),
        })
    }

    fn requests(&self, number: u64) -> Vec<Request> {
        let generation = &self.config.generation;
        let sampling = SamplingParams {
            max_tokens: self.new_tokens as u32,
            ignore_eos: true,
            ..generation.sampling()
        };
        let seed = mix(self.config.training.seed, number);
        let request = |(prompt, id): (&Vec<u32>, u64)| Request {
            id,
            prompt: prompt.clone(),
            n: self.n,
            sampling: sampling.clone(),
            seed: mix(seed, id),
        };
        self.prompts.iter().zip(0..).map(request).collect()
    }

    /// A row and a prompt for each group, and what its completions are taken to say.
    fn texts(&self, completions: usize) -> Vec<String> {
        let bytes = self.new_tokens * TOKEN_BYTES;
        let text = |i: usize| {
            let (group, right) = (i / self.n as usize, i.is_multiple_of(2));
            let answer = group + usize::from(!right);
            format!("<think>{}</think> #### {answer}", words(i, bytes))
        };
        (0..completions).map(text).collect()
    }

    /// Totals of each group.
    fn score(
        &self,
        texts: &[String],
        completions: &[Completion],
    ) -> anyhow::Result<Vec<Vec<Option<f64>>>> {
        let parsed = Parsed::default();
        let shared: Vec<(String, String)> = self
            .prompts
            .iter()
            .enumerate()
            .map(|(group, ids)| {
                let prompt = words(group, ids.len() * TOKEN_BYTES);
                let row = format!(r#"{{"question": "{prompt}", "answer": "So\n#### {group}"}}"#);
                (row, prompt)
            })
            .collect();
        let samples: Vec<Sample<'_>> = texts
            .iter()
            .zip(completions)
            .map(|(text, completion)| {
                let group = completion.request as usize;
                Sample {
                    row_id: completion.request,
                    row_json: &shared[group].0,
                    prompt: &shared[group].1,
                    completion: text,
                    parsed: &parsed,
                    finish: Finish::Length,
                    telemetry: completion.telemetry,
                }
            })
            .collect();
        let scoring = self.rewards.score(&samples)?;
        let total = |score: &Score| match score {
            Score::Value(scored) => Some(scored.total),
            Score::Skip(_) => None,
        };
        let totals: Vec<Option<f64>> = scoring.scores.iter().map(total).collect();
        Ok(totals.chunks(self.n as usize).map(<[_]>::to_vec).collect())
    }

    fn update(
        &self,
        policy: &mut Policy,
        completions: &[Completion],
        rewards: &[Vec<Option<f64>>],
    ) -> anyhow::Result<()> {
        let advantages = advantages(rewards, self.config.loss.scale_rewards);
        let values = advantages.values.iter().flatten();
        let sequences: Vec<Sequence<'_>> = completions
            .iter()
            .zip(values)
            .map(|(completion, advantage)| Sequence {
                prompt_ids: &self.prompts[completion.request as usize],
                completion,
                advantage: *advantage,
            })
            .collect();
        let optimizer = self
            .config
            .optimizer
            .step(self.config.optimizer.learning_rate);
        let settings = update_config(self.config);
        update(&mut policy.replicas, &sequences, &settings, &optimizer)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fastest_step_counts_with_all_its_parts() {
        let phases = |rollout, reward, update| Phases {
            rollout,
            reward,
            update,
        };
        let steps = [phases(3.0, 0.5, 1.0), phases(1.0, 0.25, 2.75)];
        let best = fastest(&steps);
        assert_eq!((best, best.total()), (steps[1], 4.0));
        let report = report(&steps, &best);
        assert_eq!(
            (&report["value"], &report["reward_share"]),
            (&json!(4.0), &json!(0.0625))
        );
        assert_eq!(report["steps"][0]["seconds"], json!(4.5));
    }
}
