//! Parses the command line, runs the command, prints what went wrong and sets the exit code.

use std::process::ExitCode;

use clap::Parser;
use grpo_host::{
    cli::{Cli, Environment},
    commands, error,
};

/// Tensor work allocates and frees megabytes many times a step. The system's allocator gives such blocks
/// back to the kernel each time: a third of a training step went into page faults.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(refused) => return usage(&refused),
    };
    match commands::run(cli.into_command(), &Environment::read()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{}", error::render(&error));
            ExitCode::from(error::exit_code(&error))
        }
    }
}

/// `--help` and `--version` reach here too; they go to stdout and succeed.
fn usage(refused: &clap::Error) -> ExitCode {
    if refused.use_stderr() {
        eprintln!("{}", error::render_usage(refused));
        return ExitCode::from(error::EXIT_USAGE);
    }
    match refused.print() {
        Ok(()) => ExitCode::SUCCESS,
        Err(_closed) => ExitCode::from(error::EXIT_FAILURE),
    }
}
