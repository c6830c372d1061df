//! A run's completions scored again from its rollout log: by its own rewards, which must say what was logged
//! bit for bit, or by others, to see what they would have said.
//!
//! Owns how a logged step becomes the batches that rewards saw. What two sets of scores have to do with
//! each other is `replay/comparison.rs`.

mod comparison;
mod statistics;

use std::{
    collections::{BTreeMap, HashMap},
    path::{Path, PathBuf},
};

use anyhow::Context;
use serde::Serialize;

use crate::{
    plugin::{PluginError, RewardSet, SetScoring},
    run::{Rollout, RunError, read_metrics, read_rollouts, rollout_files},
    types::{Sample, Score},
};

pub use comparison::{Advantages, Changed, Comparison, Report, Side, StepReport};
pub use statistics::{Histogram, Summary, histogram, pearson, spearman, summarise};

/// Why a run cannot be scored again, or is not what its log says.
#[derive(Debug, thiserror::Error)]
pub enum ReplayError {
    #[error("{path} has no rollouts")]
    NoRollouts { path: PathBuf },
    #[error("{path} has no column `wave`, which says what rewards saw in one batch")]
    OldLog { path: PathBuf },
    #[error("{path}: samples of group {group} differ in row or prompt")]
    Mixed { path: PathBuf, group: u32 },
    #[error("step {step} row {row}: a reward of {value:e} is too large to compare")]
    TooLarge { step: u64, row: u64, value: f64 },
    #[error("cannot write {path}: {reason}")]
    Out { path: PathBuf, reason: &'static str },
    #[error("{source_name} names no reward")]
    NoReward { source_name: String },
    #[error("{differing} of {samples} samples differ, the first: {first}")]
    Differs {
        differing: usize,
        samples: usize,
        first: Difference,
        /// Whether the run left groups out of its log that were in the batches of those it kept.
        dropped_groups: bool,
    },
}

impl ReplayError {
    /// What the reader can do about it.
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            Self::NoRollouts { .. } => "a run writes them at the end of each step".to_owned(),
            Self::OldLog { .. } => {
                "an earlier version wrote it; `results` and report.html still read it".to_owned()
            }
            Self::Mixed { .. } => "the file was changed after the run wrote it".to_owned(),
            Self::TooLarge { .. } => "give that reward a smaller weight".to_owned(),
            Self::Out { .. } => "give --out a file in another folder, one that exists".to_owned(),
            Self::NoReward { .. } => {
                "name a component that exports `scoring`, such as reward-math".to_owned()
            }
            Self::Differs {
                dropped_groups: true,
                ..
            } => "the log or a setting of a reward was changed, or a reward looks beyond its group: groups that \
                  dynamic_sampling dropped are not in the log"
                .to_owned(),
            Self::Differs { .. } => {
                "the log or a setting of a reward was changed, or a call ran into a limit of time".to_owned()
            }
        })
    }
}

/// One number of a sample that is not what was logged.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Difference {
    /// From 1.
    pub step: u64,
    /// Position in the dataset.
    pub row: u64,
    /// Number of the group within the step.
    pub group: u32,
    /// Place within the group.
    pub sample: u32,
    /// `total`, or the name of a part.
    pub number: String,
    /// `None`: skipped, or no such part.
    pub logged: Option<f64>,
    pub replayed: Option<f64>,
}

impl std::fmt::Display for Difference {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The shortest text that reads back as the same bits.
        let text = |x: Option<f64>| x.map_or("nothing".to_owned(), |x| format!("{x:?}"));
        let Self {
            step,
            row,
            group,
            sample,
            number,
            ..
        } = self;
        let (logged, replayed) = (text(self.logged), text(self.replayed));
        write!(
            f,
            "step {step} row {row} group {group} sample {sample}: {number} is {replayed} and was logged as \
             {logged}"
        )
    }
}

/// The rollout files of a run.
#[derive(Debug)]
pub struct Log {
    /// Steps with their files, rising.
    pub files: Vec<(u64, PathBuf)>,
    /// Steps up to the last known one that have no file.
    pub missing: Vec<u64>,
}

impl Log {
    /// Finds the rollouts of a run, also of one that is going on: a file is there whole or not at all.
    ///
    /// # Errors
    /// Not a run directory, or a run without rollouts.
    pub fn find(root: &Path) -> anyhow::Result<Self> {
        let path = root.to_owned();
        if !root.join("config.yaml").exists() {
            return Err(RunError::NotARun { path }.into());
        }
        let files = rollout_files(root)?;
        let Some((last, _)) = files.last() else {
            return Err(ReplayError::NoRollouts { path }.into());
        };
        let metrics = read_metrics(root)?;
        let recorded = metrics.last().and_then(|line| line["step"].as_u64());
        let known: std::collections::HashSet<u64> = files.iter().map(|(step, _)| *step).collect();
        let steps = 1..=recorded.unwrap_or(0).max(*last);
        Ok(Self {
            missing: steps.filter(|step| !known.contains(step)).collect(),
            files,
        })
    }
}

