//! `grpo-host plugin swap RUN ROLE FILE`: asks a run that is going on for another plugin, and says what becomes of it.

use std::{
    io::{BufRead, BufReader, ErrorKind, Read},
    path::Path,
};

use serde_json::json;

use crate::{
    cli::PluginSwapArgs,
    run::RunError,
    swap::{
        SwapError,
        channel::{connect, send},
        protocol::{Event, Request},
    },
};

/// Bytes of an event that are read.
const MAX_EVENT: u64 = 1 << 20;

/// Sends the request and prints events until the last.
pub(super) fn run(args: &PluginSwapArgs) -> anyhow::Result<()> {
    let root = &args.run;
    if !root.join("config.yaml").exists() {
        let path = root.clone();
        return Err(RunError::NotARun { path }.into());
    }
    let broken = |error: std::io::Error| SwapError::Channel {
        run: root.clone(),
        reason: error.to_string(),
    };
    let mut stream = connect(root).map_err(|error| match error.kind() {
        ErrorKind::NotFound | ErrorKind::ConnectionRefused => {
            let run = root.clone();
            SwapError::NotRunning { run }
        }
        _ => broken(error),
    })?;
    send(&mut stream, &request(args)?).map_err(broken)?;
    let mut events = BufReader::new(stream);
    let mut told = Vec::new();
    loop {
        let mut line = String::new();
        let count = events.by_ref().take(MAX_EVENT).read_line(&mut line);
        let event = match count.map_err(broken)? {
            // Killed, or it gave up waiting for this end.
            0 => Event::Ended {},
            _ => serde_json::from_str(&line)?,
        };
        let over = event.is_last();
        // What failed is said once, as an error.
        let wanted = match over {
            true => matches!(event, Event::Kept { .. }),
            false => !args.output.quiet,
        };
        if wanted && !args.output.json {
            outln!("{}", crate::error::one_line(&event.to_string()));
        }
        told.push(event);
        if over {
            break;
        }
    }
    if args.output.json {
        outln!("{}", json!({ "run_dir": root, "events": told }));
    }
    match told.pop() {
        Some(Event::Kept { .. }) | None => Ok(()),
        Some(event) => {
            let hint = match &event {
                Event::Refused { hint, .. } => hint.clone(),
                Event::RolledBack { .. } => {
                    Some("of a reward, `failures/` in the run has the calls that failed".to_owned())
                }
                _ => Some(
                    "if swaps.jsonl has its promotion, `--resume` makes it again; otherwise swap in the resumed run"
                        .to_owned(),
                ),
            };
            Err(SwapError::Refused { event, hint }.into())
        }
    }
}

/// The run has another working directory, maybe.
fn request(args: &PluginSwapArgs) -> anyhow::Result<Request> {
    let path = Path::new(&args.plugin);
    let source = match path.exists() {
        true => path.canonicalize()?.to_string_lossy().into_owned(),
        false => args.plugin.clone(),
    };
    Ok(Request {
        role: args.role.clone(),
        source,
        shadow: if args.now { Some(0) } else { args.shadow },
        config: args.config.clone(),
        limits: args.limits.clone(),
    })
}
