//! Results of guests: converted to our types only if every number and size in them is sane.
//!
//! Wrong values are not the sandbox's business, and they would do more harm than a trap: a NaN in one
//! reward spoils every weight of the model.

mod names;
mod tables;

pub(super) use names::Names;

use super::error::Fault;
use super::grants::Secrets;
use super::log::{is_printable, printable};
use super::v0_1::wit;
use crate::types::{Budget, Message, Parsed, Pick, Plan, Prompt, PromptBody, Score, Scored};

/// Rewards beyond this lose the precision that group statistics need.
pub(super) const MAX_REWARD: f64 = 1e9;
const MAX_NAMED: usize = 64;
const MAX_NAME_BYTES: usize = 64;
const MAX_REASON_BYTES: usize = 256;
const MAX_PROMPT_BYTES: usize = 1 << 20;
const MAX_STOPS: usize = 64;
const MAX_ROLE_BYTES: usize = 64;
const MAX_PARSED_BYTES: usize = 1 << 20;
const MAX_STATE_BYTES: usize = 8 << 20;
/// A plan may ask for this many times the completions of its budget.
const MAX_PLAN_FACTOR: u64 = 8;

/// Exactly one result per input.
pub(super) fn length<T>(results: Vec<T>, expected: usize) -> Result<Vec<T>, Fault> {
    match results.len() {
        found if found == expected => Ok(results),
        found => Err(Fault::Length { expected, found }),
    }
}

pub(super) fn score(verdict: wit::Verdict, secrets: &Secrets) -> Result<Score, Fault> {
    let scored = match verdict {
        wit::Verdict::Skip(reason) => {
            let reason = secrets.redact(&reason);
            return Ok(Score::Skip(printable(&reason, MAX_REASON_BYTES)));
        }
        wit::Verdict::Value(scored) => scored,
    };
    number(|| "total".to_owned(), scored.total, MAX_REWARD)?;
    let parts = scored
        .parts
        .into_iter()
        .map(|p| (secrets.clean(p.name), p.value))
        .collect();
    Ok(Score::Value(Scored {
        total: scored.total,
        parts: named(parts, "part", MAX_REWARD)?,
    }))
}

pub(super) fn prompt(prompt: wit::Prompt, secrets: &Secrets) -> Result<Prompt, Fault> {
    let (body, bytes) = match prompt.body {
        wit::PromptBody::Text(text) => {
            if text.is_empty() {
                return Err(bad("an empty prompt"));
            }
            let bytes = text.len();
            (PromptBody::Text(secrets.clean(text)), bytes)
        }
        wit::PromptBody::Messages(messages) => {
            if messages.is_empty() {
                return Err(bad("a prompt without messages"));
            }
            if messages.iter().any(|m| m.role.is_empty()) {
                return Err(bad("a message without a role"));
            }
            if let Some(m) = messages.iter().find(|m| !is_name(&m.role, MAX_ROLE_BYTES)) {
                let role = printable(&secrets.redact(&m.role), 100);
                return Err(bad(&format!("a message with the role `{role}`")));
            }
            let bytes = messages
                .iter()
                .map(|m| m.role.len() + m.content.len())
                .sum();
            let message = |m: wit::Message| Message {
                role: secrets.clean(m.role),
                content: secrets.clean(m.content),
            };
            (
                PromptBody::Messages(messages.into_iter().map(message).collect()),
                bytes,
            )
        }
    };
    size("stop texts of one prompt", prompt.stop.len(), MAX_STOPS)?;
    let bytes = bytes + prompt.stop.iter().map(String::len).sum::<usize>();
    size("bytes of one prompt", bytes, MAX_PROMPT_BYTES)?;
    if prompt.stop.iter().any(String::is_empty) {
        return Err(bad("an empty stop text"));
    }
    Ok(Prompt {
        body,
        stop: prompt.stop.into_iter().map(|s| secrets.clean(s)).collect(),
    })
}

