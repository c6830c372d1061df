//! The buckets of an epoch: where their boundaries lie, what is in them, how many completions a row of
//! each gets.

use crate::density::{at, density, scott_bandwidth, valleys};
use serde::Deserialize;

/// Most buckets that the metrics of a plan have room for.
pub const MAX_BUCKETS: u32 = 6;

/// The plugin's config.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Completions of a row in a bucket whose mean is the best reward; the budget's group size if
    /// missing.
    pub base: Option<u32>,
    /// How many times `base` is added for a bucket whose mean is the worst reward.
    pub alpha: f64,
    pub n_buckets: u32,
    /// Weight of the past in a row's average reward.
    pub decay: f64,
    /// `false` takes the rows in the order of the dataset.
    pub shuffle: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            base: Some(4),
            alpha: 1.5,
            n_buckets: 3,
            decay: 0.7,
            shuffle: true,
        }
    }
}

impl Config {
    /// Reads the JSON object of `configure`; the error names the key.
    pub fn parse(json: &str) -> Result<Self, String> {
        let config: Self = serde_json::from_str(json).map_err(|e| e.to_string())?;
        let Self {
            base,
            alpha,
            n_buckets,
            decay,
            ..
        } = config;
        if base.is_some_and(|base| !(1..=1024).contains(&base)) {
            return Err("base is not from 1 to 1024".to_owned());
        }
        if !(0.0..=100.0).contains(&alpha) {
            return Err(format!("alpha is {alpha}, not from 0 to 100"));
        }
        if !(1..=MAX_BUCKETS).contains(&n_buckets) {
            return Err(format!(
                "n_buckets is {n_buckets}, not from 1 to {MAX_BUCKETS}"
            ));
        }
        if !(0.0..1.0).contains(&decay) {
            return Err(format!("decay is {decay}, not from 0 to below 1"));
        }
        Ok(config)
    }

    /// `round(base·(1 + alpha·(1 - mean)))` for a bucket's mean reward scaled to [0, 1].
    fn rollouts(&self, mean: f64, group_size: u32) -> u32 {
        let base = f64::from(self.base.unwrap_or(group_size));
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "positive; a cast saturates"
        )]
        let rollouts = (base * (1.0 + self.alpha * (1.0 - mean))).round() as u32;
        rollouts
    }
}

/// Rows whose rewards lie together. Rewards are on their own scale.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Bucket {
    /// The range: `lo` belongs to it; `hi` belongs to the next one, if there is one.
    pub lo: f64,
    pub hi: f64,
    /// Seen rows, at least 1.
    pub n: u64,
    /// Completions of each.
    pub rollouts: u32,
    /// Of the rows' average rewards; the deviation is that of a population.
    pub mean: f64,
    pub std: f64,
    pub min: f64,
    pub max: f64,
}

/// What an epoch began with.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Profile {
    /// From low rewards to high ones; empty before any row has a reward.
    pub buckets: Vec<Bucket>,
    /// Standard deviation of the average rewards over their range; `None` without a range.
    pub spread: Option<f64>,
}

impl Profile {
    /// Seen rows.
    pub fn seen(&self) -> u64 {
        self.buckets.iter().map(|b| b.n).sum()
    }

    /// A bucket's share of the seen rows.
    #[expect(clippy::cast_precision_loss, reason = "at most 2^20 rows")]
    pub fn share(&self, bucket: &Bucket) -> f64 {
        bucket.n as f64 / self.seen() as f64
    }

    /// The smallest share times the number of buckets: 1 if all are alike. `None` before any row has a
    /// reward.
    pub fn balance(&self) -> Option<f64> {
        let smallest = self.buckets.iter().map(|b| self.share(b));
        #[expect(clippy::cast_precision_loss, reason = "at most MAX_BUCKETS")]
        let count = self.buckets.len() as f64;
        smallest.reduce(f64::min).map(|share| share * count)
    }

    /// Completions for a row with this average reward; `None` if nothing is known of it or of all rows.
    pub fn rollouts(&self, reward: Option<f64>) -> Option<u32> {
        let reward = reward?;
        let above = self.buckets.iter().rev().find(|b| reward >= b.lo);
        above.or(self.buckets.first()).map(|b| b.rollouts)
    }
}

