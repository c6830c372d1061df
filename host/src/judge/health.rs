//! Whether an endpoint is worth asking: one that has failed many times in a row is left alone for a while, so that a
//! dead one does not cost every batch its whole deadline. Then one question finds out whether it is back.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

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
    pub(super) fn admit(&self) -> Result<Pass<'_>, String> {
        self.admit_at(Instant::now())
    }

    /// Why who has leave should not try again: others have found out meanwhile that it is in vain.
    pub(super) fn check(&self) -> Result<(), String> {
        let state = self.lock();
        match state.rests_until {
            Some(until) if until > Instant::now() => Err(state.why()),
            _ => Ok(()),
        }
    }

    fn admit_at(&self, now: Instant) -> Result<Pass<'_>, String> {
        let mut state = self.lock();
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
    fn why(&self) -> String {
        let Self { failures, last, .. } = self;
        format!("left alone after {failures} failures in a row, the last: {last}")
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

    /// It has answered, be it with a refusal.
    pub(super) fn answered(mut self) {
        self.sent = false;
        *self.health.lock() = State::default();
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
            refused,
            "left alone after 16 failures in a row, the last: no answer in time"
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