pub(super) fn parsed(parsed: wit::Parsed, secrets: &Secrets) -> Result<Parsed, Fault> {
    let texts = [&parsed.reasoning, &parsed.answer];
    let bytes = texts.into_iter().flatten().map(String::len).sum();
    size("bytes of one parsed completion", bytes, MAX_PARSED_BYTES)?;
    Ok(Parsed {
        reasoning: parsed.reasoning.map(|text| secrets.clean(text)),
        answer: parsed.answer.map(|text| secrets.clean(text)),
    })
}

pub(super) fn plan(plan: wit::StepPlan, budget: &Budget) -> Result<Plan, Fault> {
    if plan.picks.is_empty() {
        return Err(bad("a plan without picks"));
    }
    if let Some(pick) = plan.picks.iter().find(|p| p.row >= budget.rows) {
        let (row, rows) = (pick.row, budget.rows);
        return Err(bad(&format!("row {row} of a dataset with {rows} rows")));
    }
    if let Some(pick) = plan.picks.iter().find(|p| p.rollouts == 0) {
        return Err(bad(&format!("no rollouts for row {}", pick.row)));
    }
    let found: u64 = plan.picks.iter().map(|p| u64::from(p.rollouts)).sum();
    let wanted = u64::from(budget.prompts) * u64::from(budget.group_size);
    let limit = wanted.saturating_mul(MAX_PLAN_FACTOR);
    if found > limit {
        let what = "completions in one plan";
        return Err(Fault::Size { what, found, limit });
    }
    number(|| "epoch".to_owned(), plan.epoch, f64::MAX)?;
    if plan.epoch < 0.0 {
        return Err(bad(&format!("epoch {}", plan.epoch)));
    }
    size("bytes of state", plan.state.len(), MAX_STATE_BYTES)?;
    let metrics = plan
        .metrics
        .into_iter()
        .map(|m| (m.name, m.value))
        .collect();
    let pick = |p: wit::Pick| Pick {
        row: p.row,
        rollouts: p.rollouts,
    };
    Ok(Plan {
        picks: plan.picks.into_iter().map(pick).collect(),
        epoch: plan.epoch,
        state: plan.state,
        metrics: named(metrics, "metric", f64::MAX)?,
        report: tables::report(plan.report)?,
    })
}

/// Few names, each short, printable, unique, with a sane number.
fn named(
    values: Vec<(String, f64)>,
    what: &'static str,
    limit: f64,
) -> Result<Vec<(String, f64)>, Fault> {
    size("named numbers", values.len(), MAX_NAMED)?;
    for (i, (name, value)) in values.iter().enumerate() {
        if !is_name(name, MAX_NAME_BYTES) {
            let name = printable(name, 100);
            return Err(bad(&format!("a {what} named `{name}`")));
        }
        // At most 64 short names: comparing them all costs less than a hash set.
        if values[..i].iter().any(|(other, _)| other == name) {
            return Err(bad(&format!("two {what}s named `{name}`")));
        }
        number(|| format!("{what} `{name}`"), *value, limit)?;
    }
    Ok(values)
}

/// Whether a text is short, not empty, and looks the same wherever it is printed.
fn is_name(name: &str, max: usize) -> bool {
    (1..=max).contains(&name.len()) && is_printable(name)
}

fn number(what: impl FnOnce() -> String, value: f64, limit: f64) -> Result<(), Fault> {
    if value.abs() <= limit {
        return Ok(());
    }
    let what = what();
    Err(Fault::Number { what, value, limit })
}

fn size(what: &'static str, found: usize, limit: usize) -> Result<(), Fault> {
    if found <= limit {
        return Ok(());
    }
    let (found, limit) = (found as u64, limit as u64);
    Err(Fault::Size { what, found, limit })
}

