//! Formatters and curricula in WAT, around the same memory as [`super::guest`].

use super::guest::{HOST, LIBC};

const TYPES: &str = r#"
  (type $error0 (variant (case "config" string) (case "input" string) (case "internal" string)))
  (export $error "plugin-error" (type $error0))
  (type $message0 (record (field "role" string) (field "content" string)))
  (export $message "message" (type $message0))
  (type $body0 (variant (case "text" string) (case "messages" (list $message))))
  (export $body "prompt-body" (type $body0))
  (type $prompt0 (record (field "body" $body) (field "stop" (list string))))
  (export $prompt "prompt" (type $prompt0))
  (type $parsed0 (record (field "reasoning" (option string)) (field "answer" (option string))))
  (export $parsed "parsed" (type $parsed0))
  (type $outcome0 (record (field "row" u64) (field "rewards" (list f64)) (field "skipped" u32)))
  (export $outcome "outcome" (type $outcome0))
  (type $budget0 (record (field "step" u64) (field "rows" u64) (field "prompts" u32)
    (field "group-size" u32) (field "seed" u64)))
  (export $budget "budget" (type $budget0))
  (type $pick0 (record (field "row" u64) (field "rollouts" u32)))
  (export $pick "pick" (type $pick0))
  (type $metric0 (record (field "name" string) (field "value" f64)))
  (export $metric "metric" (type $metric0))
  (type $table0 (record (field "title" string) (field "columns" (list string))
    (field "rows" (list (list string))) (field "notes" (list string))))
  (export $table "table" (type $table0))
  (type $plan0 (record (field "picks" (list $pick)) (field "epoch" f64) (field "state" (list u8))
    (field "metrics" (list $metric)) (field "report" (list $table))))
  (export $plan "step-plan" (type $plan0))"#;

const FORMATTING: &str = r#"
  (func $format (param "rows" (list string)) (result (result (list $prompt) (error $error)))
    (canon lift (core func $main "format")
      (memory (core memory $libc "memory")) (realloc (core func $libc "realloc"))))
  (func $parse (param "completions" (list string)) (result (result (list $parsed) (error $error)))
    (canon lift (core func $main "parse")
      (memory (core memory $libc "memory")) (realloc (core func $libc "realloc"))))
  (instance $role (export "configure" (func $configure))
    (export "format" (func $format)) (export "parse" (func $parse)))
  (export "grpo:plugin/formatting@0.1.0" (instance $role))"#;

const PLANNING: &str = r#"
  (func $plans (param "state" (list u8)) (param "outcomes" (list $outcome)) (param "budget" $budget)
    (result (result $plan (error $error)))
    (canon lift (core func $main "plan")
      (memory (core memory $libc "memory")) (realloc (core func $libc "realloc"))))
  (instance $role (export "configure" (func $configure)) (export "plan" (func $plans)))
  (export "grpo:plugin/planning@0.1.0" (instance $role))"#;

/// A component of another role whose main module holds `main`.
fn component(main: &str, lifted: &str) -> Vec<u8> {
    let text = format!(
        r#"(component {HOST} {TYPES} {LIBC}
          (core module $main
            (import "libc" "memory" (memory 1))
            (func (export "configure") (param i32 i32) (result i32)
              (i32.store8 (i32.const 32) (i32.const 0))
              (i32.const 32))
            {main})
          (core instance $main (instantiate $main (with "libc" (instance $libc))))
          (func $configure (param "config" string) (result (result (error $error)))
            (canon lift (core func $main "configure")
              (memory (core memory $libc "memory")) (realloc (core func $libc "realloc"))))
          {lifted})"#
    );
    wat::parse_str(text).unwrap()
}

/// A formatter whose main module holds `main`, which must export `format` and `parse`.
pub(crate) fn formatter_of(main: &str) -> Vec<u8> {
    component(main, FORMATTING)
}

/// A formatter of any number of rows and completions: a prompt of `length` letters `x` for each row, and neither reasoning nor
/// answer for each completion. `format` and `parse` come first, with pointer and length of the list of texts (a pointer and a
/// length each) in `$at` and `$n`, and with an i32 local `$i`.
pub(crate) fn formatting(format: &str, parse: &str, length: u32) -> Vec<u8> {
    let list = |size: u32, item: &str| {
        format!(
            r#"(local.set $i (i32.const 0))
              (block $done (loop $next
                (br_if $done (i32.ge_u (local.get $i) (local.get $n)))
                (local.set $to (i32.add (i32.const 4096) (i32.mul (local.get $i) (i32.const {size}))))
                {item}
                (local.set $i (i32.add (local.get $i) (i32.const 1)))
                (br $next)))
              (i32.store (i32.const 4) (i32.const 4096))
              (i32.store (i32.const 8) (local.get $n))
              (i32.const 0)"#
        )
    };
    let function = |name: &str, body: &str, list: &str| {
        format!(
            r#"(func (export "{name}") (param $at i32) (param $n i32) (result i32)
              (local $i i32) (local $to i32) {body} {list})"#
        )
    };
    let text = format!(
        "(i32.store offset=4 (local.get $to) (i32.const 3145728))
         (i32.store offset=8 (local.get $to) (i32.const {length}))"
    );
    let format =
        format!("(memory.fill (i32.const 3145728) (i32.const 120) (i32.const {length})) {format}");
    let main =
        function("format", &format, &list(20, &text)) + &function("parse", parse, &list(24, ""));
    formatter_of(&main)
}

/// A curriculum with one pick of row 0 at 4096 with 4 rollouts, epoch 0, no state; result record at 0, where the plan begins
/// at 8: picks at 8, epoch at 16, state at 24, metrics at 32, report at 40. `body` may change it.
pub(crate) fn planning(body: &str, prelude: &str) -> Vec<u8> {
    let main = format!(
        r#"{prelude} (func (export "plan") (param i32 i32 i32 i32 i64 i64 i32 i32 i64) (result i32)
          (i32.store8 (i32.const 4104) (i32.const 4))
          (i32.store (i32.const 8) (i32.const 4096))
          (i32.store (i32.const 12) (i32.const 1))
          (i32.store8 (i32.const 0) (i32.const 0))
          {body} (i32.const 0))"#
    );
    component(&main, PLANNING)
}
