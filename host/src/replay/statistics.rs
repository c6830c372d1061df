//! Descriptive statistics of finite numbers, in `f64`. What is undefined is `None`, never NaN.

use serde::Serialize;

/// Moments and quantiles of at least one number.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Summary {
    pub mean: f64,
    /// Of a sample (divisor `n − 1`); 0 for a single number.
    pub std: f64,
    pub min: f64,
    pub q25: f64,
    pub median: f64,
    pub q75: f64,
    pub max: f64,
}

/// Summarises `values`; `None` when there are none. Quantiles are interpolated between order statistics
/// (Hyndman & Fan 1996, type 7, numpy's default).
pub fn summarise(values: &[f64]) -> Option<Summary> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let (min, max) = (*sorted.first()?, *sorted.last()?);
    let mean = mean(values);
    let squares: f64 = values.iter().map(|v| (v - mean).powi(2)).sum();
    let quantile = |q: f64| {
        let place = q * (sorted.len() - 1) as f64;
        let (low, high) = (
            sorted[place.floor() as usize],
            sorted[place.ceil() as usize],
        );
        low + (high - low) * place.fract()
    };
    Some(Summary {
        mean,
        std: (squares / (values.len() as f64 - 1.0).max(1.0)).sqrt(),
        min,
        q25: quantile(0.25),
        median: quantile(0.5),
        q75: quantile(0.75),
        max,
    })
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// Pearson's correlation of pairs, in −1 to 1; `None` when either side does not vary.
pub fn pearson(pairs: &[(f64, f64)]) -> Option<f64> {
    let (x, y): (Vec<f64>, Vec<f64>) = pairs.iter().copied().unzip();
    // Equal numbers need not sum to a multiple of themselves, so a variance of 0 is not asked for.
    let constant = |v: &[f64]| v.windows(2).all(|w| w[0] == w[1]);
    if constant(&x) || constant(&y) {
        return None;
    }
    let (mean_x, mean_y) = (mean(&x), mean(&y));
    let (mut xx, mut yy, mut xy) = (0.0, 0.0, 0.0);
    for (x, y) in pairs {
        let (dx, dy) = (x - mean_x, y - mean_y);
        xx += dx * dx;
        yy += dy * dy;
        xy += dx * dy;
    }
    let spread = xx.sqrt() * yy.sqrt();
    // Differences below 1e-160 have squares of 0.
    (spread > 0.0).then(|| (xy / spread).clamp(-1.0, 1.0))
}

/// Spearman's rank correlation: Pearson's of the ranks, ties sharing the mean of theirs.
pub fn spearman(pairs: &[(f64, f64)]) -> Option<f64> {
    let (x, y): (Vec<f64>, Vec<f64>) = pairs.iter().copied().unzip();
    let ranked: Vec<(f64, f64)> = ranks(&x).into_iter().zip(ranks(&y)).collect();
    pearson(&ranked)
}

/// Ranks from 0.
fn ranks(values: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|a, b| values[*a].total_cmp(&values[*b]));
    let mut ranks = vec![0.0; values.len()];
    let mut first = 0;
    for run in order.chunk_by(|a, b| values[*a] == values[*b]) {
        let shared = first as f64 + (run.len() - 1) as f64 / 2.0;
        run.iter().for_each(|place| ranks[*place] = shared);
        first += run.len();
    }
    ranks
}

/// Counts of two sets of numbers in common bins of equal width, the last one closed.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Histogram {
    /// `bins + 1` edges, rising.
    pub edges: Vec<f64>,
    pub old: Vec<u64>,
    pub new: Vec<u64>,
}

