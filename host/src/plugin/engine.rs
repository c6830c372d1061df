//! The wasmtime engine: features, pooling allocator, epoch clock, and how many instances live at once.
//!
//! Two engines at most, since counting fuel is compiled into the code.

use super::error::Fault;
use super::limits::{MAX_CORE_INSTANCES, MAX_MEMORIES, MAX_TABLE_ELEMENTS, MAX_TABLES};
use super::warm::WARM_SLOTS;
use std::collections::VecDeque;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use wasmtime::{
    Config, Enabled, Engine, InstanceAllocationStrategy, PoolingAllocationConfig, WasmFeatures,
};

/// Granularity of deadlines.
pub(super) const TICK: Duration = Duration::from_millis(10);
/// Instances of one request that may live at the same time; further callers wait for one to end.
pub(super) const SLOTS: u32 = 16;
/// Those of warm pools have places of their own, so that idle ones keep nobody waiting.
const PLACES: u32 = SLOTS + WARM_SLOTS;
/// Memories or tables beyond which wasmtime itself refuses to compile a component.
const DECLARABLE: u32 = 1000;
/// Bytes of each memory that stay mapped for the next instance.
const KEEP_RESIDENT: usize = 1 << 20;

/// An engine whose epoch advances every [`TICK`] for as long as it lives; `parallel` compiles on all cores.
pub(super) fn start(fuel: bool, parallel: bool) -> Result<Engine, Fault> {
    let engine = |e: &dyn std::fmt::Display| Fault::Engine {
        reason: format!("{e:#}"),
    };
    let mut config = config(fuel);
    config.parallel_compilation(parallel);
    let started = Engine::new(&config).map_err(|e| engine(&e))?;
    let weak = started.weak();
    // An OS thread and no task: a runtime whose workers all sit in guests would stop the clock.
    std::thread::Builder::new()
        .name("plugin-epoch".to_owned())
        .spawn(move || {
            while let Some(engine) = weak.upgrade() {
                engine.increment_epoch();
                drop(engine);
                std::thread::sleep(TICK);
            }
        })
        .map_err(|e| engine(&e))?;
    Ok(started)
}

/// An engine for compiling only: it reserves no address space and has no clock.
pub(super) fn for_compiling() -> Result<Engine, Fault> {
    let mut config = config(false);
    config.allocation_strategy(InstanceAllocationStrategy::OnDemand);
    Engine::new(&config).map_err(|e| Fault::Engine {
        reason: format!("{e:#}"),
    })
}

fn config(fuel: bool) -> Config {
    let mut config = Config::new();
    config
        .epoch_interruption(true)
        .consume_fuel(fuel)
        // Calls are synchronous; support for concurrent ones makes each four times as expensive.
        .concurrency_support(false)
        .allocation_strategy(pool());
    // Off: what no toolchain needs for a plugin, or what makes results depend on the machine.
    // Multi-memory stays on although guests do not use it: composed components do inside.
    for feature in [
        WasmFeatures::THREADS,
        WasmFeatures::MEMORY64,
        WasmFeatures::SIMD,
        WasmFeatures::RELAXED_SIMD,
        WasmFeatures::TAIL_CALL,
        WasmFeatures::WIDE_ARITHMETIC,
        WasmFeatures::CUSTOM_PAGE_SIZES,
        WasmFeatures::EXCEPTIONS,
        WasmFeatures::GC,
        WasmFeatures::FUNCTION_REFERENCES,
    ] {
        config.wasm_features(feature, false);
    }
    config
}

