//! Judges in a run: what they are checked for before it starts, and their account in what it leaves.

use super::lab::Lab;

/// Adds judges to `run.yaml`.
fn lab(judges: &str) -> Lab {
    let lab = Lab::new();
    let yaml = std::fs::read_to_string(lab.path("run.yaml")).unwrap();
    lab.write("run.yaml", format!("{yaml}judges:\n{judges}"));
    lab
}

const OWN: &str = "  own: {model: self, concurrency: 2}\n";

#[test]
fn every_step_accounts_for_its_judges() {
    let lab = lab(OWN);
    let ended = lab
        .run("--config run.yaml --steps 2 --out a --set seed=5")
        .fine();
    let said = ended
        .stderr
        .lines()
        .find(|line| line.contains("judge `own`"));
    let said = said.unwrap_or_else(|| panic!("{ended:?}"));
    assert!(
        said.contains("runs here on the CPU") && said.contains("GiB of keys and values"),
        "{said}"
    );
    let row = "judge  own: 0 questions, 0 cached, 0 unanswered";
    assert!(ended.stdout.contains(row), "{ended:?}");
    for line in lab.metrics("a") {
        for name in [
            "asked",
            "cached",
            "requests",
            "retries",
            "failures",
            "prompt_tokens",
            "completion_tokens",
            "cost",
        ] {
            let metric = format!("judge/own/{name}");
            assert_eq!(line[&metric], 0.0, "{metric} of {line:?}");
        }
    }
    let json =
        lab.run("--resume a --json --set judges={\"own\":{\"model\":\"self\",\"max_retries\":1}}");
    let json = json.fine().json();
    assert_eq!(json["judges"]["own"]["asked"], 0);
}

#[test]
fn a_resumed_run_keeps_its_judges_but_for_their_pace() {
    let lab = lab(OWN);
    lab.run("--config run.yaml --quiet --steps 1 --out a")
        .fine();
    lab.run("--quiet --resume a --steps 2 --set judges={\"own\":{\"model\":\"self\",\"concurrency\":1}}")
        .fine();
    // One key of one judge, the others staying as they are.
    lab.run("--quiet --resume a --steps 3 --set judges.own.max_requests=7")
        .fine();
    let config = std::fs::read_to_string(lab.path("a/config.yaml")).unwrap();
    assert!(
        config.contains("max_requests: 7\n") && config.contains("concurrency: 1\n"),
        "{config}"
    );
    for (set, code, said) in [
        (
            "judges.own.model=other",
            2,
            "a resumed run cannot change `judges`",
        ),
        (
            "judges.own.max_request=7",
            2,
            "--set: unknown key `judges.own.max_request`",
        ),
        (
            "judges.own.max_requests=0",
            2,
            "--set: `judges.own.max_requests` is 0; allowed: 1 or more, or null",
        ),
        (
            "judges.own.model.x=1",
            2,
            "--set: `judges.own.model.x` cannot be set, since `judges.own.model` is no map",
        ),
        (
            "plugins.0.weight=2",
            2,
            "--set: `plugins.0.weight` cannot be set, since `plugins` is no map",
        ),
    ] {
        let ended = lab.run(&format!("--quiet --resume a --steps 4 --set {set}"));
        assert_eq!(ended.refused(code).0, said);
    }
    for other in [
        "{}",
        r#"{"own":{"model":"other"}}"#,
        r#"{"mine":{"model":"self"}}"#,
    ] {
        let ended = lab.run(&format!(
            "--quiet --resume a --steps 4 --set judges={other}"
        ));
        let (error, _) = ended.refused(2);
        assert_eq!(error, "a resumed run cannot change `judges`");
    }
}

#[test]
fn a_judge_that_cannot_be_opened_leaves_no_run() {
    let lab = lab(
        "  far: {endpoint: 'https://localhost:1/v1', model: m, api_key_env: GRPO_NO_SUCH_KEY}\n",
    );
    let ended = lab.run("--config run.yaml --quiet --out a");
    let (error, hint) = ended.refused(2);
    assert_eq!(
        error,
        "judge `far`: the environment variable GRPO_NO_SUCH_KEY is not set"
    );
    assert!(hint.starts_with("export GRPO_NO_SUCH_KEY"), "{hint}");
    let ended = lab
        .run("--config run.yaml --quiet --out a --set judges={\"far\":{\"model\":\"./nowhere\"}}");
    let (error, _) = ended.refused(1);
    assert!(
        error.starts_with("judge `far`: model `./nowhere`"),
        "{error}"
    );
    let ended =
        lab.run("--config run.yaml --quiet --out a --set judges={\"far\":{\"endpoint\":\"x\",\"model\":\"m\"}}");
    let (error, hint) = ended.refused(2);
    assert_eq!(
        error,
        "--set: `judges.far.endpoint` is x; allowed: a URL such as https://api.openai.com/v1"
    );
    assert!(hint.contains("judges.far.endpoint"), "{hint}");
    assert!(!lab.path("a").exists());
}