fn bad(what: &str) -> Fault {
    Fault::BadResult {
        what: what.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BUDGET: Budget = Budget {
        step: 0,
        rows: 10,
        prompts: 2,
        group_size: 4,
        seed: 0,
    };

    fn planned(picks: &[(u64, u32)], epoch: f64) -> Result<Plan, Fault> {
        let pick = |&(row, rollouts): &(u64, u32)| wit::Pick { row, rollouts };
        let picks = picks.iter().map(pick).collect();
        plan(
            wit::StepPlan {
                picks,
                epoch,
                state: vec![1],
                metrics: Vec::new(),
                report: Vec::new(),
            },
            &BUDGET,
        )
    }

    #[test]
    fn plans_stay_within_dataset_and_budget() {
        assert_eq!(planned(&[(9, 64)], 0.5).unwrap().picks[0].row, 9);
        let limit = 64;
        let what = "completions in one plan";
        let too_many = Fault::Size {
            what,
            found: 65,
            limit,
        };
        assert_eq!(planned(&[(9, 64), (0, 1)], 0.5), Err(too_many));
        assert_eq!(
            planned(&[(10, 1)], 0.0),
            Err(bad("row 10 of a dataset with 10 rows"))
        );
        assert_eq!(planned(&[(1, 0)], 0.0), Err(bad("no rollouts for row 1")));
        assert_eq!(planned(&[], 0.0), Err(bad("a plan without picks")));
        assert!(matches!(
            planned(&[(1, 1)], f64::NAN),
            Err(Fault::Number { .. })
        ));
        assert_eq!(planned(&[(1, 1)], -1.0), Err(bad("epoch -1")));
    }

    #[test]
    fn prompts_are_capped() {
        let text = |n: usize, stop: &[&str]| {
            let whole = wit::Prompt {
                body: wit::PromptBody::Text("x".repeat(n)),
                stop: stop.iter().map(|s| (*s).to_owned()).collect(),
            };
            prompt(whole, &Secrets::default())
        };
        assert_eq!(text((1 << 20) - 1, &["a"]).unwrap().stop, ["a"]);
        assert!(matches!(
            text((1 << 20) + 1, &[]),
            Err(Fault::Size {
                found: 1_048_577,
                ..
            })
        ));
        assert_eq!(text(1, &[""]), Err(bad("an empty stop text")));
        assert_eq!(text(0, &[]), Err(bad("an empty prompt")));
        let all_but = text((1 << 20) - 3, &["stop"]);
        assert!(matches!(
            all_but,
            Err(Fault::Size {
                found: 1_048_577,
                ..
            })
        ));
        let body = wit::PromptBody::Messages(Vec::new());
        let stop = Vec::new();
        let empty = prompt(wit::Prompt { body, stop }, &Secrets::default());
        assert_eq!(empty, Err(bad("a prompt without messages")));
    }

    #[test]
    fn parts_have_distinct_names_and_finite_values() {
        let scored = |parts: &[(&str, f64)]| {
            let part = |&(name, value): &(&str, f64)| wit::Part {
                name: name.to_owned(),
                value,
            };
            let parts = parts.iter().map(part).collect();
            let verdict = wit::Verdict::Value(wit::Scored { total: 1.0, parts });
            score(verdict, &Secrets::default())
        };
        assert!(scored(&[("a", 1.0), ("b", -1e9)]).is_ok());
        assert_eq!(
            scored(&[("a", 1.0), ("a", 1.0)]),
            Err(bad("two parts named `a`"))
        );
        assert_eq!(scored(&[("", 1.0)]), Err(bad("a part named ``")));
        assert_eq!(scored(&[("a\n", 1.0)]), Err(bad("a part named `a\\n`")));
        let turned = bad("a part named `a\\u{202e}b`");
        assert_eq!(scored(&[("a\u{202e}b", 1.0)]), Err(turned));
        assert!(matches!(scored(&[("a", 1.1e9)]), Err(Fault::Number { .. })));
    }
}
