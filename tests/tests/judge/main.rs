//! Judges against an endpoint on this machine that is slow, wrong, rate-limited or dying, and against a model of ours.

#![expect(
    clippy::unwrap_used,
    reason = "clippy spares #[test] functions, not what they share"
)]

mod embeddings;
mod limits;
mod local;
mod run;
mod server;
mod shipped;

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

use grpo_host::{
    config::{JudgeConfig, JudgesConfig},
    judge::{Judge, JudgeError, Panel, Reply, Request, Surroundings},
    types::{Finish, Message},
};
use server::{Fault, Server};

const KEY: &str = "sk-very-secret";

/// A judge called `good` that asks `server` and does not wait long.
fn config(server: &Server) -> JudgeConfig {
    JudgeConfig {
        endpoint: Some(server.url()),
        model: "m".to_owned(),
        embedding_model: Some("e".to_owned()),
        api_key_env: Some("JUDGE_KEY".to_owned()),
        backoff_ms: 1,
        ..JudgeConfig::default()
    }
}

fn panel(config: JudgeConfig, cache: &Path) -> anyhow::Result<Panel> {
    let judges = [("good".to_owned(), config)].into();
    let variable = |name: &str| (name == "JUDGE_KEY").then(|| format!("{KEY}\n"));
    Panel::open(
        &JudgesConfig { judges },
        Surroundings {
            variable: &variable,
            cache: Some(cache),
            load: &mut |_| Ok(grpo_host::defaults::model()?),
        },
    )
}

fn judge(config: JudgeConfig, cache: &Path) -> Judge {
    panel(config, cache).unwrap().get("good").unwrap().clone()
}

fn in_time() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

/// Asks one question a text.
fn ask(
    judge: &Judge,
    texts: &[impl AsRef<str>],
    deadline: Instant,
) -> Vec<Result<Reply, JudgeError>> {
    let messages: Vec<[Message; 1]> = texts
        .iter()
        .map(|text| {
            [Message {
                role: "user".to_owned(),
                content: text.as_ref().to_owned(),
            }]
        })
        .collect();
    let requests: Vec<Request<'_>> = messages
        .iter()
        .map(|messages| Request {
            messages,
            max_tokens: 8,
        })
        .collect();
    judge.complete("reward", &requests, deadline)
}

/// What the server says to a text.
fn reply(text: &str) -> Result<Reply, JudgeError> {
    Ok(Reply {
        text: format!("{text}! {}", text.len()),
        finish: Finish::Stop,
        prompt_tokens: 10,
        completion_tokens: 2,
    })
}

#[test]
fn answers_come_in_order_are_kept_and_serve_without_a_network() {
    let server = Server::start();
    let cache = tempfile::tempdir().unwrap();
    let first = judge(config(&server), cache.path());
    let texts = ["one", "three", "one", "fifteen"];
    let expected: Vec<_> = texts.into_iter().map(reply).collect();
    assert_eq!(ask(&first, &texts, in_time()), expected);
    let requests = server.requests();
    // Equal questions are one request.
    assert_eq!(requests.len(), 3);
    for request in &requests {
        assert_eq!(request.path, "/v1/chat/completions");
        let bearer = format!("Bearer {KEY}");
        assert_eq!(request.authorization.as_ref(), Some(&bearer));
        assert_eq!(
            (&request.body["model"], &request.body["max_tokens"]),
            (&"m".into(), &8.into())
        );
    }
    let usage = first.usage();
    assert_eq!((usage.asked, usage.cached, usage.requests), (4, 1, 3));
    assert_eq!((usage.prompt_tokens, usage.completion_tokens), (30, 6));

    // Another process, without a network and without the key.
    let offline = JudgeConfig {
        offline: true,
        api_key_env: Some("NOT_SET".to_owned()),
        ..config(&server)
    };
    let replayed = panel(offline, cache.path()).unwrap();
    let second = replayed.get("good").unwrap();
    assert_eq!(ask(second, &texts, in_time()), expected);
    let unknown = ask(second, &["four"], in_time());
    let error = unknown[0].as_ref().unwrap_err();
    assert_eq!(
        error.to_string(),
        "the judge is unavailable: it is offline, and this question is not in the cache"
    );
    assert_eq!(server.requests().len(), 3);
    assert_eq!(
        replayed.take_notes(),
        [format!(
            "plugin `reward` has no answer of judge `good` to 1 of 1 questions: {error}"
        )]
    );

    // Whatever would change an answer is another question.
    let warmer = JudgeConfig {
        temperature: Some(0.5),
        ..config(&server)
    };
    ask(&judge(warmer, cache.path()), &["one"], in_time());
    assert_eq!(server.requests().len(), 4);
}

