//! The component: budget, picks and state across the border.

use crate::shuffle;
use crate::state::State;
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
        let mut state =
            State::from_bytes(&state, budget.rows, budget.seed).map_err(PluginError::Input)?;
        let rollouts = config.group_size.unwrap_or(budget.group_size);
        let picks = (0..budget.prompts)
            .map(|_| {
                let (epoch, index) = (state.position / state.rows, state.position % state.rows);
                state.position += 1;
                let key = shuffle::mix(state.seed ^ shuffle::mix(epoch));
                let row = if config.shuffle {
                    shuffle::at(key, state.rows, index)
                } else {
                    index
                };
                Pick { row, rollouts }
            })
            .collect();
        #[expect(clippy::cast_precision_loss, reason = "a number for people")]
        let epoch = state.position as f64 / state.rows as f64;
        Ok(StepPlan {
            picks,
            epoch,
            state: state.to_bytes(),
            metrics: Vec::new(),
        })
    }
}

export!(CurriculumUniform);
