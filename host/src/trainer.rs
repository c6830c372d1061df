//! The loop: one step of GRPO from plan to report. What a step computes lives in the rooms; this file
//! only says in which order, and keeps what must survive from step to step.

mod collect;
mod overlap;
mod report;
mod respend;
mod swaps;
mod trial;

use std::time::Instant;

use grpo_policy::engine::Progress;

use crate::{
    config::{self, RunConfig},
    draft,
    evaluate::EvalReport,
    grpo::{
        advantage::{Advantages, advantages},
        config::LossConfig,
    },
    judge::Panel,
    policy::Policy,
    rollout::Rollouts,
    run::{Best, TrainState},
    setup::{Plugins, Rows},
    types::Score,
    update::{Sequence, UpdateConfig, update},
};

use collect::{Collected, totals};
pub use report::{Group, SamplingReport, StepReport, StepSeconds, TrainError};
pub use swaps::{RolledBack, Supervision};
pub use trial::Trial;

/// A run in progress.
pub struct Trainer<'a> {
    pub config: &'a RunConfig,
    pub policy: Policy,
    pub plugins: Plugins,
    pub rows: Rows,
    pub state: TrainState,
    pub swaps: Supervision,
    pub judges: Panel,
}

impl Trainer<'_> {
    /// One step: plan, roll out, score, normalise, update.
    pub fn step(&mut self, on_progress: &mut dyn FnMut(Progress)) -> anyhow::Result<StepReport> {
        let started = Instant::now();
        // What an evaluation left in the prefix cache would spare prefills here and change last bits of
        // the log-probs, so a resumed run, which did not evaluate, would not repeat this one.
        self.policy.forget_kv();
        let mut collected = self.collect(on_progress)?;
        let rewards: Vec<Vec<Option<f64>>> = collected
            .groups
            .iter()
            .map(|(_, scores)| totals(scores))
            .collect();
        let advantages = advantages(&rewards, self.config.loss.scale_rewards);
        let update_started = Instant::now();
        let learning_rate = self.learning_rate();
        let sequences = sequences(&collected.groups, &advantages);
        let (settings, optimizer) = (
            update_config(self.config),
            self.config.optimizer.step(learning_rate),
        );
        let update = update(&mut self.policy.replicas, &sequences, &settings, &optimizer)?;
        let draft = draft::distil(&mut self.policy, &sequences, self.config)?;
        self.policy.forget_kv();
        collected.seconds.update = update_started.elapsed().as_secs_f64();
        collected.seconds.total = started.elapsed().as_secs_f64();
        self.advance(&mut collected);
        let groups = collected.groups.into_iter().zip(&advantages.values);
        Ok(StepReport {
            step: self.state.step,
            groups: groups
                .map(|((rollouts, scores), a)| Group {
                    rollouts,
                    scores,
                    advantages: a.clone(),
                })
                .collect(),
            advantages,
            update,
            draft,
            learning_rate,
            plan: collected.plan,
            skipped: collected.skipped,
            faults: collected.faults,
            sampling: collected.sampling,
            seconds: collected.seconds,
            scored_by: collected.scored_by,
        })
    }

    fn advance(&mut self, collected: &mut Collected) {
        self.settle();
        self.state.step += 1;
        self.state.optimizer_step += u64::from(self.config.loss.num_iterations);
        self.state.tokens += collected.sampling.tokens as u64;
        self.state.epoch = collected.plan.epoch;
        self.state.outcomes = std::mem::take(&mut collected.outcomes);
    }

    fn learning_rate(&self) -> f64 {
        let optimizer = &self.config.optimizer;
        let (step, total) = (self.state.step, self.config.training.max_steps);
        let factor = optimizer
            .lr_scheduler_type
            .factor(step, total, optimizer.warmup_steps);
        optimizer.learning_rate * factor
    }

    /// Evaluates on the held-out rows and keeps the account of the best.
    pub fn evaluate(
        &mut self,
        on_progress: &mut dyn FnMut(Progress),
    ) -> anyhow::Result<EvalReport> {
        let report = self.evaluate_supervised(on_progress)?;
        if let Some(accuracy) = report.headline() {
            let step = self.state.step;
            if step == 0 {
                self.state.eval_before = Some(accuracy);
            }
            if self.state.best.is_none_or(|best| accuracy > best.accuracy) {
                self.state.best = Some(Best { step, accuracy });
                self.state.evals_without_gain = 0;
            } else {
                self.state.evals_without_gain += 1;
            }
        }
        Ok(report)
    }

    /// Whether evaluations have stopped getting better for as long as the config allows.
    pub fn out_of_patience(&self) -> bool {
        let patience = self.config.eval.early_stopping_patience;
        patience.is_some_and(|patience| self.state.evals_without_gain >= patience)
    }
}

