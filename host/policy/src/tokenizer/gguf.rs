//! A tokenizer from GGUF metadata, by writing the `tokenizer.json` that says the same. Only byte-level BPE
//! (`tokenizer.ggml.model = "gpt2"`), which is what Qwen, Llama 3 and SmolLM use.
//!
//! candle's own `TokenizerFromGguf` falls back to GPT-2 splitting with a leading space for names it does not
//! know, `smollm` and `llama-bpe` among them: wrong ids without an error. Here an unknown name is an error.

use serde_json::{Value, json};

use super::{Tokenizer, TokenizerFiles};
use crate::{
    error::{Feature, PolicyError},
    gguf::Gguf,
};

/// `tokenizer.ggml.token_type` values that are matched in text before BPE.
const CONTROL: usize = 3;
const USER_DEFINED: usize = 4;

impl Tokenizer {
    /// Errors: [`PolicyError::Unsupported`] for other tokenizer models and unknown pre-tokenizers,
    /// [`PolicyError::Malformed`] and [`PolicyError::Tokenizer`] for metadata that does not hold together.
    pub(crate) fn from_gguf(file: &Gguf) -> Result<Self, PolicyError> {
        let model = file.text("tokenizer.ggml.model")?.unwrap_or("none");
        if model != "gpt2" {
            return Err(PolicyError::Unsupported {
                feature: Feature::GgufTokenizer,
                found: model.to_owned(),
            });
        }
        let tokens = file.texts("tokenizer.ggml.tokens")?;
        let named = |key: &str| -> Result<Option<(u32, &str)>, PolicyError> {
            let Some(id) = file.integer(key)? else {
                return Ok(None);
            };
            let token = tokens
                .get(id)
                .ok_or_else(|| file.malformed(format!("`{key}` {id} is outside the vocabulary")))?;
            // Ids are positions in `tokens`, far fewer than 2^32.
            Ok(Some((id as u32, token)))
        };
        let bos = named("tokenizer.ggml.bos_token_id")?;
        let eos = named("tokenizer.ggml.eos_token_id")?;
        let pad = named("tokenizer.ggml.padding_token_id")?;
        let unk = named("tokenizer.ggml.unknown_token_id")?;
        let eot = named("tokenizer.ggml.eot_token_id")?;
        let json = tokenizer_json(file, &tokens, bos)?;
        let name = |token: Option<(u32, &str)>| token.map(|(_, text)| text.to_owned());
        let config = json!({
            "bos_token": name(bos), "eos_token": name(eos), "pad_token": name(pad), "unk_token": name(unk),
        });
        let eos_ids: Vec<u32> = [eos, eot].iter().flatten().map(|(id, _)| *id).collect();
        Self::from_files(&TokenizerFiles {
            tokenizer: json.to_string().as_bytes(),
            tokenizer_config: Some(config.to_string().as_bytes()),
            generation_config: Some(json!({ "eos_token_id": eos_ids }).to_string().as_bytes()),
            config: None,
            chat_template: file.text("tokenizer.chat_template")?,
        })
    }
}

fn tokenizer_json(
    file: &Gguf,
    tokens: &[&str],
    bos: Option<(u32, &str)>,
) -> Result<Value, PolicyError> {
    let name = file.text("tokenizer.ggml.pre")?.unwrap_or("none");
    let splitting = Splitting::by_name(name).ok_or_else(|| PolicyError::Unsupported {
        feature: Feature::PreTokenizer,
        found: name.to_owned(),
    })?;
    let add_bos = file
        .boolean("tokenizer.ggml.add_bos_token")?
        .unwrap_or(splitting == Splitting::Llama3);
    let vocab: serde_json::Map<String, Value> = tokens
        .iter()
        .enumerate()
        .map(|(id, token)| ((*token).to_owned(), json!(id)))
        .collect();
    Ok(json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added_tokens(file, tokens)?,
        "normalizer": (splitting == Splitting::Qwen2).then(|| json!({ "type": "NFC" })),
        "pre_tokenizer": splitting.pre_tokenizer(),
        "post_processor": bos.filter(|_| add_bos).map(|(id, text)| prepend(id, text)),
        "decoder": byte_level(false),
        "model": {
            "type": "BPE",
            "dropout": null,
            "unk_token": null,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": false,
            "byte_fallback": false,
            "ignore_merges": splitting == Splitting::Llama3,
            "vocab": vocab,
            "merges": file.texts("tokenizer.ggml.merges")?,
        },
    }))
}

