//! `metrics.jsonl`: one flat JSON object per step, `step` among its keys, in rising order.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    path::{Path, PathBuf},
};

use serde_json::{Map, Value};

use super::RunError;

const NAME: &str = "metrics.jsonl";

/// Appends lines. Each goes out in one write, so a killed process leaves at most one torn line, at the
/// end.
#[derive(Debug)]
pub struct MetricsWriter {
    path: PathBuf,
    file: File,
}

impl MetricsWriter {
    pub(super) fn open(root: &Path) -> Result<Self, RunError> {
        let path = root.join(NAME);
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
    Ok(parse(root)?.into_iter().map(|line| line.object).collect())
}

/// Cuts the file after the lines of steps up to `step`, a torn last line included.
pub(super) fn cut_after(root: &Path, step: u64) -> Result<(), RunError> {
    let lines = parse(root)?;
    let kept = lines.iter().take_while(|line| line.step <= step);
    let end = kept.last().map_or(0, |line| line.end);
    let path = root.join(NAME);
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

struct Line {
    step: u64,
    object: Map<String, Value>,
    /// Offset of the byte after the line feed.
    end: usize,
}

fn parse(root: &Path) -> Result<Vec<Line>, RunError> {
    let path = root.join(NAME);
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
        let fail = |reason: String| RunError::Metrics {
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
