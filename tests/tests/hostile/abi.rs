//! Guests that break the canonical ABI: pointers, encodings, discriminants, calls at the wrong moment.

use super::guest::{self, ONES, Parts};
use super::{fault_of_score, host, limits, load, samples, turn};
use grpo_host::plugin::Fault;
use grpo_host::types::Score;

#[track_caller]
fn assert_fault(bytes: &[u8], word: &str) {
    let fault = fault_of_score(bytes);
    assert!(
        matches!(&fault, Fault::Abi { reason } if reason.contains(word)),
        "{word}: {fault}"
    );
}

#[track_caller]
fn assert_breaks(body: &str, word: &str) {
    assert_fault(&guest::scoring_after_ones(body), word);
}

#[track_caller]
fn assert_traps(bytes: &[u8], word: &str) {
    let fault = fault_of_score(bytes);
    assert!(
        matches!(&fault, Fault::Trap { reason } if reason.contains(word)),
        "{word}: {fault}"
    );
}

/// The verdict is a skip whose reason is `len` units at `at`.
fn skip(at: u32, len: u32) -> String {
    format!(
        "(i32.store8 (i32.const 4096) (i32.const 1))
         (i32.store offset=8 (i32.const 4096) (i32.const {at}))
         (i32.store offset=12 (i32.const 4096) (i32.const {len}))"
    )
}

#[test]
fn hostile_11_lists_outside_memory() {
    let _turn = turn();
    assert_breaks(
        "(i32.store offset=4 (i32.const 0) (i32.const 0xfffffff0))",
        "list",
    );
    assert_breaks(
        "(i32.store offset=8 (i32.const 0) (i32.const 0x7fffffff))",
        "list",
    );
    assert_breaks(&skip(0x7fff_fff0, 16), "out of bounds");
    let log = "(call $log (i32.const 1) (i32.const 0x3fffff) (i32.const 2))";
    assert_breaks(log, "out of bounds");
    // The result record itself.
    assert_fault(&guest::scoring("(i32.const 0x7fffff00)"), "out of bounds");
}

#[test]
fn hostile_12_text_that_is_not_utf8() {
    let _turn = turn();
    let byte = "(i32.store8 (i32.const 2048) (i32.const 0xff))";
    assert_breaks(&(skip(2048, 1) + byte), "utf-8");
    // A surrogate and an overlong slash.
    for bytes in ["0x80a0ed", "0xafc0"] {
        let text = format!("(i32.store (i32.const 2048) (i32.const {bytes}))");
        assert_breaks(&(skip(2048, 3) + &text), "utf-8");
    }
    let log = "(call $log (i32.const 1) (i32.const 2048) (i32.const 1))";
    assert_breaks(&format!("{byte} {log}"), "utf-8");
}

#[test]
fn hostile_13_other_encodings_and_unaligned_pointers() {
    let _turn = turn();
    let encoded = |encoding: &str, body: &str| {
        let main = guest::score(&format!("(drop {ONES}) {body} (i32.const 0)"));
        let options = format!("string-encoding={encoding}");
        let parts = Parts {
            main: &main,
            options: &options,
            ..Parts::default()
        };
        parts.build()
    };
    // An unpaired surrogate, also where a bit of the length says that the text is UTF-16 after all.
    let surrogate = "(i32.store16 (i32.const 2048) (i32.const 0xd800))";
    assert_fault(&encoded("utf16", &(skip(2048, 1) + surrogate)), "surrogate");
    let tagged = skip(2048, 0x8000_0001) + surrogate;
    assert_fault(&encoded("latin1+utf16", &tagged), "surrogate");
    assert_fault(&encoded("utf16", &skip(2049, 1)), "align");
    assert_breaks(
        "(i32.store offset=4 (i32.const 0) (i32.const 4097))",
        "align",
    );
    // What is right in its encoding arrives as it was meant.
    let host = host();
    for (encoding, body) in [
        ("utf16", "(i32.store16 (i32.const 2048) (i32.const 0xff))"),
        (
            "latin1+utf16",
            "(i32.store8 (i32.const 2048) (i32.const 0xff))",
        ),
    ] {
        let bytes = encoded(encoding, &(skip(2048, 1) + body));
        let plugin = load(&host, &bytes, &limits()).unwrap();
        let scoring = plugin.score(&samples(&["a"])).unwrap();
        assert_eq!(scoring.scores, [Score::Skip("ÿ".to_owned())]);
    }
}

/// Every discriminant a reward can return or pass; our interface has no `bool` and no `char` there.
#[test]
fn hostile_14_cases_that_do_not_exist() {
    let _turn = turn();
    assert_breaks(
        "(i32.store8 (i32.const 4096) (i32.const 7))",
        "discriminant",
    );
    assert_breaks(
        "(i32.store8 (i32.const 0) (i32.const 2))",
        "invalid expected",
    );
    let error = "(i32.store8 (i32.const 0) (i32.const 1)) (i32.store8 (i32.const 4) (i32.const 3))";
    assert_breaks(error, "discriminant");
    let level = "(call $log (i32.const 4) (i32.const 0) (i32.const 0))";
    assert_breaks(level, "discriminant");
}

/// The guest calls an inner component that calls back into it while it runs.
#[test]
fn hostile_16_reentrance() {
    let _turn = turn();
    let main = guest::score(&format!("(call $g) {ONES}"));
    let parts = Parts {
        around: r#"(core module $back (func (export "f")))
          (core instance $back (instantiate $back))
          (func $outer (canon lift (core func $back "f")))
          (component $child (import "f" (func $f))
            (core func $f' (canon lower (func $f)))
            (core module $m (import "" "f" (func $f)) (func (export "g") (call $f)))
            (core instance $m (instantiate $m (with "" (instance (export "f" (func $f'))))))
            (func (export "g") (canon lift (core func $m "g"))))
          (instance $child (instantiate $child (with "f" (func $outer))))
          (core func $g (canon lower (func $child "g")))"#,
        inner: r#"(import "child" "g" (func $g))"#,
        with: r#"(with "child" (instance (export "g" (func $g))))"#,
        main: &main,
        ..Parts::default()
    };
    assert_traps(&parts.build(), "cannot enter component instance");
}

/// As Go's collector does when it runs inside an allocation (wasmtime issue 14318).
#[test]
fn hostile_17_an_import_called_from_the_allocator() {
    let _turn = turn();
    let main = format!(
        r#"(func (export "realloc") (param i32 i32 i32 i32) (result i32)
          (call $log (i32.const 1) (i32.const 0) (i32.const 1)) (i32.const 65536)) {}"#,
        guest::score(ONES)
    );
    let parts = Parts {
        main: &main,
        own_allocator: true,
        ..Parts::default()
    };
    assert_traps(&parts.build(), "cannot leave component instance");
}
