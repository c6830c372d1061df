//! What can go wrong with a run directory.

use std::{
    io::{self, ErrorKind},
    path::PathBuf,
};

use super::manifest::Damage;

/// Variants carry operands, hints say what to do. Lines count from 1.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    #[error("{path} already holds a run")]
    Exists { path: PathBuf },
    #[error("{path} is not a run directory: it has no config.yaml")]
    NotARun { path: PathBuf },
    #[error("{path} has {found} checkpoints and none of them is whole: {damage}")]
    NoCheckpoint {
        path: PathBuf,
        found: usize,
        /// Of the newest one.
        damage: Damage,
    },
    #[error("{path} is in use by another process")]
    Locked { path: PathBuf },
    #[error("cannot write {path}: {source}")]
    Write { path: PathBuf, source: io::Error },
    #[error("cannot read {path}: {source}")]
    Read { path: PathBuf, source: io::Error },
    #[error("{path} line {line}: {reason}")]
    StepLog {
        path: PathBuf,
        line: usize,
        reason: String,
    },
    #[error("{path}: {source}")]
    Parquet {
        path: PathBuf,
        source: parquet::errors::ParquetError,
    },
    #[error("{path}: column `{column}` of row {row} is missing or has another type")]
    Column {
        path: PathBuf,
        column: &'static str,
        row: usize,
    },
    #[error("{path}: {reason}")]
    Malformed { path: PathBuf, reason: String },
}

impl RunError {
    /// What the reader can do about it, if there is something.
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            Self::Exists { path } => {
                format!("continue it with `--resume {}`, or give another `--out`", path.display())
            }
            Self::NotARun { .. } => "give the folder that `--out` named".to_owned(),
            Self::NoCheckpoint { .. } => {
                "nothing was changed; bring the files of one back, or remove `checkpoints/` to begin \
                 again from step 0"
                    .to_owned()
            }
            Self::Locked { .. } => "wait for that process, or end it, before resuming".to_owned(),
            Self::Write { source, .. } if is_full(source.kind()) => {
                "no room left: free some space and `--resume` the run; its last checkpoint is intact"
                    .to_owned()
            }
            Self::Parquet { source: parquet::errors::ParquetError::External(_), .. } => {
                "is the disk full? Free some space and `--resume` the run".to_owned()
            }
            Self::Parquet { .. } => {
                "the file is damaged: bring a copy of it back, or move it out of the run".to_owned()
            }
            Self::Write { source, .. } if source.kind() == ErrorKind::PermissionDenied => {
                "give a folder you may write to with `--out`".to_owned()
            }
            Self::StepLog { .. } => "cut the file before that line".to_owned(),
            _ => return None,
        })
    }
}

fn is_full(kind: ErrorKind) -> bool {
    matches!(
        kind,
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge
    )
}
