//! One step: averages taken in, an epoch begun where the last one ended, rows until the budget is full.

use crate::buckets::{Config, Profile, profile};
use crate::report::{Report, report};
use crate::state::State;

/// What the plugin interface lets a plan ask for, in multiples of the budget.
const MAX_PLAN_FACTOR: u64 = 8;

/// Tables the plugin interface lets a plan report. A step over more epochs of a tiny dataset says the first
/// ones; within a step nothing is learnt, so the others say the same.
const MAX_REPORTS: usize = 8;

/// What the step may spend; fields mean what they mean in the WIT.
#[derive(Clone, Copy, Debug)]
pub struct Budget {
    pub rows: u64,
    pub prompts: u32,
    pub group_size: u32,
    pub seed: u64,
}

/// The plan of a step.
#[derive(Clone, Debug)]
pub struct Planned {
    /// Row and completions.
    pub picks: Vec<(u64, u32)>,
    pub epoch: f64,
    pub state: Vec<u8>,
    pub metrics: Vec<(String, f64)>,
    /// One for each epoch that begins, [`MAX_REPORTS`] at most.
    pub reports: Vec<Report>,
}

/// Plans a step. `outcomes` are row and rewards of the step before. The error says which of the
/// arguments cannot be.
pub fn plan<'a>(
    config: &Config,
    state: &[u8],
    outcomes: impl IntoIterator<Item = (u64, &'a [f64])>,
    budget: &Budget,
) -> Result<Planned, String> {
    let mut state = State::from_bytes(state, budget.rows, budget.seed)?;
    for (row, rewards) in outcomes {
        learn(&mut state.averages, config.decay, row, rewards)?;
    }
    let mut reports = Vec::new();
    let picks = pick(&mut state, config, budget, &mut reports);
    reports.truncate(MAX_REPORTS);
    let mut metrics = metrics(&state.profile, budget.group_size);
    #[expect(clippy::cast_precision_loss, reason = "far below 2^53")]
    let completions = picks.iter().map(|(_, n)| u64::from(*n)).sum::<u64>() as f64;
    metrics.push(("completions".to_owned(), completions));
    Ok(Planned {
        picks,
        epoch: state.walk.epochs(),
        state: state.to_bytes(),
        metrics,
        reports,
    })
}

/// `average = decay·average + (1 - decay)·mean of the rewards`; the first mean is taken as it is.
fn learn(
    averages: &mut [Option<f64>],
    decay: f64,
    row: u64,
    rewards: &[f64],
) -> Result<(), String> {
    let rows = averages.len();
    let index = usize::try_from(row).unwrap_or(usize::MAX);
    let Some(average) = averages.get_mut(index) else {
        return Err(format!("an outcome of row {row}, the dataset has {rows}"));
    };
    if rewards.is_empty() {
        return Ok(());
    }
    #[expect(clippy::cast_precision_loss, reason = "completions of one row")]
    let n = rewards.len() as f64;
    // Divided first: the sum of huge rewards would overflow.
    let mean: f64 = rewards.iter().map(|r| r / n).sum();
    let new = average.map_or(mean, |old| decay * old + (1.0 - decay) * mean);
    if !new.is_finite() {
        return Err(format!("a reward of row {row} is not finite"));
    }
    *average = Some(new);
    Ok(())
}

/// Rows in the order of the walk, as many as the step's completions allow and one at least.
fn pick(
    state: &mut State,
    config: &Config,
    budget: &Budget,
    reports: &mut Vec<Report>,
) -> Vec<(u64, u32)> {
    let wanted = u64::from(budget.prompts) * u64::from(budget.group_size);
    let cap = u32::try_from(wanted.saturating_mul(MAX_PLAN_FACTOR)).unwrap_or(u32::MAX);
    let mut picks = Vec::new();
    let mut spent = 0;
    loop {
        // An epoch whose first row does not fit begins with the next step, when more is known.
        let fresh = state.walk.at_epoch_start().then(|| {
            let seen = state.averages.iter().flatten().copied().collect();
            profile(seen, config, budget.group_size)
        });
        let current = fresh.as_ref().unwrap_or(&state.profile);
        let mut ahead = state.walk;
        let row = ahead.next_row(config.shuffle);
        let average = state.averages[row as usize];
        let rollouts = current.rollouts(average).unwrap_or(budget.group_size);
        let rollouts = rollouts.clamp(1, cap.max(1));
        if !picks.is_empty() && spent + u64::from(rollouts) > wanted {
            return picks;
        }
        if let Some(fresh) = fresh {
            let epoch = state.walk.position / state.walk.rows;
            reports.push(report(&fresh, epoch, state.walk.rows, budget.group_size));
            state.profile = fresh;
        }
        picks.push((row, rollouts));
        spent += u64::from(rollouts);
        state.walk = ahead;
    }
}

/// Named numbers of the epoch's profile. What is undefined, such as the mean of no rows, is left out.
/// Before any row has a reward all rows are one bucket that gets the budget's group size.
fn metrics(profile: &Profile, group_size: u32) -> Vec<(String, f64)> {
    #[expect(clippy::cast_precision_loss, reason = "at most 2^20 rows")]
    let count = |n: u64| n as f64;
    let buckets = profile.buckets.len().max(1);
    let mut out = vec![
        ("buckets".to_owned(), count(buckets as u64)),
        ("seen".to_owned(), count(profile.seen())),
    ];
    if profile.buckets.is_empty() {
        out.push(("bucket_0/n".to_owned(), 0.0));
        out.push(("bucket_0/rollouts".to_owned(), f64::from(group_size)));
    }
    let boundaries = profile.buckets.iter().skip(1).map(|b| b.lo).enumerate();
    out.extend(boundaries.map(|(i, lo)| (format!("boundary_{i}"), lo)));
    for (i, bucket) in profile.buckets.iter().enumerate() {
        let values = [
            ("lo", bucket.lo),
            ("hi", bucket.hi),
            ("n", count(bucket.n)),
            ("share", profile.share(bucket)),
            ("rollouts", f64::from(bucket.rollouts)),
            ("reward_mean", bucket.mean),
            ("reward_std", bucket.std),
            ("reward_min", bucket.min),
            ("reward_max", bucket.max),
        ];
        out.extend(values.map(|(name, value)| (format!("bucket_{i}/{name}"), value)));
    }
    let health = [("spread", profile.spread), ("balance", profile.balance())];
    out.extend(
        health
            .into_iter()
            .filter_map(|(n, v)| Some((n.to_owned(), v?))),
    );
    out
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
