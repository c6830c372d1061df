//! What other rewards would have given: their totals beside the logged ones, sample by sample.
//!
//! Groups are the logged ones and advantages are computed from both totals by the run's own setting. Which
//! rows a curriculum would have picked, and what the policy would have learnt, nobody can say afterwards.

use serde::Serialize;

use super::{
    ReplayError, Rescored,
    statistics::{Histogram, Summary, histogram, pearson, spearman, summarise},
};
use crate::{
    grpo::advantage::{ScaleRewards, advantages, is_flat},
    run::Rollout,
    types::Score,
};

/// Samples listed, and characters of each.
const LISTED: usize = 20;
const WORDS: usize = 60;

const BINS: usize = 12;

/// Greater totals are refused: their squares would leave `f64`.
const LARGEST: f64 = 1e140;

/// Collects steps; [`Comparison::report`] sums up.
#[derive(Debug)]
pub struct Comparison {
    scale: ScaleRewards,
    samples: usize,
    old: Vec<f64>,
    new: Vec<f64>,
    /// Totals of the samples that have both.
    pairs: Vec<(f64, f64)>,
    newly_skipped: usize,
    newly_scored: usize,
    advantages: Advantages,
    per_step: Vec<StepReport>,
    changed: Vec<Changed>,
}

/// What the other rewards change in what the policy is told.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Advantages {
    /// Samples scored by both.
    pub compared: usize,
    /// Those whose advantages have opposite signs.
    pub sign_flips: usize,
    /// `sign_flips / compared`; `None` when there are none to compare.
    pub sign_flip_share: Option<f64>,
    /// Those with one advantage of 0 and one that is not.
    pub to_or_from_zero: usize,
    pub groups: usize,
    /// Groups whose logged totals are all equal, and those whose new ones are: they teach nothing.
    pub flat_groups_old: usize,
    pub flat_groups_new: usize,
}

/// Totals of one step.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct StepReport {
    /// From 1.
    pub step: u64,
    /// `None` where every sample was skipped.
    pub old: Option<Summary>,
    pub new: Option<Summary>,
}

/// A sample and its two totals.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Changed {
    pub step: u64,
    /// Position in the dataset.
    pub row: u64,
    pub group: u32,
    pub sample: u32,
    pub old: f64,
    pub new: f64,
    /// The first words of the completion, without control characters.
    pub completion: String,
}

/// Totals of one set of rewards.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Side {
    /// `None` when every sample was skipped.
    pub totals: Option<Summary>,
    pub skipped: usize,
    /// Of all samples.
    pub skipped_share: f64,
}

/// Everything about two sets of rewards. `old` is what was logged.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    pub steps: usize,
    pub samples: usize,
    pub old: Side,
    pub new: Side,
    /// Samples that only the other rewards skip, and those that only the logged ones did.
    pub newly_skipped: usize,
    pub newly_scored: usize,
    /// Of the totals of samples scored by both; `None` when either side does not vary.
    pub pearson: Option<f64>,
    pub spearman: Option<f64>,
    pub advantages: Advantages,
    /// `None` when no sample has a score.
    pub histogram: Option<Histogram>,
    pub per_step: Vec<StepReport>,
    /// The most changed samples, the greatest difference first.
    pub most_changed: Vec<Changed>,
}

impl Comparison {
    /// An empty one; `scale` is the run's `scale_rewards`.
    pub fn new(scale: ScaleRewards) -> Self {
        Self {
            scale,
            samples: 0,
            old: Vec::new(),
            new: Vec::new(),
            pairs: Vec::new(),
            newly_skipped: 0,
            newly_scored: 0,
            advantages: Advantages::default(),
            per_step: Vec::new(),
            changed: Vec::new(),
        }
    }

