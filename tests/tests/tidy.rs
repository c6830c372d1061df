//! Holds the tidy rules against this workspace, and each rule against a tree that breaks it.

use std::fs;

use xtask::tidy;

#[test]
fn the_workspace_is_tidy() {
    let findings = tidy::check(&tidy::workspace_root()).unwrap();
    let lines: Vec<String> = findings.iter().map(ToString::to_string).collect();
    assert!(lines.is_empty(), "\n{}", lines.join("\n"));
}

/// What the rules say of a tree with this one file (and a map that names all its rooms).
fn findings(path: &str, text: &str) -> Vec<String> {
    let root = tempfile::tempdir().unwrap();
    let file = root.path().join(path);
    fs::create_dir_all(file.parent().unwrap()).unwrap();
    fs::write(&file, text).unwrap();
    let map = path.replace(['/', '.'], " ");
    fs::write(root.path().join("ARCHITECTURE.md"), map).unwrap();
    let found = tidy::check(root.path()).unwrap();
    found.iter().map(ToString::to_string).collect()
}

/// `code` under a header, in `path`, breaks exactly one rule, and its message is `message`.
#[track_caller]
fn breaks(path: &str, code: &str, message: &str) {
    let found = findings(path, &format!("//! Header.\n{code}\n"));
    assert_eq!(found, [format!("{path}: {message}")], "{code}");
}

#[track_caller]
fn passes(path: &str, code: &str) {
    let found = findings(path, &format!("//! Header.\n{code}\n"));
    assert_eq!(found, Vec::<String>::new(), "{code}");
}

#[test]
fn rooms_do_not_see_each_other() {
    let sees = |room: &str, seen: &str| format!("`{room}` must not see `crate::{seen}` [layering]");
    breaks(
        "host/src/data/a.rs",
        "use crate::plugin::Limits;",
        &sees("data", "plugin"),
    );
    let group = "use crate::{\n    types::Row,\n    grpo::{loss, advantage},\n};";
    breaks("host/src/run.rs", group, &sees("run", "grpo"));
    let inline = "fn f() { crate::trainer::step() }";
    breaks("host/src/grpo/mod.rs", inline, &sees("grpo", "trainer"));
    let own = "use crate::{data::rows, types::{Row, plugin}};\n// crate::plugin";
    passes("host/src/data/a.rs", own);
    passes(
        "host/src/trainer.rs",
        "use crate::{data, grpo, plugin, run};",
    );
}

#[test]
fn crates_stay_in_their_rooms() {
    let policy = |name: &str| format!("grpo-policy must not know `{name}` [layering]");
    let only = |name: &str, home: &str| format!("`{name}` is for {home} only [layering]");
    let cuda = "host/policy/src/backend/cuda";
    breaks(
        "host/policy/src/a.rs",
        "use tokio::sync::mpsc;",
        &policy("tokio"),
    );
    breaks(
        "host/policy/src/a.rs",
        "fn f() -> reqwest::Error {}",
        &policy("reqwest"),
    );
    breaks(
        "host/src/run/a.rs",
        "use wasmtime::Engine;",
        &only("wasmtime", "host/src/plugin"),
    );
    breaks(
        "host/src/grpo/a.rs",
        "use candle_core::Tensor;",
        &only("candle_", "host/policy/"),
    );
    breaks(
        "host/policy/src/a.rs",
        "use cudarc::driver;",
        &only("cudarc", cuda),
    );
    passes("host/src/plugin/a.rs", "use wasmtime::Engine;");
    passes(
        "host/policy/src/a.rs",
        "use candle_core::Tensor; use tokenizers::Tokenizer;",
    );
    passes(
        "host/src/run/a.rs",
        "const HINT: &str = \"wasmtime::Error\";",
    );
}

#[test]
fn unsafe_has_one_home() {
    let message = "`unsafe` is for host/policy/src/backend/cuda only [unsafe]";
    breaks("host/src/a.rs", "fn f() { unsafe { g() } }", message);
    breaks("plugins/x/src/lib.rs", "unsafe impl Send for X {}", message);
    passes(
        "host/policy/src/backend/cuda/a.rs",
        "fn f() { unsafe { g() } }",
    );
    passes("host/src/a.rs", "#![deny(unsafe_code)] // unsafe");
}

