//! Reward components written in WAT around a few lines of core wasm.
//!
//! The scaffold has a memory of 4 MiB with a bump allocator, our `host.log` as `$log`, and both
//! exports of the `scoring` interface. A test supplies what stands inside the main module, and where
//! the canonical ABI itself is the target, some of what stands around it.

/// Where `score` puts its result record: ok tag at 0, list pointer at 4, list length at 8.
const SCAFFOLD: &str = r#"
(component
  IMPORTS
  (type $finish0 (enum "stop" "length" "abort"))
  (export $finish "finish" (type $finish0))
  (type $question0 (record (field "row" string) (field "prompt" string)))
  (export $question "question" (type $question0))
  (type $sample0 (record (field "question" u32) (field "completion" string)
    (field "reasoning" (option string))
    (field "answer" (option string)) (field "finish" $finish)))
  (export $sample "sample" (type $sample0))
  (type $part0 (record (field "name" string) (field "value" f64)))
  (export $part "part" (type $part0))
  (type $scored0 (record (field "total" f64) (field "parts" (list $part))))
  (export $scored "scored" (type $scored0))
  (type $verdict0 (variant (case "value" $scored) (case "skip" string)))
  (export $verdict "verdict" (type $verdict0))
  (type $error0 (variant (case "config" string) (case "input" string) (case "internal" string)))
  (export $error "plugin-error" (type $error0))
  LIBC
  AROUND
  (core module $main
    (import "libc" "memory" (memory 1))
    (import "host" "log" (func $log (param i32 i32 i32)))
    INNER
    ;; Verdicts for N samples at 4096, each a value of 1 with no parts; returns the result record.
    (func $ones (param $n i32) (result i32) (local $i i32) (local $at i32)
      (block $done (loop $next
        (br_if $done (i32.ge_u (local.get $i) (local.get $n)))
        (local.set $at (i32.add (i32.const 4096) (i32.mul (local.get $i) (i32.const 24))))
        (i32.store8 (local.get $at) (i32.const 0))
        (f64.store offset=8 (local.get $at) (f64.const 1))
        (local.set $i (i32.add (local.get $i) (i32.const 1)))
        (br $next)))
      (i32.store8 (i32.const 0) (i32.const 0))
      (i32.store offset=4 (i32.const 0) (i32.const 4096))
      (i32.store offset=8 (i32.const 0) (local.get $n))
      (i32.const 0))
    (func $fine (export "configure") (param i32 i32) (result i32)
      (i32.store8 (i32.const 32) (i32.const 0))
      (i32.const 32))
    MAIN)
  (core instance $main (instantiate $main
    (with "libc" (instance $libc))
    (with "host" (instance (export "log" (func $log))))
    WITH))
  (func $configure (param "config" string) (result (result (error $error)))
    (canon lift (core func $main "configure")
      (memory (core memory $libc "memory")) (realloc (core func $libc "realloc"))))
  (func $score (param "questions" (list $question)) (param "samples" (list $sample))
    (result (result (list $verdict) (error $error)))
    (canon lift (core func $main "score")
      (memory (core memory $libc "memory")) (realloc (core func ALLOCATOR "realloc")) OPTIONS))
  (instance $scoring (export "configure" (func $configure)) (export "score" (func $score)))
  (export "grpo:plugin/scoring@0.1.0" (instance $scoring)))
"#;

/// The import every plugin may have.
pub(crate) const HOST: &str = r#"(import "grpo:plugin/host@0.1.0" (instance $host
    (type $l (enum "debug" "info" "warn" "error"))
    (export "level" (type $level (eq $l)))
    (export "log" (func (param "level" $level) (param "text" string)))))"#;

/// Memory and allocator, and `$log` lowered onto them.
pub(crate) const LIBC: &str = r#"(core module $libc
    (memory (export "memory") 64)
    (global $top (mut i32) (i32.const 65536))
    (func (export "realloc") (param i32 i32 i32 i32) (result i32) (local $p i32)
      (local.set $p (i32.and
        (i32.add (global.get $top) (i32.sub (local.get 2) (i32.const 1)))
        (i32.sub (i32.const 0) (local.get 2))))
      (global.set $top (i32.add (local.get $p) (local.get 3)))
      (local.get $p)))
  (core instance $libc (instantiate $libc))
  (core func $log (canon lower (func $host "log") (memory (core memory $libc "memory"))))"#;

/// What stands where in the scaffold; all empty is a component without `score`, which is none.
#[derive(Clone, Copy, Default)]
pub(crate) struct Parts<'a> {
    /// Imports of the component beside `host`.
    pub(crate) imports: &'a str,
    /// Definitions of the component before the main module.
    pub(crate) around: &'a str,
    /// Imports of the main module.
    pub(crate) inner: &'a str,
    /// What answers them.
    pub(crate) with: &'a str,
    /// The rest of the main module; exports `score`.
    pub(crate) main: &'a str,
    /// Whether the main module has the allocator of `score` as `realloc`.
    pub(crate) own_allocator: bool,
    /// Canonical options of `score`.
    pub(crate) options: &'a str,
}

impl Parts<'_> {
    pub(crate) fn build(self) -> Vec<u8> {
        self.build_at("0.1.0")
    }

    /// Built against another version of our package.
    pub(crate) fn build_at(self, version: &str) -> Vec<u8> {
        let allocator = if self.own_allocator { "$main" } else { "$libc" };
        let text = SCAFFOLD
            .replace("IMPORTS", &format!("{HOST}\n{}", self.imports))
            .replace("LIBC", LIBC)
            .replace("AROUND", self.around)
            .replace("INNER", self.inner)
            .replace("WITH", self.with)
            .replace("ALLOCATOR", allocator)
            .replace("OPTIONS", self.options)
            .replace("MAIN", self.main)
            .replace("@0.1.0", &format!("@{version}"));
        wat::parse_str(text).unwrap()
    }
}

/// A component whose main module also holds `main`, which must export `score`.
pub(crate) fn component(main: &str) -> Vec<u8> {
    let parts = Parts::default();
    Parts { main, ..parts }.build()
}

/// A function `score` made of `body`, which leaves the address of a result record. It has i32 locals
/// `$i`, `$at` and `$len` to itself.
pub(crate) fn score(body: &str) -> String {
    format!(
        r#"(func $score (export "score") (param $questions i32) (param $asked i32)
          (param $samples i32) (param $n i32) (result i32)
          (local $i i32) (local $at i32) (local $len i32) {body})"#
    )
}

/// A body that leaves a result record with 1 for every sample.
pub(crate) const ONES: &str = "(call $ones (local.get $n))";

/// A component whose `score` is `body`; see [`score`].
pub(crate) fn scoring(body: &str) -> Vec<u8> {
    component(&score(body))
}

/// Runs `body` with every verdict being a value of 1 already in place.
pub(crate) fn scoring_after_ones(body: &str) -> Vec<u8> {
    scoring(&format!("(drop {ONES}) {body} (i32.const 0)"))
}
