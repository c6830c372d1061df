//! What one completion cost: its clock, and the telemetry made of it. Reads the time, decides nothing.

use std::time::{Duration, Instant};

use crate::types::Telemetry;

/// When things happened to one completion.
#[derive(Clone, Copy, Debug)]
pub(super) struct Clock {
    arrived: Instant,
    scheduled: Option<Instant>,
    first_token: Option<Instant>,
}

impl Clock {
    pub(super) fn start(now: Instant) -> Self {
        Self {
            arrived: now,
            scheduled: None,
            first_token: None,
        }
    }

    /// Only the first call counts: after a preemption the wait is part of prefill or decode, as in vLLM.
    pub(super) fn scheduled(&mut self, now: Instant) {
        self.scheduled.get_or_insert(now);
    }

    /// Only the first call counts.
    pub(super) fn sampled(&mut self, now: Instant) {
        self.first_token.get_or_insert(now);
    }

    /// The three phases and their sum. A phase that was never reached, because the caller aborted, ends at
    /// `now`.
    pub(super) fn finish(&self, now: Instant) -> Telemetry {
        let scheduled = self.scheduled.unwrap_or(now);
        let first_token = self.first_token.unwrap_or(now);
        Telemetry {
            latency_ms: milliseconds(now.duration_since(self.arrived)),
            queue_ms: milliseconds(scheduled.duration_since(self.arrived)),
            prefill_ms: milliseconds(first_token.duration_since(scheduled)),
            decode_ms: milliseconds(now.duration_since(first_token)),
            ..Telemetry::default()
        }
    }
}

fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_add_up_and_only_first_times_count() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut clock = Clock::start(start);
        clock.scheduled(at(10));
        clock.scheduled(at(500));
        clock.sampled(at(40));
        clock.sampled(at(90));
        let telemetry = clock.finish(at(100));
        assert_eq!(telemetry.queue_ms, 10.0);
        assert_eq!(telemetry.prefill_ms, 30.0);
        assert_eq!(telemetry.decode_ms, 60.0);
        assert_eq!(telemetry.latency_ms, 100.0);
        let never = Clock::start(start).finish(at(7));
        assert_eq!(
            (never.queue_ms, never.prefill_ms, never.decode_ms),
            (7.0, 0.0, 0.0)
        );
    }
}
