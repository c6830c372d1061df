//! A Gaussian kernel density on a grid over [0, 1], and where it has valleys. Values are held to
//! `scipy.stats.gaussian_kde` and `scipy.signal.find_peaks` by `tests/fixtures/kde.py`.

use std::f64::consts::PI;

/// Points of the grid, both ends included.
pub const GRID: usize = 512;

#[expect(clippy::cast_precision_loss, reason = "a small constant")]
const STEPS: f64 = (GRID - 1) as f64;

/// Position of a grid point.
pub fn at(index: usize) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "below GRID")]
    let index = index as f64;
    index / STEPS
}

/// Scott's bandwidth `n^(-1/5)·s` with the sample standard deviation `s` (Scott 1992, one dimension).
/// `None` where it is 0 or undefined: fewer than two points, or all of them equal.
pub fn scott_bandwidth(points: &[f64]) -> Option<f64> {
    #[expect(clippy::cast_precision_loss, reason = "far below 2^53 points")]
    let n = points.len() as f64;
    let mean = points.iter().sum::<f64>() / n;
    let squares: f64 = points.iter().map(|x| (x - mean).powi(2)).sum();
    let deviation = (squares / (n - 1.0)).sqrt();
    // A bandwidth so small that its inverse overflows is none either; NaN fails the comparison.
    Some(deviation * n.powf(-0.2)).filter(|h| *h > f64::EPSILON)
}

/// `1/(n·h·√(2π)) · Σ exp(-(g - x)²/(2·h²))` at every grid point `g`, for points in [0, 1] and `h` above
/// 0.
///
/// From the grid point nearest to an `x` outwards each value follows from its neighbour by two products,
/// in a fifth of the time that an exponential for each takes: the plugin has a deadline. The rounding
/// error stays below 1e-10 of a value.
pub fn density(points: &[f64], bandwidth: f64) -> Vec<f64> {
    let mut sums = vec![0.0; GRID];
    let step = 1.0 / (STEPS * bandwidth);
    let shrink = (-step * step).exp();
    for x in points {
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "points are in [0, 1]"
        )]
        let nearest = (x * STEPS).round() as usize;
        let z = (at(nearest) - x) / bandwidth;
        let peak = (-0.5 * z * z).exp();
        sums[nearest] += peak;
        let ratio = |z: f64| (-step * (z + 0.5 * step)).exp();
        let (below, above) = sums.split_at_mut(nearest);
        spread(above[1..].iter_mut(), peak, ratio(z), shrink);
        spread(below.iter_mut().rev(), peak, ratio(-z), shrink);
    }
    #[expect(clippy::cast_precision_loss, reason = "far below 2^53 points")]
    let norm = points.len() as f64 * bandwidth * (2.0 * PI).sqrt();
    sums.iter().map(|sum| sum / norm).collect()
}

/// Adds one kernel's values on one side of its peak.
fn spread<'a>(sums: impl Iterator<Item = &'a mut f64>, peak: f64, mut ratio: f64, shrink: f64) {
    let mut value = peak;
    for sum in sums {
        value *= ratio;
        if value == 0.0 {
            break;
        }
        ratio *= shrink;
        *sum += value;
    }
}

/// Grid points where the density is lower than on both sides; of a flat bottom the middle one.
pub fn valleys(density: &[f64]) -> Vec<usize> {
    let mut found = Vec::new();
    // Where the flat piece that ends here began, if the density fell into it.
    let mut bottom = None;
    for (index, pair) in density.windows(2).enumerate() {
        if pair[1] < pair[0] {
            bottom = Some(index + 1);
        } else if pair[1] > pair[0]
            && let Some(begin) = bottom.take()
        {
            found.push(begin.midpoint(index));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn valleys_are_strict_and_flat_ones_count_once() {
        assert_eq!(
            valleys(&[3.0, 1.0, 2.0, 2.0, 0.0, 0.0, 0.0, 0.0, 5.0]),
            [1, 5]
        );
        assert_eq!(valleys(&[0.0, 0.0, 1.0, 1.0, 0.0, 0.0]), [0_usize; 0]);
        assert_eq!(valleys(&[2.0, 1.0]), [0_usize; 0]);
    }

    #[test]
    fn the_density_integrates_to_one() {
        let points: Vec<f64> = (0..300).map(|i| 0.4 + f64::from(i % 17) / 80.0).collect();
        let h = scott_bandwidth(&points).unwrap();
        let sum: f64 = density(&points, h).iter().sum();
        assert!((sum / STEPS - 1.0).abs() < 1e-9, "{sum}");
    }

    #[test]
    fn no_spread_no_bandwidth() {
        for points in [&[][..], &[0.5], &[0.25, 0.25, 0.25]] {
            assert_eq!(scott_bandwidth(points), None);
        }
        let h = scott_bandwidth(&[0.0, 1.0]).unwrap();
        assert!((h - 0.5_f64.sqrt() * 2.0_f64.powf(-0.2)).abs() < 1e-15);
    }
}
