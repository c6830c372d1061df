//! The shipped plugins through the real host: what they promise, and how the host joins them.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "clippy counts only functions marked as tests as tests"
)]

use grpo_host::defaults;
use grpo_host::plugin::{
    Call, CurriculumPlugin, Fault, FormatterPlugin, GuestErrorKind, Limits, Plugin, PluginHost,
    RewardPlugin, RewardSet, RowText, WeightError, Weighted,
};
use grpo_host::types::{
    Budget, Finish, Outcome, Parsed, PromptBody, Role, Sample, Score, Telemetry,
};
use serde_json::json;
use std::sync::Arc;

fn host() -> PluginHost {
    PluginHost::new(Arc::new(|line| panic!("no shipped plugin logs: {line:?}"))).unwrap()
}

fn load(host: &PluginHost, name: &str, config: serde_json::Value) -> Plugin {
    let bytes = defaults::component(name).unwrap();
    host.load(name, bytes, &config, &Limits::default()).unwrap()
}

fn reward(host: &PluginHost, name: &str, config: serde_json::Value) -> RewardPlugin {
    match load(host, name, config) {
        Plugin::Reward(plugin) => plugin,
        other => panic!("{:?}", other.id()),
    }
}

fn formatter(host: &PluginHost, config: serde_json::Value) -> FormatterPlugin {
    match load(host, "formatter-chat", config) {
        Plugin::Formatter(plugin) => plugin,
        other => panic!("{:?}", other.id()),
    }
}

fn curriculum(host: &PluginHost, config: serde_json::Value) -> CurriculumPlugin {
    match load(host, "curriculum-uniform", config) {
        Plugin::Curriculum(plugin) => plugin,
        other => panic!("{:?}", other.id()),
    }
}

const NOT_PARSED: Parsed = Parsed {
    reasoning: None,
    answer: None,
};

fn sample<'a>(row_json: &'a str, completion: &'a str, parsed: &'a Parsed) -> Sample<'a> {
    Sample {
        row_id: 7,
        row_json,
        prompt: "p",
        completion,
        parsed,
        finish: Finish::Stop,
        telemetry: Telemetry::default(),
    }
}

fn totals(plugin: &RewardPlugin, cases: &[(&str, &str)]) -> Vec<f64> {
    let samples: Vec<Sample<'_>> = cases
        .iter()
        .map(|(row, completion)| sample(row, completion, &NOT_PARSED))
        .collect();
    totals_of(plugin, &samples)
}

