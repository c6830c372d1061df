//! `rollouts/step-000012.parquet`: every completion of a step with all that was decided about it, enough
//! to rescore it without the model.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use super::{
    RunError, atomic,
    columns::{self, Column, Record},
};
use crate::types::{Completion, Finish, Parsed, PluginId, Telemetry};

/// One completion and what became of it.
#[derive(Clone, Debug, PartialEq)]
pub struct Rollout {
    pub step: u64,
    /// Position in the dataset.
    pub row_id: u64,
    /// The row as JSON text, as the reward saw it.
    pub row: String,
    /// Number of the group within the step. The place within the group is `completion.index`.
    pub group: u32,
    /// Which of the step's waves drew it: rewards scored a wave in one batch. `None` in logs of earlier
    /// versions.
    pub wave: Option<u32>,
    pub prompt: String,
    pub prompt_ids: Vec<u32>,
    pub completion: Completion,
    pub parsed: Parsed,
    /// Weighted sum of the rewards; `None` when skipped.
    pub reward: Option<f64>,
    /// Every part of every reward, as `(plugin/part, value)`.
    pub parts: Vec<(String, f64)>,
    pub advantage: f64,
    /// Why no reward was given.
    pub skip: Option<String>,
    /// The components that touched this sample.
    pub plugins: Vec<PluginId>,
}

/// Writes the rollouts of one step. Whole or not at all; an earlier file of the step is replaced.
pub fn write_rollouts(root: &Path, step: u64, rollouts: &[Rollout]) -> Result<PathBuf, RunError> {
    let path = root
        .join("rollouts")
        .join(format!("step-{step:06}.parquet"));
    let json = Json::of(rollouts, &path)?;
    let columns = columns_of(rollouts, &json);
    let mut failed = None;
    let written = atomic::write_with(&path, |file| {
        columns::write(file, &columns).map_err(|source| {
            let error = io::Error::other(source.to_string());
            failed = Some(source);
            error
        })
    });
    // The Parquet error is the better one: `io::Error` was only its way out of the closure.
    match failed {
        Some(source) => Err(RunError::Parquet { path, source }),
        None => written.map(|()| path),
    }
}

/// Reads one file back.
pub fn read_rollouts(path: &Path) -> Result<Vec<Rollout>, RunError> {
    columns::read(path)?
        .iter()
        .map(|record| rollout(record, path))
        .collect()
}

/// Rollout files of a run with their steps, in order.
pub fn rollout_files(root: &Path) -> Result<Vec<(u64, PathBuf)>, RunError> {
    let files = atomic::entries(&root.join("rollouts"))?.into_iter();
    let mut files: Vec<_> = files
        .filter_map(|path| Some((step_of(&path)?, path)))
        .collect();
    files.sort();
    Ok(files)
}

/// Removes the files of later steps and left-over temporaries.
pub(super) fn remove_after(root: &Path, step: u64) -> Result<(), RunError> {
    for path in atomic::entries(&root.join("rollouts"))? {
        let temporary = path
            .file_name()
            .is_some_and(|n| n.to_string_lossy().starts_with(".tmp-"));
        if temporary || step_of(&path).is_some_and(|n| n > step) {
            fs::remove_file(&path).map_err(|source| RunError::Write { path, source })?;
        }
    }
    Ok(())
}

fn step_of(path: &Path) -> Option<u64> {
    path.file_name()?
        .to_str()?
        .strip_prefix("step-")?
        .strip_suffix(".parquet")?
        .parse()
        .ok()
}

/// Nested values as JSON text: `parts` is a list of pairs, which `dict(json.loads(…))` reads, because an
/// object would drop the first of two parts of one name.
struct Json {
    parts: Vec<String>,
    plugins: Vec<String>,
}

impl Json {
    fn of(rollouts: &[Rollout], path: &Path) -> Result<Self, RunError> {
        let fail = |e: serde_json::Error| malformed(path, &e);
        let parts = rollouts
            .iter()
            .map(|r| serde_json::to_string(&r.parts).map_err(fail));
        let plugins = rollouts
            .iter()
            .map(|r| serde_json::to_string(&r.plugins).map_err(fail));
        Ok(Self {
            parts: parts.collect::<Result<_, _>>()?,
            plugins: plugins.collect::<Result<_, _>>()?,
        })
    }
}

fn malformed(path: &Path, error: &serde_json::Error) -> RunError {
    RunError::Malformed {
        path: path.to_owned(),
        reason: error.to_string(),
    }
}

