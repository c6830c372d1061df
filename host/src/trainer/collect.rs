//! The first half of a step: plan, roll out and score until there are enough groups that teach something.

use std::time::Instant;

use grpo_policy::engine::Progress;

use super::{SamplingReport, StepSeconds, TrainError, Trainer, swaps::Scorer};
use crate::{
    evaluate::samples_of,
    grpo::filter::{self, DynamicSampling, Refill},
    plugin::{PluginError, SetScoring},
    rollout::{RolledOut, Rollouts},
    run::LockedPlugin,
    types::{Outcome, Pick, Plan, PluginId, Role, Score},
};

/// The completions of a prompt and what the rewards said of each.
pub(super) type Scored = (Rollouts, Vec<Score>);

/// What a step collects over its generation rounds.
#[derive(Default)]
pub(super) struct Collected {
    pub(super) groups: Vec<Scored>,
    /// Whether any completion has a score yet; if not, why the first one has none.
    any_scored: bool,
    first_skip: Option<String>,
    /// Questions that judges had left unanswered before this step.
    judge_failures: u64,
    pub(super) outcomes: Vec<Outcome>,
    pub(super) sampling: SamplingReport,
    pub(super) skipped: Vec<(String, u32)>,
    pub(super) faults: Vec<String>,
    pub(super) seconds: StepSeconds,
    pub(super) plan: Plan,
    /// The components of each wave.
    pub(super) scored_by: Vec<(u32, Vec<PluginId>)>,
}

/// What the rewards said of a wave.
pub(super) struct ScoredWave {
    rollouts: Vec<Rollouts>,
    scoring: SetScoring,
    wave: u32,
    /// The components that touched it.
    ids: Vec<PluginId>,
    seconds: f64,
}

impl Trainer<'_> {
    /// Plans and generates what the step is to learn from.
    pub(super) fn collect(
        &mut self,
        on_progress: &mut dyn FnMut(Progress),
    ) -> anyhow::Result<Collected> {
        match self.config.loss.dynamic_sampling {
            DynamicSampling::Off => match self.config.generation.scoring_waves {
                1 => self.collect_once(on_progress),
                waves => self.collect_in_waves(waves, on_progress),
            },
            DynamicSampling::Refill => self.collect_refilling(on_progress),
            DynamicSampling::Respend => self.collect_respending(on_progress),
        }
    }

    /// An empty step.
    pub(super) fn begin(&self) -> Collected {
        Collected {
            judge_failures: self.judges.failures(),
            ..Collected::default()
        }
    }

    fn collect_once(&mut self, on_progress: &mut dyn FnMut(Progress)) -> anyhow::Result<Collected> {
        let mut collected = self.begin();
        self.round(
            self.config.generation.prompts_per_step,
            &mut collected,
            on_progress,
        )?;
        Ok(collected)
    }

    /// Draws again until there are enough groups that teach something.
    fn collect_refilling(
        &mut self,
        on_progress: &mut dyn FnMut(Progress),
    ) -> anyhow::Result<Collected> {
        let max_rounds = self.config.loss.max_refills;
        let wanted = self.config.generation.prompts_per_step as usize;
        let mut collected = self.begin();
        let (mut prompts, mut seen) = (wanted, 0);
        loop {
            let round = collected.sampling.refills;
            seen += self.round(prompts as u32, &mut collected, on_progress)?;
            drop_flat(&mut collected);
            match filter::refill(max_rounds, wanted, collected.groups.len(), seen, round) {
                Refill::Draw { prompts: more } => prompts = more,
                Refill::Done | Refill::GiveUp { .. } => break,
            }
            collected.sampling.refills += 1;
        }
        collected.groups.truncate(wanted);
        Ok(collected)
    }

    /// Plans, rolls out and scores whole groups; how many there were.
    fn round(
        &mut self,
        prompts: u32,
        collected: &mut Collected,
        on_progress: &mut dyn FnMut(Progress),
    ) -> anyhow::Result<usize> {
        let picks = self.plan(prompts, collected)?;
        let wave = collected.sampling.refills;
        let rolled = self.roll(&picks, wave, collected, on_progress)?;
        let groups = self.score(rolled.rollouts, collected)?;
        let count = groups.len();
        collected.outcomes.extend(groups.iter().map(outcome));
        collected.groups.extend(groups);
        Ok(count)
    }

    /// Asks the curriculum, handing it the outcomes it has not seen.
    pub(super) fn plan(
        &mut self,
        prompts: u32,
        collected: &mut Collected,
    ) -> anyhow::Result<Vec<Pick>> {
        let started = Instant::now();
        let budget = self.budget(prompts);
        let outcomes = std::mem::take(&mut self.state.outcomes);
        let mut plan = self.ask_curriculum(&outcomes, &budget, collected.sampling.refills)?;
        self.state.curriculum.clone_from(&plan.state);
        let picks = plan.picks.clone();
        let planned: u64 = picks.iter().map(|pick| u64::from(pick.rollouts)).sum();
        collected.sampling.planned += planned;
        // An epoch may begin in any of a step's plans.
        let earlier = std::mem::take(&mut collected.plan.report);
        plan.report.splice(0..0, earlier);
        collected.plan = plan;
        collected.seconds.plan += started.elapsed().as_secs_f64();
        Ok(picks)
    }

    /// Continues the prompts of `picks`; `wave` counts the calls of a step, so that each has draws of its
    /// own.
    pub(super) fn roll(
        &mut self,
        picks: &[Pick],
        wave: u32,
        collected: &mut Collected,
        on_progress: &mut dyn FnMut(Progress),
    ) -> anyhow::Result<RolledOut> {
        let rolled = self.halves().0.roll(picks, wave, collected, on_progress)?;
        if rolled.rollouts.is_empty() && collected.sampling.completions == 0 {
            return Err(self.all_too_long(picks.len()).into());
        }
        Ok(rolled)
    }

    /// Scores all groups in one batch, so that a reward's instance is made once.
    pub(super) fn score(
        &mut self,
        rollouts: Vec<Rollouts>,
        collected: &mut Collected,
    ) -> anyhow::Result<Vec<Scored>> {
        let formatter = self.plugins.formatter.id().clone();
        let scored = self.halves().1.wave((rollouts, formatter))?;
        let groups = self.book(scored, collected);
        self.require_scores(collected)?;
        Ok(groups)
    }

    /// Enters a scored wave into the step's account.
    pub(super) fn book(&self, scored: ScoredWave, collected: &mut Collected) -> Vec<Scored> {
        let ScoredWave {
            rollouts,
            scoring,
            wave,
            ids,
            seconds,
        } = scored;
        collected.scored_by.push((wave, ids));
        let lines = PluginError::lines(&scoring.faults, scoring.scores.len());
        collected.faults.extend(lines);
        for score in &scoring.scores {
            match score {
                Score::Value(_) => collected.any_scored = true,
                Score::Skip(why) => {
                    collected.first_skip.get_or_insert_with(|| why.clone());
                }
            }
        }
        collected
            .skipped
            .resize(scoring.skipped.len(), Default::default());
        let counts = self.plugins.rewards.names().zip(scoring.skipped);
        for ((known, count), (name, more)) in collected.skipped.iter_mut().zip(counts) {
            name.clone_into(known);
            *count += more;
        }
        let mut scores = scoring.scores.into_iter();
        let of_prompt = |rollouts: Rollouts| {
            let mine = scores.by_ref().take(rollouts.completions.len()).collect();
            (rollouts, mine)
        };
        let groups = rollouts.into_iter().map(of_prompt).collect();
        collected.seconds.reward += seconds;
        groups
    }

    /// A step without any score is mostly a reward that was set up wrongly, and ends the run. One in which a judge did not
    /// answer is not: it may answer again.
    pub(super) fn require_scores(&self, collected: &Collected) -> Result<(), TrainError> {
        let judges_failed = self.judges.failures() > collected.judge_failures;
        if collected.any_scored || judges_failed {
            return Ok(());
        }
        Err(TrainError::AllSkipped {
            step: self.state.step + 1,
            reason: collected.first_skip.clone().unwrap_or_default(),
        })
    }
}

