//! The `judge` grant from a guest to an endpoint and back, under the clocks of a host call that waits.

use super::granted::{listening, load_with, manifested};
use super::judging::{ASK, asking_a_judge};
use super::registry_server::{Manner, Reply, Server};
use super::{assert_serves, limits, samples, totals, turn};
use grpo_host::config::{JudgeConfig, JudgesConfig};
use grpo_host::judge::{Panel, Surroundings};
use grpo_host::plugin::{Access, Fault, Grants, Limits};
use serde_json::json;
use std::time::{Duration, Instant};

fn judging(body: &str) -> Vec<u8> {
    manifested(&asking_a_judge(body), &json!({ "judge": "to ask a model" }))
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
