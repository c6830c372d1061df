//! The curriculum: rows in the order of the dataset, again and again, but for those that were mastered when they were last
//! answered. Once all are, it begins anew.

use serde_json::{Map, Value, json};
use std::cell::Cell;
use std::collections::BTreeSet;

wit_bindgen::generate!({ path: "wit", world: "curriculum" });

use exports::grpo::plugin::planning::Guest;
use grpo::plugin::types::{Budget, Metric, Outcome, Pick, PluginError, StepPlan};

thread_local! {
    /// The plugin's `config`: the mean reward from which on a row is mastered.
    static MASTERED: Cell<f64> = const { Cell::new(1.0) };
}

/// What is known from plan to plan.
#[derive(Default)]
struct State {
    /// Rows that have been passed so far, over all epochs.
    position: u64,
    mastered: BTreeSet<u64>,
}

struct Plugin;

impl Guest for Plugin {
    fn configure(config: String) -> Result<(), PluginError> {
        let config: Map<String, Value> =
            serde_json::from_str(&config).map_err(|e| PluginError::Config(e.to_string()))?;
        for (key, value) in &config {
            if key != "mastered" {
                return Err(PluginError::Config(format!("unknown setting `{key}`")));
            }
            let number = value.as_f64();
            let number = number
                .ok_or_else(|| PluginError::Config(format!("`{key}` must be a number")))?;
            MASTERED.set(number);
        }
        Ok(())
    }

    fn plan(
        state: Vec<u8>,
        outcomes: Vec<Outcome>,
        budget: Budget,
    ) -> Result<StepPlan, PluginError> {
        let mut state = State::read(&state, budget.rows).map_err(PluginError::Input)?;
        state.learn(&outcomes, budget.rows);
        let rows = state.next_rows(&budget);
        let rollouts = budget.group_size;
        let metric = Metric {
            name: "mastered".to_owned(),
            value: state.mastered.len() as f64,
        };
        Ok(StepPlan {
            picks: rows.into_iter().map(|row| Pick { row, rollouts }).collect(),
            epoch: state.position as f64 / budget.rows as f64,
            state: state.write(budget.rows),
            metrics: vec![metric],
            report: vec![],
        })
    }
}

impl State {
    /// An empty blob is a beginning.
    fn read(blob: &[u8], rows: u64) -> Result<Self, String> {
        if blob.is_empty() {
            return Ok(Self::default());
        }
        let foreign = || "state is none of this curriculum's".to_owned();
        let value: Value = serde_json::from_slice(blob).map_err(|_| foreign())?;
        let was = value["rows"].as_u64().ok_or_else(foreign)?;
        if was != rows {
            return Err(format!(
                "state was made for {was} rows, the dataset has {rows}"
            ));
        }
        let mastered = value["mastered"].as_array().ok_or_else(foreign)?;
        let mastered: Option<_> = mastered.iter().map(Value::as_u64).collect();
        Ok(Self {
            position: value["position"].as_u64().ok_or_else(foreign)?,
            mastered: mastered.ok_or_else(foreign)?,
        })
    }

    fn write(&self, rows: u64) -> Vec<u8> {
        let value = json!({ "rows": rows, "position": self.position, "mastered": self.mastered });
        value.to_string().into_bytes()
    }

    fn learn(&mut self, outcomes: &[Outcome], rows: u64) {
        for outcome in outcomes.iter().filter(|o| !o.rewards.is_empty()) {
            let mean = outcome.rewards.iter().sum::<f64>() / outcome.rewards.len() as f64;
            if mean >= MASTERED.get() {
                self.mastered.insert(outcome.row);
            } else {
                self.mastered.remove(&outcome.row);
            }
        }
        if self.mastered.len() as u64 == rows {
            self.mastered.clear();
        }
    }

    /// As many rows as the budget has prompts, none of them twice.
    fn next_rows(&mut self, budget: &Budget) -> Vec<u64> {
        let mut picked = Vec::new();
        for _ in 0..budget.rows {
            if picked.len() as u64 == u64::from(budget.prompts) {
                break;
            }
            let row = self.position % budget.rows;
            self.position += 1;
            if !self.mastered.contains(&row) {
                picked.push(row);
            }
        }
        picked
    }
}

export!(Plugin);
