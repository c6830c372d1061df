//! What a run comes to: the table at its end, and the JSON object for scripts.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use serde_json::{Map, Value, json};

use super::{super::accounts::Asked, Outcome, Run};
use crate::{
    config::{DraftKind, DraftTokens},
    record,
    run::read_metrics,
    types::PluginId,
};

/// Share of the steps whose mean is called the first and the last.
const ENDS: usize = 10;

/// See the file header.
pub(super) struct Summary {
    steps: u64,
    reward: Ends,
    /// Share of drafted tokens that were accepted.
    acceptance: Ends,
    /// Tokens accepted, and drafted, over the run.
    drafted: (u64, u64),
    draft: (DraftKind, DraftTokens),
    buckets: Vec<Bucket>,
    /// Steps of which no group taught anything.
    idle_steps: usize,
    eval_before: Option<f64>,
    eval_after: Option<f64>,
    eval_rows: usize,
    /// The evaluations are accuracies, not rewards.
    is_accuracy: bool,
    best: Option<(u64, f64)>,
    tokens_per_second: f64,
    wall_s: f64,
    run_dir: PathBuf,
    /// What of the deliverables is in it.
    results: Vec<&'static str>,
    plugins: Vec<PluginId>,
    /// What each judge was asked over the run, by its name.
    judges: BTreeMap<String, Asked>,
    stopped_early: bool,
}

/// What a run can leave for its user, and how the table names it.
const RESULTS: [(&str, &str); 4] = [
    ("report.html", "report.html"),
    ("model", "model/"),
    ("adapter", "adapter/"),
    ("draft", "draft/"),
];

/// A bucket of the last step's curriculum; they come hardest first.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Bucket {
    /// `None` while the curriculum has not put any row into it.
    rows: Option<f64>,
    /// Completions of each row.
    rollouts: f64,
}

/// Mean of a metric over the first and over the last tenth of the steps that have it.
#[derive(Clone, Copy, Default)]
struct Ends {
    first: Option<f64>,
    last: Option<f64>,
}

impl Ends {
    fn of(lines: &[Map<String, Value>], metric: &str) -> Self {
        let value = |line: &Map<String, Value>| line.get(metric)?.as_f64();
        let values: Vec<f64> = lines.iter().filter_map(value).collect();
        let edge = values.len().div_ceil(ENDS);
        let mean = |part: &[f64]| crate::evaluate::mean(part.iter().copied());
        Self {
            first: mean(&values[..edge]),
            last: mean(&values[values.len() - edge..]),
        }
    }

    fn show(self, number: impl Fn(Option<f64>) -> String) -> String {
        format!("{} → {}", number(self.first), number(self.last))
    }
}

impl Summary {
    pub(super) fn of(run: &Run<'_>, outcome: &Outcome) -> anyhow::Result<Self> {
        let lines = read_metrics(run.dir.root())?;
        let (trainer, state) = (&run.trainer, &run.trainer.state);
        let wall_s = run.wall_before + run.started.elapsed().as_secs_f64();
        // From the file, because the last evaluation may have been that of an earlier session.
        let trained = lines.iter().rev().filter(|line| line["step"] != 0);
        let eval_after = trained.filter_map(record::headline).next();
        let generation = &trainer.config.generation;
        Ok(Self {
            steps: state.step,
            reward: Ends::of(&lines, "reward"),
            acceptance: Ends::of(&lines, "spec_decode/acceptance_rate"),
            drafted: (
                sum(&lines, "spec_decode/num_accepted_tokens") as u64,
                sum(&lines, "spec_decode/num_draft_tokens") as u64,
            ),
            draft: (generation.draft.clone(), generation.draft_tokens),
            buckets: lines.last().map(buckets).unwrap_or_default(),
            idle_steps: lines.iter().filter(|line| is_idle(line)).count(),
            eval_before: state.eval_before,
            eval_after,
            eval_rows: trainer.rows.eval.len(),
            is_accuracy: lines.iter().any(record::has_accuracy),
            best: state.best.map(|best| (best.step, best.accuracy)),
            tokens_per_second: state.tokens as f64 / wall_s.max(1e-9),
            wall_s,
            results: results(run.dir.root()),
            run_dir: run.dir.root().to_owned(),
            plugins: trainer
                .plugins
                .locked
                .iter()
                .map(|l| l.id.clone())
                .collect(),
            judges: trainer
                .judges
                .names()
                .map(|name| (name.to_owned(), Asked::of(&lines, name)))
                .collect(),
            stopped_early: outcome.stopped_early,
        })
    }

