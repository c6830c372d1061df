//! What can go wrong between a question and its answer, and before the first question.

/// Why a question has no answer. Texts come from outside: they are short, on one line and without the judge's key.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum JudgeError {
    /// No answer before the deadline, after the host's retries.
    #[error("the judge did not answer in time")]
    Timeout,
    /// The operator's budget of requests or tokens, or the endpoint's own, is used up.
    #[error("the judge's budget is used up: {0}")]
    Exhausted(String),
    /// The model or its server refuses this question; asking again would not help.
    #[error("the judge refuses: {0}")]
    Refused(String),
    /// The server cannot be reached or answers nonsense, after the host's retries.
    #[error("the judge is unavailable: {0}")]
    Unavailable(String),
}

/// A judge that cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum JudgeSetupError {
    #[error("judge `{judge}`: the environment variable {variable} is not set")]
    NoKey { judge: String, variable: String },
    #[error(
        "judge `{judge}`: the key in {variable} has characters that an HTTP header cannot carry"
    )]
    BadKey { judge: String, variable: String },
    #[error("judge `{judge}` has nowhere to keep answers: neither XDG_CACHE_HOME nor HOME is set")]
    NoCache { judge: String },
    #[error("judge `{judge}`: {reason}")]
    Client {
        judge: String,
        reason: reqwest::Error,
    },
    #[error("judge `{judge}`: cannot start threads: {reason}")]
    Threads {
        judge: String,
        reason: std::io::Error,
    },
}

impl JudgeSetupError {
    /// What the reader can do about it, if there is something.
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            Self::NoKey { variable, judge } => format!(
                "export {variable}, or take api_key_env out of judge `{judge}` if its endpoint wants no key"
            ),
            Self::BadKey { variable, .. } => {
                format!("export {variable} again, without line breaks or spaces")
            }
            Self::NoCache { .. } => {
                "set XDG_CACHE_HOME, or `cache: false` for this judge".to_owned()
            }
            Self::Client { .. } | Self::Threads { .. } => return None,
        })
    }
}
