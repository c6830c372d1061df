//! Printing results. The standard macros panic when nobody reads them any more.

use std::io::{ErrorKind, Write, stdout};

use crate::error::EXIT_FAILURE;

/// Writes to stdout. A reader that has seen enough (`| head -1`) ends the program quietly; a full disk
/// behind a redirection ends it with a message. What a run has computed is on disk by then.
pub(super) fn write(text: &str) {
    let mut stdout = stdout().lock();
    let written = stdout
        .write_all(text.as_bytes())
        .and_then(|()| stdout.flush());
    match written {
        Ok(()) => {}
        Err(error) if error.kind() == ErrorKind::BrokenPipe => std::process::exit(0),
        Err(error) => {
            eprintln!("error: cannot write to stdout: {error}");
            std::process::exit(EXIT_FAILURE.into());
        }
    }
}
