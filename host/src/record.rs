//! Step 12 of the loop: what a step leaves in the run directory. Metric names are TRL's; `telemetry/…`,
//! `time/…` and `judge/…` are ours, and only those three, `step_time` and `tokens_per_second` may differ between two
//! runs with the same seed.

use std::collections::HashMap;

use serde_json::{Map, Value};

use crate::{
    evaluate::{EvalReport, mean},
    judge::Usage,
    run::Rollout,
    trainer::{Group, StepReport},
    types::{Completion, Finish, Plan, PluginId, Score, Telemetry},
};

/// Metric values in the order they are written.
#[derive(Clone, Debug, Default)]
pub struct Metrics(pub Map<String, Value>);

impl Metrics {
    fn put(&mut self, name: &str, value: f64) {
        // JSON has no NaN; a metric that is not a number is left out rather than written as null. Adding 0
        // makes a 0 of the -0 that an empty sum is.
        if let Some(number) = serde_json::Number::from_f64(value + 0.0) {
            self.0.insert(name.to_owned(), Value::Number(number));
        }
    }

    /// Adds what swaps of rewards have to say.
    pub fn add_swaps(&mut self, numbers: &[(&'static str, f64)]) {
        for (name, value) in numbers {
            self.put(name, *value);
        }
    }

    /// Adds what judges were asked, as `judge/NAME/…`.
    pub fn add_judges(&mut self, usage: &[(String, Usage)]) {
        for (judge, usage) in usage {
            for (name, value) in usage.metrics() {
                self.put(&format!("judge/{judge}/{name}"), value);
            }
        }
    }

    /// Adds an evaluation under `eval_…`.
    pub fn add_eval(&mut self, eval: &EvalReport) {
        let named = [
            ("eval_accuracy_strict", eval.accuracy_strict),
            (ACCURACY, eval.accuracy_flexible),
            ("eval_pass_at_k", eval.pass_at_k),
            ("eval_reward", eval.reward),
            ("eval_completions/mean_length", Some(eval.mean_length)),
        ];
        for (name, value) in named {
            self.put_known(name, value);
        }
    }

    fn put_known(&mut self, name: &str, value: Option<f64>) {
        if let Some(value) = value {
            self.put(name, value);
        }
    }
}

/// The line of `curriculum.jsonl` of a plan that reports something.
pub fn curriculum(plan: &Plan) -> serde_json::Result<Option<Map<String, Value>>> {
    if plan.report.is_empty() {
        return Ok(None);
    }
    let tables = serde_json::to_value(&plan.report)?;
    let line = [("epoch", plan.epoch.into()), ("tables", tables)];
    let line = line.map(|(key, value)| (key.to_owned(), value));
    Ok(Some(line.into_iter().collect()))
}

/// What [`EvalReport::headline`] was, of a line that has an evaluation.
pub fn headline(line: &Map<String, Value>) -> Option<f64> {
    let accuracy = line.get(ACCURACY);
    accuracy.or_else(|| line.get("eval_reward"))?.as_f64()
}

/// Whether that was an accuracy, and not a reward.
pub fn has_accuracy(line: &Map<String, Value>) -> bool {
    line.contains_key(ACCURACY)
}

/// Metric of an evaluation over rows with an answer.
const ACCURACY: &str = "eval_accuracy_flexible";

/// The metrics line of a step. What is undefined is not in it: without a group there is neither reward nor
/// loss.
pub fn metrics(report: &StepReport, total_tokens: u64) -> Metrics {
    let mut out = Metrics::default();
    let stats = &report.advantages.stats;
    if !report.groups.is_empty() {
        out.put("loss", report.update.loss);
        out.put("grad_norm", report.update.grad_norm);
    }
    out.put("learning_rate", report.learning_rate);
    out.put("epoch", report.plan.epoch);
    out.put("num_tokens", total_tokens as f64);
    out.put_known("reward", stats.reward);
    out.put_known("reward_std", stats.reward_std);
    out.put_known("frac_reward_zero_std", stats.frac_reward_zero_std);
    add_reward_parts(&mut out, &report.groups);
    add_lengths(&mut out, &report.groups);
    for (name, value) in report.update.stats.metrics() {
        out.put(name, value);
    }
    for (name, count) in &report.skipped {
        out.put(&format!("rewards/{name}/skipped"), f64::from(*count));
    }
    out.put(
        "sampling/dropped_groups",
        report.sampling.dropped_groups as f64,
    );
    out.put("sampling/refills", f64::from(report.sampling.refills));
    add_budget(&mut out, report);
    out.put("prompts/too_long", report.sampling.too_long as f64);
    for (name, value) in &report.plan.metrics {
        out.put(&format!("curriculum/{name}"), *value);
    }
    // A plugin knows its own plan only, and a step may ask for several.
    out.put("curriculum/completions", report.sampling.planned as f64);
    add_telemetry(&mut out, &report.groups);
    for (name, value) in report.sampling.speculation.metrics() {
        out.put(&name, value);
    }
    if let Some(lesson) = &report.draft {
        out.put("draft/loss", lesson.loss);
        out.put("draft/grad_norm", lesson.grad_norm);
    }
    add_times(&mut out, report);
    out
}

/// What the step's completions were spent on.
fn add_budget(out: &mut Metrics, report: &StepReport) {
    let taught: usize = report.teaching().map(|g| g.advantages.len()).sum();
    let drawn = report.sampling.completions as f64;
    out.put("sampling/completions", drawn);
    out.put(
        "sampling/respent_completions",
        report.sampling.respent as f64,
    );
    out.put("sampling/teaching_groups", report.teaching().count() as f64);
    out.put("sampling/teaching_fraction", taught as f64 / drawn);
}

/// `rewards/NAME/mean` and `/std` of each reward and each of its parts, over scored samples.
fn add_reward_parts(out: &mut Metrics, groups: &[Group]) {
    let mut series: Vec<(&str, Vec<f64>)> = Vec::new();
    for score in groups.iter().flat_map(|g| &g.scores) {
        let Score::Value(scored) = score else {
            continue;
        };
        for (name, value) in &scored.parts {
            match series.iter_mut().find(|(known, _)| known == name) {
                Some((_, values)) => values.push(*value),
                None => series.push((name, vec![*value])),
            }
        }
    }
    for (name, values) in series {
        let n = values.len() as f64;
        let mean = values.iter().sum::<f64>() / n;
        let squares: f64 = values.iter().map(|v| (v - mean).powi(2)).sum();
        out.put(&format!("rewards/{name}/mean"), mean);
        // The deviation of a sample, as torch computes it.
        out.put(
            &format!("rewards/{name}/std"),
            (squares / (n - 1.0).max(1.0)).sqrt(),
        );
    }
}

fn add_lengths(out: &mut Metrics, groups: &[Group]) {
    let completions = || groups.iter().flat_map(|g| &g.rollouts.completions);
    let length = |c: &Completion| c.tokens.len() as f64;
    let ended = |c: &&Completion| c.finish == Finish::Stop;
    let all: Vec<f64> = completions().map(length).collect();
    let terminated: Vec<f64> = completions().filter(ended).map(length).collect();
    for (kind, lengths) in [("length", &all), ("terminated_length", &terminated)] {
        if let Some(mean) = mean(lengths.iter().copied()) {
            out.put(&format!("completions/mean_{kind}"), mean);
            let min = lengths.iter().copied().fold(f64::INFINITY, f64::min);
            let max = lengths.iter().copied().fold(0.0, f64::max);
            out.put(&format!("completions/min_{kind}"), min);
            out.put(&format!("completions/max_{kind}"), max);
        }
    }
    let clipped = (all.len() - terminated.len()) as f64 / all.len() as f64;
    out.put("completions/clipped_ratio", clipped);
}

fn add_telemetry(out: &mut Metrics, groups: &[Group]) {
    let telemetry: Vec<&Telemetry> = groups
        .iter()
        .flat_map(|g| &g.rollouts.completions)
        .map(|c| &c.telemetry)
        .collect();
    let mut put = |name: &str, value: &dyn Fn(&Telemetry) -> f64| {
        if let Some(mean) = mean(telemetry.iter().map(|t| value(t))) {
            out.put(&format!("telemetry/{name}"), mean);
        }
    };
    put("latency_ms", &|t| t.latency_ms);
    put("queue_ms", &|t| t.queue_ms);
    put("prefill_ms", &|t| t.prefill_ms);
    put("decode_ms", &|t| t.decode_ms);
    put("prompt_tokens", &|t| f64::from(t.prompt_tokens));
    put("cached_prompt_tokens", &|t| {
        f64::from(t.cached_prompt_tokens)
    });
    put("kv_bytes", &|t| t.kv_bytes as f64);
}

fn add_times(out: &mut Metrics, report: &StepReport) {
    let seconds = &report.seconds;
    out.put("step_time", seconds.total);
    out.put("time/plan", seconds.plan);
    out.put("time/rollout", seconds.rollout);
    out.put("time/reward", seconds.reward);
    out.put("time/update", seconds.update);
    out.put(
        "tokens_per_second",
        report.sampling.tokens as f64 / seconds.total.max(1e-9),
    );
}

/// The step's completions for the rollout log.
pub fn rollouts(report: StepReport) -> Vec<Rollout> {
    let ids: HashMap<u32, Vec<PluginId>> = report.scored_by.into_iter().collect();
    let mut out = Vec::new();
    for (number, group) in report.groups.into_iter().enumerate() {
        let Group {
            rollouts,
            scores,
            advantages,
        } = group;
        let samples = rollouts.completions.into_iter().zip(rollouts.parsed);
        let samples = samples.zip(rollouts.waves).zip(scores).zip(advantages);
        for ((((completion, parsed), wave), score), advantage) in samples {
            let (reward, parts, skip) = match score {
                Score::Value(scored) => (Some(scored.total), scored.parts, None),
                Score::Skip(reason) => (None, Vec::new(), Some(reason)),
            };
            out.push(Rollout {
                step: report.step,
                row_id: rollouts.row,
                row: rollouts.row_json.clone(),
                group: number as u32,
                wave: Some(wave),
                prompt: rollouts.prompt.clone(),
                prompt_ids: rollouts.prompt_ids.clone(),
                completion,
                parsed,
                reward,
                parts,
                advantage,
                skip,
                plugins: ids.get(&wave).cloned().unwrap_or_default(),
            });
        }
    }
    out
}
