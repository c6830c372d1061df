//! Arbitrary results: a guest of each role that answers with whatever bytes it is given.
//!
//! The bytes travel in the arguments of the call, two characters each, so that a component is compiled once and not for
//! each input. The guest lays them down at address 0, where its result record is; all else up to 64 KiB is theirs too.

use super::exercise;
use grpo_host::plugin::{Isolation, Plugin};
use std::cell::OnceCell;
use std::path::Path;
use std::sync::OnceLock;
use wit_component::{ComponentEncoder, StringEncoding, embed_component_metadata};
use wit_parser::{PackageId, Resolve};

/// Bytes of an answer that fit below the guest's allocator.
const ROOM: usize = 0xff00;

/// World, the functions' names and parameters, and where the text is among them.
pub(super) struct Shape {
    pub(super) world: &'static str,
    /// Name and type of each function that answers.
    pub(super) functions: &'static [(&'static str, &'static str, &'static str)],
    /// The interface, which is where `configure` is as well.
    pub(super) interface: &'static str,
}

const LIST: &str =
    "(local.set $at (i32.load (local.get 0))) (local.set $len (i32.load offset=4 (local.get 0)))";

/// The three roles. The third text of a function finds address and length of what it is given.
pub(super) const SHAPES: [Shape; 3] = [
    Shape {
        world: "reward",
        interface: "grpo:plugin/scoring@0.1.0",
        functions: &[(
            "score",
            "i32 i32 i32 i32",
            "(local.set $at (i32.load offset=4 (local.get 2))) (local.set $len (i32.load offset=8 (local.get 2)))",
        )],
    },
    Shape {
        world: "formatter",
        interface: "grpo:plugin/formatting@0.1.0",
        functions: &[("format", "i32 i32", LIST), ("parse", "i32 i32", LIST)],
    },
    Shape {
        world: "curriculum",
        interface: "grpo:plugin/planning@0.1.0",
        functions: &[(
            "plan",
            "i32 i32 i32 i32 i64 i64 i32 i32 i64",
            "(local.set $at (local.get 0)) (local.set $len (local.get 1))",
        )],
    },
];

/// Bit 0 to 1 of the first byte choose the role, bit 2 the isolation, bit 3 to 4 the number of samples less one. What
/// follows is the answer.
pub fn run(data: &[u8]) {
    thread_local! {
        static PLUGINS: OnceCell<Vec<[Plugin; 2]>> = const { OnceCell::new() };
    }
    let Some((first, answer)) = data.split_first() else {
        return;
    };
    let text = encode(&answer[..answer.len().min(ROOM)]);
    let texts = vec![text.as_str(); 1 + usize::from(first >> 3 & 3)];
    PLUGINS.with(|plugins| {
        let plugins = plugins.get_or_init(|| SHAPES.iter().map(load).collect());
        exercise::call(
            &plugins[usize::from(first & 3) % 3][usize::from(first >> 2 & 1)],
            &texts,
        );
    });
}

fn load(shape: &Shape) -> [Plugin; 2] {
    let component = componentize(
        shape,
        wat::parse_str(module(shape)).expect("the module is WAT"),
    );
    let component = component.expect("the module has the shape of its world");
    [Isolation::Batch, Isolation::Sample].map(|isolation| {
        let limits = exercise::limits(isolation);
        let loaded = exercise::host().load("answers", &component, &serde_json::json!({}), &limits);
        loaded.unwrap_or_else(|error| panic!("{error}"))
    })
}

/// A component of a module that exports what the world of `shape` asks for.
///
/// # Errors
/// The module does not.
pub(super) fn componentize(shape: &Shape, mut module: Vec<u8>) -> Result<Vec<u8>, String> {
    let (resolve, package) = interface();
    let world = resolve.select_world(&[*package], Some(shape.world));
    let world = world.expect("the world is there");
    embed_component_metadata(&mut module, resolve, world, StringEncoding::UTF8).map_err(text)?;
    let encoder = ComponentEncoder::default().module(&module).map_err(text)?;
    encoder.validate(false).encode().map_err(text)
}

/// Read once: it is the same for every input.
fn interface() -> &'static (Resolve, PackageId) {
    static INTERFACE: OnceLock<(Resolve, PackageId)> = OnceLock::new();
    INTERFACE.get_or_init(|| {
        let mut above = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors();
        let wit = above.find_map(|folder| Some(folder.join("wit/v0.1")).filter(|wit| wit.is_dir()));
        let mut resolve = Resolve::default();
        let pushed = resolve.push_dir(wit.expect("the interface is there"));
        let (package, _) = pushed.expect("the interface is readable");
        (resolve, package)
    })
}

fn text(error: impl std::fmt::Display) -> String {
    format!("{error:#}")
}

fn encode(bytes: &[u8]) -> String {
    let nibble = |n: u8| char::from(b'@' + n);
    bytes
        .iter()
        .flat_map(|b| [nibble(b & 15), nibble(b >> 4)])
        .collect()
}

fn module(shape: &Shape) -> String {
    let functions = shape.functions.iter().map(|(name, parameters, find)| {
        let interface = shape.interface;
        format!(
            r#"(func (export "{interface}#{name}") (param {parameters}) (result i32) (local $at i32) (local $len i32) (local $to i32)
              {find}
              (block $done (loop $next
                (br_if $done (i32.ge_u (local.get $to) (i32.shr_u (local.get $len) (i32.const 1))))
                (i32.store8 (local.get $to) (i32.or
                  (i32.and (i32.load8_u (local.get $at)) (i32.const 15))
                  (i32.shl (i32.and (i32.load8_u offset=1 (local.get $at)) (i32.const 15)) (i32.const 4))))
                (local.set $at (i32.add (local.get $at) (i32.const 2)))
                (local.set $to (i32.add (local.get $to) (i32.const 1)))
                (br $next)))
              (i32.const 0))"#
        )
    });
    let interface = shape.interface;
    let functions: String = functions.collect();
    format!(
        r#"(module
          (memory (export "memory") 64)
          (global $top (mut i32) (i32.const 65536))
          (func (export "cabi_realloc") (param i32 i32 i32 i32) (result i32) (local $p i32)
            (local.set $p (i32.and (i32.add (global.get $top) (i32.sub (local.get 2) (i32.const 1)))
              (i32.sub (i32.const 0) (local.get 2))))
            (global.set $top (i32.add (local.get $p) (local.get 3)))
            (local.get $p))
          (func (export "{interface}#configure") (param i32 i32) (result i32) (i32.const 0xff00))
          {functions})"#
    )
}
