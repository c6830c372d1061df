//! What scripts read: `--json` prints one object as the last line of stdout, with these keys and types.

use serde_json::{Map, Value};

use super::lab::Lab;

/// Every key named is there, of the type named: `number`, `count`, `fraction`, `text`.
#[track_caller]
fn assert_keys(object: &Value, keys: &[(&str, &str)]) {
    for (key, kind) in keys {
        let value = &object[*key];
        let right = match *kind {
            "number" => value.as_f64().is_some_and(f64::is_finite),
            "count" => value.is_u64(),
            "fraction" => value.as_f64().is_some_and(|x| (0.0..=1.0).contains(&x)),
            "text" => value.is_string(),
            other => panic!("no kind {other}"),
        };
        assert!(right, "`{key}` is not a {kind}: {object}");
    }
}

#[track_caller]
fn assert_plugins(plugins: &Value) {
    let plugins: Vec<Map<String, Value>> = serde_json::from_value(plugins.clone()).unwrap();
    let mut roles = Vec::new();
    for plugin in &plugins {
        let keys: Vec<&str> = plugin.keys().map(String::as_str).collect();
        assert!(keys.starts_with(&["role", "name", "digest"]), "{plugin:?}");
        let digest = plugin["digest"].as_str().unwrap().strip_prefix("sha256:");
        let hex = |text: &str| text.len() == 64 && text.bytes().all(|b| b.is_ascii_hexdigit());
        assert!(digest.is_some_and(hex), "{plugin:?}");
        roles.push((
            plugin["role"].as_str().unwrap(),
            plugin["name"].as_str().unwrap(),
        ));
    }
    roles.sort_unstable();
    assert_eq!(
        roles,
        [
            ("curriculum", "curriculum-uniform"),
            ("formatter", "formatter-chat"),
            ("reward", "reward-format")
        ]
    );
}

#[test]
fn train_and_results_print_their_objects() {
    let lab = Lab::new();
    let ended = lab.run("train --config run.yaml --out a --json").fine();
    assert_eq!(ended.stdout.lines().count(), 1, "{ended:?}");
    let json = ended.json();
    assert_keys(
        &json,
        &[
            ("steps", "count"),
            ("reward_first", "number"),
            ("reward_last", "number"),
            ("eval_before", "fraction"),
            ("eval_after", "fraction"),
            ("tokens_per_second", "number"),
            ("wall_s", "number"),
            ("run_dir", "text"),
        ],
    );
    assert_eq!((&json["steps"], &json["run_dir"]), (&6.into(), &"a".into()));
    assert_plugins(&json["plugins"]);
    // Mean of the first and of the last tenth of the steps: of one step each here.
    let lines = lab.metrics("a");
    assert_eq!(json["reward_first"], lines[1]["reward"]);
    assert_eq!(json["reward_last"], lines[6]["reward"]);
    assert_eq!(json["eval_before"], lines[0]["eval_accuracy_strict"]);
    assert_eq!(json["eval_after"], lines[6]["eval_accuracy_strict"]);

    let results = lab.run("results a --json").fine().json();
    assert_keys(&results, &[("run_dir", "text"), ("steps", "count")]);
    assert_eq!(results["steps"], 6);
    assert_eq!(results["checkpoints"], serde_json::json!([4, 6]));
    assert_plugins(&results["plugins"]);
    let metrics = results["metrics"].as_array().unwrap();
    let reward = metrics.iter().find(|m| m["name"] == "reward").unwrap();
    let numbers = ["first", "last", "min", "max", "mean"].map(|key| (key, "number"));
    assert_keys(reward, &numbers);
    assert_eq!(reward["count"], 6);
    assert_eq!(
        (&reward["first"], &reward["last"]),
        (&lines[1]["reward"], &lines[6]["reward"])
    );

    // Resuming a run that is done does no step and reports the same.
    let again = lab.run("--resume a --json").fine().json();
    for key in [
        "steps",
        "reward_first",
        "reward_last",
        "eval_before",
        "eval_after",
        "plugins",
    ] {
        assert_eq!(again[key], json[key], "{key}");
    }
}

#[test]
fn eval_prints_its_object() {
    let lab = Lab::new();
    let eval = "eval --config run.yaml --data rows.jsonl --json --limit 6";
    let json = lab.run(eval).fine().json();
    let keys = [
        ("accuracy_strict", "fraction"),
        ("accuracy_flexible", "fraction"),
        ("n", "count"),
    ];
    assert_keys(&json, &keys);
    assert_eq!(json["n"], 6);
    assert_eq!(json["pass_at_k"], Value::Null);
    let sampled = lab.run(&format!("{eval} --samples 3")).fine().json();
    assert_keys(&sampled, &keys);
    assert_keys(&sampled, &[("pass_at_k", "fraction")]);
}

#[test]
fn accuracy_is_that_of_the_rows_with_an_answer() {
    let lab = Lab::new();
    let row = |i: usize| match i {
        0..4 => format!("{{\"question\": \"{i}\", \"answer\": \"1\"}}\n"),
        4..6 => format!("{{\"question\": \"{i}\", \"answer\": null}}\n"),
        _ => format!("{{\"question\": \"{i}\"}}\n"),
    };
    lab.write("mixed.jsonl", (0..9).map(row).collect::<String>());
    let json = lab
        .run("eval --config run.yaml --data mixed.jsonl --json")
        .fine()
        .json();
    assert_keys(&json, &[("accuracy_strict", "fraction")]);
    let limited = json["answered"].as_u64().unwrap();
    // `eval_rows` of the config is 4.
    assert_eq!((&json["n"], limited), (&4.into(), 4));
    let all = "eval --config run.yaml --data mixed.jsonl --json --limit 9";
    let json = lab.run(all).fine().json();
    assert_keys(&json, &[("accuracy_strict", "fraction")]);
    assert_eq!((&json["n"], &json["answered"]), (&9.into(), &4.into()));
}

#[test]
fn the_embedded_default_needs_no_file() {
    let lab = Lab::new();
    let small = "--steps 2 --set prompts_per_step=4 --set num_generations=4 --set eval_rows=32";
    let json = lab.run(&format!("{small} --json")).fine().json();
    assert_eq!(
        (&json["steps"], &json["run_dir"]),
        (&2.into(), &"runs/0001".into())
    );
    let accuracy = json["eval_before"].as_f64().unwrap();
    assert!(accuracy > 0.0, "the model knows some answers: {json}");
    assert!(lab.path("runs/0001/model/model.safetensors").exists());
}
