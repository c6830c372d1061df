//! The component: config, lengths and scores across the border.

use crate::form::Config;
use std::cell::Cell;

wit_bindgen::generate!({ path: "../../wit/v0.1", world: "reward" });

use exports::grpo::plugin::scoring::Guest;
use grpo::plugin::host::sample_telemetry;
use grpo::plugin::types::{Part, PluginError, Question, Sample, Scored, Telemetry, Verdict};

struct RewardLength;

thread_local! {
    static CONFIG: Cell<Config> = Cell::new(Config::default());
}

impl Guest for RewardLength {
    fn configure(config: String) -> Result<(), PluginError> {
        CONFIG.set(Config::parse(&config).map_err(PluginError::Config)?);
        Ok(())
    }

    fn score(_: Vec<Question>, _: Vec<Sample>) -> Result<Vec<Verdict>, PluginError> {
        let config = CONFIG.get();
        let costs = sample_telemetry();
        Ok(costs.iter().map(|cost| score(&config, cost)).collect())
    }
}

fn score(config: &Config, telemetry: &Telemetry) -> Verdict {
    let tokens = telemetry.generated_tokens;
    Verdict::Value(Scored {
        total: config.reward(tokens),
        parts: vec![Part {
            name: "tokens".to_owned(),
            value: f64::from(tokens),
        }],
    })
}

export!(RewardLength);
