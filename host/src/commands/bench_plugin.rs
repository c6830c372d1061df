//! `bench plugin`: what a call into a reward costs: warm, with a fresh instance each time, and as a
//! training step makes it, without and with a warm pool. Host-side lowering and result checks are included.

use super::{accounts::settle, sources_on_trial};
use crate::cli::{BenchPluginArgs, Environment};
use crate::plugin::{
    Limits, Plugin, PluginError, PluginHost, Prepared, RewardPlugin, RewardSet, Warm, Weighted,
};
use crate::setup::{Component, PluginSources};
use crate::types::{Finish, Parsed, Sample, Telemetry};
use serde::Serialize;
use serde_json::{Map, Value, json};
use std::sync::Arc;
use std::time::Instant;

/// Completions that share a row, as in a GRPO group.
const GROUP: usize = 8;
/// Share of a sample's bytes in its row and in its prompt; the completion has the rest.
const ROW_SHARE: usize = 5;
const PROMPT_SHARE: usize = 4;

/// What to measure.
#[derive(Clone, Debug, Serialize)]
struct PluginBench {
    /// A shipped reward or a file.
    plugin: String,
    config: Value,
    /// What it is granted, as a config says it.
    grants: Map<String, Value>,
    /// Samples per call.
    samples: usize,
    /// Bytes of row, prompt and completion of one sample together.
    sample_bytes: usize,
    /// Calls that are timed, after a tenth as many that are not.
    calls: usize,
}

impl PluginBench {
    /// Without a plugin it is `reward-format` with every check switched off, which leaves the price of
    /// the call itself; compare with `reward-math`, which reads the texts.
    fn of(args: &BenchPluginArgs) -> Self {
        let (plugin, config) = match &args.plugin {
            Some(plugin) => (
                plugin.source.clone(),
                Value::Object(args.config.clone().unwrap_or_default()),
            ),
            None => ("reward-format".to_owned(), json!({"tags": []})),
        };
        Self {
            plugin,
            config,
            grants: args.access.grants.clone(),
            samples: args.samples as usize,
            sample_bytes: args.bytes as usize,
            calls: args.calls as usize,
        }
    }
}

/// One number.
#[derive(Clone, Debug, Serialize)]
struct PluginMeasure {
    name: String,
    /// Always `us`: microseconds per call.
    unit: &'static str,
    value: f64,
}

/// A plugin of another role.
#[derive(Debug, thiserror::Error)]
#[error("`{plugin}` is not a reward")]
pub struct PluginBenchError {
    plugin: String,
}

impl PluginBenchError {
    /// What the reader can do about it.
    pub fn hint(&self) -> Option<String> {
        Some("give a reward component, reward-math or reward-format".to_owned())
    }
}

/// Measures, and prints a short table or one JSON object.
pub(super) fn run(args: &BenchPluginArgs, environment: &Environment) -> anyhow::Result<()> {
    let bench = PluginBench::of(args);
    let sources = sources_on_trial(&args.access, args.output.quiet, environment)?;
    let measures = measure(&bench, &sources)?;
    let asked = settle(sources.judges());
    if args.output.json {
        let mut object = object(&bench, &measures)?;
        object["judges"] = json!(asked);
        outln!("{object}");
        return Ok(());
    }
    for m in &measures {
        outln!("{:>16}  {:>8.1} {}", m.name, m.value, m.unit);
    }
    if !args.output.quiet {
        outln!(
            "{} calls of {} samples of {} bytes into {}",
            bench.calls,
            bench.samples,
            bench.sample_bytes,
            bench.plugin
        );
        for (judge, asked) in &asked {
            outln!("judge  {}", asked.show(judge));
        }
    }
    Ok(())
}

/// The warm median with the parameters, and all numbers under `metrics`.
fn object(bench: &PluginBench, measures: &[PluginMeasure]) -> anyhow::Result<Value> {
    #[derive(Serialize)]
    struct Object<'a> {
        #[serde(flatten)]
        headline: Option<&'a PluginMeasure>,
        #[serde(flatten)]
        bench: &'a PluginBench,
        metrics: &'a [PluginMeasure],
    }
    Ok(serde_json::to_value(Object {
        headline: measures.first(),
        bench,
        metrics: measures,
    })?)
}

