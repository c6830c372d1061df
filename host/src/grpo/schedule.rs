//! Learning rate as a function of the step: constant, linear or cosine, with linear warm-up.

use serde::{Deserialize, Serialize};

/// Shape of the learning rate after warm-up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Schedule {
    Constant,
    /// Falls to 0 one step after the last (Hugging Face's default).
    #[default]
    Linear,
    /// Half a cosine wave down to 0 (Loshchilov & Hutter 2017).
    Cosine,
}

impl Schedule {
    /// The factor on the base learning rate for optimizer step `step` (from 0) of `total`, in [0, 1].
    ///
    /// During the first `warmup` steps it is `(step + 1) / warmup`: unlike Hugging Face's, the first step
    /// is not spent at 0. After it, the decay runs over the `total − warmup` steps left.
    pub fn factor(self, step: u64, total: u64, warmup: u64) -> f64 {
        if step < warmup {
            return (step + 1) as f64 / warmup as f64;
        }
        let span = total.saturating_sub(warmup).max(1);
        let progress = ((step - warmup) as f64 / span as f64).min(1.0);
        match self {
            Self::Constant => 1.0,
            Self::Linear => 1.0 - progress,
            Self::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * progress).cos()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(a: f64, b: f64) {
        assert!((a - b).abs() < 1e-12, "{a} is not {b}");
    }

    #[test]
    fn warm_up_rises_to_one_in_every_shape() {
        for shape in [Schedule::Constant, Schedule::Linear, Schedule::Cosine] {
            let seen: Vec<f64> = (0..5).map(|s| shape.factor(s, 20, 4)).collect();
            assert_eq!(seen, [0.25, 0.5, 0.75, 1.0, 1.0]);
        }
    }

    #[test]
    fn decay_by_hand() {
        close(Schedule::Linear.factor(8, 20, 4), 0.75);
        close(Schedule::Linear.factor(19, 20, 4), 1.0 / 16.0);
        close(Schedule::Cosine.factor(12, 20, 4), 0.5);
        close(
            Schedule::Cosine.factor(8, 20, 4),
            0.5 * (1.0 + 0.5_f64.sqrt()),
        );
        close(Schedule::Constant.factor(19, 20, 0), 1.0);
    }

    #[test]
    fn past_the_end_is_zero_and_degenerate_totals_are_finite() {
        close(Schedule::Linear.factor(40, 20, 4), 0.0);
        close(Schedule::Cosine.factor(40, 20, 4), 0.0);
        close(Schedule::Linear.factor(0, 0, 0), 1.0);
        close(Schedule::Linear.factor(5, 3, 5), 1.0);
    }
}
