//! What swapping plugins asks of a step: scoring under supervision, and the way back to the reward before. Formatters and
//! curricula have [`super::trial`].
//!
//! Which candidates there are, and when one is promoted, is the business of `crate::swap`.

use std::collections::VecDeque;

use grpo_policy::engine::Progress;

use super::{Trainer, trial::Trial};
use crate::{
    config::{PluginConfig, RunConfig},
    evaluate::{EvalReport, EvalSettings, Judges, evaluate},
    failures::FailedCall,
    plugin::{Plugin, PluginError, RewardPlugin, RewardSet, SetScoring},
    run::LockedPlugin,
    swap::{shadow::Tap, shadow_plans::TappedPlan},
    types::{PluginId, Role, Row, Sample, Seat},
};

/// Waves over which the failures of a promoted reward are counted.
const WINDOW: usize = 8;
/// Failed calls that are kept of a step.
const MAX_FAILURES: usize = 32;

/// What is known of the plugins beyond themselves; empty where nobody swaps, as in `bench step`.
#[derive(Default)]
pub struct Supervision {
    pub rewards: Watched,
    pub formatter: Trial,
    pub curriculum: Trial,
    /// Whether the next plan is the first of a curriculum that has just taken another's place.
    pub(super) inherits: bool,
    /// Where plans go that a candidate is to make too; `None`: nowhere.
    pub plans: Option<Vec<TappedPlan>>,
    /// What was rolled back since somebody last looked.
    pub rolled_back: Vec<RolledBack>,
    /// What the run's user should know.
    pub notes: Vec<String>,
}

/// What is known of the rewards beyond the set itself.
#[derive(Default)]
pub struct Watched {
    /// One per reward.
    pub slots: Vec<Slot>,
    /// Share of a promoted reward's samples that may fail.
    pub max_failure_rate: f64,
    /// Where samples go that a candidate is to score too.
    pub tap: Option<Tap>,
    /// Rewards that were rolled back since somebody last looked.
    rolled_back: Vec<RolledBack>,
    /// Calls that failed since somebody last looked.
    pub failures: Vec<FailedCall>,
}

/// A place among the rewards.
pub struct Slot {
    pub settings: PluginConfig,
    predecessor: Option<Predecessor>,
}

struct Predecessor {
    reward: RewardPlugin,
    locked: LockedPlugin,
    settings: PluginConfig,
    /// Failed and all samples of its successor, a pair for each wave.
    recent: VecDeque<(u32, u32)>,
}

/// A promoted plugin that had to go.
#[derive(Clone, Debug)]
pub struct RolledBack {
    /// First step and wave of the one before again.
    pub step: u64,
    pub wave: u32,
    pub seat: Seat,
    pub from: LockedPlugin,
    pub to: LockedPlugin,
    pub settings: PluginConfig,
    pub reason: String,
}

impl Supervision {
    /// Of a run with these components, none of them swapped yet.
    pub fn new(config: &RunConfig, locked: &[LockedPlugin]) -> Self {
        let mut supervision = Self::default();
        supervision.rewards.max_failure_rate = config.plugins.swap_max_failure_rate;
        // Components are loaded in the order of the list; what comes after it are the shipped ones of empty roles.
        for (place, locked) in locked.iter().enumerate() {
            let listed = config.plugins.plugins.get(place);
            let settings = PluginConfig {
                source: locked.source.clone(),
                ..listed.cloned().unwrap_or_default()
            };
            match locked.id.role {
                Role::Formatter => supervision.formatter = Trial::of(settings),
                Role::Curriculum => supervision.curriculum = Trial::of(settings),
                Role::Reward => supervision.rewards.slots.push(Slot {
                    settings,
                    predecessor: None,
                }),
            }
        }
        supervision
    }

    /// The settings of what has a seat; `None` where there is no such seat.
    pub fn settings(&self, seat: Seat) -> Option<&PluginConfig> {
        match seat.role {
            Role::Formatter => Some(&self.formatter.settings),
            Role::Curriculum => Some(&self.curriculum.settings),
            Role::Reward => self.rewards.slots.get(seat.slot).map(|slot| &slot.settings),
        }
    }

