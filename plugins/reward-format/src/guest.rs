//! The component: config, completions and scores across the border.

use crate::shape::{Checker, Config};
use std::cell::RefCell;

wit_bindgen::generate!({ path: "../../wit/v0.1", world: "reward" });

use exports::grpo::plugin::scoring::Guest;
use grpo::plugin::types::{Part, PluginError, Question, Sample, Scored, Verdict};

struct RewardFormat;

thread_local! {
    static CHECKER: RefCell<Checker> = RefCell::new(Checker::default());
}

impl Guest for RewardFormat {
    fn configure(config: String) -> Result<(), PluginError> {
        let config: Config =
            serde_json::from_str(&config).map_err(|e| PluginError::Config(e.to_string()))?;
        CHECKER.set(Checker::new(config).map_err(PluginError::Config)?);
        Ok(())
    }

    fn score(_: Vec<Question>, samples: Vec<Sample>) -> Result<Vec<Verdict>, PluginError> {
        CHECKER.with_borrow(|checker| Ok(samples.iter().map(|s| score(checker, s)).collect()))
    }
}

fn score(checker: &Checker, sample: &Sample) -> Verdict {
    let verdict = checker.check(&sample.completion);
    let part = |(name, value): (&str, f64)| Part {
        name: name.to_owned(),
        value,
    };
    Verdict::Value(Scored {
        total: verdict.total,
        parts: verdict.parts.into_iter().map(part).collect(),
    })
}

export!(RewardFormat);
