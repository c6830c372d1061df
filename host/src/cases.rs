//! `cases.jsonl`: samples with the rewards that a plugin must give them, and whether it does.
//!
//! Numbers are compared bit for bit. Each case is scored alone in a fresh instance, and those of one config together in
//! one call as well, since a verdict must not depend on the other samples of its call.

use crate::plugin::{Isolation, Limits, OnFailure, Plugin, PluginError, Prepared, RewardPlugin};
use crate::types::{Finish, Parsed, Role, Sample, Score, Telemetry};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::{Map, Value};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// One line of a file of cases.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Case {
    /// What it is about.
    #[serde(default)]
    pub name: String,
    /// For the plugin's `configure`.
    #[serde(default)]
    pub config: Map<String, Value>,
    /// The dataset row.
    #[serde(default)]
    pub row: Map<String, Value>,
    #[serde(default)]
    pub prompt: String,
    pub completion: String,
    /// What the formatter found.
    #[serde(default)]
    pub reasoning: Option<String>,
    #[serde(default)]
    pub answer: Option<String>,
    #[serde(default)]
    pub finish: Ending,
    #[serde(default)]
    pub telemetry: Costs,
    pub expect: Expected,
    /// Line in the file, from 1.
    #[serde(skip)]
    pub line: usize,
}

/// [`Finish`] as a case writes it.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Ending {
    #[default]
    Stop,
    Length,
    Abort,
}

/// [`Telemetry`] as a case writes it; what is left out is 0.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Costs {
    pub latency_ms: f64,
    pub queue_ms: f64,
    pub prefill_ms: f64,
    pub decode_ms: f64,
    pub prompt_tokens: u32,
    pub cached_prompt_tokens: u32,
    pub generated_tokens: u32,
    pub draft_tokens: u32,
    pub accepted_tokens: u32,
    pub kv_bytes: u64,
}

/// What a plugin should say, or did say, of a sample.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(untagged, deny_unknown_fields)]
pub enum Expected {
    Reward {
        total: f64,
        /// All of them; a case that leaves them out asks for none in particular.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        parts: Option<BTreeMap<String, f64>>,
    },
    Skip {
        skip: String,
    },
    /// A [`crate::plugin::Fault::kind`] and its message; a case may leave the message out.
    Error {
        error: String,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        message: Option<String>,
    },
}

/// A file of cases that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CasesError {
    #[error("cannot read the cases in `{}`: {error}", path.display())]
    Read {
        path: PathBuf,
        error: std::io::Error,
    },
    #[error("`{}`, line {line}: {reason}", path.display())]
    Line {
        path: PathBuf,
        line: usize,
        reason: String,
    },
    #[error("`{}` has no cases", path.display())]
    Empty { path: PathBuf },
    #[error("`{name}` is not a {wanted}")]
    AnotherRole { name: String, wanted: Role },
}

impl CasesError {
    /// What the reader can do about it.
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            Self::Read { .. } => "name a file with --cases".to_owned(),
            Self::Line { .. } | Self::Empty { .. } => {
                r#"a case is one line such as {"row": {"answer": "4"}, "completion": "4", "expect": {"total": 1}}; docs/plugins.md has all keys"#
                    .to_owned()
            }
            Self::AnotherRole { wanted, .. } => format!("these are cases of a {wanted}"),
        })
    }
}

/// Reads a file of cases, one JSON object a line; empty lines count for nothing.
///
/// # Errors
/// [`CasesError::Read`], [`CasesError::Line`] for the first line that is no case, and [`CasesError::Empty`].
pub fn read(path: &Path) -> Result<Vec<Case>, CasesError> {
    read_with(path, |line, text| {
        let case = serde_json::from_str(text).map(|case| Case { line, ..case });
        case.map_err(|error| reason_of(text, &error))
    })
}

/// The same for cases of other roles, with the number of their line.
///
/// # Errors
/// As [`read`].
pub fn read_as<T: DeserializeOwned>(path: &Path) -> Result<Vec<(usize, T)>, CasesError> {
    read_with(path, |line, text| {
        let case = serde_json::from_str(text).map(|case| (line, case));
        case.map_err(|error| format!("not a case: {error}"))
    })
}