#[test]
fn a_damaged_answer_is_asked_for_again_and_told_once() {
    let server = Server::start();
    let cache = tempfile::tempdir().unwrap();
    let texts = ["one", "two"];
    ask(&judge(config(&server), cache.path()), &texts, in_time());
    let folders = fs::read_dir(cache.path().join("judge")).unwrap();
    for folder in folders {
        for file in fs::read_dir(folder.unwrap().path()).unwrap() {
            let path = file.unwrap().path();
            let bytes = fs::read(&path).unwrap();
            assert!(!String::from_utf8_lossy(&bytes).contains(KEY));
            fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
        }
    }
    let panel = panel(config(&server), cache.path()).unwrap();
    let judge = panel.get("good").unwrap();
    let expected: Vec<_> = texts.into_iter().map(reply).collect();
    assert_eq!(ask(judge, &texts, in_time()), expected);
    assert_eq!(server.requests().len(), 4);
    let notes = panel.take_notes();
    assert_eq!(notes.len(), 1, "{notes:?}");
    assert!(notes[0].starts_with("judge `good`: a cached answer is not used: "));
    assert_eq!(ask(judge, &texts, in_time()), expected);
    assert_eq!(server.requests().len(), 4, "they were kept again");
}

#[test]
fn a_cache_that_cannot_be_written_costs_a_note() {
    let server = Server::start();
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("judge"), "a file").unwrap();
    let panel = panel(config(&server), folder.path()).unwrap();
    let judge = panel.get("good").unwrap();
    assert_eq!(ask(judge, &["one"], in_time()), [reply("one")]);
    let notes = panel.take_notes();
    assert_eq!(notes.len(), 2, "{notes:?}");
    assert!(
        notes[1].starts_with("judge `good`: answers cannot be kept: "),
        "{notes:?}"
    );
}

#[test]
fn what_may_go_better_is_tried_again() {
    let faults = [
        Fault::Status(429, "Retry-After: 0\r\n", ""),
        Fault::Status(500, "", "{}"),
        Fault::Status(503, "Retry-After-Ms: 1\r\n", "<html>"),
        Fault::Status(408, "", ""),
        Fault::Reset,
        Fault::CutAfter(20),
        Fault::Says("{\"choices\": []}"),
        Fault::Says("not JSON"),
    ];
    let cache = tempfile::tempdir().unwrap();
    for fault in &faults {
        let server = Server::start();
        server.fail_next(&[fault.clone(), fault.clone()]);
        let judge = judge(config(&server), cache.path());
        assert_eq!(ask(&judge, &["one"], in_time()), [reply("one")]);
        let usage = judge.usage();
        assert_eq!((usage.requests, usage.retries, usage.failures), (3, 2, 0));
        // Nothing is paid for what brought no answer.
        assert_eq!(usage.prompt_tokens, 10);
    }
}

