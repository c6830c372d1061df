//! `cases.jsonl` of formatters and curricula: prompts, answers and plans that a plugin must give, and whether it does.
//!
//! Everything is asked twice, since a plugin is a function of its arguments. Numbers are compared bit for bit.

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value, json};

use crate::{
    cases::{self, CasesError},
    plugin::{CurriculumPlugin, FormatterPlugin, Plugin, PluginError, Prepared, RowText},
    types::{Budget, Outcome as RowOutcome, Plan, Prompt, PromptBody, Role},
};

/// What became of a case.
#[derive(Clone, Debug, Serialize)]
pub struct Outcome {
    pub line: usize,
    pub name: String,
    /// What the plugin said.
    pub actual: Value,
    /// Where that is not what was expected, a line each; empty if it is.
    pub differences: Vec<String>,
}

impl Outcome {
    /// That of a reward's case.
    ///
    /// # Errors
    /// Never: what was said is made of texts and finite numbers.
    pub fn of_reward(outcome: cases::Outcome) -> serde_json::Result<Self> {
        Ok(Self {
            line: outcome.line,
            name: outcome.name,
            actual: serde_json::to_value(outcome.actual)?,
            differences: outcome.differences,
        })
    }
}

/// A row with its prompt, or a completion with what is read out of it.
#[derive(Clone, Debug, Deserialize)]
#[serde(try_from = "WrittenCase")]
pub struct FormatterCase {
    name: String,
    config: Map<String, Value>,
    asked: Asked,
    expect: Map<String, Value>,
}

#[derive(Clone, Debug)]
enum Asked {
    Row(Map<String, Value>),
    Completion(String),
}

/// As it stands in a file.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenCase {
    #[serde(default)]
    name: String,
    #[serde(default)]
    config: Map<String, Value>,
    row: Option<Map<String, Value>>,
    completion: Option<String>,
    /// Of a row `messages` or `text`, and `stop`; of a completion `reasoning` and `answer`; or `error` and `message`. What is left
    /// out may be anything.
    expect: Map<String, Value>,
}

impl TryFrom<WrittenCase> for FormatterCase {
    type Error = String;

    fn try_from(case: WrittenCase) -> Result<Self, Self::Error> {
        let asked = match (case.row, case.completion) {
            (Some(row), None) => Asked::Row(row),
            (None, Some(completion)) => Asked::Completion(completion),
            _ => return Err("it has either a `row` or a `completion`".to_owned()),
        };
        check_expected(
            &case.expect,
            match &asked {
                Asked::Row(_) => &["messages", "text", "stop"],
                Asked::Completion(_) => &["reasoning", "answer"],
            },
        )?;
        if case.expect.is_empty() {
            return Err(NOTHING_EXPECTED.to_owned());
        }
        Ok(Self {
            name: case.name,
            config: case.config,
            asked,
            expect: case.expect,
        })
    }
}

const NOTHING_EXPECTED: &str = "it expects nothing";

/// Refuses an `expect` with a key that no answer could have.
fn check_expected(expect: &Said, keys: &[&str]) -> Result<(), String> {
    let keys = || keys.iter().copied().chain(["error", "message"]);
    match expect
        .keys()
        .find(|key| !keys().any(|known| known == key.as_str()))
    {
        None => Ok(()),
        Some(odd) => {
            let all: Vec<_> = keys().map(|key| format!("`{key}`")).collect();
            Err(format!(
                "`expect` has a key `{odd}`; allowed: {}",
                all.join(", ")
            ))
        }
    }
}

/// Plans that follow one another; the state of each is handed to the next.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CurriculumCase {
    #[serde(default)]
    name: String,
    #[serde(default)]
    config: Map<String, Value>,
    /// What the first plan is handed.
    #[serde(default)]
    state: String,
    #[serde(deserialize_with = "expecting")]
    plans: Vec<PlanCase>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct PlanCase {
    rows: u64,
    prompts: u32,
    #[serde(default = "eight")]
    group_size: u32,
    #[serde(default)]
    seed: u64,
    #[serde(default)]
    outcomes: Vec<OutcomeCase>,
    /// `picks` (row and rollouts each), `epoch` and `metrics`; or `error` and `message`. What is left out may be anything.
    expect: Map<String, Value>,
}