fn totals_of(plugin: &RewardPlugin, samples: &[Sample<'_>]) -> Vec<f64> {
    let scoring = plugin.score(samples).unwrap();
    assert_eq!(scoring.faults, []);
    let total = |score| match score {
        Score::Value(scored) => scored.total,
        Score::Skip(reason) => panic!("{reason}"),
    };
    scoring.scores.into_iter().map(total).collect()
}

#[test]
fn roles_are_read_from_exports() {
    let host = host();
    for (name, role) in [
        ("reward-math", Role::Reward),
        ("reward-format", Role::Reward),
        ("reward-inference", Role::Reward),
        ("reward-math-inference", Role::Reward),
        ("reward-repetition", Role::Reward),
        ("formatter-chat", Role::Formatter),
        ("curriculum-uniform", Role::Curriculum),
        ("curriculum-kde", Role::Curriculum),
    ] {
        let plugin = load(&host, name, json!({}));
        assert_eq!((plugin.id().role, plugin.id().name.as_str()), (role, name));
        let bytes = defaults::component(name).unwrap();
        assert_eq!(plugin.id().digest, grpo_host::plugin::digest(bytes));
    }
    assert!(defaults::component("reward-maths").is_none());
}

#[test]
fn digests_are_sha256() {
    // The digest of no bytes, FIPS 180-4.
    assert_eq!(
        grpo_host::plugin::digest(b""),
        "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    );
}

const GSM8K: &str =
    r#"{"question": "How many?", "answer": "She has 3*4=<<3*4=12>>12.\n#### 1,012"}"#;
const HALF: &str = r#"{"answer": "1/2"}"#;

#[test]
fn math_compares_exactly() {
    let host = host();
    let flexible = reward(&host, "reward-math", json!({}));
    let cases = [
        (GSM8K, "#### 1012"),
        (GSM8K, "So the answer is $1,012.00."),
        (GSM8K, "1012, no, 1013"),
        (HALF, "0.5"),
        (HALF, "50%"),
        (HALF, "that is 2/4"),
        (HALF, "0.50000000000000000001"),
        (r#"{"answer": 0.5}"#, "1/2"),
    ];
    assert_eq!(
        totals(&flexible, &cases),
        [1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 0.0, 1.0]
    );
    let strict = json!({"mode": "strict", "partial": 0.25, "missing": -1, "percent": false});
    let strict = reward(&host, "reward-math", strict);
    let cases = [
        (GSM8K, "12\n#### 1012\n"),
        (GSM8K, "It is 1012"),
        (GSM8K, "#### 1013"),
        (GSM8K, "no idea"),
        (HALF, "#### 50%"),
    ];
    assert_eq!(totals(&strict, &cases), [1.0, 0.25, 0.0, -1.0, 0.0]);
}

#[test]
fn math_reports_what_was_found_and_never_guesses() {
    let host = host();
    let plugin = reward(&host, "reward-math", json!({"column": "gold"}));
    let answer = Parsed {
        reasoning: None,
        answer: Some("4".to_owned()),
    };
    let scoring = plugin
        .score(&[
            sample(r#"{"gold": "4"}"#, "<think>5</think> 4", &answer),
            sample(r#"{"gold": "four"}"#, "4", &NOT_PARSED),
        ])
        .unwrap();
    let Score::Value(scored) = &scoring.scores[0] else {
        panic!("{scoring:?}")
    };
    let parts = [("strict".to_owned(), 1.0), ("flexible".to_owned(), 1.0)];
    assert_eq!(
        (scored.total, scored.parts.as_slice()),
        (1.0, parts.as_slice())
    );
    let reason = "column `gold` holds no number".to_owned();
    assert_eq!(scoring.scores[1], Score::Skip(reason));
    // A missing column is the user's mistake and names what there is; the good sample keeps its score.
    let scoring = plugin
        .score(&[
            sample(r#"{"gold": 4}"#, "4", &NOT_PARSED),
            sample(r#"{"answer": 4, "id": 1}"#, "4", &NOT_PARSED),
        ])
        .unwrap();
    assert!(matches!(&scoring.scores[0], Score::Value(s) if s.total == 1.0));
    assert!(matches!(&scoring.scores[1], Score::Skip(_)));
    let [fault] = scoring.faults.as_slice() else {
        panic!("{scoring:?}")
    };
    assert_eq!((fault.call, fault.row), (Call::Score, Some(7)));
    let message = "row has no column `gold`; it has answer, id".to_owned();
    let kind = GuestErrorKind::Input;
    assert_eq!(fault.fault, Fault::Guest { kind, message });
}

#[test]
fn format_checks_tags_pattern_and_length() {
    let host = host();
    let row = "{}";
    let think = reward(&host, "reward-format", json!({}));
    let cases = [(row, "<think>a</think> 42"), (row, "42"), (row, "<think>a")];
    assert_eq!(totals(&think, &cases), [1.0, 0.0, 0.0]);
    let config =
        json!({"tags": [], "pattern": "^[a-z]+$", "max_chars": 3, "partial": true, "reward": 2});
    let shape = reward(&host, "reward-format", config);
    let cases = [(row, "abc"), (row, "abcd"), (row, "a b c")];
    assert_eq!(totals(&shape, &cases), [2.0, 1.0, 0.0]);
}

/// Totals of completions of GSM8K rows with so many tokens.
fn totals_by_length(plugin: &RewardPlugin, cases: &[(&str, u32, Finish)]) -> Vec<f64> {
    let samples = cases.iter().map(|(completion, tokens, finish)| Sample {
        telemetry: Telemetry {
            generated_tokens: *tokens,
            ..Telemetry::default()
        },
        finish: *finish,
        ..sample(GSM8K, completion, &NOT_PARSED)
    });
    totals_of(plugin, &samples.collect::<Vec<_>>())
}

#[test]
fn length_is_rewarded_alone_and_around_another_reward() {
    let host = host();
    let soft = reward(
        &host,
        "reward-length",
        json!({"max_tokens": 100, "overlong": 20}),
    );
    let tokens = [0, 80, 90, 100, 400].map(|tokens| ("", tokens, Finish::Stop));
    assert_eq!(
        totals_by_length(&soft, &tokens),
        [0.0, 0.0, -0.5, -1.0, -1.0]
    );
    let config = json!({"max_tokens": 100, "inner": {"mode": "strict"}, "truncated": -2});
    let around = reward(&host, "reward-math-length", config);
    let cases = [
        ("#### 1012", 0, Finish::Stop),
        ("#### 1012", 100, Finish::Stop),
        ("#### 1013", 0, Finish::Stop),
        ("1012", 100, Finish::Stop),
        ("#### 1012", 100, Finish::Length),
    ];
    assert_eq!(
        totals_by_length(&around, &cases),
        [1.0, 0.5, -1.0, -0.5, -2.0]
    );
    let text = (GSM8K, "so it is so it is so it is");
    let again = reward(&host, "reward-repetition", json!({"n": 3}));
    // Nine words are seven windows of three, of which three differ.
    assert_eq!(
        totals(&again, &[text, (GSM8K, "so it is")]),
        [-(1.0 - 3.0 / 7.0), 0.0]
    );
}

#[test]
fn bad_configs_fail_at_load() {
    let host = host();
    for (name, config, part) in [
        (
            "reward-math",
            json!({"colum": "a"}),
            "unknown field `colum`",
        ),
        ("reward-format", json!({"pattern": "("}), "pattern `(`"),
        ("reward-length", json!({}), "max_tokens"),
        (
            "reward-math-length",
            json!({"max_tokens": 9, "inner": {"colum": "a"}}),
            "inner: unknown field `colum`",
        ),
        ("reward-repetition", json!({"n": 0}), "n 0"),
        ("formatter-chat", json!({"template": "{a"}), "lone brace"),
        (
            "curriculum-uniform",
            json!({"group_size": 0}),
            "group_size is 0",
        ),
        ("curriculum-kde", json!({"alpha": -1}), "alpha is -1"),
        (
            "reward-inference",
            json!({"task_weight": 1}),
            "unknown field `task_weight`",
        ),
    ] {
        let bytes = defaults::component(name).unwrap();
        let loaded = host.load(name, bytes, &config, &Limits::default());
        let Err(error) = loaded else { panic!("{name}") };
        assert_eq!(error.call, Call::Configure);
        let Fault::Guest {
            kind: GuestErrorKind::Config,
            message,
        } = &error.fault
        else {
            panic!("{error}")
        };
        assert!(message.contains(part), "{message}");
        assert_eq!(
            error.hint().unwrap(),
            format!("correct the config of `{name}`")
        );
    }
}

#[test]
fn formatter_fills_templates_and_splits_completions() {
    let host = host();
    let config = json!({"system": "Be brief.", "template": "Q: {question}", "stop": ["\n\n"]});
    let plugin = formatter(&host, config);
    let row = |id, json| RowText { id, json };
    let prompts = plugin.format(&[row(0, r#"{"question": "1+1?"}"#)]).unwrap();
    let PromptBody::Messages(messages) = &prompts[0].body else {
        panic!("{prompts:?}")
    };
    let texts: Vec<_> = messages
        .iter()
        .map(|m| (m.role.as_str(), m.content.as_str()))
        .collect();
    assert_eq!(texts, [("system", "Be brief."), ("user", "Q: 1+1?")]);
    assert_eq!(prompts[0].stop, ["\n\n"]);
    let parsed = plugin
        .parse(&["<think>hm</think> 2", "2", "<think>hm"])
        .unwrap();
    let texts: Vec<_> = parsed
        .iter()
        .map(|p| (p.reasoning.as_deref(), p.answer.as_deref()))
        .collect();
    assert_eq!(
        texts,
        [
            (Some("hm"), Some("2")),
            (None, Some("2")),
            (Some("hm"), None)
        ]
    );
    let rows = [row(3, r#"{"question": "a"}"#), row(4, r#"{"q": "b"}"#)];
    let error = plugin.format(&rows).unwrap_err();
    assert_eq!((error.call, error.row), (Call::Format, Some(4)));
    assert!(
        error.to_string().contains("no column `question`; it has q"),
        "{error}"
    );
    let raw = formatter(&host, json!({"raw": true, "template": "{a}={b}\n"}));
    let prompts = raw.format(&[row(0, r#"{"a": 1, "b": "x"}"#)]).unwrap();
    assert_eq!(prompts[0].body, PromptBody::Text("1=x\n".to_owned()));
}

#[test]
fn curriculum_walks_shuffled_epochs() {
    let host = host();
    let plugin = curriculum(&host, json!({}));
    let budget = |step, seed| Budget {
        step,
        rows: 12,
        prompts: 4,
        group_size: 8,
        seed,
    };
    let walk = |seed| {
        let mut state = Vec::new();
        let mut rows = Vec::new();
        for step in 0..6 {
            let outcomes = [Outcome {
                row: 1,
                rewards: vec![0.5, 1.0],
                skipped: 1,
            }];
            let plan = plugin.plan(&state, &outcomes, &budget(step, seed)).unwrap();
            assert!(plan.picks.iter().all(|pick| pick.rollouts == 8));
            #[expect(clippy::cast_precision_loss, reason = "small numbers")]
            let epoch = (step + 1) as f64 / 3.0;
            assert!((plan.epoch - epoch).abs() < 1e-12);
            rows.extend(plan.picks.iter().map(|pick| pick.row));
            state = plan.state;
        }
        (rows, state)
    };
    let (rows, state) = walk(3);
    for epoch in rows.chunks(12) {
        let mut sorted = epoch.to_vec();
        sorted.sort_unstable();
        assert!(sorted.into_iter().eq(0..12), "{rows:?}");
    }
    assert_ne!(rows[..12], rows[12..]);
    assert_ne!(rows, walk(4).0);
    assert_eq!(rows, walk(3).0);
    let other = Budget {
        rows: 13,
        ..budget(6, 3)
    };
    let error = plugin.plan(&state, &[], &other).unwrap_err();
    let message = "state was made for 12 rows, the dataset has 13".to_owned();
    let kind = GuestErrorKind::Input;
    assert_eq!(
        (error.call, error.fault),
        (Call::Plan, Fault::Guest { kind, message })
    );
    let fixed = curriculum(&host, json!({"shuffle": false, "group_size": 2}));
    let plan = fixed.plan(&[], &[], &budget(0, 0)).unwrap();
    let picks: Vec<_> = plan.picks.iter().map(|p| (p.row, p.rollouts)).collect();
    assert_eq!(picks, [(0, 2), (1, 2), (2, 2), (3, 2)]);
}

#[test]
fn rewards_combine_with_weights() {
    let host = host();
    let math = |weight| Weighted {
        reward: reward(&host, "reward-math", json!({})),
        weight,
    };
    let format = |weight| Weighted {
        reward: reward(&host, "reward-format", json!({})),
        weight,
    };
    let set = RewardSet::new(vec![math(0.75), format(0.5), math(-1.0)]).unwrap();
    let names: Vec<&str> = set.names().collect();
    assert_eq!(names, ["reward-math", "reward-format", "reward-math#2"]);
    let samples = [
        sample(HALF, "<think>a</think> 50%", &NOT_PARSED),
        sample(r#"{"answer": "none"}"#, "<think>a</think> 50%", &NOT_PARSED),
    ];
    let scoring = set.score(&samples).unwrap();
    let Score::Value(scored) = &scoring.scores[0] else {
        panic!("{scoring:?}")
    };
    assert_eq!(scored.total, 0.75 + 0.5 - 1.0);
    let part = |name: &str| scored.parts.iter().find(|(n, _)| n == name).unwrap().1;
    assert_eq!(
        (
            part("reward-math"),
            part("reward-format"),
            part("reward-format/tags")
        ),
        (1.0, 1.0, 1.0)
    );
    assert_eq!(part("reward-math#2/flexible"), 1.0);
    assert_eq!(scoring.skipped, [1, 0, 1]);
    let Score::Skip(reason) = &scoring.scores[1] else {
        panic!("{scoring:?}")
    };
    assert!(reason.starts_with("reward-math: column `answer` holds no number; reward-math#2: "));
    // A reward that is only watched excludes nothing.
    let watched = RewardSet::new(vec![math(0.0), format(0.5)]).unwrap();
    let scoring = watched.score(&samples).unwrap();
    assert!(
        matches!(&scoring.scores[1], Score::Value(s) if s.total == 0.5),
        "{scoring:?}"
    );
    assert_eq!(
        RewardSet::new(vec![math(0.0)]).err(),
        Some(WeightError::AllZero)
    );
    assert!(RewardSet::new(vec![math(f64::NAN)]).is_err());
}
