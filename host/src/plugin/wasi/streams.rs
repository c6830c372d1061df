//! Streams of bytes: an input that is at its end, and two outputs that are lines of the plugin's log.

use super::clock::Timer;
use super::{Functions, Stop, denied, print};
use crate::plugin::log::{CallLog, LogLevel};
use crate::plugin::sandbox::CallState;
use std::time::Duration;
use wasmtime::component::{ComponentType, Lower, Resource};

/// Bytes that one call may write.
const PERMIT: u64 = 64 << 10;
/// Bytes of one line that are kept until it ends; a secret and its encodings fit.
const MAX_LINE: usize = 256 << 10;

/// Resources of `wasi:io` and `wasi:cli`, told apart by their type alone, but for the outputs.
pub(super) struct Input;
pub(super) struct Output;
pub(super) struct IoError;
struct TerminalInput;
struct TerminalOutput;

/// What stands in an output's handle.
const STDOUT: u32 = 1;
const STDERR: u32 = 2;

#[derive(ComponentType, Lower)]
#[component(variant)]
enum StreamError {
    #[component(name = "last-operation-failed")]
    #[expect(dead_code, reason = "the interface has it; no stream of ours fails so")]
    Failed(Resource<IoError>),
    #[component(name = "closed")]
    Closed,
}

/// What was printed and has no newline yet.
#[derive(Default)]
pub(super) struct Printed {
    out: Vec<u8>,
    err: Vec<u8>,
}

impl Printed {
    /// Passes on whole lines and keeps the rest. The answer is the time that the log took.
    pub(super) fn write(&mut self, level: LogLevel, bytes: &[u8], log: &mut CallLog) -> Duration {
        let line = match level {
            LogLevel::Warn => &mut self.err,
            _ => &mut self.out,
        };
        let mut took = Duration::ZERO;
        let mut rest = bytes;
        while let Some(end) = rest.iter().position(|&byte| byte == b'\n') {
            keep(line, &rest[..end]);
            took += pass_on(line, level, log);
            rest = &rest[end + 1..];
        }
        keep(line, rest);
        took
    }

    /// Passes on lines that were not ended.
    pub(super) fn flush(&mut self, log: &mut CallLog) -> Duration {
        let mut took = Duration::ZERO;
        for (line, level) in [
            (&mut self.out, LogLevel::Info),
            (&mut self.err, LogLevel::Warn),
        ] {
            if !line.is_empty() {
                took += pass_on(line, level, log);
            }
        }
        took
    }
}

fn keep(line: &mut Vec<u8>, more: &[u8]) {
    let room = MAX_LINE.saturating_sub(line.len()).min(more.len());
    line.extend(&more[..room]);
}

fn pass_on(line: &mut Vec<u8>, level: LogLevel, log: &mut CallLog) -> Duration {
    let took = log.line(level, &String::from_utf8_lossy(line));
    line.clear();
    took
}

pub(super) fn error(functions: &mut Functions<'_>) -> wasmtime::Result<()> {
    functions.resource::<IoError>("error")?;
    denied::function(functions.0, "[method]error.to-debug-string")
}

pub(super) fn stdin(functions: &mut Functions<'_>) -> wasmtime::Result<()> {
    functions.add("get-stdin", |_, ()| Ok((Resource::<Input>::new_own(0),)))
}

pub(super) fn stdout(functions: &mut Functions<'_>) -> wasmtime::Result<()> {
    functions.add("get-stdout", |_, ()| {
        Ok((Resource::<Output>::new_own(STDOUT),))
    })
}

pub(super) fn stderr(functions: &mut Functions<'_>) -> wasmtime::Result<()> {
    functions.add("get-stderr", |_, ()| {
        Ok((Resource::<Output>::new_own(STDERR),))
    })
}

pub(super) fn terminal_input(functions: &mut Functions<'_>) -> wasmtime::Result<()> {
    functions.resource::<TerminalInput>("terminal-input")
}

pub(super) fn terminal_output(functions: &mut Functions<'_>) -> wasmtime::Result<()> {
    functions.resource::<TerminalOutput>("terminal-output")
}

pub(super) fn terminal_stdin(functions: &mut Functions<'_>) -> wasmtime::Result<()> {
    functions.add("get-terminal-stdin", |_, ()| {
        Ok((None::<Resource<TerminalInput>>,))
    })
}

pub(super) fn terminal_stdout(functions: &mut Functions<'_>) -> wasmtime::Result<()> {
    functions.add("get-terminal-stdout", |_, ()| {
        Ok((None::<Resource<TerminalOutput>>,))
    })
}

pub(super) fn terminal_stderr(functions: &mut Functions<'_>) -> wasmtime::Result<()> {
    functions.add("get-terminal-stderr", |_, ()| {
        Ok((None::<Resource<TerminalOutput>>,))
    })
}

