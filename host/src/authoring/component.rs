//! A core module becomes a component of one of our worlds.

use super::{AuthoringError, role_of};
use std::path::Path;
use wasi_preview1_component_adapter_provider::{
    WASI_SNAPSHOT_PREVIEW1_ADAPTER_NAME, WASI_SNAPSHOT_PREVIEW1_REACTOR_ADAPTER,
};
use wit_component::{ComponentEncoder, StringEncoding, embed_component_metadata};
use wit_parser::Resolve;

/// Makes a component of the core module `module`, which was compiled from `dir`. Rust's bindings leave the types of
/// the world in the module; for other languages they are read from `dir/wit`. With `wasi`, what the module imports of WASI's
/// first preview, which C and Go are compiled for, is translated to 0.2.
///
/// # Errors
/// A WIT that cannot be read, and modules that lack an export or import what no plugin may.
pub(super) fn componentize(
    dir: &Path,
    mut module: Vec<u8>,
    has_types: bool,
    wasi: bool,
) -> Result<Vec<u8>, AuthoringError> {
    if !has_types {
        embed(dir, &mut module)?;
    }
    ComponentEncoder::default()
        .validate(true)
        .module(&module)
        .and_then(|encoder| match wasi {
            true => encoder.adapter(
                WASI_SNAPSHOT_PREVIEW1_ADAPTER_NAME,
                WASI_SNAPSHOT_PREVIEW1_REACTOR_ADAPTER,
            ),
            false => Ok(encoder),
        })
        .and_then(|mut encoder| encoder.encode())
        .map_err(|error| AuthoringError::NotAPlugin {
            dir: dir.to_owned(),
            reason: format!("{error:#}"),
        })
}

fn embed(dir: &Path, module: &mut Vec<u8>) -> Result<(), AuthoringError> {
    let (wit, world) = (dir.join("wit"), role_of(dir).to_string());
    let mut resolve = Resolve::default();
    let embedded = resolve.push_dir(&wit).and_then(|(package, _)| {
        let world = resolve.select_world(&[package], Some(&world))?;
        embed_component_metadata(module, &resolve, world, StringEncoding::UTF8)
    });
    embedded.map_err(|error| AuthoringError::Wit {
        path: wit.clone(),
        reason: format!("{error:#}"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::authoring::{Language, create};
    use crate::plugin::PluginHost;
    use std::sync::Arc;

    /// Draws a random byte by WASI's first preview, as a libc would.
    const DRAWING: &str = r#"(module
        (import "wasi_snapshot_preview1" "random_get" (func $random (param i32 i32) (result i32)))
        (memory (export "memory") 2)
        (func (export "cabi_realloc") (param i32 i32 i32 i32) (result i32) (i32.const 65536))
        (func (export "grpo:plugin/scoring@0.1.0#configure") (param i32 i32) (result i32)
          (call $random (i32.const 8) (i32.const 1)))
        (func (export "grpo:plugin/scoring@0.1.0#score") (param i32 i32 i32 i32) (result i32)
          (i32.const 0)))"#;

    #[test]
    fn the_first_preview_is_translated_for_those_who_ask_for_wasi() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("drawing");
        create(Language::C, crate::types::Role::Reward, &dir).unwrap();
        let module = wat::parse_str(DRAWING).unwrap();
        let error = componentize(&dir, module.clone(), false, false).unwrap_err();
        assert!(error.to_string().contains("random_get"), "{error}");
        assert!(error.hint().unwrap().contains("`wasi`"));
        let component = componentize(&dir, module, false, true).unwrap();
        let host = PluginHost::new(Arc::new(|_| {})).unwrap();
        let imports = host.describe("drawing", &component).unwrap().imports;
        let random = |import: &String| import.starts_with("wasi:random/random@0.2.");
        assert!(imports.iter().any(random), "{imports:?}");
    }
}
