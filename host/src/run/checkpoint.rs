//! Checkpoints: `checkpoints/step-N/` with `state.json`, `curriculum.bin`, whatever the policy wrote, and the
//! manifest of them all.
//!
//! A checkpoint is built in `.tmp-step-N`, synced, and renamed. So a folder named `step-N` was whole once, a
//! crash or a full disk leaves the previous one valid, and readers never look at temporaries.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use super::{
    RunError, atomic,
    manifest::{self, Damage, Look},
};
use crate::types::Outcome;

/// 2: with a manifest.
const FORMAT: u32 = 2;

/// State of a curriculum that may come back; a run that has swapped none has no such file.
const BEFORE: &str = "curriculum-before.bin";

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
    /// That of the curriculum before, from when the present one took its place; in `curriculum-before.bin`.
    #[serde(skip)]
    pub curriculum_before: Option<Vec<u8>>,
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

    /// Writes the state and the manifest, syncs everything, gives the checkpoint its name and removes the ones that `keep`
    /// does not cover. Returns the final folder.
    ///
    /// # Errors
    /// [`RunError::Write`], with earlier checkpoints untouched and the temporary removed.
    pub fn commit(mut self, state: &TrainState, keep: Keep) -> Result<PathBuf, RunError> {
        self.write_state(state)?;
        manifest::write(&self.temporary)?;
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
        let before = state.curriculum_before.as_ref();
        let before = before.map(|bytes| (self.temporary.join(BEFORE), bytes));
        let files = [
            (self.temporary.join("curriculum.bin"), &state.curriculum),
            (path, &text),
        ];
        for (path, bytes) in files.into_iter().chain(before) {
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

/// All valid checkpoints of a run, oldest first. Temporaries and damaged ones are passed over; of weights
/// only the size is looked at, because reading all of them takes its time. [`newest_whole`] reads.
pub fn checkpoints(root: &Path) -> Result<Vec<Checkpoint>, RunError> {
    let valid = |(step, path): (u64, PathBuf)| read(path, step, Look::Sizes).ok();
    Ok(folders(&root.join("checkpoints"))?
        .into_iter()
        .filter_map(valid)
        .collect())
}

/// The newest checkpoint of which every byte is as it was written, and what is wrong with each of the later
/// ones, the newest first.
pub(super) fn newest_whole(root: &Path) -> Result<(Option<Checkpoint>, Vec<Damage>), RunError> {
    let mut damages = Vec::new();
    for (step, path) in folders(&root.join("checkpoints"))?.into_iter().rev() {
        match read(path, step, Look::Bytes) {
            Ok(checkpoint) => return Ok((Some(checkpoint), damages)),
            Err(damage) => damages.push(damage),
        }
    }
    Ok((None, damages))
}

/// Folders that are named as checkpoints, by rising step.
fn folders(checkpoints: &Path) -> Result<Vec<(u64, PathBuf)>, RunError> {
    let entries = atomic::entries(checkpoints)?.into_iter();
    let mut found: Vec<_> = entries
        .filter_map(|path| Some((step_of(&path)?, path)))
        .collect();
    found.sort();
    Ok(found)
}

/// The newest valid checkpoint, as [`checkpoints`] sees it.
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

/// The checkpoint in a folder, if it is one of that step and of this format, with all of its files.
fn read(path: PathBuf, step: u64, look: Look) -> Result<Checkpoint, Damage> {
    manifest::check(&path, look)?;
    let fail = |name: &str, reason: String| Damage {
        path: path.join(name),
        reason,
    };
    let bytes = |name: &str| {
        fs::read(path.join(name)).map_err(|e| fail(name, format!("cannot be read: {e}")))
    };
    let (name, text) = ("state.json", bytes("state.json")?);
    let file: StateFile =
        serde_json::from_slice(&text).map_err(|e| fail(name, format!("is no state: {e}")))?;
    if file.format != FORMAT {
        let reason = format!("has format {} instead of {FORMAT}", file.format);
        return Err(fail(name, reason));
    }
    if file.state.step != step {
        let reason = format!("is of step {}", file.state.step);
        return Err(fail(name, reason));
    }
    let curriculum = bytes("curriculum.bin")?;
    let has_before = path.join(BEFORE).exists();
    let state = TrainState {
        curriculum,
        curriculum_before: has_before.then(|| bytes(BEFORE)).transpose()?,
        ..file.state
    };
    Ok(Checkpoint { path, state })
}

fn prune(folder: &Path, state: &TrainState, keep: Keep) -> Result<(), RunError> {
    let steps = folders(folder)?;
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