#[test]
fn what_keeps_failing_ends_with_its_reason() {
    let server = Server::start();
    server.fail_always(Some(Fault::Status(
        503,
        "",
        r#"{"error": {"message": "over\ncapacity"}}"#,
    )));
    let cache = tempfile::tempdir().unwrap();
    let judge = judge(config(&server), cache.path());
    let expected = JudgeError::Unavailable("HTTP 503 over capacity".to_owned());
    assert_eq!(ask(&judge, &["one"], in_time()), [Err(expected)]);
    let usage = judge.usage();
    assert_eq!((usage.requests, usage.retries, usage.failures), (5, 4, 1));
    assert!(!cache.path().join("judge").exists(), "no failure is kept");
}

#[test]
fn refusals_are_asked_once_and_do_not_show_the_key() {
    let cache = tempfile::tempdir().unwrap();
    let cases = [
        (
            Fault::Status(
                401,
                "",
                r#"{"error": {"message": "Wrong key: sk-very-secret\u001b[0m"}}"#,
            ),
            JudgeError::Refused(
                "HTTP 401 Wrong key: …\\u{1b}[0m; it is asked no more in this run".to_owned(),
            ),
        ),
        (
            Fault::Status(400, "", "what?"),
            JudgeError::Refused("HTTP 400 what?".to_owned()),
        ),
        (
            Fault::Says(r#"{"choices": [{"message": {"refusal": "No."}}]}"#),
            JudgeError::Refused("No.".to_owned()),
        ),
        (
            Fault::Status(
                429,
                "",
                r#"{"error": {"message": "no money", "code": "insufficient_quota"}}"#,
            ),
            JudgeError::Exhausted("HTTP 429 no money; it is asked no more in this run".to_owned()),
        ),
    ];
    for (fault, expected) in cases {
        let server = Server::start();
        server.fail_always(Some(fault));
        let judge = judge(config(&server), cache.path());
        assert_eq!(ask(&judge, &["one"], in_time()), [Err(expected)]);
        assert_eq!(server.requests().len(), 1);
    }
}

/// A key that is none and an account without money are found out once.
#[test]
fn an_endpoint_that_would_answer_nobody_is_asked_once() {
    let cache = tempfile::tempdir().unwrap();
    let quota = r#"{"error": {"message": "no money", "type": "insufficient_quota"}}"#;
    for (status, body, is_refusal, why) in [
        (401, "who?", true, "HTTP 401 who?"),
        (402, "pay", false, "HTTP 402 pay"),
        (403, "no", true, "HTTP 403 no"),
        (429, quota, false, "HTTP 429 no money"),
    ] {
        let server = Server::start();
        server.fail_next(&[Fault::Status(status, "", body)]);
        let one = JudgeConfig {
            concurrency: 1,
            ..config(&server)
        };
        let panel = panel(one, cache.path()).unwrap();
        let judge = panel.get("good").unwrap();
        let why = format!("{why}; it is asked no more in this run");
        let expected = match is_refusal {
            true => JudgeError::Refused(why),
            false => JudgeError::Exhausted(why),
        };
        let texts = [
            format!("{status} a"),
            format!("{status} b"),
            format!("{status} c"),
        ];
        let told = ask(judge, &texts, in_time());
        assert_eq!(told, vec![Err(expected.clone()); 3]);
        // The next batch too, though the endpoint would answer by now.
        assert_eq!(ask(judge, &texts[..1], in_time()), [Err(expected.clone())]);
        let vector = judge.embed("reward", &["text".to_owned()], in_time());
        assert_eq!(vector, [Err(expected)]);
        assert_eq!(server.requests().len(), 1, "{status}");
        let usage = judge.usage();
        assert_eq!((usage.requests, usage.failures), (1, 5));
        let notes = panel.take_notes();
        assert_eq!(notes.len(), 1, "{notes:?}");
        assert!(notes[0].ends_with("it is asked no more in this run"));
    }
}

/// By then the key is known, so 403 is about the question.
#[test]
fn a_question_that_is_forbidden_costs_itself_only() {
    let server = Server::start();
    let cache = tempfile::tempdir().unwrap();
    let judge = judge(config(&server), cache.path());
    assert_eq!(ask(&judge, &["one"], in_time()), [reply("one")]);
    server.fail_next(&[Fault::Status(403, "", "flagged")]);
    let flagged = JudgeError::Refused("HTTP 403 flagged".to_owned());
    assert_eq!(ask(&judge, &["two"], in_time()), [Err(flagged)]);
    assert_eq!(ask(&judge, &["two"], in_time()), [reply("two")]);
    assert_eq!(server.requests().len(), 3);
}

/// What an endpoint counts wrongly costs what the question might have, and not its answer.
#[test]
fn an_absurd_account_of_tokens_costs_no_answer() {
    let server = Server::start();
    let cache = tempfile::tempdir().unwrap();
    server.fail_next(&[Fault::Says(
        r#"{"choices": [{"message": {"content": "9"}}], "usage": {"prompt_tokens": -5, "completion_tokens": 1e300}}"#,
    )]);
    let judge = judge(config(&server), cache.path());
    let answers = ask(&judge, &["one"], in_time());
    assert_eq!(answers[0].as_ref().map(|a| a.text.as_str()), Ok("9"));
    let usage = judge.usage();
    // 3 bytes are a token, a message 8 more, and the answer may have 8.
    assert_eq!(
        (
            usage.requests,
            usage.prompt_tokens + usage.completion_tokens
        ),
        (1, 17)
    );
}

#[test]
fn redirects_are_not_followed() {
    let (server, elsewhere) = (Server::start(), Server::start());
    let location = format!("Location: {}/chat/completions\r\n", elsewhere.url());
    server.fail_always(Some(Fault::Status(307, location.leak(), "")));
    let cache = tempfile::tempdir().unwrap();
    let answers = ask(&judge(config(&server), cache.path()), &["one"], in_time());
    let expected = "HTTP 307: redirects are not followed".to_owned();
    assert_eq!(answers, [Err(JudgeError::Unavailable(expected))]);
    assert_eq!(
        (server.requests().len(), elsewhere.requests().len()),
        (1, 0)
    );
}

#[test]
fn an_answer_without_an_end_is_hung_up_on() {
    let server = Server::start();
    server.fail_always(Some(Fault::Endless));
    let cache = tempfile::tempdir().unwrap();
    let small = JudgeConfig {
        max_response_kib: 16,
        ..config(&server)
    };
    let answers = ask(&judge(small, cache.path()), &["one"], in_time());
    let expected = "its answer is larger than 16384 bytes".to_owned();
    assert_eq!(answers, [Err(JudgeError::Unavailable(expected))]);
    server.wait_for_hang_ups(1);
}

#[test]
fn bad_set_ups_are_found_before_anything_is_asked() {
    let server = Server::start();
    let cache = tempfile::tempdir().unwrap();
    let without_key = JudgeConfig {
        api_key_env: Some("NOT_SET".to_owned()),
        ..config(&server)
    };
    let Err(error) = panel(without_key, cache.path()) else {
        panic!("there is no key");
    };
    assert_eq!(
        grpo_host::error::render(&error),
        "error: judge `good`: the environment variable NOT_SET is not set\n\
         hint: export NOT_SET, or take api_key_env out of judge `good` if its endpoint wants no key"
    );
    let no_cache = Surroundings {
        variable: &|_| Some("two\nlines".to_owned()),
        cache: None,
        load: &mut |_| panic!("no model is named"),
    };
    let judges = JudgesConfig {
        judges: [("good".to_owned(), config(&server))].into(),
    };
    let Err(error) = Panel::open(&judges, no_cache) else {
        panic!("no header carries that key");
    };
    let text = grpo_host::error::render(&error);
    assert!(text.contains("an HTTP header cannot carry"), "{text}");
    assert!(!text.contains("lines"), "{text}");
    assert_eq!(server.requests().len(), 0);
}
