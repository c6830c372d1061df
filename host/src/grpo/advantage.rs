//! Rewards of a group → advantages (Shao et al. 2024, eq. 3, with TRL's constants).
//!
//! Owns centring, scaling and the reward statistics of a step. Which groups are then dropped is
//! `filter`'s business.

use serde::{Deserialize, Serialize};

/// TRL's ε in `(r − mean) / (std + ε)`.
pub const STD_EPS: f64 = 1e-4;

/// A standard deviation below this counts as zero (`torch.isclose` with its default `atol`).
pub const ZERO_STD: f64 = 1e-8;

/// What centred rewards are divided by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ScaleRewards {
    /// The standard deviation of the sample's own group.
    #[default]
    Group,
    /// The standard deviation over all scored samples of the step.
    Batch,
    /// Nothing (Dr. GRPO).
    None,
}

/// Advantages of a step and the reward statistics that go with them.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Advantages {
    /// One entry per sample, shaped like the input. Skipped samples have 0 and must be left out of the
    /// loss by the caller: 0 is a place holder there, not an estimate.
    pub values: Vec<Vec<f64>>,
    pub stats: RewardStats,
}

/// Reward statistics under TRL's names; the first three are `None` without a scored sample.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct RewardStats {
    /// `reward`: mean over groups of the group mean. Groups without a scored sample do not count.
    pub reward: Option<f64>,
    /// `reward_std`: mean over groups of the group's standard deviation.
    pub reward_std: Option<f64>,
    /// `frac_reward_zero_std`: share of groups whose rewards are all equal. Always per group, also with
    /// [`ScaleRewards::Batch`], because it says how much of the batch teaches nothing.
    pub frac_reward_zero_std: Option<f64>,
    /// Groups with at least one scored sample.
    pub groups: usize,
    /// Groups in which every sample was skipped.
    pub empty_groups: usize,
    pub scored: usize,
    pub skipped: usize,
}

/// Centres the rewards of each group and scales them. `None` is a skipped sample: it enters neither mean
/// nor deviation. Groups may differ in size.
///
/// Deviations are those of a sample (divisor `n − 1`, as `torch.std`), 0 for a single sample.
pub fn advantages(groups: &[Vec<Option<f64>>], scale: ScaleRewards) -> Advantages {
    let moments: Vec<Moments> = groups.iter().map(|g| moments(g.iter().flatten())).collect();
    let batch_std = moments_of_batch(groups).std;
    let values = groups
        .iter()
        .zip(&moments)
        .map(|(group, m)| {
            let divisor = match scale {
                ScaleRewards::Group => m.std + STD_EPS,
                ScaleRewards::Batch => batch_std + STD_EPS,
                ScaleRewards::None => 1.0,
            };
            // A flat group is exactly 0 rather than its rounding error divided by ε.
            let flat = m.std < ZERO_STD;
            let one = |r: &Option<f64>| match r {
                Some(r) if !flat => (r - m.mean) / divisor,
                _ => 0.0,
            };
            group.iter().map(one).collect()
        })
        .collect();
    Advantages {
        values,
        stats: reward_stats(groups, &moments),
    }
}

/// True when the scored rewards of a group do not differ, which makes every advantage 0. A group with one
/// scored sample is flat; one with none is not (it is empty).
pub fn is_flat(group: &[Option<f64>]) -> bool {
    let m = moments(group.iter().flatten());
    m.n > 0 && m.std < ZERO_STD
}

struct Moments {
    n: usize,
    mean: f64,
    std: f64,
}

fn moments<'a>(rewards: impl Iterator<Item = &'a f64> + Clone) -> Moments {
    let n = rewards.clone().count();
    if n == 0 {
        return Moments {
            n,
            mean: 0.0,
            std: 0.0,
        };
    }
    let mean = rewards.clone().sum::<f64>() / n as f64;
    // Two passes: the one-pass formula loses everything when rewards are large and close together.
    let squares: f64 = rewards.map(|r| (r - mean) * (r - mean)).sum();
    let std = if n == 1 {
        0.0
    } else {
        (squares / (n - 1) as f64).sqrt()
    };
    Moments { n, mean, std }
}

fn moments_of_batch(groups: &[Vec<Option<f64>>]) -> Moments {
    moments(groups.iter().flatten().flatten())
}

fn reward_stats(groups: &[Vec<Option<f64>>], moments: &[Moments]) -> RewardStats {
    let filled = moments.iter().filter(|m| m.n > 0);
    let n_groups = filled.clone().count();
    let scored = moments.iter().map(|m| m.n).sum();
    let total: usize = groups.iter().map(Vec::len).sum();
    let over_groups = |f: fn(&Moments) -> f64| {
        let sum: f64 = filled.clone().map(f).sum();
        (n_groups > 0).then(|| sum / n_groups as f64)
    };
    RewardStats {
        reward: over_groups(|m| m.mean),
        reward_std: over_groups(|m| m.std),
        frac_reward_zero_std: over_groups(|m| f64::from(u8::from(m.std < ZERO_STD))),
        groups: n_groups,
        empty_groups: moments.len() - n_groups,
        scored,
        skipped: total - scored,
    }
}

#[cfg(test)]
#[path = "advantage_tests.rs"]
mod tests;