    /// All seats.
    pub fn seats(&self) -> Vec<Seat> {
        let of = |role, slot| Seat { role, slot };
        let rewards = (0..self.rewards.slots.len()).map(|slot| of(Role::Reward, slot));
        let others = [of(Role::Formatter, 0), of(Role::Curriculum, 0)];
        rewards.chain(others).collect()
    }
}

impl Watched {
    /// The first promoted reward whose share of failures is too large with this wave, and why.
    fn over_limit(&mut self, scoring: &SetScoring) -> Option<(usize, String)> {
        for (place, (slot, member)) in self.slots.iter_mut().zip(&scoring.members).enumerate() {
            let Some(predecessor) = &mut slot.predecessor else {
                continue;
            };
            let samples = member.totals.len() as u32;
            if samples > 0 && member.totals.iter().all(Option::is_none) {
                return Some((place, format!("it scored none of {samples} samples")));
            }
            predecessor.recent.push_back((member.failed, samples));
            if predecessor.recent.len() > WINDOW {
                predecessor.recent.pop_front();
            }
            let sum = |(a, b): (u32, u32), (c, d): &(u32, u32)| (a + c, b + d);
            let (failed, samples) = predecessor.recent.iter().fold((0, 0), sum);
            if f64::from(failed) > self.max_failure_rate * f64::from(samples) {
                return Some((place, format!("it failed on {failed} of {samples} samples")));
            }
        }
        None
    }
}

/// What scores, under supervision.
pub(super) struct Scorer<'t> {
    pub(super) rewards: &'t mut RewardSet,
    pub(super) locked: &'t mut Vec<LockedPlugin>,
    pub(super) swaps: &'t mut Watched,
    /// The step that is under way, from 1.
    pub(super) step: u64,
}

impl Scorer<'_> {
    /// Scores a wave. A promoted reward that fails too often, or that would end the run, gives way to the one before, which
    /// then scores this wave.
    pub(super) fn score(
        &mut self,
        samples: &[Sample<'_>],
        wave: u32,
    ) -> anyhow::Result<SetScoring> {
        let step = self.step;
        loop {
            let Watched {
                slots, failures, ..
            } = &mut *self.swaps;
            let mut note = |slot: usize, place: usize, error: &PluginError| {
                if let (Some(slot), true) = (slots.get(slot), failures.len() < MAX_FAILURES) {
                    failures.push(FailedCall::new(
                        step,
                        &slot.settings,
                        &samples[place],
                        error,
                    ));
                }
            };
            let scored = self.rewards.score_noting(samples, &mut note);
            let bad = match &scored {
                Ok(scoring) => self.swaps.over_limit(scoring),
                Err(error) => self.guilty(error),
            };
            let Some((slot, reason)) = bad else {
                let scoring = scored?;
                if let Some(tap) = &mut self.swaps.tap {
                    tap.take(samples, &scoring);
                }
                return Ok(scoring);
            };
            self.roll_back(slot, wave, reason);
        }
    }

    /// The promoted reward that an error is of, where there is one to go back to.
    fn guilty(&self, error: &PluginError) -> Option<(usize, String)> {
        let mut ids = self.rewards.ids().zip(&self.swaps.slots);
        let of = |(id, slot): (&PluginId, &Slot)| {
            *id.digest == *error.digest && slot.predecessor.is_some()
        };
        let place = ids.position(of)?;
        Some((place, error.to_string()))
    }

    /// Brings the reward before back, from this wave of the coming step on.
    fn roll_back(&mut self, place: usize, wave: u32, reason: String) {
        let step = self.step;
        let slot = self.swaps.slots.get_mut(place);
        let Some((slot, predecessor)) = slot.and_then(|s| s.predecessor.take().map(|p| (s, p)))
        else {
            return;
        };
        self.rewards.exchange(place, predecessor.reward);
        slot.settings = predecessor.settings;
        let to = LockedPlugin {
            since_step: step,
            ..predecessor.locked
        };
        let Some(entry) = locked_reward(self.locked, place) else {
            return;
        };
        self.swaps.rolled_back.push(RolledBack {
            step,
            wave,
            seat: Seat {
                role: Role::Reward,
                slot: place,
            },
            from: std::mem::replace(entry, to.clone()),
            to,
            settings: slot.settings.clone(),
            reason,
        });
    }
}

