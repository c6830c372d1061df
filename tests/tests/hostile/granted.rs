//! Guests in WAT that use what can be granted, with the manifests that ask for it.

use grpo_host::plugin::{
    Access, Grants, HttpGrant, Limits, LogLine, Manifest, Plugin, PluginError, PluginHost,
    RewardPlugin, Secrets,
};
use serde_json::{Value, json};
use std::sync::{Arc, Mutex};

use super::guest::{Parts, score};

const HTTP: &str = r#"(import "grpo:plugin/http@0.1.0" (instance $http
    (type $m (enum "get" "post"))
    (export "method" (type $method (eq $m)))
    (type $headers (list (tuple string string)))
    (type $bytes (list u8))
    (type $rq (record (field "method" $method) (field "url" string) (field "headers" $headers)
      (field "body" $bytes)))
    (export "request" (type $request (eq $rq)))
    (type $rs (record (field "status" u16) (field "headers" $headers) (field "body" $bytes)))
    (export "response" (type $response (eq $rs)))
    (type $e (variant (case "denied" string) (case "timeout") (case "too-large" string)
      (case "failed" string)))
    (export "http-error" (type $http-error (eq $e)))
    (export "send" (func (param "requests" (list $request))
      (result (list (result $response (error $http-error))))))))"#;

/// Asks for the URL that each completion is, in one call, and leaves the statuses as totals: -1 denied, -2 timeout, -3 too
/// large, -4 failed, with the reasons in the log. Requests lie at 8192, what comes back at 2000.
const ASK: &str = r"
    (local.set $i (i32.const 0))
    (block $done (loop $next
      (br_if $done (i32.ge_u (local.get $i) (local.get $n)))
      (local.set $at (i32.add (i32.const 8192) (i32.mul (local.get $i) (i32.const 28))))
      (local.set $len (i32.add (local.get $samples) (i32.mul (local.get $i) (i32.const 40))))
      (i32.store8 (local.get $at) (i32.const 0))
      (i32.store offset=4 (local.get $at) (i32.load offset=4 (local.get $len)))
      (i32.store offset=8 (local.get $at) (i32.load offset=8 (local.get $len)))
      (i64.store offset=12 align=4 (local.get $at) (i64.const 0))
      (i64.store offset=20 align=4 (local.get $at) (i64.const 0))
      (local.set $i (i32.add (local.get $i) (i32.const 1)))
      (br $next)))
    (call $send (i32.const 8192) (local.get $n) (i32.const 2000))
    (local.set $i (i32.const 0))
    (block $done (loop $next
      (br_if $done (i32.ge_u (local.get $i) (local.get $n)))
      (local.set $at (i32.add (i32.load (i32.const 2000)) (i32.mul (local.get $i) (i32.const 24))))
      (local.set $len (i32.add (i32.const 4096) (i32.mul (local.get $i) (i32.const 24))))
      (if (i32.load8_u (local.get $at))
        (then
          (f64.store offset=8 (local.get $len)
            (f64.sub (f64.const -1) (f64.convert_i32_u (i32.load8_u offset=4 (local.get $at)))))
          (if (i32.ne (i32.load8_u offset=4 (local.get $at)) (i32.const 1))
            (then (call $log (i32.const 1) (i32.load offset=8 (local.get $at))
              (i32.load offset=12 (local.get $at))))))
        (else
          (f64.store offset=8 (local.get $len)
            (f64.convert_i32_u (i32.load16_u offset=4 (local.get $at))))))
      (local.set $i (i32.add (local.get $i) (i32.const 1)))
      (br $next)))";

fn http(body: &str) -> Vec<u8> {
    let main = score(body);
    Parts {
        imports: HTTP,
        around: r#"(core func $send (canon lower (func $http "send")
            (memory (core memory $libc "memory")) (realloc (core func $libc "realloc"))))"#,
        inner: r#"(import "http" "send" (func $send (param i32 i32 i32)))"#,
        with: r#"(with "http" (instance (export "send" (func $send))))"#,
        main: &main,
        ..Parts::default()
    }
    .build()
}

/// A guest that asks for the URLs that completions are.
pub(super) fn asking() -> Vec<u8> {
    http(&format!(
        "(drop (call $ones (local.get $n))) {ASK} (i32.const 0)"
    ))
}

/// One that never stops asking.
pub(super) fn insisting() -> Vec<u8> {
    http(&format!("(loop $ever {ASK} (br $ever)) (unreachable)"))
}

/// A guest that reads the secret `KEY` into memory, where `$at` and `$len` find it, and goes on with `body`.
pub(super) fn reading_a_secret(body: &str) -> Vec<u8> {
    let body = format!(
        "(drop (call $ones (local.get $n))) (call $get (i32.const 3000) (i32.const 3) (i32.const 2000))
         (local.set $at (i32.load offset=4 (i32.const 2000)))
         (local.set $len (i32.load offset=8 (i32.const 2000))) {body}"
    );
    let main = format!(r#"(data (i32.const 3000) "KEY") {}"#, score(&body));
    Parts {
        imports: r#"(import "grpo:plugin/secrets@0.1.0" (instance $secrets
            (export "get" (func (param "name" string) (result (option string))))))"#,
        around: r#"(core func $get (canon lower (func $secrets "get")
            (memory (core memory $libc "memory")) (realloc (core func $libc "realloc"))))"#,
        inner: r#"(import "secrets" "get" (func $get (param i32 i32 i32)))"#,
        with: r#"(with "secrets" (instance (export "get" (func $get))))"#,
        main: &main,
        ..Parts::default()
    }
    .build()
}

/// A component with a manifest that asks for this.
pub(super) fn manifested(bytes: &[u8], asks: &Value) -> Vec<u8> {
    let manifest =
        json!({ "name": "evil", "version": "1.0.0", "description": "means harm", "asks": asks });
    let manifest = Manifest::parse(manifest.to_string().as_bytes()).unwrap();
    manifest.embed(bytes).unwrap()
}

pub(super) fn asks_http(hosts: &[&str]) -> Value {
    json!({ "http": { "hosts": hosts, "reason": "to look things up" } })
}

pub(super) fn hosts(hosts: &[&str]) -> Access {
    let hosts = hosts.iter().map(|&h| h.to_owned()).collect();
    Access {
        grants: Grants {
            http: Some(HttpGrant { hosts }),
            ..Grants::default()
        },
        ..Access::default()
    }
}

pub(super) fn secret(value: &str) -> Access {
    let mut secrets = Secrets::default();
    secrets.add("KEY", value).unwrap();
    Access {
        grants: Grants {
            secrets: [("KEY".to_owned(), "VARIABLE".to_owned())].into(),
            ..Grants::default()
        },
        secrets,
        ..Access::default()
    }
}

/// A host, and the lines that its guests log.
pub(super) fn listening() -> (PluginHost, Arc<Mutex<Vec<String>>>) {
    let lines = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&lines);
    let sink = move |line: LogLine<'_>| seen.lock().unwrap().push(line.text.to_owned());
    (PluginHost::new(Arc::new(sink)).unwrap(), lines)
}

pub(super) fn load_with(
    host: &PluginHost,
    bytes: &[u8],
    limits: &Limits,
    access: Access,
) -> Result<RewardPlugin, PluginError> {
    let prepared = host.prepare_with("evil", bytes, limits, access)?;
    match prepared.configure(&json!({}), None)? {
        Plugin::Reward(plugin) => Ok(plugin),
        other => panic!("{:?}", other.id()),
    }
}