pub(super) fn streams(functions: &mut Functions<'_>) -> wasmtime::Result<()> {
    functions.resource::<Input>("input-stream")?;
    functions.resource::<Output>("output-stream")?;
    input(functions)?;
    for name in ["write", "blocking-write-and-flush"] {
        let name = format!("[method]output-stream.{name}");
        functions.add(&name, |state, (to, bytes): (Resource<Output>, Vec<u8>)| {
            write(state, &to, &bytes)
        })?;
    }
    for name in ["write-zeroes", "blocking-write-zeroes-and-flush"] {
        let name = format!("[method]output-stream.{name}");
        functions.add(&name, |state, (to, length): (Resource<Output>, u64)| {
            let zeroes = vec![0; usize::try_from(length.min(PERMIT + 1))?];
            write(state, &to, &zeroes)
        })?;
    }
    for name in ["flush", "blocking-flush"] {
        let name = format!("[method]output-stream.{name}");
        functions.add(&name, |_, _: (Resource<Output>,)| {
            Ok((Ok::<(), StreamError>(()),))
        })?;
    }
    functions.add(
        "[method]output-stream.check-write",
        |_, _: (Resource<Output>,)| Ok((Ok::<u64, StreamError>(PERMIT),)),
    )?;
    functions.add(
        "[method]output-stream.subscribe",
        |state, _: (Resource<Output>,)| state.wasi.clock.timer(0),
    )?;
    // The only input is at its end.
    type Between = (Resource<Output>, Resource<Input>, u64);
    for name in ["splice", "blocking-splice"] {
        let name = format!("[method]output-stream.{name}");
        functions.add(&name, |_, _: Between| {
            Ok((Err::<u64, _>(StreamError::Closed),))
        })?;
    }
    Ok(())
}

fn input(functions: &mut Functions<'_>) -> wasmtime::Result<()> {
    for name in ["read", "blocking-read"] {
        let name = format!("[method]input-stream.{name}");
        functions.add(&name, |_, _: (Resource<Input>, u64)| {
            Ok((Err::<Vec<u8>, _>(StreamError::Closed),))
        })?;
    }
    for name in ["skip", "blocking-skip"] {
        let name = format!("[method]input-stream.{name}");
        functions.add(&name, |_, _: (Resource<Input>, u64)| {
            Ok((Err::<u64, _>(StreamError::Closed),))
        })?;
    }
    functions.add(
        "[method]input-stream.subscribe",
        |state, _: (Resource<Input>,)| state.wasi.clock.timer(0),
    )
}

type Written = (Result<(), StreamError>,);

fn write(state: &mut CallState, to: &Resource<Output>, bytes: &[u8]) -> wasmtime::Result<Written> {
    let asked = bytes.len() as u64;
    if asked > PERMIT {
        return Err(Stop::Size {
            function: "write",
            asked,
            most: PERMIT,
        }
        .into());
    }
    let level = match to.rep() {
        STDERR => LogLevel::Warn,
        _ => LogLevel::Info,
    };
    print(state, level, bytes);
    Ok((Ok(()),))
}

/// The resource of `wasi:io` that another interface calls so.
pub(super) fn resource(name: &str) -> Option<wasmtime::component::ResourceType> {
    use wasmtime::component::ResourceType;
    Some(match name {
        "error" => ResourceType::host::<IoError>(),
        "input-stream" => ResourceType::host::<Input>(),
        "output-stream" => ResourceType::host::<Output>(),
        "pollable" => ResourceType::host::<Timer>(),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plugin::Secrets;
    use crate::plugin::log::LogLine;
    use std::sync::{Arc, Mutex};

    /// A secret in two pieces is whole when its line is.
    #[test]
    fn lines_are_whole_before_secrets_are_looked_for() {
        let lines = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&lines);
        let sink = move |line: LogLine<'_>| {
            let level = format!("{:?}", line.level);
            seen.lock().unwrap().push((level, line.text.to_owned()));
        };
        let mut secrets = Secrets::default();
        secrets.add("KEY", "hunter2hunter2").unwrap();
        let mut log = CallLog::new(
            Arc::new(sink),
            Arc::default(),
            "a".into(),
            "".into(),
            Arc::new(secrets),
        );
        let mut printed = Printed::default();
        for (level, text) in [
            (LogLevel::Info, "it is hunter2"),
            (LogLevel::Warn, "panic: "),
            (LogLevel::Info, "hunter2!\n\nbye"),
            (LogLevel::Warn, "at the disco\n"),
        ] {
            printed.write(level, text.as_bytes(), &mut log);
        }
        printed.flush(&mut log);
        printed.flush(&mut log);
        let long = vec![b'x'; 2 * MAX_LINE];
        printed.write(LogLevel::Info, &long, &mut log);
        assert_eq!(printed.out.len(), MAX_LINE);
        let line = |level: &str, text: &str| (level.to_owned(), text.to_owned());
        assert_eq!(
            *lines.lock().unwrap(),
            [
                line("Info", "it is [secret KEY]!"),
                line("Info", ""),
                line("Warn", "panic: at the disco"),
                line("Info", "bye"),
            ]
        );
    }
}