/// A step scored again.
#[derive(Debug)]
pub struct Rescored {
    pub rollouts: Vec<Rollout>,
    /// One per rollout.
    pub scores: Vec<Score>,
    /// Failures that the rewards' policies dealt with.
    pub faults: Vec<PluginError>,
}

/// Scores the rollouts of one file in the batches in which the trainer did.
///
/// # Errors
/// A file that cannot be read or has no waves; the first failure of a reward whose policy is to abort.
pub fn rescore(step: u64, path: &Path, rewards: &RewardSet) -> anyhow::Result<Rescored> {
    rescore_with(step, path, &mut |_, samples| Ok(rewards.score(samples)?))
}

/// Scores a batch, told its wave.
pub type ScoreWave<'a> = &'a mut dyn FnMut(u32, &[Sample<'_>]) -> anyhow::Result<SetScoring>;

/// [`rescore`] by whoever scored a wave, for runs that have swapped rewards.
///
/// # Errors
/// As [`rescore`].
pub fn rescore_with(step: u64, path: &Path, score: ScoreWave<'_>) -> anyhow::Result<Rescored> {
    let rollouts = read_rollouts(path)?;
    let questions = questions(&rollouts, path)?;
    let mut waves: BTreeMap<u32, Vec<usize>> = BTreeMap::new();
    for (place, rollout) in rollouts.iter().enumerate() {
        let wave = rollout.wave.ok_or_else(|| ReplayError::OldLog {
            path: path.to_owned(),
        })?;
        waves.entry(wave).or_default().push(place);
    }
    let mut scores = vec![Score::Skip(String::new()); rollouts.len()];
    let mut faults = Vec::new();
    for (wave, places) in &waves {
        let sample = |place: &usize| {
            let rollout = &rollouts[*place];
            sample(rollout, questions[&rollout.group])
        };
        let samples: Vec<Sample<'_>> = places.iter().map(sample).collect();
        let scoring = score(*wave, &samples).with_context(|| format!("step {step}"))?;
        faults.extend(scoring.faults);
        for (place, score) in places.iter().zip(scoring.scores) {
            scores[*place] = score;
        }
    }
    Ok(Rescored {
        rollouts,
        scores,
        faults,
    })
}

/// The first rollout of each group, whose row and prompt the others share: a reward is told so by address.
fn questions<'a>(
    rollouts: &'a [Rollout],
    path: &Path,
) -> Result<HashMap<u32, &'a Rollout>, ReplayError> {
    let mut questions = HashMap::new();
    for rollout in rollouts {
        let first = *questions.entry(rollout.group).or_insert(rollout);
        if (&first.row, &first.prompt) != (&rollout.row, &rollout.prompt) {
            return Err(ReplayError::Mixed {
                path: path.to_owned(),
                group: rollout.group,
            });
        }
    }
    Ok(questions)
}

fn sample<'a>(rollout: &'a Rollout, question: &'a Rollout) -> Sample<'a> {
    Sample {
        row_id: rollout.row_id,
        row_json: &question.row,
        prompt: &question.prompt,
        completion: &rollout.completion.text,
        parsed: &rollout.parsed,
        finish: rollout.completion.finish,
        telemetry: rollout.completion.telemetry,
    }
}

/// The first number of a sample that is not, bit for bit, what was logged. Two skips are the same whatever
/// their reasons: those may tell times.
pub fn difference(rollout: &Rollout, score: &Score) -> Option<Difference> {
    let (total, parts) = match score {
        Score::Value(scored) => (Some(scored.total), scored.parts.as_slice()),
        Score::Skip(_) => (None, &[] as &[_]),
    };
    let (number, logged, replayed) = if same(rollout.reward, total) {
        differing_part(&rollout.parts, parts)?
    } else {
        ("total".to_owned(), rollout.reward, total)
    };
    Some(Difference {
        step: rollout.step,
        row: rollout.row_id,
        group: rollout.group,
        sample: rollout.completion.index,
        number,
        logged,
        replayed,
    })
}

type Parts = [(String, f64)];

fn differing_part(logged: &Parts, replayed: &Parts) -> Option<(String, Option<f64>, Option<f64>)> {
    for place in 0..logged.len().max(replayed.len()) {
        match (logged.get(place), replayed.get(place)) {
            (Some((a, x)), Some((b, y))) if a == b => {
                if !same(Some(*x), Some(*y)) {
                    return Some((a.clone(), Some(*x), Some(*y)));
                }
            }
            (Some((name, value)), _) => return Some((name.clone(), Some(*value), None)),
            (None, Some((name, value))) => return Some((name.clone(), None, Some(*value))),
            (None, None) => {}
        }
    }
    None
}

fn same(a: Option<f64>, b: Option<f64>) -> bool {
    a.map(f64::to_bits) == b.map(f64::to_bits)
}
