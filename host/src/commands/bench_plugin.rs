//! `bench plugin`: what a call into a reward costs, warm and with a fresh instance each time.
//!
//! Measures the calls that training makes, host-side lowering and result checks included. Printing
//! is the caller's business.

use crate::defaults;
use crate::plugin::{Limits, Plugin, PluginError, PluginHost, RewardPlugin};
use crate::types::{Finish, Parsed, Sample, Telemetry};
use serde::Serialize;
use std::sync::Arc;
use std::time::Instant;

/// Completions that share a row, as in a GRPO group.
const GROUP: usize = 8;
/// Share of a sample's bytes in its row and in its prompt; the completion has the rest.
const ROW_SHARE: usize = 5;
const PROMPT_SHARE: usize = 4;

/// What to measure.
#[derive(Clone, Debug, Serialize)]
pub struct PluginBench {
    /// A shipped reward.
    pub plugin: &'static str,
    /// Its config. The default switches every check of `reward-format` off, which leaves the price of
    /// the call itself; compare with `reward-math` and `{}`, which read the texts.
    pub config: serde_json::Value,
    /// Samples per call.
    pub samples: usize,
    /// Bytes of row, prompt and completion of one sample together.
    pub sample_bytes: usize,
    /// Calls that are timed, after a tenth as many that are not.
    pub calls: usize,
}

impl Default for PluginBench {
    fn default() -> Self {
        Self {
            plugin: "reward-format",
            config: serde_json::json!({"tags": []}),
            samples: 64,
            sample_bytes: 2500,
            calls: 2000,
        }
    }
}

/// One number, as `--json` prints it.
#[derive(Clone, Debug, Serialize)]
pub struct PluginMeasure {
    pub name: String,
    /// Always `us`: microseconds per call.
    pub unit: &'static str,
    pub value: f64,
    #[serde(flatten)]
    pub params: PluginBench,
}

/// Why a measurement was not made.
#[derive(Debug, thiserror::Error)]
pub enum PluginBenchError {
    #[error("`{0}` is not a shipped reward")]
    NotAReward(&'static str),
    #[error("nothing to measure: {samples} samples, {calls} calls")]
    Nothing { samples: usize, calls: usize },
    #[error(transparent)]
    Plugin(#[from] PluginError),
}

impl PluginBenchError {
    /// What the reader can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::NotAReward(_) => Some("use reward-math or reward-format".to_owned()),
            Self::Nothing { .. } => Some("ask for at least one of each".to_owned()),
            Self::Plugin(error) => error.hint(),
        }
    }
}

/// Median and 99th percentile of warm and of fresh calls: `plugin_warm_p50`, `plugin_warm_p99`,
/// `plugin_fresh_p50`, `plugin_fresh_p99`.
///
/// # Errors
/// An unknown plugin, nothing to do, or the plugin's own failure.
pub fn run(bench: &PluginBench) -> Result<Vec<PluginMeasure>, PluginBenchError> {
    let (samples, calls) = (bench.samples, bench.calls);
    if samples == 0 || calls == 0 {
        return Err(PluginBenchError::Nothing { samples, calls });
    }
    let plugin = load(bench)?;
    let texts = texts(bench);
    let parsed = Parsed::default();
    let batch: Vec<Sample<'_>> = texts.iter().map(|text| sample(text, &parsed)).collect();
    let mut warm = plugin.warm()?;
    let warm = micros(calls, || warm.score(&batch).map(drop))?;
    let fresh = micros(calls, || plugin.score(&batch).map(drop))?;
    let measure = |kind: &str, times: &[f64], quantile: f64| PluginMeasure {
        name: format!("plugin_{kind}_p{:.0}", quantile * 100.0),
        unit: "us",
        value: at(times, quantile),
        params: bench.clone(),
    };
    Ok(vec![
        measure("warm", &warm, 0.5),
        measure("warm", &warm, 0.99),
        measure("fresh", &fresh, 0.5),
        measure("fresh", &fresh, 0.99),
    ])
}

fn load(bench: &PluginBench) -> Result<RewardPlugin, PluginBenchError> {
    let name = bench.plugin;
    let bytes = defaults::component(name).ok_or(PluginBenchError::NotAReward(name))?;
    let host = PluginHost::new(Arc::new(|_| {}))?;
    match host.load(name, bytes, &bench.config, &Limits::default())? {
        Plugin::Reward(plugin) => Ok(plugin),
        Plugin::Formatter(_) | Plugin::Curriculum(_) => Err(PluginBenchError::NotAReward(name)),
    }
}

/// Row, prompt and completion of one sample.
struct Texts {
    row: String,
    prompt: String,
    completion: String,
}

/// GSM8K-like texts of the size asked for; the completions of a group share row and prompt.
fn texts(bench: &PluginBench) -> Vec<Texts> {
    let words = |n: usize, bytes: usize| {
        let sentence = format!("Then {n} of the apples are sold, and some more are bought. ");
        let mut text = sentence.repeat(bytes / sentence.len() + 1);
        text.truncate(bytes);
        text
    };
    let bytes = bench.sample_bytes;
    let one = |i: usize| {
        let group = i / GROUP;
        let question = words(group, bytes / ROW_SHARE);
        let row = format!(r#"{{"question": "{question}", "answer": "So it is\n#### {group}"}}"#);
        let prompt = words(group, bytes / PROMPT_SHARE);
        let rest = bytes.saturating_sub(row.len() + prompt.len());
        let completion = format!("<think>{}</think> The answer is {group}.", words(i, rest));
        Texts {
            row,
            prompt,
            completion,
        }
    };
    (0..bench.samples).map(one).collect()
}

fn sample<'a>(texts: &'a Texts, parsed: &'a Parsed) -> Sample<'a> {
    Sample {
        row_id: 0,
        row_json: &texts.row,
        prompt: &texts.prompt,
        completion: &texts.completion,
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

    #[test]
    fn nearest_rank() {
        let values: Vec<f64> = (1..=100).map(f64::from).collect();
        assert_eq!((at(&values, 0.5), at(&values, 0.99)), (50.0, 99.0));
        assert_eq!(at(&[7.0], 0.99), 7.0);
    }

    #[test]
    fn measures_the_calls_of_training() {
        let bench = PluginBench {
            calls: 20,
            ..PluginBench::default()
        };
        let measures = run(&bench).unwrap();
        let names: Vec<&str> = measures.iter().map(|m| m.name.as_str()).collect();
        let expected = [
            "plugin_warm_p50",
            "plugin_warm_p99",
            "plugin_fresh_p50",
            "plugin_fresh_p99",
        ];
        assert_eq!(names, expected);
        assert!(measures.iter().all(|m| m.value > 0.0 && m.value < 1e6));
        let bytes: Vec<usize> = texts(&bench)
            .iter()
            .map(|t| t.row.len() + t.prompt.len() + t.completion.len())
            .collect();
        assert!(bytes.iter().all(|n| (2500..2600).contains(n)), "{bytes:?}");
        let json = serde_json::to_value(&measures[0]).unwrap();
        assert_eq!(
            (&json["unit"], &json["samples"]),
            (&"us".into(), &64.into())
        );
    }
}
