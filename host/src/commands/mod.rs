//! One file per subcommand; this one only chooses.

mod doctor;

use crate::cli::{Command, Environment};

/// Runs a command to its end. Results go to stdout, progress to stderr.
pub fn run(command: Command, _environment: Environment) -> anyhow::Result<()> {
    match command {
        Command::Doctor(args) => doctor::run(&args),
        other => anyhow::bail!("{other:?}: not built yet"),
    }
}
