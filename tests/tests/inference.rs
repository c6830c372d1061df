//! Inference cost as a reward through the real host: beside a task reward, and composed around one.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "clippy counts only functions marked as tests as tests"
)]

use grpo_host::defaults;
use grpo_host::plugin::{
    Call, Fault, GuestErrorKind, Limits, LogLevel, Plugin, PluginError, PluginHost, RewardPlugin,
    RewardSet, Weighted,
};
use grpo_host::types::{Finish, Parsed, Role, Sample, Score, Scored, Telemetry};
use serde_json::{Value, json};
use std::sync::{Arc, Mutex};

const WRAPPER: &[u8] = include_bytes!("../../plugins/dist/inference-wrapper.wasm");

/// What plugins said, as level and text.
type Lines = Arc<Mutex<Vec<(LogLevel, String)>>>;

fn host() -> (PluginHost, Lines) {
    let lines = Lines::default();
    let sink = Arc::clone(&lines);
    let host = PluginHost::new(Arc::new(move |line| {
        sink.lock()
            .unwrap()
            .push((line.level, line.text.to_owned()));
    }));
    (host.unwrap(), lines)
}

fn load(host: &PluginHost, bytes: &[u8], config: &Value) -> Result<RewardPlugin, PluginError> {
    match host.load("r", bytes, config, &Limits::default())? {
        Plugin::Reward(plugin) => Ok(plugin),
        other => panic!("{:?}", other.id()),
    }
}

fn shipped(host: &PluginHost, name: &str, config: Value) -> RewardPlugin {
    load(host, defaults::component(name).unwrap(), &config).unwrap()
}

