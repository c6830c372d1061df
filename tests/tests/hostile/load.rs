//! Components that must not load: no component, the wrong world, too much declared, a bad `start`.

use super::{DEADLINE_MS, LOOP, error_of_load, guest};
use grpo_host::plugin::{Call, Fault};

#[test]
fn loop_in_start() {
    let main = format!(
        r#"(func $spin {LOOP}) (start $spin)
           (func (export "score") (param i32 i32 i32 i32) (result i32) (unreachable))"#
    );
    let error = error_of_load(&guest::component(&main));
    let limit_ms = DEADLINE_MS;
    assert_eq!(
        (error.call, error.fault),
        (Call::Instantiate, Fault::Deadline { limit_ms })
    );
}

#[test]
fn many_memories() {
    // 500 of 1 MiB, in five instances: a module may not have more than 100.
    let hundred = "(memory 16)".repeat(100);
    let five = "(core instance (instantiate $m))".repeat(5);
    let text = format!("(component (core module $m {hundred}) {five})");
    let error = error_of_load(&wat::parse_str(text).unwrap());
    let what = "memories";
    let declares = Fault::Declares {
        what,
        found: 500,
        limit: 8,
    };
    assert_eq!((error.call, error.fault), (Call::Load, declares));
    // Few enough to declare, each far below the cap, too much together: 4 + 7 · 40 MiB.
    let main = format!(
        r#"{} (func (export "score") (param i32 i32 i32 i32) (result i32) (unreachable))"#,
        "(memory 640)".repeat(7)
    );
    let error = error_of_load(&guest::component(&main));
    let (wanted, limit) = (284 << 20, 256 << 20);
    assert_eq!(
        (error.call, error.fault),
        (Call::Instantiate, Fault::Memory { wanted, limit })
    );
}

#[test]
fn one_huge_memory() {
    let main = r#"(memory 65536) (func (export "score") (param i32 i32 i32 i32) (result i32) (unreachable))"#;
    let error = error_of_load(&guest::component(main));
    assert_eq!(error.call, Call::Instantiate);
    assert!(
        matches!(
            error.fault,
            Fault::Memory {
                limit: 268_435_456,
                ..
            }
        ),
        "{error}"
    );
    assert_eq!(error.hint().unwrap(), "raise limits.memory_mib of `evil`");
}

#[test]
fn unknown_imports() {
    let wasi = r#"(component
        (import "wasi:clocks/wall-clock@0.2.0" (instance (export "now" (func (result u64)))))
        (import "grpo:plugin/host@0.1.3" (instance
          (export "log" (func (param "text" string))) (export "exec" (func (param "c" string)))))
        (import "grpo:plugin/host@0.2.0" (instance))
        (instance $i) (export "grpo:plugin/scoring@0.1.0" (instance $i)))"#;
    let error = error_of_load(&wat::parse_str(wasi).unwrap());
    let imports = [
        "wasi:clocks/wall-clock@0.2.0",
        "grpo:plugin/host@0.1.3#exec",
        "grpo:plugin/host@0.2.0",
    ];
    let imports = imports.map(str::to_owned).to_vec();
    assert_eq!(error.fault, Fault::UnknownImports { imports });
    assert!(error.hint().unwrap().contains("WASI"));
}

#[test]
fn wrong_world() {
    let none = r#"(component
        (core module $m (func (export "f")))
        (core instance $i (instantiate $m))
        (func (export "run") (canon lift (core func $i "f")))
        (instance $e) (export "grpo:plugin/scoring@0.2.0" (instance $e)))"#;
    let error = error_of_load(&wat::parse_str(none).unwrap());
    let exports = vec!["grpo:plugin/scoring@0.2.0".to_owned(), "run".to_owned()];
    assert_eq!(error.fault, Fault::WrongWorld { exports });
    let text = error.to_string();
    assert!(
        text.contains("`grpo:plugin/scoring@0.2.0`, `run`"),
        "{text}"
    );
    assert!(
        text.contains("expected one of grpo:plugin/scoring@0.1.0, grpo:"),
        "{text}"
    );
    let hollow = r#"(component (instance $i) (export "grpo:plugin/scoring@0.1.0" (instance $i)))"#;
    let error = error_of_load(&wat::parse_str(hollow).unwrap());
    assert!(
        matches!(&error.fault, Fault::Signature { reason } if reason.contains("configure")),
        "{error}"
    );
    let both = r#"(component (instance $i) (export "grpo:plugin/scoring@0.1.0" (instance $i))
        (instance $j) (export "grpo:plugin/planning@0.1.0" (instance $j)))"#;
    let error = error_of_load(&wat::parse_str(both).unwrap());
    assert!(
        matches!(&error.fault, Fault::ManyRoles { roles } if roles.len() == 2),
        "{error}"
    );
}

#[test]
fn files_that_are_no_components() {
    let module = wat::parse_str("(module)").unwrap();
    for (bytes, found) in [
        (module.as_slice(), "a core module"),
        (b"".as_slice(), "an empty file"),
        (b"(component)".as_slice(), "something else"),
        (b"\x7fELF\x02\x01".as_slice(), "machine code"),
    ] {
        assert_eq!(error_of_load(bytes).fault, Fault::NotAComponent { found });
    }
    let mut cut = guest::scoring_after_ones("");
    cut.truncate(cut.len() / 2);
    let mut garbage = guest::scoring_after_ones("");
    for (i, byte) in garbage.iter_mut().enumerate().skip(8) {
        *byte = (i * 37 % 251) as u8;
    }
    for bytes in [cut, garbage] {
        let error = error_of_load(&bytes);
        assert!(matches!(error.fault, Fault::Compile { .. }), "{error}");
    }
}

#[test]
fn features_that_are_off() {
    let simd = r#"(func (export "score") (param i32 i32 i32 i32) (result i32)
        (i32x4.extract_lane 0 (v128.const i32x4 1 2 3 4)))"#;
    let error = error_of_load(&guest::component(simd));
    assert!(
        matches!(&error.fault, Fault::Compile { reason } if reason.contains("SIMD")),
        "{error}"
    );
    let wide = r#"(memory i64 1) (func (export "score") (param i32 i32 i32 i32) (result i32) (unreachable))"#;
    let error = error_of_load(&guest::component(wide));
    assert!(
        matches!(&error.fault, Fault::Compile { reason } if reason.contains("memory64")),
        "{error}"
    );
}
