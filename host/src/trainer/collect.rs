//! The first half of a step: plan, roll out and score until there are enough groups that teach something.

use std::time::Instant;

use grpo_policy::engine::Progress;

use super::{SamplingReport, StepSeconds, TrainError, Trainer};
use crate::{
    evaluate::samples_of,
    grpo::filter::{self, DynamicSampling, Refill},
    rollout::{Job, RolledOut, Rollouts, mix, roll},
    types::{Budget, Outcome, Pick, Plan, Score},
};

/// What a step collects over its generation rounds.
#[derive(Default)]
pub(super) struct Collected {
    pub(super) groups: Vec<(Rollouts, Vec<Score>)>,
    pub(super) outcomes: Vec<Outcome>,
    pub(super) sampling: SamplingReport,
    pub(super) skipped: Vec<(String, u32)>,
    pub(super) faults: Vec<String>,
    pub(super) seconds: StepSeconds,
    pub(super) plan: Plan,
}

impl Trainer<'_> {
    /// Plans and generates until there are enough groups that teach something.
    pub(super) fn collect(
        &mut self,
        on_progress: &mut dyn FnMut(Progress),
    ) -> anyhow::Result<Collected> {
        let dynamic = DynamicSampling {
            enabled: self.config.loss.dynamic_sampling,
            max_rounds: self.config.loss.max_refills,
        };
        let wanted = self.config.generation.prompts_per_step as usize;
        let mut collected = Collected::default();
        let (mut prompts, mut seen) = (wanted, 0);
        loop {
            let round = collected.sampling.refills;
            let picks = self.plan(prompts as u32, &mut collected)?;
            let rolled = self.roll(&picks, round, &mut collected, on_progress)?;
            seen += rolled.rollouts.len();
            self.score(rolled.rollouts, &mut collected)?;
            if dynamic.enabled {
                drop_flat(&mut collected);
            }
            match filter::refill(dynamic, wanted, collected.groups.len(), seen, round) {
                Refill::Draw { prompts: more } => prompts = more,
                Refill::Done | Refill::GiveUp { .. } => break,
            }
            collected.sampling.refills += 1;
        }
        if dynamic.enabled {
            collected.groups.truncate(wanted);
        }
        Ok(collected)
    }

    /// Asks the curriculum, handing it the outcomes it has not seen.
    fn plan(&mut self, prompts: u32, collected: &mut Collected) -> anyhow::Result<Vec<Pick>> {
        let started = Instant::now();
        let budget = Budget {
            step: self.state.step,
            rows: self.rows.train.rows.len() as u64,
            prompts,
            group_size: self.config.generation.num_generations,
            seed: self.config.training.seed,
        };
        let outcomes = std::mem::take(&mut self.state.outcomes);
        let mut plan = self
            .plugins
            .curriculum
            .plan(&self.state.curriculum, &outcomes, &budget)?;
        self.state.curriculum.clone_from(&plan.state);
        let picks = plan.picks.clone();
        // An epoch may begin in any of a step's plans.
        let earlier = std::mem::take(&mut collected.plan.report);
        plan.report.splice(0..0, earlier);
        collected.plan = plan;
        collected.seconds.plan += started.elapsed().as_secs_f64();
        Ok(picks)
    }

    fn roll(
        &mut self,
        picks: &[Pick],
        round: u32,
        collected: &mut Collected,
        on_progress: &mut dyn FnMut(Progress),
    ) -> anyhow::Result<RolledOut> {
        let started = Instant::now();
        let generation = &self.config.generation;
        let row = |pick: &Pick| (&self.rows.train.rows[pick.row as usize], pick.rollouts);
        let job = Job {
            rows: picks.iter().map(row).collect(),
            sampling: &generation.sampling(),
            max_prompt_tokens: generation.max_prompt_length.map(|n| n as usize),
            seed: mix(
                mix(self.config.training.seed, self.state.step),
                u64::from(round),
            ),
        };
        let rolled = roll(&mut self.policy, &self.plugins.formatter, &job, on_progress)?;
        if rolled.rollouts.is_empty() {
            let limit = job
                .max_prompt_tokens
                .unwrap_or(self.policy.max_model_len() - 1);
            let (step, rows) = (self.state.step + 1, picks.len());
            return Err(TrainError::AllTooLong { step, rows, limit }.into());
        }
        let completions = rolled.rollouts.iter().flat_map(|r| &r.completions);
        collected.sampling.tokens += completions.map(|c| c.tokens.len()).sum::<usize>();
        collected.sampling.too_long += rolled.too_long.len();
        collected.seconds.rollout += started.elapsed().as_secs_f64();
        Ok(rolled)
    }

    /// Scores all groups in one batch, so that a reward's instance is made once.
    fn score(&mut self, rollouts: Vec<Rollouts>, collected: &mut Collected) -> anyhow::Result<()> {
        let started = Instant::now();
        let samples: Vec<_> = rollouts.iter().flat_map(samples_of).collect();
        let scoring = self.plugins.rewards.score(&samples)?;
        drop(samples);
        self.refuse_all_skipped(&scoring.scores)?;
        let skipped = self
            .plugins
            .rewards
            .names()
            .map(str::to_owned)
            .zip(scoring.skipped);
        collected.skipped.extend(skipped);
        collected
            .faults
            .extend(scoring.faults.iter().map(ToString::to_string));
        let mut scores = scoring.scores.into_iter();
        for of_prompt in rollouts {
            let mine: Vec<Score> = scores.by_ref().take(of_prompt.completions.len()).collect();
            let rewards: Vec<f64> = totals(&mine).into_iter().flatten().collect();
            let skipped = (mine.len() - rewards.len()) as u32;
            collected.outcomes.push(Outcome {
                row: of_prompt.row,
                rewards,
                skipped,
            });
            collected.groups.push((of_prompt, mine));
        }
        collected.seconds.reward += started.elapsed().as_secs_f64();
        Ok(())
    }

    fn refuse_all_skipped(&self, scores: &[Score]) -> Result<(), TrainError> {
        let mut reason = None;
        for score in scores {
            match score {
                Score::Value(_) => return Ok(()),
                Score::Skip(why) => reason = reason.or(Some(why)),
            }
        }
        let (step, reason) = (self.state.step + 1, reason.cloned().unwrap_or_default());
        Err(TrainError::AllSkipped { step, reason })
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