fn read_with<T>(
    path: &Path,
    parse: impl Fn(usize, &str) -> Result<T, String>,
) -> Result<Vec<T>, CasesError> {
    let text = std::fs::read_to_string(path).map_err(|error| CasesError::Read {
        path: path.to_owned(),
        error,
    })?;
    let lines = (1..)
        .zip(text.lines())
        .filter(|(_, text)| !text.trim().is_empty());
    let case = |(line, text): (usize, &str)| {
        parse(line, text).map_err(|reason| CasesError::Line {
            path: path.to_owned(),
            line,
            reason,
        })
    };
    let cases: Vec<T> = lines.map(case).collect::<Result<_, _>>()?;
    if cases.is_empty() {
        return Err(CasesError::Empty {
            path: path.to_owned(),
        });
    }
    Ok(cases)
}

/// serde's own words on an `expect` that is none of the three would be about untagged enums.
fn reason_of(text: &str, error: &serde_json::Error) -> String {
    let expect = serde_json::from_str::<Map<String, Value>>(text)
        .ok()
        .and_then(|mut case| case.remove("expect"));
    match expect {
        Some(value) if serde_json::from_value::<Expected>(value.clone()).is_err() => format!(
            "`expect` is {value}; allowed: {{\"total\": …, \"parts\": …}}, {{\"skip\": …}} or {{\"error\": …, \"message\": …}}"
        ),
        _ => format!("not a case: {error}"),
    }
}

/// What became of a case.
#[derive(Clone, Debug, Serialize)]
pub struct Outcome {
    pub line: usize,
    pub name: String,
    /// What the plugin said of the sample alone.
    pub actual: Expected,
    /// Where that is not what was expected, a line each; empty if it is.
    pub differences: Vec<String>,
}

/// Limits under which a failure is an answer and not a matter of policy.
pub fn strict(limits: &Limits) -> Limits {
    Limits {
        on_failure: OnFailure::Abort,
        isolation: Isolation::Batch,
        ..limits.clone()
    }
}

/// Scores all cases with a reward that was prepared under [`strict`] limits.
///
/// # Errors
/// [`CasesError::AnotherRole`]. What the plugin does wrong is an outcome.
pub fn run(prepared: &Prepared, cases: &[Case]) -> Result<Vec<Outcome>, CasesError> {
    let mut configs: BTreeMap<String, Vec<usize>> = BTreeMap::new();
    for (index, case) in cases.iter().enumerate() {
        let config = Value::Object(case.config.clone()).to_string();
        configs.entry(config).or_default().push(index);
    }
    let mut outcomes: Vec<Option<Outcome>> = vec![None; cases.len()];
    for indices in configs.values() {
        let group: Vec<&Case> = indices.iter().map(|&index| &cases[index]).collect();
        let of_group = with_one_config(prepared, &group)?;
        for (&index, outcome) in indices.iter().zip(of_group) {
            outcomes[index] = Some(outcome);
        }
    }
    Ok(outcomes.into_iter().flatten().collect())
}

fn with_one_config(prepared: &Prepared, cases: &[&Case]) -> Result<Vec<Outcome>, CasesError> {
    let config = cases.first().map(|case| case.config.clone());
    let plugin = match prepared.configure(&Value::Object(config.unwrap_or_default()), None) {
        Ok(Plugin::Reward(plugin)) => plugin,
        Ok(other) => {
            let name = other.id().name.clone();
            let wanted = Role::Reward;
            return Err(CasesError::AnotherRole { name, wanted });
        }
        Err(error) => {
            let refused = |case: &&Case| outcome(case, of_error(&error));
            return Ok(cases.iter().map(refused).collect());
        }
    };
    let texts: Vec<Texts> = cases.iter().map(|case| Texts::of(case)).collect();
    let alone = |(case, texts): (&&Case, &Texts)| {
        let said = score(&plugin, &[texts.sample(case)]);
        let said = said.map(|mut scores| scores.pop());
        let actual = match said {
            Ok(Some(score)) => of_score(score),
            Ok(None) => of_text("result", "no score"),
            Err(error) => of_error(&error),
        };
        outcome(case, actual)
    };
    let mut outcomes: Vec<Outcome> = cases.iter().zip(&texts).map(alone).collect();
    compare_together(&plugin, cases, &texts, &mut outcomes);
    Ok(outcomes)
}

