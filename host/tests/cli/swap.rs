//! `plugin swap` and watched plugins: another reward during a run, its log, its journal, and what is left of bad ones.

use std::{
    io::{Read, Write},
    os::unix::net::UnixStream,
    path::Path,
    process::Child,
    time::{Duration, Instant},
};

use grpo_host::{
    plugin::digest,
    run::{
        LockedPlugin, Rollout, SwapEvent, SwapRecord, read_metrics, read_plugins_lock,
        read_rollouts, read_swaps, rollout_files,
    },
};
use serde_json::Value;

use super::{
    guest,
    lab::{Ended, Lab, signal},
};

/// Steps take milliseconds here, and a run goes on until it is told to stop.
pub(super) const ENDLESS: &str = "--config run.yaml --quiet --steps 100000 --set eval_steps=0 \
                       --set eval_on_start=false --set eval_on_end=false --set save_steps=0 \
                       --set lr_scheduler_type=constant";

pub(super) const PATIENCE: Duration = Duration::from_secs(60);

/// Settings under which `reward-format` likes other letters than the lab's run does.
const OTHER: &str = r#"{"tags":[],"answer":false,"pattern":"[n-z]"}"#;

/// Scores the prompt of conformance vectors, which has 14 bytes, with 1, and traps at every other.
fn trap_at_real_prompts() -> Vec<u8> {
    guest::scoring_after_ones(
        "(if (i32.ne (i32.load offset=12 (local.get $questions)) (i32.const 14)) (then (unreachable)))",
    )
}

pub(super) fn stop(child: Child) -> Ended {
    signal(&child, "INT");
    let ended = Ended::from(child.wait_with_output().unwrap());
    assert_eq!(ended.status.code(), Some(1), "{ended:?}");
    ended
}

pub(super) fn rollouts(lab: &Lab, run: &str) -> Vec<Rollout> {
    let files = rollout_files(&lab.path(run)).unwrap();
    let each = files
        .iter()
        .flat_map(|(_, path)| read_rollouts(path).unwrap());
    each.collect()
}

/// The reward that the log names for a sample.
fn scored_by(rollout: &Rollout) -> (&str, &str) {
    let id = &rollout.plugins[0];
    (&id.name, &id.digest)
}

pub(super) fn states(events: &Value) -> Vec<&str> {
    let events = events["events"].as_array().unwrap().iter();
    events
        .map(|event| event["state"].as_str().unwrap())
        .collect()
}

/// Waits for a line of the journal.
pub(super) fn journal(lab: &Lab, run: &str, lines: usize) -> Vec<SwapRecord> {
    let begun = Instant::now();
    loop {
        let found = read_swaps(&lab.path(run)).unwrap();
        if found.len() >= lines {
            return found;
        }
        assert!(begun.elapsed() < PATIENCE, "no swap in time: {found:?}");
        std::thread::park_timeout(Duration::from_millis(5));
    }
}

/// Waits until the run has done `more` steps than now.
pub(super) fn some_steps(lab: &Lab, run: &str, more: u64) {
    let last = || read_metrics(&lab.path(run)).unwrap().last().unwrap()["step"].as_u64();
    let begun = (Instant::now(), last().unwrap());
    while last().unwrap() < begun.1 + more {
        assert!(begun.0.elapsed() < PATIENCE);
        std::thread::park_timeout(Duration::from_millis(5));
    }
}

pub(super) fn replays(lab: &Lab, run: &str) {
    let ended = lab.run(&format!("replay {run} --json")).fine();
    assert_eq!(ended.json()["differing"], 0, "{ended:?}");
}

