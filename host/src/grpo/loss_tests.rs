//! Values and metrics of hand-worked batches.

use super::fixture::*;
use crate::grpo::config::{Correction, KlEstimator, LossConfig, LossType};

#[test]
fn aggregations_by_hand() {
    let (up, down) = (0.5_f64.exp(), (-0.5_f64).exp());
    let first = 2.4 + 2.0 * down + 2.0;
    let token_sum = -(first - up);
    let batch = by_hand();
    close(
        batch.run(&plain(LossType::Grpo)).value,
        -(first / 3.0 - up) / 2.0,
        1e-12,
    );
    close(
        batch.run(&plain(LossType::DrGrpo)).value,
        token_sum / 32.0,
        1e-12,
    );
    close(
        batch.run(&plain(LossType::Dapo)).value,
        token_sum / 4.0,
        1e-12,
    );
    close(
        batch.run(&plain(LossType::Bnpo)).value,
        token_sum / 4.0,
        1e-12,
    );
    // The sequence ratios are exp(0) = 1 and e^0.5; A < 0 leaves the latter unclipped.
    close(
        batch.run(&plain(LossType::Gspo)).value,
        -(2.0 - up) / 2.0,
        1e-12,
    );
    let cispo = LossConfig {
        epsilon_high: Some(1.5),
        ..plain(LossType::Cispo)
    };
    let sum = 2.0 * (1.5 * -0.5 + down * -1.5 - 1.0) - 1.5 * -0.5;
    close(batch.run(&cispo).value, -sum / 4.0, 1e-12);
}

#[test]
fn corrections_by_hand() {
    // ρ: sequence 0 has 1, e^0.25, 1 (product e^0.25); sequence 1 has e². C = 1.2 < e^0.25 < 3 < e².
    let quarter = 0.25_f64.exp();
    let terms = [2.4, 2.0 * (-0.5_f64).exp(), 2.0, -(0.5_f64.exp())];
    let expect = |correction, c_max, w: [f64; 4]| {
        let config = LossConfig {
            importance_correction: correction,
            importance_c_max: c_max,
            ..plain(LossType::Dapo)
        };
        let want: f64 = -terms.iter().zip(w).map(|(t, w)| t * w).sum::<f64>() / 4.0;
        close(by_hand().run(&config).value, want, 1e-12);
    };
    expect(Correction::Off, 1.2, [1.0; 4]);
    expect(Correction::TokenTruncate, 3.0, [1.0, quarter, 1.0, 3.0]);
    expect(Correction::TokenMask, 1.2, [1.0, 0.0, 1.0, 0.0]);
    expect(Correction::SequenceTruncate, 1.2, [1.2; 4]);
    expect(
        Correction::SequenceMask,
        3.0,
        [quarter, quarter, quarter, 0.0],
    );
}

#[test]
fn kl_estimators_by_hand() {
    // d = 0.5, −0.5, 0, 1 with advantages 0, so that the loss is β·KL alone.
    let d = [0.5_f64, -0.5, 0.0, 1.0];
    let mut batch = by_hand();
    batch.advantages = vec![0.0, 0.0];
    let formula = |kind| {
        move |d: f64| match kind {
            KlEstimator::K1 => d,
            KlEstimator::K2 => d * d / 2.0,
            KlEstimator::K3 => (-d).exp() - 1.0 + d,
        }
    };
    let ratio = [0.5_f64.exp(), (-0.5_f64).exp(), 1.0, 0.5_f64.exp()];
    for kind in [KlEstimator::K1, KlEstimator::K2, KlEstimator::K3] {
        let mut config = LossConfig {
            beta: 0.1,
            kl_estimator: kind,
            ..plain(LossType::Dapo)
        };
        let k = d.map(formula(kind));
        let corrected: f64 = k.iter().zip(ratio).map(|(k, r)| k * r).sum();
        close(batch.run(&config).value, 0.1 * corrected / 4.0, 1e-12);
        config.kl_bias_correction = false;
        let out = batch.run(&config);
        close(out.value, 0.1 * k.iter().sum::<f64>() / 4.0, 1e-12);
        // The metric is the plain estimate, whatever the correction.
        close(out.stats.kl.sum / 4.0, k.iter().sum::<f64>() / 4.0, 1e-12);
    }
}

#[test]
fn delta_bounds_the_loss_of_a_negative_advantage() {
    // Sequence 1: A = −1, r = e^0.5 ≈ 1.65 is bounded at 1.4 and stops pushing.
    let config = LossConfig {
        delta: Some(1.4),
        ..plain(LossType::Dapo)
    };
    let out = by_hand().run(&config);
    close(
        out.value,
        -(2.4 + 2.0 * (-0.5_f64).exp() + 2.0 - 1.4) / 4.0,
        1e-12,
    );
    assert_eq!(out.dlogp[3], 0.0);
}

#[test]
fn metrics_by_hand() {
    let out = by_hand().run(&LossConfig {
        beta: 0.1,
        ..LossConfig::default()
    });
    let metrics = out.stats.metrics();
    let get = |name: &str| {
        metrics
            .iter()
            .find(|(n, _)| *n == name)
            .map(|(_, v)| *v)
            .unwrap()
    };
    // Only the first token is clipped: r = e^0.5 with A > 0.
    close(get("clip_ratio/high_mean"), 0.25, 1e-12);
    close(get("clip_ratio/high_max"), 1.0 / 3.0, 1e-12);
    close(get("clip_ratio/low_mean"), 0.0, 1e-12);
    close(get("clip_ratio/region_mean"), 0.25, 1e-12);
    close(
        get("sampling/sampling_logp_difference/mean"),
        2.25 / 4.0,
        1e-12,
    );
    close(get("sampling/sampling_logp_difference/max"), 2.0, 1e-12);
    close(
        get("sampling/importance_sampling_ratio/max"),
        2.0_f64.exp(),
        1e-12,
    );
    close(get("sampling/bounded_fraction"), 0.25, 1e-12);
    let k3 = |g: f64| g.exp() - 1.0 - g;
    close(get("sampling/kl"), (k3(0.25) + k3(2.0)) / 4.0, 1e-12);
}

#[test]
fn cispo_reports_its_own_clip_ratio() {
    let config = LossConfig {
        epsilon_high: Some(1.5),
        ..plain(LossType::Cispo)
    };
    let metrics = by_hand().run(&config).stats.metrics();
    // Ratios e^0.5 with A = 2, and e^0.5 with A = −1, are above 1.5; only the former counts.
    assert!(metrics.contains(&("cispo_clip_ratio", 0.25)), "{metrics:?}");
    assert!(
        metrics
            .iter()
            .all(|(name, _)| !name.starts_with("clip_ratio"))
    );
}
