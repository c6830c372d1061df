//! Held to scipy (`tests/fixtures/kde.py`), and never NaN.

use super::*;
use crate::density::GRID;
use serde_json::Value;

fn fixture() -> Vec<Value> {
    let text = include_str!("../../../tests/fixtures/kde.json");
    let file: Value = serde_json::from_str(text).unwrap();
    file["cases"].as_array().unwrap().clone()
}

fn numbers(value: &Value) -> Vec<f64> {
    let values = value.as_array().unwrap();
    values.iter().map(|v| v.as_f64().unwrap()).collect()
}

fn units(rewards: &[f64]) -> Vec<f64> {
    let mut sorted = rewards.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    let scale = Scale::of(&sorted).unwrap();
    rewards.iter().map(|r| scale.to_unit(*r)).collect()
}

#[test]
fn bandwidth_density_and_valleys_are_scipys() {
    let cases = fixture();
    assert_eq!(cases.len(), 8);
    for case in cases {
        let name = &case["name"];
        let points = units(&numbers(&case["rewards"]));
        let bandwidth = scott_bandwidth(&points).unwrap();
        let expected = case["bandwidth"].as_f64().unwrap();
        assert!((bandwidth - expected).abs() < 1e-9, "{name}: {bandwidth}");
        let density = density(&points, bandwidth);
        let expected = numbers(&case["density"]);
        assert_eq!(expected.len(), GRID / 16);
        for (found, expected) in density.iter().step_by(16).zip(&expected) {
            assert!(
                (found - expected).abs() < 1e-9,
                "{name}: {found} {expected}"
            );
        }
        let valleys: Vec<Value> = valleys(&density).into_iter().map(Value::from).collect();
        assert_eq!(&Value::from(valleys), &case["valleys"], "{name}");
    }
}

#[test]
fn boundaries_are_the_deepest_valleys_on_the_rewards_scale() {
    for case in fixture() {
        let name = &case["name"];
        let n_buckets = u32::try_from(case["n_buckets"].as_u64().unwrap()).unwrap();
        let config = Config {
            n_buckets,
            ..Config::default()
        };
        let rewards = numbers(&case["rewards"]);
        let found = profile(rewards.clone(), &config, 8);
        let expected = numbers(&case["boundaries"]);
        assert_eq!(found.buckets.len(), expected.len() + 1, "{name}");
        for (i, expected) in expected.iter().enumerate() {
            let tolerance = 1e-9 * expected.abs().max(1.0);
            let (below, above) = (found.buckets[i], found.buckets[i + 1]);
            assert!((above.lo - expected).abs() < tolerance, "{name}: {above:?}");
            assert_eq!(below.hi, above.lo, "{name}");
            assert!(below.max < above.lo && above.lo <= above.min, "{name}");
        }
        assert_eq!(found.seen(), rewards.len() as u64, "{name}");
    }
}

#[test]
fn a_bucket_is_described_by_its_rows() {
    let found = profile(vec![1.0, 0.0, 0.1, 0.9, 0.2], &Config::default(), 8);
    let [hard, easy] = found.buckets.as_slice() else {
        panic!("{found:?}")
    };
    assert_eq!((hard.n, hard.min, hard.max), (3, 0.0, 0.2));
    assert_eq!((easy.n, easy.min, easy.max), (2, 0.9, 1.0));
    // round(4·(1 + 1.5·0.9)) and round(4·(1 + 1.5·0.05))
    assert_eq!((hard.rollouts, easy.rollouts), (9, 4));
    assert!((hard.mean - 0.1).abs() < 1e-12 && (easy.mean - 0.95).abs() < 1e-12);
    assert!(
        (hard.std - (0.02_f64 / 3.0).sqrt()).abs() < 1e-12,
        "{hard:?}"
    );
    assert!((found.balance().unwrap() - 0.8).abs() < 1e-12);
    // The mean is 0.44; squares 0.3136 + 0.1936 + 0.1156 + 0.2116 + 0.0576 = 0.892.
    assert!((found.spread.unwrap() - (0.892_f64 / 5.0).sqrt()).abs() < 1e-12);
    let of = |reward| found.rollouts(reward);
    assert_eq!(
        (of(Some(0.2)), of(Some(hard.hi)), of(Some(-9.0))),
        (Some(9), Some(4), Some(9))
    );
    assert_eq!(of(None), None);
}