    pub(super) fn json(&self) -> Value {
        let bucket = |b: &Bucket| json!({"rows": b.rows, "rollouts": b.rollouts});
        let best = self.best.map(|(_, value)| value);
        json!({
            "steps": self.steps,
            "idle_steps": self.idle_steps,
            "reward_first": self.reward.first,
            "reward_last": self.reward.last,
            "eval_before": self.eval_before,
            "eval_after": self.eval_after,
            "best_step": self.best.map(|(step, _)| step),
            "best_accuracy": best.filter(|_| self.is_accuracy),
            "best_reward": best.filter(|_| !self.is_accuracy),
            "acceptance_first": self.acceptance.first,
            "acceptance_last": self.acceptance.last,
            "accepted_tokens": self.drafted.0,
            "draft_tokens": self.drafted.1,
            "buckets": self.buckets.iter().map(bucket).collect::<Vec<_>>(),
            "tokens_per_second": self.tokens_per_second,
            "wall_s": self.wall_s,
            "run_dir": self.run_dir,
            "plugins": self.plugins,
            "judges": self.judges,
            "stopped_early": self.stopped_early,
        })
    }

    pub(super) fn table(&self) -> String {
        let (before, after) = (self.score(self.eval_before), self.score(self.eval_after));
        let what = if self.is_accuracy { "" } else { "reward of " };
        let held_out = format!(
            "{before} → {after}   ({what}{} rows, greedy)",
            self.eval_rows
        );
        let early = if self.stopped_early {
            " (no further gain)"
        } else {
            ""
        };
        let speed = format!(
            "{:.0} tokens/s, {:.1} s",
            self.tokens_per_second, self.wall_s
        );
        let mut rows = vec![("reward", self.reward.show(number)), ("held-out", held_out)];
        rows.extend(self.best().map(|text| ("best", text)));
        rows.extend(self.drafted().map(|text| ("draft", text)));
        rows.extend(self.rollouts().map(|text| ("rollouts", text)));
        let idle = match self.idle_steps {
            0 => String::new(),
            n => format!(", {n} of them with nothing to learn from"),
        };
        rows.push(("steps", format!("{}{idle}{early}", self.steps)));
        rows.push(("speed", speed));
        for plugin in &self.plugins {
            let role = format!("{:?}", plugin.role).to_lowercase();
            let text = format!("{role} {} {}", plugin.name, &plugin.digest[..19]);
            rows.push(("plugin", text));
        }
        let judges = self.judges.iter();
        rows.extend(judges.map(|(name, asked)| ("judge", asked.show(name))));
        let run = self.run_dir.display();
        let run = match self.results.join(", ") {
            none if none.is_empty() => run.to_string(),
            results => format!("{run} ({results})"),
        };
        rows.push(("run", run));
        let line = |(name, value): &(&str, String)| format!("{name:>9}  {value}\n");
        rows.iter().map(line).collect()
    }

    /// An evaluation's number: an accuracy, or a reward where rows have no answer.
    fn score(&self, value: Option<f64>) -> String {
        match self.is_accuracy {
            true => percent(value),
            false => number(value),
        }
    }

    /// The best evaluation, and where its weights are: `model/` has those of the last step.
    fn best(&self) -> Option<String> {
        let (step, value) = self.best?;
        let value = self.score(Some(value));
        let folder = format!("checkpoints/step-{step}");
        Some(if step == 0 {
            format!("{value} at step 0: the model it started from")
        } else if self.run_dir.join(&folder).is_dir() {
            format!("{value} at step {step} ({folder})")
        } else {
            format!("{value} at step {step}")
        })
    }