impl Scorer<'_> {
    /// Scores the groups of a wave in one batch; the second is the formatter that made them.
    pub(super) fn wave(
        &mut self,
        (rollouts, formatter): (Vec<Rollouts>, PluginId),
    ) -> anyhow::Result<ScoredWave> {
        let started = Instant::now();
        let samples: Vec<_> = rollouts.iter().flat_map(samples_of).collect();
        let wave = rollouts
            .first()
            .and_then(|r| r.waves.first().copied())
            .unwrap_or(0);
        let scoring = self.score(&samples, wave)?;
        drop(samples);
        // The formatter of a wave is known to whoever generates, who may be further by now.
        let id = |locked: &LockedPlugin| match locked.id.role {
            Role::Formatter => formatter.clone(),
            _ => locked.id.clone(),
        };
        Ok(ScoredWave {
            rollouts,
            scoring,
            wave,
            ids: self.locked.iter().map(id).collect(),
            seconds: started.elapsed().as_secs_f64(),
        })
    }
}

/// What the curriculum hears of a group.
pub(super) fn outcome((rollouts, scores): &Scored) -> Outcome {
    let rewards: Vec<f64> = totals(scores).into_iter().flatten().collect();
    Outcome {
        row: rollouts.row,
        skipped: (scores.len() - rewards.len()) as u32,
        rewards,
    }
}

/// Total reward of each sample; `None` for a skipped one.
pub(super) fn totals(scores: &[Score]) -> Vec<Option<f64>> {
    let total = |score: &Score| match score {
        Score::Value(scored) => Some(scored.total),
        Score::Skip(_) => None,
    };
    scores.iter().map(total).collect()
}

fn drop_flat(collected: &mut Collected) {
    let rewards: Vec<_> = collected
        .groups
        .iter()
        .map(|(_, scores)| totals(scores))
        .collect();
    let verdict = filter::judge(&rewards);
    collected.sampling.dropped_groups += verdict.flat + verdict.unscored;
    let mut keep = verdict.keep.iter();
    collected.groups.retain(|_| *keep.next().unwrap_or(&true));
}
