//! One fresh instance and the calls into it: deadlines, memory accounting, and the verdict on errors.
//!
//! Any failed call makes its store unusable, so a [`Session`] is dropped after the first error.

use super::engine::{Slot, Slots};
use super::error::{Call, Fault, GuestErrorKind, PluginError};
use super::grants::Reach;
use super::limits::{
    Limits, MAX_CORE_INSTANCES, MAX_HANDLES, MAX_MEMORIES, MAX_RESULT_BYTES, MAX_TABLE_ELEMENTS,
    MAX_TABLES, OnFailure,
};
use super::log::{CallLog, Flood, LogSink, printable};
use super::v0_1::wit;
use super::wasi::{Stop, Wasi};
use crate::types::PluginId;
use std::sync::Arc;
use std::time::{Duration, Instant};
use wasmtime::component::{Instance, InstancePre};
use wasmtime::{FrameInfo, ResourceLimiter, Store, Trap, UpdateDeadline, WasmBacktrace};

/// Bytes of a guest's error text that are kept.
const MAX_MESSAGE_BYTES: usize = 1024;
/// Functions that a backtrace names.
const MAX_FRAMES: usize = 24;

/// The end of one request to a plugin, however many calls it takes.
#[derive(Clone, Copy)]
pub(super) struct Wall(Instant);

/// Which clock ran out; carried through wasmtime as the error of the interrupted call.
#[derive(Clone, Copy, Debug, thiserror::Error)]
enum Overrun {
    #[error("deadline")]
    Deadline,
    #[error("wall clock")]
    Wall,
    #[error("wait")]
    Wait,
}

/// When the running call must end.
pub(super) struct Clock {
    deadline: Instant,
    wall: Wall,
    /// What is left of the time that the call may wait for others.
    patience: Duration,
}

impl Clock {
    /// Puts the deadline off by time that the host took during the call. The wall clock goes on.
    pub(super) fn forgive(&mut self, hosts: Duration) {
        self.deadline += hosts;
    }

    /// Runs what waits for others, as `judge` and `http` do; it is told when to give up. The wait is the host's and puts the
    /// deadline off, but a call has only so much of it.
    ///
    /// # Errors
    /// When that is used up before, and when a clock has run out.
    pub(super) fn wait<T>(&mut self, f: impl FnOnce(Instant) -> T) -> wasmtime::Result<T> {
        self.check()?;
        if self.patience.is_zero() {
            return Err(Overrun::Wait.into());
        }
        let begun = Instant::now();
        let value = f(self.wall.0.min(begun + self.patience));
        let took = begun.elapsed();
        self.patience = self.patience.saturating_sub(took);
        self.forgive(took);
        self.check()?;
        Ok(value)
    }

    pub(super) fn check(&self) -> wasmtime::Result<()> {
        let now = Instant::now();
        if now >= self.wall.0 {
            return Err(Overrun::Wall.into());
        }
        if now >= self.deadline {
            return Err(Overrun::Deadline.into());
        }
        Ok(())
    }
}

/// Adds up what all memories and tables of a store hold. wasmtime's own limits are per memory, and
/// many memories below such a limit are as bad as a large one.
struct Accountant {
    memory: usize,
    memory_limit: usize,
    table: usize,
    /// The last refusal: why the trap that follows happened.
    refused: Option<Fault>,
}

impl ResourceLimiter for Accountant {
    fn memory_growing(
        &mut self,
        current: usize,
        desired: usize,
        _maximum: Option<usize>,
    ) -> wasmtime::Result<bool> {
        let wanted = self.memory.saturating_add(desired.saturating_sub(current));
        let limit = self.memory_limit;
        if wanted > limit {
            self.refused = Some(Fault::Memory { wanted, limit });
            return Ok(false);
        }
        self.memory = wanted;
        Ok(true)
    }

    fn table_growing(
        &mut self,
        current: usize,
        desired: usize,
        _maximum: Option<usize>,
    ) -> wasmtime::Result<bool> {
        let wanted = self.table.saturating_add(desired.saturating_sub(current));
        let limit = MAX_TABLE_ELEMENTS;
        if wanted > limit {
            self.refused = Some(Fault::Table { wanted, limit });
            return Ok(false);
        }
        self.table = wanted;
        Ok(true)
    }

    fn instances(&self) -> usize {
        MAX_CORE_INSTANCES
    }

    fn tables(&self) -> usize {
        MAX_TABLES
    }

    fn memories(&self) -> usize {
        MAX_MEMORIES
    }
}

