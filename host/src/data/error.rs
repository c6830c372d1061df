//! What can be wrong with data. Variants carry operands, hints say what to do.

use std::path::PathBuf;

use crate::hub::HubError;

/// Data that cannot be read or lacks something. Rows count from 0, lines from 1.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    #[error("no such file: {path}")]
    NotFound { path: PathBuf },
    #[error("cannot read {path}: {source}")]
    Read {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("{path}: not a data format this host reads")]
    UnknownFormat { path: PathBuf },
    #[error("{path} line {line}: {reason}")]
    Json {
        path: PathBuf,
        line: usize,
        reason: String,
    },
    #[error("{path} line {line}: a row must be a JSON object, found {found}")]
    NotAnObject {
        path: PathBuf,
        line: usize,
        found: &'static str,
    },
    #[error("{path}: {source}")]
    Parquet {
        path: PathBuf,
        source: ::parquet::errors::ParquetError,
    },
    #[error("{source_name} has no rows")]
    Empty { source_name: String },
    #[error("row {row} of {source_name} has no column `{column}`; columns found: {}", found.join(", "))]
    MissingColumn {
        source_name: String,
        row: usize,
        column: String,
        found: Vec<String>,
    },
    #[error("cannot hold out {eval_rows} rows of {source_name}, which has {rows}")]
    SplitTooLarge {
        source_name: String,
        eval_rows: usize,
        rows: usize,
    },
    #[error(
        "dataset {id} has no split `{split}`; data files found: {}",
        list(found)
    )]
    NoSplit {
        id: String,
        split: String,
        found: Vec<String>,
    },
    #[error("dataset {id} has several subsets: {}", subsets.join(", "))]
    ManySubsets { id: String, subsets: Vec<String> },
    #[error(transparent)]
    Hub(#[from] HubError),
}

impl DataError {
    /// What the reader can do about it, if there is something.
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            Self::NotFound { .. } => {
                "pass a .jsonl, .json or .parquet file, a folder of them, or a hub id `org/name`"
                    .into()
            }
            Self::UnknownFormat { .. } => "convert it to .jsonl or .parquet".into(),
            Self::Json { .. } | Self::NotAnObject { .. } => {
                "every line must hold one complete JSON object".into()
            }
            Self::Parquet { .. } => {
                "the file is damaged, or compressed with something other than snappy or zstd".into()
            }
            Self::Empty { .. } => "give a dataset with at least one row".into(),
            Self::MissingColumn { found, .. } => {
                let near = found.first().map_or("COLUMN", |c| c);
                format!("the config key `columns` maps names: `columns: {{question: {near}}}`")
            }
            Self::SplitTooLarge { .. } => {
                "hold out fewer rows with `--set eval_rows=N`, or name others with `eval_data`"
                    .into()
            }
            Self::NoSplit { .. } => {
                "name a split of those files with `data_split` or `eval_data_split`".into()
            }
            Self::ManySubsets { .. } => {
                "pick one of them with `data_subset` or `eval_data_subset`".into()
            }
            Self::Hub(e) => return e.hint(),
            Self::Read { .. } => return None,
        })
    }
}

fn list(found: &[String]) -> String {
    const SHOWN: usize = 12;
    let mut text = found
        .iter()
        .take(SHOWN)
        .cloned()
        .collect::<Vec<_>>()
        .join(", ");
    if found.is_empty() {
        text.push_str("none");
    } else if found.len() > SHOWN {
        text.push_str(&format!(" and {} more", found.len() - SHOWN));
    }
    text
}