/// Rewards mapped to [0, 1] and back. Halves are subtracted, since a range can overflow.
#[derive(Clone, Copy)]
struct Scale {
    lo: f64,
    hi: f64,
}

impl Scale {
    /// `None` if the rewards have no range that a double can hold.
    fn of(sorted: &[f64]) -> Option<Self> {
        let (lo, hi) = (*sorted.first()?, *sorted.last()?);
        (hi / 2.0 - lo / 2.0 > 0.0).then_some(Self { lo, hi })
    }

    fn half_range(self) -> f64 {
        self.hi / 2.0 - self.lo / 2.0
    }

    fn to_unit(self, reward: f64) -> f64 {
        ((reward / 2.0 - self.lo / 2.0) / self.half_range()).clamp(0.0, 1.0)
    }

    fn to_reward(self, unit: f64) -> f64 {
        self.lo * (1.0 - unit) + self.hi * unit
    }
}

/// Buckets of the average rewards of the seen rows, which must be finite. `group_size` is the budget's:
/// what rows get while nothing tells hard from easy.
pub fn profile(mut rewards: Vec<f64>, config: &Config, group_size: u32) -> Profile {
    rewards.sort_unstable_by(f64::total_cmp);
    let Some(scale) = Scale::of(&rewards) else {
        return alike(&rewards, group_size);
    };
    let units: Vec<f64> = rewards.iter().map(|r| scale.to_unit(*r)).collect();
    let cuts = boundaries(&units, config.n_buckets as usize);
    let mut buckets = Vec::with_capacity(cuts.len() + 1);
    let (mut begin, mut lo) = (0, scale.lo);
    for cut in cuts.into_iter().map(Some).chain([None]) {
        let hi = cut.map_or(scale.hi, |cut| scale.to_reward(cut));
        let end = match cut {
            Some(_) => rewards.partition_point(|r| *r < hi),
            None => rewards.len(),
        };
        // A boundary that rounding has moved past its neighbours parts nothing.
        if end == begin || (cut.is_some() && end == rewards.len()) {
            continue;
        }
        let (mean, std) = moments(&units[begin..end]);
        buckets.push(Bucket {
            lo,
            hi,
            n: (end - begin) as u64,
            rollouts: config.rollouts(mean, group_size),
            mean: scale.to_reward(mean),
            std: 2.0 * (scale.half_range() * std),
            min: rewards[begin],
            max: rewards[end - 1],
        });
        (begin, lo) = (end, hi);
    }
    let spread = Some(moments(&units).1);
    Profile { buckets, spread }
}

/// Rewards without a range: nobody is hard, so all get the budget's group size.
fn alike(sorted: &[f64], group_size: u32) -> Profile {
    let bucket = |reward: &f64| Bucket {
        lo: *reward,
        hi: *reward,
        n: sorted.len() as u64,
        rollouts: group_size,
        mean: *reward,
        std: 0.0,
        min: *reward,
        max: *reward,
    };
    Profile {
        buckets: sorted.first().map(bucket).into_iter().collect(),
        spread: None,
    }
}

/// The deepest valleys of the density of points in [0, 1], fewer than `n_buckets`, in order.
pub fn boundaries(points: &[f64], n_buckets: usize) -> Vec<f64> {
    let Some(bandwidth) = scott_bandwidth(points) else {
        return Vec::new();
    };
    let density = density(points, bandwidth);
    let mut deepest = valleys(&density);
    deepest.sort_by(|a, b| density[*a].total_cmp(&density[*b]));
    deepest.truncate(n_buckets - 1);
    deepest.sort_unstable();
    deepest.into_iter().map(at).collect()
}

/// Mean and population standard deviation of at least one point.
fn moments(points: &[f64]) -> (f64, f64) {
    #[expect(clippy::cast_precision_loss, reason = "far below 2^53 points")]
    let n = points.len() as f64;
    let mean = points.iter().sum::<f64>() / n;
    let squares: f64 = points.iter().map(|x| (x - mean).powi(2)).sum();
    (mean, (squares / n).sqrt())
}

#[cfg(test)]
#[path = "buckets_tests.rs"]
mod tests;
