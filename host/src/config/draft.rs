//! What drafts for speculative decoding, and how much at a time, as the config writes it.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// Source of guesses: `none`, `ngram`, `suffix`, `model:PATH`, `layers:K`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum DraftKind {
    /// No speculation.
    #[default]
    None,
    /// What followed the last tokens earlier in the text.
    Ngram,
    /// What followed them in earlier completions of the same prompt.
    Suffix,
    /// A smaller model with the same tokenizer: folder, GGUF file, hub id, or `embedded` for the draft of
    /// the arithmetic model.
    Model(String),
    /// The first layers of the policy.
    Layers(usize),
}

impl FromStr for DraftKind {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong =
            || format!("`{text}` is not a draft; use none, ngram, suffix, model:PATH or layers:K");
        match (text, text.split_once(':')) {
            ("none", _) => Ok(Self::None),
            ("ngram", _) => Ok(Self::Ngram),
            ("suffix", _) => Ok(Self::Suffix),
            (_, Some(("model", path))) if !path.is_empty() => Ok(Self::Model(path.to_owned())),
            (_, Some(("layers", layers))) => match layers.parse() {
                Ok(layers) if layers > 0 => Ok(Self::Layers(layers)),
                _ => Err(wrong()),
            },
            _ => Err(wrong()),
        }
    }
}

impl fmt::Display for DraftKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("none"),
            Self::Ngram => f.write_str("ngram"),
            Self::Suffix => f.write_str("suffix"),
            Self::Model(path) => write!(f, "model:{path}"),
            Self::Layers(layers) => write!(f, "layers:{layers}"),
        }
    }
}

/// Tokens drafted at a time: `auto`, or a number. Only a number gives the same completions for the same
/// seed, because `auto` decides by measured times.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Written", into = "Written")]
pub enum DraftTokens {
    /// As many as pay at the moment, up to [`DraftTokens::MOST`].
    #[default]
    Auto,
    /// Always so many, 1 to [`DraftTokens::MOST`].
    Fixed(usize),
}

impl DraftTokens {
    /// More are never accepted often enough to be worth the step.
    pub const MOST: usize = 16;
}

/// YAML writes a number without quotes, the command line only text.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(untagged, expecting = "a draft length is auto or 1 to 16")]
enum Written {
    Number(usize),
    Text(String),
}

impl FromStr for DraftTokens {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match (text, text.parse()) {
            ("auto", _) => Ok(Self::Auto),
            (_, Ok(n)) if (1..=Self::MOST).contains(&n) => Ok(Self::Fixed(n)),
            _ => Err(format!(
                "`{text}` is not a draft length; use auto or 1 to {}",
                Self::MOST
            )),
        }
    }
}

impl TryFrom<Written> for DraftTokens {
    type Error = String;

    fn try_from(written: Written) -> Result<Self, String> {
        match written {
            Written::Number(n) => n.to_string().parse(),
            Written::Text(text) => text.parse(),
        }
    }
}

impl From<DraftTokens> for Written {
    fn from(tokens: DraftTokens) -> Self {
        match tokens {
            DraftTokens::Auto => Self::Text("auto".to_owned()),
            DraftTokens::Fixed(n) => Self::Number(n),
        }
    }
}

impl TryFrom<String> for DraftKind {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<DraftKind> for String {
    fn from(kind: DraftKind) -> Self {
        kind.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_read_as_they_are_written() {
        for text in [
            "none",
            "ngram",
            "suffix",
            "model:a/b",
            "model:c:d",
            "layers:3",
        ] {
            assert_eq!(text.parse::<DraftKind>().unwrap().to_string(), text);
        }
        for text in ["", "model", "model:", "layers:0", "layers:x", "eagle"] {
            let error = text.parse::<DraftKind>().unwrap_err();
            assert!(
                error.contains(&format!("`{text}` is not a draft")),
                "{error}"
            );
        }
    }

    #[test]
    fn lengths_are_a_number_or_auto() {
        assert_eq!("auto".parse(), Ok(DraftTokens::Auto));
        assert_eq!("4".parse(), Ok(DraftTokens::Fixed(4)));
        for text in ["0", "17", "-1", "four"] {
            assert!(text.parse::<DraftTokens>().is_err(), "{text}");
        }
    }
}
