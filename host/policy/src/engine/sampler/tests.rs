//! The sampler against probabilities computed the obvious way in f64, and its draws against those by
//! chi-square.

use super::*;

/// A dozen likely tokens over a noisy floor, as a language model's.
fn logits(count: usize) -> Vec<f32> {
    let noise = |i: u64| (mix(i) % 1000) as f32 / 1000.0 * 4.0 - 3.0;
    let peak = |i: u64| if i < 12 { 5.0 - 0.4 * i as f32 } else { 0.0 };
    (0..count as u64).map(|i| noise(i) + peak(i)).collect()
}

/// The definition, step by step, each on the renormalised survivors of the one before.
fn reference(logits: &[f32], params: &SamplingParams, history: &[u32]) -> Vec<f64> {
    let mut x: Vec<f64> = logits.iter().map(|l| f64::from(*l)).collect();
    let penalty = f64::from(params.repetition_penalty);
    for (token, x) in x.iter_mut().enumerate() {
        if history.contains(&(token as u32)) {
            *x = if *x > 0.0 { *x / penalty } else { *x * penalty };
        }
    }
    let mut p: Vec<f64> = x
        .iter()
        .map(|x| (x / f64::from(params.temperature)).exp())
        .collect();
    normalise(&mut p);
    let mut order: Vec<usize> = (0..p.len()).collect();
    order.sort_by(|a, b| p[*b].total_cmp(&p[*a]).then(a.cmp(b)));
    if params.top_k > 0 {
        for token in order.iter().skip(params.top_k as usize) {
            p[*token] = 0.0;
        }
        normalise(&mut p);
    }
    if params.top_p < 1.0 {
        let mut before = 0.0;
        for token in &order {
            let own = p[*token];
            if before >= f64::from(params.top_p) {
                p[*token] = 0.0;
            }
            before += own;
        }
        normalise(&mut p);
    }
    let floor = f64::from(params.min_p) * p[order[0]];
    p.iter_mut().filter(|p| **p < floor).for_each(|p| *p = 0.0);
    normalise(&mut p);
    p
}

fn normalise(p: &mut [f64]) {
    let total: f64 = p.iter().sum();
    p.iter_mut().for_each(|p| *p /= total);
}

fn cases() -> Vec<(&'static str, SamplingParams)> {
    let base = SamplingParams::default;
    vec![
        ("plain", base()),
        (
            "cold",
            SamplingParams {
                temperature: 0.5,
                ..base()
            },
        ),
        (
            "hot",
            SamplingParams {
                temperature: 1.5,
                ..base()
            },
        ),
        ("top-k", SamplingParams { top_k: 7, ..base() }),
        (
            "top-p",
            SamplingParams {
                top_p: 0.8,
                ..base()
            },
        ),
        (
            "min-p",
            SamplingParams {
                min_p: 0.15,
                ..base()
            },
        ),
        (
            "penalty",
            SamplingParams {
                repetition_penalty: 1.7,
                ..base()
            },
        ),
        (
            "everything",
            SamplingParams {
                temperature: 0.9,
                top_k: 20,
                top_p: 0.9,
                min_p: 0.05,
                repetition_penalty: 1.2,
                ..base()
            },
        ),
    ]
}

/// Natural logarithm of the gamma function at multiples of one half.
fn ln_gamma_half(twice: usize) -> f64 {
    let start = if twice.is_multiple_of(2) { 2 } else { 1 };
    let first = if start == 1 {
        std::f64::consts::PI.sqrt().ln()
    } else {
        0.0
    };
    (start..twice)
        .step_by(2)
        .fold(first, |sum, k| sum + (k as f64 / 2.0).ln())
}

/// P(X² ≥ `statistic`) with `freedom` degrees: 1 − the series of the regularised lower incomplete gamma
/// function (Abramowitz & Stegun 6.5.29).
fn chi_square_p(statistic: f64, freedom: usize) -> f64 {
    let (a, x) = (freedom as f64 / 2.0, statistic / 2.0);
    if x > 2.0 * a + 500.0 {
        // Far below the smallest f64, and the series would overflow.
        return 0.0;
    }
    let (mut term, mut sum, mut n) = (1.0 / a, 1.0 / a, a);
    while term > sum * 1e-16 {
        n += 1.0;
        term *= x / n;
        sum += term;
    }
    1.0 - (a * x.ln() - x - ln_gamma_half(freedom)).exp() * sum
}

/// p-value of 100,000 draws against `exact`; 0 if an impossible token came up. Cells expected fewer than
/// five times are pooled.
pub(in crate::engine) const DRAWS: u64 = 100_000;

pub(in crate::engine) fn p_value(exact: &[f64], mut draw: impl FnMut(u64) -> u32) -> f64 {
    let mut counts = vec![0u32; exact.len()];
    (0..DRAWS).for_each(|i| counts[draw(i) as usize] += 1);
    let (mut statistic, mut cells, mut rare) = (0.0, 0, (0.0, 0.0));
    for (p, count) in exact.iter().zip(counts) {
        let (expected, count) = (p * DRAWS as f64, f64::from(count));
        if *p == 0.0 && count > 0.0 {
            return 0.0;
        } else if expected < 5.0 {
            rare = (rare.0 + expected, rare.1 + count);
        } else {
            statistic += (count - expected).powi(2) / expected;
            cells += 1;
        }
    }
    if rare.0 >= 5.0 {
        statistic += (rare.1 - rare.0).powi(2) / rare.0;
        cells += 1;
    }
    chi_square_p(statistic, cells - 1)
}

