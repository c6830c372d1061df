//! Conformance: what a candidate must be able to score, to format and parse, or to plan before it sees a step.

use std::{collections::BTreeMap, path::Path};

use super::shadow_plans::TappedPlan;
use crate::{
    plugin::{Call, CurriculumPlugin, FormatterPlugin, PluginError, RewardPlugin, RowText, digest},
    run::{RunError, read_rollouts, rollout_files},
    types::{Budget, Finish, Outcome, Parsed, Pick, Plan, Sample, Score, Telemetry},
};

/// Stands for the prompt of a completion.
const PROMPT: &str = "What is 2 + 2?";
/// Bytes of the long completion.
const LONG: usize = 32 << 10;

/// A vector that a candidate does not pass.
#[derive(Debug, thiserror::Error)]
pub enum ConformanceError {
    #[error("conformance: fails on {what}")]
    Fails {
        what: &'static str,
        source: PluginError,
    },
    #[error("conformance: says {first} and then {second} of {what}")]
    Differs {
        what: &'static str,
        first: String,
        second: String,
    },
}

impl ConformanceError {
    /// What the reader can do about it.
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            Self::Fails { source, .. } if source.call == Call::Score => {
                "a reward says `skip` of what it cannot judge; `plugin check` takes its settings and limits"
                    .to_owned()
            }
            Self::Fails { source, .. } => return source.hint(),
            Self::Differs { .. } => "a plugin is a function of its arguments".to_owned(),
        })
    }
}

/// Scores texts that completions turn out to be, of a row of the run, and then once more.
///
/// # Errors
/// The first failure, and the first verdict that is another at the second time.
pub(super) fn check(reward: &RewardPlugin, row: &str) -> Result<(), ConformanceError> {
    let long = "0 ".repeat(LONG / 2);
    let parsed = Parsed::default();
    let sample = |completion, finish| Sample {
        row_id: 0,
        row_json: row,
        prompt: PROMPT,
        completion,
        parsed: &parsed,
        finish,
        telemetry: Telemetry::default(),
    };
    let one = |what, completion, finish| {
        let scored = reward.score(&[sample(completion, finish)]);
        let scoring = scored.map_err(|source| ConformanceError::Fails { what, source })?;
        match scoring.faults.into_iter().next() {
            Some(source) => Err(ConformanceError::Fails { what, source }),
            None => Ok(scoring.scores.into_iter().next()),
        }
    };
    for (what, completion, finish) in completions(&long) {
        let first: Option<Score> = one(what, completion, finish)?;
        let second = one(what, completion, finish)?;
        same(what, word(&first), word(&second))?;
    }
    Ok(())
}

/// Texts that completions turn out to be; `long` is one of them.
fn completions(long: &str) -> [(&'static str, &str, Finish); 6] {
    [
        ("an empty completion", "", Finish::Stop),
        ("a completion of one number", "42", Finish::Stop),
        (
            "a completion with tags",
            "<think>2 + 2</think>\n#### 4",
            Finish::Stop,
        ),
        ("an unfinished completion", "<think>2 + ", Finish::Length),
        (
            "a completion with zero bytes and emoji",
            "\0 👩‍🚀 ١٢\u{202e}\r\n",
            Finish::Abort,
        ),
        ("a completion of 32 KiB", long, Finish::Length),
    ]
}

fn same(what: &'static str, first: String, second: String) -> Result<(), ConformanceError> {
    match first == second {
        true => Ok(()),
        false => Err(ConformanceError::Differs {
            what,
            first,
            second,
        }),
    }
}

/// The last logged step of a run: its rows by their place in the data, and its completions. Nothing before the first.
pub(super) fn recent(root: &Path) -> Result<(BTreeMap<u64, String>, Vec<String>), RunError> {
    let mut found = (BTreeMap::new(), Vec::new());
    if let Some((_, path)) = rollout_files(root)?.last() {
        for rollout in read_rollouts(path)? {
            found.0.insert(rollout.row_id, rollout.row);
            found.1.push(rollout.completion.text);
        }
    }
    Ok(found)
}

/// Makes the prompts of a row of the run and of recent ones, and parses texts that completions turn out to be and recent
/// completions, and all that once more.
///
/// # Errors
/// The first failure, and what is another at the second time.
pub(super) fn check_formatter(
    formatter: &FormatterPlugin,
    row: &str,
    (rows, recent): (&BTreeMap<u64, String>, &[String]),
) -> Result<(), ConformanceError> {
    let first = [RowText { id: 0, json: row }];
    let rows = rows.iter().map(|(id, json)| RowText { id: *id, json });
    let rows: Vec<RowText<'_>> = rows.collect();
    for (what, rows) in [
        ("a row of the run", &first[..]),
        ("its last step's rows", &rows),
    ] {
        let format = || {
            let made = formatter.format(rows);
            let made = made.map_err(|source| ConformanceError::Fails { what, source })?;
            Ok(format!("{made:?}"))
        };
        same(what, format()?, format()?)?;
    }
    let parse = |what, texts: &[&str]| {
        let parsed = formatter.parse(texts);
        let parsed = parsed.map_err(|source| ConformanceError::Fails { what, source })?;
        Ok(format!("{parsed:?}"))
    };
    let long = "0 ".repeat(LONG / 2);
    for (what, completion, _) in completions(&long) {
        same(
            what,
            parse(what, &[completion])?,
            parse(what, &[completion])?,
        )?;
    }
    let recent: Vec<&str> = recent.iter().map(String::as_str).collect();
    let what = "its last step's completions";
    same(what, parse(what, &recent)?, parse(what, &recent)?)
}

/// Plans the coming step twice, with the run's state if it takes that and from the beginning if not, and then the step
/// behind it.
///
/// # Errors
/// The first failure, and a second plan that is another than the first.
pub(super) fn check_curriculum(
    curriculum: &CurriculumPlugin,
    next: &TappedPlan,
) -> Result<(), ConformanceError> {
    let plan = |what, state: &[u8], outcomes: &[Outcome], budget: &Budget| {
        let planned = curriculum.plan(state, outcomes, budget);
        planned.map_err(|source| ConformanceError::Fails { what, source })
    };
    let what = "the coming step";
    let (state, outcomes, budget) = (&next.state[..], &next.outcomes[..], &next.budget);
    let (begun, (state, outcomes)) = match plan(what, state, outcomes, budget) {
        Ok(begun) => (begun, (state, outcomes)),
        Err(_) => (plan(what, &[], &[], budget)?, (&[][..], &[][..])),
    };
    let again = plan(what, state, outcomes, budget)?;
    let words = |plan: &Plan| format!("{:?} {:?}", plan.picks, digest(&plan.state));
    same(what, words(&begun), words(&again))?;
    let outcome = |pick: &Pick| Outcome {
        row: pick.row,
        rewards: (0..pick.rollouts).map(|i| f64::from(i % 2)).collect(),
        skipped: 0,
    };
    let outcomes: Vec<Outcome> = begun.picks.iter().map(outcome).collect();
    let budget = Budget {
        step: budget.step + 1,
        ..*budget
    };
    plan("the step behind it", &begun.state, &outcomes, &budget)?;
    Ok(())
}

/// The verdict to the bit.
fn word(score: &Option<Score>) -> String {
    match score {
        None => "nothing".to_owned(),
        Some(Score::Skip(reason)) => format!("skip ({reason})"),
        Some(Score::Value(scored)) => format!("{:?} {:?}", scored.total, scored.parts),
    }
}
