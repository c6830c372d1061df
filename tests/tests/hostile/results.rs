//! Guests whose results are well formed and wrong: lengths, numbers, names.

use super::{assert_serves, fault_of_score, guest, host, limits, load, samples, totals, turn};
use grpo_host::{
    grpo::advantage::{ScaleRewards, advantages},
    plugin::{Fault, RewardSet, Weighted},
    types::Score,
};

#[test]
fn hostile_25_wrong_length() {
    let _turn = turn();
    // Scores as many samples as there are, plus a difference; 0 is minus one for one sample.
    for (change, found) in [(-1, 0), (1, 2)] {
        let body = format!("(call $ones (i32.add (local.get $n) (i32.const {change})))");
        let expected = 1;
        assert_eq!(
            fault_of_score(&guest::scoring(&body)),
            Fault::Length { expected, found }
        );
    }
    // In a batch whose samples fail alone as well, each is named.
    let host = host();
    let plugin = load(
        &host,
        &guest::scoring("(call $ones (i32.const 2))"),
        &limits(),
    )
    .unwrap();
    let scoring = plugin.score(&samples(&["a", "b", "c"])).unwrap();
    assert_eq!(totals(&scoring.scores), [None; 3]);
    let rows: Vec<_> = scoring.faults.iter().map(|fault| fault.row).collect();
    assert_eq!(rows, [Some(100), Some(101), Some(102)]);
}

#[test]
fn hostile_26_numbers_that_are_none() {
    let _turn = turn();
    for (text, check) in [
        ("nan", f64::is_nan as fn(f64) -> bool),
        ("inf", |v| v == f64::INFINITY),
        ("-inf", |v| v == f64::NEG_INFINITY),
        ("1e308", |v| v == 1e308),
    ] {
        let body = format!("(f64.store offset=8 (i32.const 4096) (f64.const {text}))");
        let fault = fault_of_score(&guest::scoring_after_ones(&body));
        let Fault::Number { what, value, .. } = fault else {
            panic!("{fault}")
        };
        assert!(what == "total" && check(value), "{text}: {what} {value}");
    }
    // One part `x`, at 2048, with NaN as its value.
    let body = "(i32.store8 (i32.const 2040) (i32.const 120))
        (i32.store offset=0 (i32.const 2048) (i32.const 2040))
        (i32.store offset=4 (i32.const 2048) (i32.const 1))
        (f64.store offset=8 (i32.const 2048) (f64.const nan))
        (i32.store offset=16 (i32.const 4096) (i32.const 2048))
        (i32.store offset=20 (i32.const 4096) (i32.const 1))";
    let fault = fault_of_score(&guest::scoring_after_ones(body));
    assert!(
        matches!(&fault, Fault::Number { what, .. } if what == "part `x`"),
        "{fault}"
    );
    // Policy: such a sample is skipped and counted. What is merely odd is a number, to the bit.
    let reward = |value: &str| {
        let body = format!("(f64.store offset=8 (i32.const 4096) (f64.const {value}))");
        let reward = load(&host(), &guest::scoring_after_ones(&body), &limits()).unwrap();
        let weighted = Weighted {
            reward,
            weight: 1.0,
        };
        RewardSet::new(vec![weighted]).unwrap()
    };
    let scoring = reward("nan").score(&samples(&["a"])).unwrap();
    assert_eq!(
        (totals(&scoring.scores), scoring.skipped),
        (vec![None], vec![1])
    );
    for (text, odd) in [
        ("-0", -0.0_f64),
        ("0x1p-1074", f64::from_bits(1)),
        ("-1e9", -1e9),
    ] {
        let scoring = reward(text).score(&samples(&["a"])).unwrap();
        let Score::Value(scored) = &scoring.scores[0] else {
            panic!("{scoring:?}")
        };
        // The set's sum begins at +0, so -0 is looked for in the reward's own number.
        assert_eq!(scored.parts[0].1.to_bits(), odd.to_bits(), "{text}");
    }
}

/// One part for each verdict, with a name of 8 bytes and the value 1; `body` may change the name at 3100.
fn with_part(body: &str) -> Vec<u8> {
    guest::scoring_after_ones(&format!(
        "(i64.store (i32.const 3100) (i64.const 0x4040404040404040))
         (i32.store (i32.const 3000) (i32.const 3100)) (i32.store (i32.const 3004) (i32.const 8))
         (f64.store (i32.const 3008) (f64.const 1))
         (i32.store offset=16 (i32.const 4096) (i32.const 3000))
         (i32.store offset=20 (i32.const 4096) (i32.const 1)) {body}"
    ))
}

/// The length of the completion, up to 65 535, is in the name: a new series for each.
#[test]
fn hostile_19_parts_with_new_names_at_each_call() {
    let _turn = turn();
    // The completion's length stands at byte 8 of a sample; a nibble to a byte.
    let nibbles = (0..4).map(|n| {
        format!(
            "(i32.store8 (i32.const {}) (i32.or (i32.const 64) (i32.and (i32.const 15)
              (i32.shr_u (i32.load offset=8 (local.get $samples)) (i32.const {})))))",
            3100 + n,
            4 * n
        )
    });
    let bytes = with_part(&nibbles.collect::<String>());
    let host = host();
    let plugin = load(&host, &bytes, &limits()).unwrap();
    let text = "x".repeat(300);
    let names: Vec<_> = (1..=300)
        .map(|n| plugin.score(&samples(&[&text[..n]])).unwrap())
        .collect();
    assert!(names[..256].iter().all(|scoring| scoring.faults.is_empty()));
    let what = "different names of parts or metrics in all";
    let (found, limit) = (257, 256);
    for scoring in &names[256..259] {
        assert_eq!(scoring.faults[0].fault, Fault::Size { what, found, limit });
        assert_eq!(totals(&scoring.scores), [None]);
    }
    // Known names are still welcome (once the breaker lets the plugin speak).
    let mut again = (0..100).map(|_| plugin.score(&samples(&["x"])).unwrap());
    assert!(again.any(|scoring| totals(&scoring.scores) == [Some(1.0)]));
    assert_serves(&host);
}

#[test]
fn hostile_27_names_twice_and_rewards_that_are_all_the_same() {
    let _turn = turn();
    // Verdicts have places and no ids, so none can be missing or twice; parts have names.
    let twice = "(i64.store (i32.const 3016) (i64.load (i32.const 3000)))
        (f64.store (i32.const 3024) (f64.const 2)) (i32.store offset=20 (i32.const 4096) (i32.const 2))";
    let what = "two parts named `@@@@@@@@`".to_owned();
    assert_eq!(fault_of_score(&with_part(twice)), Fault::BadResult { what });
    // 65 parts are too many, whatever they are called.
    let many = "(i32.store offset=16 (i32.const 4096) (i32.const 8192))
        (i32.store offset=20 (i32.const 4096) (i32.const 65))";
    let (what, found, limit) = ("named numbers", 65, 64);
    assert_eq!(
        fault_of_score(&with_part(many)),
        Fault::Size { what, found, limit }
    );
    // Equal rewards teach nothing, and the metric says so.
    let host = host();
    let plugin = load(&host, &guest::scoring_after_ones(""), &limits()).unwrap();
    let scoring = plugin.score(&samples(&["a", "b", "c", "d"])).unwrap();
    let found = advantages(&[totals(&scoring.scores)], ScaleRewards::Group);
    assert_eq!(found.values, [[0.0; 4]]);
    assert_eq!(found.stats.frac_reward_zero_std, Some(1.0));
    assert_serves(&host);
}
