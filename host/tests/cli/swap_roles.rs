//! `plugin swap` and watched plugins for formatters and curricula.

use std::{ops::Range, path::Path};

use grpo_host::{
    plugin::digest,
    run::{LockedPlugin, Rollout, SwapEvent, read_plugins_lock, read_swaps},
    types::Role,
};
use serde_json::Value;

use super::{
    lab::Lab,
    role_guests::{formatting, planning},
    swap::{ENDLESS, journal, replays, rollouts, some_steps, states, stop},
};

/// The component of a role that the log names for a sample.
fn made_by(rollout: &Rollout, role: Role) -> (&str, &str) {
    let id = rollout.plugins.iter().find(|id| id.role == role).unwrap();
    (&id.name, &id.digest)
}

fn copy_shipped(lab: &Lab, name: &str, to: &str) {
    let dist = Path::new(env!("CARGO_MANIFEST_DIR")).join("../plugins/dist");
    std::fs::copy(dist.join(format!("{name}.wasm")), lab.path(to)).unwrap();
}

fn last_step(lab: &Lab) -> u64 {
    let lines = lab.metrics("a");
    lines.last().unwrap()["step"].as_u64().unwrap()
}

#[test]
fn a_formatter_shadows_is_promoted_logged_and_resumed_with() {
    let lab = Lab::new();
    copy_shipped(&lab, "formatter-chat", "own.wasm");
    let child = lab.run_until(2, "a", &format!("{ENDLESS} --out a"));
    let swap = "plugin swap a formatter own.wasm --shadow 2 --json --config {\"template\":\"Q:{question}\"}";
    let events = lab.run(swap).fine().json();
    assert_eq!(
        states(&events),
        ["compiled", "shadowed", "shadowed", "promoted", "kept"]
    );
    let report = &events["events"][2]["report"];
    let of = |name: &str| report[name].as_u64().unwrap();
    assert_eq!((of("prompts"), of("prompts_differ")), (8, 8));
    // It reads completions as the other does.
    assert_eq!(
        (
            of("completions"),
            of("answers_differ"),
            of("reasonings_differ")
        ),
        (32, 0, 0)
    );
    let first = events["events"][3]["step"].as_u64().unwrap();
    std::fs::remove_file(lab.path("own.wasm")).unwrap();
    some_steps(&lab, "a", 2);
    stop(child);

    let record = journal(&lab, "a", 1).swap_remove(0);
    assert_eq!((record.step, record.event), (first, SwapEvent::Promoted));
    assert_eq!((record.plugin.role, record.slot), (Role::Formatter, 0));
    assert_eq!(record.replaced.name, "formatter-chat");
    assert_eq!(record.shadow.unwrap()["prompts_differ"], 8);
    prompts_are_own_from(&lab, first, first + 1);
    let own = |l: &&LockedPlugin| l.id.name == "own" && l.since_step == first;
    let locked = read_plugins_lock(&lab.path("a")).unwrap();
    assert_eq!(locked.iter().filter(own).count(), 1);
    let lines = lab.metrics("a");
    let at = lines.iter().find(|line| line["step"] == first).unwrap();
    assert_eq!(at["swap/promoted"], 1.0);
    let mut shadowed = lines
        .iter()
        .filter_map(|l| l.get("swap/shadow_prompts_differ"));
    assert_eq!(shadowed.next(), Some(&Value::from(1.0)));
    let replayed = lab.run("replay a --json").fine().json();
    assert_eq!(replayed["differing"], 0);
    let others: Vec<(&Value, &Value)> = replayed["others"]
        .as_array()
        .unwrap()
        .iter()
        .map(|p| (&p["name"], &p["since_step"]))
        .collect();
    assert!(
        others.contains(&(&"own".into(), &first.into())),
        "{others:?}"
    );

    let last = last_step(&lab);
    lab.run(&format!("--quiet --resume a --steps {}", last + 2))
        .fine();
    prompts_are_own_from(&lab, first, last + 2);
    replays(&lab, "a");
}

/// The log has prompts of the swapped formatter from step `first` on, and goes to step `last` at least.
fn prompts_are_own_from(lab: &Lab, first: u64, last: u64) {
    let all = rollouts(lab, "a");
    assert!(all.last().unwrap().step >= last);
    for rollout in all {
        let (step, swapped) = (rollout.step, rollout.step >= first);
        assert_eq!(rollout.prompt.contains("Q:"), swapped, "step {step}");
        let name = if swapped { "own" } else { "formatter-chat" };
        assert_eq!(made_by(&rollout, Role::Formatter).0, name, "step {step}");
    }
}

