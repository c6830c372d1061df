//! The shipped rewards that ask a judge, as components, against an endpoint with a script.

use std::{path::Path, sync::Arc};

use grpo_host::{
    defaults,
    plugin::{Access, Grants, Limits, LogLine, Manifest, Plugin, PluginHost, RewardPlugin},
    types::{Finish, Parsed, Sample, Score, Telemetry},
};
use serde_json::{Value, json};

use super::{Fault, Server, config, panel};

const ROW: &str =
    r#"{"query": "Why?", "sources": ["old one", "old two"], "target": 1, "points": ["a", "b"]}"#;

fn load(name: &str, settings: &Value, server: &Server, cache: &Path) -> RewardPlugin {
    let judge = grpo_host::config::JudgeConfig {
        max_retries: 0,
        ..config(server)
    };
    let access = Access {
        grants: Grants {
            judge: Some("good".to_owned()),
            ..Grants::default()
        },
        judge: panel(judge, cache).unwrap().get("good").cloned(),
        ..Access::default()
    };
    let host = PluginHost::new(Arc::new(|_: LogLine<'_>| {})).unwrap();
    let bytes = defaults::component(name).unwrap();
    let prepared = host.prepare_with(name, bytes, &Limits::default(), access);
    match prepared.unwrap().configure(settings, None).unwrap() {
        Plugin::Reward(plugin) => plugin,
        other => panic!("{:?}", other.id()),
    }
}

fn scores(reward: &RewardPlugin, completions: &[&str]) -> Vec<Score> {
    let parsed = Parsed::default();
    let sample = |completion| Sample {
        row_id: 0,
        row_json: ROW,
        prompt: "Rewrite old two.",
        completion,
        parsed: &parsed,
        finish: Finish::Stop,
        telemetry: Telemetry::default(),
    };
    let samples: Vec<Sample<'_>> = completions.iter().copied().map(sample).collect();
    reward.score(&samples).unwrap().scores
}

/// Total and parts of a score.
fn value(score: &Score) -> (f64, Vec<(&str, f64)>) {
    let Score::Value(scored) = score else {
        panic!("{score:?}")
    };
    let parts = scored.parts.iter();
    let parts = parts.map(|(name, value)| (name.as_str(), *value));
    (scored.total, parts.collect())
}

fn skipped(score: &Score) -> &str {
    match score {
        Score::Skip(why) => why,
        Score::Value(scored) => panic!("{scored:?}"),
    }
}

#[test]
fn a_rubric_becomes_a_reward() {
    let (server, cache) = (Server::start(), tempfile::tempdir().unwrap());
    server.say(|asked| match asked.strip_prefix("Q: Why? A: ") {
        Some("good") => "<think>10?</think>It is an 8.",
        Some("bad") => "2/10",
        Some("odd") => "I would rather not say.",
        _ => "0, the question is not the rubric's",
    });
    let rubric = json!({ "rubric": "Q: {query} A: {completion}" });
    let reward = load("reward-judge", &rubric, &server, cache.path());
    let scored = scores(&reward, &["<think>hm</think>good", "bad", "odd"]);
    assert_eq!(value(&scored[0]), (0.8, vec![("judge", 8.0)]));
    assert_eq!(value(&scored[1]), (0.2, vec![("judge", 2.0)]));
    assert!(skipped(&scored[2]).contains("no number"), "{scored:?}");

    let strict =
        json!({ "rubric": "Q: {query} A: {completion}", "scale": false, "unreadable": -1.0 });
    let strict = load("reward-judge", &strict, &server, cache.path());
    server.fail_always(Some(Fault::Reset));
    // The cache has these three.
    let scored = scores(&strict, &["good", "odd", "unheard of"]);
    assert_eq!(value(&scored[0]).0, 8.0);
    assert_eq!(value(&scored[1]), (-1.0, vec![]));
    assert!(skipped(&scored[2]).contains("did not answer"), "{scored:?}");
}

/// Sentences of two words each: `[1]` then `[2]` before, `[2]` twice after.
fn engine(asked: &str) -> &'static str {
    let points = asked.starts_with("For each key point");
    match (
        points,
        asked.contains("new two"),
        asked.contains("hush"),
        asked.contains("old two"),
    ) {
        (true, true, ..) => "1. supported\n2. contradicted",
        (true, ..) => "no idea",
        (_, true, ..) => "<think>[1]</think>First that [2]. Then that [2].",
        (_, _, true, _) => "Nothing to cite.",
        (.., true) => "First this [1]. Then that [2].",
        _ => "",
    }
}

#[test]
fn a_rewritten_source_earns_what_it_is_cited_more() {
    let (server, cache) = (Server::start(), tempfile::tempdir().unwrap());
    server.say(engine);
    let reward = load("reward-geo", &json!({}), &server, cache.path());
    let scored = scores(&reward, &["<think>x</think>new two", "hush", "old two"]);
    let late = (-0.5_f64).exp() / (1.0 + (-0.5_f64).exp());
    let (total, parts) = value(&scored[0]);
    let (seen, unseen) = (0.8 * (1.0 - late) + 0.1, -(0.8 * late + 0.1));
    assert!((total - seen).abs() < 1e-12, "{total}, not {seen}");
    let names: Vec<&str> = parts.iter().map(|(name, _)| *name).collect();
    assert_eq!(names, ["adjusted", "position", "word"]);
    // Whoever makes the engine cite nobody loses what the original had.
    assert!((value(&scored[1]).0 - unseen).abs() < 1e-12, "{scored:?}");
    assert_eq!(value(&scored[2]).0, 0.0);
    // The original and its copy are one question.
    assert_eq!(server.requests().len(), 3);

    let pointed = json!({ "keypoints": "points", "support": 0.5, "contradiction": 1.0 });
    let pointed = load("reward-geo", &pointed, &server, cache.path());
    let scored = scores(&pointed, &["new two", "hush"]);
    let (total, parts) = value(&scored[0]);
    assert!((total - (seen + 0.25 - 0.5)).abs() < 1e-12, "{total}");
    assert_eq!(parts[3..], [("support", 0.5), ("contradiction", 0.5)]);
    // What cannot be read is contradicted.
    let (total, _) = value(&scored[1]);
    assert!((total - (unseen - 1.0)).abs() < 1e-12, "{total}");
}

#[test]
fn a_judge_that_is_gone_skips_samples() {
    let (server, cache) = (Server::start(), tempfile::tempdir().unwrap());
    server.fail_always(Some(Fault::Reset));
    let reward = load("reward-geo", &json!({}), &server, cache.path());
    for score in scores(&reward, &["a", "b"]) {
        assert!(skipped(&score).contains("did not answer"), "{score:?}");
    }
}

#[test]
fn shipped_components_ask_for_what_they_import() {
    let host = PluginHost::new(Arc::new(|_: LogLine<'_>| {})).unwrap();
    let asks = |name| {
        let bytes = defaults::shipped(name).unwrap().unwrap();
        let judge = Manifest::of(&bytes).unwrap().and_then(|m| m.asks.judge);
        let imports = host.describe(name, &bytes).unwrap().imports;
        assert_eq!(
            judge.is_some(),
            imports.iter().any(|name| name.contains("/judge@")),
            "{name} imports {imports:?}"
        );
        judge.is_some()
    };
    let asking: Vec<&str> = defaults::names().filter(|name| asks(name)).collect();
    assert_eq!(asking, ["reward-judge", "reward-geo"]);
}