/// Median and 99th percentile of a warm call, of one into a fresh instance, of a step's scoring
/// (a fresh instance, with weights and names on top), and of that with a warm pool of one:
/// `plugin_warm_p50` to `plugin_pool_p99`.
fn measure(bench: &PluginBench, sources: &PluginSources) -> anyhow::Result<Vec<PluginMeasure>> {
    let prepared = prepare(&bench.plugin, &bench.grants, sources)?;
    let plugin = reward(&prepared, &bench.config, None)?;
    let texts = texts(bench);
    let parsed = Parsed::default();
    let batch: Vec<Sample<'_>> = texts
        .iter()
        .flat_map(|text| text.completions.iter().map(move |c| (text, c)))
        .map(|(text, completion)| sample(text, completion, &parsed))
        .collect();
    let mut instance = plugin.warm()?;
    let warm = micros(bench.calls, || instance.score(&batch).map(drop))?;
    drop(instance);
    let fresh = micros(bench.calls, || plugin.score(&batch).map(drop))?;
    let (reward_alone, weight) = (plugin, 1.0);
    let set = |reward| RewardSet::new(vec![Weighted { reward, weight }]);
    let stepping = set(reward_alone)?;
    let step = micros(bench.calls, || stepping.score(&batch).map(drop))?;
    let pooled = set(reward(&prepared, &bench.config, Some(Warm::default()))?)?;
    let pool = micros(bench.calls, || pooled.score(&batch).map(drop))?;
    let mut measures = Vec::new();
    for (kind, times) in [
        ("warm", &warm),
        ("fresh", &fresh),
        ("step", &step),
        ("pool", &pool),
    ] {
        for quantile in [0.5, 0.99] {
            measures.push(PluginMeasure {
                name: format!("plugin_{kind}_p{:.0}", quantile * 100.0),
                unit: "us",
                value: at(times, quantile),
            });
        }
    }
    Ok(measures)
}

/// A shipped reward or a file, with `config`.
///
/// # Errors
/// [`PluginBenchError`] for a plugin of another role; those of loading it.
pub(super) fn load_reward(
    source: &str,
    config: &Value,
    environment: &Environment,
) -> anyhow::Result<RewardPlugin> {
    let sources = PluginSources::new(environment, &[])?;
    reward(&prepare(source, &Map::new(), &sources)?, config, None)
}

fn prepare(
    source: &str,
    grants: &Map<String, Value>,
    sources: &PluginSources,
) -> anyhow::Result<Prepared> {
    let limits = Limits::default();
    let Component { name, bytes, .. } = sources.component(source, &limits)?;
    let access = sources.access(&name, grants)?;
    // Printing the guest's lines would be measured with it.
    let host = PluginHost::new(Arc::new(|_| {}))?;
    Ok(host.prepare_with(&name, &bytes, &limits, access)?)
}

fn reward(prepared: &Prepared, config: &Value, warm: Option<Warm>) -> anyhow::Result<RewardPlugin> {
    match prepared.configure(config, warm)? {
        Plugin::Reward(plugin) => Ok(plugin),
        other @ (Plugin::Formatter(_) | Plugin::Curriculum(_)) => {
            let plugin = other.id().name.clone();
            Err(PluginBenchError { plugin }.into())
        }
    }
}

/// What a group shares, and its completions.
struct Texts {
    row: String,
    prompt: String,
    completions: Vec<String>,
}

/// `bytes` of sentences about `n`.
pub(super) fn words(n: usize, bytes: usize) -> String {
    let sentence = format!("Then {n} of the apples are sold, and some more are bought. ");
    let mut text = sentence.repeat(bytes / sentence.len() + 1);
    text.truncate(bytes);
    text
}

