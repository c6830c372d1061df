//! The component: budget, outcomes, picks and state across the border.

use crate::buckets::Config;
use crate::plan::{self, plan};
use crate::report::{COLUMNS, Report};
use std::cell::RefCell;

wit_bindgen::generate!({ path: "../../wit/v0.1", world: "curriculum" });

use exports::grpo::plugin::planning::Guest;
use grpo::plugin::types::{Budget, Metric, Outcome, Pick, PluginError, StepPlan, Table};

struct CurriculumKde;

thread_local! {
    static CONFIG: RefCell<Config> = RefCell::new(Config::default());
}

impl Guest for CurriculumKde {
    fn configure(config: String) -> Result<(), PluginError> {
        CONFIG.set(Config::parse(&config).map_err(PluginError::Config)?);
        Ok(())
    }

    fn plan(
        state: Vec<u8>,
        outcomes: Vec<Outcome>,
        budget: Budget,
    ) -> Result<StepPlan, PluginError> {
        let config = CONFIG.with_borrow(|c| *c);
        let budget = plan::Budget {
            rows: budget.rows,
            prompts: budget.prompts,
            group_size: budget.group_size,
            seed: budget.seed,
        };
        let outcomes = outcomes.iter().map(|o| (o.row, o.rewards.as_slice()));
        let planned = plan(&config, &state, outcomes, &budget).map_err(PluginError::Input)?;
        let pick = |(row, rollouts)| Pick { row, rollouts };
        let metric = |(name, value)| Metric { name, value };
        Ok(StepPlan {
            picks: planned.picks.into_iter().map(pick).collect(),
            epoch: planned.epoch,
            state: planned.state,
            metrics: planned.metrics.into_iter().map(metric).collect(),
            report: planned.reports.into_iter().map(table).collect(),
        })
    }
}

fn table(report: Report) -> Table {
    Table {
        title: report.title,
        columns: COLUMNS.map(str::to_owned).to_vec(),
        rows: report.rows,
        notes: report.notes,
    }
}

export!(CurriculumKde);
