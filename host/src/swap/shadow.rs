//! Shadowing: what a candidate says of the samples of a step, beside the reward that counts. Formatters and curricula have
//! [`super::shadow_texts`] and [`super::shadow_plans`].

use serde::{Deserialize, Serialize};

use super::{
    shadow_plans::{PlanReport, TappedPlan},
    shadow_texts::{TappedGroup, TextReport},
};
use crate::{
    plugin::{PluginError, RewardPlugin, SetScoring},
    replay::{pearson, spearman},
    types::{Finish, Parsed, Sample, Score, Telemetry},
};

/// Two rewards no further apart are the same.
const SAME: f64 = 1e-9;
/// Samples whose pairs are kept for the correlations.
const MAX_PAIRS: usize = 1 << 16;

/// A step, for a candidate of whatever role; of the other roles nothing.
#[derive(Default)]
pub(super) struct TappedStep {
    pub(super) waves: Vec<TappedWave>,
    pub(super) groups: Vec<TappedGroup>,
    pub(super) plans: Vec<TappedPlan>,
}

impl TappedStep {
    pub(super) fn is_empty(&self) -> bool {
        self.waves.is_empty() && self.groups.is_empty() && self.plans.is_empty()
    }
}

/// What shadowing has found of a candidate.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum ShadowReport {
    Reward(RewardReport),
    Formatter(TextReport),
    Curriculum(PlanReport),
}

impl std::fmt::Display for ShadowReport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Reward(report) => report.fmt(f),
            Self::Formatter(report) => report.fmt(f),
            Self::Curriculum(report) => report.fmt(f),
        }
    }
}

/// Copies the waves of a step for a candidate.
pub struct Tap {
    /// Place of the reward that the candidate is to replace.
    pub slot: usize,
    pub waves: Vec<TappedWave>,
}

/// One wave, and what the reward that counts said of it.
pub struct TappedWave {
    /// Row and prompt; neighbours that share them refer to the same one, as a reward is told so by address.
    questions: Vec<(String, String)>,
    samples: Vec<Tapped>,
    live: Vec<Option<f64>>,
    live_seconds: f64,
}

struct Tapped {
    question: usize,
    row_id: u64,
    completion: String,
    parsed: Parsed,
    finish: Finish,
    telemetry: Telemetry,
}

impl Tap {
    /// Copies the samples of a wave.
    pub fn take(&mut self, samples: &[Sample<'_>], scoring: &SetScoring) {
        let Some(live) = scoring.members.get(self.slot) else {
            return;
        };
        let mut questions: Vec<(String, String)> = Vec::new();
        let mut last: Option<(&str, &str)> = None;
        let mut tapped = Vec::with_capacity(samples.len());
        for sample in samples {
            let (row, prompt) = (sample.row_json, sample.prompt);
            if !last.is_some_and(|(r, p)| std::ptr::eq(r, row) && std::ptr::eq(p, prompt)) {
                questions.push((row.to_owned(), prompt.to_owned()));
                last = Some((row, prompt));
            }
            tapped.push(Tapped {
                question: questions.len() - 1,
                row_id: sample.row_id,
                completion: sample.completion.to_owned(),
                parsed: sample.parsed.clone(),
                finish: sample.finish,
                telemetry: sample.telemetry,
            });
        }
        self.waves.push(TappedWave {
            questions,
            samples: tapped,
            live: live.totals.clone(),
            live_seconds: live.seconds,
        });
    }
}

impl TappedWave {
    fn samples(&self) -> Vec<Sample<'_>> {
        self.samples
            .iter()
            .map(|tapped| self.sample(tapped))
            .collect()
    }

    fn sample<'a>(&'a self, tapped: &'a Tapped) -> Sample<'a> {
        let (row_json, prompt) = &self.questions[tapped.question];
        Sample {
            row_id: tapped.row_id,
            row_json,
            prompt,
            completion: &tapped.completion,
            parsed: &tapped.parsed,
            finish: tapped.finish,
            telemetry: tapped.telemetry,
        }
    }
}

/// What has been found so far of a reward.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RewardReport {
    pub samples: u64,
    /// Those on which the candidate failed.
    pub failed: u64,
    /// Share of samples that get the same reward (within 1e-9), or none, from both.
    pub agreement: Option<f64>,
    /// Of the rewards of samples that both score; `None` where one of the two says the same of all.
    pub pearson: Option<f64>,
    pub spearman: Option<f64>,
    /// Microseconds of a sample: of the candidate in processor time, of the reward that counts by the clock.
    pub micros: Option<f64>,
    pub live_micros: Option<f64>,
}

impl std::fmt::Display for RewardReport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let number = |x: Option<f64>| x.map_or("–".to_owned(), |x| format!("{x:.3}"));
        let share = self
            .agreement
            .map_or("–".to_owned(), |x| format!("{:.1} %", 100.0 * x));
        let micros = |x: Option<f64>| x.map_or("–".to_owned(), |x| format!("{x:.1}"));
        write!(
            f,
            "{} samples, {} failed, {share} agree, Pearson {}, Spearman {}, {} µs a sample (now {} µs)",
            self.samples,
            self.failed,
            number(self.pearson),
            number(self.spearman),
            micros(self.micros),
            micros(self.live_micros)
        )
    }
}

/// Sums over the steps of one candidate.
#[derive(Default)]
pub(super) struct Shadow {
    pairs: Vec<(f64, f64)>,
    samples: u64,
    same: u64,
    failed: u64,
    seconds: f64,
    live_seconds: f64,
}

impl Shadow {
    /// Scores a step with the candidate.
    ///
    /// # Errors
    /// A failure under a policy that gives up at it.
    pub(super) fn add(
        &mut self,
        candidate: &RewardPlugin,
        waves: &[TappedWave],
    ) -> Result<(), PluginError> {
        for wave in waves {
            let samples = wave.samples();
            let begun = thread_seconds();
            let scoring = candidate.score(&samples)?;
            self.seconds += thread_seconds() - begun;
            self.live_seconds += wave.live_seconds;
            self.samples += samples.len() as u64;
            self.failed += u64::from(scoring.failed);
            for (score, live) in scoring.scores.iter().zip(&wave.live) {
                let new = match score {
                    Score::Value(scored) => Some(scored.total),
                    Score::Skip(_) => None,
                };
                self.same += u64::from(match (new, live) {
                    (Some(new), Some(live)) => (new - live).abs() <= SAME,
                    (new, live) => new.is_none() && live.is_none(),
                });
                if let (Some(new), Some(live), true) = (new, live, self.pairs.len() < MAX_PAIRS) {
                    self.pairs.push((*live, new));
                }
            }
        }
        Ok(())
    }

    pub(super) fn report(&self) -> RewardReport {
        let per_sample = |x: f64| (self.samples > 0).then(|| x / self.samples as f64);
        RewardReport {
            samples: self.samples,
            failed: self.failed,
            agreement: per_sample(self.same as f64),
            pearson: pearson(&self.pairs),
            spearman: spearman(&self.pairs),
            micros: per_sample(self.seconds * 1e6),
            live_micros: per_sample(self.live_seconds * 1e6),
        }
    }

    /// Whether more than this share of the samples failed.
    pub(super) fn fails(&self, max_failure_rate: f64) -> bool {
        self.failed as f64 > max_failure_rate * self.samples as f64
    }
}

/// Processor time of the calling thread: a candidate's thread yields to the run, so the clock would measure the run.
pub(super) fn thread_seconds() -> f64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
}
