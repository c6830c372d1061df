//! Vectors of texts.

use grpo_host::{config::JudgeConfig, judge::JudgeError};

use super::{
    config, in_time, judge,
    server::{Fault, Server},
};

/// Ten letters of which the number is the length.
fn texts(count: usize) -> Vec<String> {
    (1..=count).map(|n| "abc".repeat(n)).collect()
}

#[test]
fn texts_are_embedded_many_at_a_time_and_each_is_kept() {
    let server = Server::start();
    let cache = tempfile::tempdir().unwrap();
    let first = judge(config(&server), cache.path());
    let texts = texts(100);
    let expected = |text: &String| Ok(vec![text.len() as f32, 97.0]);
    let vectors = first.embed("reward", &texts, in_time());
    assert_eq!(vectors, texts.iter().map(expected).collect::<Vec<_>>());
    let requests = server.requests();
    assert_eq!(requests.len(), 2);
    for request in &requests {
        assert_eq!(request.path, "/v1/embeddings");
        assert_eq!(request.body["model"], "e");
    }
    assert_eq!(first.usage().prompt_tokens, 500);
    let mixed = [texts[7].clone(), "new".to_owned(), texts[99].clone()];
    let second = judge(config(&server), cache.path());
    let vectors = second.embed("reward", &mixed, in_time());
    assert_eq!(vectors[0], expected(&texts[7]));
    assert_eq!(vectors[1], Ok(vec![3.0, 110.0]));
    let requests = server.requests();
    assert_eq!(requests.len(), 3);
    assert_eq!(requests[2].body["input"], serde_json::json!(["new"]));
}

#[test]
fn vectors_of_another_length_are_no_answer() {
    let server = Server::start();
    let cache = tempfile::tempdir().unwrap();
    let judge = judge(config(&server), cache.path());
    let known = ["a".to_owned()];
    assert!(judge.embed("reward", &known, in_time())[0].is_ok());
    server.fail_always(Some(Fault::Says(
        r#"{"data": [{"index": 0, "embedding": [1, 2, 3]}]}"#,
    )));
    let mixed = ["a".to_owned(), "b".to_owned()];
    let vectors = judge.embed("reward", &mixed, in_time());
    assert!(vectors[0].is_ok());
    let why = "a vector of 3 numbers among some of 2".to_owned();
    assert_eq!(vectors[1], Err(JudgeError::Unavailable(why)));
}

#[test]
fn without_a_model_for_it_nothing_is_embedded() {
    let server = Server::start();
    let cache = tempfile::tempdir().unwrap();
    let chats = JudgeConfig {
        embedding_model: None,
        ..config(&server)
    };
    let vectors = judge(chats, cache.path()).embed("reward", &texts(2), in_time());
    let why = "judge `good` has no embedding_model".to_owned();
    assert_eq!(vectors, vec![Err(JudgeError::Refused(why)); 2]);
    assert_eq!(server.requests().len(), 0);
}
