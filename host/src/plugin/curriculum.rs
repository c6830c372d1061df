//! A curriculum plugin: state and outcomes in, the next step's plan out.

use super::check;
use super::error::{Call, PluginError};
use super::sandbox::{Loaded, Session, Wall};
use super::v0_1::{planning, wit};
use crate::types::{Budget, Outcome, Plan, PluginId};

/// A loaded curriculum.
pub struct CurriculumPlugin {
    loaded: Loaded,
    exports: planning::GuestIndices,
    metrics: check::Names,
}

impl CurriculumPlugin {
    pub(super) fn new(loaded: Loaded) -> Result<Self, PluginError> {
        let exports = planning::GuestIndices::new(&loaded.pre).map_err(|e| loaded.misfit(&e))?;
        let plugin = Self {
            loaded,
            exports,
            metrics: check::Names::default(),
        };
        plugin.open(plugin.loaded.wall())?;
        Ok(plugin)
    }

    /// Role, name and digest.
    pub fn id(&self) -> &PluginId {
        &self.loaded.id
    }

    /// Plans one step in a fresh instance: `state` is that of the plan before, empty at first.
    ///
    /// # Errors
    /// After the retries of `on_failure: retry`. A plan outside dataset or budget is an error, and so
    /// is a state that the plugin does not recognise ([`super::GuestErrorKind::Input`]).
    pub fn plan(
        &self,
        state: &[u8],
        outcomes: &[Outcome],
        budget: &Budget,
    ) -> Result<Plan, PluginError> {
        let wall = self.loaded.wall();
        let lowered: Vec<wit::Outcome<'_>> = outcomes.iter().map(lower).collect();
        let shown = wit::Budget {
            step: budget.step,
            rows: budget.rows,
            prompts: budget.prompts,
            group_size: budget.group_size,
            seed: budget.seed,
        };
        self.loaded.with_retries(|| {
            let (mut session, guest) = self.open(wall)?;
            let plan = self.loaded.call(&mut session, Call::Plan, |store, _| {
                guest.call_plan(store, state, &lowered, shown)
            })?;
            let checked = check::plan(plan, budget)
                .and_then(|plan| self.metrics.admit(&plan.metrics).map(|()| plan));
            checked.map_err(|fault| self.loaded.error(Call::Plan, fault))
        })
    }

    fn open(&self, wall: Wall) -> Result<(Session, planning::Guest), PluginError> {
        let mut session = self.loaded.start(wall, false)?;
        let guest = self
            .loaded
            .call(&mut session, Call::Configure, |store, instance| {
                let guest = self.exports.load(&mut *store, instance)?;
                let configured = guest.call_configure(store, &self.loaded.config)?;
                Ok(configured.map(|()| guest))
            })?;
        Ok((session, guest))
    }
}

fn lower(outcome: &Outcome) -> wit::Outcome<'_> {
    wit::Outcome {
        row: outcome.row,
        rewards: &outcome.rewards,
        skipped: outcome.skipped,
    }
}