#[test]
fn a_candidate_shadows_is_promoted_replayed_and_resumed_with() {
    let lab = Lab::new();
    let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join("../plugins/dist/reward-format.wasm");
    std::fs::copy(shipped, lab.path("own.wasm")).unwrap();
    let child = lab.run_until(2, "a", &format!("{ENDLESS} --out a"));
    let swap = format!("plugin swap a reward own.wasm --shadow 2 --json --config {OTHER}");
    let events = lab.run(&swap).fine().json();
    assert_eq!(
        states(&events),
        ["compiled", "shadowed", "shadowed", "promoted", "kept"]
    );
    let report = &events["events"][2]["report"];
    assert_eq!(
        (&report["samples"], &report["failed"]),
        (&32.into(), &0.into())
    );
    assert!(
        report["micros"].as_f64().unwrap() > 0.0 && report["agreement"].as_f64().unwrap() < 1.0
    );
    let pearson = report["pearson"].as_f64().unwrap();
    // Both say 0 or 1, so that ranks and values are the same thing.
    assert!((report["spearman"].as_f64().unwrap() - pearson).abs() < 1e-9 && pearson < 1.0);
    let first = events["events"][3]["step"].as_u64().unwrap();
    std::fs::remove_file(lab.path("own.wasm")).unwrap();
    some_steps(&lab, "a", 3);
    stop(child);

    let records = journal(&lab, "a", 1);
    assert_eq!(
        (records.len(), records[0].step, records[0].event),
        (1, first, SwapEvent::Promoted)
    );
    assert!(records[0].shadow.is_some());
    for rollout in rollouts(&lab, "a") {
        let expected = if rollout.step < first {
            "reward-format"
        } else {
            "own"
        };
        assert_eq!(scored_by(&rollout).0, expected, "step {}", rollout.step);
    }
    let own = |l: &LockedPlugin| l.id.name == "own" && l.since_step == first;
    assert_eq!(
        read_plugins_lock(&lab.path("a"))
            .unwrap()
            .iter()
            .filter(|l| own(l))
            .count(),
        1
    );
    let lines = lab.metrics("a");
    let at = lines.iter().find(|line| line["step"] == first).unwrap();
    assert_eq!(at["swap/promoted"], 1.0);
    assert!(at.contains_key("rewards/own/mean") && !at.contains_key("rewards/reward-format/mean"));
    assert!(
        lines
            .iter()
            .any(|line| line.contains_key("swap/shadow_agreement"))
    );
    replays(&lab, "a");

    let last = lines.last().unwrap()["step"].as_u64().unwrap();
    lab.run(&format!("--quiet --resume a --steps {}", last + 2))
        .fine();
    let lines = lab.metrics("a");
    assert_eq!(lines.last().unwrap()["step"], last + 2);
    assert!(lines.last().unwrap().contains_key("rewards/own/mean"));
    replays(&lab, "a");
}

#[test]
fn a_swap_that_no_checkpoint_has_seen_is_made_again_at_its_step() {
    let lab = Lab::new();
    let mut child = lab.run_until(1, "a", &format!("{ENDLESS} --out a"));
    let swap = format!("plugin swap a reward reward-format --now --json --config {OTHER}");
    let events = lab.run(&swap).fine().json();
    assert_eq!(states(&events), ["compiled", "promoted", "kept"]);
    let first = events["events"][1]["step"].as_u64().unwrap();
    some_steps(&lab, "a", 1);
    child.kill().unwrap();
    child.wait().unwrap();
    let rewards = |lines: Vec<serde_json::Map<String, Value>>| -> Vec<Value> {
        let upto = lines
            .into_iter()
            .filter(|line| line["step"].as_u64() <= Some(first));
        upto.map(|line| line["reward"].clone()).collect()
    };
    let before = rewards(lab.metrics("a"));
    lab.run(&format!("--quiet --resume a --steps {}", first + 1))
        .fine();
    assert_eq!(rewards(lab.metrics("a")), before);
    assert_eq!(journal(&lab, "a", 1).len(), 1);
    replays(&lab, "a");
    let path = lab.path("a/swaps.jsonl");
    let whole = std::fs::read(&path).unwrap();
    std::fs::write(&path, &whole[..whole.len() - 9]).unwrap();
    let resumed = lab.run(&format!("--resume a --steps {}", first + 2));
    let said =
        "warning: the last line of swaps.jsonl is incomplete: a swap that it told of is undone";
    assert!(resumed.fine().stderr.contains(said));
}

