//! Dynamic sampling (DAPO, Yu et al. 2025, arXiv 2503.14476, §3.2): groups that teach nothing are dropped.
//!
//! Owns the choice of mode, which groups go, and how many prompts to draw instead. Spending what a
//! dropped group has left is `respend`'s business, drawing and generating the trainer's.

use serde::{Deserialize, Serialize};

use super::advantage::is_flat;

/// What becomes of groups whose rewards are all equal.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Written", into = "Written")]
pub enum DynamicSampling {
    /// They stay, with advantages of 0, as in TRL.
    #[default]
    Off,
    /// They are replaced by new prompts until the step has its number of groups (DAPO); costs more
    /// completions than the step's budget. Written `refill` or `true`.
    Refill,
    /// They are ended after a probe and their unspent completions go to other prompts, within the step's
    /// budget: see [`super::respend`].
    Respend,
}

/// YAML knows `true` and `false`, and everything else is a word.
#[derive(Clone, Serialize, Deserialize)]
#[serde(
    untagged,
    expecting = "dynamic sampling is false, refill (or true) or respend"
)]
enum Written {
    Flag(bool),
    Word(String),
}

impl TryFrom<Written> for DynamicSampling {
    type Error = String;

    fn try_from(written: Written) -> Result<Self, String> {
        let word = match written {
            Written::Flag(flag) => flag.to_string(),
            Written::Word(word) => word,
        };
        match word.as_str() {
            "false" => Ok(Self::Off),
            "true" | "refill" => Ok(Self::Refill),
            "respend" => Ok(Self::Respend),
            _ => Err(format!(
                "`{word}` is no way of dynamic sampling; use false, refill (or true) or respend"
            )),
        }
    }
}

impl From<DynamicSampling> for Written {
    fn from(mode: DynamicSampling) -> Self {
        match mode {
            DynamicSampling::Off => Self::Flag(false),
            DynamicSampling::Refill => Self::Word("refill".to_owned()),
            DynamicSampling::Respend => Self::Word("respend".to_owned()),
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

/// Decides how many prompts to draw after `rounds` extra rounds of at most `max_rounds`, with `kept` good
/// groups out of `seen`. DAPO's recipe allows 10 rounds in all, of which 3 extra ones already cover a pass
/// rate of 90 %.
///
/// The missing groups are divided by the share kept so far, so that one more round is likely to do, but
/// never more than `wanted` are drawn at once: when nearly every group is flat, a bigger round would
/// cost a step's generation for a handful of groups.
pub fn refill(max_rounds: u32, wanted: usize, kept: usize, seen: usize, rounds: u32) -> Refill {
    if kept >= wanted {
        return Refill::Done;
    }
    let missing = wanted - kept;
    if rounds >= max_rounds {
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
        assert_eq!(refill(2, 8, 6, 8, 0), Refill::Draw { prompts: 3 });
        // 1 of 8 kept would ask for 56; a round is never larger than the step.
        assert_eq!(refill(2, 8, 1, 8, 1), Refill::Draw { prompts: 8 });
        assert_eq!(refill(2, 8, 0, 8, 0), Refill::Draw { prompts: 8 });
    }

    #[test]
    fn stops_when_done_or_out_of_rounds() {
        assert_eq!(refill(2, 8, 9, 12, 1), Refill::Done);
        assert_eq!(refill(2, 8, 5, 20, 2), Refill::GiveUp { missing: 3 });
    }
}
