//! Version 0.1 of the WIT: the generated bindings and the host's side of its imports.
//!
//! The only `bindgen!` of the workspace. A made-up world that includes all three makes the roles
//! share one set of types; components are never instantiated through it.

use super::log::LogLevel;
use super::sandbox::CallState;

mod bindings {
    wasmtime::component::bindgen!({
        path: "../wit/v0.1",
        inline: "
            package grpo:host;
            world every-role {
                include grpo:plugin/reward@0.1.0;
                include grpo:plugin/formatter@0.1.0;
                include grpo:plugin/curriculum@0.1.0;
            }
        ",
        world: "grpo:host/every-role",
        ownership: Borrowing { duplicate_if_necessary: true },
        imports: { default: trappable },
    });
}

pub(super) use bindings::EveryRole;
pub(super) use bindings::exports::grpo::plugin::{formatting, planning, scoring};
pub(super) use bindings::grpo::plugin::types as wit;
use bindings::grpo::plugin::{host, types as wit_types};

impl wit_types::Host for CallState {}

impl host::Host for CallState {
    fn log(&mut self, level: host::Level, text: String) -> wasmtime::Result<()> {
        // A guest that lives in host calls rarely reaches an epoch check of its own.
        self.clock.check()?;
        let level = match level {
            host::Level::Debug => LogLevel::Debug,
            host::Level::Info => LogLevel::Info,
            host::Level::Warn => LogLevel::Warn,
            host::Level::Error => LogLevel::Error,
        };
        let waited = self.log.line(level, &text);
        self.clock.forgive(waited);
        Ok(())
    }
}