fn expecting<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<PlanCase>, D::Error> {
    let plans = Vec::<PlanCase>::deserialize(from)?;
    for plan in &plans {
        let checked = check_expected(&plan.expect, &["picks", "epoch", "metrics", "state"]);
        checked.map_err(serde::de::Error::custom)?;
    }
    match plans.iter().all(|plan| plan.expect.is_empty()) {
        true => Err(serde::de::Error::custom(NOTHING_EXPECTED)),
        false => Ok(plans),
    }
}

fn eight() -> u32 {
    8
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct OutcomeCase {
    row: u64,
    rewards: Vec<f64>,
    #[serde(default)]
    skipped: u32,
}

/// Runs all cases of a formatter.
///
/// # Errors
/// [`CasesError::AnotherRole`]. What the plugin does wrong is an outcome.
pub fn run_formatter(
    prepared: &Prepared,
    cases: &[(usize, FormatterCase)],
) -> Result<Vec<Outcome>, CasesError> {
    let run = |(line, case): &(usize, FormatterCase)| {
        let actual = match configured(prepared, &case.config) {
            Ok(Plugin::Formatter(plugin)) => twice(|| format(&plugin, *line, &case.asked)),
            Ok(other) => return Err(another(&other, Role::Formatter)),
            Err(error) => of_error(&error),
        };
        let differences = differences("", &case.expect, &actual);
        Ok(outcome(
            *line,
            &case.name,
            Value::Object(actual),
            differences,
        ))
    };
    cases.iter().map(run).collect()
}

/// Runs all cases of a curriculum.
///
/// # Errors
/// As [`run_formatter`].
pub fn run_curriculum(
    prepared: &Prepared,
    cases: &[(usize, CurriculumCase)],
) -> Result<Vec<Outcome>, CasesError> {
    let run = |(line, case): &(usize, CurriculumCase)| {
        let (actual, differences) = match configured(prepared, &case.config) {
            Ok(Plugin::Curriculum(plugin)) => plans(&plugin, case),
            Ok(other) => return Err(another(&other, Role::Curriculum)),
            Err(error) => {
                let said = of_error(&error);
                let expected = case.plans.first().map(|plan| &plan.expect);
                let found = expected.map_or_else(Vec::new, |e| differences("", e, &said));
                (vec![Value::Object(said)], found)
            }
        };
        Ok(outcome(
            *line,
            &case.name,
            Value::Array(actual),
            differences,
        ))
    };
    cases.iter().map(run).collect()
}

fn outcome(line: usize, name: &str, actual: Value, differences: Vec<String>) -> Outcome {
    Outcome {
        line,
        name: name.to_owned(),
        actual,
        differences,
    }
}

fn configured(prepared: &Prepared, config: &Map<String, Value>) -> Result<Plugin, PluginError> {
    prepared.configure(&Value::Object(config.clone()), None)
}

fn another(plugin: &Plugin, wanted: Role) -> CasesError {
    CasesError::AnotherRole {
        name: plugin.id().name.clone(),
        wanted,
    }
}

type Said = Map<String, Value>;

/// The answer, or both where the second is another.
fn twice(mut ask: impl FnMut() -> Said) -> Said {
    let (first, second) = (ask(), ask());
    match first == second {
        true => first,
        false => object([
            ("first", Value::Object(first)),
            ("second", Value::Object(second)),
        ]),
    }
}

fn object<const N: usize>(entries: [(&str, Value); N]) -> Said {
    let entries = entries.into_iter();
    entries
        .map(|(key, value)| (key.to_owned(), value))
        .collect()
}

fn of_error(error: &PluginError) -> Said {
    let message = error.fault.to_string();
    object([
        ("error", error.fault.kind().into()),
        ("message", message.into()),
    ])
}

fn format(plugin: &FormatterPlugin, line: usize, asked: &Asked) -> Said {
    let said = match asked {
        Asked::Row(row) => {
            let json = Value::Object(row.clone()).to_string();
            let row = RowText {
                id: line as u64,
                json: &json,
            };
            plugin
                .format(&[row])
                .map(|prompts| prompts.iter().map(of_prompt).next())
        }
        Asked::Completion(text) => plugin.parse(&[text]).map(|parsed| {
            let of = |p: &crate::types::Parsed| {
                object([
                    ("reasoning", json!(p.reasoning)),
                    ("answer", json!(p.answer)),
                ])
            };
            parsed.iter().map(of).next()
        }),
    };
    said.map_or_else(|error| of_error(&error), Option::unwrap_or_default)
}

fn of_prompt(prompt: &Prompt) -> Said {
    let body = match &prompt.body {
        PromptBody::Text(text) => ("text", json!(text)),
        PromptBody::Messages(messages) => ("messages", json!(messages)),
    };
    object([body, ("stop", json!(prompt.stop))])
}

/// What each plan was, and where one is not what was expected; none is made behind a failure.
fn plans(plugin: &CurriculumPlugin, case: &CurriculumCase) -> (Vec<Value>, Vec<String>) {
    let mut state = case.state.clone().into_bytes();
    let (mut said, mut found) = (Vec::new(), Vec::new());
    for (step, wanted) in (0..).zip(&case.plans) {
        let budget = Budget {
            step,
            rows: wanted.rows,
            prompts: wanted.prompts,
            group_size: wanted.group_size,
            seed: wanted.seed,
        };
        let outcome = |o: &OutcomeCase| RowOutcome {
            row: o.row,
            rewards: o.rewards.clone(),
            skipped: o.skipped,
        };
        let outcomes: Vec<RowOutcome> = wanted.outcomes.iter().map(outcome).collect();
        let mut next = None;
        let actual = twice(|| match plugin.plan(&state, &outcomes, &budget) {
            Ok(plan) => {
                let said = of_plan(&plan);
                next = Some(plan.state);
                said
            }
            Err(error) => of_error(&error),
        });
        let place = format!("plan {}: ", step + 1);
        found.extend(differences(&place, &wanted.expect, &actual));
        said.push(Value::Object(actual));
        match next {
            Some(next) => state = next,
            None => break,
        }
    }
    if said.len() < case.plans.len() {
        found.push(format!(
            "{} plans were not made",
            case.plans.len() - said.len()
        ));
    }
    (said, found)
}

fn of_plan(plan: &Plan) -> Said {
    let picks: Vec<_> = plan
        .picks
        .iter()
        .map(|p| json!([p.row, p.rollouts]))
        .collect();
    let metrics: BTreeMap<&str, f64> = plan
        .metrics
        .iter()
        .map(|(name, value)| (name.as_str(), *value))
        .collect();
    let state = String::from_utf8_lossy(&plan.state);
    object([
        ("picks", picks.into()),
        ("epoch", plan.epoch.into()),
        ("metrics", json!(metrics)),
        ("state", state.into()),
    ])
}

/// Every expected key whose value is another, or is not there.
fn differences(place: &str, expected: &Said, actual: &Said) -> Vec<String> {
    let mut found = Vec::new();
    for (key, wanted) in expected {
        match actual.get(key) {
            Some(is) if same(wanted, is) => {}
            Some(is) => found.push(format!("{place}{key}: expected {wanted}, got {is}")),
            None => {
                let said = Value::Object(actual.clone());
                found.push(format!("{place}{key}: expected {wanted}, got {said}"));
            }
        }
    }
    found
}

/// JSON writes one number in several ways.
fn same(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Number(a), Value::Number(b)) => {
            a == b || a.as_f64().map(f64::to_bits) == b.as_f64().map(f64::to_bits)
        }
        (Value::Array(a), Value::Array(b)) => {
            a.len() == b.len() && a.iter().zip(b).all(|(a, b)| same(a, b))
        }
        (Value::Object(a), Value::Object(b)) => {
            let other = |key: &String| b.get(key);
            a.len() == b.len() && a.iter().all(|(k, a)| other(k).is_some_and(|b| same(a, b)))
        }
        _ => a == b,
    }
}
