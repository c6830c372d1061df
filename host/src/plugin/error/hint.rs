//! What the reader can do about each [`Fault`], in one line.

use super::{Call, Fault, GuestErrorKind, PluginError};
use crate::plugin::wasi;

/// The package whose version decides whether plugin and host understand each other.
const PACKAGE: &str = "grpo:plugin/";

impl PluginError {
    /// What the reader can do about it, if there is something.
    pub fn hint(&self) -> Option<String> {
        let fault = &self.fault;
        of_loading(fault)
            .or_else(|| of_limits(&self.plugin, fault))
            .or_else(|| of_results(fault))
            .or_else(|| self.of_guest())
    }

    fn of_guest(&self) -> Option<String> {
        let plugin = &self.plugin;
        Some(match &self.fault {
            Fault::Guest {
                kind: GuestErrorKind::Config,
                ..
            } => format!("correct the config of `{plugin}`"),
            Fault::Guest {
                kind: GuestErrorKind::Input,
                ..
            } => "rename the dataset's columns with `columns`, or configure the plugin".to_owned(),
            Fault::Trap { .. } | Fault::Guest { .. } if self.call == Call::Score => {
                "on_failure: skip leaves such samples out of training".to_owned()
            }
            Fault::Trap { .. } | Fault::Guest { .. } => {
                "the fault is the plugin's own: `grpo-host plugin test` tries it on cases"
                    .to_owned()
            }
            _ => return None,
        })
    }
}

fn of_loading(fault: &Fault) -> Option<String> {
    let text = match fault {
        Fault::Grants(mismatch) => return Some(mismatch.hint()),
        Fault::Manifest(_) => "correct plugin.json and build the plugin again",
        Fault::NotAComponent {
            found: "a core module",
        } => "make a component of it: wasm-tools component new MODULE -o COMPONENT",
        Fault::NotAComponent { .. } | Fault::Compile { .. } => {
            "give the .wasm file of a component built against wit/v0.1"
        }
        Fault::TooLarge { .. } => "build it in release mode and strip it of debug information",
        Fault::Name => {
            "rename its file: 1 to 128 bytes without control characters, `/`, `\\`, `#` or a dot in front"
        }
        Fault::Trial { .. } => "the program starts itself again for this: see that it still can",
        Fault::WrongWorld { exports: names } | Fault::UnknownImports { imports: names }
            if foreign_version(names).is_some() =>
        {
            return foreign_version(names);
        }
        Fault::WrongWorld { .. } | Fault::ManyRoles { .. } | Fault::Signature { .. } => {
            "build against one world of wit/v0.1: reward, formatter or curriculum"
        }
        Fault::UnknownImports { imports } if imports.iter().any(|i| wasi::offers(i)) => {
            "build for wasm32-unknown-unknown or with WASI stubbed out, or ask for `wasi` in plugin.json"
        }
        Fault::UnknownImports { imports } if imports.iter().any(|i| i.starts_with("wasi:")) => {
            "of WASI there are cli, clocks, filesystem, io, random and sockets in version 0.2: build it without the rest"
        }
        Fault::UnknownImports { .. } => {
            "a plugin may import host of grpo:plugin, and judge, http and secrets if they are granted"
        }
        Fault::Declares { .. } => {
            "docs/plugins.md has the limits; compilers need a handful of each"
        }
        Fault::WarmRange { key, max, .. } => return Some(format!("set warm.{key} to 1 to {max}")),
        Fault::WarmSlots { .. } => "lower `warm.size`: one instance serves one caller at a time",
        Fault::NotWarm { .. } => "leave out its `warm`",
        Fault::Engine { .. } => "plugins need address space: raise `ulimit -v`, or remove it",
        _ => return None,
    };
    Some(text.to_owned())
}

/// For names of our package in a version that is not ours.
fn foreign_version(names: &[String]) -> Option<String> {
    let version = |name: &String| {
        let (_, version) = name.strip_prefix(PACKAGE)?.split_once('@')?;
        let version = version.split('#').next()?;
        (!version.starts_with("0.1.")).then(|| version.to_owned())
    };
    let version = names.iter().find_map(version)?;
    Some(format!(
        "it is built for version {version} of grpo:plugin and this host has 0.1.0: build it against wit/v0.1"
    ))
}

fn of_limits(plugin: &str, fault: &Fault) -> Option<String> {
    let key = match fault {
        Fault::Deadline { .. } => "deadline_ms",
        Fault::Wall { .. } => "wall_ms",
        Fault::Wait { .. } => "wait_ms",
        Fault::Fuel { .. } => "fuel",
        Fault::Memory { .. } => "memory_mib",
        Fault::CompileTime { .. } => "compile_ms",
        Fault::CompileCrash { .. } => "compile_mib",
        Fault::LimitRange { key, min, max, .. } => {
            return Some(format!("set limits.{key} of `{plugin}` to {min} to {max}"));
        }
        Fault::FailureScore { .. } => {
            return Some(format!(
                "write on_failure: {{score: NUMBER}} under limits of `{plugin}`"
            ));
        }
        Fault::ConfigSize { .. } => {
            return Some(format!(
                "shorten the config of `{plugin}`; rows are the place for data"
            ));
        }
        _ => return None,
    };
    let trust = match fault {
        Fault::CompileTime { .. } | Fault::CompileCrash { .. } => ", if you trust it",
        _ => "",
    };
    Some(format!("raise limits.{key} of `{plugin}`{trust}"))
}

fn of_results(fault: &Fault) -> Option<String> {
    let text = match fault {
        Fault::Length { .. } => "return one result per input, in order",
        Fault::Number { .. } => "return `skip` with a reason for what has no finite reward",
        Fault::Size { .. } | Fault::BadResult { .. } | Fault::Table { .. } => {
            "docs/plugins.md has the limits of results and instances"
        }
        Fault::Abi { .. } => "build the plugin with the bindings of its language's wit-bindgen",
        Fault::Resting { .. } => {
            "it is tried again by itself; the failures before this say what is wrong"
        }
        _ => return None,
    };
    Some(text.to_owned())
}
