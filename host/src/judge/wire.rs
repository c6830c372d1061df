//! The JSON of OpenAI's chat completions and embeddings, as far as a judge needs it: what is sent, and what of an
//! answer is believed.

use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::{Reply, Request};
use crate::{config::JudgeConfig, types::Finish};

/// Where in an endpoint's tree questions go.
pub(super) const CHAT: &str = "/chat/completions";
pub(super) const EMBEDDINGS: &str = "/embeddings";

/// Tokens of a message besides its content: role and separators.
const MESSAGE_TOKENS: u64 = 8;
/// Tokens that an endpoint may say one request had: more than any model's context.
const MOST_TOKENS: u32 = 1 << 24;

/// An answer with what it cost, where the endpoint says so.
#[derive(Debug)]
pub(super) struct Answer<T> {
    pub(super) value: T,
    pub(super) prompt_tokens: Option<u32>,
    pub(super) completion_tokens: Option<u32>,
}

/// Reads an answer that is to have so many values.
pub(super) type Read<T> = fn(&[u8], usize) -> Result<Answer<Vec<T>>, Wrong>;

/// An answer that is none.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Wrong {
    /// Not what the API promises.
    Nonsense(String),
    /// The model will not answer this.
    Refused(String),
}

/// Body of a chat request. Fields stand in a fixed order, so that equal questions are equal texts.
pub(super) fn chat(config: &JudgeConfig, request: &Request<'_>) -> String {
    let mut body = Map::new();
    body.insert("model".to_owned(), json!(config.model));
    body.insert("messages".to_owned(), json!(request.messages));
    if let Some(temperature) = config.temperature {
        body.insert("temperature".to_owned(), json!(temperature));
    }
    let limit = config.max_tokens_field.name().to_owned();
    body.insert(limit, json!(request.max_tokens));
    body.extend(config.extra.clone());
    Value::Object(body).to_string()
}

/// Body of a request for the vectors of some texts.
pub(super) fn embeddings(model: &str, texts: &[&str]) -> String {
    json!({ "model": model, "input": texts, "encoding_format": "float" }).to_string()
}

/// Tokens that `texts` may have, generously: of an endpoint's tokenizer nothing is known, and most tokens of most
/// languages have more than three bytes.
pub(super) fn estimate<'t>(texts: impl IntoIterator<Item = &'t str>) -> u64 {
    let tokens = |text: &str| text.len().div_ceil(3) as u64 + MESSAGE_TOKENS;
    texts.into_iter().map(tokens).sum()
}

/// Reads a chat completion.
///
/// # Errors
/// What is missing, or the model's refusal.
pub(super) fn read_reply(body: &[u8]) -> Result<Answer<Vec<Reply>>, Wrong> {
    #[derive(Deserialize)]
    struct Chat {
        choices: Vec<Choice>,
        #[serde(default)]
        usage: Value,
    }
    #[derive(Deserialize)]
    struct Choice {
        message: Said,
        finish_reason: Option<String>,
    }
    #[derive(Deserialize)]
    struct Said {
        content: Option<String>,
        refusal: Option<String>,
    }
    let chat: Chat = parse(body)?;
    let Some(choice) = chat.choices.into_iter().next() else {
        return Err(Wrong::Nonsense("no choices".to_owned()));
    };
    let ended = choice.finish_reason.as_deref();
    let text = match (choice.message.content, choice.message.refusal) {
        (_, Some(why)) if !why.is_empty() => return Err(Wrong::Refused(why)),
        (Some(text), _) => text,
        (None, _) if ended == Some("content_filter") => {
            return Err(Wrong::Refused("the endpoint's content filter".to_owned()));
        }
        // A reasoning model may spend all its tokens before it says anything.
        (None, _) if ended == Some("length") => String::new(),
        (None, _) => return Err(Wrong::Nonsense("a message without content".to_owned())),
    };
    let finish = match ended {
        None | Some("stop" | "eos" | "eos_token" | "stop_sequence") => Finish::Stop,
        Some("length") => Finish::Length,
        Some(_) => Finish::Abort,
    };
    let [prompt, completion] = counts(&chat.usage);
    Ok(Answer {
        value: vec![Reply {
            text,
            finish,
            prompt_tokens: prompt.unwrap_or(0),
            completion_tokens: completion.unwrap_or(0),
        }],
        prompt_tokens: prompt,
        completion_tokens: completion,
    })
}

