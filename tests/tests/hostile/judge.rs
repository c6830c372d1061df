//! The `judge` grant from a guest to an endpoint and back, under the clocks of a host call that waits.

use super::granted::{listening, load_with, manifested};
use super::guest::{Parts, score};
use super::registry_server::{Manner, Reply, Server};
use super::{assert_serves, limits, samples, totals, turn};
use grpo_host::config::{JudgeConfig, JudgesConfig};
use grpo_host::judge::{Panel, Surroundings};
use grpo_host::plugin::{Access, Fault, Grants, Limits};
use serde_json::json;
use std::time::{Duration, Instant};

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
const ASK: &str = r"
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

fn judging(body: &str) -> Vec<u8> {
    let body = format!("(drop (call $ones (local.get $n))) {body}");
    let main = format!(r#"(data (i32.const 3000) "user") {}"#, score(&body));
    let bytes = Parts {
        imports: JUDGE,
        around: r#"(core func $complete (canon lower (func $judge "complete")
            (memory (core memory $libc "memory")) (realloc (core func $libc "realloc"))))"#,
        inner: r#"(import "judge" "complete" (func $complete (param i32 i32 i32)))"#,
        with: r#"(with "judge" (instance (export "complete" (func $complete))))"#,
        main: &main,
        ..Parts::default()
    }
    .build();
    manifested(&bytes, &json!({ "judge": "to ask a model" }))
}

/// The grant of a judge behind this server.
fn granted(server: &Server) -> Access {
    let judge = JudgeConfig {
        endpoint: Some(format!("http://{}/v1", server.host())),
        model: "m".to_owned(),
        cache: false,
        max_retries: 0,
        ..JudgeConfig::default()
    };
    let judges = [("small".to_owned(), judge)].into();
    let surroundings = Surroundings {
        variable: &|_| None,
        cache: None,
        load: &mut |name| anyhow::bail!("{name} is not to be loaded"),
    };
    let panel = Panel::open(&JudgesConfig { judges }, surroundings).unwrap();
    Access {
        grants: Grants {
            judge: Some("small".to_owned()),
            ..Grants::default()
        },
        judge: panel.get("small").cloned(),
        ..Access::default()
    }
}

#[test]
fn a_granted_judge_answers_however_short_the_deadline() {
    let _turn = turn();
    let server = Server::start();
    let reply = json!({
        "choices": [{ "message": { "role": "assistant", "content": "seventeen letters" }, "finish_reason": "stop" }],
        "usage": { "prompt_tokens": 5, "completion_tokens": 3 },
    });
    server.set(
        "/v1/chat/completions",
        Reply {
            manner: Manner::Whole,
            ..Reply::body(reply.to_string().as_bytes()).header("content-type", "application/json")
        },
    );
    let (host, _) = listening();
    let bytes = judging(&format!("{ASK} (i32.const 0)"));
    let plugin = load_with(&host, &bytes, &limits(), granted(&server)).unwrap();
    let scoring = plugin.score(&samples(&["is it so?"])).unwrap();
    assert_eq!(
        (totals(&scoring.scores), scoring.faults),
        (vec![Some(17.0)], vec![])
    );
    assert_eq!(server.requests().len(), 1);
}

#[test]
fn hostile_38_a_judge_that_never_answers() {
    let _turn = turn();
    let server = Server::start();
    server.set("/v1/chat/completions", Reply::manner(Manner::Stall));
    let (host, _) = listening();
    let impatient = Limits {
        wait_ms: 300,
        ..limits()
    };
    let begun = Instant::now();
    // Once, it is told of it; ever again, it has waited enough.
    let bytes = judging(&format!("{ASK} (i32.const 0)"));
    let plugin = load_with(&host, &bytes, &impatient, granted(&server)).unwrap();
    let scoring = plugin.score(&samples(&["is it so?"])).unwrap();
    assert_eq!(
        (totals(&scoring.scores), scoring.faults),
        (vec![Some(-1.0)], vec![])
    );
    let bytes = judging(&format!("(loop $ever {ASK} (br $ever)) (unreachable)"));
    let plugin = load_with(&host, &bytes, &impatient, granted(&server)).unwrap();
    let scoring = plugin.score(&samples(&["is it so?"])).unwrap();
    assert_eq!(scoring.faults[0].fault, Fault::Wait { limit_ms: 300 });
    assert!(begun.elapsed() < Duration::from_secs(10));
    assert_serves(&host);
}
