//! A clock that advances by one nanosecond whenever somebody looks at it.
//!
//! The interpreter looks once per 255 instructions, and more often inside of long built-in operations, so that its limit
//! of time becomes a limit of steps which is the same on every machine.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

static LOOKS: AtomicU64 = AtomicU64::new(0);

/// A moment, as the number of looks before it.
#[derive(Clone, Copy, Debug)]
pub struct Instant(u64);

impl Instant {
    /// Looks at the clock.
    pub fn now() -> Self {
        Self(LOOKS.fetch_add(1, Ordering::Relaxed))
    }

    /// Looks since then, this one included, as nanoseconds.
    pub fn elapsed(&self) -> Duration {
        Duration::from_nanos(Self::now().0 - self.0)
    }
}
