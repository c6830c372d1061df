//! The two halves of collecting, one that generates and one that scores, and a step in which both are at work at
//! once: its prompts come in waves, and a wave is scored on a thread of its own while the next one generates.
//!
//! Waves are cut by their number, never by what happens to be ready: draws and batches of rewards are then the same
//! on every machine, and the rollout log says which wave a sample was scored in, which is all that `replay` needs.

use std::{panic::resume_unwind, sync::mpsc, thread, time::Instant};

use grpo_policy::engine::Progress;

use super::{
    TrainError, Trainer, Trial,
    collect::{Collected, ScoredWave, outcome},
    swaps::Scorer,
};
use crate::{
    config::RunConfig,
    error,
    plugin::FormatterPlugin,
    policy::Policy,
    rollout::{Job, RollError, RolledOut, Rollouts, mix, roll},
    types::{Pick, PluginId, Row},
};

/// What generates.
pub(super) struct Roller<'t> {
    config: &'t RunConfig,
    policy: &'t mut Policy,
    formatter: &'t mut FormatterPlugin,
    trial: &'t mut Trial,
    rows: &'t [Row],
    /// Steps done so far.
    step: u64,
}

impl Trainer<'_> {
    /// Both halves, to be used side by side.
    pub(super) fn halves(&mut self) -> (Roller<'_>, Scorer<'_>) {
        let step = self.state.step;
        let roller = Roller {
            config: self.config,
            policy: &mut self.policy,
            formatter: &mut self.plugins.formatter,
            trial: &mut self.swaps.formatter,
            rows: &self.rows.train.rows,
            step,
        };
        let scorer = Scorer {
            rewards: &mut self.plugins.rewards,
            locked: &mut self.plugins.locked,
            swaps: &mut self.swaps.rewards,
            step: step + 1,
        };
        (roller, scorer)
    }

    /// One plan in `waves` parts of about as many prompts each.
    pub(super) fn collect_in_waves(
        &mut self,
        waves: u32,
        on_progress: &mut dyn FnMut(Progress),
    ) -> anyhow::Result<Collected> {
        let mut collected = self.begin();
        let picks = self.plan(self.config.generation.prompts_per_step, &mut collected)?;
        let parts = parts(&picks, waves as usize);
        let (mut roller, mut scorer) = self.halves();
        let (rolled, scored) = thread::scope(|scope| {
            let (hand_over, rolled_out) = mpsc::channel::<(Vec<Rollouts>, PluginId)>();
            let scoring = scope.spawn(move || -> anyhow::Result<Vec<ScoredWave>> {
                rolled_out.iter().map(|wave| scorer.wave(wave)).collect()
            });
            let rolled = roll_parts(&mut roller, parts, &mut collected, &hand_over, on_progress);
            drop(hand_over);
            let scored = scoring.join().unwrap_or_else(|panic| resume_unwind(panic));
            (rolled, scored)
        });
        let scored = scored?;
        rolled?;
        if collected.sampling.completions == 0 {
            return Err(self.all_too_long(picks.len()).into());
        }
        for wave in scored {
            let groups = self.book(wave, &mut collected);
            collected.outcomes.extend(groups.iter().map(outcome));
            collected.groups.extend(groups);
        }
        self.require_scores(&collected)?;
        Ok(collected)
    }

    /// No prompt of a step fits.
    pub(super) fn all_too_long(&self, rows: usize) -> TrainError {
        let limit = self.config.generation.max_prompt_length;
        TrainError::AllTooLong {
            step: self.state.step + 1,
            rows,
            limit: limit.map_or(self.policy.max_model_len() - 1, |n| n as usize),
        }
    }
}

/// As many parts, of sizes that differ by one at most; fewer where there are fewer picks.
fn parts(picks: &[Pick], count: usize) -> impl Iterator<Item = &[Pick]> {
    let (len, count) = (picks.len(), count.min(picks.len()));
    (0..count).map(move |i| &picks[i * len / count..(i + 1) * len / count])
}

/// Generates part after part, until nobody takes them any more: then scoring has failed, and says why.
fn roll_parts<'p>(
    roller: &mut Roller<'_>,
    parts: impl Iterator<Item = &'p [Pick]>,
    collected: &mut Collected,
    hand_over: &mpsc::Sender<(Vec<Rollouts>, PluginId)>,
    on_progress: &mut dyn FnMut(Progress),
) -> anyhow::Result<()> {
    for (picks, wave) in parts.zip(0..) {
        let rolled = roller.roll(picks, wave, collected, on_progress)?;
        let wave = (rolled.rollouts, roller.formatter.id().clone());
        if !wave.0.is_empty() && hand_over.send(wave).is_err() {
            break;
        }
    }
    Ok(())
}

impl Roller<'_> {
    /// Continues the prompts of `picks`; `wave` counts the calls of a step, so that each has draws of its
    /// own. A promoted formatter that fails, or leaves no prompt that fits, gives way to the one before, with which the wave
    /// is made anew.
    pub(super) fn roll(
        &mut self,
        picks: &[Pick],
        wave: u32,
        collected: &mut Collected,
        on_progress: &mut dyn FnMut(Progress),
    ) -> anyhow::Result<RolledOut> {
        let started = Instant::now();
        let generation = &self.config.generation;
        let row = |pick: &Pick| (&self.rows[pick.row as usize], pick.rollouts);
        let job = Job {
            wave,
            rows: picks.iter().map(row).collect(),
            sampling: &generation.sampling(),
            max_prompt_tokens: generation.max_prompt_length.map(|n| n as usize),
            seed: mix(mix(self.config.training.seed, self.step), u64::from(wave)),
        };
        let rolled = loop {
            let rolled = roll(self.policy, self.formatter, &job, on_progress);
            let reason = match &rolled {
                Err(RollError::Formatter(error)) => error::message_and_hint(error).0,
                Ok(rolled) if rolled.rollouts.is_empty() => {
                    format!("the prompts of all {} rows are too long", picks.len())
                }
                _ => break rolled,
            };
            let at = (self.step + 1, wave);
            if !self.trial.roll_back_formatter(self.formatter, at, reason) {
                break rolled;
            }
            self.policy.forget_kv();
        };
        let rolled = rolled.map_err(RollError::into_inner)?;
        let completions = rolled.rollouts.iter().flat_map(|r| &r.completions);
        collected.sampling.completions += completions.clone().count();
        let speculation = &mut collected.sampling.speculation;
        completions.clone().for_each(|c| speculation.add(c));
        collected.sampling.tokens += completions.map(|c| c.tokens.len()).sum::<usize>();
        collected.sampling.too_long += rolled.too_long.len();
        collected.seconds.rollout += started.elapsed().as_secs_f64();
        Ok(rolled)
    }
}
