//! The run directory: `config.yaml metrics.jsonl curriculum.jsonl rollouts/*.parquet checkpoints/step-N/
//! plugins.lock draft.lock swaps.jsonl plugins/DIGEST/NAME.wasm failures/ report.html`.
//!
//! Owns where things lie, that they are written whole or not at all, and what a resumed run throws away.
//! Steps count from 1; `step-N` is the state after N steps. Weights are written by `grpo-policy` into
//! the folder that a [`CheckpointWriter`] hands out.

mod atomic;
mod checkpoint;
mod columns;
mod error;
mod figures;
mod lock;
mod manifest;
mod report;
mod results;
mod rollouts;
mod step_log;
mod svg;
mod swaps;

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
};

pub use checkpoint::{Best, Checkpoint, CheckpointWriter, Keep, TrainState, checkpoints, latest};
pub use error::RunError;
pub use figures::{Figure, Line, write_figures};
pub use lock::{LockedDraft, LockedPlugin, read_draft_lock, read_plugins_lock};
pub use manifest::Damage;
pub use report::write_report;
pub use results::{MetricRow, Summary, summarise};
pub use rollouts::{Rollout, read_rollouts, rollout_files, write_rollouts};
pub use step_log::{CurriculumReport, StepLog, read_curriculum, read_metrics};
pub use swaps::{
    Holder, SwapEvent, SwapRecord, component_path, holder, keep_component, read_swaps,
};

/// A run directory that this process writes to. Holds a lock on `config.yaml`, so that a second process
/// cannot resume a run that is still going on; the kernel drops the lock with the process.
#[derive(Debug)]
pub struct RunDir {
    root: PathBuf,
    _lock: File,
}

/// A run taken up again.
#[derive(Debug)]
pub struct Resumed {
    pub dir: RunDir,
    /// Where to go on; `None` when the run was ended before its first checkpoint, so from step 0.
    pub checkpoint: Option<Checkpoint>,
    /// What is wrong with the later checkpoints, the newest first.
    pub damages: Vec<Damage>,
    /// The last line of the journal of swaps was incomplete, and what it told of is undone.
    pub lost_swap: bool,
}

impl RunDir {
    /// Makes the folder and writes `config.yaml`.
    ///
    /// # Errors
    /// [`RunError::Exists`] when there is a run already: nothing is ever overwritten.
    pub fn create(root: &Path, config_yaml: &str) -> Result<Self, RunError> {
        Self::refuse_existing(root)?;
        let config = root.join("config.yaml");
        for folder in ["rollouts", "checkpoints"] {
            let path = root.join(folder);
            fs::create_dir_all(&path).map_err(|source| RunError::Write { path, source })?;
        }
        atomic::write(&config, config_yaml.as_bytes())?;
        Self::locked(root)
    }

    /// [`RunError::Exists`] when there is a run in this folder; for callers who want to know long before
    /// they create one.
    pub fn refuse_existing(root: &Path) -> Result<(), RunError> {
        if root.join("config.yaml").exists() {
            return Err(RunError::Exists {
                path: root.to_owned(),
            });
        }
        Ok(())
    }

    /// Takes a run up at its latest whole checkpoint and removes what lies after it: lines of
    /// metrics and of the curriculum, rollout files, damaged or half-written checkpoints, later plugin swaps.
    pub fn resume(root: &Path) -> Result<Resumed, RunError> {
        if !root.join("config.yaml").exists() {
            return Err(RunError::NotARun {
                path: root.to_owned(),
            });
        }
        let dir = Self::locked(root)?;
        let (checkpoint, damages) = checkpoint::newest_whole(root)?;
        if let (None, Some(damage)) = (&checkpoint, damages.first()) {
            // Going on from step 0 would delete what may still be saved.
            return Err(RunError::NoCheckpoint {
                path: root.to_owned(),
                found: damages.len(),
                damage: damage.clone(),
            });
        }
        let step = checkpoint.as_ref().map_or(0, |c| c.state.step);
        checkpoint::remove_after(root, step)?;
        step_log::cut_after(root, step_log::METRICS, step)?;
        step_log::cut_after(root, step_log::CURRICULUM, step)?;
        rollouts::remove_after(root, step)?;
        lock::cut_after(root, step)?;
        let lost_swap = swaps::cut_after(root, step)?;
        Ok(Resumed {
            dir,
            checkpoint,
            damages,
            lost_swap,
        })
    }

    fn locked(root: &Path) -> Result<Self, RunError> {
        let path = root.join("config.yaml");
        let fail = |source| RunError::Read {
            path: path.clone(),
            source,
        };
        let lock = File::open(&path).map_err(fail)?;
        match lock.try_lock() {
            Ok(()) => Ok(Self {
                root: root.to_owned(),
                _lock: lock,
            }),
            Err(fs::TryLockError::WouldBlock) => Err(RunError::Locked {
                path: root.to_owned(),
            }),
            Err(fs::TryLockError::Error(source)) => Err(fail(source)),
        }
    }

    /// The folder.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Replaces `config.yaml`, and locks the new one.
    pub fn rewrite_config(&mut self, config_yaml: &str) -> Result<(), RunError> {
        if self.config()? != config_yaml {
            atomic::write(&self.root.join("config.yaml"), config_yaml.as_bytes())?;
            *self = Self::locked(&self.root)?;
        }
        Ok(())
    }

    /// Text of `config.yaml`.
    pub fn config(&self) -> Result<String, RunError> {
        let path = self.root.join("config.yaml");
        fs::read_to_string(&path).map_err(|source| RunError::Read { path, source })
    }

    /// Opens `metrics.jsonl` for appending.
    pub fn metrics(&self) -> Result<StepLog, RunError> {
        StepLog::open(&self.root, step_log::METRICS)
    }

    /// Opens `curriculum.jsonl` for appending.
    pub fn curriculum(&self) -> Result<StepLog, RunError> {
        StepLog::open(&self.root, step_log::CURRICULUM)
    }

    /// Opens `swaps.jsonl` for appending; it is there from the first swap on.
    pub fn swaps(&self) -> Result<StepLog, RunError> {
        StepLog::open(&self.root, swaps::SWAPS)
    }

    /// Writes `plugins.lock`: all components used so far, those swapped in later included.
    pub fn write_plugins_lock(&self, plugins: &[LockedPlugin]) -> Result<(), RunError> {
        lock::write(&self.root, plugins)
    }

    /// Writes `draft.lock`.
    pub fn write_draft_lock(&self, draft: &LockedDraft) -> Result<(), RunError> {
        lock::write_draft(&self.root, draft)
    }

    /// Starts a checkpoint of the state after `step` steps.
    pub fn checkpoint(&self, step: u64) -> Result<CheckpointWriter, RunError> {
        CheckpointWriter::begin(&self.root, step)
    }
}

#[cfg(test)]
#[path = "run_tests.rs"]
mod tests;
