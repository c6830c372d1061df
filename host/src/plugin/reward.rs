//! A reward plugin: one call per batch, and what to do when it fails.

use super::breaker::Breaker;
use super::check;
use super::error::{Call, Fault, PluginError};
use super::limits::{Isolation, OnFailure};
use super::sandbox::{Loaded, Session, Wall};
use super::v0_1::{scoring, wit};
use super::warm::{Open, Pool, Share};
use crate::types::{Finish, PluginId, Sample, Score, Scored, Telemetry};
use std::ptr;

/// Part of a score that the config has for failed calls.
const FAILED: &str = "failed";

/// A loaded reward. Calls from several threads run side by side, each in an instance of its own.
pub struct RewardPlugin {
    // Before `loaded`, so that instances go before what they are made of.
    pool: Pool<scoring::Guest>,
    loaded: Loaded,
    exports: scoring::GuestIndices,
    breaker: Breaker,
    parts: check::Names,
}

/// The scores of a batch, and the failures met on the way to them.
#[derive(Debug, PartialEq)]
pub struct Scoring {
    /// One per sample, in order.
    pub scores: Vec<Score>,
    /// Failures that `on_failure` dealt with: those of skipped samples, those a retry cured, and
    /// those of a batch whose samples all pass alone.
    pub faults: Vec<PluginError>,
    /// Samples without a score because the plugin failed or was left alone; a `skip` of its own is no failure.
    pub failed: u32,
}

/// A sample's score, or why it has none.
type Outcome = Result<Score, PluginError>;

/// An instance that scores batch after batch, for measuring the bare call. State may pass from one
/// batch to the next, so training does not use it.
pub struct WarmReward<'a> {
    plugin: &'a RewardPlugin,
    open: Open<scoring::Guest>,
}

impl RewardPlugin {
    pub(super) fn new(loaded: Loaded, share: Option<Share>) -> Result<Self, PluginError> {
        if share.is_some() && loaded.limits.isolation == Isolation::Sample {
            let why = "`isolation: sample` asks for a fresh instance for each sample";
            return Err(loaded.error(Call::Load, Fault::NotWarm { why }));
        }
        let exports = scoring::GuestIndices::new(&loaded.pre).map_err(|e| loaded.misfit(&e))?;
        let plugin = Self {
            pool: Pool::new(share),
            loaded,
            exports,
            breaker: Breaker::new(),
            parts: check::Names::default(),
        };
        let wall = plugin.loaded.wall();
        plugin
            .pool
            .lease(|stays| plugin.open(wall, stays))?
            .put_back();
        Ok(plugin)
    }

    /// Role, name and digest.
    pub fn id(&self) -> &PluginId {
        &self.loaded.id
    }