/// How a config's updates are made.
pub fn update_config(config: &RunConfig) -> UpdateConfig {
    let loss = &config.loss;
    UpdateConfig {
        loss: loss_config(loss),
        micro_batch_tokens: config.training.micro_batch_tokens as usize,
        share_prompts: config.training.share_prompts,
        num_iterations: loss.num_iterations,
        recompute_old_logprobs: loss.recompute_old_logprobs,
        temperature: config.generation.temperature as f32,
        max_completion_length: config.generation.max_completion_length as usize,
    }
}

/// The loss that the config's keys describe.
pub fn loss_config(loss: &config::LossConfig) -> LossConfig {
    LossConfig {
        loss_type: loss.loss_type,
        epsilon: loss.epsilon,
        epsilon_high: loss.epsilon_high,
        delta: loss.delta,
        beta: loss.beta,
        kl_estimator: loss.kl_estimator,
        importance_correction: loss.importance_correction.mode,
        importance_c_max: loss.importance_correction.max,
        mask_truncated_completions: loss.mask_truncated_completions,
        ..LossConfig::default()
    }
}

/// The scored completions, flat. Skipped ones are not trained on.
fn sequences<'g>(
    groups: &'g [(Rollouts, Vec<Score>)],
    advantages: &Advantages,
) -> Vec<Sequence<'g>> {
    let mut out = Vec::new();
    for ((rollouts, scores), values) in groups.iter().zip(&advantages.values) {
        let samples = rollouts.completions.iter().zip(scores).zip(values);
        for ((completion, score), advantage) in samples {
            if matches!(score, Score::Value(_)) {
                let (prompt_ids, advantage) = (rollouts.prompt_ids.as_slice(), *advantage);
                out.push(Sequence {
                    prompt_ids,
                    completion,
                    advantage,
                });
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        grpo::advantage::ScaleRewards,
        types::{Completion, Finish, Parsed, Prompt, PromptBody, Scored, Telemetry},
    };

    fn completion(index: u32) -> Completion {
        Completion {
            request: 0,
            index,
            tokens: vec![index; index as usize + 1],
            logprobs: Vec::new(),
            policy_logprobs: Vec::new(),
            text: String::new(),
            finish: Finish::Stop,
            telemetry: Telemetry::default(),
            drafts: 0,
            accepted_per_pos: Vec::new(),
            top: Vec::new(),
        }
    }

    fn group(row: u64, rewards: &[Option<f64>]) -> (Rollouts, Vec<Score>) {
        let score = |reward: &Option<f64>| match reward {
            Some(total) => Score::Value(Scored {
                total: *total,
                parts: Vec::new(),
            }),
            None => Score::Skip("late".to_owned()),
        };
        let rollouts = Rollouts {
            row,
            row_json: String::new(),
            formatted: Prompt {
                body: PromptBody::Text(String::new()),
                stop: Vec::new(),
            },
            prompt: String::new(),
            prompt_ids: vec![row as u32],
            completions: (0..rewards.len() as u32).map(completion).collect(),
            parsed: vec![Parsed::default(); rewards.len()],
            waves: vec![0; rewards.len()],
        };
        (rollouts, rewards.iter().map(score).collect())
    }

    #[test]
    fn groups_of_different_sizes_keep_prompt_tokens_and_advantage_together() {
        let groups = [
            group(7, &[Some(1.0), Some(-1.0)]),
            group(9, &[Some(0.0), None, Some(3.0), Some(6.0)]),
            group(8, &[Some(2.0)]),
        ];
        let rewards: Vec<_> = groups.iter().map(|(_, scores)| totals(scores)).collect();
        let advantages = advantages(&rewards, ScaleRewards::None);
        let found: Vec<_> = sequences(&groups, &advantages)
            .iter()
            .map(|s| (s.prompt_ids[0], s.completion.index, s.advantage))
            .collect();
        // Means 0, 3 and 2; the skipped completion is gone.
        let expected = [
            (7, 0, 1.0),
            (7, 1, -1.0),
            (9, 0, -3.0),
            (9, 2, 0.0),
            (9, 3, 3.0),
            (8, 0, 0.0),
        ];
        assert_eq!(found, expected);
        let outcome = collect::outcome(&groups[1]);
        assert_eq!((outcome.row, outcome.skipped), (9, 1));
        assert_eq!(outcome.rewards, [0.0, 3.0, 6.0]);
    }

    #[test]
    fn packing_takes_sequences_as_they_come() {
        let groups = [
            group(7, &[Some(1.0), Some(0.0)]),
            group(9, &[Some(0.0), Some(1.0), Some(0.0)]),
        ];
        let rewards: Vec<_> = groups.iter().map(|(_, scores)| totals(scores)).collect();
        let advantages = advantages(&rewards, ScaleRewards::Group);
        let sequences = sequences(&groups, &advantages);
        // With a prompt of one token they have 2, 3, 2, 3 and 4.
        let sizes = |limit| -> Vec<usize> {
            crate::update::split(&sequences, limit, false)
                .map(<[_]>::len)
                .collect()
        };
        assert_eq!(sizes(7), [3, 2]);
        assert_eq!(sizes(5), [2, 2, 1]);
        assert_eq!(sizes(1), [1; 5]);
    }
}