/// What the host keeps beside a running guest.
pub(super) struct CallState {
    accountant: Accountant,
    pub(super) clock: Clock,
    pub(super) log: CallLog,
    pub(super) plugin: Arc<str>,
    pub(super) reach: Reach,
    /// Of the samples of the running call, for `host.sample-telemetry`.
    pub(super) telemetry: Vec<wit::Telemetry>,
    /// Used by those alone who are granted it.
    pub(super) wasi: Wasi,
}

impl CallState {
    /// Passes on what the guest left unsaid, and begins a new count of lines.
    fn end_call(&mut self) {
        self.wasi.end_call(&mut self.log);
        self.log.end_call();
    }
}

/// A component that is compiled, linked and known to fit its role.
#[derive(Clone)]
pub(super) struct Loaded {
    pub(super) id: PluginId,
    pub(super) name: Arc<str>,
    pub(super) digest: Arc<str>,
    /// JSON text for `configure`.
    pub(super) config: String,
    pub(super) limits: Limits,
    pub(super) pre: InstancePre<CallState>,
    /// Shared by all plugins of an engine: places for instances of one request, and for those of warm pools.
    pub(super) slots: Arc<Slots>,
    pub(super) warm_slots: Arc<Slots>,
    pub(super) sink: LogSink,
    pub(super) reach: Reach,
    /// Over all calls of this plugin.
    pub(super) flood: Arc<Flood>,
}

/// A fresh instance. The store stands before the slot so that its memory is back in the pool first.
pub(super) struct Session {
    store: Store<CallState>,
    pub(super) instance: Instance,
    _slot: Slot,
}

impl Session {
    /// Begins another request in this instance.
    pub(super) fn renew(&mut self, wall: Wall) {
        self.store.data_mut().clock.wall = wall;
    }
}

impl Loaded {
    /// The wall clock of a request that begins now.
    pub(super) fn wall(&self) -> Wall {
        Wall(Instant::now() + Duration::from_millis(self.limits.wall_ms))
    }

    /// Instantiates, on a place of the warm pools if the instance is to stay; the guest's `start` function runs
    /// under the limits of a call.
    pub(super) fn start(&self, wall: Wall, stays: bool) -> Result<Session, PluginError> {
        let slots = if stays { &self.warm_slots } else { &self.slots };
        let slot = slots.take(wall.0).ok_or_else(|| {
            let limit_ms = self.limits.wall_ms;
            self.error(Call::Instantiate, Fault::Wall { limit_ms })
        })?;
        let state = CallState {
            accountant: Accountant {
                memory: 0,
                memory_limit: self.limits.memory_bytes(),
                table: 0,
                refused: None,
            },
            clock: Clock {
                deadline: wall.0,
                wall,
                patience: Duration::ZERO,
            },
            log: CallLog::new(
                Arc::clone(&self.sink),
                Arc::clone(&self.flood),
                Arc::clone(&self.name),
                Arc::clone(&self.digest),
                Arc::clone(&self.reach.secrets),
            ),
            plugin: Arc::clone(&self.name),
            reach: self.reach.clone(),
            telemetry: Vec::new(),
            wasi: Wasi::default(),
        };
        let mut store = Store::new(self.pre.engine(), state);
        store.limiter(|state| &mut state.accountant);
        store.set_hostcall_fuel(MAX_RESULT_BYTES);
        store.set_max_component_handles(MAX_HANDLES);
        // The callback looks at real clocks; the epoch only says when to look.
        store.epoch_deadline_callback(|store| {
            store.data().clock.check()?;
            Ok(UpdateDeadline::Continue(1))
        });
        let started = self
            .arm(&mut store)
            .and_then(|()| self.pre.instantiate(&mut store));
        store.data_mut().end_call();
        let instance = started.map_err(|e| self.verdict(Call::Instantiate, &e, &mut store))?;
        Ok(Session {
            store,
            instance,
            _slot: slot,
        })
    }

