//! `grpo-host bench spec`: what each draft brings, on prompts of a dataset, at several batch sizes.
//!
//! The speed-up is measured against plain decoding of the same prompts in the same run. Beside it stands the
//! one that acceptance and the cost of drafting predict (Leviathan et al. 2023, theorem 3.8).

use std::time::Instant;

use grpo_policy::types::Completion;
use serde::Serialize;
use serde_json::json;

use super::progress::downloads;
use crate::{
    cli::{BenchSpecArgs, Environment},
    config::{DraftKind, RunConfig},
    draft,
    placement::{Capacity, Passes, Place},
    policy::{Mode, Policy},
    rollout::{Job, RollError, mix, roll},
    setup,
    types::Row,
};

/// One draft at one batch size.
#[derive(Clone, Debug, Serialize)]
struct Measure {
    draft: String,
    batch: u32,
    /// New tokens over the whole call, prefill included.
    tokens_per_second: f64,
    /// Over plain decoding; `None` for plain decoding itself.
    speedup: Option<f64>,
    /// What acceptance and costs predict of it.
    predicted: Option<f64>,
    acceptance_rate: Option<f64>,
    mean_accepted_length: Option<f64>,
}

/// Completions of the best run, how long it took and how much of that the draft took.
struct Best {
    seconds: f64,
    drafting: f64,
    completions: Vec<Completion>,
}

/// Measures, and prints a table or one JSON object.
pub(super) fn run(args: &BenchSpecArgs, environment: &Environment) -> anyhow::Result<()> {
    let command = "bench spec, which measures those of --drafts";
    let mut config = super::config_without_draft(command, |base| args.over(base))?;
    // Nothing is evaluated here, so a small file need not give up its rows.
    config.eval.eval_rows = 1;
    super::set_threads(config.hardware.threads)?;
    super::use_one_gpu(&mut config);
    let rows = setup::rows(&config, environment, &mut downloads(args.output.quiet))?;
    let largest = largest(args);
    anyhow::ensure!(
        rows.train.rows.len() >= largest as usize,
        "{} rows are not enough for a batch of {largest}",
        rows.train.rows.len()
    );
    let drafts = distinct(&[&[DraftKind::None], &args.drafts[..]].concat());
    check(&drafts, args, &mut config, environment)?;
    let mut measures: Vec<Measure> = Vec::new();
    let mut cut = None;
    for draft in &drafts {
        config.generation.draft = draft.clone();
        let mut bench = Bench::load(args, &config, environment)?;
        for batch in distinct(&args.batches) {
            let best = bench.best(&rows.train.rows[..batch as usize])?;
            if cut.is_none() {
                cut = bench.cut(&best);
                cut.iter().for_each(|text| super::warn(text));
            }
            let base = measures.iter().find(|m| m.batch == batch);
            let base = base.map(|m| m.tokens_per_second);
            measures.push(Measure::of(draft, batch, &best, base));
            if !args.output.json {
                print_row(measures.last());
            }
        }
    }
    if args.output.json {
        let fastest = measures
            .iter()
            .filter_map(|m| m.speedup)
            .fold(0.0, f64::max);
        outln!(
            "{}",
            json!({
                "name": "spec", "unit": "speedup", "value": fastest,
                "model": setup::model_name(&config), "new_tokens": args.new_tokens,
                "draft_tokens": config.generation.draft_tokens, "repeats": args.repeats,
                "metrics": measures,
            })
        );
    }
    Ok(())
}

fn largest(args: &BenchSpecArgs) -> u32 {
    args.batches.iter().copied().max().unwrap_or(1)
}

/// Each once, in the order of their first mention.
fn distinct<T: Clone + PartialEq>(items: &[T]) -> Vec<T> {
    let mut out: Vec<T> = Vec::new();
    for item in items {
        if !out.contains(item) {
            out.push(item.clone());
        }
    }
    out
}

/// Loads every draft once, so that one that cannot be is refused before minutes of measuring the others.
fn check(
    drafts: &[DraftKind],
    args: &BenchSpecArgs,
    config: &mut RunConfig,
    environment: &Environment,
) -> anyhow::Result<()> {
    let quiet = args.output.quiet;
    let mut policy = policy(args, config, environment)?;
    for draft in drafts {
        config.generation.draft = draft.clone();
        draft::attach(
            &mut policy,
            config,
            false,
            environment,
            &mut downloads(quiet),
        )?;
    }
    Ok(())
}

fn policy(
    args: &BenchSpecArgs,
    config: &RunConfig,
    environment: &Environment,
) -> anyhow::Result<Policy> {
    let model = setup::model(config, environment, &mut downloads(args.output.quiet))?;
    let context = model.spec.max_position_embeddings;
    let capacity = Capacity {
        max_batch: Some(largest(args) as usize),
        ..setup::capacity(&config.generation, context)
    };
    Policy::new(
        model,
        setup::model_name(config),
        Mode::Inference,
        Passes::default(),
        capacity,
        &Place::of(config, environment),
    )
}

/// A policy with its draft, ready to decode.
struct Bench<'a> {
    args: &'a BenchSpecArgs,
    config: &'a RunConfig,
    policy: Policy,
    plugins: setup::Plugins,
}

impl<'a> Bench<'a> {
    fn load(
        args: &'a BenchSpecArgs,
        config: &'a RunConfig,
        environment: &Environment,
    ) -> anyhow::Result<Self> {
        let mut policy = policy(args, config, environment)?;
        super::attach_draft(&mut policy, config, environment, args.output.quiet)?;
        let on_download = &mut downloads(args.output.quiet);
        Ok(Self {
            args,
            config,
            policy,
            plugins: setup::plugins(
                config,
                environment,
                on_download,
                super::guest_log::guest_log(),
            )?,
        })
    }

