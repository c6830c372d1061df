//! A guest in WAT that imports of WASI what there is to try.

use super::granted::manifested;
use super::guest::{self, Parts, score};
use serde_json::json;

/// In versions that are not the host's, as tools have them.
const IMPORTS: &str = r#"
  (import "wasi:io/error@0.2.3" (instance $io-error
    (export "error" (type (sub resource)))))
  (alias export $io-error "error" (type $error-type))
  (import "wasi:io/poll@0.2.3" (instance $poll
    (export "pollable" (type $pollable (sub resource)))
    (export "[method]pollable.block" (func (param "self" (borrow $pollable))))
    (export "poll" (func (param "in" (list (borrow $pollable))) (result (list u32))))))
  (alias export $poll "pollable" (type $pollable-type))
  (import "wasi:io/streams@0.2.3" (instance $streams
    (export "output-stream" (type $output (sub resource)))
    (export "input-stream" (type $input (sub resource)))
    (alias outer 1 $error-type (type $e0))
    (export "error" (type $e (eq $e0)))
    (type $s0 (variant (case "last-operation-failed" (own $e)) (case "closed")))
    (export "stream-error" (type $s (eq $s0)))
    (export "[method]output-stream.blocking-write-and-flush"
      (func (param "self" (borrow $output)) (param "contents" (list u8)) (result (result (error $s)))))
    (export "[method]input-stream.blocking-read"
      (func (param "self" (borrow $input)) (param "len" u64) (result (result (list u8) (error $s)))))))
  (alias export $streams "output-stream" (type $output-type))
  (alias export $streams "input-stream" (type $input-type))
  (import "wasi:clocks/monotonic-clock@0.2.6" (instance $monotonic
    (alias outer 1 $pollable-type (type $p0))
    (export "pollable" (type $p (eq $p0)))
    (export "now" (func (result u64)))
    (export "subscribe-duration" (func (param "when" u64) (result (own $p))))))
  (import "wasi:clocks/wall-clock@0.2.0" (instance $wall
    (type $d0 (record (field "seconds" u64) (field "nanoseconds" u32)))
    (export "datetime" (type $d (eq $d0)))
    (export "now" (func (result $d)))))
  (import "wasi:random/random@0.2.0" (instance $random
    (export "get-random-bytes" (func (param "len" u64) (result (list u8))))
    (export "get-random-u64" (func (result u64)))))
  (import "wasi:cli/environment@0.2.0" (instance $environment
    (export "get-environment" (func (result (list (tuple string string)))))
    (export "get-arguments" (func (result (list string))))))
  (import "wasi:cli/exit@0.2.0" (instance $exit
    (export "exit" (func (param "status" (result))))))
  (import "wasi:cli/stdin@0.2.0" (instance $stdin
    (alias outer 1 $input-type (type $i0))
    (export "input-stream" (type $i (eq $i0)))
    (export "get-stdin" (func (result (own $i))))))
  (import "wasi:cli/stdout@0.2.0" (instance $stdout
    (alias outer 1 $output-type (type $o0))
    (export "output-stream" (type $o (eq $o0)))
    (export "get-stdout" (func (result (own $o))))))
  (import "wasi:filesystem/types@0.2.0" (instance $files
    (export "descriptor" (type $descriptor (sub resource)))
    (alias outer 1 $input-type (type $i0))
    (export "input-stream" (type $i (eq $i0)))
    (type $c0 (enum "access" "exist"))
    (export "error-code" (type $c (eq $c0)))
    (export "[method]descriptor.read-via-stream"
      (func (param "self" (borrow $descriptor)) (param "offset" u64) (result (result (own $i) (error $c)))))))
  (alias export $files "descriptor" (type $descriptor-type))
  (import "wasi:filesystem/preopens@0.2.0" (instance $preopens
    (alias outer 1 $descriptor-type (type $d0))
    (export "descriptor" (type $d (eq $d0)))
    (export "get-directories" (func (result (list (tuple (own $d) string)))))))
  (import "wasi:sockets/network@0.2.0" (instance $network
    (export "network" (type (sub resource)))
    (type $c0 (enum "unknown" "access-denied" "not-supported"))
    (export "error-code" (type (eq $c0)))
    (type $f0 (enum "ipv4" "ipv6"))
    (export "ip-address-family" (type (eq $f0)))))
  (alias export $network "network" (type $network-type))
  (alias export $network "error-code" (type $code-type))
  (alias export $network "ip-address-family" (type $family-type))
  (import "wasi:sockets/instance-network@0.2.0" (instance $instance-network
    (alias outer 1 $network-type (type $n0))
    (export "network" (type $n (eq $n0)))
    (export "instance-network" (func (result (own $n))))))
  (import "wasi:sockets/tcp@0.2.0" (instance $tcp
    (export "tcp-socket" (type $socket (sub resource)))
    (export "[method]tcp-socket.is-listening" (func (param "self" (borrow $socket)) (result bool)))))
  (alias export $tcp "tcp-socket" (type $socket-type))
  (import "wasi:sockets/tcp-create-socket@0.2.0" (instance $create
    (alias outer 1 $socket-type (type $s0))
    (export "tcp-socket" (type $s (eq $s0)))
    (alias outer 1 $code-type (type $c0))
    (export "error-code" (type $c (eq $c0)))
    (alias outer 1 $family-type (type $f0))
    (export "ip-address-family" (type $f (eq $f0)))
    (export "create-tcp-socket" (func (param "address-family" $f) (result (result (own $s) (error $c)))))))
  (import "wasi:sockets/ip-name-lookup@0.2.0" (instance $lookup
    (export "resolve-address-stream" (type $r (sub resource)))
    (alias outer 1 $network-type (type $n0))
    (export "network" (type $n (eq $n0)))
    (alias outer 1 $code-type (type $c0))
    (export "error-code" (type $c (eq $c0)))
    (export "resolve-addresses" (func (param "network" (borrow $n)) (param "name" string)
      (result (result (own $r) (error $c)))))))
