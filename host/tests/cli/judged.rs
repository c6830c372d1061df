//! Rewards that ask a judge, before a run and in one: `plugin check|test`, `bench plugin`, `replay --plugin`, and what
//! `plugins.lock` says of grants.

use grpo_host::{plugin::Manifest, run::read_plugins_lock};
use serde_json::{Value, json};

use super::{
    judging::{ASK, asking_a_judge},
    lab::Lab,
    server::{Fault, Server},
};

const GRANTS: &str = r#"--grants {"judge":"small"}"#;

/// With `asks.wasm`, whose reward is the length of what a judge says to the first completion of a call, or below -1 for want
/// of an answer; and a case for it.
fn lab() -> Lab {
    let lab = Lab::new();
    let manifest = json!({
        "name": "asks", "version": "1.0.0", "description": "asks", "asks": { "judge": "to ask a model" },
    });
    let manifest = Manifest::parse(manifest.to_string().as_bytes()).unwrap();
    let bytes = asking_a_judge(&format!("{ASK} (i32.const 0)"));
    lab.write("asks.wasm", manifest.embed(&bytes).unwrap());
    // The server says `four! 4`.
    lab.write(
        "cases.jsonl",
        r#"{"completion": "four", "expect": {"total": 7}}"#,
    );
    lab
}

fn judge(server: &Server) -> Value {
    json!({ "endpoint": server.url(), "model": "m", "max_retries": 0 })
}

fn flags(judges: &Value) -> String {
    format!("{GRANTS} --judges {}", json!(judges))
}

