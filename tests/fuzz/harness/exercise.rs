//! Calls everything that a component of a role can be asked, and looks at what the host makes of the answers.

use grpo_host::plugin::{Isolation, Limits, Plugin, PluginError, PluginHost, RowText, Warm};
use grpo_host::types::{Budget, Finish, Outcome, Parsed, PromptBody, Sample, Score, Telemetry};
use std::sync::{Arc, OnceLock};

/// One host for all inputs, as in a run: what one guest leaves behind is met by the next.
pub fn host() -> &'static PluginHost {
    static HOST: OnceLock<PluginHost> = OnceLock::new();
    HOST.get_or_init(|| PluginHost::new(Arc::new(|_| {})).expect("the engine starts"))
}

/// Limits of every call. Fuel makes an input's end the same each time; the deadline is for what fuel does not count.
pub fn limits(isolation: Isolation) -> Limits {
    Limits {
        deadline_ms: 200,
        wall_ms: 2000,
        memory_mib: 8,
        fuel: Some(1 << 20),
        isolation,
        ..Limits::default()
    }
}

/// Loads a component with `config` and calls it with `texts`; a refusal is a result like any other.
pub fn component(bytes: &[u8], config: &serde_json::Value, texts: &[&str], isolation: Isolation) {
    let prepared = match host().prepare("fuzzed", bytes, &limits(isolation)) {
        Ok(prepared) => prepared,
        Err(error) => return refused(&error),
    };
    for warm in [None, serde_json::from_str::<Warm>(r#"{"size": 1}"#).ok()] {
        match prepared.configure(config, warm) {
            Ok(plugin) => call(&plugin, texts),
            Err(error) => refused(&error),
        }
    }
}

/// Calls a plugin with `texts`. Whatever it answers, the host's result is checked or refused.
pub fn call(plugin: &Plugin, texts: &[&str]) {
    match plugin {
        Plugin::Reward(_) => assert_eq!(scores(plugin, texts).len(), texts.len()),
        Plugin::Formatter(formatter) => {
            let rows: Vec<_> = (0..)
                .zip(texts)
                .map(|(id, json)| RowText { id, json })
                .collect();
            match formatter.format(&rows) {
                Ok(prompts) => {
                    assert_eq!(prompts.len(), rows.len());
                    for prompt in prompts {
                        assert!(
                            prompt.stop.len() <= 64 && prompt.stop.iter().all(|s| !s.is_empty())
                        );
                        match prompt.body {
                            PromptBody::Text(text) => assert!((1..=1 << 20).contains(&text.len())),
                            PromptBody::Messages(messages) => {
                                assert!(!messages.is_empty());
                                messages.iter().for_each(|m| assert_name(&m.role));
                            }
                        }
                    }
                }
                Err(error) => refused(&error),
            }
            match formatter.parse(texts) {
                Ok(parsed) => assert_eq!(parsed.len(), texts.len()),
                Err(error) => refused(&error),
            }
        }
        Plugin::Curriculum(_) => plan(plugin, texts.first().map_or(&[][..], |t| t.as_bytes())),
    }
}

/// The checked scores of a reward.
fn scores(plugin: &Plugin, texts: &[&str]) -> Vec<Score> {
    let Plugin::Reward(reward) = plugin else {
        return Vec::new();
    };
    let parsed = Parsed::default();
    let samples: Vec<_> = (0..)
        .zip(texts)
        .map(|(row_id, completion)| Sample {
            row_id,
            row_json: "{}",
            prompt: "p",
            completion,
            parsed: &parsed,
            finish: Finish::Stop,
            telemetry: Telemetry::default(),
        })
        .collect();
    let scoring = reward.score(&samples).expect("what fails is skipped");
    scoring.faults.iter().for_each(refused);
    for score in &scoring.scores {
        match score {
            Score::Skip(reason) => assert_line(reason),
            Score::Value(scored) => {
                assert!(scored.total.abs() <= 1e9, "{scored:?}");
                assert!(scored.parts.len() <= 64);
                for (i, (name, value)) in scored.parts.iter().enumerate() {
                    assert_name(name);
                    assert!(value.abs() <= 1e9, "{scored:?}");
                    assert!(scored.parts[..i].iter().all(|(other, _)| other != name));
                }
            }
        }
    }
    let skips = scoring
        .scores
        .iter()
        .filter(|s| matches!(s, Score::Skip(_)))
        .count();
    assert!(scoring.failed as usize <= skips, "{scoring:?}");
    scoring.scores
}

fn plan(plugin: &Plugin, state: &[u8]) {
    let Plugin::Curriculum(curriculum) = plugin else {
        return;
    };
    let budget = Budget {
        step: 3,
        rows: 100,
        prompts: 4,
        group_size: 8,
        seed: 7,
    };
    let outcome = Outcome {
        row: 5,
        rewards: vec![0.0, 1.0],
        skipped: 1,
    };
    match curriculum.plan(state, &[outcome], &budget) {
        Ok(plan) => {
            assert!(
                !plan.picks.is_empty() && plan.picks.iter().all(|p| p.row < 100 && p.rollouts > 0)
            );
            assert!(
                plan.picks
                    .iter()
                    .map(|p| u64::from(p.rollouts))
                    .sum::<u64>()
                    <= 8 * 32
            );
            assert!(plan.epoch.is_finite() && plan.epoch >= 0.0);
            assert!(plan.metrics.iter().all(|(_, value)| value.is_finite()));
            plan.metrics.iter().for_each(|(name, _)| assert_name(name));
            for table in &plan.report {
                let cells = table
                    .rows
                    .iter()
                    .flatten()
                    .chain(&table.columns)
                    .chain(&table.notes);
                cells
                    .chain([&table.title])
                    .for_each(|text| assert_line(text));
                assert!(
                    table
                        .rows
                        .iter()
                        .all(|row| row.len() == table.columns.len())
                );
            }
        }
        Err(error) => refused(&error),
    }
}

/// What the user reads of a failure: a line, and a hint.
fn refused(error: &PluginError) {
    let line = error.to_string();
    assert!(!line.trim().is_empty());
    assert_line(&line);
    assert!(line.len() < 1 << 14, "{} bytes: {line}", line.len());
    let hint = error.hint().unwrap_or_else(|| panic!("no hint: {line}"));
    assert_line(&hint);
}

fn assert_name(name: &str) {
    assert!((1..=64).contains(&name.len()), "{name:?}");
    assert_line(name);
}

/// Nothing in it moves the cursor of a terminal.
fn assert_line(text: &str) {
    assert!(!text.chars().any(char::is_control), "{text:?}");
}
