//! A run in numbers, for `grpo-host results RUN` and the report.

use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::{Map, Value};

use super::{CurriculumReport, LockedPlugin, RunError, checkpoint, lock, step_log};

/// What a run directory says about its run.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Summary {
    pub run_dir: PathBuf,
    /// Last step with a metrics line.
    pub steps: u64,
    /// Every metric that was ever a number, in the order of first appearance.
    pub metrics: Vec<MetricRow>,
    /// Steps of the valid checkpoints.
    pub checkpoints: Vec<u64>,
    pub plugins: Vec<LockedPlugin>,
    /// The latest report of the curriculum.
    pub curriculum: Option<CurriculumReport>,
}

/// One metric over the run.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct MetricRow {
    pub name: String,
    pub first: f64,
    pub last: f64,
    pub min: f64,
    pub max: f64,
    pub mean: f64,
    /// Steps that have it.
    pub count: u64,
}

impl Summary {
    /// The row of a metric.
    pub fn metric(&self, name: &str) -> Option<&MetricRow> {
        self.metrics.iter().find(|m| m.name == name)
    }
}

/// Reads a run directory, also one that is still being written.
///
/// # Errors
/// [`RunError::NotARun`] without `config.yaml`; a malformed metrics line before the last.
pub fn summarise(root: &Path) -> Result<Summary, RunError> {
    if !root.join("config.yaml").exists() {
        return Err(RunError::NotARun {
            path: root.to_owned(),
        });
    }
    let lines = step_log::read_metrics(root)?;
    let steps = lines
        .last()
        .and_then(|line| line.get("step")?.as_u64())
        .unwrap_or(0);
    Ok(Summary {
        run_dir: root.to_owned(),
        steps,
        metrics: rows(&lines),
        checkpoints: checkpoint::checkpoints(root)?
            .into_iter()
            .map(|c| c.state.step)
            .collect(),
        plugins: lock::read_plugins_lock(root)?,
        curriculum: step_log::read_curriculum(root)?.pop(),
    })
}

fn rows(lines: &[Map<String, Value>]) -> Vec<MetricRow> {
    // `Map` keeps insertion order, so the table reads like the file.
    let mut names: Map<String, Value> = Map::new();
    for line in lines {
        names.extend(
            line.iter()
                .filter(|(k, _)| *k != "step")
                .map(|(k, _)| (k.clone(), Value::Null)),
        );
    }
    names
        .keys()
        .filter_map(|name| row(name, &series(lines, name)))
        .collect()
}

/// `(step, value)` of every line that has the metric as a number.
pub(super) fn series(lines: &[Map<String, Value>], name: &str) -> Vec<(f64, f64)> {
    let point =
        |line: &Map<String, Value>| Some((line.get("step")?.as_f64()?, line.get(name)?.as_f64()?));
    lines.iter().filter_map(point).collect()
}

fn row(name: &str, points: &[(f64, f64)]) -> Option<MetricRow> {
    let values = points.iter().map(|p| p.1);
    Some(MetricRow {
        name: name.to_owned(),
        first: points.first()?.1,
        last: points.last()?.1,
        min: values.clone().fold(f64::INFINITY, f64::min),
        max: values.clone().fold(f64::NEG_INFINITY, f64::max),
        mean: values.sum::<f64>() / points.len() as f64,
        count: points.len() as u64,
    })
}