fn pool() -> PoolingAllocationConfig {
    let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    let mut pool = PoolingAllocationConfig::new();
    pool.total_component_instances(PLACES)
        .total_core_instances(PLACES * count(MAX_CORE_INSTANCES))
        .total_memories(PLACES * count(MAX_MEMORIES))
        .total_tables(PLACES * count(MAX_TABLES))
        .max_core_instances_per_component(count(MAX_CORE_INSTANCES))
        // The real limits are checked by `inspect`, which can say what was declared. No larger,
        // since wasmtime walks as many slots when a module is dropped.
        .max_memories_per_component(DECLARABLE)
        .max_tables_per_component(DECLARABLE)
        .max_memories_per_module(DECLARABLE)
        .max_tables_per_module(DECLARABLE)
        .table_elements(MAX_TABLE_ELEMENTS)
        // The reservation of a slot is 4 GiB in any case; the limiter of the store sets the cap.
        .max_memory_size(1 << 32)
        // Asks the kernel (6.7 and later) which pages were written, and zeroes those only. Per fresh
        // call of 64 samples this took 28 µs where zeroing all of the resident part took 42, and
        // giving every page back 62.
        .pagemap_scan(Enabled::Auto)
        .linear_memory_keep_resident(KEEP_RESIDENT)
        .table_keep_resident(1 << 14);
    pool
}

/// Hands out the pool's instances, so that it never has to refuse one: first come, first served.
///
/// Blocking rather than an async semaphore: callers are plain threads that hold an instance for
/// microseconds. A queue rather than a condition variable, which lets newcomers overtake those that wait.
pub(super) struct Slots(Mutex<Places>);

struct Places {
    free: u32,
    /// Whoever waits, longest first. Places are sent to them.
    waiting: VecDeque<Sender<Slot>>,
}

/// The right to one instance; given back when dropped, wherever that happens.
///
/// Empty only while it is being dropped, or refused by a caller that is gone.
pub(super) struct Slot(Option<Arc<Slots>>);

impl Slots {
    pub(super) fn new(count: u32) -> Self {
        Self(Mutex::new(Places {
            free: count,
            waiting: VecDeque::new(),
        }))
    }

    /// Waits for an instance until `end`; `None` if none became free.
    pub(super) fn take(self: &Arc<Self>, end: Instant) -> Option<Slot> {
        let turn = {
            let mut places = self.lock();
            if places.free > 0 {
                places.free -= 1;
                return Some(Slot(Some(Arc::clone(self))));
            }
            let (sender, turn) = channel();
            places.waiting.push_back(sender);
            turn
        };
        // A place that is sent just after the end is dropped with the receiver, and so passed on.
        let left = end.saturating_duration_since(Instant::now());
        turn.recv_timeout(left).ok()
    }

    /// The queue is valid at any moment, so a poisoned lock is as good as another.
    fn lock(&self) -> MutexGuard<'_, Places> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let Some(slots) = self.0.take() else {
            return;
        };
        loop {
            let mut places = slots.lock();
            let Some(next) = places.waiting.pop_front() else {
                places.free += 1;
                return;
            };
            drop(places);
            match next.send(Self(Some(Arc::clone(&slots)))) {
                Ok(()) => return,
                // Gone after a timeout: the place goes to the next, and not through a drop of its own.
                Err(mut refused) => refused.0.0 = None,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_go_to_whoever_waits_longest() {
        let slots = Arc::new(Slots::new(SLOTS));
        let now = Instant::now();
        let far = now + Duration::from_secs(60);
        let mut held: Vec<_> = (0..SLOTS).map(|_| slots.take(far).unwrap()).collect();
        assert!(slots.take(now).is_none(), "a seventeenth");
        let served = Mutex::new(Vec::new());
        std::thread::scope(|scope| {
            for caller in 0..24 {
                let (slots, served) = (&slots, &served);
                scope.spawn(move || {
                    let slot = slots.take(far).unwrap();
                    served.lock().unwrap().push(caller);
                    drop(slot);
                });
                // The one that gave up above is still in the queue.
                while slots.lock().waiting.len() != caller + 2 {
                    std::thread::yield_now();
                }
            }
            drop(held.pop());
        });
        assert_eq!(served.into_inner().unwrap(), Vec::from_iter(0..24));
        drop(held);
        assert_eq!(slots.lock().free, SLOTS);
    }
}
