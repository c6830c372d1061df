//! Dynamic sampling (DAPO, Yu et al. 2025, §3.2): groups that teach nothing are dropped and refilled.
//!
//! Owns the decision only. Drawing new rows and generating for them is the trainer's work.

use serde::{Deserialize, Serialize};

use super::advantage::is_flat;

/// Whether to drop flat groups, and how long to look for better ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DynamicSampling {
    pub enabled: bool,
    /// Most extra generation rounds of one step; after them the step goes on with what it has.
    pub max_rounds: u32,
}

impl Default for DynamicSampling {
    /// Off, as in TRL; DAPO's recipe allows 10 rounds in all, of which 3 extra ones already cover a
    /// pass rate of 90 %.
    fn default() -> Self {
        Self {
            enabled: false,
            max_rounds: 3,
        }
    }
}

/// Which groups stay, `keep[i]` for group `i`, and why the others go.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    pub keep: Vec<bool>,
    /// Dropped because all rewards are equal.
    pub flat: usize,
    /// Dropped because no sample was scored.
    pub unscored: usize,
}

/// What to do after a generation round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refill {
    /// Enough groups, use the first `wanted` kept ones.
    Done,
    /// Generate for this many new prompts and judge again.
    Draw { prompts: usize },
    /// Rounds are used up; train on the kept groups, which may be none.
    GiveUp { missing: usize },
}

/// Keeps the groups whose scored rewards differ.
pub fn judge(groups: &[Vec<Option<f64>>]) -> Verdict {
    let mut verdict = Verdict::default();
    for group in groups {
        let unscored = group.iter().all(Option::is_none);
        let flat = is_flat(group);
        verdict.unscored += usize::from(unscored);
        verdict.flat += usize::from(flat);
        verdict.keep.push(!unscored && !flat);
    }
    verdict
}

/// Decides how many prompts to draw after `rounds` extra rounds, with `kept` good groups out of `seen`.
///
/// The missing groups are divided by the share kept so far, so that one more round is likely to do, but
/// never more than `wanted` are drawn at once: when nearly every group is flat, a bigger round would
/// cost a step's generation for a handful of groups.
pub fn refill(
    policy: DynamicSampling,
    wanted: usize,
    kept: usize,
    seen: usize,
    rounds: u32,
) -> Refill {
    if !policy.enabled || kept >= wanted {
        return Refill::Done;
    }
    let missing = wanted - kept;
    if rounds >= policy.max_rounds {
        return Refill::GiveUp { missing };
    }
    // ⌈missing · seen / kept⌉ in integers; nothing kept means no estimate, so a full round.
    let prompts = if kept == 0 {
        wanted
    } else {
        (missing * seen).div_ceil(kept).min(wanted)
    };
    Refill::Draw { prompts }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ON: DynamicSampling = DynamicSampling {
        enabled: true,
        max_rounds: 2,
    };

    #[test]
    fn flat_and_unscored_groups_go() {
        let verdict = judge(&[
            vec![Some(1.0), Some(1.0), None],
            vec![Some(1.0), None, Some(0.0)],
            vec![None, None],
            vec![Some(0.0), None],
        ]);
        assert_eq!(
            verdict,
            Verdict {
                keep: vec![false, true, false, false],
                flat: 2,
                unscored: 1
            }
        );
    }

    #[test]
    fn refills_by_the_share_kept_so_far() {
        // 6 of 8 kept, 2 missing: 2 / (6/8) = 2.67 → 3.
        assert_eq!(refill(ON, 8, 6, 8, 0), Refill::Draw { prompts: 3 });
        // 1 of 8 kept would ask for 56; a round is never larger than the step.
        assert_eq!(refill(ON, 8, 1, 8, 1), Refill::Draw { prompts: 8 });
        assert_eq!(refill(ON, 8, 0, 8, 0), Refill::Draw { prompts: 8 });
    }

    #[test]
    fn stops_when_done_off_or_out_of_rounds() {
        assert_eq!(refill(ON, 8, 9, 12, 1), Refill::Done);
        assert_eq!(refill(DynamicSampling::default(), 8, 0, 8, 0), Refill::Done);
        assert_eq!(refill(ON, 8, 5, 20, 2), Refill::GiveUp { missing: 3 });
    }
}
