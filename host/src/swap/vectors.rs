//! Conformance: what a candidate must be able to score before it sees a step.

use crate::{
    plugin::{PluginError, RewardPlugin},
    types::{Finish, Parsed, Sample, Score, Telemetry},
};

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
            Self::Fails { .. } => {
                "a reward says `skip` of what it cannot judge; `plugin check` takes its settings and limits"
                    .to_owned()
            }
            Self::Differs { .. } => "a reward is a function of its arguments".to_owned(),
        })
    }
}

/// Scores texts that completions turn out to be, of a row and prompt of the run, and then once more.
///
/// # Errors
/// The first failure, and the first verdict that is another at the second time.
pub(super) fn check(
    reward: &RewardPlugin,
    row: &str,
    prompt: &str,
) -> Result<(), ConformanceError> {
    let long = "0 ".repeat(LONG / 2);
    let vectors: [(&'static str, &str, Finish); 6] = [
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
        ("a completion of 32 KiB", &long, Finish::Length),
    ];
    let parsed = Parsed::default();
    let sample = |completion, finish| Sample {
        row_id: 0,
        row_json: row,
        prompt,
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
    for (what, completion, finish) in vectors {
        let first: Option<Score> = one(what, completion, finish)?;
        let second = one(what, completion, finish)?;
        if word(&first) != word(&second) {
            let (first, second) = (word(&first), word(&second));
            return Err(ConformanceError::Differs {
                what,
                first,
                second,
            });
        }
    }
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
