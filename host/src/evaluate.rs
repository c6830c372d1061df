//! Accuracy and reward on held-out rows: greedy, or several samples a row for pass@k.

use std::collections::HashSet;

use grpo_policy::engine::Progress;

use crate::{
    config::RunConfig,
    plugin::{FormatterPlugin, RewardPlugin, RewardSet},
    policy::Policy,
    rollout::{Job, RollError, Rollouts, roll},
    speculation::Speculation,
    types::{Row, Sample, SamplingParams, Score},
};

/// Column that holds the expected answer; rows without it have no accuracy, only a reward.
const ANSWER: &str = "answer";

/// What to evaluate with. The rewards of the run give the reward; accuracy is always judged by the
/// shipped `reward-math`, so that it means the same in every run.
pub struct Judges<'a> {
    pub formatter: &'a FormatterPlugin,
    pub rewards: &'a RewardSet,
    pub math: &'a RewardPlugin,
}

/// How to sample.
#[derive(Clone, Debug)]
pub struct EvalSettings {
    pub sampling: SamplingParams,
    /// Samples per row; with 1 and temperature 0 this is greedy evaluation.
    pub samples: u32,
    pub seed: u64,
}

impl EvalSettings {
    /// As a run's config says: greedy for one sample a row, else at the run's temperature.
    pub fn of(config: &RunConfig) -> Self {
        let mut sampling = config.generation.sampling();
        if config.eval.eval_samples == 1 {
            sampling.temperature = 0.0;
        }
        Self {
            sampling,
            samples: config.eval.eval_samples,
            seed: config.training.seed,
        }
    }
}

/// Result of an evaluation. Accuracies are in [0, 1]: the mean over rows of the share of right samples.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct EvalReport {
    /// Rows evaluated.
    pub n: usize,
    /// The answer in the form asked for (`#### 42`, or nothing but the number).
    pub accuracy_strict: Option<f64>,
    /// The last number of the completion.
    pub accuracy_flexible: Option<f64>,
    /// Share of rows with at least one (flexibly) right sample; with more than one sample a row only.
    pub pass_at_k: Option<f64>,
    /// Mean total reward of the run's rewards over scored samples.
    pub reward: Option<f64>,
    pub skipped: usize,
    /// Mean tokens of a completion.
    pub mean_length: f64,
    /// Rows whose prompt did not fit.
    pub too_long: usize,
    /// Rows that accuracy is over: those with an answer.
    pub answered: usize,
    /// What was drafted for the completions, all of them.
    pub speculation: Speculation,
}

impl EvalReport {
    /// The number that early stopping and "best checkpoint" compare: accuracy where there is one.
    pub fn headline(&self) -> Option<f64> {
        self.accuracy_flexible.or(self.reward)
    }
}

/// Continues every row and judges the completions.
pub fn evaluate(
    policy: &mut Policy,
    judges: &Judges<'_>,
    rows: &[Row],
    settings: &EvalSettings,
    on_progress: &mut dyn FnMut(Progress),
) -> anyhow::Result<EvalReport> {
    let job = Job {
        wave: 0,
        rows: rows.iter().map(|row| (row, settings.samples)).collect(),
        sampling: &settings.sampling,
        max_prompt_tokens: None,
        seed: settings.seed,
    };
    let rolled = policy.generate_apart(|policy| {
        let rolled = roll(policy, judges.formatter, &job, on_progress);
        rolled.map_err(RollError::into_inner)
    })?;
    let mut report = EvalReport {
        n: rolled.rollouts.len(),
        too_long: rolled.too_long.len(),
        ..EvalReport::default()
    };
    let completions = rolled.rollouts.iter().flat_map(|r| &r.completions);
    report.speculation = Speculation::of(completions.clone());
    let lengths = completions.map(|c| c.tokens.len() as f64);
    report.mean_length = mean(lengths).unwrap_or(0.0);
    let samples: Vec<Sample<'_>> = rolled.rollouts.iter().flat_map(samples_of).collect();
    let scores = judges.rewards.score(&samples)?.scores;
    report.skipped = scores
        .iter()
        .filter(|s| matches!(s, Score::Skip(_)))
        .count();
    report.reward = mean(scores.iter().filter_map(|s| match s {
        Score::Value(scored) => Some(scored.total),
        Score::Skip(_) => None,
    }));
    // Accuracy is that of the rows that say what is right; `null` says nothing.
    let says = |row: &&Row| row.json.get(ANSWER).is_some_and(|answer| !answer.is_null());
    let answered: HashSet<u64> = rows.iter().filter(says).map(|row| row.id).collect();
    let judged: Vec<Sample<'_>> = samples
        .into_iter()
        .filter(|sample| answered.contains(&sample.row_id))
        .collect();
    if !judged.is_empty() {
        judge_answers(judges.math, &judged, settings.samples, &mut report)?;
    }
    Ok(report)
}

fn judge_answers(
    math: &RewardPlugin,
    samples: &[Sample<'_>],
    per_row: u32,
    report: &mut EvalReport,
) -> anyhow::Result<()> {
    report.answered = samples.len() / per_row as usize;
    let scores = math.score(samples)?.scores;
    let part = |score: &Score, name: &str| match score {
        Score::Value(scored) => {
            let found = scored.parts.iter().find(|(part, _)| part == name);
            found.map_or(0.0, |(_, value)| *value)
        }
        // The row has no number to compare with: not answerable, hence not answered.
        Score::Skip(_) => 0.0,
    };
    report.accuracy_strict = mean(scores.iter().map(|s| part(s, "strict")));
    report.accuracy_flexible = mean(scores.iter().map(|s| part(s, "flexible")));
    if per_row > 1 {
        let rows = scores.chunks(per_row as usize);
        let solved =
            rows.map(|row| f64::from(u8::from(row.iter().any(|s| part(s, "flexible") > 0.0))));
        report.pass_at_k = mean(solved);
    }
    Ok(())
}

/// The completions of one prompt as rewards see them.
pub fn samples_of(rollouts: &Rollouts) -> impl Iterator<Item = Sample<'_>> {
    let pairs = rollouts.completions.iter().zip(&rollouts.parsed);
    pairs.map(|(completion, parsed)| Sample {
        row_id: rollouts.row,
        row_json: &rollouts.row_json,
        prompt: &rollouts.prompt,
        completion: &completion.text,
        parsed,
        finish: completion.finish,
        telemetry: completion.telemetry,
    })
}

/// Mean of the values, if there are any.
pub fn mean(values: impl Iterator<Item = f64>) -> Option<f64> {
    let (mut sum, mut n) = (0.0, 0usize);
    for value in values {
        sum += value;
        n += 1;
    }
    (n > 0).then(|| sum / n as f64)
}
