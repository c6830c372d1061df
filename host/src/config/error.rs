//! What can be wrong with a config, with the key, its value and where it was set.

use std::{fmt, path::PathBuf};

/// Where a key's value came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// A config file; the line, from 1, where it could be told.
    File { name: String, line: Option<usize> },
    /// A command-line flag, with its dashes.
    Flag(&'static str),
    /// Nobody set it.
    Default,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File {
                name,
                line: Some(line),
            } => write!(f, "{name}:{line}"),
            Self::File { name, line: None } => f.write_str(name),
            Self::Flag(flag) => f.write_str(flag),
            Self::Default => f.write_str("default"),
        }
    }
}

/// A config that cannot be run. Every variant is the user's to mend: exit code 2.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("cannot read config {}: {source}", path.display())]
    Read {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("{name} is not valid YAML: {source}")]
    Syntax {
        name: String,
        source: serde_norway::Error,
    },
    #[error("{name} holds no `key: value` lines")]
    NotKeys { name: String },
    #[error("{origin}: unknown key `{key}`")]
    UnknownKey {
        key: String,
        origin: Origin,
        /// The known key most like it, if one is.
        nearest: Option<String>,
    },
    #[error("{origin}: `{key}`: {source}")]
    WrongType {
        key: String,
        origin: Origin,
        source: serde_norway::Error,
    },
    #[error("{origin}: `{key}` is {value}; allowed: {allowed}")]
    OutOfRange {
        key: String,
        value: String,
        allowed: &'static str,
        origin: Origin,
    },
    #[error("{flag}: `{key}` cannot be set, since `{parent}` is no map")]
    NoMap {
        key: String,
        /// The part of the key that is something else.
        parent: String,
        flag: &'static str,
    },
    #[error("cannot write the config as YAML: {source}")]
    Write { source: serde_norway::Error },
}

impl ConfigError {
    /// What the reader can do about it, if there is something.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Read { .. } => Some("give the path of a YAML file".to_owned()),
            Self::NotKeys { .. } => {
                Some("write one `key: value` a line, such as `learning_rate: 1e-5`".to_owned())
            }
            Self::UnknownKey {
                nearest: Some(key), ..
            } => Some(format!("did you mean `{key}`?")),
            Self::UnknownKey { .. } => {
                Some("config.yaml of any run directory lists all keys".to_owned())
            }
            Self::Syntax { .. } => Some(
                "YAML wants a space after each `:` and `-`, and quotes around text with either"
                    .to_owned(),
            ),
            Self::WrongType { .. } => {
                Some("config.yaml of any run directory shows the form of every key".to_owned())
            }
            Self::OutOfRange {
                key,
                origin: Origin::Flag(flag),
                ..
            } => Some(format!("`{flag}` sets the config key `{key}`")),
            Self::OutOfRange { key, .. } if key.starts_with("plugins[") => Some(format!(
                "docs/plugins.md says what `{key}` is for; without it the default holds"
            )),
            Self::OutOfRange { key, .. } => Some(format!(
                "docs/configuration.md says what `{key}` is for; without it the default holds"
            )),
            Self::NoMap { parent, flag, .. } => Some(format!(
                "set the whole of it: {flag} {parent}=…; a list is set whole too"
            )),
            Self::Write { .. } => None,
        }
    }
}
