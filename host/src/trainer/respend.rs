//! A step within a budget of completions: probes first, then the rest of the groups that teach something.
//! How much goes where is `grpo::respend`'s business.

use grpo_policy::engine::Progress;

use super::{
    Trainer,
    collect::{Collected, Scored, outcome, totals},
};
use crate::{
    grpo::{filter, respend},
    rollout::Rollouts,
    types::{Pick, Score},
};

/// A group that goes on after its probe.
struct Probed {
    group: Scored,
    /// Completions of the whole group.
    planned: u32,
    /// Whether what dropped groups left pays for it.
    respent: bool,
}

impl Probed {
    fn drawn(&self) -> u32 {
        self.group.1.len() as u32
    }

    /// Takes in more completions of the same prompt; their places in the group follow.
    fn extend(&mut self, (rollouts, scores): (Rollouts, Vec<Score>)) {
        let first = self.drawn();
        let later = rollouts.completions.into_iter().map(|mut completion| {
            completion.index += first;
            completion
        });
        self.group.0.completions.extend(later);
        self.group.0.parsed.extend(rollouts.parsed);
        self.group.0.waves.extend(rollouts.waves);
        self.group.1.extend(scores);
    }
}

impl Trainer<'_> {
    /// Draws at most `prompts_per_step · num_generations` completions: a probe of every group, new prompts
    /// for what flat groups leave, in rounds, and at last the rest of the groups that are kept.
    pub(super) fn collect_respending(
        &mut self,
        on_progress: &mut dyn FnMut(Progress),
    ) -> anyhow::Result<Collected> {
        let generation = &self.config.generation;
        let group_size = u64::from(generation.num_generations);
        let (mut prompts, max_rounds) = (generation.prompts_per_step, self.config.loss.max_refills);
        let budget = u64::from(prompts) * group_size;
        let (mut collected, mut kept) = (self.begin(), Vec::new());
        let mut free = budget;
        loop {
            kept.extend(self.probe(prompts, free, &mut collected, on_progress)?);
            let owed: u64 = kept.iter().map(|p| u64::from(p.planned - p.drawn())).sum();
            free = budget - collected.sampling.completions as u64 - owed;
            prompts = (free / group_size) as u32;
            if prompts == 0 || collected.sampling.refills == max_rounds {
                break;
            }
            collected.sampling.refills += 1;
        }
        self.complete(&mut kept, free, &mut collected, on_progress)?;
        collected.groups = kept.into_iter().map(|probed| probed.group).collect();
        collected
            .outcomes
            .extend(collected.groups.iter().map(outcome));
        Ok(collected)
    }

    /// Probes new prompts with at most `free` completions planned for them; the groups that are not flat.
    fn probe(
        &mut self,
        prompts: u32,
        free: u64,
        collected: &mut Collected,
        on_progress: &mut dyn FnMut(Progress),
    ) -> anyhow::Result<Vec<Probed>> {
        let wave = collected.sampling.refills;
        let mut picks = self.plan(prompts, collected)?;
        let wanted: Vec<u32> = picks.iter().map(|pick| pick.rollouts).collect();
        for (pick, size) in picks.iter_mut().zip(respend::fit(&wanted, free)) {
            pick.rollouts = size;
        }
        picks.retain(|pick| pick.rollouts > 0);
        let fraction = self.config.loss.probe_fraction;
        let probes: Vec<Pick> = picks
            .iter()
            .map(|pick| Pick {
                rollouts: respend::probe(pick.rollouts, fraction),
                ..*pick
            })
            .collect();
        let rolled = self.roll(&probes, wave, collected, on_progress)?;
        picks.retain(|pick| !rolled.too_long.contains(&pick.row));
        let groups = self.score(rolled.rollouts, collected)?;
        let rewards: Vec<_> = groups.iter().map(|(_, scores)| totals(scores)).collect();
        let verdict = filter::judge(&rewards);
        collected.sampling.dropped_groups += verdict.flat + verdict.unscored;
        let mut kept = Vec::new();
        for ((group, pick), keep) in groups.into_iter().zip(&picks).zip(verdict.keep) {
            if wave > 0 {
                collected.sampling.respent += group.1.len();
            }
            if keep {
                let (planned, respent) = (pick.rollouts, wave > 0);
                kept.push(Probed {
                    group,
                    planned,
                    respent,
                });
            } else {
                collected.outcomes.push(outcome(&group));
            }
        }
        Ok(kept)
    }

    /// Draws the rest of the kept groups in one wave, and deals them the `free` completions.
    fn complete(
        &mut self,
        kept: &mut [Probed],
        free: u64,
        collected: &mut Collected,
        on_progress: &mut dyn FnMut(Progress),
    ) -> anyhow::Result<()> {
        let planned: Vec<u32> = kept.iter().map(|probed| probed.planned).collect();
        let mut unfinished = Vec::new();
        let mut picks = Vec::new();
        for (probed, extra) in kept.iter_mut().zip(respend::deal(&planned, free)) {
            let rest = probed.planned - probed.drawn();
            let respent = if probed.respent { rest + extra } else { extra };
            collected.sampling.respent += respent as usize;
            if rest + extra > 0 {
                let (row, rollouts) = (probed.group.0.row, rest + extra);
                picks.push(Pick { row, rollouts });
                unfinished.push(probed);
            }
        }
        if picks.is_empty() {
            return Ok(());
        }
        let wave = collected.sampling.refills + 1;
        let rolled = self.roll(&picks, wave, collected, on_progress)?;
        let groups = self.score(rolled.rollouts, collected)?;
        let mut unfinished = unfinished.into_iter();
        for more in groups {
            // A formatter that was rolled back since the probe has left other prompts, and maybe fewer.
            let probed = unfinished.find(|probed| probed.group.0.row == more.0.row);
            if let Some(probed) = probed.filter(|p| p.group.0.prompt == more.0.prompt) {
                probed.extend(more);
            }
        }
        Ok(())
    }
}