    /// Makes one call. `f` gets the store and the instance and passes on what the guest returned.
    pub(super) fn call<T>(
        &self,
        session: &mut Session,
        call: Call,
        f: impl FnOnce(
            &mut Store<CallState>,
            &Instance,
        ) -> wasmtime::Result<Result<T, wit::PluginError>>,
    ) -> Result<T, PluginError> {
        let Session {
            store, instance, ..
        } = session;
        let returned = self.arm(store).and_then(|()| f(store, instance));
        store.data_mut().end_call();
        match returned {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(error)) => Err(self.error(call, self.guest_fault(&error))),
            Err(error) => Err(self.verdict(call, &error, store)),
        }
    }

    /// Does a request again as `on_failure: retry` allows. Only time limits and traps can turn out
    /// otherwise, but telling them apart is not worth a rule of its own.
    pub(super) fn with_retries<T>(
        &self,
        request: impl Fn() -> Result<T, PluginError>,
    ) -> Result<T, PluginError> {
        let retries = match self.limits.on_failure {
            OnFailure::Retry => self.limits.retries,
            OnFailure::Skip | OnFailure::Abort | OnFailure::Score(_) => 0,
        };
        let mut result = request();
        for _ in 0..retries {
            if result.is_ok() {
                break;
            }
            result = request();
        }
        result
    }

    /// Exports of the right name with the wrong functions in them.
    pub(super) fn misfit(&self, error: &wasmtime::Error) -> PluginError {
        let reason = printable(&format!("{error:#}"), MAX_MESSAGE_BYTES);
        self.error(Call::Load, Fault::Signature { reason })
    }

    /// Attributes a fault to this plugin.
    pub(super) fn error(&self, call: Call, fault: Fault) -> PluginError {
        PluginError {
            plugin: Arc::clone(&self.name),
            digest: Arc::clone(&self.digest),
            call,
            row: None,
            fault,
        }
    }

    /// Gives the next call its full deadline and fuel; fails if the request is out of time.
    fn arm(&self, store: &mut Store<CallState>) -> wasmtime::Result<()> {
        let clock = &mut store.data_mut().clock;
        clock.deadline = Instant::now() + Duration::from_millis(self.limits.deadline_ms);
        clock.patience = Duration::from_millis(self.limits.wait_ms);
        clock.check()?;
        store.set_epoch_deadline(1);
        match self.limits.fuel {
            Some(fuel) => store.set_fuel(fuel),
            None => Ok(()),
        }
    }

    /// What an error of wasmtime means: a clock, a refused growth that led to a trap, a trap of the
    /// guest's own, or values that break the ABI.
    fn verdict(
        &self,
        call: Call,
        error: &wasmtime::Error,
        store: &mut Store<CallState>,
    ) -> PluginError {
        let refused = store.data_mut().accountant.refused.take();
        let limits = &self.limits;
        let fault = match (error.downcast_ref(), error.downcast_ref::<Trap>(), refused) {
            (Some(Overrun::Deadline), ..) => Fault::Deadline {
                limit_ms: limits.deadline_ms,
            },
            (Some(Overrun::Wall), ..) => Fault::Wall {
                limit_ms: limits.wall_ms,
            },
            (Some(Overrun::Wait), ..) => Fault::Wait {
                limit_ms: limits.wait_ms,
            },
            (_, Some(Trap::OutOfFuel), _) => Fault::Fuel {
                limit: limits.fuel.unwrap_or_default(),
            },
            (_, _, Some(refused)) => refused,
            _ if error.is::<Stop>() => Fault::Trap {
                reason: printable(&error.root_cause().to_string(), MAX_MESSAGE_BYTES),
            },
            (_, Some(trap), None) => Fault::Trap {
                reason: trap_reason(*trap, error, limits.guest_backtrace),
            },
            (None, None, None) => Fault::Abi {
                reason: printable(&error.root_cause().to_string(), MAX_MESSAGE_BYTES),
            },
        };
        self.error(call, fault)
    }

    /// The guest's own error, in words that hold no secret.
    fn guest_fault(&self, error: &wit::PluginError) -> Fault {
        let (kind, message) = match error {
            wit::PluginError::Config(text) => (GuestErrorKind::Config, text),
            wit::PluginError::Input(text) => (GuestErrorKind::Input, text),
            wit::PluginError::Internal(text) => (GuestErrorKind::Internal, text),
        };
        Fault::Guest {
            kind,
            message: printable(&self.reach.secrets.redact(message), MAX_MESSAGE_BYTES),
        }
    }
}

/// What trapped, and where: with `whole`, every function on the way, innermost first, by its number if it has no name.
fn trap_reason(trap: Trap, error: &wasmtime::Error, whole: bool) -> String {
    let text = trap.to_string();
    let what = text.strip_prefix("wasm trap: ").unwrap_or(&text);
    let frames = error
        .downcast_ref::<WasmBacktrace>()
        .map_or(&[][..], WasmBacktrace::frames);
    let name = |frame: &FrameInfo| frame.func_name().map(|name| printable(name, 200));
    if !whole {
        return match frames.first().and_then(name) {
            Some(name) => format!("{what} in `{name}`"),
            None => what.to_owned(),
        };
    }
    let numbered = |frame| name(frame).unwrap_or_else(|| format!("#{}", frame.func_index()));
    let way: Vec<String> = frames.iter().take(MAX_FRAMES).map(numbered).collect();
    format!("{what} in `{}`", way.join("` called by `"))
}
