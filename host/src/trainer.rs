//! The loop: one step of GRPO from plan to report. What a step computes lives in the rooms; this file
//! only says in which order, and keeps what must survive from step to step.

mod collect;
mod report;
mod respend;

use std::time::Instant;

use grpo_policy::engine::Progress;

use crate::{
    config::{self, RunConfig},
    draft,
    evaluate::{EvalReport, EvalSettings, Judges, evaluate},
    grpo::{
        advantage::{Advantages, advantages},
        config::LossConfig,
    },
    policy::Policy,
    rollout::Rollouts,
    run::{Best, TrainState},
    setup::{Plugins, Rows},
    types::{Row, Score},
    update::{Sequence, UpdateConfig, update},
};

use collect::{Collected, totals};
pub use report::{Group, SamplingReport, StepReport, StepSeconds, TrainError};

/// A run in progress.
pub struct Trainer<'a> {
    pub config: &'a RunConfig,
    pub policy: Policy,
    pub plugins: Plugins,
    pub rows: Rows,
    pub state: TrainState,
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
            self.update_config(),
            self.config.optimizer.step(learning_rate),
        );
        let update = update(&mut self.policy.backend, &sequences, &settings, &optimizer)?;
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
        })
    }

    fn advance(&mut self, collected: &mut Collected) {
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

    fn update_config(&self) -> UpdateConfig {
        let loss = &self.config.loss;
        UpdateConfig {
            loss: loss_config(loss),
            micro_batch_tokens: self.config.training.micro_batch_tokens as usize,
            num_iterations: loss.num_iterations,
            recompute_old_logprobs: loss.recompute_old_logprobs,
            temperature: self.config.generation.temperature as f32,
            max_completion_length: self.config.generation.max_completion_length as usize,
        }
    }

    /// Evaluates on the held-out rows and keeps the account of the best.
    pub fn evaluate(
        &mut self,
        on_progress: &mut dyn FnMut(Progress),
    ) -> anyhow::Result<EvalReport> {
        let settings = EvalSettings::of(self.config);
        let judges = Judges {
            formatter: &self.plugins.formatter,
            rewards: &self.plugins.rewards,
            math: &self.plugins.math,
        };
        let rows: &[Row] = &self.rows.eval;
        let report = evaluate(&mut self.policy, &judges, rows, &settings, on_progress)?;
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
