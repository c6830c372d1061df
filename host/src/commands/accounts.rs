//! What judges were asked, as tables and JSON have it.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::{Map, Value};

use super::warn;
use crate::judge::{Panel, Usage};

/// A judge's account.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(super) struct Asked {
    asked: u64,
    cached: u64,
    requests: u64,
    retries: u64,
    failures: u64,
    tokens: u64,
    cost: f64,
}

impl Asked {
    /// From the metrics of all sessions of a run.
    pub(super) fn of(lines: &[Map<String, Value>], judge: &str) -> Self {
        let total = |name: &str| -> f64 {
            let metric = format!("judge/{judge}/{name}");
            let value = |line: &Map<String, Value>| line.get(&metric)?.as_f64();
            lines.iter().filter_map(value).sum()
        };
        Self {
            asked: total("asked") as u64,
            cached: total("cached") as u64,
            requests: total("requests") as u64,
            retries: total("retries") as u64,
            failures: total("failures") as u64,
            tokens: (total("prompt_tokens") + total("completion_tokens")) as u64,
            cost: total("cost"),
        }
    }

    pub(super) fn show(&self, judge: &str) -> String {
        let Self {
            asked,
            cached,
            requests,
            retries,
            failures,
            tokens,
            cost,
        } = self;
        let cost = match *cost > 0.0 {
            true => format!(", cost {cost:.4}"),
            false => String::new(),
        };
        format!(
            "{judge}: {asked} questions, {cached} cached, {failures} unanswered   ({requests} requests, {retries} \
             of them retries; {tokens} tokens{cost})"
        )
    }
}

impl From<Usage> for Asked {
    fn from(usage: Usage) -> Self {
        Self {
            asked: usage.asked,
            cached: usage.cached,
            requests: usage.requests,
            retries: usage.retries,
            failures: usage.failures,
            tokens: usage.prompt_tokens + usage.completion_tokens,
            cost: usage.cost,
        }
    }
}

/// Says what judges had to say, and gives the accounts of those that were asked anything, by their names.
pub(super) fn settle(judges: &Panel) -> BTreeMap<String, Asked> {
    judges.take_notes().iter().for_each(|note| warn(note));
    let usage = judges.take_usage().into_iter();
    let asked = usage.filter(|(_, usage)| usage.asked > 0);
    asked
        .map(|(name, usage)| (name, Asked::from(usage)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn line(json: Value) -> Map<String, Value> {
        serde_json::from_value(json).unwrap()
    }

    #[test]
    fn a_judge_is_accounted_for_over_all_steps() {
        let step = |asked: u32, cost: f64| {
            line(json!({
                "judge/a/asked": asked, "judge/a/cached": 1, "judge/a/requests": 2, "judge/a/retries": 1,
                "judge/a/failures": 0, "judge/a/prompt_tokens": 10, "judge/a/completion_tokens": 5,
                "judge/a/cost": cost, "judge/ab/asked": 100,
            }))
        };
        let asked = Asked::of(&[step(3, 0.25), line(json!({})), step(4, 0.5)], "a");
        assert_eq!(
            asked.show("a"),
            "a: 7 questions, 2 cached, 0 unanswered   (4 requests, 2 of them retries; 30 tokens, cost 0.7500)"
        );
        let free = Asked::of(&[step(3, 0.0)], "a");
        assert!(free.show("a").ends_with("15 tokens)"), "{free:?}");
    }
}