    /// Scores a batch in fresh instances, as `isolation` says, or in those of a warm pool. Where a batch fails, its samples are
    /// scored one by one to find the guilty ones, and `on_failure` is applied to those alone. Never
    /// makes up a score, unless the config has one for it. Under `skip`, a plugin of which several requests in a row yielded no
    /// score is left alone for some ([`Fault::Resting`]).
    ///
    /// # Errors
    /// Under `abort`, and under `retry` once the retries are used up: the first failure, with its row.
    pub fn score(&self, samples: &[Sample<'_>]) -> Result<Scoring, PluginError> {
        self.score_noting(samples, &mut |_, _| {})
    }

    /// [`RewardPlugin::score`] that tells `note` of each sample whose call failed to the end, by its place in `samples`: those
    /// that are skipped, and the one for which `abort` and `retry` give up.
    ///
    /// # Errors
    /// As [`RewardPlugin::score`].
    pub fn score_noting(
        &self,
        samples: &[Sample<'_>],
        note: &mut dyn FnMut(usize, &PluginError),
    ) -> Result<Scoring, PluginError> {
        let on_failure = self.loaded.limits.on_failure;
        let goes_on = matches!(on_failure, OnFailure::Skip | OnFailure::Score(_));
        let rests = goes_on && !samples.is_empty();
        if rests && let Err(fault) = self.breaker.admit() {
            return Ok(self.refuse(samples, fault));
        }
        let wall = self.loaded.wall();
        let mut faults = Vec::new();
        let mut outcomes = match self.loaded.limits.isolation {
            Isolation::Batch => self.batch(samples, wall, &mut faults)?,
            Isolation::Sample => self.one_by_one(samples, wall),
        };
        if on_failure == OnFailure::Retry {
            self.retry(samples, &mut outcomes, wall, &mut faults);
        }
        let has_score = |outcome: &Outcome| match outcome {
            Ok(_) => true,
            Err(error) => made_up(on_failure, error).is_some(),
        };
        if rests {
            self.breaker.record(outcomes.iter().any(has_score));
        }
        let mut scores = Vec::with_capacity(samples.len());
        let mut failed = 0;
        for (place, outcome) in outcomes.into_iter().enumerate() {
            if let Err(error) = &outcome {
                note(place, error);
                failed += u32::from(!has_score(&outcome));
            }
            match outcome {
                Ok(score) => scores.push(score),
                Err(error) if goes_on => {
                    let skip = || Score::Skip(error.fault.to_string());
                    scores.push(made_up(on_failure, &error).unwrap_or_else(skip));
                    faults.push(error);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(Scoring {
            scores,
            faults,
            failed,
        })
    }

    /// The whole batch skipped, for a reason that is no sample's.
    fn refuse(&self, samples: &[Sample<'_>], fault: Fault) -> Scoring {
        Scoring {
            scores: vec![Score::Skip(fault.to_string()); samples.len()],
            faults: vec![self.loaded.error(Call::Score, fault)],
            failed: samples.len() as u32,
        }
    }

    /// Opens an instance that stays, for [`WarmReward::score`].
    ///
    /// # Errors
    /// As for loading.
    pub fn warm(&self) -> Result<WarmReward<'_>, PluginError> {
        let open = self.open(self.loaded.wall(), false)?;
        Ok(WarmReward { plugin: self, open })
    }

    /// One call for all; if it fails as a whole, one by one. Under `abort` the error then names the
    /// first sample that fails alone as well, and the batch's failure stands if none does.
    fn batch(
        &self,
        samples: &[Sample<'_>],
        wall: Wall,
        faults: &mut Vec<PluginError>,
    ) -> Result<Vec<Outcome>, PluginError> {
        let whole = match self.request(samples, wall) {
            Ok(outcomes) => return Ok(outcomes),
            Err(error) => error,
        };
        if let [only] = samples {
            let row = Some(only.row_id);
            return Ok(vec![Err(PluginError { row, ..whole })]);
        }
        let outcomes = self.one_by_one(samples, wall);
        if outcomes.iter().all(Result::is_ok) {
            if self.loaded.limits.on_failure == OnFailure::Abort {
                return Err(whole);
            }
            faults.push(whole);
        }
        Ok(outcomes)
    }

    /// Linear rather than by halves: what fails is mostly a deadline, and halving meets each guilty
    /// sample's deadline once per level.
    fn one_by_one(&self, samples: &[Sample<'_>], wall: Wall) -> Vec<Outcome> {
        let stop_early = self.loaded.limits.on_failure == OnFailure::Abort;
        let mut outcomes = Vec::with_capacity(samples.len());
        for sample in samples {
            outcomes.push(self.single(sample, wall));
            if stop_early && outcomes.last().is_some_and(Result::is_err) {
                break;
            }
        }
        outcomes
    }

    fn single(&self, sample: &Sample<'_>, wall: Wall) -> Outcome {
        let name_row = |error| PluginError {
            row: Some(sample.row_id),
            ..error
        };
        let mut outcomes = self
            .request(std::slice::from_ref(sample), wall)
            .map_err(name_row)?;
        outcomes.pop().unwrap_or_else(|| {
            let fault = Fault::Length {
                expected: 1,
                found: 0,
            };
            Err(name_row(self.loaded.error(Call::Score, fault)))
        })
    }

    fn retry(
        &self,
        samples: &[Sample<'_>],
        outcomes: &mut [Outcome],
        wall: Wall,
        faults: &mut Vec<PluginError>,
    ) {
        for (sample, outcome) in samples.iter().zip(outcomes) {
            for _ in 0..self.loaded.limits.retries {
                if outcome.is_ok() {
                    break;
                }
                let again = self.single(sample, wall);
                if let Err(error) = std::mem::replace(outcome, again) {
                    faults.push(error);
                }
            }
        }
    }

    fn request(&self, samples: &[Sample<'_>], wall: Wall) -> Result<Vec<Outcome>, PluginError> {
        let mut lease = self.pool.lease(|stays| self.open(wall, stays))?;
        let Open { session, guest, .. } = lease.open();
        session.renew(wall);
        let outcomes = self.call(session, guest, samples)?;
        // An instance that returned nonsense is not trusted with another request.
        if outcomes.iter().all(Result::is_ok) {
            lease.keep();
        }
        Ok(outcomes)
    }

    fn open(&self, wall: Wall, stays: bool) -> Result<Open<scoring::Guest>, PluginError> {
        let mut session = self.loaded.start(wall, stays)?;
        let guest = self
            .loaded
            .call(&mut session, Call::Configure, |store, instance| {
                let guest = self.exports.load(&mut *store, instance)?;
                let configured = guest.call_configure(store, &self.loaded.config)?;
                Ok(configured.map(|()| guest))
            })?;
        Ok(Open::new(session, guest))
    }

    /// The outer error is one of the whole batch, the inner ones are of single samples.
    fn call(
        &self,
        session: &mut Session,
        guest: &scoring::Guest,
        samples: &[Sample<'_>],
    ) -> Result<Vec<Outcome>, PluginError> {
        let (questions, lowered) = lower(samples);
        let verdicts = self.loaded.call(session, Call::Score, |store, _| {
            let costs = samples.iter().map(|s| lower_telemetry(&s.telemetry));
            store.data_mut().telemetry.extend(costs);
            let returned = guest.call_score(&mut *store, &questions, &lowered);
            store.data_mut().telemetry.clear();
            returned
        })?;
        let error = |fault| self.loaded.error(Call::Score, fault);
        let verdicts = check::length(verdicts, samples.len()).map_err(error)?;
        let outcome = |(verdict, sample): (_, &Sample<'_>)| {
            let checked = check::score(verdict, &self.loaded.reach.secrets).and_then(|score| {
                if let Score::Value(scored) = &score {
                    self.parts.admit(&scored.parts)?;
                }
                Ok(score)
            });
            checked.map_err(|fault| PluginError {
                row: Some(sample.row_id),
                ..error(fault)
            })
        };
        Ok(verdicts.into_iter().zip(samples).map(outcome).collect())
    }
}

impl WarmReward<'_> {
    /// Scores a batch in the same instance as the one before; no failure policy.
    ///
    /// # Errors
    /// The first failure. The instance cannot be used after a trap.
    pub fn score(&mut self, samples: &[Sample<'_>]) -> Result<Vec<Score>, PluginError> {
        let Open { session, guest, .. } = &mut self.open;
        session.renew(self.plugin.loaded.wall());
        let outcomes = self.plugin.call(session, guest, samples)?;
        outcomes.into_iter().collect()
    }
}

/// The score that the config has for a sample on which a call failed, with the part [`FAILED`].
fn made_up(on_failure: OnFailure, error: &PluginError) -> Option<Score> {
    match on_failure {
        OnFailure::Score(total) if error.fault.is_of_the_sample() => {
            let parts = vec![(FAILED.to_owned(), 1.0)];
            Some(Score::Value(Scored { total, parts }))
        }
        _ => None,
    }
}

/// The batch as the guest sees it. Neighbours that share row and prompt, as the completions of a group
/// do, share one question; sharing is told by address, because comparing the texts would read them all.
fn lower<'a>(samples: &[Sample<'a>]) -> (Vec<wit::Question<'a>>, Vec<wit::Sample<'a>>) {
    let mut questions: Vec<wit::Question<'_>> = Vec::new();
    let mut lowered = Vec::with_capacity(samples.len());
    for sample in samples {
        let (row, prompt) = (sample.row_json, sample.prompt);
        let same = |q: &wit::Question<'_>| ptr::eq(q.row, row) && ptr::eq(q.prompt, prompt);
        if !questions.last().is_some_and(same) {
            questions.push(wit::Question { row, prompt });
        }
        lowered.push(lower_sample(sample, (questions.len() - 1) as u32));
    }
    (questions, lowered)
}

fn lower_sample<'a>(sample: &Sample<'a>, question: u32) -> wit::Sample<'a> {
    wit::Sample {
        question,
        completion: sample.completion,
        reasoning: sample.parsed.reasoning.as_deref(),
        answer: sample.parsed.answer.as_deref(),
        finish: match sample.finish {
            Finish::Stop => wit::Finish::Stop,
            Finish::Length => wit::Finish::Length,
            Finish::Abort => wit::Finish::Abort,
        },
    }
}

fn lower_telemetry(t: &Telemetry) -> wit::Telemetry {
    wit::Telemetry {
        latency_ms: t.latency_ms,
        queue_ms: t.queue_ms,
        prefill_ms: t.prefill_ms,
        decode_ms: t.decode_ms,
        prompt_tokens: t.prompt_tokens,
        cached_prompt_tokens: t.cached_prompt_tokens,
        generated_tokens: t.generated_tokens,
        draft_tokens: t.draft_tokens,
        accepted_tokens: t.accepted_tokens,
        kv_bytes: t.kv_bytes,
    }
}
