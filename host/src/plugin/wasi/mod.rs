//! WASI 0.2 for guests that cannot do without, such as Go's runtime: one world that is the same in every run.
//!
//! Clocks are virtual and randomness is a constant; there are no arguments, variables, files or sockets; what is printed
//! goes to the plugin's log. Nothing here waits or reaches the system, which is why it is not wasmtime-wasi: of that, clocks,
//! randomness, waiting, streams, files and sockets would all have to be replaced.

mod clock;
mod denied;
mod random;
mod streams;

use super::inspect;
use super::log::{CallLog, LogLevel};
use super::sandbox::CallState;
use clock::Clock;
use random::Random;
use std::time::Duration;
use streams::Printed;
use wasmtime::component::{Component, ComponentNamedList, Lift, Linker, LinkerInstance, Lower};

/// Puts the functions of one interface into a linker.
type Add = fn(&mut Functions<'_>) -> wasmtime::Result<()>;

/// Interfaces that do something. Any 0.2.x of them will do.
const LINKED: [(&str, Add); 18] = [
    ("wasi:cli/environment@0.2.0", environment),
    ("wasi:cli/exit@0.2.0", exit),
    ("wasi:cli/stderr@0.2.0", streams::stderr),
    ("wasi:cli/stdin@0.2.0", streams::stdin),
    ("wasi:cli/stdout@0.2.0", streams::stdout),
    ("wasi:cli/terminal-input@0.2.0", streams::terminal_input),
    ("wasi:cli/terminal-output@0.2.0", streams::terminal_output),
    ("wasi:cli/terminal-stderr@0.2.0", streams::terminal_stderr),
    ("wasi:cli/terminal-stdin@0.2.0", streams::terminal_stdin),
    ("wasi:cli/terminal-stdout@0.2.0", streams::terminal_stdout),
    ("wasi:clocks/monotonic-clock@0.2.0", clock::monotonic),
    ("wasi:clocks/wall-clock@0.2.0", clock::wall),
    ("wasi:io/error@0.2.0", streams::error),
    ("wasi:io/poll@0.2.0", clock::poll),
    ("wasi:io/streams@0.2.0", streams::streams),
    ("wasi:random/insecure-seed@0.2.0", random::insecure_seed),
    ("wasi:random/insecure@0.2.0", random::insecure),
    ("wasi:random/random@0.2.0", random::random),
];

/// Interfaces that tools import for every guest, whatever it does. They can be linked, and every call is denied.
const DENIED: [&str; 9] = [
    "wasi:filesystem/preopens@0.2.0",
    "wasi:filesystem/types@0.2.0",
    "wasi:sockets/instance-network@0.2.0",
    "wasi:sockets/ip-name-lookup@0.2.0",
    "wasi:sockets/network@0.2.0",
    "wasi:sockets/tcp-create-socket@0.2.0",
    "wasi:sockets/tcp@0.2.0",
    "wasi:sockets/udp-create-socket@0.2.0",
    "wasi:sockets/udp@0.2.0",
];

/// What one instance has of this world; it begins the same in each.
#[derive(Default)]
pub(super) struct Wasi {
    clock: Clock,
    random: Random,
    printed: Printed,
}

impl Wasi {
    /// Passes on what was printed without a newline. The answer is the time that the log took.
    pub(super) fn end_call(&mut self, log: &mut CallLog) -> Duration {
        self.printed.flush(log)
    }
}

/// Why a call ended the guest.
#[derive(Debug, thiserror::Error)]
pub(super) enum Stop {
    #[error("it called `{0}`, which is denied")]
    Denied(String),
    #[error("it ended itself with exit status {0}")]
    Exit(u8),
    #[error("it asked `{function}` for {asked} bytes at once; at most {most}")]
    Size {
        function: &'static str,
        asked: u64,
        most: u64,
    },
    #[error("it polled nothing, which would never end")]
    EmptyPoll,
}

/// Whether an import is an interface that can be linked under the grant.
pub(super) fn offers(import: &str) -> bool {
    let mut all = LINKED.iter().map(|(name, _)| name).chain(&DENIED);
    all.any(|offered| inspect::same_track(import, offered))
}

/// Links what the component imports of WASI.
///
/// # Errors
/// None that a component could cause: what does not fit is found by instantiating.
pub(super) fn link(linker: &mut Linker<CallState>, component: &Component) -> wasmtime::Result<()> {
    for (name, add) in LINKED {
        let mut instance = linker.instance(name)?;
        add(&mut Functions(&mut instance))?;
    }
    let engine = component.engine();
    for (name, import) in component.component_type().imports(engine) {
        if DENIED
            .iter()
            .any(|denied| inspect::same_track(name, denied))
        {
            denied::link(linker, name, &import.ty, engine)?;
        }
    }
    Ok(())
}

/// An interface whose functions are being defined.
struct Functions<'a>(&'a mut LinkerInstance<'a, CallState>);

impl Functions<'_> {
    /// Defines a function. The guest's deadline is looked at before each call, since a guest that lives in host calls
    /// rarely reaches an epoch check of its own.
    fn add<P, R>(
        &mut self,
        name: &str,
        f: impl Fn(&mut CallState, P) -> wasmtime::Result<R> + Send + Sync + 'static,
    ) -> wasmtime::Result<()>
    where
        P: ComponentNamedList + Lift + 'static,
        R: ComponentNamedList + Lower + 'static,
    {
        self.0.func_wrap(name, move |mut store, params: P| {
            let state = store.data_mut();
            state.clock.check()?;
            f(state, params)
        })
    }

    /// Defines a resource of which there is nothing to clean up.
    fn resource<T: 'static>(&mut self, name: &str) -> wasmtime::Result<()> {
        let ty = wasmtime::component::ResourceType::host::<T>();
        self.0.resource(name, ty, |_, _| Ok(()))
    }
}

fn environment(functions: &mut Functions<'_>) -> wasmtime::Result<()> {
    functions.add("get-environment", |_, ()| {
        Ok((Vec::<(String, String)>::new(),))
    })?;
    functions.add("get-arguments", |_, ()| Ok((Vec::<String>::new(),)))?;
    functions.add("initial-cwd", |_, ()| Ok((None::<String>,)))
}

fn exit(functions: &mut Functions<'_>) -> wasmtime::Result<()> {
    functions.add("exit", |_, (status,): (Result<(), ()>,)| -> Ended {
        Err(Stop::Exit(u8::from(status.is_err())).into())
    })?;
    functions.add("exit-with-code", |_, (status,): (u8,)| -> Ended {
        Err(Stop::Exit(status).into())
    })
}

/// What no guest gets to see.
type Ended = wasmtime::Result<()>;

/// Writes to the log on the host's time.
fn print(state: &mut CallState, level: LogLevel, bytes: &[u8]) {
    let took = state.wasi.printed.write(level, bytes, &mut state.log);
    state.clock.forgive(took);
}
