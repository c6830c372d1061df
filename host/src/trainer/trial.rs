//! Formatters and curricula that took another's place in a run: what they are on trial for, and the way back. Where one of
//! them fails there is no step, so a single failure is enough.

use super::{RolledBack, Trainer};
use crate::{
    config::PluginConfig,
    plugin::{CurriculumPlugin, FormatterPlugin, Plugin, PluginError},
    run::LockedPlugin,
    swap::shadow_plans::TappedPlan,
    types::{Budget, Outcome, Plan, PluginId, Role, Seat},
};

/// What is known of a formatter or curriculum beyond itself.
#[derive(Default)]
pub struct Trial {
    pub settings: PluginConfig,
    before: Option<Before>,
    undone: Option<Undone>,
}

/// What a rollback brings back.
struct Before {
    plugin: Plugin,
    locked: LockedPlugin,
    settings: PluginConfig,
}

/// A rollback that `plugins.lock` has yet to hear of.
struct Undone {
    step: u64,
    wave: u32,
    to: LockedPlugin,
    reason: String,
}

impl Trial {
    /// Of what the run began with.
    pub(super) fn of(settings: PluginConfig) -> Self {
        Self {
            settings,
            ..Self::default()
        }
    }

    /// Without what a rollback would bring back.
    pub(super) fn forget(&mut self) {
        self.before = None;
    }

    fn promote(
        &mut self,
        before: Plugin,
        settings: PluginConfig,
        entry: &mut LockedPlugin,
        (id, since_step): (PluginId, u64),
    ) {
        let now = LockedPlugin {
            id,
            source: settings.source.clone(),
            weight: None,
            since_step,
            grants: Some(settings.grants.clone()),
        };
        self.before = Some(Before {
            plugin: before,
            locked: std::mem::replace(entry, now),
            settings: std::mem::replace(&mut self.settings, settings),
        });
    }

    /// What was there before, from this step (from 1) and wave on; `None` where there is nobody to go back to.
    fn roll_back(&mut self, (step, wave): (u64, u32), reason: String) -> Option<Plugin> {
        let Before {
            plugin,
            locked,
            settings,
        } = self.before.take()?;
        self.settings = settings;
        self.undone = Some(Undone {
            step,
            wave,
            to: LockedPlugin {
                since_step: step,
                ..locked
            },
            reason,
        });
        Some(plugin)
    }

    /// [`Trial::roll_back`] of a formatter into its place; whether there was one to go back to.
    pub(super) fn roll_back_formatter(
        &mut self,
        formatter: &mut FormatterPlugin,
        at: (u64, u32),
        reason: String,
    ) -> bool {
        let Some(Plugin::Formatter(before)) = self.roll_back(at, reason) else {
            return false;
        };
        *formatter = before;
        true
    }

    /// Enters a rollback into the list of what is loaded.
    fn settle(&mut self, locked: &mut [LockedPlugin], role: Role) -> Option<RolledBack> {
        let Undone {
            step,
            wave,
            to,
            reason,
        } = self.undone.take()?;
        let entry = entry_of(locked, role)?;
        Some(RolledBack {
            step,
            wave,
            seat: Seat { role, slot: 0 },
            from: std::mem::replace(entry, to.clone()),
            to,
            settings: self.settings.clone(),
            reason,
        })
    }
}

fn entry_of(locked: &mut [LockedPlugin], role: Role) -> Option<&mut LockedPlugin> {
    locked.iter_mut().find(|l| l.id.role == role)
}

impl Trainer<'_> {
    pub(super) fn promote_formatter(
        &mut self,
        formatter: FormatterPlugin,
        settings: PluginConfig,
        since: u64,
    ) {
        let id = formatter.id().clone();
        let before = std::mem::replace(&mut self.plugins.formatter, formatter);
        if let Some(entry) = entry_of(&mut self.plugins.locked, Role::Formatter) {
            let trial = &mut self.swaps.formatter;
            trial.promote(Plugin::Formatter(before), settings, entry, (id, since));
        }
    }

    pub(super) fn promote_curriculum(
        &mut self,
        curriculum: CurriculumPlugin,
        settings: PluginConfig,
        since: u64,
    ) {
        let id = curriculum.id().clone();
        let before = std::mem::replace(&mut self.plugins.curriculum, curriculum);
        if let Some(entry) = entry_of(&mut self.plugins.locked, Role::Curriculum) {
            let trial = &mut self.swaps.curriculum;
            trial.promote(Plugin::Curriculum(before), settings, entry, (id, since));
        }
        // A resumed run has the states of both already.
        if since > self.state.step {
            self.state.curriculum_before = Some(self.state.curriculum.clone());
            self.swaps.inherits = true;
        }
    }

    /// Rolls the formatter back if `fault` is its own; whether it did.
    pub(super) fn formatter_gives_way(&mut self, fault: &PluginError) -> bool {
        let formatter = &mut self.plugins.formatter;
        let at = (self.state.step + 1, 0);
        let trial = &mut self.swaps.formatter;
        let guilty = *formatter.id().digest == *fault.digest;
        let gone = guilty && trial.roll_back_formatter(formatter, at, fault.to_string());
        self.settle();
        gone
    }

    /// Has `plugins.locked` say what is loaded after rollbacks.
    pub(super) fn settle(&mut self) {
        let locked = &mut self.plugins.locked;
        let formatter = self.swaps.formatter.settle(locked, Role::Formatter);
        let curriculum = self.swaps.curriculum.settle(locked, Role::Curriculum);
        self.swaps.rolled_back.extend(formatter);
        self.swaps.rolled_back.extend(curriculum);
    }

    /// What the curriculum may spend on a step with `prompts` prompts.
    pub fn budget(&self, prompts: u32) -> Budget {
        Budget {
            step: self.state.step,
            rows: self.rows.train.rows.len() as u64,
            prompts,
            group_size: self.config.generation.num_generations,
            seed: self.config.training.seed,
        }
    }

    /// Asks the curriculum for the plan of a wave. One that has just taken another's place gets that one's state, and an empty
    /// one if it refuses it; if it fails the one before plans, from the state that it had.
    pub(super) fn ask_curriculum(
        &mut self,
        outcomes: &[Outcome],
        budget: &Budget,
        wave: u32,
    ) -> Result<Plan, PluginError> {
        let curriculum = &self.plugins.curriculum;
        let inherits = std::mem::take(&mut self.swaps.inherits);
        let mut planned = curriculum.plan(&self.state.curriculum, outcomes, budget);
        if let (true, false, Err(refused)) = (inherits, self.state.curriculum.is_empty(), &planned)
            && let Ok(plan) = curriculum.plan(&[], &[], budget)
        {
            self.swaps.notes.push(format!(
                "`{}` begins with an empty state, for it does not take that of the curriculum before: {}",
                curriculum.id().name,
                refused.fault
            ));
            planned = Ok(plan);
        }
        if let Err(error) = &planned {
            let at = (self.state.step + 1, wave);
            let before = self.swaps.curriculum.roll_back(at, error.to_string());
            if let Some(Plugin::Curriculum(before)) = before {
                self.state.curriculum = self.state.curriculum_before.take().unwrap_or_default();
                self.plugins.curriculum = before;
                self.settle();
                planned = (self.plugins.curriculum).plan(&self.state.curriculum, outcomes, budget);
            }
        }
        if let (Ok(plan), Some(plans)) = (&planned, &mut self.swaps.plans) {
            plans.push(TappedPlan {
                state: self.state.curriculum.clone(),
                outcomes: outcomes.to_vec(),
                budget: *budget,
                picks: plan.picks.clone(),
            });
        }
        planned
    }
}
