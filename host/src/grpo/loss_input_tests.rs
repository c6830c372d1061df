//! Masks, missing input, broken input, configurations without a meaning.

use super::{fixture::*, *};
use crate::grpo::config::{LossConfig, LossType};

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
    // Sequence 3 starts at token 4.
    let mut behaviour = batch.behaviour.clone();
    behaviour[5] = f32::NEG_INFINITY;
    let input = LossInput {
        behaviour: Some(&behaviour),
        ..batch.input()
    };
    let (field, value) = ("behaviour", f64::NEG_INFINITY);
    assert_eq!(
        run(input, &config),
        LossError::Input {
            field,
            sequence: 3,
            token: 1,
            value
        }
    );
}

#[test]
fn not_a_number_never_passes_through_a_clip() {
    for loss_type in ALL {
        let config = LossConfig {
            loss_type,
            ..LossConfig::default()
        };
        for field in ["logp", "old", "reference", "behaviour"] {
            let mut batch = Batch::fixture();
            let values = match field {
                "logp" => &mut batch.logp,
                "old" => &mut batch.old,
                "reference" => &mut batch.reference,
                _ => &mut batch.behaviour,
            };
            // A masked token may be anything; token 6 is masked.
            values[6] = f32::NAN;
            batch.run(&config);
            let mut broken = batch.clone();
            match field {
                "logp" => broken.logp[8] = f32::NAN,
                "old" => broken.old[8] = f32::NAN,
                "reference" => broken.reference[8] = f32::NAN,
                _ => broken.behaviour[8] = f32::NAN,
            }
            let error = loss(&broken.input(), &config, &broken.normalisers()).unwrap_err();
            assert!(
                matches!(error, LossError::Input { field: f, sequence: 3, token: 4, .. } if f == field),
                "{error}"
            );
        }
    }
}

#[test]
fn an_exploding_ratio_is_an_error_and_not_an_update() {
    let mut batch = Batch::fixture();
    // exp(200) is finite in f64 and infinite in f32; A < 0 leaves it unclipped.
    batch.old[3] = batch.logp[3] - 200.0;
    let error = loss(&batch.input(), &plain(LossType::Dapo), &batch.normalisers()).unwrap_err();
    assert!(
        matches!(error, LossError::NonFinite { sequence: 1, token: 0, value } if value > 1e80),
        "{error}"
    );
    assert!(error.hint().unwrap().contains("delta"));
}

#[test]
fn configurations_without_a_meaning_are_refused() {
    let field = |config: LossConfig| match config.validate() {
        Err(LossError::Config { field, .. }) => field,
        other => panic!("{other:?}"),
    };
    let base = LossConfig::default;
    assert_eq!(base().validate(), Ok(()));
    assert_eq!(
        field(LossConfig {
            epsilon: 1.5,
            ..base()
        }),
        "epsilon"
    );
    assert_eq!(
        field(LossConfig {
            epsilon_high: Some(f64::NAN),
            ..base()
        }),
        "epsilon_high"
    );
    assert_eq!(
        field(LossConfig {
            delta: Some(1.1),
            ..base()
        }),
        "delta"
    );
    assert_eq!(
        field(LossConfig {
            beta: -0.1,
            ..base()
        }),
        "beta"
    );
    assert_eq!(
        field(LossConfig {
            importance_c_max: 0.0,
            ..base()
        }),
        "importance_c_max"
    );
}