/// Scores those that have a verdict in one call, and notes where it is another.
fn compare_together(
    plugin: &RewardPlugin,
    cases: &[&Case],
    texts: &[Texts],
    outcomes: &mut [Outcome],
) {
    let judged = |outcome: &Outcome| !matches!(outcome.actual, Expected::Error { .. });
    let kept: Vec<usize> = (0..cases.len()).filter(|&i| judged(&outcomes[i])).collect();
    if kept.len() < 2 {
        return;
    }
    let samples: Vec<Sample<'_>> = kept.iter().map(|&i| texts[i].sample(cases[i])).collect();
    let others = kept.len() - 1;
    match score(plugin, &samples) {
        Ok(scores) => {
            for (&index, score) in kept.iter().zip(scores) {
                let outcome = &mut outcomes[index];
                let found = differences(&outcome.actual, &of_score(score));
                let found = found.into_iter();
                let found = found.map(|text| format!("in one call with {others} others: {text}"));
                outcome.differences.extend(found);
            }
        }
        Err(error) => {
            let text = format!("in one call with {others} others: {}", error.fault);
            for index in kept {
                outcomes[index].differences.push(text.clone());
            }
        }
    }
}

fn score(plugin: &RewardPlugin, samples: &[Sample<'_>]) -> Result<Vec<Score>, PluginError> {
    plugin.score(samples).map(|scoring| scoring.scores)
}

/// What a [`Sample`] borrows.
struct Texts {
    row: String,
    parsed: Parsed,
}

impl Texts {
    fn of(case: &Case) -> Self {
        Self {
            row: Value::Object(case.row.clone()).to_string(),
            parsed: Parsed {
                reasoning: case.reasoning.clone(),
                answer: case.answer.clone(),
            },
        }
    }

    fn sample<'a>(&'a self, case: &'a Case) -> Sample<'a> {
        let costs = case.telemetry;
        Sample {
            row_id: case.line as u64,
            row_json: &self.row,
            prompt: &case.prompt,
            completion: &case.completion,
            parsed: &self.parsed,
            finish: match case.finish {
                Ending::Stop => Finish::Stop,
                Ending::Length => Finish::Length,
                Ending::Abort => Finish::Abort,
            },
            telemetry: Telemetry {
                latency_ms: costs.latency_ms,
                queue_ms: costs.queue_ms,
                prefill_ms: costs.prefill_ms,
                decode_ms: costs.decode_ms,
                prompt_tokens: costs.prompt_tokens,
                cached_prompt_tokens: costs.cached_prompt_tokens,
                generated_tokens: costs.generated_tokens,
                draft_tokens: costs.draft_tokens,
                accepted_tokens: costs.accepted_tokens,
                kv_bytes: costs.kv_bytes,
            },
        }
    }
}

fn outcome(case: &Case, actual: Expected) -> Outcome {
    Outcome {
        line: case.line,
        name: case.name.clone(),
        differences: differences(&case.expect, &actual),
        actual,
    }
}

fn of_score(score: Score) -> Expected {
    match score {
        Score::Skip(skip) => Expected::Skip { skip },
        Score::Value(scored) => Expected::Reward {
            total: scored.total,
            parts: Some(scored.parts.into_iter().collect()),
        },
    }
}

fn of_error(error: &PluginError) -> Expected {
    of_text(error.fault.kind(), &error.fault.to_string())
}

fn of_text(kind: &str, message: &str) -> Expected {
    Expected::Error {
        error: kind.to_owned(),
        message: Some(message.to_owned()),
    }
}

fn differences(expected: &Expected, actual: &Expected) -> Vec<String> {
    use Expected::{Error, Reward, Skip};
    match (expected, actual) {
        (
            Reward { total, parts },
            Reward {
                total: is,
                parts: are,
            },
        ) => {
            let mut found = Vec::from_iter(unequal("total", Some(*total), Some(*is)));
            if let (Some(parts), Some(are)) = (parts, are) {
                let names: BTreeSet<_> = parts.keys().chain(are.keys()).collect();
                for name in names {
                    let (expected, actual) = (parts.get(name).copied(), are.get(name).copied());
                    found.extend(unequal(&format!("part `{name}`"), expected, actual));
                }
            }
            found
        }
        (Skip { skip }, Skip { skip: said }) if skip == said => Vec::new(),
        (
            Error { error, message },
            Error {
                error: kind,
                message: said,
            },
        ) if error == kind && (message.is_none() || message == said) => Vec::new(),
        _ => vec![format!("expected {}, got {}", word(expected), word(actual))],
    }
}

/// Says how two numbers differ, if a bit of them does.
fn unequal(what: &str, expected: Option<f64>, actual: Option<f64>) -> Option<String> {
    match (expected, actual) {
        (Some(expected), Some(actual)) if expected.to_bits() != actual.to_bits() => Some(format!(
            "{what}: expected {expected:?}, got {actual:?} (off by {:e})",
            actual - expected
        )),
        (Some(expected), None) => Some(format!("{what}: expected {expected:?}, got none")),
        (None, Some(actual)) => Some(format!("{what}: expected none, got {actual:?}")),
        _ => None,
    }
}

fn word(expected: &Expected) -> String {
    match expected {
        Expected::Reward { total, .. } => format!("a total of {total:?}"),
        Expected::Skip { skip } => format!("a skip, {skip:?}"),
        Expected::Error { error, message } => match message {
            Some(message) => format!("an error of kind {error}, {message:?}"),
            None => format!("an error of kind {error}"),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::defaults;
    use crate::plugin::PluginHost;
    use std::sync::Arc;

    fn cases(lines: &str) -> Result<Vec<Case>, CasesError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cases.jsonl");
        std::fs::write(&path, lines).unwrap();
        read(&path)
    }

    fn outcomes(plugin: &str, lines: &str) -> Vec<Vec<String>> {
        let host = PluginHost::new(Arc::new(|_| {})).unwrap();
        let bytes = defaults::component(plugin).unwrap();
        let limits = strict(&Limits::default());
        let prepared = host.prepare(plugin, bytes, &limits).unwrap();
        let outcomes = run(&prepared, &cases(lines).unwrap()).unwrap();
        outcomes.into_iter().map(|o| o.differences).collect()
    }

    #[test]
    fn every_difference_is_told() {
        let lines = r#"
            {"row": {"answer": "4"}, "completion": "4", "expect": {"total": 1, "parts": {"strict": 0, "flexible": 1}}}
            {"row": {"answer": "4"}, "completion": "5", "expect": {"total": 0.5, "parts": {"strict": 0, "other": 2}}}
            {"row": {"answer": "4"}, "completion": "5", "expect": {"skip": "why"}}
            {"row": {"answer": "x"}, "completion": "5", "expect": {"skip": "column `answer` holds no number"}}
            {"row": {}, "completion": "5", "expect": {"error": "input"}}
            {"row": {}, "completion": "5", "expect": {"error": "config", "message": "a"}}
            {"config": {"colum": 1}, "completion": "5", "expect": {"error": "config"}}
            {"row": {"answer": "4"}, "completion": "5", "expect": {"total": -0.0, "parts": {"strict": 0, "flexible": 0}}}"#;
        let found = outcomes("reward-math", lines);
        assert_eq!(found[0], [""; 0]);
        assert_eq!(
            found[1],
            [
                "total: expected 0.5, got 0.0 (off by -5e-1)",
                "part `flexible`: expected none, got 0.0",
                "part `other`: expected 2.0, got none",
            ]
        );
        assert_eq!(found[2], ["expected a skip, \"why\", got a total of 0.0"]);
        assert_eq!((found[3].len(), found[4].len(), found[6].len()), (0, 0, 0));
        assert!(
            found[5][0]
                .starts_with("expected an error of kind config, \"a\", got an error of kind input")
        );
        assert_eq!(found[7], ["total: expected -0.0, got 0.0 (off by 0e0)"]);
    }

    #[test]
    fn lines_that_are_no_cases_are_named() {
        let reason = |text: &str| cases(text).unwrap_err().to_string();
        assert!(reason("\n{\"completion\": 3}").contains("cases.jsonl`, line 2: not a case"));
        let odd = reason(r#"{"completion": "a", "expect": {"totl": 1}}"#);
        assert!(odd.contains(r#"`expect` is {"totl":1}; allowed:"#), "{odd}");
        assert!(reason(r#"{"completion": "a", "expect": {"total": 1}, "b": 1}"#).contains("`b`"));
        assert!(matches!(cases("\n"), Err(CasesError::Empty { .. })));
    }
}