/// Counts `old` and `new` in `bins` bins from the least to the greatest of all; in one bin when those are the
/// same. `None` without a number.
pub fn histogram(old: &[f64], new: &[f64], bins: usize) -> Option<Histogram> {
    let all = || old.iter().chain(new).copied();
    let min = all().min_by(f64::total_cmp)?;
    let max = all().max_by(f64::total_cmp)?;
    let bins = if min < max { bins.max(1) } else { 1 };
    let width = (max - min) / bins as f64;
    let count = |values: &[f64]| {
        let mut counts = vec![0; bins];
        for value in values {
            // `min == max` makes this NaN, which is cast to 0.
            let bin = ((value - min) / width) as usize;
            counts[bin.min(bins - 1)] += 1;
        }
        counts
    };
    let edge = |i: usize| {
        if i == bins {
            max
        } else {
            min + width * i as f64
        }
    };
    Some(Histogram {
        edges: (0..=bins).map(edge).collect(),
        old: count(old),
        new: count(new),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn summary_of_four_numbers_by_hand() {
        // Mean 2.5; squares 2.25 + 0.25 + 0.25 + 2.25 = 5, over 3. Place of the quartiles: 0.75, 1.5, 2.25.
        let found = summarise(&[4.0, 1.0, 3.0, 2.0]).unwrap();
        let expected = Summary {
            mean: 2.5,
            std: (5.0_f64 / 3.0).sqrt(),
            min: 1.0,
            q25: 1.75,
            median: 2.5,
            q75: 3.25,
            max: 4.0,
        };
        assert_eq!(found, expected);
        assert_eq!(summarise(&[]), None);
        let one = summarise(&[7.0]).unwrap();
        assert_eq!((one.std, one.q25, one.max), (0.0, 7.0, 7.0));
    }

    #[test]
    fn correlations_by_hand() {
        // x − x̄ = −1, 0, 1; y − ȳ = −2, −1, 3: Σxy = 5, Σxx = 2, Σyy = 14. The ranks are the same.
        let pairs = [(1.0, 2.0), (2.0, 3.0), (3.0, 7.0)];
        let near = |found: Option<f64>, x: f64| (found.unwrap() - x).abs() < 1e-15;
        assert!(near(pearson(&pairs), 5.0 / 28.0_f64.sqrt()));
        assert!(near(spearman(&pairs), 1.0));
        assert!(near(pearson(&[(0.0, 1.0), (1.0, 0.0)]), -1.0));
    }

    #[test]
    fn ties_share_their_mean_rank() {
        assert_eq!(ranks(&[5.0, 1.0, 5.0, 0.0]), [2.5, 1.0, 2.5, 0.0]);
        // Ranks 0, 1.5, 1.5, 3 against 0, 1, 2, 3: Σxy = 4.5, Σxx = 4.5, Σyy = 5.
        let pairs = [(0.0, 0.0), (1.0, 1.0), (1.0, 2.0), (2.0, 3.0)];
        let expected = 4.5 / 22.5_f64.sqrt();
        assert!((spearman(&pairs).unwrap() - expected).abs() < 1e-15);
    }

    #[test]
    fn what_does_not_vary_has_no_correlation() {
        // 0.1 three times does not sum to 0.3.
        let pairs = [(0.1, 1.0), (0.1, 2.0), (0.1, 3.0)];
        assert_eq!((pearson(&pairs), spearman(&pairs)), (None, None));
        assert_eq!((pearson(&[]), pearson(&[(1.0, 2.0)])), (None, None));
        assert_eq!(pearson(&[(0.0, 0.0), (1e-200, 1.0)]), None);
    }

    #[test]
    fn bins_are_common_and_the_last_is_closed() {
        let found = histogram(&[0.0, 0.4, 1.0], &[0.5, 2.0], 4).unwrap();
        let expected = Histogram {
            edges: vec![0.0, 0.5, 1.0, 1.5, 2.0],
            old: vec![2, 0, 1, 0],
            new: vec![0, 1, 0, 1],
        };
        assert_eq!(found, expected);
        let one = histogram(&[3.0, 3.0], &[], 4).unwrap();
        assert_eq!(
            (one.edges, one.old, one.new),
            (vec![3.0, 3.0], vec![2], vec![0])
        );
        assert_eq!(histogram(&[], &[], 4), None);
    }
}