    /// Takes in a step that the other rewards have scored.
    ///
    /// # Errors
    /// A total beyond ±1e140 or not finite, logged or new.
    pub fn add(&mut self, step: u64, rescored: &Rescored) -> Result<(), ReplayError> {
        let rollouts = &rescored.rollouts;
        let old: Vec<Option<f64>> = rollouts.iter().map(|r| r.reward).collect();
        let new: Vec<Option<f64>> = rescored.scores.iter().map(total).collect();
        for (rollout, value) in rollouts.iter().chain(rollouts).zip(old.iter().chain(&new)) {
            if let Some(value) = value.filter(|value| value.is_nan() || value.abs() > LARGEST) {
                let row = rollout.row_id;
                return Err(ReplayError::TooLarge { step, row, value });
            }
        }
        let flat = |totals: &[Option<f64>]| totals.iter().flatten().copied().collect::<Vec<f64>>();
        let (scored_old, scored_new) = (flat(&old), flat(&new));
        self.per_step.push(StepReport {
            step,
            old: summarise(&scored_old),
            new: summarise(&scored_new),
        });
        self.old.extend(scored_old);
        self.new.extend(scored_new);
        self.samples += rollouts.len();
        self.add_advantages(rollouts, &old, &new);
        for (rollout, totals) in rollouts.iter().zip(old.into_iter().zip(new)) {
            match totals {
                (Some(old), Some(new)) => {
                    self.pairs.push((old, new));
                    if old != new {
                        self.changed.push(changed(rollout, old, new));
                    }
                }
                (Some(_), None) => self.newly_skipped += 1,
                (None, Some(_)) => self.newly_scored += 1,
                (None, None) => {}
            }
        }
        self.forget_small_changes();
        Ok(())
    }

    fn forget_small_changes(&mut self) {
        let by = |c: &Changed| (c.new - c.old).abs();
        self.changed.sort_by(|a, b| by(b).total_cmp(&by(a)));
        self.changed.truncate(LISTED);
    }

    fn add_advantages(&mut self, rollouts: &[Rollout], old: &[Option<f64>], new: &[Option<f64>]) {
        let (old, new) = (grouped(rollouts, old), grouped(rollouts, new));
        let sum = &mut self.advantages;
        sum.groups += old.len();
        sum.flat_groups_old += old.iter().filter(|group| is_flat(group)).count();
        sum.flat_groups_new += new.iter().filter(|group| is_flat(group)).count();
        let of = |groups: &[Vec<Option<f64>>]| advantages(groups, self.scale).values.concat();
        let values = of(&old).into_iter().zip(of(&new));
        let scored = old.concat().into_iter().zip(new.concat());
        for ((a, b), (old, new)) in values.zip(scored) {
            // A skipped sample's 0 is no advantage.
            if old.is_none() || new.is_none() {
                continue;
            }
            sum.compared += 1;
            sum.sign_flips += usize::from((a < 0.0 && b > 0.0) || (a > 0.0 && b < 0.0));
            sum.to_or_from_zero += usize::from((a == 0.0) != (b == 0.0));
        }
    }

    /// Sums up.
    pub fn report(mut self) -> Report {
        let side = |totals: &[f64]| {
            let skipped = self.samples - totals.len();
            Side {
                totals: summarise(totals),
                skipped,
                skipped_share: skipped as f64 / (self.samples as f64).max(1.0),
            }
        };
        let flips = &mut self.advantages;
        flips.sign_flip_share =
            (flips.compared > 0).then(|| flips.sign_flips as f64 / flips.compared as f64);
        Report {
            steps: self.per_step.len(),
            samples: self.samples,
            old: side(&self.old),
            new: side(&self.new),
            newly_skipped: self.newly_skipped,
            newly_scored: self.newly_scored,
            pearson: pearson(&self.pairs),
            spearman: spearman(&self.pairs),
            advantages: self.advantages,
            histogram: histogram(&self.old, &self.new, BINS),
            per_step: self.per_step,
            most_changed: self.changed,
        }
    }
}

fn total(score: &Score) -> Option<f64> {
    match score {
        Score::Value(scored) => Some(scored.total),
        Score::Skip(_) => None,
    }
}

/// The totals by the groups of the log, in which the samples of a group stand together.
fn grouped(rollouts: &[Rollout], totals: &[Option<f64>]) -> Vec<Vec<Option<f64>>> {
    let mut totals = totals.iter().copied();
    let groups = rollouts.chunk_by(|a, b| a.group == b.group);
    groups
        .map(|group| totals.by_ref().take(group.len()).collect())
        .collect()
}

fn changed(rollout: &Rollout, old: f64, new: f64) -> Changed {
    let text = &rollout.completion.text;
    let spaced = text.split_whitespace().collect::<Vec<_>>().join(" ");
    let printable = spaced.chars().filter(|c| !c.is_control());
    Changed {
        step: rollout.step,
        row: rollout.row_id,
        group: rollout.group,
        sample: rollout.completion.index,
        old,
        new,
        completion: printable.take(WORDS).collect(),
    }
}

#[cfg(test)]
#[path = "comparison_tests.rs"]
mod tests;
