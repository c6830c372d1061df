//! Time, pace and budget: what a judge costs at most, whatever its endpoint does.

use std::{
    net::TcpListener,
    time::{Duration, Instant},
};

use grpo_host::{config::JudgeConfig, judge::JudgeError};

use super::{
    ask, config, in_time, judge, reply,
    server::{Fault, Server},
};

/// More than a slow machine takes for what takes no time.
const SOON: Duration = Duration::from_secs(30);

fn texts(count: usize) -> Vec<String> {
    (0..count).map(|i| format!("question {i}")).collect()
}

#[test]
fn so_many_requests_are_in_flight_and_no_more() {
    let server = Server::start();
    server.gather(3);
    let cache = tempfile::tempdir().unwrap();
    let three = JudgeConfig {
        concurrency: 3,
        ..config(&server)
    };
    let texts = texts(12);
    let answers = ask(&judge(three, cache.path()), &texts, in_time());
    let expected: Vec<_> = texts.iter().map(|text| reply(text)).collect();
    assert_eq!(answers, expected);
    assert_eq!(server.most_in_flight(), 3);
}

#[test]
fn an_attempt_that_hangs_is_given_up_and_tried_again() {
    let server = Server::start();
    server.fail_next(&[Fault::Hang]);
    let cache = tempfile::tempdir().unwrap();
    let hasty = JudgeConfig {
        timeout_ms: 500,
        max_retries: 20,
        ..config(&server)
    };
    let judge = judge(hasty, cache.path());
    assert_eq!(ask(&judge, &["one"], in_time()), [reply("one")]);
    assert!(judge.usage().retries >= 1);
    server.wait_for_hang_ups(1);
}

#[test]
fn a_batch_ends_at_its_deadline_with_what_has_come() {
    let server = Server::start();
    let cache = tempfile::tempdir().unwrap();
    let patient = JudgeConfig {
        timeout_ms: 3_600_000,
        ..config(&server)
    };
    let judge = judge(patient, cache.path());
    assert_eq!(ask(&judge, &["one"], in_time()), [reply("one")]);
    server.fail_always(Some(Fault::Hang));
    let begun = Instant::now();
    let answers = ask(&judge, &["one", "two"], begun + Duration::from_millis(200));
    assert_eq!(answers, [reply("one"), Err(JudgeError::Timeout)]);
    assert!(begun.elapsed() < SOON);
    server.wait_for_hang_ups(1);
}

#[test]
fn nobody_waits_for_what_cannot_come_in_time() {
    let server = Server::start();
    let cache = tempfile::tempdir().unwrap();
    let busy = "HTTP 429 busy".to_owned();
    server.fail_next(&[Fault::Status(429, "Retry-After: 3600\r\n", "busy")]);
    let judge = judge(config(&server), cache.path());
    let begun = Instant::now();
    let answers = ask(&judge, &["one"], begun + 10 * SOON);
    assert_eq!(answers, [Err(JudgeError::Unavailable(busy))]);
    // It has asked to be left alone, which holds for all questions.
    let answers = ask(&judge, &["two"], begun + 10 * SOON);
    assert_eq!(answers, [Err(JudgeError::Timeout)]);
    assert!(begun.elapsed() < SOON);
    assert_eq!(server.requests().len(), 1);
}

#[test]
fn a_minute_has_so_many_requests() {
    let server = Server::start();
    let cache = tempfile::tempdir().unwrap();
    let slow = JudgeConfig {
        requests_per_minute: Some(2),
        ..config(&server)
    };
    let begun = Instant::now();
    let answers = ask(&judge(slow, cache.path()), &texts(5), begun + SOON);
    let answered = answers.iter().filter(|answer| answer.is_ok()).count();
    let late = answers
        .iter()
        .filter(|a| **a == Err(JudgeError::Timeout))
        .count();
    assert_eq!((answered, late), (2, 3));
    assert!(begun.elapsed() < SOON);
    assert_eq!(server.requests().len(), 2);
}

#[test]
fn a_budget_ends_questions_and_not_cached_answers() {
    let server = Server::start();
    let cache = tempfile::tempdir().unwrap();
    let poor = JudgeConfig {
        max_requests: Some(2),
        concurrency: 1,
        prompt_price: 1.0,
        completion_price: 10.0,
        ..config(&server)
    };
    let judge = judge(poor, cache.path());
    // More than what an endpoint may fail in a row before it is left alone: this is no failure of its.
    let texts = texts(40);
    let answers = ask(&judge, &texts, in_time());
    let spent = "all 2 requests of max_requests are made".to_owned();
    let spent = Err(JudgeError::Exhausted(spent));
    assert_eq!(answers.iter().filter(|a| a.is_ok()).count(), 2);
    assert_eq!(answers.iter().filter(|a| **a == spent).count(), 38);
    let again = ask(&judge, &texts, in_time());
    assert_eq!(again, answers);
    let usage = judge.usage();
    assert_eq!((usage.asked, usage.cached, usage.failures), (80, 2, 76));
    // Two answers of 10 and 2 tokens.
    assert!((usage.cost - 60e-6).abs() < 1e-12, "{}", usage.cost);
    assert_eq!(server.requests().len(), 2);
}

#[test]
fn a_dead_endpoint_is_left_alone_after_a_while() {
    // A port that nobody listens on.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    drop(listener);
    let cache = tempfile::tempdir().unwrap();
    let server = Server::start();
    let dead = JudgeConfig {
        endpoint: Some(format!("http://127.0.0.1:{port}")),
        max_retries: 1,
        concurrency: 1,
        ..config(&server)
    };
    let judge = judge(dead, cache.path());
    let answers = ask(&judge, &texts(40), in_time());
    let unavailable = |answer: &Result<_, JudgeError>| match answer {
        Err(JudgeError::Unavailable(why)) => why.clone(),
        other => panic!("{other:?}"),
    };
    let reasons: Vec<String> = answers.iter().map(unavailable).collect();
    let rests =
        |why: &&String| why.starts_with("left alone after 16 failures in a row, the last: ");
    assert_eq!(reasons.iter().filter(rests).count(), 24);
    let tried = |why: &&String| why.starts_with("error sending request");
    assert_eq!(reasons.iter().filter(tried).count(), 16, "{reasons:?}");
    // All have had their first attempt before one had its last.
    assert_eq!(judge.usage().requests, 56);
    let more = ask(&judge, &["one", "two"], in_time());
    assert!(more.iter().map(unavailable).all(|why| rests(&&why)));
    assert_eq!(judge.usage().requests, 56);
}

#[test]
fn one_that_dies_in_the_middle_costs_what_was_not_answered() {
    let server = Server::start();
    let cache = tempfile::tempdir().unwrap();
    let no_retries = JudgeConfig {
        max_retries: 0,
        concurrency: 1,
        ..config(&server)
    };
    let judge = judge(no_retries, cache.path());
    let texts = texts(3);
    assert!(ask(&judge, &texts, in_time()).iter().all(Result::is_ok));
    server.fail_always(Some(Fault::Reset));
    let more = [texts[1].as_str(), "new", texts[2].as_str()];
    let answers = ask(&judge, &more, in_time());
    assert!(answers[0].is_ok() && answers[2].is_ok());
    assert!(matches!(answers[1], Err(JudgeError::Unavailable(_))));
    server.fail_always(None);
    assert_eq!(ask(&judge, &["new"], in_time()), [reply("new")]);
}