/// GSM8K-like texts of the size asked for, in groups of [`GROUP`].
fn texts(bench: &PluginBench) -> Vec<Texts> {
    let bytes = bench.sample_bytes;
    let group = |first: usize| {
        let group = first / GROUP;
        let question = words(group, bytes / ROW_SHARE);
        let row = format!(r#"{{"question": "{question}", "answer": "So it is\n#### {group}"}}"#);
        let prompt = words(group, bytes / PROMPT_SHARE);
        let rest = bytes.saturating_sub(row.len() + prompt.len());
        let completion = |i| format!("<think>{}</think> The answer is {group}.", words(i, rest));
        Texts {
            row,
            prompt,
            completions: (first..bench.samples.min(first + GROUP))
                .map(completion)
                .collect(),
        }
    };
    (0..bench.samples).step_by(GROUP).map(group).collect()
}

fn sample<'a>(texts: &'a Texts, completion: &'a str, parsed: &'a Parsed) -> Sample<'a> {
    Sample {
        row_id: 0,
        row_json: &texts.row,
        prompt: &texts.prompt,
        completion,
        parsed,
        finish: Finish::Stop,
        telemetry: Telemetry::default(),
    }
}

/// Sorted durations of `calls` calls.
fn micros(
    calls: usize,
    mut call: impl FnMut() -> Result<(), PluginError>,
) -> Result<Vec<f64>, PluginError> {
    for _ in 0..calls.div_ceil(10) {
        call()?;
    }
    let mut times = Vec::with_capacity(calls);
    for _ in 0..calls {
        let begun = Instant::now();
        call()?;
        times.push(begun.elapsed().as_secs_f64() * 1e6);
    }
    times.sort_by(f64::total_cmp);
    Ok(times)
}

/// The value below which a share of the sorted values lies, by the nearest rank.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_precision_loss,
    reason = "an index below the length"
)]
fn at(sorted: &[f64], quantile: f64) -> f64 {
    let rank = (quantile * sorted.len() as f64).ceil() as usize;
    let last = sorted.len().saturating_sub(1);
    sorted
        .get(rank.saturating_sub(1).min(last))
        .copied()
        .unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sources() -> PluginSources {
        PluginSources::new(&Environment::default(), &[]).unwrap()
    }

    #[test]
    fn nearest_rank() {
        let values: Vec<f64> = (1..=100).map(f64::from).collect();
        assert_eq!((at(&values, 0.5), at(&values, 0.99)), (50.0, 99.0));
        assert_eq!(at(&[7.0], 0.99), 7.0);
    }

    #[test]
    fn measures_the_calls_of_training() {
        let bench = PluginBench {
            plugin: "reward-format".to_owned(),
            config: json!({"tags": []}),
            grants: Map::new(),
            samples: 64,
            sample_bytes: 2500,
            calls: 20,
        };
        let measures = measure(&bench, &sources()).unwrap();
        let names: Vec<&str> = measures.iter().map(|m| m.name.as_str()).collect();
        let expected = [
            "plugin_warm_p50",
            "plugin_warm_p99",
            "plugin_fresh_p50",
            "plugin_fresh_p99",
            "plugin_step_p50",
            "plugin_step_p99",
            "plugin_pool_p50",
            "plugin_pool_p99",
        ];
        assert_eq!(names, expected);
        assert!(measures.iter().all(|m| m.value > 0.0 && m.value < 1e6));
        let groups = texts(&bench);
        assert_eq!((groups.len(), groups[7].completions.len()), (8, 8));
        let bytes: Vec<usize> = groups
            .iter()
            .map(|t| t.row.len() + t.prompt.len() + t.completions[0].len())
            .collect();
        assert!(bytes.iter().all(|n| (2500..2600).contains(n)), "{bytes:?}");
        let json = object(&bench, &measures).unwrap();
        assert_eq!(
            (&json["name"], &json["unit"]),
            (&names[0].into(), &"us".into())
        );
        assert_eq!(json["samples"], 64);
        assert_eq!(json["metrics"][5]["value"], measures[5].value);
    }

    #[test]
    fn refuses_other_roles() {
        let bench = PluginBench {
            plugin: "formatter-chat".to_owned(),
            config: json!({}),
            grants: Map::new(),
            samples: 1,
            sample_bytes: 100,
            calls: 1,
        };
        let error = measure(&bench, &sources()).unwrap_err();
        assert_eq!(error.to_string(), "`formatter-chat` is not a reward");
    }
}
