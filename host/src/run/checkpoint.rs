//! Checkpoints: `checkpoints/step-N/` with `state.json`, `curriculum.bin` and whatever the policy wrote.
//!
//! A checkpoint is built in `.tmp-step-N`, synced, and renamed. So a folder named `step-N` is whole, a
//! crash or a full disk leaves the previous one valid, and readers never look at temporaries.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{RunError, atomic};
use crate::types::Outcome;

const FORMAT: u32 = 1;

/// Everything of a run that is not weights, optimizer or configuration.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct TrainState {
    /// Steps done.
    pub step: u64,
    /// The run's seed. Random draws are keyed by it and by step, row and sample, so there is no generator
    /// state to keep.
    pub seed: u64,
    /// Optimizer steps done (more than `step` with several updates per rollout).
    pub optimizer_step: u64,
    /// Completion tokens generated.
    pub tokens: u64,
    /// Passes over the dataset, fractions included.
    pub epoch: f64,
    /// The curriculum's opaque state; in `curriculum.bin`, not in `state.json`.
    #[serde(skip)]
    pub curriculum: Vec<u8>,
    /// Outcomes of the last step, which the curriculum has not seen yet.
    pub outcomes: Vec<Outcome>,
    pub best: Option<Best>,
    /// Evaluations since the best one, for early stopping.
    pub evals_without_gain: u32,
    /// Accuracy before the first step.
    pub eval_before: Option<f64>,
    /// Wall time of all sessions of the run so far.
    pub wall_s: f64,
}

/// The best evaluation so far.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Best {
    pub step: u64,
    pub accuracy: f64,
}

/// A valid checkpoint on disk.
#[derive(Clone, Debug, PartialEq)]
pub struct Checkpoint {
    pub path: PathBuf,
    pub state: TrainState,
}

/// Which checkpoints stay when a new one is there: the last `last` (at least 1) and the best.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Keep {
    pub last: usize,
    pub best: bool,
}

#[derive(Serialize, Deserialize)]
struct StateFile {
    format: u32,
    /// SHA-256 of `curriculum.bin`.
    curriculum_sha256: String,
    #[serde(flatten)]
    state: TrainState,
}

/// A checkpoint being written. Dropped without [`CheckpointWriter::commit`], it removes its files.
#[derive(Debug)]
pub struct CheckpointWriter {
    temporary: PathBuf,
    step: u64,
    committed: bool,
}

impl CheckpointWriter {
    pub(super) fn begin(root: &Path, step: u64) -> Result<Self, RunError> {
        let temporary = root.join("checkpoints").join(format!(".tmp-step-{step}"));
        // Left behind by a killed process.
        remove_folder(&temporary)?;
        match fs::create_dir_all(&temporary) {
            Ok(()) => Ok(Self {
                temporary,
                step,
                committed: false,
            }),
            Err(source) => Err(RunError::Write {
                path: temporary,
                source,
            }),
        }
    }

    /// The folder to put weights and optimizer state into.
    pub fn path(&self) -> &Path {
        &self.temporary
    }

    /// Writes the state, syncs everything, gives the checkpoint its name and removes the ones that `keep`
    /// does not cover. Returns the final folder.
    ///
    /// # Errors
    /// [`RunError::Write`], with earlier checkpoints untouched and the temporary removed.
    pub fn commit(mut self, state: &TrainState, keep: Keep) -> Result<PathBuf, RunError> {
        self.write_state(state)?;
        sync_tree(&self.temporary)?;
        let folder = self.temporary.parent().unwrap_or(Path::new(".")).to_owned();
        let path = folder.join(format!("step-{}", self.step));
        let aside = folder.join(format!(".tmp-step-{}-old", self.step));
        remove_folder(&aside)?;
        let fail = |source| RunError::Write {
            path: path.clone(),
            source,
        };
        // A folder cannot be renamed over a full one, and a step may be checkpointed twice.
        if path.exists() {
            fs::rename(&path, &aside).map_err(fail)?;
        }
        fs::rename(&self.temporary, &path).map_err(fail)?;
        self.committed = true;
        remove_folder(&aside)?;
        atomic::sync_folder(&folder)?;
        prune(&folder, state, keep)?;
        Ok(path)
    }

