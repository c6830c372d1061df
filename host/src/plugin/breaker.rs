//! The breaker of a reward: one that fails whole again and again is left alone for a while.
//!
//! Pauses are counted in requests and not in seconds, so that they are the same on every machine.

use super::error::Fault;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Requests in a row that must fail whole before the breaker opens.
const PATIENCE: u32 = 3;
/// Longest pause, in requests; pauses double from 1 up to it.
const LONGEST_PAUSE: u32 = 64;

/// Opens after [`PATIENCE`] requests without a single score, lets one request through after each
/// pause, and closes when that one yields a score.
pub(super) struct Breaker(Mutex<State>);

struct State {
    /// Requests in a row that yielded no score.
    failures: u32,
    /// Requests still to be refused before the next one is let through.
    waiting: u32,
    /// The pause after the next failure.
    pause: u32,
}

impl Breaker {
    pub(super) fn new() -> Self {
        Self(Mutex::new(State {
            failures: 0,
            waiting: 0,
            pause: 1,
        }))
    }

    /// Whether a request may be made.
    ///
    /// # Errors
    /// [`Fault::Resting`] during a pause.
    pub(super) fn admit(&self) -> Result<(), Fault> {
        let mut state = self.lock();
        let failures = state.failures;
        match state.waiting.checked_sub(1) {
            None => Ok(()),
            Some(left) => {
                state.waiting = left;
                Err(Fault::Resting { failures })
            }
        }
    }

    /// Tells how a request that was let through ended: with a score for some sample, or with none.
    pub(super) fn record(&self, scored: bool) {
        let mut state = self.lock();
        if scored {
            (state.failures, state.waiting, state.pause) = (0, 0, 1);
            return;
        }
        state.failures = state.failures.saturating_add(1);
        if state.failures >= PATIENCE {
            state.waiting = state.pause;
            state.pause = (state.pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// The numbers are valid at any moment, so a poisoned lock is as good as another.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_the_longest() {
        let breaker = Breaker::new();
        let mut made = Vec::new();
        for request in 0..400_u32 {
            match breaker.admit() {
                Ok(()) => {
                    made.push(request);
                    breaker.record(false);
                }
                Err(fault) => {
                    let failures = made.len() as u32;
                    assert_eq!(fault, Fault::Resting { failures });
                }
            }
        }
        // Three at once, then pauses of 1, 2, 4, 8, 16, 32, 64, 64, 64, 64 requests.
        let expected = [0, 1, 2, 4, 7, 12, 21, 38, 71, 136, 201, 266, 331, 396];
        assert_eq!(made, expected);
    }

    #[test]
    fn one_score_closes_it() {
        let breaker = Breaker::new();
        for _ in 0..3 {
            assert_eq!(breaker.admit(), Ok(()));
            breaker.record(false);
        }
        assert_eq!(breaker.admit(), Err(Fault::Resting { failures: 3 }));
        assert_eq!(breaker.admit(), Ok(()));
        breaker.record(true);
        for _ in 0..3 {
            assert_eq!(breaker.admit(), Ok(()));
            breaker.record(false);
        }
        assert_eq!(breaker.admit(), Err(Fault::Resting { failures: 3 }));
    }
}