/// Reads the vectors of as many texts as were sent, in their order.
///
/// # Errors
/// Missing, additional, empty or unequal vectors, numbers that f32 cannot hold.
pub(super) fn read_embeddings(body: &[u8], texts: usize) -> Result<Answer<Vec<Vec<f32>>>, Wrong> {
    #[derive(Deserialize)]
    struct Embeddings {
        data: Vec<Item>,
        #[serde(default)]
        usage: Value,
    }
    #[derive(Deserialize)]
    struct Item {
        index: usize,
        embedding: Vec<f32>,
    }
    let mut answer: Embeddings = parse(body)?;
    answer.data.sort_by_key(|item| item.index);
    let indices = answer.data.iter().map(|item| item.index);
    if !indices.eq(0..texts) {
        let found = answer.data.len();
        let why = format!("{found} vectors for {texts} texts, or not numbered from 0");
        return Err(Wrong::Nonsense(why));
    }
    let vectors: Vec<Vec<f32>> = answer.data.into_iter().map(|i| i.embedding).collect();
    let length = vectors.first().map_or(0, Vec::len);
    if length == 0 || vectors.iter().any(|v| v.len() != length) {
        let why = "vectors that are empty or differ in length".to_owned();
        return Err(Wrong::Nonsense(why));
    }
    let [prompt_tokens, _] = counts(&answer.usage);
    Ok(Answer {
        value: vectors,
        prompt_tokens,
        completion_tokens: Some(0),
    })
}

/// Tokens asked and answered. What cannot be a count is not given: an answer is worth no less for it.
fn counts(usage: &Value) -> [Option<u32>; 2] {
    ["prompt_tokens", "completion_tokens"].map(|key| {
        let count = usage.get(key).and_then(Value::as_u64);
        let count = count.and_then(|count| u32::try_from(count).ok());
        count.filter(|count| *count <= MOST_TOKENS)
    })
}

fn parse<'a, T: Deserialize<'a>>(body: &'a [u8]) -> Result<T, Wrong> {
    serde_json::from_slice(body).map_err(|error| Wrong::Nonsense(error.to_string()))
}