#[test]
fn a_watched_file_that_changes_is_a_candidate() {
    let lab = Lab::new();
    let yaml = std::fs::read_to_string(lab.path("run.yaml")).unwrap();
    let yaml = yaml.replace("source: reward-format", "source: own.wasm");
    lab.write("run.yaml", yaml + "swap_shadow_steps: 1\n");
    let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join("../plugins/dist/reward-format.wasm");
    let before = std::fs::read(shipped).unwrap();
    lab.write("own.wasm", &before);
    let child = lab.run_until(1, "a", &format!("{ENDLESS} --watch-plugins --out a"));
    // Half a file is no component; the whole one that follows is looked at again.
    let ones = guest::scoring_after_ones("");
    lab.write("own.wasm", &ones[..ones.len() / 2]);
    std::thread::park_timeout(Duration::from_millis(700));
    lab.write("own.wasm", &ones);
    let record = journal(&lab, "a", 1).swap_remove(0);
    assert_eq!(record.plugin.digest, digest(&ones));
    some_steps(&lab, "a", 2);
    let ended = stop(child);
    assert!(
        ended.stderr.contains("warning: swap: refused: "),
        "{ended:?}"
    );
    let all = rollouts(&lab, "a");
    assert!(
        all.iter()
            .all(|r| r.step < record.step || r.reward == Some(1.0))
    );
    assert!(
        all.iter()
            .any(|r| r.step < record.step && scored_by(r).1 == digest(&before))
    );
    // The run has copies of both.
    replays(&lab, "a");
    let last = lab.metrics("a").last().unwrap()["step"].as_u64().unwrap();
    lab.run(&format!("--quiet --resume a --steps {}", last + 1))
        .fine();
    assert_eq!(lab.metrics("a").last().unwrap()["reward"], 1.0);
}

#[test]
fn what_cannot_be_swapped_is_said_so() {
    let lab = Lab::new();
    lab.run("train --config run.yaml --steps 1 --quiet --out done")
        .fine();
    assert!(!lab.path("done/control/socket").exists());
    let ended = lab.run("plugin swap done reward reward-math");
    let (error, hint) = ended.refused(1);
    assert_eq!(error, "no run is going on in done");
    assert!(hint.contains("--resume done"), "{hint}");
    let error = lab
        .run("plugin swap none reward reward-math")
        .refused(1)
        .0
        .to_owned();
    assert_eq!(error, "none is not a run directory: it has no config.yaml");
    let child = lab.run_until(1, "a", &format!("{ENDLESS} --out a"));
    for (args, reason) in [
        (
            "curriculum formatter-chat",
            "`formatter-chat` is a formatter, not a curriculum",
        ),
        (
            "formatter-chat curriculum-kde",
            "`curriculum-kde` is a curriculum, not a formatter",
        ),
        (
            "reward-math reward-math",
            "no plugin of the run is called `reward-math`",
        ),
        (
            "reward formatter-chat",
            "`formatter-chat` is a formatter, not a reward",
        ),
        ("reward reward-math", "unknown field"),
        ("reward nosuch.wasm", "cannot read plugin `nosuch.wasm`"),
        (
            "reward reward-math --config {} --limits {\"fuel\":0}",
            "limit `fuel` is 0",
        ),
    ] {
        let ended = lab.run(&format!("plugin swap a {args}"));
        let (error, _) = ended.refused(1);
        assert!(
            error.starts_with("refused: ") && error.contains(reason),
            "{error}"
        );
    }
    assert_eq!(read_swaps(&lab.path("a")).unwrap(), []);
    stop(child);
}

/// Bad versions of every kind, while batches are in flight: none scores a sample that counts, and the run is what it would
/// have been without them.
#[test]
fn hostile_43_swaps_to_bad_versions() {
    let lab = Lab::new();
    lab.write("rubbish.wasm", "\0asm rubbish");
    lab.write("traps.wasm", guest::scoring("(unreachable)"));
    lab.write(
        "spins.wasm",
        guest::scoring("(loop $again (br $again)) (unreachable)"),
    );
    let evil = trap_at_real_prompts();
    lab.write("evil.wasm", &evil);
    let child = lab.run_until(1, "a", &format!("{ENDLESS} --out a"));
    for (args, reason) in [
        ("rubbish.wasm --now", "not a WebAssembly component"),
        (
            "traps.wasm --now",
            "conformance: fails on an empty completion",
        ),
        (
            "spins.wasm --now --limits {\"deadline_ms\":50}",
            "ran past its deadline of 50 ms",
        ),
        ("evil.wasm --shadow 1", "failed on 16 of 16 samples"),
        (
            "evil.wasm --shadow 1 --limits {\"on_failure\":\"abort\"}",
            "trapped",
        ),
    ] {
        let ended = lab.run(&format!("plugin swap a reward {args}"));
        let (error, _) = ended.refused(1);
        assert!(
            error.starts_with("refused: ") && error.contains(reason),
            "{error}"
        );
    }
    for policy in ["skip", "abort"] {
        let limits = format!("{{\"on_failure\":\"{policy}\"}}");
        let ended = lab.run(&format!(
            "plugin swap a reward evil.wasm --now --limits {limits}"
        ));
        let (error, hint) = ended.refused(1);
        assert!(error.starts_with("rolled back at step "), "{error}");
        assert!(hint.contains("failures/"), "{hint}");
    }
    some_steps(&lab, "a", 2);
    stop(child);

    undisturbed(&lab);
    saved_cases(&lab, &evil);
}

