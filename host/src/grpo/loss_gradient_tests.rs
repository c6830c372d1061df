//! Slopes: by hand, against finite differences for every variant, and under micro-batching.

use super::{fixture::*, *};
use crate::grpo::config::{Correction, KlEstimator, LossType};

#[test]
fn gradient_by_hand() {
    let down = (-0.5_f64).exp();
    let up = 0.5_f64.exp();
    let got = by_hand().run(&plain(LossType::Dapo)).dlogp;
    let want = [0.0, -2.0 * down / 4.0, -2.0 / 4.0, up / 4.0];
    for (g, w) in got.iter().zip(want) {
        close(f64::from(*g), w, 1e-6);
    }
    // Every token of a sequence has the same slope A·s/n under a sequence ratio.
    let got = by_hand().run(&plain(LossType::Gspo)).dlogp;
    for (g, w) in got
        .iter()
        .zip([-1.0 / 3.0, -1.0 / 3.0, -1.0 / 3.0, up / 2.0])
    {
        close(f64::from(*g), w, 1e-6);
    }
}

#[test]
fn on_policy_gradient_is_reinforce() {
    let mut batch = Batch::fixture();
    batch.old = batch.logp.clone();
    let n = batch.mask.iter().filter(|m| **m).count() as f64;
    for loss_type in [LossType::Dapo, LossType::Cispo] {
        let out = batch.run(&plain(loss_type));
        for (t, got) in out.dlogp.iter().enumerate() {
            let b = batch.offsets.iter().rposition(|o| *o <= t).unwrap();
            let want = if batch.mask[t] {
                -batch.advantages[b] / n
            } else {
                0.0
            };
            close(f64::from(*got), want, 1e-6);
        }
    }
}

/// Central difference of the loss by each token's log-prob.
///
/// For `cispo` the ratio is held constant by definition: moving `old` and `behaviour` along with `logp`
/// holds it, and the importance weight, still.
fn finite_difference(batch: &Batch, config: &LossConfig, t: usize) -> f64 {
    let h = 1.0 / 256.0;
    let at = |shift: f32| {
        let mut moved = batch.clone();
        moved.logp[t] += shift;
        if config.loss_type == LossType::Cispo {
            moved.old[t] += shift;
            moved.behaviour[t] += shift;
        }
        moved.run(config).value
    };
    (at(h) - at(-h)) / (2.0 * f64::from(h))
}

#[test]
fn gradient_matches_finite_differences_in_every_variant() {
    let batch = Batch::fixture();
    let corrections = [
        Correction::Off,
        Correction::TokenTruncate,
        Correction::TokenMask,
        Correction::SequenceTruncate,
        Correction::SequenceMask,
    ];
    let mut compared = 0;
    for loss_type in ALL {
        for importance_correction in corrections {
            for (beta, kl_estimator, bias) in [
                (0.0, KlEstimator::K3, true),
                (0.3, KlEstimator::K1, true),
                (0.3, KlEstimator::K2, false),
                (0.3, KlEstimator::K3, false),
                (0.3, KlEstimator::K3, true),
            ] {
                for delta in [None, Some(1.37)] {
                    let config = LossConfig {
                        loss_type,
                        importance_correction,
                        importance_c_max: 1.1,
                        beta,
                        kl_estimator,
                        // Holding cispo's ratio still would hide the slope of this one.
                        kl_bias_correction: bias && loss_type != LossType::Cispo,
                        epsilon_high: Some(if loss_type == LossType::Cispo {
                            1.3
                        } else {
                            0.28
                        }),
                        delta,
                        ..LossConfig::default()
                    };
                    let got = batch.run(&config).dlogp;
                    for (t, got) in got.iter().enumerate() {
                        let want = finite_difference(&batch, &config, t);
                        let error = (f64::from(*got) - want).abs();
                        assert!(
                            error < 2e-6 + 2e-5 * want.abs(),
                            "{config:?} {t}: {got} {want}"
                        );
                        compared += usize::from(want != 0.0);
                    }
                }
            }
        }
    }
    assert!(
        compared > 1500,
        "only {compared} non-zero slopes were compared"
    );
}

#[test]
fn micro_batches_add_up_to_the_full_batch() {
    let batch = Batch::fixture();
    let norm = batch.normalisers();
    for loss_type in ALL {
        let config = LossConfig {
            loss_type,
            beta: 0.05,
            ..LossConfig::default()
        };
        let full = batch.run(&config);
        let (mut value, mut dlogp, mut stats) = (0.0, Vec::new(), LossStats::default());
        for (first, last) in [(0, 1), (1, 3), (3, 4)] {
            let (a, b) = (batch.offsets[first], batch.offsets[last]);
            let offsets: Vec<usize> = batch.offsets[first..=last].iter().map(|o| o - a).collect();
            let part = LossInput {
                offsets: &offsets,
                logp: &batch.logp[a..b],
                old: &batch.old[a..b],
                reference: Some(&batch.reference[a..b]),
                behaviour: Some(&batch.behaviour[a..b]),
                entropy: Some(&batch.entropy[a..b]),
                advantages: &batch.advantages[first..last],
                mask: &batch.mask[a..b],
            };
            let out = loss(&part, &config, &norm).unwrap();
            value += out.value;
            dlogp.extend(out.dlogp);
            stats.merge(&out.stats);
        }
        close(value, full.value, 1e-14);
        assert_eq!(dlogp, full.dlogp);
        for ((name, a), (_, b)) in stats.metrics().iter().zip(full.stats.metrics()) {
            assert!((a - b).abs() < 1e-12, "{name}: {a} {b}");
        }
    }
}