fn columns_of<'a>(
    rollouts: &'a [Rollout],
    json_columns: &'a Json,
) -> Vec<(&'static str, Column<'a>)> {
    let int = |f: fn(&Rollout) -> u64| integers(rollouts, f);
    let text = |f: fn(&Rollout) -> &str| Column::Text(rollouts.iter().map(f).collect());
    let optional =
        |f: fn(&Rollout) -> Option<&str>| Column::OptionalText(rollouts.iter().map(f).collect());
    let ids = |f: fn(&Rollout) -> &[u32]| Column::Ids(rollouts.iter().map(f).collect());
    let floats = |f: fn(&Rollout) -> &[f32]| Column::Floats(rollouts.iter().map(f).collect());
    let json = |texts: &'a [String]| Column::Text(texts.iter().map(String::as_str).collect());
    let mut columns = vec![
        ("step", int(|r| r.step)),
        ("row_id", int(|r| r.row_id)),
        ("row", text(|r| &r.row)),
        ("group", int(|r| r.group.into())),
        ("sample", int(|r| r.completion.index.into())),
        ("request", int(|r| r.completion.request)),
        ("prompt", text(|r| &r.prompt)),
        ("completion", text(|r| &r.completion.text)),
        ("reasoning", optional(|r| r.parsed.reasoning.as_deref())),
        ("answer", optional(|r| r.parsed.answer.as_deref())),
        ("prompt_ids", ids(|r| &r.prompt_ids)),
        ("completion_ids", ids(|r| &r.completion.tokens)),
        ("logprobs", floats(|r| &r.completion.logprobs)),
        ("policy_logprobs", floats(|r| &r.completion.policy_logprobs)),
        (
            "reward",
            Column::OptionalFloat(rollouts.iter().map(|r| r.reward).collect()),
        ),
        ("parts", json(&json_columns.parts)),
        (
            "advantage",
            Column::Float(rollouts.iter().map(|r| r.advantage).collect()),
        ),
        ("finish", text(|r| finish_name(r.completion.finish))),
        ("drafts", integers(rollouts, |r| r.completion.drafts.into())),
        ("accepted_per_pos", ids(|r| &r.completion.accepted_per_pos)),
        ("skip", optional(|r| r.skip.as_deref())),
        ("plugins", json(&json_columns.plugins)),
    ];
    // A log that did not know its waves is written as it was read.
    let waves: Option<Vec<i64>> = rollouts.iter().map(|r| r.wave.map(i64::from)).collect();
    columns.extend(waves.map(|waves| ("wave", Column::Int(waves))));
    columns.extend(telemetry_columns(rollouts));
    columns
}

fn telemetry_columns(rollouts: &[Rollout]) -> [(&'static str, Column<'_>); 10] {
    let count = |f: fn(&Rollout) -> u64| integers(rollouts, f);
    let time = |f: fn(&Telemetry) -> f64| {
        Column::Float(
            rollouts
                .iter()
                .map(|r| f(&r.completion.telemetry))
                .collect(),
        )
    };
    [
        ("latency_ms", time(|t| t.latency_ms)),
        ("queue_ms", time(|t| t.queue_ms)),
        ("prefill_ms", time(|t| t.prefill_ms)),
        ("decode_ms", time(|t| t.decode_ms)),
        (
            "prompt_tokens",
            count(|r| r.completion.telemetry.prompt_tokens.into()),
        ),
        (
            "cached_prompt_tokens",
            count(|r| r.completion.telemetry.cached_prompt_tokens.into()),
        ),
        (
            "generated_tokens",
            count(|r| r.completion.telemetry.generated_tokens.into()),
        ),
        (
            "draft_tokens",
            count(|r| r.completion.telemetry.draft_tokens.into()),
        ),
        (
            "accepted_tokens",
            count(|r| r.completion.telemetry.accepted_tokens.into()),
        ),
        ("kv_bytes", count(|r| r.completion.telemetry.kv_bytes)),
    ]
}

/// Ids use all 64 bits; Parquet's INT64 holds the same bits.
fn integers(rollouts: &[Rollout], f: fn(&Rollout) -> u64) -> Column<'static> {
    Column::Int(rollouts.iter().map(|r| f(r).cast_signed()).collect())
}

fn rollout(record: &Record<'_>, path: &Path) -> Result<Rollout, RunError> {
    let fail = |e: serde_json::Error| malformed(path, &e);
    let finish = record.text("finish")?;
    Ok(Rollout {
        step: unsigned(record, "step")?,
        row_id: unsigned(record, "row_id")?,
        row: record.text("row")?,
        group: record.int("group")?,
        wave: match record.has("wave") {
            true => Some(record.int("wave")?),
            false => None,
        },
        prompt: record.text("prompt")?,
        prompt_ids: record.ids("prompt_ids")?,
        completion: Completion {
            request: unsigned(record, "request")?,
            index: record.int("sample")?,
            tokens: record.ids("completion_ids")?,
            logprobs: record.floats("logprobs")?,
            policy_logprobs: record.floats("policy_logprobs")?,
            text: record.text("completion")?,
            finish: serde_json::from_value(finish.into()).map_err(fail)?,
            telemetry: telemetry(record)?,
            drafts: record.int("drafts")?,
            accepted_per_pos: record.ids("accepted_per_pos")?,
            // Not logged: it would be many times the size of everything else.
            top: Vec::new(),
        },
        parsed: Parsed {
            reasoning: record.optional_text("reasoning")?,
            answer: record.optional_text("answer")?,
        },
        reward: record.optional_float("reward")?,
        parts: serde_json::from_str(&record.text("parts")?).map_err(fail)?,
        advantage: record.float("advantage")?,
        skip: record.optional_text("skip")?,
        plugins: serde_json::from_str(&record.text("plugins")?).map_err(fail)?,
    })
}

fn telemetry(record: &Record<'_>) -> Result<Telemetry, RunError> {
    Ok(Telemetry {
        latency_ms: record.float("latency_ms")?,
        queue_ms: record.float("queue_ms")?,
        prefill_ms: record.float("prefill_ms")?,
        decode_ms: record.float("decode_ms")?,
        prompt_tokens: record.int("prompt_tokens")?,
        cached_prompt_tokens: record.int("cached_prompt_tokens")?,
        generated_tokens: record.int("generated_tokens")?,
        draft_tokens: record.int("draft_tokens")?,
        accepted_tokens: record.int("accepted_tokens")?,
        kv_bytes: unsigned(record, "kv_bytes")?,
    })
}

/// The inverse of [`integers`].
fn unsigned(record: &Record<'_>, column: &'static str) -> Result<u64, RunError> {
    record.int::<i64>(column).map(i64::cast_unsigned)
}

fn finish_name(finish: Finish) -> &'static str {
    match finish {
        Finish::Stop => "stop",
        Finish::Length => "length",
        Finish::Abort => "abort",
    }
}
