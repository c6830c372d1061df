//! Several rewards as one: a weighted sum per sample, with every reward's own numbers as parts.

use super::error::PluginError;
use super::reward::{RewardPlugin, Scoring};
use crate::types::{PluginId, Sample, Score, Scored};
use std::collections::HashMap;
use std::time::Instant;

/// A reward and its factor in the sum.
pub struct Weighted {
    pub reward: RewardPlugin,
    /// Finite, may be negative. A reward of weight 0 is only watched: it excludes no sample.
    pub weight: f64,
}

/// A weight that cannot be used.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum WeightError {
    #[error("weight `{text}` of plugin `{plugin}` is not a finite number")]
    NotANumber { plugin: String, text: String },
    #[error("no reward has a weight other than 0")]
    AllZero,
}

impl WeightError {
    /// What the reader can do about it.
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            Self::NotANumber { plugin, .. } => format!("write {plugin}=0.5"),
            Self::AllZero => {
                "give at least one reward a weight, as in --plugin a.wasm=1".to_owned()
            }
        })
    }
}

/// The rewards of a run.
pub struct RewardSet {
    /// Each with the name its numbers go by, unique in the set.
    members: Vec<(String, Weighted)>,
}

/// Combined scores, and what each reward contributed to trouble.
#[derive(Debug)]
pub struct SetScoring {
    /// One per sample. The total is the weighted sum; the parts are `NAME` for each reward's own
    /// total, unweighted, and `NAME/PART` for its parts.
    pub scores: Vec<Score>,
    /// Samples each reward skipped or failed on, in the order of [`RewardSet::names`].
    pub skipped: Vec<u32>,
    /// Failures that the rewards' policies dealt with.
    pub faults: Vec<PluginError>,
    /// What each reward said by itself, in the order of [`RewardSet::names`].
    pub members: Vec<MemberScoring>,
}

/// One reward's part in a [`SetScoring`].
#[derive(Debug)]
pub struct MemberScoring {
    /// Its own total of each sample, unweighted; `None` where it has none.
    pub totals: Vec<Option<f64>>,
    /// Samples it failed on.
    pub failed: u32,
    /// Wall time of its calls.
    pub seconds: f64,
}

/// Told of a failed call: place of the reward in the set, place of the sample in the batch, and the failure.
pub type NoteFailure<'a> = &'a mut dyn FnMut(usize, usize, &PluginError);

impl RewardSet {
    /// Joins rewards. Of several with the same name the second is called `NAME#2`, and so on.
    ///
    /// # Errors
    /// A weight that is not finite, or none that counts.
    pub fn new(members: Vec<Weighted>) -> Result<Self, WeightError> {
        if let Some(bad) = members.iter().find(|m| !m.weight.is_finite()) {
            return Err(WeightError::NotANumber {
                plugin: bad.reward.id().name.clone(),
                text: bad.weight.to_string(),
            });
        }
        if members.iter().all(|m| m.weight == 0.0) {
            return Err(WeightError::AllZero);
        }
        let unnamed = members.into_iter().map(|member| (String::new(), member));
        let mut set = Self {
            members: unnamed.collect(),
        };
        set.rename();
        Ok(set)
    }

    fn rename(&mut self) {
        let mut seen: HashMap<String, u32> = HashMap::new();
        for (known_as, member) in &mut self.members {
            let name = member.reward.id().name.clone();
            let count = seen.entry(name.clone()).or_insert(0);
            *count += 1;
            *known_as = match *count {
                1 => name,
                n => format!("{name}#{n}"),
            };
        }
    }

    /// Puts `reward` in the place of the one at `place`, under the same weight, and hands that one out. `None`, and nothing
    /// changes, where there is no such place.
    pub fn exchange(&mut self, place: usize, reward: RewardPlugin) -> Option<RewardPlugin> {
        let (_, member) = self.members.get_mut(place)?;
        let before = std::mem::replace(&mut member.reward, reward);
        self.rename();
        Some(before)
    }

    /// The names of the rewards, in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.members.iter().map(|(name, _)| name.as_str())
    }

    /// The weight of the reward at `place`.
    pub fn weight(&self, place: usize) -> Option<f64> {
        self.members.get(place).map(|(_, member)| member.weight)
    }

    /// Identities of the rewards, in order.
    pub fn ids(&self) -> impl Iterator<Item = &PluginId> {
        self.members.iter().map(|(_, member)| member.reward.id())
    }

    /// Scores a batch with every reward. A sample that a reward of weight other than 0 skips is
    /// skipped, for the reasons of all that did.
    ///
    /// # Errors
    /// The first failure of a reward whose policy is to abort.
    pub fn score(&self, samples: &[Sample<'_>]) -> Result<SetScoring, PluginError> {
        self.score_noting(samples, &mut |_, _, _| {})
    }

    /// [`RewardSet::score`] that tells `note` of the calls that failed, as [`RewardPlugin::score_noting`] does.
    ///
    /// # Errors
    /// As [`RewardSet::score`].
    pub fn score_noting(
        &self,
        samples: &[Sample<'_>],
        note: NoteFailure<'_>,
    ) -> Result<SetScoring, PluginError> {
        let mut columns = Vec::with_capacity(self.members.len());
        let (mut faults, mut members) = (Vec::new(), Vec::new());
        for (place, (_, member)) in self.members.iter().enumerate() {
            let begun = Instant::now();
            let mut note = |sample: usize, error: &PluginError| note(place, sample, error);
            let Scoring {
                scores,
                faults: met,
                failed,
            } = member.reward.score_noting(samples, &mut note)?;
            faults.extend(met);
            members.push(MemberScoring {
                totals: scores.iter().map(total).collect(),
                failed,
                seconds: begun.elapsed().as_secs_f64(),
            });
            columns.push(scores.into_iter());
        }
        let mut skipped = vec![0_u32; self.members.len()];
        let mut scores = Vec::with_capacity(samples.len());
        for _ in samples {
            let row: Vec<Score> = columns.iter_mut().filter_map(Iterator::next).collect();
            for (count, score) in skipped.iter_mut().zip(&row) {
                *count += u32::from(matches!(score, Score::Skip(_)));
            }
            scores.push(self.combine(row));
        }
        Ok(SetScoring {
            scores,
            skipped,
            faults,
            members,
        })
    }

    fn combine(&self, row: Vec<Score>) -> Score {
        let mut sum = Scored::default();
        let mut reasons = Vec::new();
        for ((name, member), score) in self.members.iter().zip(row) {
            match score {
                Score::Skip(_) if member.weight == 0.0 => {}
                Score::Skip(reason) => reasons.push(format!("{name}: {reason}")),
                Score::Value(scored) => {
                    sum.total += member.weight * scored.total;
                    sum.parts.push((name.clone(), scored.total));
                    let own = scored.parts.into_iter();
                    sum.parts
                        .extend(own.map(|(part, v)| (format!("{name}/{part}"), v)));
                }
            }
        }
        if reasons.is_empty() {
            Score::Value(sum)
        } else {
            Score::Skip(reasons.join("; "))
        }
    }
}

fn total(score: &Score) -> Option<f64> {
    match score {
        Score::Value(scored) => Some(scored.total),
        Score::Skip(_) => None,
    }
}
