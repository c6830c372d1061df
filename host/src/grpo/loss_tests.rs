//! Hand-worked batches, finite differences for every variant, exactness under micro-batching.

use super::*;

const ALL: [LossType; 6] = [
    LossType::Grpo,
    LossType::DrGrpo,
    LossType::Dapo,
    LossType::Bnpo,
    LossType::Gspo,
    LossType::Cispo,
];

/// Owned arrays of a batch, so that tests can bend one of them.
#[derive(Clone)]
struct Batch {
    offsets: Vec<usize>,
    logp: Vec<f32>,
    old: Vec<f32>,
    reference: Vec<f32>,
    behaviour: Vec<f32>,
    entropy: Vec<f32>,
    advantages: Vec<f64>,
    mask: Vec<bool>,
}

impl Batch {
    /// Four sequences of 3, 1, 0 and 5 tokens. All log-probs are multiples of 2⁻⁸, so that steps of 2⁻⁸
    /// are exact in f32. Log-ratios spread over ±0.5: both sides of the clip range, none on an edge.
    fn fixture() -> Self {
        let q = |x: &[i32]| x.iter().map(|v| *v as f32 / 256.0).collect::<Vec<f32>>();
        Self {
            offsets: vec![0, 3, 4, 4, 9],
            logp: q(&[-300, -150, -512, -40, -77, -260, -333, -90, -610]),
            old: q(&[-310, -270, -420, -30, -70, -250, -431, -203, -500]),
            reference: q(&[-280, -200, -530, -60, -50, -300, -320, -120, -580]),
            behaviour: q(&[-300, -280, -440, -31, -95, -258, -471, -190, -533]),
            entropy: q(&[10, 20, 30, 40, 50, 60, 70, 80, 90]),
            advantages: vec![1.25, -0.5, 2.0, -0.75],
            mask: vec![true, true, true, true, true, true, false, true, true],
        }
    }

    fn input(&self) -> LossInput<'_> {
        LossInput {
            offsets: &self.offsets,
            logp: &self.logp,
            old: &self.old,
            reference: Some(&self.reference),
            behaviour: Some(&self.behaviour),
            entropy: Some(&self.entropy),
            advantages: &self.advantages,
            mask: &self.mask,
        }
    }

    fn normalisers(&self) -> Normalisers {
        Normalisers::single_rank(self.advantages.len(), &self.mask, 16)
    }

    fn run(&self, config: &LossConfig) -> LossOutput {
        loss(&self.input(), config, &self.normalisers()).unwrap()
    }
}

fn close(a: f64, b: f64, tolerance: f64) {
    assert!(
        (a - b).abs() <= tolerance * b.abs().max(1.0),
        "{a} is not {b}"
    );
}

fn plain(loss_type: LossType) -> LossConfig {
    LossConfig {
        loss_type,
        importance_correction: Correction::Off,
        ..LossConfig::default()
    }
}

/// Two sequences with A = 2 and −1 and ratios e^0.5, e^−0.5, 1 | e^0.5: at ε = 0.2 the surrogate is
/// 2·1.2 (clipped), 2·e^−0.5, 2 | −e^0.5.
fn by_hand() -> Batch {
    Batch {
        offsets: vec![0, 3, 4],
        logp: vec![-0.5, -1.5, -1.0, -0.5],
        old: vec![-1.0, -1.0, -1.0, -1.0],
        reference: vec![-1.0, -1.0, -1.0, -1.5],
        behaviour: vec![-1.0, -1.25, -1.0, -3.0],
        entropy: vec![0.0; 4],
        advantages: vec![2.0, -1.0],
        mask: vec![true; 4],
    }
}

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
fn what_was_not_measured_is_not_reported() {
    let batch = by_hand();
    let input = LossInput {
        reference: None,
        behaviour: None,
        entropy: None,
        ..batch.input()
    };
    let out = loss(&input, &LossConfig::default(), &batch.normalisers()).unwrap();
    let names: Vec<&str> = out.stats.metrics().iter().map(|(n, _)| *n).collect();
    assert!(names.contains(&"clip_ratio/low_mean"));
    for absent in ["kl", "entropy", "sampling/kl"] {
        assert!(!names.contains(&absent), "{absent}");
    }
}

#[test]
fn truncated_sequences_are_masked_only_when_asked() {
    let mut config = LossConfig::default();
    let offsets = [0, 2, 5];
    assert_eq!(loss_mask(&offsets, &[false, true], &config), [true; 5]);
    config.mask_truncated_completions = true;
    assert_eq!(
        loss_mask(&offsets, &[false, true], &config),
        [true, true, false, false, false]
    );
}

#[test]
fn a_fully_masked_batch_is_zero() {
    let mut batch = Batch::fixture();
    batch.mask = vec![false; 9];
    for loss_type in ALL {
        let out = batch.run(&plain(loss_type));
        assert_eq!((out.value, out.dlogp), (0.0, vec![0.0; 9]));
        assert!(out.stats.metrics().is_empty());
    }
}

#[test]
fn bad_input_names_the_field_or_token() {
    let batch = Batch::fixture();
    let run = |input: LossInput<'_>, config: &LossConfig| {
        loss(&input, config, &batch.normalisers()).unwrap_err()
    };
    let config = LossConfig {
        beta: 0.1,
        ..LossConfig::default()
    };
    let input = LossInput {
        old: &batch.old[..8],
        ..batch.input()
    };
    assert_eq!(
        run(input, &config),
        LossError::Shape {
            field: "old",
            found: 8,
            expected: 9
        }
    );
    let input = LossInput {
        offsets: &[0, 5, 3, 4, 9],
        ..batch.input()
    };
    assert_eq!(run(input, &config), LossError::Offsets { tokens: 9 });
    let input = LossInput {
        reference: None,
        ..batch.input()
    };
    assert_eq!(
        run(input, &config),
        LossError::MissingReference { beta: 0.1 }
    );
    let mut logp = batch.logp.clone();
    logp[5] = f32::NAN;
    let error = run(
        LossInput {
            logp: &logp,
            ..batch.input()
        },
        &config,
    );
    assert!(
        matches!(error, LossError::NonFinite { sequence: 3, token: 1, value } if value.is_nan()),
        "{error}"
    );
}