fn added_tokens(file: &Gguf, tokens: &[&str]) -> Result<Vec<Value>, PolicyError> {
    let types = file
        .integers("tokenizer.ggml.token_type")?
        .unwrap_or_default();
    Ok(types
        .iter()
        .zip(tokens)
        .enumerate()
        .filter(|(_, (kind, _))| matches!(**kind, CONTROL | USER_DEFINED))
        .map(|(id, (kind, token))| {
            json!({
                "id": id, "content": token, "special": *kind == CONTROL,
                "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
            })
        })
        .collect())
}

/// How text is cut before BPE, for the names llama.cpp gives to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Splitting {
    Gpt2,
    Llama3,
    Qwen2,
    SmolLm,
}

impl Splitting {
    fn by_name(name: &str) -> Option<Self> {
        Some(match name {
            "gpt-2" => Self::Gpt2,
            "llama3" | "llama-v3" | "llama-bpe" => Self::Llama3,
            "qwen2" | "deepseek-r1-qwen" => Self::Qwen2,
            "smollm" => Self::SmolLm,
            _ => return None,
        })
    }

    fn pre_tokenizer(self) -> Value {
        match self {
            Self::Gpt2 => byte_level(true),
            Self::SmolLm => json!({
                "type": "Sequence",
                "pretokenizers": [{ "type": "Digits", "individual_digits": true }, byte_level(true)],
            }),
            Self::Llama3 => by_words(r"\p{N}{1,3}"),
            Self::Qwen2 => by_words(r"\p{N}"),
        }
    }
}

/// Contractions, words with one leading sign, numbers, signs, line ends, spaces. The two families differ
/// in how many digits make a number.
fn by_words(number: &str) -> Value {
    let regex = [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        number,
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
    .join("|");
    json!({
        "type": "Sequence",
        "pretokenizers": [
            { "type": "Split", "pattern": { "Regex": regex }, "behavior": "Isolated", "invert": false },
            byte_level(false),
        ],
    })
}

fn byte_level(use_regex: bool) -> Value {
    json!({
        "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex,
    })
}

/// Puts token `id` before every text.
fn prepend(id: u32, text: &str) -> Value {
    let special = json!({ "SpecialToken": { "id": text, "type_id": 0 } });
    json!({
        "type": "TemplateProcessing",
        "single": [special, { "Sequence": { "id": "A", "type_id": 0 } }],
        "pair": [
            special, { "Sequence": { "id": "A", "type_id": 0 } },
            special, { "Sequence": { "id": "B", "type_id": 1 } },
        ],
        "special_tokens": { text: { "id": text, "ids": [id], "tokens": [text] } },
    })
}

#[cfg(test)]
mod tests {
    use tokenizers::{
        OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer, PreTokenizerWrapper,
    };

    use super::*;

    fn pieces(name: &str) -> String {
        let json = Splitting::by_name(name).unwrap().pre_tokenizer();
        let pre_tokenizer: PreTokenizerWrapper = serde_json::from_value(json).unwrap();
        let mut text = PreTokenizedString::from("I'LL pay 12345\n\n  now");
        pre_tokenizer.pre_tokenize(&mut text).unwrap();
        let splits = text.get_splits(OffsetReferential::Original, OffsetType::Byte);
        let splits: Vec<&str> = splits.iter().map(|split| split.0).collect();
        splits.join("|")
    }

    /// Worked by hand from the published expressions; Ġ is a space, Ċ a line end in byte-level spelling.
    #[test]
    fn text_is_cut_as_each_name_says() {
        assert_eq!(pieces("llama-bpe"), "I|'LL|Ġpay|Ġ|123|45|ĊĊ|Ġ|Ġnow");
        assert_eq!(pieces("qwen2"), "I|'LL|Ġpay|Ġ|1|2|3|4|5|ĊĊ|Ġ|Ġnow");
        assert_eq!(pieces("smollm"), "I|'|LL|Ġpay|Ġ|1|2|3|4|5|ĊĊĠ|Ġnow");
        assert_eq!(pieces("gpt-2"), "I|'|LL|Ġpay|Ġ12345|ĊĊĠ|Ġnow");
    }
}