impl Trainer<'_> {
    /// Evaluates; a promoted reward or formatter that would end the run in doing so gives way to the one before.
    pub(super) fn evaluate_supervised(
        &mut self,
        on_progress: &mut dyn FnMut(Progress),
    ) -> anyhow::Result<EvalReport> {
        loop {
            let settings = EvalSettings::of(self.config);
            let judges = Judges {
                formatter: &self.plugins.formatter,
                rewards: &self.plugins.rewards,
                math: &self.plugins.math,
            };
            let rows: &[Row] = &self.rows.eval;
            let report = evaluate(&mut self.policy, &judges, rows, &settings, on_progress);
            let error = match report {
                Ok(report) => return Ok(report),
                Err(error) => error,
            };
            let Some(fault) = error.downcast_ref::<PluginError>() else {
                return Err(error);
            };
            if self.formatter_gives_way(fault) {
                continue;
            }
            let (_, mut scorer) = self.halves();
            let Some((slot, reason)) = scorer.guilty(fault) else {
                return Err(error);
            };
            scorer.roll_back(slot, 0, reason);
        }
    }

    /// Puts `plugin` in the place of the one of its role, among rewards of that in `slot`, from step `since` on. The one before
    /// is kept for a rollback.
    pub fn promote(&mut self, slot: usize, plugin: Plugin, settings: PluginConfig, since: u64) {
        match plugin {
            Plugin::Reward(reward) => self.promote_reward(slot, reward, settings, since),
            Plugin::Formatter(formatter) => self.promote_formatter(formatter, settings, since),
            Plugin::Curriculum(curriculum) => self.promote_curriculum(curriculum, settings, since),
        }
    }

    fn promote_reward(
        &mut self,
        slot: usize,
        reward: RewardPlugin,
        settings: PluginConfig,
        since: u64,
    ) {
        let id = reward.id().clone();
        let Some(before) = self.plugins.rewards.exchange(slot, reward) else {
            return;
        };
        let source = settings.source.clone();
        let (Some(entry), Some(slot)) = (
            locked_reward(&mut self.plugins.locked, slot),
            self.swaps.rewards.slots.get_mut(slot),
        ) else {
            return;
        };
        let weight = entry.weight;
        let now = LockedPlugin {
            id,
            source,
            weight,
            since_step: since,
            grants: Some(settings.grants.clone()),
        };
        slot.predecessor = Some(Predecessor {
            reward: before,
            locked: std::mem::replace(entry, now),
            settings: std::mem::replace(&mut slot.settings, settings),
            recent: VecDeque::new(),
        });
    }

    /// Takes away what a rollback of the seat would bring back.
    pub fn forget_predecessor(&mut self, seat: Seat) {
        match seat.role {
            Role::Formatter => self.swaps.formatter.forget(),
            Role::Curriculum => self.swaps.curriculum.forget(),
            Role::Reward => {
                if let Some(slot) = self.swaps.rewards.slots.get_mut(seat.slot) {
                    slot.predecessor = None;
                }
            }
        }
    }

    /// Everything that was rolled back since this was last asked.
    pub fn take_rolled_back(&mut self) -> Vec<RolledBack> {
        let mut all = std::mem::take(&mut self.swaps.rewards.rolled_back);
        all.append(&mut self.swaps.rolled_back);
        all
    }
}

fn locked_reward(locked: &mut [LockedPlugin], slot: usize) -> Option<&mut LockedPlugin> {
    let mut rewards = locked.iter_mut().filter(|l| l.id.role == Role::Reward);
    rewards.nth(slot)
}