/// What an endpoint says is wrong, or the beginning of whatever it sent; and whether that is an account without money, in
/// OpenAI's words.
pub(super) fn complaint(body: &[u8]) -> (String, bool) {
    #[derive(Deserialize)]
    struct Complaint {
        error: Detail,
    }
    #[derive(Deserialize)]
    struct Detail {
        message: Option<String>,
        code: Option<Value>,
        r#type: Option<Value>,
    }
    match serde_json::from_slice::<Complaint>(body) {
        Ok(Complaint { error }) => {
            let words = [error.code, error.r#type];
            let no_money = words
                .iter()
                .flatten()
                .any(|word| word == "insufficient_quota");
            (error.message.unwrap_or_default(), no_money)
        }
        Err(_) => (String::from_utf8_lossy(body).into_owned(), false),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::Message;

    fn nonsense<T: std::fmt::Debug>(read: Result<Answer<T>, Wrong>) -> String {
        match read.unwrap_err() {
            Wrong::Nonsense(why) => why,
            Wrong::Refused(why) => panic!("refused: {why}"),
        }
    }

    #[test]
    fn a_chat_request_has_its_fields_in_one_order() {
        let config = JudgeConfig {
            model: "m".to_owned(),
            extra: Map::from_iter([("seed".to_owned(), json!(7))]),
            ..JudgeConfig::default()
        };
        let (role, content) = ("user".to_owned(), "How good?".to_owned());
        let messages = [Message { role, content }];
        let max_tokens = 16;
        let request = Request {
            messages: &messages,
            max_tokens,
        };
        assert_eq!(
            chat(&config, &request),
            r#"{"model":"m","messages":[{"role":"user","content":"How good?"}],"temperature":0.0,"max_tokens":16,"seed":7}"#
        );
        let config = JudgeConfig {
            temperature: None,
            max_tokens_field: crate::config::MaxTokensField::MaxCompletionTokens,
            ..JudgeConfig::default()
        };
        let body = chat(&config, &request);
        assert!(body.contains(r#""max_completion_tokens":16"#), "{body}");
        assert!(!body.contains("temperature"), "{body}");
    }

    #[test]
    fn replies_are_read_with_end_and_cost() {
        let body = br#"{"choices":[{"message":{"content":"7"},"finish_reason":"length","x":1}],
            "usage":{"prompt_tokens":12,"completion_tokens":3}}"#;
        let answer = read_reply(body).unwrap();
        let expected = Reply {
            text: "7".to_owned(),
            finish: Finish::Length,
            prompt_tokens: 12,
            completion_tokens: 3,
        };
        assert_eq!(answer.value, [expected]);
        let silent = br#"{"choices":[{"message":{"content":""}}]}"#;
        let answer = read_reply(silent).unwrap();
        assert_eq!(
            (answer.prompt_tokens, answer.value[0].finish),
            (None, Finish::Stop)
        );
    }

    #[test]
    fn counts_that_cannot_be_are_not_given() {
        for usage in [
            "null",
            "7",
            r#"{"prompt_tokens":-5,"completion_tokens":1e30}"#,
            r#"{"prompt_tokens":4294967296,"completion_tokens":16777217}"#,
            r#"{"prompt_tokens":1.5,"completion_tokens":"many"}"#,
        ] {
            let body =
                format!(r#"{{"choices":[{{"message":{{"content":"7"}}}}],"usage":{usage}}}"#);
            let answer = read_reply(body.as_bytes()).unwrap();
            assert_eq!(answer.value[0].text, "7");
            let given = (answer.prompt_tokens, answer.completion_tokens);
            assert_eq!(given, (None, None), "{usage}");
        }
        let one = r#"{"data":[{"index":0,"embedding":[1]}],"usage":{"prompt_tokens":-5}}"#;
        let answer = read_embeddings(one.as_bytes(), 1).unwrap();
        assert_eq!(
            (answer.value, answer.prompt_tokens),
            (vec![vec![1.0]], None)
        );
    }

    #[test]
    fn an_account_without_money_is_known_by_code_or_type() {
        for (error, no_money) in [
            (r#"{"message":"m","code":"insufficient_quota"}"#, true),
            (
                r#"{"message":"m","type":"insufficient_quota","code":null}"#,
                true,
            ),
            (r#"{"message":"m","type":"rate_limit","code":429}"#, false),
        ] {
            let body = format!(r#"{{"error":{error}}}"#);
            assert_eq!(
                complaint(body.as_bytes()),
                ("m".to_owned(), no_money),
                "{error}"
            );
        }
        assert!(!complaint(b"insufficient_quota").1);
    }

    #[test]
    fn what_is_no_reply_is_not_made_one() {
        let empty = nonsense(read_reply(br#"{"choices":[]}"#));
        assert_eq!(empty, "no choices");
        let null = br#"{"choices":[{"message":{"content":null},"finish_reason":"stop"}]}"#;
        assert_eq!(nonsense(read_reply(null)), "a message without content");
        assert!(nonsense(read_reply(b"<html>")).contains("expected value"));
        let refusal = br#"{"choices":[{"message":{"content":null,"refusal":"I will not"}}]}"#;
        let refused = read_reply(refusal).unwrap_err();
        assert_eq!(refused, Wrong::Refused("I will not".to_owned()));
    }

    #[test]
    fn vectors_come_in_the_order_of_their_texts_or_not_at_all() {
        let body = br#"{"data":[{"index":1,"embedding":[3,4]},{"index":0,"embedding":[1,2]}]}"#;
        let answer = read_embeddings(body, 2).unwrap();
        assert_eq!(answer.value, [[1.0, 2.0], [3.0, 4.0]]);
        assert!(nonsense(read_embeddings(body, 3)).starts_with("2 vectors for 3 texts"));
        for (items, part) in [
            (
                r#"{"index":0,"embedding":[1]},{"index":1,"embedding":[1,2]}"#,
                "differ in length",
            ),
            (
                r#"{"index":0,"embedding":[]},{"index":1,"embedding":[]}"#,
                "empty",
            ),
            (
                r#"{"index":0,"embedding":[1e39]},{"index":1,"embedding":[1]}"#,
                "out of range",
            ),
        ] {
            let body = format!(r#"{{"data":[{items}]}}"#);
            let why = nonsense(read_embeddings(body.as_bytes(), 2));
            assert!(why.contains(part), "{why}");
        }
    }
}
