//! The loop: one step of GRPO from plan to report. What a step computes lives in the rooms; this file
//! only says in which order, and keeps what must survive from step to step.

use std::time::Instant;

use grpo_policy::engine::Progress;

use crate::{
    config::RunConfig,
    evaluate::{EvalReport, EvalSettings, Judges, evaluate, samples_of},
    grpo::{
        advantage::{Advantages, advantages},
        config::LossConfig,
        filter::{self, DynamicSampling, Refill},
    },
    policy::Policy,
    rollout::{Job, RolledOut, Rollouts, mix, roll},
    run::{Best, TrainState},
    setup::{Plugins, Rows},
    types::{Budget, Outcome, Pick, Plan, Row, Score},
    update::{Sequence, UpdateConfig, UpdateReport, update},
};

/// A step that cannot go on, without any component having failed.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    #[error("every completion of step {step} was skipped; the first one because {reason}")]
    AllSkipped { step: u64, reason: String },
    #[error("the prompts of all {rows} rows of step {step} are longer than {limit} tokens")]
    AllTooLong {
        step: u64,
        rows: usize,
        limit: usize,
    },
}

impl TrainError {
    /// What the reader can do about it.
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            Self::AllSkipped { .. } => {
                "check the reward's config and the columns of the data with `grpo-host eval`"
                    .to_owned()
            }
            Self::AllTooLong { .. } => {
                "raise max_prompt_length, or lower max_completion_length if the context is full"
                    .to_owned()
            }
        })
    }
}

/// Completions of one prompt with what the rewards said and what the update is to make of it.
pub struct Group {
    pub rollouts: Rollouts,
    /// One per completion, as are the advantages.
    pub scores: Vec<Score>,
    pub advantages: Vec<f64>,
}

/// Everything one step did, for the record.
pub struct StepReport {
    /// From 1.
    pub step: u64,
    /// The groups that were trained on.
    pub groups: Vec<Group>,
    pub advantages: Advantages,
    pub update: UpdateReport,
    pub learning_rate: f64,
    /// The curriculum's epoch and named numbers.
    pub plan: Plan,
    /// Samples each reward left out, and failures that its policy dealt with.
    pub skipped: Vec<(String, u32)>,
    pub faults: Vec<String>,
    pub sampling: SamplingReport,
    pub seconds: StepSeconds,
}

/// Work that dynamic sampling and length limits threw away.
#[derive(Clone, Copy, Debug, Default)]
pub struct SamplingReport {
    pub too_long: usize,
    pub dropped_groups: usize,
    pub refills: u32,
    /// Tokens of all completions, dropped ones included.
    pub tokens: usize,
}

/// Where the time of a step went.
#[derive(Clone, Copy, Debug, Default)]
pub struct StepSeconds {
    pub plan: f64,
    pub rollout: f64,
    pub reward: f64,
    pub update: f64,
    pub total: f64,
}

/// A run in progress.
pub struct Trainer<'a> {
    pub config: &'a RunConfig,
    pub policy: Policy,
    pub plugins: Plugins,
    pub rows: Rows,
    pub state: TrainState,
}

/// What a step collects over its generation rounds.
#[derive(Default)]
struct Collected {
    groups: Vec<(Rollouts, Vec<Score>)>,
    outcomes: Vec<Outcome>,
    sampling: SamplingReport,
    skipped: Vec<(String, u32)>,
    faults: Vec<String>,
    seconds: StepSeconds,
    plan: Plan,
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

    /// Plans and generates until there are enough groups that teach something.
    fn collect(&mut self, on_progress: &mut dyn FnMut(Progress)) -> anyhow::Result<Collected> {
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
        let plan = self
            .plugins
            .curriculum
            .plan(&self.state.curriculum, &outcomes, &budget)?;
        self.state.curriculum.clone_from(&plan.state);
        let picks = plan.picks.clone();
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
            loss: LossConfig {
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
            },
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

/// Total reward of each sample; `None` for a skipped one.
pub fn totals(scores: &[Score]) -> Vec<Option<f64>> {
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
