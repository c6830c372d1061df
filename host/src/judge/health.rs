//! Whether an endpoint is worth asking: one that has failed many times in a row is left alone for a while, so that a
//! dead one does not cost every batch its whole deadline. Then one question finds out whether it is back. One that would
//! answer nobody, for want of money or of a key that it knows, is asked no more at all.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use super::JudgeError;

/// Questions in a row that failed to the end.
const REST_AFTER: u32 = 16;
const REST: Duration = Duration::from_secs(30);

pub(super) struct Health(Mutex<State>);

#[derive(Default)]
struct State {
    failures: u32,
    /// When it may be tried again.
    rests_until: Option<Instant>,
    trying: bool,
    last: String,
    /// It has answered a question, and so knows the key.
    has_answered: bool,
    /// Why nothing is asked any more.
    closed: Option<Closed>,
}

struct Closed {
    why: JudgeError,
    /// An answer to what was under way would show that it is not so.
    is_guess: bool,
}

/// Leave to ask. Dropped without a verdict after something was sent, it counts as a failure.
pub(super) struct Pass<'h> {
    health: &'h Health,
    is_trial: bool,
    sent: bool,
}

impl Health {
    pub(super) fn new() -> Self {
        Self(Mutex::default())
    }

    /// Leave to ask now, or why not.
    pub(super) fn admit(&self) -> Result<Pass<'_>, JudgeError> {
        self.admit_at(Instant::now())
    }

    /// Why who has leave should not try again: others have found out meanwhile that it is in vain.
    pub(super) fn check(&self) -> Result<(), JudgeError> {
        let state = self.lock();
        state.open()?;
        match state.rests_until {
            Some(until) if until > Instant::now() => Err(state.why()),
            _ => Ok(()),
        }
    }

    /// The error of all questions, if it is asked no more.
    pub(super) fn is_open(&self) -> Result<(), JudgeError> {
        self.lock().open()
    }

    /// Whether it has answered a question.
    pub(super) fn has_answered(&self) -> bool {
        self.lock().has_answered
    }

    fn admit_at(&self, now: Instant) -> Result<Pass<'_>, JudgeError> {
        let mut state = self.lock();
        state.open()?;
        let is_trial = state.rests_until.is_some();
        if let Some(until) = state.rests_until
            && (until > now || state.trying)
        {
            return Err(state.why());
        }
        state.trying = is_trial;
        Ok(Pass {
            health: self,
            is_trial,
            sent: false,
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn open(&self) -> Result<(), JudgeError> {
        self.closed
            .as_ref()
            .map_or(Ok(()), |closed| Err(closed.why.clone()))
    }

    fn why(&self) -> JudgeError {
        let Self { failures, last, .. } = self;
        JudgeError::Unavailable(format!(
            "left alone after {failures} failures in a row, the last: {last}"
        ))
    }

    /// It works, whatever it says.
    fn recover(&mut self) {
        self.failures = 0;
        self.rests_until = None;
        self.trying = false;
    }
}

impl Pass<'_> {
    /// Something has gone out, so an end without a verdict is the endpoint's failure.
    pub(super) fn sent(&mut self) {
        self.sent = true;
    }

    /// Nothing was found out that others have not.
    pub(super) fn withdraw(mut self) {
        self.sent = false;
    }

    /// It has answered.
    pub(super) fn answered(mut self) {
        self.sent = false;
        let mut state = self.health.lock();
        state.recover();
        state.has_answered = true;
        state.closed.take_if(|closed| closed.is_guess);
    }

    /// It has refused this question.
    pub(super) fn refused(mut self) {
        self.sent = false;
        self.health.lock().recover();
    }

    /// It would refuse every question, or, if that `is_guess`, seems to.
    pub(super) fn closed(mut self, why: JudgeError, is_guess: bool) {
        self.sent = false;
        let mut state = self.health.lock();
        state.recover();
        if state.closed.as_ref().is_none_or(|closed| closed.is_guess) {
            state.closed = Some(Closed { why, is_guess });
        }
    }

    /// It has not.
    pub(super) fn failed(mut self, reason: &str) {
        self.sent = false;
        self.count(reason, Instant::now());
    }

    fn count(&self, reason: &str, now: Instant) {
        let mut state = self.health.lock();
        state.failures += 1;
        reason.clone_into(&mut state.last);
        if state.failures >= REST_AFTER {
            state.rests_until = Some(now + REST);
        }
    }
}

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        if self.sent {
            self.count("no answer in time", Instant::now());
        }
        if self.is_trial {
            self.health.lock().trying = false;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_failures_in_a_row_bring_rest_and_then_one_trial() {
        let health = Health::new();
        for _ in 0..REST_AFTER - 1 {
            health.admit().unwrap().failed("HTTP 503");
        }
        let mut cut_off = health.admit().unwrap();
        cut_off.sent();
        drop(cut_off);
        let refused = health.admit().err().unwrap();
        assert_eq!(
            refused.to_string(),
            "the judge is unavailable: left alone after 16 failures in a row, the last: no answer in time"
        );
        let later = Instant::now() + REST;
        let trial = health.admit_at(later).unwrap();
        assert!(health.admit_at(later).is_err(), "one trial at a time");
        // Nothing was sent: nothing is known.
        drop(trial);
        let trial = health.admit_at(later).unwrap();
        trial.answered();
        assert!(health.admit().is_ok() && health.admit().is_ok());
    }

    #[test]
    fn what_would_answer_nobody_is_asked_no_more() {
        let (money, key) = (
            JudgeError::Exhausted("no money".to_owned()),
            JudgeError::Refused("no such key".to_owned()),
        );
        let health = Health::new();
        let under_way = health.admit().unwrap();
        health.admit().unwrap().closed(key.clone(), true);
        assert_eq!(health.admit().err(), Some(key.clone()));
        assert_eq!(health.check(), Err(key.clone()));
        // A trial does not reopen it either.
        let later = Instant::now() + 2 * REST;
        assert_eq!(health.admit_at(later).err(), Some(key.clone()));
        // An answer shows that the guess was wrong; what is certain stays.
        under_way.answered();
        assert!(health.has_answered());
        let under_way = health.admit().unwrap();
        health.admit().unwrap().closed(money.clone(), false);
        under_way.answered();
        assert_eq!(health.is_open(), Err(money.clone()));
    }

    #[test]
    fn answers_in_between_keep_an_endpoint_in_use() {
        let health = Health::new();
        for _ in 0..4 {
            for _ in 0..REST_AFTER - 1 {
                health.admit().unwrap().failed("HTTP 500");
            }
            health.admit().unwrap().answered();
        }
        assert!(health.admit().is_ok());
    }
}
