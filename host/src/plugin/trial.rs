//! Compiling on trial: an untrusted component is compiled in a child process first.
//!
//! Compiling is not covered by deadlines, fuel or the memory limit, and wasmtime does not promise that
//! it ends soon; a process can be given both limits. The child's code is thrown away: machine code from
//! another process would have to be trusted, so what passed is compiled again here.

use super::error::{Call, Fault, PluginError};
use super::limits::{Limits, MAX_COMPONENT_BYTES};
use super::{attributed, engine, inspect, printable};
use rlimit::Resource;
use std::io::{Read, Seek, Write};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// Of what a child says, as much is read.
const REASON_BYTES: u64 = 4096;

/// How often the child is looked at.
const POLL: Duration = Duration::from_millis(2);

/// Compiles `bytes` in a child process: `program` with `arguments`, the mebibytes of its address space and its milliseconds, which
/// must end up in [`compile_stdin`] and print what that returns. The child has the time and space of `limits` and no environment.
///
/// # Errors
/// [`Fault::CompileTime`] and [`Fault::CompileCrash`]; [`Fault::Compile`] for what the child's compiler refuses, be it for want of
/// memory; [`Fault::Trial`] if there is no child to be had;
/// limits out of range and components that are too large.
pub fn try_compile(
    program: &Path,
    arguments: &[&str],
    name: &str,
    bytes: &[u8],
    limits: &Limits,
) -> Result<(), PluginError> {
    let tried = limits
        .check()
        .and_then(|()| inspect::check_size(bytes))
        .and_then(|()| {
            let mut command = Command::new(program);
            command.args(arguments);
            command.arg(limits.compile_mib.to_string());
            command.arg(limits.compile_ms.to_string());
            let child = start(command, bytes).map_err(|error| Fault::Trial {
                reason: error.to_string(),
            })?;
            watch(child, limits)
        });
    tried.map_err(|fault| attributed(name, bytes, Call::Load, fault))
}

/// The child's side: compiles the component on stdin, in `mib` mebibytes of address space that this
/// process limits itself to, and returns why the compiler refuses it. What its parent need not compile again to find out is left
/// to the parent. Should that be killed, this process ends when all cores have computed for `ms` milliseconds.
///
/// # Errors
/// Limits that the system refuses to set, and a stdin that cannot be read.
pub fn compile_stdin(mib: u32, ms: u64) -> std::io::Result<Option<String>> {
    let cores = std::thread::available_parallelism()?.get() as u64;
    let seconds = ms.div_ceil(1000).saturating_mul(cores).saturating_add(1);
    for (resource, wanted) in [
        (Resource::AS, u64::from(mib) << 20),
        (Resource::CORE, 0),
        (Resource::CPU, seconds),
    ] {
        let allowed = resource.get_hard()?.min(wanted);
        resource.set(allowed, allowed)?;
    }
    let mut bytes = Vec::new();
    let limit = MAX_COMPONENT_BYTES as u64 + 1;
    std::io::stdin()
        .lock()
        .take(limit)
        .read_to_end(&mut bytes)?;
    let engine = engine::for_compiling().map_err(std::io::Error::other)?;
    Ok(match inspect::compile(&engine, &bytes) {
        Err(Fault::Compile { reason }) => Some(reason),
        Err(_) | Ok(_) => None,
    })
}

fn start(mut command: Command, bytes: &[u8]) -> std::io::Result<Child> {
    // A file rather than a pipe, which a thread would have to feed.
    let mut input = tempfile::tempfile()?;
    input.write_all(bytes)?;
    input.rewind()?;
    command
        .env_clear()
        .stdin(input)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
}

fn watch(mut child: Child, limits: &Limits) -> Result<(), Fault> {
    let failed = |error: std::io::Error| Fault::Trial {
        reason: error.to_string(),
    };
    let limit_ms = limits.compile_ms;
    let end = Instant::now() + Duration::from_millis(limit_ms);
    loop {
        if let Some(status) = child.try_wait().map_err(failed)? {
            // Shorter than what a pipe holds, so nobody has waited for it to be read.
            let mut said = String::new();
            if let Some(out) = child.stdout.take() {
                out.take(REASON_BYTES)
                    .read_to_string(&mut said)
                    .map_err(failed)?;
            }
            return verdict(status, limits.compile_mib, said.trim_end());
        }
        if Instant::now() >= end {
            child.kill().map_err(failed)?;
            child.wait().map_err(failed)?;
            return Err(Fault::CompileTime { limit_ms });
        }
        std::thread::sleep(POLL);
    }
}

fn verdict(status: ExitStatus, limit_mib: u32, said: &str) -> Result<(), Fault> {
    if status.success() {
        return match said {
            "" => Ok(()),
            // Threads and memory that are not to be had look like this too.
            inspect::PANICKED => Err(Fault::CompileCrash {
                how: said.to_owned(),
                limit_mib,
            }),
            reason => Err(Fault::Compile {
                reason: printable(reason, REASON_BYTES as usize),
            }),
        };
    }
    Err(Fault::CompileCrash {
        how: status.to_string(),
        limit_mib,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt;

    #[test]
    fn what_a_child_could_not_compile_does_not_pass() {
        let of = |wait_status, said| verdict(ExitStatus::from_raw(wait_status), 256, said);
        assert!(of(0, "").is_ok());
        assert!(matches!(
            of(0, "unknown import\u{1b}"),
            Err(Fault::Compile { reason }) if reason.starts_with("unknown import") && !reason.contains('\u{1b}')
        ));
        // For want of memory or threads the compiler panics, and what it was given may be valid.
        for (wait_status, said) in [(0, inspect::PANICKED), (6, ""), (1 << 8, "")] {
            assert!(matches!(
                of(wait_status, said),
                Err(Fault::CompileCrash { limit_mib: 256, .. })
            ));
        }
    }
}
