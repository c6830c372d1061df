//! The component: budget, picks and state across the border.

use curriculum_walk::{Format, Walk};
use serde::Deserialize;
use std::cell::RefCell;

wit_bindgen::generate!({ path: "../../wit/v0.1", world: "curriculum" });

use exports::grpo::plugin::planning::Guest;
use grpo::plugin::types::{Budget, Outcome, Pick, PluginError, StepPlan};

/// The plugin's config.
#[derive(Clone, Copy, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Config {
    /// `false` takes the rows in the order of the dataset.
    shuffle: bool,
    /// Completions per row; those of the budget if missing.
    group_size: Option<u32>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            shuffle: true,
            group_size: None,
        }
    }
}

const FORMAT: Format = Format {
    magic: *b"unif",
    version: 1,
};

struct CurriculumUniform;

thread_local! {
    static CONFIG: RefCell<Config> = RefCell::new(Config::default());
}

impl Guest for CurriculumUniform {
    fn configure(config: String) -> Result<(), PluginError> {
        let config: Config =
            serde_json::from_str(&config).map_err(|e| PluginError::Config(e.to_string()))?;
        if config.group_size == Some(0) {
            return Err(PluginError::Config("group_size is 0".to_owned()));
        }
        CONFIG.set(config);
        Ok(())
    }

    fn plan(state: Vec<u8>, _: Vec<Outcome>, budget: Budget) -> Result<StepPlan, PluginError> {
        if budget.rows == 0 {
            return Err(PluginError::Input("the dataset has no rows".to_owned()));
        }
        let config = CONFIG.with_borrow(|c| *c);
        let (mut walk, rest) = Walk::from_bytes(&state, FORMAT, budget.rows, budget.seed)
            .map_err(PluginError::Input)?;
        if !rest.is_empty() {
            let text = format!("state has {} bytes more than expected", rest.len());
            return Err(PluginError::Input(text));
        }
        let rollouts = config.group_size.unwrap_or(budget.group_size);
        let picks = (0..budget.prompts)
            .map(|_| Pick {
                row: walk.next_row(config.shuffle),
                rollouts,
            })
            .collect();
        Ok(StepPlan {
            picks,
            epoch: walk.epochs(),
            state: walk.to_bytes(FORMAT),
            metrics: Vec::new(),
            report: Vec::new(),
        })
    }
}

export!(CurriculumUniform);
