//! What a step tells the record, and why one may have to stop. Plain data.

use crate::{
    draft::Lesson,
    grpo::advantage::Advantages,
    rollout::Rollouts,
    speculation::Speculation,
    types::{Plan, PluginId, Score},
    update::UpdateReport,
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
    /// What the draft learnt, if it does.
    pub draft: Option<Lesson>,
    pub learning_rate: f64,
    /// The curriculum's epoch and named numbers, of the step's last plan; its reports are those of all.
    pub plan: Plan,
    /// Samples each reward left out, and failures that its policy dealt with.
    pub skipped: Vec<(String, u32)>,
    pub faults: Vec<String>,
    pub sampling: SamplingReport,
    pub seconds: StepSeconds,
    /// All components that touched the samples of each wave.
    pub scored_by: Vec<(u32, Vec<PluginId>)>,
}

impl StepReport {
    /// Groups with an advantage other than 0.
    pub fn teaching(&self) -> impl Iterator<Item = &Group> {
        let teaches = |g: &&Group| g.advantages.iter().any(|a| *a != 0.0);
        self.groups.iter().filter(teaches)
    }

    /// The step in words where it had nothing to learn from.
    pub fn nothing_learnt(&self) -> Option<String> {
        if self.teaching().next().is_some() {
            return None;
        }
        let (step, drawn) = (self.step, self.groups.len() + self.sampling.dropped_groups);
        let or_none = match self.skipped.iter().any(|(_, count)| *count > 0) {
            true => " or none",
            false => "",
        };
        Some(format!(
            "step {step}: no group teaches: all {drawn} drawn have equal rewards{or_none}"
        ))
    }
}

/// Work that dynamic sampling and length limits threw away.
#[derive(Clone, Debug, Default)]
pub struct SamplingReport {
    pub too_long: usize,
    pub dropped_groups: usize,
    /// Rounds of new prompts after the first.
    pub refills: u32,
    /// Completions drawn, those of dropped groups included.
    pub completions: usize,
    /// Those of them that dropped groups left to others.
    pub respent: usize,
    /// Tokens of all completions, dropped ones included.
    pub tokens: usize,
    /// Drafts of all completions, dropped ones included.
    pub speculation: Speculation,
    /// Completions that the curriculum planned, over all plans of the step.
    pub planned: u64,
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