const NOT_PARSED: Parsed = Parsed {
    reasoning: None,
    answer: None,
};
const RIGHT: (&str, &str) = (r#"{"answer": "4"}"#, "4");
const WRONG: (&str, &str) = (r#"{"answer": "4"}"#, "5");
const NO_NUMBER: (&str, &str) = (r#"{"answer": "four"}"#, "4");

/// -0.25 - 0.02 - 0.025 + 0.5 (if drafted) + 0.375 with the default weights.
const USAGE: Telemetry = Telemetry {
    latency_ms: 250.0,
    queue_ms: 0.0,
    prefill_ms: 0.0,
    decode_ms: 0.0,
    prompt_tokens: 40,
    cached_prompt_tokens: 30,
    generated_tokens: 20,
    draft_tokens: 8,
    accepted_tokens: 4,
    kv_bytes: 2_500_000,
};
const UNDRAFTED: Telemetry = Telemetry {
    draft_tokens: 0,
    accepted_tokens: 0,
    ..USAGE
};

fn sample<'a>((row_json, completion): (&'a str, &'a str), telemetry: Telemetry) -> Sample<'a> {
    Sample {
        row_id: 7,
        row_json,
        prompt: "p",
        completion,
        parsed: &NOT_PARSED,
        finish: Finish::Stop,
        telemetry,
    }
}

fn scored(plugin: &RewardPlugin, samples: &[Sample<'_>]) -> Vec<Scored> {
    let scoring = plugin.score(samples).unwrap();
    assert_eq!(scoring.faults, []);
    let value = |score| match score {
        Score::Value(scored) => scored,
        Score::Skip(reason) => panic!("{reason}"),
    };
    scoring.scores.into_iter().map(value).collect()
}

fn close(found: f64, expected: f64) {
    assert!((found - expected).abs() < 1e-12, "{found} {expected}");
}

fn names(scored: &Scored) -> Vec<&str> {
    scored.parts.iter().map(|(name, _)| name.as_str()).collect()
}

/// Of two groups in one call: only the first has a rate, which is the mean that its other samples count with.
#[test]
fn an_undefined_acceptance_counts_as_its_groups_mean_with_one_warning() {
    let (host, lines) = host();
    let plugin = shipped(&host, "reward-inference", json!({}));
    let quarter = Telemetry {
        accepted_tokens: 2,
        ..USAGE
    };
    let mut samples = [USAGE, UNDRAFTED, quarter, UNDRAFTED].map(|t| sample(RIGHT, t));
    samples[3].prompt = "q";
    let found = scored(&plugin, &samples);
    close(found[0].total, 0.58);
    close(found[1].total, 0.08 + 0.375);
    close(found[2].total, 0.33);
    close(found[3].total, 0.08);
    let part = |name: &str, value| (name.to_owned(), value);
    let parts = [
        part("latency_ms", 250.0),
        part("generated_tokens", 20.0),
        part("kv_mb", 2.5),
        part("accept_rate", 0.5),
        part("cache_reuse", 0.75),
    ];
    assert_eq!(found[0].parts, parts);
    assert!(!names(&found[1]).contains(&"accept_rate"));
    let text = "accept_rate is undefined for some samples, no token was drafted: the mean of their group stands in";
    let warning = (LogLevel::Warn, text.to_owned());
    assert_eq!(*lines.lock().unwrap(), [warning]);
    // Nothing drafted, nothing asked: no warning.
    lines.lock().unwrap().clear();
    let off = json!({"accept_weight": 0, "token_weight": 0.5, "latency_weight": 0});
    let off = shipped(&host, "reward-inference", off);
    let empty = Telemetry {
        prompt_tokens: 0,
        cached_prompt_tokens: 0,
        ..UNDRAFTED
    };
    let found = scored(&off, &[sample(RIGHT, UNDRAFTED), sample(RIGHT, empty)]);
    close(found[0].total, -10.0 - 0.025 + 0.375);
    assert_eq!(names(&found[1]), ["generated_tokens", "kv_mb"]);
    let text = "cache_reuse is undefined for some samples, the prompt has no tokens: the mean of their group stands in";
    assert_eq!(*lines.lock().unwrap(), [(LogLevel::Warn, text.to_owned())]);
}

/// A group of which nothing is defined is all alike and reports no rate.
#[test]
fn a_group_without_any_term_is_neutral() {
    let (host, _) = host();
    let only = json!({"latency_weight": 0, "token_weight": 0, "kv_weight": 0, "reuse_weight": 0});
    let plugin = shipped(&host, "reward-inference", only.clone());
    let mut samples = [UNDRAFTED, UNDRAFTED, USAGE].map(|t| sample(RIGHT, t));
    samples[2].prompt = "q";
    let scoring = plugin.score(&samples).unwrap();
    let [
        Score::Value(first),
        Score::Value(second),
        Score::Value(other),
    ] = scoring.scores.as_slice()
    else {
        panic!("{scoring:?}")
    };
    assert_eq!((first.total, second.total), (0.0, 0.0));
    assert!(first.parts.is_empty() && second.parts.is_empty());
    close(other.total, 0.5);
    // Around a task reward the task is what remains.
    let around = json!({"inference": only});
    let bytes = defaults::component("reward-math-inference").unwrap();
    let plugin = load(&host, bytes, &around).unwrap();
    let found = scored(&plugin, &samples[..2]);
    close(found[0].total, 1.0);
    assert_eq!(names(&found[0]), ["task", "strict", "flexible"]);
}

#[test]
fn beside_a_task_reward_the_terms_are_weighted_by_the_host() {
    let (host, _) = host();
    let weighted = |name: &str, weight| Weighted {
        reward: match host
            .load(
                name,
                defaults::component(name).unwrap(),
                &json!({}),
                &Limits::default(),
            )
            .unwrap()
        {
            Plugin::Reward(reward) => reward,
            other => panic!("{:?}", other.id()),
        },
        weight,
    };
    let set = vec![
        weighted("reward-math", 1.0),
        weighted("reward-inference", 0.5),
    ];
    let set = RewardSet::new(set).unwrap();
    let samples = [
        sample(RIGHT, USAGE),
        sample(WRONG, USAGE),
        sample(NO_NUMBER, USAGE),
    ];
    let scoring = set.score(&samples).unwrap();
    let Score::Value(right) = &scoring.scores[0] else {
        panic!("{scoring:?}")
    };
    close(right.total, 1.0 + 0.29);
    assert!(
        names(right).contains(&"reward-inference/kv_mb"),
        "{right:?}"
    );
    assert!(matches!(&scoring.scores[1], Score::Value(s) if (s.total - 0.29).abs() < 1e-12));
    assert!(matches!(&scoring.scores[2], Score::Skip(_)), "{scoring:?}");
}

#[test]
fn around_a_task_reward_it_is_one_component() {
    let (host, lines) = host();
    let bytes = defaults::component("reward-math-inference").unwrap();
    let described = host.describe("r", bytes).unwrap();
    assert_eq!(described.role, Some(Role::Reward));
    assert_eq!(described.exports, ["grpo:plugin/scoring@0.1.0"]);
    let known = ["grpo:plugin/types@0.1.0", "grpo:plugin/host@0.1.0"];
    assert!(
        described
            .imports
            .iter()
            .all(|i| known.contains(&i.as_str())),
        "{described:?}"
    );
    let config = json!({"inner": {"correct": 2}, "inference": {"reuse_weight": 0}});
    let plugin = load(&host, bytes, &config).unwrap();
    // The host tells by its address that two samples share a row.
    let row = RIGHT.0;
    let samples = [
        sample((row, RIGHT.1), USAGE),
        sample((row, WRONG.1), UNDRAFTED),
        sample(NO_NUMBER, UNDRAFTED),
    ];
    let scoring = plugin.score(&samples).unwrap();
    let [
        Score::Value(right),
        Score::Value(wrong),
        Score::Skip(reason),
    ] = scoring.scores.as_slice()
    else {
        panic!("{scoring:?}")
    };
    close(right.total, 2.0 + 0.205);
    close(wrong.total, -0.295 + 0.5);
    assert_eq!(reason, "column `answer` holds no number");
    let terms = ["task", "latency_ms", "generated_tokens", "kv_mb"];
    assert_eq!(names(wrong), [&terms[..], &["strict", "flexible"]].concat());
    assert_eq!(right.parts[0], ("task".to_owned(), 2.0));
    // The skipped sample has no term to lack.
    let text = "accept_rate is undefined for some samples, no token was drafted: the mean of their group stands in";
    assert_eq!(*lines.lock().unwrap(), [(LogLevel::Warn, text.to_owned())]);
}

#[test]
fn what_fails_inside_names_the_inner_reward() {
    let (host, _) = host();
    let bytes = defaults::component("reward-math-inference").unwrap();
    for (config, text) in [
        (
            json!({"inner": {"colum": "a"}}),
            "inner: unknown field `colum`",
        ),
        (json!({"column": "a"}), "unknown field `column`"),
        (json!({"inference": {"kv": 1}}), "unknown field `kv`"),
    ] {
        let Err(error) = load(&host, bytes, &config) else {
            panic!("{config}")
        };
        let kind = GuestErrorKind::Config;
        assert!(
            matches!(&error.fault, Fault::Guest { kind: k, message } if *k == kind && message.starts_with(text)),
            "{error}"
        );
    }
    let plugin = load(&host, bytes, &json!({"inner": {"column": "gold"}})).unwrap();
    let scoring = plugin.score(&[sample(RIGHT, USAGE)]).unwrap();
    let [fault] = scoring.faults.as_slice() else {
        panic!("{scoring:?}")
    };
    let message = "inner: row has no column `gold`; it has answer".to_owned();
    let kind = GuestErrorKind::Input;
    assert_eq!(
        (fault.call, &fault.fault),
        (Call::Score, &Fault::Guest { kind, message })
    );
}

/// Any reward can be wrapped, a wrapped one too; its parts then collide with the wrapper's own.
#[test]
fn composing_twice_keeps_every_part() {
    let (host, _) = host();
    let once = defaults::component("reward-math-inference").unwrap();
    let twice = xtask::compose::compose(WRAPPER, once).unwrap();
    let config = json!({"task_weight": 3, "inner": {"inner": {"correct": 2}}});
    let plugin = load(&host, &twice, &config).unwrap();
    let found = scored(&plugin, &[sample(RIGHT, USAGE)]);
    close(found[0].total, 3.0 * 2.58 + 0.58);
    let terms = [
        "latency_ms",
        "generated_tokens",
        "kv_mb",
        "accept_rate",
        "cache_reuse",
    ];
    let mut expected = vec!["task".to_owned()];
    expected.extend(terms.map(str::to_owned));
    expected.push("inner/task".to_owned());
    expected.extend(terms.map(|term| format!("inner/{term}")));
    expected.extend(["strict", "flexible"].map(str::to_owned));
    assert_eq!(names(&found[0]), expected);
}

#[test]
fn only_a_reward_can_be_wrapped() {
    let (host, _) = host();
    let formatter = defaults::component("formatter-chat").unwrap();
    let error = xtask::compose::compose(WRAPPER, formatter).unwrap_err();
    assert!(error.to_string().contains("exports nothing"), "{error:#}");
    let error = xtask::compose::compose(WRAPPER, b"no").unwrap_err();
    assert!(error.to_string().contains("not a component"), "{error:#}");
    // The wrapper alone has nobody to ask.
    let Err(error) = load(&host, WRAPPER, &json!({})) else {
        panic!("the bare wrapper loaded")
    };
    assert!(error.to_string().contains("grpo:plugin/scoring"), "{error}");
}