#[test]
fn what_a_reward_lacks_to_be_tried_is_said_step_by_step() {
    let lab = lab();
    let server = Server::start();
    let judges = json!({ "small": judge(&server) });
    for command in ["check", "test"] {
        let run = |flags: &str| lab.run(&format!("plugin {command} asks.wasm {flags}"));
        let ended = run("");
        let (error, hint) = ended.refused(2);
        assert!(
            error.contains("asks for `judge` (\"to ask a model\")"),
            "{error}"
        );
        assert!(
            hint.ends_with("`bench plugin` take --grants and --judges"),
            "{hint}"
        );
        let ended = run(GRANTS);
        let (error, hint) = ended.refused(2);
        assert_eq!(
            error,
            "plugin `asks` is granted the judge `small`, which `judges` does not have"
        );
        assert!(hint.contains("--judges takes such a file"), "{hint}");
        run(&flags(&judges)).fine();
        lab.write("run.yaml", format!("temperature: 0.9\njudges: {judges}\n"));
        run(&format!("{GRANTS} --judges run.yaml")).fine();
        let ended = run(&format!("{GRANTS} --judges nowhere.yaml"));
        let (error, hint) = ended.refused(2);
        assert!(
            error.starts_with("cannot read config nowhere.yaml"),
            "{error}"
        );
        assert_eq!(hint, "give the path of a YAML file");
        let ended = run(r#"--judges {"small":{"modell":"m"}}"#);
        let (error, hint) = ended.refused(2);
        assert_eq!(error, "--judges: unknown key `judges.small.modell`");
        assert_eq!(hint, "did you mean `model`?");
        let ended = run(r#"--judges {"small":{"endpoint":"x","model":"m"}}"#);
        assert!(
            ended
                .refused(2)
                .0
                .starts_with("--judges: `judges.small.endpoint` is x")
        );
    }
}

#[test]
fn cases_are_judged_once_and_then_without_a_network() {
    let lab = lab();
    let server = Server::start();
    let judges = json!({ "small": judge(&server) });
    let test = |flags: &str| lab.run(&format!("plugin test asks.wasm {flags}"));
    let told = test(&flags(&judges)).fine().stdout;
    let account = "judge  small: 1 questions, 0 cached, 0 unanswered   (1 requests, 0 of them retries; 12 tokens)\n";
    assert!(told.contains(account), "{told}");
    assert!(told.ends_with("1 passed, 0 failed\n"), "{told}");
    assert_eq!(server.requests().len(), 1);
    server.fail_always(Some(Fault::Reset));
    let json = test(&format!("{} --json", flags(&judges))).fine().json();
    assert_eq!(json["judges"]["small"]["cached"], 1);
    let mut offline = judge(&server);
    offline["offline"] = json!(true);
    test(&flags(&json!({ "small": offline }))).fine();
    assert_eq!(server.requests().len(), 1);
    // A question that nobody has answered yet.
    lab.write(
        "cases.jsonl",
        r#"{"completion": "new", "expect": {"total": 7}}"#,
    );
    let failed = test(&flags(&judges));
    assert_eq!(failed.refused(1).0, "1 of 1 cases failed");
    // -4 is `unavailable`.
    assert!(
        failed.stdout.contains("expected 7.0, got -4.0"),
        "{failed:?}"
    );
    let why = "warning: plugin `asks` has no answer of judge `small` to 1 of 1 questions: the judge is unavailable";
    assert!(failed.stderr.contains(why), "{failed:?}");
    assert_eq!(server.requests().len(), 2);
}

#[test]
fn a_bench_and_a_comparison_may_ask() {
    let lab = lab();
    let server = Server::start();
    let judges = json!({ "small": judge(&server) });
    let bench = "bench plugin --plugin asks.wasm --samples 2 --bytes 100 --calls 3 --json";
    let json = lab
        .run(&format!("{bench} {}", flags(&judges)))
        .fine()
        .json();
    assert_eq!(json["grants"], json!({ "judge": "small" }));
    let marks = r#"{"rubric":"{completion}"}"#;
    let shipped = bench.replace("asks.wasm", "reward-judge");
    lab.run(&format!("{shipped} --config {marks} {}", flags(&judges)))
        .fine();
    let asked = &json["judges"]["small"];
    // The same question every time.
    assert_eq!(
        (&asked["requests"], &asked["failures"]),
        (&1.into(), &0.into())
    );
    assert!(asked["asked"].as_u64() > Some(12), "{asked}");

    let yaml = std::fs::read_to_string(lab.path("run.yaml")).unwrap();
    lab.write("run.yaml", format!("{yaml}judges: {judges}\n"));
    lab.run("--config run.yaml --quiet --steps 1 --out a")
        .fine();
    let replay = "replay a --plugin asks.wasm --json";
    let ended = lab.run(replay);
    assert!(ended.refused(2).0.contains("asks for `judge`"));
    // The run's own judges, and others.
    let before = server.requests().len();
    let json = lab.run(&format!("{replay} {GRANTS}")).fine().json();
    assert_eq!(json["judges"]["small"]["asked"], 1);
    assert_eq!(server.requests().len(), before + 1);
    let mut other = judge(&server);
    other["model"] = json!("n");
    let others = flags(&json!({ "small": other }));
    lab.run(&format!("{replay} {others}")).fine();
    let asked = server.requests();
    assert_eq!(asked.last().unwrap().body["model"], "n");
}

#[test]
fn the_lock_has_the_grants_and_holds_a_run_to_them() {
    let lab = lab();
    let server = Server::start();
    let yaml = std::fs::read_to_string(lab.path("run.yaml")).unwrap();
    let plugin = "plugins:\n  - source: asks.wasm\n    grants: {judge: small}\n";
    let judges = json!({ "small": judge(&server), "large": judge(&server) });
    lab.write(
        "run.yaml",
        format!(
            "{}judges: {judges}\n",
            yaml.replacen("plugins:\n", plugin, 1)
        ),
    );
    lab.run("--config run.yaml --quiet --steps 1 --out a")
        .fine();
    let locked = read_plugins_lock(&lab.path("a")).unwrap();
    let granted = |name: &str| {
        let plugin = locked.iter().find(|plugin| plugin.id.name == name);
        json!(plugin.unwrap().grants)
    };
    assert_eq!(granted("asks"), json!({ "judge": "small" }));
    assert_eq!(granted("reward-format"), json!({}));

    let path = lab.path("a/config.yaml");
    let config = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, config.replace("judge: small", "judge: large")).unwrap();
    for args in ["--quiet --resume a --steps 2", "replay a"] {
        let ended = lab.run(args);
        let (error, hint) = ended.refused(1);
        let said = r#"plugin `asks` is granted {"judge":"large"}, and was granted {"judge":"small"} when the run began"#;
        assert_eq!(error, said);
        assert!(hint.contains("plugins.lock"), "{hint}");
    }
    std::fs::write(&path, &config).unwrap();
    // A lock of an earlier version has no grants.
    let path = lab.path("a/plugins.lock");
    let lock = std::fs::read_to_string(&path).unwrap();
    let without = lock
        .replace("  grants:\n    judge: small\n", "")
        .replace("  grants: {}\n", "");
    assert!(!without.contains("grants"), "{without}");
    std::fs::write(&path, without).unwrap();
    lab.run("--quiet --resume a --steps 2").fine();
    lab.run("replay a").fine();
}
