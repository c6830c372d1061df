//! Dataset rows from JSONL, JSON, Parquet or a hub dataset, columns renamed and checked.
//!
//! Owns reading and the order of rows: the same source gives the same rows in the same order. What a row
//! means is the formatter's and the reward's business; a row stays the JSON object it was.

mod error;
mod files;
mod hub_files;
mod jsonl;
mod parquet;

use std::{collections::BTreeMap, path::PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

pub use error::DataError;
pub use files::{load, parse_jsonl};
pub use hub_files::{HubDataset, load_hub};

use crate::types::Row;

type Object = serde_json::Map<String, serde_json::Value>;

/// Rows in a fixed order. `rows[i].id == i` always holds, so a curriculum's pick is an index.
#[derive(Clone, Debug, PartialEq)]
pub struct Dataset {
    pub rows: Vec<Row>,
    /// Where the rows came from, for messages and `config.yaml`.
    pub source: String,
}

/// How rows are read. Which columns are required is known by the formatter and the reward in use.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LoadOptions {
    /// Wanted name → name in the file: `{question: problem}` makes the column `problem` be `question`.
    pub rename: BTreeMap<String, String>,
    /// Columns, after renaming, that every row must have.
    pub required: Vec<String>,
    /// Read at most this many rows.
    pub limit: Option<usize>,
}

impl Dataset {
    /// Takes `eval_rows` rows out for evaluation, the same ones for the same seed whatever the rest of
    /// the run does. Both parts keep the order of the source and are numbered from 0 anew.
    pub fn split(self, eval_rows: usize, seed: u64) -> Result<(Self, Self), DataError> {
        let rows = self.rows.len();
        if eval_rows >= rows && eval_rows > 0 {
            return Err(DataError::SplitTooLarge {
                source_name: self.source,
                eval_rows,
                rows,
            });
        }
        // Sorting by a hash is a permutation that no version of a random number crate can change.
        let mut order: Vec<u64> = (0..rows as u64).collect();
        order.sort_by_cached_key(|id| {
            Sha256::new()
                .chain_update(seed.to_le_bytes())
                .chain_update(id.to_le_bytes())
                .finalize()
        });
        let mut is_eval = vec![false; rows];
        order
            .iter()
            .take(eval_rows)
            .for_each(|id| is_eval[*id as usize] = true);
        let (eval, train): (Vec<Row>, Vec<Row>) = self
            .rows
            .into_iter()
            .partition(|row| is_eval[row.id as usize]);
        let part = |rows, name: &str| Self {
            rows: numbered(rows),
            source: format!("{} ({name})", self.source),
        };
        Ok((part(train, "train"), part(eval, "eval")))
    }
}

fn numbered(mut rows: Vec<Row>) -> Vec<Row> {
    for (id, row) in rows.iter_mut().enumerate() {
        row.id = id as u64;
    }
    rows
}

/// Renames columns, checks the required ones and numbers the rows.
fn assemble(
    objects: Vec<Object>,
    source: String,
    options: &LoadOptions,
) -> Result<Dataset, DataError> {
    if objects.is_empty() {
        return Err(DataError::Empty {
            source_name: source,
        });
    }
    let mut rows = Vec::with_capacity(objects.len());
    for (id, object) in objects.into_iter().enumerate() {
        let json = rename(object, &options.rename, &source, id)?;
        if let Some(column) = options.required.iter().find(|c| !json.contains_key(*c)) {
            return Err(missing(&source, id, column, &json));
        }
        rows.push(Row {
            id: id as u64,
            json,
        });
    }
    Ok(Dataset { rows, source })
}

/// A renamed column keeps its place; one that already has the wanted name is replaced by it.
fn rename(
    object: Object,
    mapping: &BTreeMap<String, String>,
    source: &str,
    row: usize,
) -> Result<Object, DataError> {
    if mapping.is_empty() {
        return Ok(object);
    }
    if let Some(from) = mapping.values().find(|from| !object.contains_key(*from)) {
        return Err(missing(source, row, from, &object));
    }
    let mut out = Object::new();
    for (name, value) in object {
        let wanted: Vec<&String> = mapping
            .iter()
            .filter(|(_, from)| **from == name)
            .map(|(to, _)| to)
            .collect();
        if wanted.is_empty() && !mapping.contains_key(&name) {
            out.insert(name, value);
        } else {
            // One column may serve under two names.
            out.extend(wanted.into_iter().map(|to| (to.clone(), value.clone())));
        }
    }
    Ok(out)
}

fn missing(source: &str, row: usize, column: &str, object: &Object) -> DataError {
    DataError::MissingColumn {
        source_name: source.to_owned(),
        row,
        column: column.to_owned(),
        found: object.keys().cloned().collect(),
    }
}

/// A data argument of the command line: what exists on disk is a path, `org/name` is a hub id.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    Path(PathBuf),
    Hub {
        id: String,
        revision: Option<String>,
    },
}

impl Source {
    /// Reads `argument` as a path if one exists there or it looks like one (an extension of ours, a
    /// leading `.` or `/`), else as `org/name` with an optional `@revision`.
    pub fn parse(argument: &str) -> Self {
        let path = PathBuf::from(argument);
        let (id, revision) = match argument.split_once('@') {
            Some((id, revision)) => (id, Some(revision.to_owned())),
            None => (argument, None),
        };
        let is_name = |part: &str| {
            let ok = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
            !part.is_empty() && !part.starts_with('.') && part.chars().all(ok)
        };
        let looks_like_id = matches!(id.split('/').collect::<Vec<_>>()[..], [org, name] if is_name(org) && is_name(name));
        if path.exists() || files::Format::of(&path).is_some() || !looks_like_id {
            return Self::Path(path);
        }
        Self::Hub {
            id: id.to_owned(),
            revision,
        }
    }
}

#[cfg(test)]
#[path = "data_tests.rs"]
mod tests;
