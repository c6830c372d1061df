//! A clock that shows the same times in every run: it moves when it is looked at, and jumps when it is waited for.
//!
//! So a guest that loops until time has passed comes to an end, and one that sleeps wakes at once.

use super::{Functions, Stop};
use wasmtime::component::{ComponentType, Lower, Resource, ResourceTable};

/// Nanoseconds that each look takes.
const TICK: u64 = 1000;
/// What the monotonic clock shows at first. Not 0, which Go's runtime takes for a broken clock.
const BEGIN: u64 = 1_000_000_000;
/// What the wall clock shows when the monotonic one shows 0: 2025-01-01T00:00:00Z, in seconds since 1970.
const EPOCH: u64 = 1_735_689_600;
const NANOS: u64 = 1_000_000_000;

/// A pollable: ready from `at` on. Streams are ready from 0 on.
pub(super) struct Timer {
    at: u64,
}

/// The time of one instance, in nanoseconds.
pub(super) struct Clock {
    now: u64,
    /// As many as the store lets the guest have handles.
    timers: ResourceTable,
}

impl Default for Clock {
    fn default() -> Self {
        Self {
            now: BEGIN,
            timers: ResourceTable::default(),
        }
    }
}

#[derive(ComponentType, Lower)]
#[component(record)]
struct Datetime {
    seconds: u64,
    nanoseconds: u32,
}

fn datetime(nanos: u64) -> Datetime {
    Datetime {
        seconds: EPOCH + nanos / NANOS,
        // The remainder of a division by 10⁹ fits.
        nanoseconds: (nanos % NANOS) as u32,
    }
}

impl Clock {
    fn look(&mut self) -> u64 {
        self.now = self.now.saturating_add(TICK);
        self.now
    }

    /// A pollable that is ready from `at` on.
    pub(super) fn timer(&mut self, at: u64) -> wasmtime::Result<(Resource<Timer>,)> {
        Ok((self.timers.push(Timer { at })?,))
    }

    fn at(&self, timer: &Resource<Timer>) -> wasmtime::Result<u64> {
        Ok(self.timers.get(timer)?.at)
    }

    /// Which of them are ready. If none is, time jumps to the first that will be.
    fn poll(&mut self, timers: &[Resource<Timer>]) -> wasmtime::Result<Vec<u32>> {
        let times = timers.iter().map(|timer| self.at(timer));
        let times = times.collect::<wasmtime::Result<Vec<u64>>>()?;
        let first = times.iter().min().ok_or(Stop::EmptyPoll)?;
        self.now = self.look().max(*first);
        let ready = (0..).zip(&times).filter(|(_, at)| **at <= self.now);
        Ok(ready.map(|(i, _)| i).collect())
    }
}

pub(super) fn monotonic(functions: &mut Functions<'_>) -> wasmtime::Result<()> {
    functions.add("now", |state, ()| Ok((state.wasi.clock.look(),)))?;
    functions.add("resolution", |_, ()| Ok((TICK,)))?;
    functions.add("subscribe-instant", |state, (at,): (u64,)| {
        state.wasi.clock.timer(at)
    })?;
    functions.add("subscribe-duration", |state, (nanos,): (u64,)| {
        let clock = &mut state.wasi.clock;
        let at = clock.look().saturating_add(nanos);
        clock.timer(at)
    })
}

pub(super) fn wall(functions: &mut Functions<'_>) -> wasmtime::Result<()> {
    functions.add("now", |state, ()| Ok((datetime(state.wasi.clock.look()),)))?;
    functions.add("resolution", |_, ()| {
        Ok((Datetime {
            seconds: 0,
            nanoseconds: TICK as u32,
        },))
    })
}

pub(super) fn poll(functions: &mut Functions<'_>) -> wasmtime::Result<()> {
    let ty = wasmtime::component::ResourceType::host::<Timer>();
    functions.0.resource("pollable", ty, |mut store, rep| {
        let timers = &mut store.data_mut().wasi.clock.timers;
        timers.delete(Resource::<Timer>::new_own(rep))?;
        Ok(())
    })?;
    type Borrowed = (Resource<Timer>,);
    functions.add("[method]pollable.ready", |state, (timer,): Borrowed| {
        let clock = &mut state.wasi.clock;
        Ok((clock.at(&timer)? <= clock.look(),))
    })?;
    functions.add("[method]pollable.block", |state, (timer,): Borrowed| {
        state.wasi.clock.poll(&[timer]).map(drop)
    })?;
    functions.add("poll", |state, (timers,): (Vec<Resource<Timer>>,)| {
        Ok((state.wasi.clock.poll(&timers)?,))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waiting_jumps_and_looking_moves() {
        let mut clock = Clock::default();
        let (short,) = clock.timer(BEGIN + 10 * TICK).unwrap();
        let (long,) = clock.timer(u64::MAX).unwrap();
        let (stream,) = clock.timer(0).unwrap();
        let borrow = |timer: &Resource<Timer>| Resource::new_borrow(timer.rep());
        let all = [&long, &short, &stream].map(borrow);
        assert_eq!(clock.poll(&all).unwrap(), [2]);
        assert_eq!(clock.now, BEGIN + TICK);
        assert_eq!(clock.poll(&all[..2]).unwrap(), [1]);
        assert_eq!(clock.now, BEGIN + 10 * TICK);
        assert_eq!(clock.poll(&all[..1]).unwrap(), [0]);
        assert_eq!((clock.now, clock.look()), (u64::MAX, u64::MAX));
        assert!(clock.poll(&[]).unwrap_err().is::<Stop>());
        let end = datetime(u64::MAX);
        assert_eq!(end.seconds, EPOCH + u64::MAX / NANOS);
        assert_eq!(end.nanoseconds, 709_551_615);
    }
}
