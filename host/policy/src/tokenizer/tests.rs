//! Tokenizers, detokenising token by token, and what is refused.

use serde_json::json;

use super::*;

fn fixture() -> Tokenizer {
    let json = include_bytes!("../../../../tests/fixtures/llama/tokenizer.json");
    let config = include_bytes!("../../../../tests/fixtures/llama/tokenizer_config.json");
    let generation = include_bytes!("../../../../tests/fixtures/llama/generation_config.json");
    Tokenizer::from_files(&TokenizerFiles {
        tokenizer: json,
        tokenizer_config: Some(config),
        generation_config: Some(generation),
        ..TokenizerFiles::default()
    })
    .unwrap()
}

#[test]
fn ids_are_those_of_transformers() {
    let expected: Value = serde_json::from_slice(include_bytes!(
        "../../../../tests/fixtures/llama/expected.json"
    ))
    .unwrap();
    let ids: Vec<u32> = serde_json::from_value(expected["text_ids"].clone()).unwrap();
    let text = expected["text"].as_str().unwrap();
    let tokenizer = fixture();
    assert_eq!(tokenizer.encode(text, true).unwrap(), ids);
    assert_eq!(tokenizer.encode_prompt(text).unwrap(), ids);
    assert_eq!(tokenizer.encode(text, false).unwrap(), ids[1..]);
    assert_eq!(tokenizer.decode(&ids).unwrap(), text);
    assert_eq!(
        tokenizer.decode_with_special(&ids).unwrap(),
        format!("<|begin|>{text}")
    );
}

#[test]
fn a_prompt_gets_one_beginning_of_text() {
    let tokenizer = fixture();
    assert_eq!(tokenizer.bos_id(), Some(1));
    let written = tokenizer.encode_prompt("<|begin|>7").unwrap();
    assert_eq!(written, tokenizer.encode_prompt("7").unwrap());
    assert_eq!(written.iter().filter(|id| **id == 1).count(), 1);
}

#[test]
fn end_of_text_ids_are_collected_once_in_order() {
    // generation_config says 3 and 0, tokenizer_config names 3.
    assert_eq!(fixture().eos_ids(), [3, 0]);
    let json = fixture().to_json().unwrap();
    let only_config = Tokenizer::from_files(&TokenizerFiles {
        tokenizer: json.as_bytes(),
        tokenizer_config: Some(br#"{"eos_token": {"content": "<|im_end|>"}}"#),
        config: Some(br#"{"eos_token_id": 0}"#),
        ..TokenizerFiles::default()
    })
    .unwrap();
    assert_eq!(only_config.eos_ids(), [0, 3]);
    assert_eq!(only_config.pad_id(), Some(0));
}

#[test]
fn the_default_of_several_templates_counts_and_the_file_wins() {
    let json = fixture().to_json().unwrap();
    let config = json!({ "chat_template": [
        { "name": "tool_use", "template": "T" }, { "name": "default", "template": "D" },
    ]})
    .to_string();
    let mut files = TokenizerFiles {
        tokenizer: json.as_bytes(),
        tokenizer_config: Some(config.as_bytes()),
        ..TokenizerFiles::default()
    };
    let source = |files: &TokenizerFiles<'_>| {
        Tokenizer::from_files(files)
            .unwrap()
            .chat_template_source()
            .map(str::to_owned)
    };
    assert_eq!(source(&files).as_deref(), Some("D"));
    files.chat_template = Some("F");
    assert_eq!(source(&files).as_deref(), Some("F"));
    let error = fixture().chat_template().unwrap_err();
    assert_eq!(error.to_string(), "chat template: the model has none");
    assert!(error.hint().is_some());
}

#[test]
fn wrong_files_are_named() {
    let error = Tokenizer::from_json_bytes(b"{}", &[]).unwrap_err();
    assert!(
        error.to_string().starts_with("tokenizer: tokenizer.json: "),
        "{error}"
    );
    let json = fixture().to_json().unwrap();
    let unknown = Tokenizer::from_files(&TokenizerFiles {
        tokenizer: json.as_bytes(),
        tokenizer_config: Some(br#"{"eos_token": "</s>"}"#),
        ..TokenizerFiles::default()
    });
    assert_eq!(
        unknown.unwrap_err().to_string(),
        "tokenizer: eos_token `</s>` is not in the vocabulary"
    );
}

/// Pieces of the detokenizer for `ids`, the last one from `finish`.
fn pieces(tokenizer: &Tokenizer, ids: &[u32]) -> Vec<String> {
    let mut detokenizer = Detokenizer::default();
    let mut pieces: Vec<String> = ids
        .iter()
        .map(|id| detokenizer.push(tokenizer, *id).unwrap())
        .collect();
    pieces.push(detokenizer.finish(tokenizer).unwrap());
    pieces
}

#[test]
fn pieces_add_up_and_never_split_a_character() {
    let tokenizer = fixture();
    let text = "a 日本 🦀 the answer\n\u{fffd}!";
    let ids = tokenizer.encode(text, false).unwrap();
    let pieces = pieces(&tokenizer, &ids);
    assert_eq!(pieces.concat(), text);
    assert!(pieces.iter().any(|p| p.contains('🦀')));
    assert!(pieces.iter().filter(|p| p.is_empty()).count() > 4);
}

#[test]
fn unfinished_and_invalid_bytes_come_out_as_decode_gives_them() {
    let tokenizer = fixture();
    let crab = tokenizer.encode("🦀", false).unwrap();
    assert_eq!(pieces(&tokenizer, &crab[..2]).concat(), "\u{fffd}");
    // Every pair of tokens, valid UTF-8 or not, and a special one between.
    for a in 0..272 {
        let ids = [a, crab[0], a, 3, crab[1], 68, a];
        assert_eq!(
            pieces(&tokenizer, &ids).concat(),
            tokenizer.decode(&ids).unwrap(),
            "{ids:?}"
        );
    }
}
