//! The reference reward in several languages: the components in `plugins/dist` give the same bits for one corpus.
//!
//! `cargo xtask languages` builds them anew, and Python's as well, which is too large to be committed.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "clippy counts only functions marked as tests as tests"
)]

use grpo_host::cases::{self, Case, Expected, Outcome};
use grpo_host::plugin::{Limits, PluginHost};
use std::path::{Path, PathBuf};
use std::sync::Arc;

const COMPONENTS: [&str; 4] = [
    "last-number-rust.wasm",
    "last-number-c.wasm",
    "last-number-zig.wasm",
    "last-number-js.wasm.zst",
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn component(file: &str) -> Vec<u8> {
    let bytes = std::fs::read(root().join("plugins/dist").join(file)).unwrap();
    match file.ends_with(".zst") {
        true => zstd::decode_all(bytes.as_slice()).unwrap(),
        false => bytes,
    }
}

fn corpus() -> Vec<Case> {
    let files = [
        "host/templates/cases.jsonl",
        "tests/fixtures/last_number.jsonl",
    ];
    let cases = files.map(|file| cases::read(&root().join(file)).unwrap());
    assert_eq!(cases.each_ref().map(Vec::len), [28, 400]);
    cases.concat()
}

fn outcomes(component: &[u8], corpus: &[Case]) -> Vec<Outcome> {
    let host = PluginHost::new(Arc::new(|line| panic!("it logs: {line:?}"))).unwrap();
    let limits = cases::strict(&Limits::default());
    let prepared = host.prepare("last-number", component, &limits).unwrap();
    cases::run(&prepared, corpus).unwrap()
}

fn assert_agrees(file: &str) {
    let outcomes = outcomes(&component(file), &corpus());
    assert_eq!(outcomes.len(), 428);
    let wrong: Vec<_> = outcomes
        .iter()
        .filter(|outcome| !outcome.differences.is_empty())
        .collect();
    assert!(wrong.is_empty(), "{file}: {wrong:#?}");
}

#[test]
fn rust_gives_the_rewards_of_the_corpus() {
    assert_agrees(COMPONENTS[0]);
}

#[test]
fn c_gives_the_rewards_of_the_corpus() {
    assert_agrees(COMPONENTS[1]);
}

#[test]
fn zig_gives_the_rewards_of_the_corpus() {
    assert_agrees(COMPONENTS[2]);
}

#[test]
fn javascript_gives_the_rewards_of_the_corpus() {
    assert_agrees(COMPONENTS[3]);
}

/// A corpus of rewards that any rounding gives would prove nothing.
#[test]
fn the_corpus_has_rewards_of_every_kind() {
    let corpus = corpus();
    let count = |kind: fn(&Expected) -> bool| corpus.iter().filter(|c| kind(&c.expect)).count();
    let odd = |expected: &Expected| match expected {
        Expected::Reward { total, .. } => (total * 1024.0).fract() != 0.0,
        Expected::Skip { .. } | Expected::Error { .. } => false,
    };
    assert!(count(odd) > 100, "{}", count(odd));
    assert!(count(|e| matches!(e, Expected::Skip { .. })) > 20);
    assert!(count(|e| matches!(e, Expected::Error { .. })) == 4);
}

/// One bit of one expectation, and the case fails.
#[test]
fn another_last_bit_is_a_difference() {
    let mut corpus = corpus();
    let Expected::Reward { total, parts } = &mut corpus[12].expect else {
        panic!("{:?}", corpus[12]);
    };
    *total = f64::from_bits(total.to_bits() + 1);
    let error = parts.as_mut().unwrap().get_mut("error").unwrap();
    *error = f64::from_bits(error.to_bits() - 1);
    let outcomes = outcomes(&component(COMPONENTS[1]), &corpus);
    let wrong: Vec<_> = outcomes
        .iter()
        .filter(|outcome| !outcome.differences.is_empty())
        .map(|outcome| (outcome.line, outcome.differences.len()))
        .collect();
    assert_eq!(wrong, [(13, 2)]);
}