/// What two promotions that were rolled back leave of the run `a`: everything.
fn undisturbed(lab: &Lab) {
    let events: Vec<_> = journal(lab, "a", 4)
        .iter()
        .map(|r| (r.event, r.step))
        .collect();
    use SwapEvent::{Promoted, RolledBack};
    let [
        (Promoted, p),
        (RolledBack, b),
        (Promoted, q),
        (RolledBack, c),
    ] = events[..]
    else {
        panic!("{events:?}")
    };
    assert_eq!((p, q), (b, c), "it did not outlast its first wave");
    for rollout in rollouts(lab, "a") {
        assert_eq!(scored_by(&rollout).0, "reward-format");
        assert!(rollout.reward.is_some(), "{:?}", rollout.skip);
    }
    replays(lab, "a");
    let last = lab.metrics("a").last().unwrap()["step"].as_u64().unwrap();
    let as_long = ENDLESS.replace("100000", &last.to_string());
    lab.run(&format!("{as_long} --out b")).fine();
    let mut found = lab.metrics("a");
    for line in &mut found {
        line.retain(|key, _| !key.starts_with("swap/"));
    }
    let same = found
        .iter()
        .zip(lab.metrics("b"))
        .filter(|(a, b)| *a == b)
        .count();
    assert_eq!(same, found.len());
}

/// The failing calls are there to be made again.
fn saved_cases(lab: &Lab, evil: &[u8]) {
    let hex = digest(evil);
    let folder = lab.path("a/failures").join(format!("evil-{}", &hex[7..19]));
    let text = std::fs::read_to_string(folder.join("cases.jsonl")).unwrap();
    let cases: Vec<Value> = text
        .lines()
        .map(|l| serde_json::from_str(l).unwrap())
        .collect();
    assert_eq!(
        cases.len(),
        17,
        "16 of the wave that was skipped, 1 that aborted"
    );
    for case in &cases {
        assert_eq!(case["expect"]["error"], "trap");
        assert!(case["row"]["question"].is_string() && case["completion"].is_string());
    }
    let call = std::fs::read(folder.join("call.json")).unwrap();
    let call: Value = serde_json::from_slice(&call).unwrap();
    assert_eq!((&call["digest"], &call["seed"]), (&hex.into(), &5.into()));
    let kept = lab.path("a").join(call["component"].as_str().unwrap());
    assert_eq!(std::fs::read(kept).unwrap(), evil);
}

/// Whoever can reach the socket can waste threads of the control channel and nothing else.
#[test]
fn hostile_43_clients_that_stall_flood_or_send_rubbish() {
    let lab = Lab::new();
    let child = lab.run_until(1, "a", &format!("{ENDLESS} --out a"));
    let socket = lab.path("a/control/socket");
    let connect = || UnixStream::connect(&socket).unwrap();
    let idle: Vec<UnixStream> = (0..4).map(|_| connect()).collect();
    for text in ["{}\n", "\0\u{1b}[2J\n", "[[[[[[[[[[[[\n", "{\"role\":1}\n"] {
        let mut stream = connect();
        stream.write_all(text.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.contains("\"state\":\"refused\""), "{answer}");
        assert!(!answer.contains('\u{1b}'), "{answer}");
    }
    for _ in 0..200 {
        drop(connect());
    }
    some_steps(&lab, "a", 5);
    drop(idle);
    let swap = format!("plugin swap a reward reward-format --now --json --config {OTHER}");
    let begun = Instant::now();
    // The flood is worked off in no time, but not in none.
    let mut ended = lab.run(&swap);
    while ended.status.code() != Some(0) && begun.elapsed() < PATIENCE {
        ended = lab.run(&swap);
    }
    assert_eq!(
        states(&ended.fine().json()),
        ["compiled", "promoted", "kept"]
    );
    stop(child);
}
