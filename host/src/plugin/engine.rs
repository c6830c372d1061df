//! The wasmtime engine: features, pooling allocator, epoch clock, and how many instances live at once.
//!
//! Two engines at most, since counting fuel is compiled into the code.

use super::error::Fault;
use super::limits::{MAX_CORE_INSTANCES, MAX_MEMORIES, MAX_TABLE_ELEMENTS, MAX_TABLES};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use wasmtime::{Config, Enabled, Engine, PoolingAllocationConfig, WasmFeatures};

/// Granularity of deadlines.
pub(super) const TICK: Duration = Duration::from_millis(10);
/// Instances that may live at the same time; further callers wait for one to end.
const SLOTS: u32 = 16;
/// Memories or tables beyond which wasmtime itself refuses to compile a component.
const DECLARABLE: u32 = 1000;
/// Bytes of each memory that stay mapped for the next instance.
const KEEP_RESIDENT: usize = 1 << 20;

/// An engine whose epoch advances every [`TICK`] for as long as it lives.
pub(super) fn start(fuel: bool) -> Result<Engine, Fault> {
    let engine = |e: &dyn std::fmt::Display| Fault::Engine {
        reason: format!("{e:#}"),
    };
    let started = Engine::new(&config(fuel)).map_err(|e| engine(&e))?;
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
    pool.total_component_instances(SLOTS)
        .total_core_instances(SLOTS * count(MAX_CORE_INSTANCES))
        .total_memories(SLOTS * count(MAX_MEMORIES))
        .total_tables(SLOTS * count(MAX_TABLES))
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

/// Counts instances, so that the pool never has to refuse one.
///
/// A blocking count rather than an async semaphore: callers are plain threads that hold an instance
/// for microseconds.
pub(super) struct Slots {
    free: Mutex<u32>,
    freed: Condvar,
}

/// The right to one instance; given back when dropped.
pub(super) struct Slot(Arc<Slots>);

impl Slots {
    pub(super) fn new() -> Self {
        Self {
            free: Mutex::new(SLOTS),
            freed: Condvar::new(),
        }
    }

    pub(super) fn take(self: &Arc<Self>) -> Slot {
        let mut free = self.lock();
        while *free == 0 {
            free = self
                .freed
                .wait(free)
                .unwrap_or_else(PoisonError::into_inner);
        }
        *free -= 1;
        Slot(Arc::clone(self))
    }

    /// A count is valid at any moment, so a poisoned lock is as good as another.
    fn lock(&self) -> MutexGuard<'_, u32> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        *self.0.lock() += 1;
        self.0.freed.notify_one();
    }
}