#[test]
fn chi_square_matches_tables() {
    // 95 % quantiles.
    for (freedom, quantile) in [(1, 3.841), (2, 5.991), (10, 18.307), (49, 66.339)] {
        let p = chi_square_p(quantile, freedom);
        assert!((p - 0.05).abs() < 1e-4, "{freedom}: {p}");
    }
}

#[test]
fn distribution_equals_the_definition() {
    for count in [3, 50, 2000] {
        let logits = logits(count);
        let history = [1, 2, 2, 40, 9999];
        for (name, params) in cases() {
            let exact = reference(&logits, &params, &history);
            let found = distribution(&logits, &params, &history).unwrap();
            for (token, (exact, found)) in exact.iter().zip(&found).enumerate() {
                let difference = (exact - f64::from(*found)).abs();
                assert!(
                    difference < 1e-6,
                    "{name}, V = {count}, token {token}: {difference}"
                );
                assert_eq!(*exact == 0.0, *found == 0.0, "{name}, token {token}");
            }
        }
    }
}

#[test]
fn draws_follow_the_definition_and_a_broken_sampler_does_not() {
    let logits = logits(700);
    let history = [3, 3, 7, 100, 600, 699];
    let mut scratch = Scratch::default();
    for (case, (name, params)) in cases().iter().enumerate() {
        let exact = reference(&logits, params, &history);
        let policy = SamplingParams {
            temperature: params.temperature,
            ..SamplingParams::default()
        };
        let policy = reference(&logits, &policy, &[]);
        let mut draw = |params: &SamplingParams, i| {
            let args = SampleArgs {
                params,
                stream: stream_key(case as u64, 0),
                position: i,
                history: &history,
                proposal: None,
                top: 0,
                ahead: 0,
            };
            sample(&logits, &args, &mut scratch).unwrap()
        };
        let p = p_value(&exact, |i| {
            let sampled = draw(params, i);
            let token = sampled.token as usize;
            assert!(
                (f64::from(sampled.logprob) - exact[token].ln()).abs() < 1e-5,
                "{name}"
            );
            let off = (f64::from(sampled.policy_logprob) - policy[token].ln()).abs();
            assert!(off < 1e-5, "{name}: policy log-prob off by {off}");
            sampled.token
        });
        assert!(p > 0.001, "{name}: p = {p}");
        // Wrong by 5 % in the temperature.
        let broken = SamplingParams {
            temperature: params.temperature * 1.05,
            ..params.clone()
        };
        let p = p_value(&exact, |i| draw(&broken, i).token);
        assert!(p < 0.001, "{name}: the broken sampler passes with p = {p}");
    }
}

#[test]
fn greedy_takes_the_lowest_of_the_best_with_logprob_at_temperature_one() {
    let mut logits = logits(600);
    logits[77] = 9.0;
    logits[500] = 9.0;
    let params = SamplingParams {
        temperature: 0.0,
        top_p: 0.1,
        ..SamplingParams::default()
    };
    let args = SampleArgs {
        params: &params,
        stream: 1,
        position: 2,
        history: &[],
        proposal: None,
        top: 0,
        ahead: 0,
    };
    let sampled = sample(&logits, &args, &mut Scratch::default()).unwrap();
    let exact = reference(&logits, &SamplingParams::default(), &[])[77].ln();
    assert_eq!(sampled.token, 77);
    assert!((f64::from(sampled.logprob) - exact).abs() < 1e-5);
    assert_eq!(sampled.logprob, sampled.policy_logprob);
    let one_hot = distribution(&logits, &params, &[]).unwrap();
    assert_eq!((one_hot[77], one_hot.iter().sum::<f32>()), (1.0, 1.0));
    // The penalty can dethrone the best token.
    let params = SamplingParams {
        repetition_penalty: 3.0,
        ..params
    };
    let args = SampleArgs {
        params: &params,
        stream: 1,
        position: 2,
        history: &[77],
        proposal: None,
        top: 0,
        ahead: 0,
    };
    let sampled = sample(&logits, &args, &mut Scratch::default()).unwrap();
    assert_eq!(sampled.token, 500);
    assert!(sampled.logprob > sampled.policy_logprob);
}

#[test]
fn non_finite_logits_are_an_error_that_names_the_position() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let logits = [0.0, bad, 1.0];
        let params = SamplingParams::default();
        let args = SampleArgs {
            params: &params,
            stream: 0,
            position: 4,
            history: &[0; 4],
            proposal: None,
            top: 0,
            ahead: 0,
        };
        let error = sample(&logits, &args, &mut Scratch::default()).unwrap_err();
        assert!(
            matches!(error, PolicyError::NonFiniteLogits { position: 4 }),
            "{error}"
        );
        assert!(error.hint().is_some());
    }
}

#[test]
fn streams_and_positions_give_different_numbers_in_the_unit_interval() {
    let mut seen = std::collections::HashSet::new();
    let mut sum = 0.0;
    for stream in 0..100 {
        for position in 0..100 {
            let u = uniform(stream_key(7, stream), position);
            assert!((0.0..1.0).contains(&u));
            assert!(seen.insert(u.to_bits()));
            sum += u;
        }
    }
    // Standard error of the mean is 0.0029.
    assert!((sum / 1e4 - 0.5).abs() < 0.012, "{sum}");
}