#[test]
fn a_curriculum_begins_anew_says_so_and_a_killed_run_makes_the_swap_again() {
    let lab = Lab::new();
    let mut child = lab.run_until(2, "a", &format!("{ENDLESS} --out a"));
    let events = lab
        .run("plugin swap a curriculum curriculum-kde --shadow 1 --json")
        .fine()
        .json();
    assert_eq!(
        states(&events),
        ["compiled", "shadowed", "promoted", "note", "kept"]
    );
    let report = &events["events"][1]["report"];
    assert_eq!((&report["plans"], &report["rows"]), (&1.into(), &4.into()));
    assert_eq!(report["takes_state"], false);
    let note = events["events"][3]["text"].as_str().unwrap();
    assert!(
        note.starts_with("`curriculum-kde` begins with an empty state"),
        "{note}"
    );
    assert!(
        note.contains("state belongs to another curriculum"),
        "{note}"
    );
    let first = events["events"][2]["step"].as_u64().unwrap();
    some_steps(&lab, "a", 1);
    child.kill().unwrap();
    child.wait().unwrap();
    let rows = |upto: u64| -> Vec<(u64, u64, Vec<u32>)> {
        let all = rollouts(&lab, "a").into_iter().filter(|r| r.step <= upto);
        all.map(|r| (r.step, r.row_id, r.completion.tokens))
            .collect()
    };
    let before = rows(first);
    lab.run(&format!("--quiet --resume a --steps {}", first + 1))
        .fine();
    assert_eq!(rows(first), before);
    for rollout in rollouts(&lab, "a") {
        let name = match rollout.step < first {
            true => "curriculum-uniform",
            false => "curriculum-kde",
        };
        assert_eq!(made_by(&rollout, Role::Curriculum).0, name);
    }
    assert!(
        lab.metrics("a")
            .last()
            .unwrap()
            .contains_key("curriculum/buckets")
    );
    assert_eq!(journal(&lab, "a", 1).len(), 1);
    replays(&lab, "a");
    // With a checkpoint behind the swap, and its states in it.
    assert!(
        lab.path(&format!(
            "a/checkpoints/step-{}/curriculum-before.bin",
            first + 1
        ))
        .exists()
    );
    lab.run(&format!("--quiet --resume a --steps {}", first + 2))
        .fine();
    assert!(
        lab.metrics("a")
            .last()
            .unwrap()
            .contains_key("curriculum/buckets")
    );
}

#[test]
fn bad_formatters_and_curricula_are_refused_or_rolled_back_and_the_run_goes_on() {
    let lab = Lab::new();
    let row = |i: u32| {
        format!(
            "{{\"question\": \"{i} + 1 =\", \"answer\": \"{}\"}}\n",
            i + 1
        )
    };
    lab.write("rows.jsonl", (10..34).map(row).collect::<String>());
    lab.write("format.wasm", formatting("(unreachable)", "", 1));
    lab.write("parse.wasm", formatting("", "(unreachable)", 1));
    lab.write(
        "rows.wasm",
        planning("(i64.store (i32.const 4096) (i64.const 99))", ""),
    );
    lab.write("spins.wasm", planning("(loop $again (br $again))", ""));
    let child = lab.run_until(2, "a", &format!("{ENDLESS} --out a"));
    for (args, reason) in [
        (
            "formatter format.wasm --now",
            "conformance: fails on a row of the run: ",
        ),
        (
            "formatter parse.wasm --now",
            "conformance: fails on an empty completion: ",
        ),
        (
            "curriculum rows.wasm --now",
            "row 99 of a dataset with 20 rows",
        ),
        (
            "curriculum spins.wasm --now --limits {\"deadline_ms\":50}",
            "deadline of 50 ms",
        ),
        (
            "formatter formatter-chat --now --config {\"template\":\"{nosuch}\"}",
            "nosuch",
        ),
    ] {
        let ended = lab.run(&format!("plugin swap a {args}"));
        let (error, hint) = ended.refused(1);
        assert!(
            error.starts_with("refused: ") && error.contains(reason),
            "{error}"
        );
        assert!(!hint.is_empty());
    }
    assert_eq!(read_swaps(&lab.path("a")).unwrap(), []);
    let own = promote_and_lose(&lab);
    some_steps(&lab, "a", 2);
    stop(child);
    for rollout in rollouts(&lab, "a") {
        let mine = own.contains(&rollout.step);
        let name = if mine { "order" } else { "formatter-chat" };
        assert_eq!(made_by(&rollout, Role::Formatter).0, name);
        assert_eq!(rollout.prompt == "x", mine);
    }
    replays(&lab, "a");
    let last = last_step(&lab);
    lab.run(&format!("--quiet --resume a --steps {}", last + 1))
        .fine();
    let all = rollouts(&lab, "a");
    assert_eq!(
        made_by(all.last().unwrap(), Role::Formatter).0,
        "formatter-chat"
    );
}

