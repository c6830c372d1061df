//! A model of ours as judge: the built-in one.

use std::time::Instant;

use grpo_host::{
    config::JudgeConfig,
    judge::{JudgeError, Request},
    types::{Finish, Message},
};

use super::{ask, in_time, judge, panel};

fn own() -> JudgeConfig {
    JudgeConfig {
        model: "self".to_owned(),
        concurrency: 2,
        ..JudgeConfig::default()
    }
}

#[test]
fn a_model_of_ours_answers_greedily_and_its_answers_are_kept() {
    let cache = tempfile::tempdir().unwrap();
    let texts = ["12 + 30 = ?", "7 * 8 = ?", "12 + 30 = ?", "100 - 1 = ?"];
    let opened = panel(own(), cache.path()).unwrap();
    let first = opened.get("good").unwrap();
    let answers = ask(first, &texts, in_time());
    for answer in &answers {
        let answer = answer.as_ref().unwrap();
        assert!(
            answer.completion_tokens >= 1 && answer.prompt_tokens > 5,
            "{answer:?}"
        );
    }
    assert_eq!(answers[0], answers[2]);
    assert_ne!(answers[0], answers[1]);
    let usage = first.usage();
    assert_eq!((usage.asked, usage.cached, usage.requests), (4, 1, 3));
    assert!(
        opened
            .in_this_process()
            .next()
            .unwrap()
            .contains("GiB of weights")
    );

    // Whatever is in the batch and in memory, and from the cache alone.
    let elsewhere = tempfile::tempdir().unwrap();
    let alone = judge(own(), elsewhere.path());
    for (text, answer) in texts.iter().zip(&answers).rev() {
        let again = ask(&alone, &[text], in_time());
        assert_eq!(again, std::slice::from_ref(answer));
    }
    let offline = JudgeConfig {
        offline: true,
        ..own()
    };
    assert_eq!(
        ask(&judge(offline, cache.path()), &texts, in_time()),
        answers
    );
}

#[test]
fn what_does_not_fit_is_refused_and_the_rest_is_answered() {
    let cache = tempfile::tempdir().unwrap();
    let judge = judge(own(), cache.path());
    let long = "1 + ".repeat(5000);
    let answers = ask(&judge, &["1 + 1 = ?", &long], in_time());
    assert!(answers[0].is_ok());
    let refused = answers[1].as_ref().unwrap_err().to_string();
    assert!(
        refused.starts_with("the judge refuses: a question of "),
        "{refused}"
    );
    let (role, content) = ("user".to_owned(), "1 + 1 = ?".to_owned());
    let messages = [Message { role, content }];
    let request = |max_tokens| Request {
        messages: &messages,
        max_tokens,
    };
    let empty = Request {
        messages: &[],
        max_tokens: 1,
    };
    let answers = judge.complete("reward", &[request(0), empty, request(1)], in_time());
    assert!(matches!(answers[0], Err(JudgeError::Refused(_))));
    assert!(matches!(answers[1], Err(JudgeError::Refused(_))));
    let one = answers[2].as_ref().unwrap();
    assert_eq!((one.completion_tokens, one.finish), (1, Finish::Length));
}

#[test]
fn a_deadline_that_is_over_gets_what_is_cached() {
    let cache = tempfile::tempdir().unwrap();
    let judge = judge(own(), cache.path());
    let known = ask(&judge, &["1 + 1 = ?"], in_time());
    let answers = ask(&judge, &["1 + 1 = ?", "2 + 2 = ?"], Instant::now());
    assert_eq!(answers, [known[0].clone(), Err(JudgeError::Timeout)]);
}
