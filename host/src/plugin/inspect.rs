//! What a component is, read from its bytes and types before any of it runs.

use super::error::Fault;
use super::grants::Manifest;
use super::limits::{
    MAX_COMPONENT_BYTES, MAX_CONFIG_BYTES, MAX_MEMORIES, MAX_PLUGIN_NAME_BYTES, MAX_TABLES,
};
use super::log::{is_printable, printable};
use super::wasi;
use crate::types::Role;
use serde::Serialize;
use std::panic::{AssertUnwindSafe, catch_unwind};
use wasmtime::Engine;
use wasmtime::component::Component;
use wasmtime::component::types::ComponentItem;

/// The exports that give a component its role. Any 0.1.x of them will do.
pub(super) const ROLE_EXPORTS: [&str; 3] = [
    "grpo:plugin/scoring@0.1.0",
    "grpo:plugin/formatting@0.1.0",
    "grpo:plugin/planning@0.1.0",
];
const ROLES: [Role; 3] = [Role::Reward, Role::Formatter, Role::Curriculum];

/// What the host offers, with its functions; all but the first to those alone who are granted it.
const OFFERED: [(&str, &[&str]); 5] = [
    ("grpo:plugin/host@0.1.0", &["log", "sample-telemetry"]),
    ("grpo:plugin/types@0.1.0", &[]),
    ("grpo:plugin/judge@0.1.0", &["complete", "embed"]),
    ("grpo:plugin/http@0.1.0", &["send"]),
    ("grpo:plugin/secrets@0.1.0", &["get"]),
];

/// What a component says of itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Description {
    /// `None` if it exports the interface of no role, or of several.
    pub role: Option<Role>,
    /// Names of interfaces and functions, escaped.
    pub exports: Vec<String>,
    pub imports: Vec<String>,
    /// What it says of itself and asks for.
    pub manifest: Option<Manifest>,
}

/// Lists what a component imports and exports, whether or not this host can run it.
pub(super) fn describe(component: &Component, manifest: Option<Manifest>) -> Description {
    let (ty, engine) = (component.component_type(), component.engine());
    let clean = |name: &str| printable(name, 200);
    Description {
        role: role(component).ok(),
        exports: ty.exports(engine).map(|(name, _)| clean(name)).collect(),
        imports: ty.imports(engine).map(|(name, _)| clean(name)).collect(),
        manifest,
    }
}

/// Refuses a name that could forge a line, leave its folder, or be taken for another plugin's: it
/// stands in logs, in metrics (`rewards/NAME/…`) and in `plugins.lock`, and `NAME#2` is the second of
/// two that have one name.
pub(super) fn check_name(name: &str) -> Result<(), Fault> {
    let fits = (1..=MAX_PLUGIN_NAME_BYTES).contains(&name.len());
    let plain = is_printable(name) && !name.contains(['/', '\\', '#']);
    if fits && plain && !name.starts_with('.') {
        return Ok(());
    }
    Err(Fault::Name)
}

/// The JSON text of a plugin's config, if it is not too long.
pub(super) fn check_config(config: &serde_json::Value) -> Result<String, Fault> {
    let (text, limit) = (config.to_string(), MAX_CONFIG_BYTES);
    match text.len() {
        bytes if bytes > limit => Err(Fault::ConfigSize { bytes, limit }),
        _ => Ok(text),
    }
}

pub(super) fn check_size(bytes: &[u8]) -> Result<(), Fault> {
    let limit = MAX_COMPONENT_BYTES;
    if bytes.len() > limit {
        return Err(Fault::TooLarge { limit });
    }
    Ok(())
}

/// The reason of a [`Fault::Compile`] that is no word of the compiler's.
pub(super) const PANICKED: &str = "the compiler panicked";

/// Compiles untrusted bytes.
pub(super) fn compile(engine: &Engine, bytes: &[u8]) -> Result<Component, Fault> {
    check_size(bytes)?;
    if let Some(found) = not_a_component(bytes) {
        return Err(Fault::NotAComponent { found });
    }
    // `from_binary` and nothing else: `new` also takes text, `deserialize` machine code. Compiling
    // has been seen to panic on odd input, and a panic must not take the host along.
    let compiled = catch_unwind(AssertUnwindSafe(|| Component::from_binary(engine, bytes)));
    let component = match compiled {
        Ok(Ok(component)) => component,
        Ok(Err(error)) => {
            let reason = printable(&error.root_cause().to_string(), 512);
            return Err(Fault::Compile { reason });
        }
        Err(_) => {
            let reason = PANICKED.to_owned();
            return Err(Fault::Compile { reason });
        }
    };
    check_declared(&component)?;
    Ok(component)
}

