//! The list itself: every case is a test, or waits for a feature that docs/state.md names.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// The heading in docs/state.md under which cases wait, one line `- NN, NN: feature` each.
const WAITING: &str = "Hostile cases that wait for a feature:";

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The cases that are tests: functions `hostile_NN…` right below a `#[test]`.
fn tested(text: &str) -> BTreeSet<u8> {
    let lines: Vec<&str> = text.lines().map(str::trim).collect();
    let tests = lines.windows(2).filter(|pair| pair[0] == "#[test]");
    let number = |pair: &[&str]| pair[1].strip_prefix("fn hostile_")?.get(..2)?.parse().ok();
    tests.filter_map(number).collect()
}

/// The cases that wait, with what they wait for.
fn waiting(text: &str) -> BTreeMap<u8, String> {
    let (_, list) = text.split_once(WAITING).unwrap();
    let lines = list
        .lines()
        .skip(1)
        .map_while(|line| line.strip_prefix("- "));
    let cases = lines.map(|line| line.split_once(": ").unwrap());
    let each = cases.flat_map(|(numbers, feature)| {
        let numbers = numbers.split(", ").map(|n| n.parse().unwrap());
        numbers.map(|n: u8| (n, feature.to_owned()))
    });
    each.collect()
}

#[test]
fn every_case_is_a_test_or_waits_for_a_feature() {
    let mut tests = BTreeSet::new();
    for folder in ["tests/tests/hostile", "host/tests/cli"] {
        for file in std::fs::read_dir(workspace().join(folder)).unwrap() {
            let path = file.unwrap().path();
            tests.extend(tested(&std::fs::read_to_string(path).unwrap()));
        }
    }
    let state = std::fs::read_to_string(workspace().join("docs/state.md")).unwrap();
    let waiting = waiting(&state);
    assert!(
        waiting.values().all(|feature| feature.len() > 3),
        "{waiting:?}"
    );
    let both: Vec<_> = tests.iter().filter(|n| waiting.contains_key(n)).collect();
    assert!(
        both.is_empty(),
        "tests that docs/state.md says wait: {both:?}"
    );
    let all: BTreeSet<u8> = tests.into_iter().chain(waiting.into_keys()).collect();
    assert_eq!(all, (1..=48).collect());
}

#[test]
fn the_list_is_read_as_it_is_written() {
    let text = "#[test]\nfn hostile_07_a() {\n#[test]\n    fn hostile_09() {\nfn hostile_08() {}";
    assert_eq!(tested(text), [7, 9].into());
    let text = format!("a\n{WAITING}\n- 36, 37: http\n- 45: sharing\n\n- 3: not this\n");
    let expected = [(36, "http"), (37, "http"), (45, "sharing")];
    assert_eq!(
        waiting(&text),
        expected.map(|(n, f)| (n, f.to_owned())).into()
    );
}
