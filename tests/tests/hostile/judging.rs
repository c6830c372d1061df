//! Guests in WAT that ask a judge.

use super::guest::{Parts, score};

const JUDGE: &str = r#"(import "grpo:plugin/types@0.1.0" (instance $shared
    (type $m (record (field "role" string) (field "content" string)))
    (export "message" (type $message (eq $m)))
    (type $f (enum "stop" "length" "abort"))
    (export "finish" (type $finish (eq $f)))))
  (alias export $shared "message" (type $message))
  (alias export $shared "finish" (type $finished))
  (import "grpo:plugin/judge@0.1.0" (instance $judge
    (export "message" (type $message0 (eq $message)))
    (export "finish" (type $finish0 (eq $finished)))
    (type $rq (record (field "messages" (list $message0)) (field "max-tokens" u32)))
    (export "request" (type $request (eq $rq)))
    (type $rp (record (field "text" string) (field "finish" $finish0)
      (field "prompt-tokens" u32) (field "completion-tokens" u32)))
    (export "reply" (type $reply (eq $rp)))
    (type $e (variant (case "timeout") (case "exhausted" string) (case "refused" string)
      (case "unavailable" string)))
    (export "judge-error" (type $judge-error (eq $e)))
    (export "complete" (func (param "requests" (list $request))
      (result (list (result $reply (error $judge-error))))))))"#;

/// Asks about the first completion; the total is the length of the reply, or -1 and down for the errors in order.
pub(crate) const ASK: &str = r"
    (i64.store align=4 (i32.const 8192) (i64.const 0x000000040000_0bb8))
    (i32.store (i32.const 8200) (i32.load offset=4 (local.get $samples)))
    (i32.store (i32.const 8204) (i32.load offset=8 (local.get $samples)))
    (i32.store (i32.const 8208) (i32.const 8192)) (i32.store (i32.const 8212) (i32.const 1))
    (i32.store (i32.const 8216) (i32.const 16))
    (call $complete (i32.const 8208) (i32.const 1) (i32.const 2000))
    (local.set $at (i32.load (i32.const 2000)))
    (f64.store offset=8 (i32.const 4096) (if (result f64) (i32.load8_u (local.get $at))
      (then (f64.sub (f64.const -1) (f64.convert_i32_u (i32.load8_u offset=4 (local.get $at)))))
      (else (f64.convert_i32_u (i32.load offset=8 (local.get $at))))))";

/// A guest whose `score` is `body`, after verdicts of 1; it can [`ASK`].
pub(crate) fn asking_a_judge(body: &str) -> Vec<u8> {
    let body = format!("(drop (call $ones (local.get $n))) {body}");
    let main = format!(r#"(data (i32.const 3000) "user") {}"#, score(&body));
    Parts {
        imports: JUDGE,
        around: r#"(core func $complete (canon lower (func $judge "complete")
            (memory (core memory $libc "memory")) (realloc (core func $libc "realloc"))))"#,
        inner: r#"(import "judge" "complete" (func $complete (param i32 i32 i32)))"#,
        with: r#"(with "judge" (instance (export "complete" (func $complete))))"#,
        main: &main,
        ..Parts::default()
    }
    .build()
}