/// Swaps to a formatter that passes the trial, whose rows stand in order, and traps where they do not; the steps
/// whose prompts it made.
fn promote_and_lose(lab: &Lab) -> Range<u64> {
    // The two digits of neighbours' answers; the answer is the last column of a row.
    let digits = |offset: u32| {
        let text = format!(
            "(i32.add (local.get $at) (i32.add (i32.mul (local.get $i) (i32.const 8)) (i32.const {offset})))"
        );
        let end = format!("(i32.add (i32.load {text}) (i32.load offset=4 {text}))");
        format!(
            "(i32.add (i32.mul (i32.load8_u (i32.sub {end} (i32.const 4))) (i32.const 256)) \
             (i32.load8_u (i32.sub {end} (i32.const 3))))"
        )
    };
    let (this, next) = (digits(0), digits(8));
    let unless_in_order = format!(
        "(block $done (loop $next
          (br_if $done (i32.ge_u (i32.add (local.get $i) (i32.const 1)) (local.get $n)))
          (if (i32.gt_u {this} {next}) (then (unreachable)))
          (local.set $i (i32.add (local.get $i) (i32.const 1)))
          (br $next)))"
    );
    let bytes = formatting(&unless_in_order, "", 1);
    lab.write("order.wasm", &bytes);
    let ended = lab.run("plugin swap a formatter order.wasm --now");
    let (told, digest) = (ended.stdout.clone() + &ended.stderr, digest(&bytes));
    assert!(
        told.contains("rolled back at step") || told.contains("kept after step"),
        "{told}"
    );
    let records = journal(lab, "a", 2);
    assert_eq!(records.len(), 2);
    assert_eq!(
        (records[0].event, &records[0].plugin.digest),
        (SwapEvent::Promoted, &digest)
    );
    assert_eq!(
        (records[1].event, &records[1].replaced.digest),
        (SwapEvent::RolledBack, &digest)
    );
    assert_eq!(records[1].plugin.name, "formatter-chat");
    assert!(records[1].reason.as_ref().unwrap().contains("trapped"));
    records[0].step..records[1].step
}

#[test]
fn a_watched_formatter_that_changes_is_a_candidate() {
    let lab = Lab::new();
    let yaml = std::fs::read_to_string(lab.path("run.yaml")).unwrap();
    let yaml = yaml.replace(
        "prompts_per_step",
        "  - source: own.wasm\nswap_shadow_steps: 1\nprompts_per_step",
    );
    lab.write("run.yaml", yaml);
    copy_shipped(&lab, "formatter-chat", "own.wasm");
    let child = lab.run_until(1, "a", &format!("{ENDLESS} --watch-plugins --out a"));
    lab.write("own.wasm", planning("", ""));
    std::thread::park_timeout(std::time::Duration::from_millis(700));
    let bytes = formatting("", "", 2);
    lab.write("own.wasm", &bytes);
    let record = journal(&lab, "a", 1).swap_remove(0);
    assert_eq!(
        (record.plugin.role, &record.plugin.digest),
        (Role::Formatter, &digest(&bytes))
    );
    some_steps(&lab, "a", 2);
    let ended = stop(child);
    let said = "warning: swap: refused: `own` is a curriculum, not a formatter";
    assert!(ended.stderr.contains(said), "{ended:?}");
    for rollout in rollouts(&lab, "a") {
        assert_eq!(rollout.prompt == "xx", rollout.step >= record.step);
        assert_eq!(
            made_by(&rollout, Role::Formatter).1 == digest(&bytes),
            rollout.step >= record.step
        );
    }
    replays(&lab, "a");
    let last = last_step(&lab);
    lab.run(&format!("--quiet --resume a --steps {}", last + 1))
        .fine();
    assert_eq!(rollouts(&lab, "a").last().unwrap().prompt, "xx");
}