#[test]
fn rollouts_go_from_base_to_two_and_a_half_times_base() {
    let config = Config::default();
    assert_eq!((config.rollouts(1.0, 8), config.rollouts(0.0, 8)), (4, 10));
    let of_budget = Config::parse(r#"{"base": null, "alpha": 0.5}"#).unwrap();
    assert_eq!(
        (of_budget.rollouts(1.0, 8), of_budget.rollouts(0.0, 8)),
        (8, 12)
    );
}

#[test]
fn without_a_difference_there_is_one_bucket_of_the_budgets_size() {
    let nothing = profile(Vec::new(), &Config::default(), 8);
    assert_eq!(nothing, Profile::default());
    assert_eq!((nothing.balance(), nothing.seen()), (None, 0));
    for rewards in [vec![0.5], vec![-3.0; 7], vec![0.0, -0.0]] {
        let found = profile(rewards.clone(), &Config::default(), 8);
        let [only] = found.buckets.as_slice() else {
            panic!("{found:?}")
        };
        assert_eq!(
            (only.n, only.rollouts, found.spread),
            (rewards.len() as u64, 8, None)
        );
    }
}

#[test]
fn configs_are_strict() {
    let refuse = |json| Config::parse(json).unwrap_err();
    assert!(refuse(r#"{"bases": 4}"#).contains("unknown field `bases`"));
    assert_eq!(refuse(r#"{"base": 0}"#), "base is not from 1 to 1024");
    assert_eq!(refuse(r#"{"alpha": -1}"#), "alpha is -1, not from 0 to 100");
    assert_eq!(
        refuse(r#"{"n_buckets": 7}"#),
        "n_buckets is 7, not from 1 to 6"
    );
    assert_eq!(
        refuse(r#"{"decay": 1}"#),
        "decay is 1, not from 0 to below 1"
    );
    assert_eq!(Config::parse("{}"), Ok(Config::default()));
}

/// xorshift64*; a test needs no better.
fn draw(state: &mut u64) -> u64 {
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    state.wrapping_mul(0x2545_F491_4F6C_DD1D)
}

/// A finite number of any size: all bit patterns but those of infinities and NaN.
fn any_finite(state: &mut u64) -> f64 {
    loop {
        let value = f64::from_bits(draw(state));
        if value.is_finite() {
            return value;
        }
    }
}

#[test]
fn never_nan_whatever_the_rewards() {
    let mut state = 42;
    for round in 0..3000 {
        let n = (draw(&mut state) % 40 + 1) as usize;
        let (a, b) = (any_finite(&mut state), any_finite(&mut state));
        let rewards: Vec<f64> = (0..n)
            .map(|_| match round % 6 {
                0 => any_finite(&mut state),
                1 => a,
                2 => [a, b][(draw(&mut state) % 2) as usize],
                3 => [f64::MAX, f64::MIN, 0.0][(draw(&mut state) % 3) as usize],
                4 => f64::from_bits((a.to_bits() & !7) | (draw(&mut state) % 8)),
                _ => f64::from_bits(draw(&mut state) % 4),
            })
            .collect();
        let config = Config {
            n_buckets: round % MAX_BUCKETS + 1,
            ..Config::default()
        };
        let found = profile(rewards.clone(), &config, 8);
        assert_eq!(found.seen(), n as u64, "{rewards:?}");
        assert!(found.buckets.len() <= config.n_buckets as usize);
        for bucket in &found.buckets {
            let b = *bucket;
            let values = [b.lo, b.hi, b.mean, b.std, b.min, b.max, found.share(bucket)];
            assert!(values.iter().all(|v| v.is_finite()), "{b:?} {rewards:?}");
            assert!((4..=10).contains(&b.rollouts), "{b:?} {rewards:?}");
        }
        assert!(
            found
                .spread
                .is_none_or(|s| (0.0..=0.5 + 1e-12).contains(&s)),
            "{rewards:?}"
        );
        assert!(rewards.iter().all(|r| found.rollouts(Some(*r)).is_some()));
    }
}