    /// What became of drafted tokens; `None` where none were.
    fn drafted(&self) -> Option<String> {
        self.acceptance.first?;
        let (kind, tokens) = &self.draft;
        let tokens = match tokens {
            DraftTokens::Auto => "as many tokens as pay".to_owned(),
            DraftTokens::Fixed(tokens) => format!("{tokens} tokens"),
        };
        let rates = self.acceptance.show(percent);
        let (accepted, drafted) = self.drafted;
        Some(format!(
            "{rates} accepted   ({accepted} of {drafted} tokens; {kind}, {tokens} at a time)"
        ))
    }

    /// Completions per row of each bucket; `None` for a curriculum that has no buckets.
    fn rollouts(&self) -> Option<String> {
        let last = self.buckets.len().checked_sub(1)?;
        let show = |(i, bucket): (usize, &Bucket)| {
            let name = match i {
                _ if last == 0 => "all",
                0 => "hard",
                i if i == last => "easy",
                _ => "medium",
            };
            let rows = bucket
                .rows
                .map_or_else(String::new, |rows| format!(" ({rows} rows)"));
            format!("{name} {} each{rows}", bucket.rollouts)
        };
        let buckets: Vec<String> = self.buckets.iter().enumerate().map(show).collect();
        Some(buckets.join(", "))
    }
}

fn number(value: Option<f64>) -> String {
    value.map_or("–".to_owned(), |value| format!("{value:.3}"))
}

fn percent(share: Option<f64>) -> String {
    share.map_or("–".to_owned(), |share| format!("{:.1} %", 100.0 * share))
}

/// The buckets that a curriculum reports as `bucket_I/n` and `bucket_I/rollouts` (docs/plugins.md).
fn buckets(line: &Map<String, Value>) -> Vec<Bucket> {
    let of = |i: usize, name: &str| line.get(&format!("curriculum/bucket_{i}/{name}"))?.as_f64();
    let bucket = |i| {
        let (rows, rollouts) = of(i, "n").zip(of(i, "rollouts"))?;
        let rows = (rows > 0.0).then_some(rows);
        Some(Bucket { rows, rollouts })
    };
    (0..).map_while(bucket).collect()
}

/// Whether no group of a step taught anything; a line before the first step is none.
fn is_idle(line: &Map<String, Value>) -> bool {
    let groups = line.get("sampling/teaching_groups").and_then(Value::as_f64);
    groups == Some(0.0)
}

fn sum(lines: &[Map<String, Value>], metric: &str) -> f64 {
    let value = |line: &Map<String, Value>| line.get(metric)?.as_f64();
    lines.iter().filter_map(value).sum()
}

/// The [`RESULTS`] that are in the run directory, as the table names them.
fn results(run: &Path) -> Vec<&'static str> {
    let there = |(name, _): &(&str, &str)| run.join(name).exists();
    RESULTS
        .into_iter()
        .filter(there)
        .map(|(_, shown)| shown)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(json: Value) -> Map<String, Value> {
        serde_json::from_value(json).unwrap()
    }

    #[test]
    fn ends_are_means_of_a_tenth() {
        let lines: Vec<_> = (0..20)
            .map(|i| line(json!({"reward": i, "step": i})))
            .collect();
        let ends = Ends::of(&lines, "reward");
        assert_eq!((ends.first, ends.last), (Some(0.5), Some(18.5)));
        let none = Ends::of(&lines, "spec_decode/acceptance_rate");
        assert_eq!((none.first, none.last), (None, None));
    }

    #[test]
    fn buckets_end_at_the_first_that_is_missing() {
        let line = line(json!({
            "curriculum/bucket_0/n": 4, "curriculum/bucket_0/rollouts": 10,
            "curriculum/bucket_1/n": 96, "curriculum/bucket_1/rollouts": 5,
            "curriculum/bucket_3/n": 1, "curriculum/bucket_3/rollouts": 1,
        }));
        let bucket = |rows, rollouts| Bucket { rows, rollouts };
        let expected = [bucket(Some(4.0), 10.0), bucket(Some(96.0), 5.0)];
        assert_eq!(buckets(&line), expected);
    }
}
