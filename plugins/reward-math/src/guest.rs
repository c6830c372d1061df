//! The component: config, rows and scores across the border.

use crate::judge::{Config, Judgement};
use crate::number::Rational;
use serde_json::value::RawValue;
use std::borrow::Cow;
use std::cell::RefCell;
use std::collections::BTreeMap;

wit_bindgen::generate!({ path: "../../wit/v0.1", world: "reward" });

use exports::grpo::plugin::scoring::Guest;
use grpo::plugin::types::{Part, PluginError, Question, Sample, Scored, Verdict};

struct RewardMath;

thread_local! {
    static CONFIG: RefCell<Config> = RefCell::new(Config::default());
}

impl Guest for RewardMath {
    fn configure(config: String) -> Result<(), PluginError> {
        let config =
            serde_json::from_str(&config).map_err(|e| PluginError::Config(e.to_string()))?;
        CONFIG.set(config);
        Ok(())
    }

    fn score(questions: Vec<Question>, samples: Vec<Sample>) -> Result<Vec<Verdict>, PluginError> {
        CONFIG.with_borrow(|config| {
            let golds = questions.iter().map(|question| gold(config, &question.row));
            let golds = golds.collect::<Result<Vec<_>, _>>()?;
            let judge = |sample: &Sample| match &golds[sample.question as usize] {
                Ok(gold) => {
                    let answer = sample.answer.as_deref();
                    value(config.judge(&sample.completion, answer, *gold))
                }
                Err(reason) => Verdict::Skip(reason.clone()),
            };
            Ok(samples.iter().map(judge).collect())
        })
    }
}

/// The number of the row's answer column, or why the row cannot be judged.
fn gold(config: &Config, row: &str) -> Result<Result<Rational, String>, PluginError> {
    let columns: BTreeMap<Cow<str>, &RawValue> =
        serde_json::from_str(row).map_err(|e| PluginError::Input(format!("row: {e}")))?;
    let Some(raw) = columns.get(config.column.as_str()) else {
        let found = columns
            .keys()
            .map(|k| k.as_ref())
            .collect::<Vec<_>>()
            .join(", ");
        let column = &config.column;
        return Err(PluginError::Input(format!(
            "row has no column `{column}`; it has {found}"
        )));
    };
    // A string column holds text; anything else is judged as it is written.
    let text = serde_json::from_str::<Cow<str>>(raw.get()).unwrap_or(Cow::Borrowed(raw.get()));
    Ok(config.gold(&text).ok_or_else(|| {
        let column = &config.column;
        format!("column `{column}` holds no number")
    }))
}

fn value(judgement: Judgement) -> Verdict {
    let part = |name: &str, holds: bool| Part {
        name: name.to_owned(),
        value: f64::from(u8::from(holds)),
    };
    Verdict::Value(Scored {
        total: judgement.total,
        parts: vec![
            part("strict", judgement.strict),
            part("flexible", judgement.flexible),
        ],
    })
}

export!(RewardMath);
