//! Hostile components as files: what `plugin check` and a run say of them, and that compiling one on trial
//! ends in time. The rest of the hostile suite is in `tests/tests/hostile`.

use std::{
    fmt::Write,
    path::Path,
    time::{Duration, Instant},
};

use super::lab::Lab;

/// Exit code of a component that is refused.
const FAILURE: i32 = 1;

/// `plugin check` refuses `bytes` with these words in its two lines, within `seconds`.
#[track_caller]
fn check_refuses(bytes: &[u8], limits: &str, error: &str, hint: &str, seconds: u64) {
    let lab = Lab::new();
    lab.write("bomb.wasm", bytes);
    let begun = Instant::now();
    let ended = lab.run(&format!("plugin check bomb.wasm --limits {limits}"));
    let took = begun.elapsed();
    let (found, next) = ended.refused(FAILURE);
    assert!(found.contains(error), "{found}");
    assert!(next.contains(hint), "{next}");
    assert_eq!(
        (ended.stderr.lines().count(), ended.stdout.as_str()),
        (2, "")
    );
    assert!(took < Duration::from_secs(seconds), "{took:?}");
}

/// Takes seconds to compile; the child is stopped after 300 ms.
const HASTY: &str = r#"{"compile_ms":300}"#;
const TOO_LONG: &str = "took longer than 300 ms to compile";
const RAISE: &str = "raise limits.compile_ms of `bomb`, if you trust it";

#[test]
fn hostile_24_one_function_of_two_megabytes() {
    let step = "local.get 0 i32.const 3 i32.add local.set 0 ".repeat(300_000);
    let text = format!("(component (core module (func (param i32) {step})))");
    let bytes = wat::parse_str(text).unwrap();
    assert!(bytes.len() > 2_000_000);
    check_refuses(&bytes, HASTY, TOO_LONG, RAISE, 3);
}

/// 2 to the power of 40 instances in 2 KB, of nothing but other components.
#[test]
fn hostile_24_components_that_double() {
    let mut text = "(component (component $c0)".to_owned();
    for i in 1..=40 {
        let inner = format!("(instance (instantiate $c{}))", i - 1);
        write!(text, "(component $c{i} {inner} {inner})").unwrap();
    }
    text += "(instance (instantiate $c40)))";
    let bytes = wat::parse_str(text).unwrap();
    assert!(bytes.len() < 4096);
    check_refuses(&bytes, HASTY, TOO_LONG, RAISE, 3);
    // Given the time it takes the memory, of which there is an end as well.
    let small = r#"{"compile_ms":60000,"compile_mib":512}"#;
    let down = "brought down the compiler, which had 512 MiB of address space (signal: 6";
    check_refuses(
        &bytes,
        small,
        down,
        "raise limits.compile_mib of `bomb`",
        60,
    );
}

/// Each of two of the one before, or a list of it: parsers count, and the compiler never sees them.
#[test]
fn hostile_24_types_within_types() {
    let nested = |kind: &dyn Fn(usize) -> String| {
        let mut text = "(component (type $t0 (list u8))".to_owned();
        for i in 1..2000 {
            write!(text, "(type $t{i} {})", kind(i - 1)).unwrap();
        }
        wat::parse_str(text + ")").unwrap()
    };
    let hint = "give the .wasm file of a component built against wit/v0.1";
    let pairs = nested(&|i| format!("(tuple $t{i} $t{i})"));
    let size = "effective type size exceeds the limit of 1000000";
    check_refuses(&pairs, "{}", size, hint, 5);
    let lists = nested(&|i| format!("(list $t{i})"));
    check_refuses(&lists, "{}", "type nesting is too deep", hint, 5);
}

#[test]
fn hostile_24_a_hundred_thousand_functions() {
    let functions = "(func (result i32) i32.const 1)".repeat(100_000);
    let text = format!("(component (core module {functions}))");
    let bytes = wat::parse_str(text).unwrap();
    check_refuses(&bytes, HASTY, TOO_LONG, RAISE, 3);
}

/// Instances of one small module.
#[test]
fn hostile_24_too_many_instances() {
    let many = "(core instance (instantiate $m))".repeat(65);
    let text = format!("(component (core module $m) {many})");
    let bytes = wat::parse_str(text).unwrap();
    let limit = "65 core module instances, which exceeds the configured maximum of 64";
    let hint = "give the .wasm file of a component built against wit/v0.1";
    check_refuses(&bytes, "{}", limit, hint, 5);
}

#[test]
fn hostile_47_a_file_name_that_forges_a_line() {
    let lab = Lab::new();
    let good = Path::new(env!("CARGO_MANIFEST_DIR")).join("../plugins/dist/reward-math.wasm");
    let good = std::fs::read(good).unwrap();
    lab.write("reward.wasm", &good);
    lab.run("plugin check reward.wasm").fine();
    lab.write("a\u{1b}[2J.wasm", &good);
    for command in ["check", "inspect"] {
        let ended = lab.run(&format!("plugin {command} a\u{1b}[2J.wasm"));
        let (error, hint) = ended.refused(FAILURE);
        assert!(
            error.contains("has a name that cannot stand in logs"),
            "{error}"
        );
        assert!(hint.starts_with("rename its file"), "{hint}");
        assert!(!ended.stderr.contains('\u{1b}'), "{ended:?}");
    }
}

/// A device that never ends is read as far as a component may be long.
#[test]
fn hostile_24_a_file_without_an_end() {
    let lab = Lab::new();
    let begun = Instant::now();
    let ended = lab.run("plugin check /dev/zero");
    let (error, _) = ended.refused(FAILURE);
    assert!(
        error.contains("has more than the 67108864 bytes that are compiled"),
        "{error}"
    );
    assert!(begun.elapsed() < Duration::from_secs(5));
}