    fn write_state(&self, state: &TrainState) -> Result<(), RunError> {
        let file = StateFile {
            format: FORMAT,
            curriculum_sha256: hex_digest(&state.curriculum),
            state: TrainState {
                step: self.step,
                ..state.clone()
            },
        };
        let path = self.temporary.join("state.json");
        let text = serde_json::to_vec_pretty(&file).map_err(|e| RunError::Malformed {
            path: path.clone(),
            reason: e.to_string(),
        })?;
        for (path, bytes) in [
            (self.temporary.join("curriculum.bin"), &state.curriculum),
            (path, &text),
        ] {
            fs::write(&path, bytes).map_err(|source| RunError::Write { path, source })?;
        }
        Ok(())
    }
}

impl Drop for CheckpointWriter {
    fn drop(&mut self) {
        if !self.committed {
            // Nothing to report to here, and a left-over is removed by the next `begin` or `resume`.
            drop(remove_folder(&self.temporary));
        }
    }
}

/// All valid checkpoints of a run, oldest first. Temporaries and folders without a readable state are
/// passed over.
pub fn checkpoints(root: &Path) -> Result<Vec<Checkpoint>, RunError> {
    let mut found: Vec<Checkpoint> = atomic::entries(&root.join("checkpoints"))?
        .into_iter()
        .filter_map(|path| Some((step_of(&path)?, path)))
        .filter_map(|(step, path)| read_state(&path, step).map(|state| Checkpoint { path, state }))
        .collect();
    found.sort_by_key(|c| c.state.step);
    Ok(found)
}

/// How many complete checkpoints there seem to be, valid or not.
pub(super) fn folders(root: &Path) -> Result<usize, RunError> {
    let entries = atomic::entries(&root.join("checkpoints"))?;
    Ok(entries
        .iter()
        .filter(|path| step_of(path).is_some())
        .count())
}

/// The newest valid checkpoint.
pub fn latest(root: &Path) -> Result<Option<Checkpoint>, RunError> {
    Ok(checkpoints(root)?.pop())
}

/// Removes temporaries and every checkpoint folder after `step`.
pub(super) fn remove_after(root: &Path, step: u64) -> Result<(), RunError> {
    for path in atomic::entries(&root.join("checkpoints"))? {
        let temporary = path
            .file_name()
            .is_some_and(|n| n.to_string_lossy().starts_with(".tmp-step-"));
        if temporary || step_of(&path).is_some_and(|n| n > step) {
            remove_folder(&path)?;
        }
    }
    Ok(())
}

fn step_of(path: &Path) -> Option<u64> {
    path.file_name()?
        .to_str()?
        .strip_prefix("step-")?
        .parse()
        .ok()
}

/// `None` for anything but a state of this format, of that step, with the curriculum's bytes it had.
fn read_state(path: &Path, step: u64) -> Option<TrainState> {
    let text = fs::read(path.join("state.json")).ok()?;
    let file: StateFile = serde_json::from_slice(&text).ok()?;
    let curriculum = fs::read(path.join("curriculum.bin")).ok()?;
    let valid = file.format == FORMAT
        && file.state.step == step
        && file.curriculum_sha256 == hex_digest(&curriculum);
    valid.then_some(TrainState {
        curriculum,
        ..file.state
    })
}

fn hex_digest(bytes: &[u8]) -> String {
    format!("{:x}", Sha256::digest(bytes))
}

fn prune(folder: &Path, state: &TrainState, keep: Keep) -> Result<(), RunError> {
    let mut steps: Vec<(u64, PathBuf)> = atomic::entries(folder)?
        .into_iter()
        .filter_map(|path| Some((step_of(&path)?, path)))
        .collect();
    steps.sort();
    let best = state.best.filter(|_| keep.best).map(|best| best.step);
    let surplus = steps.len().saturating_sub(keep.last.max(1));
    for (_, path) in steps
        .iter()
        .take(surplus)
        .filter(|(step, _)| Some(*step) != best)
    {
        remove_folder(path)?;
    }
    Ok(())
}

fn sync_tree(folder: &Path) -> Result<(), RunError> {
    for path in atomic::entries(folder)? {
        if path.is_dir() {
            sync_tree(&path)?;
        } else {
            let sync = File::open(&path).and_then(|file| file.sync_all());
            sync.map_err(|source| RunError::Write { path, source })?;
        }
    }
    atomic::sync_folder(folder)
}

fn remove_folder(path: &Path) -> Result<(), RunError> {
    match fs::remove_dir_all(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(RunError::Write {
            path: path.to_owned(),
            source: e,
        }),
        _ => Ok(()),
    }
}
