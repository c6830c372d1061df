//! Files of JSON lines that grow with the run: `metrics.jsonl`, one flat object per step, and
//! `curriculum.jsonl`, one per step with a report of the curriculum. `step` is among the keys of every
//! line, in rising order.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::RunError;
use crate::types::Table;

/// Metrics of every step.
pub(super) const METRICS: &str = "metrics.jsonl";
/// What the curriculum reported.
pub(super) const CURRICULUM: &str = "curriculum.jsonl";

/// Appends lines. Each goes out in one write, so a killed process leaves at most one torn line, at the
/// end.
#[derive(Debug)]
pub struct StepLog {
    path: PathBuf,
    file: File,
}

impl StepLog {
    pub(super) fn open(root: &Path, name: &str) -> Result<Self, RunError> {
        let path = root.join(name);
        match OpenOptions::new().create(true).append(true).open(&path) {
            Ok(file) => Ok(Self { path, file }),
            Err(source) => Err(RunError::Write { path, source }),
        }
    }

    /// Appends one step. `values` must not have a `step` of their own; what is not finite becomes `null`.
    pub fn append(&mut self, step: u64, values: &Map<String, Value>) -> Result<(), RunError> {
        let mut object = Map::new();
        object.insert("step".to_owned(), step.into());
        object.extend(values.iter().map(|(k, v)| (k.clone(), v.clone())));
        let mut line = Value::from(object).to_string();
        line.push('\n');
        self.file
            .write_all(line.as_bytes())
            .map_err(|source| self.fail(source))
    }

    /// Makes what was appended survive a power cut; done at checkpoints.
    pub fn sync(&self) -> Result<(), RunError> {
        self.file.sync_data().map_err(|source| self.fail(source))
    }

    fn fail(&self, source: io::Error) -> RunError {
        RunError::Write {
            path: self.path.clone(),
            source,
        }
    }
}

/// All whole lines of a run. A torn last line, as a running or killed process leaves it, is not an error;
/// any other malformed line is.
pub fn read_metrics(root: &Path) -> Result<Vec<Map<String, Value>>, RunError> {
    let lines = parse(root, METRICS)?;
    Ok(lines.into_iter().map(|line| line.object).collect())
}

/// What a curriculum reported with a step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CurriculumReport {
    pub step: u64,
    /// Passes over the dataset, fractions included.
    pub epoch: f64,
    /// At least one.
    pub tables: Vec<Table>,
}

/// Whatever the curriculum of a run has reported, in the order of steps. Torn and malformed lines are as in
/// [`read_metrics`].
pub fn read_curriculum(root: &Path) -> Result<Vec<CurriculumReport>, RunError> {
    let report = |(number, line): (usize, Line)| {
        let fail = |reason| RunError::StepLog {
            path: root.join(CURRICULUM),
            line: number + 1,
            reason,
        };
        let report: CurriculumReport =
            serde_json::from_value(line.object.into()).map_err(|e| fail(e.to_string()))?;
        // Whoever shows a table counts on it.
        let ragged = |t: &&Table| t.rows.iter().any(|row| row.len() != t.columns.len());
        match report.tables.iter().find(ragged) {
            Some(table) => Err(fail(format!("table `{}` is ragged", table.title))),
            None => Ok(report),
        }
    };
    let lines = parse(root, CURRICULUM)?;
    lines.into_iter().enumerate().map(report).collect()
}

/// Cuts the file after the lines of steps up to `step`, a torn last line included.
pub(super) fn cut_after(root: &Path, name: &str, step: u64) -> Result<(), RunError> {
    let lines = parse(root, name)?;
    let kept = lines.iter().take_while(|line| line.step <= step);
    let end = kept.last().map_or(0, |line| line.end);
    let path = root.join(name);
    if !path.exists() {
        return Ok(());
    }
    let cut = || -> io::Result<()> {
        let file = OpenOptions::new().write(true).open(&path)?;
        file.set_len(end as u64)?;
        file.sync_all()
    };
    cut().map_err(|source| RunError::Write {
        path: path.clone(),
        source,
    })
}

pub(super) struct Line {
    step: u64,
    pub(super) object: Map<String, Value>,
    /// Offset of the byte after the line feed.
    end: usize,
}

pub(super) fn parse(root: &Path, name: &str) -> Result<Vec<Line>, RunError> {
    let path = root.join(name);
    let bytes = match fs::read(&path) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) => return Err(RunError::Read { path, source }),
    };
    let mut lines = Vec::new();
    let mut end = 0;
    for (number, body) in bytes.split_inclusive(|b| *b == b'\n').enumerate() {
        end += body.len();
        if body.last() != Some(&b'\n') {
            break;
        }
        let fail = |reason: String| RunError::StepLog {
            path: path.clone(),
            line: number + 1,
            reason,
        };
        let object: Map<String, Value> =
            serde_json::from_slice(body).map_err(|e| fail(e.to_string()))?;
        let step = object.get("step").and_then(Value::as_u64);
        let step = step.ok_or_else(|| fail("no `step`".to_owned()))?;
        lines.push(Line { step, object, end });
    }
    Ok(lines)
}
