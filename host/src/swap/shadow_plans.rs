//! Shadowing of a curriculum: what a candidate would have planned of the same outcomes.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::shadow::thread_seconds;
use crate::{
    plugin::{CurriculumPlugin, PluginError},
    types::{Budget, Outcome, Pick, Plan},
};

/// What the curriculum that counts was asked, and planned.
pub struct TappedPlan {
    pub state: Vec<u8>,
    pub outcomes: Vec<Outcome>,
    pub budget: Budget,
    pub picks: Vec<Pick>,
}

/// What has been found so far.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PlanReport {
    pub plans: u64,
    /// Different rows of the plans that count, and those of them that it planned for the same step.
    pub rows: u64,
    pub shared: u64,
    /// Completions that it planned, and those of the plans that count.
    pub planned: u64,
    pub live_planned: u64,
    /// Whether it goes on from the run's state; otherwise it began with an empty one.
    pub takes_state: bool,
    /// Microseconds of processor time for a plan.
    pub micros: Option<f64>,
}

impl PlanReport {
    /// Share of the planned rows that it planned too.
    pub fn overlap(&self) -> Option<f64> {
        (self.rows > 0).then(|| self.shared as f64 / self.rows as f64)
    }
}

impl std::fmt::Display for PlanReport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let state = match self.takes_state {
            true => "takes the run's state",
            false => "begins with an empty state",
        };
        write!(
            f,
            "{} plans, {} of {} rows shared, {} completions (now {}), {state}",
            self.plans, self.shared, self.rows, self.planned, self.live_planned
        )?;
        match self.micros {
            Some(micros) => write!(f, ", {micros:.1} µs a plan"),
            None => Ok(()),
        }
    }
}

/// Sums over the steps of one candidate, and its own state where it does not take the run's.
#[derive(Default)]
pub(super) struct PlanShadow {
    report: PlanReport,
    own: Option<Vec<u8>>,
    seconds: f64,
}

impl PlanShadow {
    /// Plans a step with the candidate.
    ///
    /// # Errors
    /// A failure with the run's state and with its own.
    pub(super) fn add(
        &mut self,
        candidate: &CurriculumPlugin,
        plans: &[TappedPlan],
    ) -> Result<(), PluginError> {
        for tapped in plans {
            let begun = thread_seconds();
            let plan = self.plan(candidate, tapped)?;
            self.seconds += thread_seconds() - begun;
            let rows = |picks: &[Pick]| picks.iter().map(|p| p.row).collect::<BTreeSet<u64>>();
            let sum = |picks: &[Pick]| picks.iter().map(|p| u64::from(p.rollouts)).sum::<u64>();
            let (live, new) = (rows(&tapped.picks), rows(&plan.picks));
            let report = &mut self.report;
            report.plans += 1;
            report.rows += live.len() as u64;
            report.shared += live.intersection(&new).count() as u64;
            report.planned += sum(&plan.picks);
            report.live_planned += sum(&tapped.picks);
        }
        Ok(())
    }

    fn plan(
        &mut self,
        candidate: &CurriculumPlugin,
        tapped: &TappedPlan,
    ) -> Result<Plan, PluginError> {
        let TappedPlan {
            state,
            outcomes,
            budget,
            ..
        } = tapped;
        let plan = match &self.own {
            None => match candidate.plan(state, outcomes, budget) {
                Ok(plan) => return Ok(plan),
                Err(_) => candidate.plan(&[], &[], budget)?,
            },
            Some(own) => candidate.plan(own, outcomes, budget)?,
        };
        self.own = Some(plan.state.clone());
        Ok(plan)
    }

    pub(super) fn report(&self) -> PlanReport {
        let plans = self.report.plans;
        PlanReport {
            takes_state: self.own.is_none(),
            micros: (plans > 0).then(|| self.seconds * 1e6 / plans as f64),
            ..self.report.clone()
        }
    }
}
