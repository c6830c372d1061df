//! Chat templates against those of transformers (`tests/fixtures/chat`), and what is refused.

use serde_json::{Value as Json, json};

use super::*;

const FOLDER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures/chat");

fn file(name: &str) -> String {
    std::fs::read_to_string(format!("{FOLDER}/{name}")).unwrap()
}

fn special() -> SpecialTokens {
    SpecialTokens {
        bos: Some("<|begin|>".to_owned()),
        eos: Some("<|im_end|>".to_owned()),
        pad: Some("<|endoftext|>".to_owned()),
        unk: None,
    }
}

fn template(source: &str) -> ChatTemplate {
    ChatTemplate::new(source, special()).unwrap()
}

/// Reference: transformers' `apply_chat_template`, see `tests/fixtures/make.py`.
#[test]
fn text_is_that_of_transformers() {
    let cases: Vec<Json> = serde_json::from_str(&file("cases.json")).unwrap();
    let expected: Vec<String> = serde_json::from_str(&file("expected.json")).unwrap();
    assert_eq!(cases.len(), expected.len());
    for (case, expected) in cases.iter().zip(expected) {
        let name = case["template"].as_str().unwrap();
        let options = ChatOptions {
            add_generation_prompt: case["add_generation_prompt"].as_bool().unwrap(),
            // 2026-02-03T00:00:00Z.
            now: Some(1_770_076_800),
            variables: case["variables"].as_object().cloned().unwrap_or_default(),
        };
        let text = template(&file(&format!("{name}.jinja")))
            .render(case["messages"].as_array().unwrap(), &options)
            .unwrap();
        assert_eq!(text, expected.replace("@TODAY@", "03 Feb 2026"), "{name}");
    }
}

#[test]
fn without_a_clock_the_template_uses_its_own_date() {
    let text = template(&file("headers.jinja"))
        .render(
            &[json!({ "role": "user", "content": "hi" })],
            &ChatOptions::default(),
        )
        .unwrap();
    assert!(text.contains("Today: 26 Jul 2024"), "{text}");
}

#[test]
fn a_raised_exception_is_the_error() {
    let error = template(&file("headers.jinja"))
        .render(
            &[json!({ "role": "judge", "content": "hi" })],
            &ChatOptions::default(),
        )
        .unwrap_err();
    assert!(error.to_string().contains("Unknown role: judge"), "{error}");
}

#[test]
fn a_broken_template_says_where() {
    let error = ChatTemplate::new("a\n{% if %}", special()).unwrap_err();
    assert!(error.to_string().contains("chat_template:2"), "{error}");
}

#[test]
fn a_bad_date_format_is_an_error_not_a_panic() {
    let options = ChatOptions {
        now: Some(0),
        ..ChatOptions::default()
    };
    let none: [Json; 0] = [];
    let render = |source| template(source).render(&none, &options);
    assert_eq!(
        render("{{ strftime_now('%Y-%m-%d %H:%M') }}").unwrap(),
        "1970-01-01 00:00"
    );
    let error = render("{{ strftime_now('%!') }}").unwrap_err();
    assert!(error.to_string().contains("strftime_now(`%!`)"), "{error}");
}

#[test]
fn line_ends_of_the_template_become_newlines() {
    let messages = [json!({ "role": "user", "content": "x\r\ny" })];
    let text = template("{% if true %}\r\na\r\n{% endif %}\r\n{{ messages[0].content }}")
        .render(&messages, &ChatOptions::default())
        .unwrap();
    assert_eq!(text, "a\nx\r\ny");
}