    /// The fastest of the repeats, after one that warms up (and teaches a draft that learns). Each repeat
    /// samples anew, so that no draft sees the very completion it is to guess.
    fn best(&mut self, rows: &[Row]) -> anyhow::Result<Best> {
        let mut sampling = self.config.generation.sampling();
        sampling.max_tokens = self.args.new_tokens;
        sampling.ignore_eos = true;
        let mut best: Option<Best> = None;
        for repeat in 0..=self.args.repeats {
            self.policy.forget_kv();
            let before = self.policy.drafting_seconds();
            let started = Instant::now();
            let job = Job {
                wave: 0,
                rows: rows.iter().map(|row| (row, 1)).collect(),
                sampling: &sampling,
                max_prompt_tokens: None,
                seed: mix(self.config.training.seed, u64::from(repeat)),
            };
            let rolled = roll(&mut self.policy, &self.plugins.formatter, &job, &mut |_| {});
            let rolled = rolled.map_err(RollError::into_inner)?;
            let seconds = started.elapsed().as_secs_f64();
            super::tell_of_fault(&mut self.policy, self.config);
            if repeat > 0 && best.as_ref().is_none_or(|b| seconds < b.seconds) {
                best = Some(Best {
                    seconds,
                    drafting: self.policy.drafting_seconds() - before,
                    completions: rolled
                        .rollouts
                        .into_iter()
                        .flat_map(|r| r.completions)
                        .collect(),
                });
            }
        }
        best.ok_or_else(|| anyhow::anyhow!("nothing was measured"))
    }

    /// Why completions are shorter than asked for, where the context is.
    fn cut(&self, best: &Best) -> Option<String> {
        let longest = self.policy.max_model_len();
        let fills = |c: &&Completion| {
            let t = &c.telemetry;
            (t.prompt_tokens + t.generated_tokens) as usize == longest
        };
        let tokens = |c: &Completion| c.telemetry.generated_tokens;
        let shortest = best.completions.iter().filter(fills).map(tokens).min()?;
        let asked = self.args.new_tokens;
        (shortest < asked).then(|| {
            format!("--new-tokens {asked} is cut to the context of {longest} tokens: completions have as few as {shortest}")
        })
    }
}

impl Measure {
    fn of(draft: &DraftKind, batch: u32, best: &Best, plain: Option<f64>) -> Self {
        let total = |of: fn(&Completion) -> u32| {
            best.completions
                .iter()
                .map(|c| f64::from(of(c)))
                .sum::<f64>()
        };
        let tokens = total(|c| c.telemetry.generated_tokens);
        let (drafts, drafted) = (total(|c| c.drafts), total(|c| c.telemetry.draft_tokens));
        let accepted = total(|c| c.telemetry.accepted_tokens);
        let tokens_per_second = tokens / best.seconds;
        let drafting = best.drafting;
        Self {
            draft: draft.to_string(),
            batch,
            tokens_per_second,
            speedup: plain.map(|plain| tokens_per_second / plain),
            // A step of the policy is taken to cost what a plain one does, however many tokens it
            // verifies: what memory bandwidth alone would give.
            predicted: plain.map(|plain| {
                let steps = (tokens - accepted) / plain;
                tokens / plain / (steps + drafting)
            }),
            acceptance_rate: (drafted > 0.0).then(|| accepted / drafted),
            mean_accepted_length: (drafts > 0.0).then(|| 1.0 + accepted / drafts),
        }
    }
}

fn print_row(measure: Option<&Measure>) {
    let Some(m) = measure else { return };
    let times = |x: Option<f64>| x.map_or_else(|| "–".to_owned(), |x| format!("{x:.2}×"));
    let rate = m
        .acceptance_rate
        .map_or_else(|| "–".to_owned(), |a| format!("{:.1} %", 100.0 * a));
    outln!(
        "{:>24}  batch {:>3}  {:>8.1} tokens/s  speed-up {:>6}  predicted {:>6}  accepted {rate}",
        m.draft,
        m.batch,
        m.tokens_per_second,
        times(m.speedup),
        times(m.predicted),
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use grpo_policy::types::{Finish, Telemetry};

    #[test]
    fn batches_and_drafts_named_twice_count_once() {
        assert_eq!(distinct(&[4, 1, 4, 1, 16]), [4, 1, 16]);
    }

    #[test]
    fn the_prediction_by_hand() {
        let completion = Completion {
            request: 0,
            index: 0,
            tokens: Vec::new(),
            logprobs: Vec::new(),
            policy_logprobs: Vec::new(),
            text: String::new(),
            finish: Finish::Length,
            telemetry: Telemetry {
                generated_tokens: 100,
                draft_tokens: 80,
                accepted_tokens: 50,
                ..Telemetry::default()
            },
            drafts: 20,
            accepted_per_pos: Vec::new(),
            top: Vec::new(),
        };
        let best = Best {
            seconds: 8.0,
            drafting: 1.0,
            completions: vec![completion],
        };
        // Plain: 10 tokens/s, so 10 s. With the draft 50 steps of 0.1 s and 1 s of drafting.
        let m = Measure::of(&DraftKind::Ngram, 1, &best, Some(10.0));
        assert!((m.predicted.unwrap() - 10.0 / 6.0).abs() < 1e-12);
        assert_eq!((m.speedup, m.acceptance_rate), (Some(1.25), Some(0.625)));
        assert_eq!(m.mean_accepted_length, Some(3.5));
    }
}