#[test]
fn files_open_with_a_short_header() {
    let path = "host/src/a.rs";
    let missing = format!("{path}: does not open with a `//!` header [header]");
    assert_eq!(findings(path, "fn f() {}\n"), [missing.as_str()]);
    assert_eq!(findings(path, ""), [missing]);
    assert_eq!(findings(path, &"//! a\n".repeat(12)), Vec::<String>::new());
    let long = format!("{path}: header of 13 lines, at most 12 [header]");
    assert_eq!(findings(path, &"//! a\n".repeat(13)), [long]);
}

#[test]
fn files_stay_short() {
    let lines = |n: usize| "\n".repeat(n - 2);
    passes("host/src/a.rs", &lines(500));
    breaks(
        "host/src/a.rs",
        &lines(501),
        "501 lines, at most 500 [size]",
    );
    breaks(
        "host/src/main.rs",
        &lines(61),
        "61 lines, at most 60 [size]",
    );
    breaks(
        "host/src/trainer.rs",
        &lines(301),
        "301 lines, at most 300 [size]",
    );
}

#[test]
fn empty_names_are_refused() {
    let message = |name: &str| format!("`{name}` says nothing; name what it does [names]");
    breaks("host/src/utils.rs", "", &message("utils"));
    breaks("host/src/helpers/a.rs", "", &message("helpers"));
    breaks(
        "host/src/a.rs",
        "mod common {\n    fn f() {}\n}",
        &message("common"),
    );
    breaks("host/src/a.rs", "pub mod manager;", &message("manager"));
    passes("host/src/a.rs", "mod commons; fn manager() {}");
}

#[test]
fn traits_have_two_implementors() {
    let message = |n: usize| format!("trait `Door` has {n} implementor(s), at least 2 [traits]");
    let one = "pub trait Door {}\nimpl Door for A {}\nimpl A {}\nimpl Clone for A {}";
    breaks("host/src/a.rs", "trait Door {}", &message(0));
    breaks("host/src/a.rs", one, &message(1));
    let generic = "impl<T: Fn() -> Vec<u8>> crate::a::Door<T>\n    for B<T> {}";
    passes("host/src/a.rs", &format!("{one}\n{generic}"));
}

#[test]
fn only_the_rim_prints() {
    let message = |name: &str| format!("`{name}!` is for commands, main, cli and error [print]");
    breaks(
        "host/src/run/a.rs",
        "fn f() { println!(); }",
        &message("println"),
    );
    breaks(
        "host/policy/src/a.rs",
        "fn f() { eprint!(\"x\"); }",
        &message("eprint"),
    );
    passes("host/src/commands/a.rs", "fn f() { println!(); }");
    passes("host/src/run/a.rs", "fn println() {}");
}

#[test]
fn nothing_is_left_to_do() {
    breaks(
        "host/src/a.rs",
        "fn f() { todo!() }",
        "`todo!` is left [todo]",
    );
    breaks(
        "xtask/src/a.rs",
        "fn f() { unimplemented!() }",
        "`unimplemented!` is left [todo]",
    );
}

#[test]
fn the_map_names_every_room() {
    let root = tempfile::tempdir().unwrap();
    for path in [
        "host/src/data/mod.rs",
        "host/policy/src/engine.rs",
        "host/src/lib.rs",
    ] {
        let file = root.path().join(path);
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(file, "//! Header.\n").unwrap();
    }
    let missing = |map: &str| {
        fs::write(root.path().join("ARCHITECTURE.md"), map).unwrap();
        let found = tidy::check(root.path()).unwrap();
        found.iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    assert_eq!(
        missing("`host/`: rooms `data` and `engine`"),
        Vec::<String>::new()
    );
    let one = "ARCHITECTURE.md: does not mention `engine` [map]";
    assert_eq!(missing("`host/`: data, engines"), [one]);
}