"#;

/// What the main module imports of it: instance, function, name and type inside.
const FUNCTIONS: [(&str, &str, &str, &str); 18] = [
    ("monotonic", "now", "now", "(result i64)"),
    (
        "monotonic",
        "subscribe-duration",
        "timer",
        "(param i64) (result i32)",
    ),
    ("poll", "[method]pollable.block", "block", "(param i32)"),
    ("poll", "poll", "poll", "(param i32 i32 i32)"),
    ("wall", "now", "date", "(param i32)"),
    ("random", "get-random-bytes", "bytes", "(param i64 i32)"),
    ("random", "get-random-u64", "word", "(result i64)"),
    ("environment", "get-environment", "variables", "(param i32)"),
    ("environment", "get-arguments", "arguments", "(param i32)"),
    ("exit", "exit", "exit", "(param i32)"),
    ("stdin", "get-stdin", "stdin", "(result i32)"),
    ("stdout", "get-stdout", "stdout", "(result i32)"),
    (
        "streams",
        "[method]output-stream.blocking-write-and-flush",
        "write",
        "(param i32 i32 i32 i32)",
    ),
    (
        "streams",
        "[method]input-stream.blocking-read",
        "read",
        "(param i32 i64 i32)",
    ),
    ("preopens", "get-directories", "folders", "(param i32)"),
    (
        "instance-network",
        "instance-network",
        "net",
        "(result i32)",
    ),
    ("create", "create-tcp-socket", "socket", "(param i32 i32)"),
    (
        "lookup",
        "resolve-addresses",
        "resolve",
        "(param i32 i32 i32 i32)",
    ),
];

/// A component that imports all of the above and has `more` in its main module besides.
pub(super) fn importing(more: &str, body: &str) -> Vec<u8> {
    let mut around = String::new();
    let mut inner = String::new();
    let mut with = String::new();
    for (instance, function, name, ty) in FUNCTIONS {
        around += &format!(
            r#"(core func ${name} (canon lower (func ${instance} "{function}")
                (memory (core memory $libc "memory")) (realloc (core func $libc "realloc"))))"#
        );
        inner += &format!(r#"(import "wasi" "{name}" (func ${name} {ty}))"#);
        with += &format!(r#"(export "{name}" (func ${name}))"#);
    }
    let with = format!(r#"(with "wasi" (instance {with}))"#);
    let body = format!("(drop {}) {body} (i32.const 0)", guest::ONES);
    let main = format!("{more} {}", score(&body));
    let parts = Parts {
        imports: IMPORTS,
        around: &around,
        inner: &inner,
        with: &with,
        main: &main,
        ..Parts::default()
    };
    manifested(&parts.build(), &json!({ "wasi": "its runtime imports it" }))
}