fn not_a_component(bytes: &[u8]) -> Option<&'static str> {
    // The preamble: magic, then version and layer as 16-bit words; layer 1 is a component.
    match bytes {
        [0, b'a', b's', b'm', _, _, 1, 0, ..] => None,
        [0, b'a', b's', b'm', 1, 0, 0, 0, ..] => Some("a core module"),
        [0x7f, b'E', b'L', b'F', ..] => Some("machine code"),
        [] => Some("an empty file"),
        _ => Some("something else"),
    }
}

fn check_declared(component: &Component) -> Result<(), Fault> {
    let Some(needs) = component.resources_required() else {
        return Ok(()); // It imports modules or components; `unknown_imports` refuses those.
    };
    for (what, found, limit) in [
        ("memories", needs.num_memories, MAX_MEMORIES),
        ("tables", needs.num_tables, MAX_TABLES),
    ] {
        let (found, limit) = (u64::from(found), limit as u64);
        if found > limit {
            return Err(Fault::Declares { what, found, limit });
        }
    }
    Ok(())
}

/// The role of a component, or what it exports instead.
pub(super) fn role(component: &Component) -> Result<Role, Fault> {
    let ty = component.component_type();
    let exports: Vec<&str> = ty
        .exports(component.engine())
        .map(|(name, _)| name)
        .collect();
    let mut roles = ROLE_EXPORTS
        .iter()
        .zip(ROLES)
        .filter(|(wanted, _)| exports.iter().any(|name| same_track(name, wanted)))
        .map(|(_, role)| role);
    match (roles.next(), roles.next()) {
        (Some(role), None) => Ok(role),
        (Some(first), Some(second)) => Err(Fault::ManyRoles {
            roles: [first, second].into_iter().chain(roles).collect(),
        }),
        (None, _) => Err(Fault::WrongWorld {
            exports: exports
                .iter()
                .take(64)
                .map(|name| printable(name, 200))
                .collect(),
        }),
    }
}

/// Imports that the host has no answer to, `INTERFACE#FUNCTION` where only a function is missing. WASI is one unless the
/// plugin asks for it.
pub(super) fn unknown_imports(component: &Component, asks_wasi: bool) -> Vec<String> {
    let engine = component.engine();
    let mut unknown = Vec::new();
    for (name, import) in component.component_type().imports(engine) {
        let offered = OFFERED
            .iter()
            .find(|(offered, _)| same_track(name, offered));
        match (import.ty, offered) {
            (ComponentItem::ComponentInstance(_), None) if asks_wasi && wasi::offers(name) => {}
            (ComponentItem::ComponentInstance(instance), Some((_, functions))) => {
                let missing = instance.exports(engine).filter(|(function, item)| {
                    matches!(item.ty, ComponentItem::ComponentFunc(_))
                        && !functions.contains(function)
                });
                unknown.extend(missing.map(|(function, _)| format!("{name}#{function}")));
            }
            _ => unknown.push(name.to_owned()),
        }
    }
    unknown
        .iter()
        .take(64)
        .map(|name| printable(name, 200))
        .collect()
}

/// Names of all imports.
pub(super) fn imported(component: &Component) -> Vec<String> {
    let (ty, engine) = (component.component_type(), component.engine());
    ty.imports(engine)
        .map(|(name, _)| name.to_owned())
        .collect()
}

/// Whether two versioned names differ in their patch version at most; `0.1.0` and `0.1.7` are
/// compatible by semver, and wasmtime's linker treats them so.
pub(super) fn same_track(name: &str, wanted: &str) -> bool {
    let track = |name: &str| {
        let (path, version) = name.split_once('@')?;
        let (track, patch) = version.rsplit_once('.')?;
        patch.parse::<u64>().ok()?;
        Some((path.to_owned(), track.to_owned()))
    };
    track(name).is_some_and(|t| Some(t) == track(wanted))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_one_plain_word_of_a_path() {
        for good in [
            "reward-math",
            "my reward 2.1",
            "Überprüfung",
            &"x".repeat(128),
        ] {
            assert_eq!(check_name(good), Ok(()), "{good}");
        }
        for bad in [
            "",
            ".",
            "..",
            ".a",
            "a/b",
            "a\\b",
            "a\n",
            "a\u{1b}[2J",
            "a\u{202e}b",
            "a#2",
        ] {
            assert_eq!(check_name(bad), Err(Fault::Name), "{bad:?}");
        }
        assert_eq!(check_name(&"x".repeat(129)), Err(Fault::Name));
    }

    #[test]
    fn patch_versions_are_compatible() {
        assert!(same_track("a:b/c@0.1.7", "a:b/c@0.1.0"));
        assert!(!same_track("a:b/c@0.2.0", "a:b/c@0.1.0"));
        assert!(!same_track("a:b/c@0.1.0-rc1", "a:b/c@0.1.0"));
        assert!(!same_track("a:b/c", "a:b/c@0.1.0"));
        assert!(!same_track("a:b/d@0.1.0", "a:b/c@0.1.0"));
    }
}
