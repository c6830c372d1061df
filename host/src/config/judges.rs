//! The judges of a run: models that plugins may ask, by the names that grants use. Keys, defaults and ranges.
//!
//! What a judge does with them is the business of `crate::judge`.

use std::{collections::BTreeMap, net::IpAddr};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{ConfigError, validate::Ranges};

/// The name under which a judge is the policy as the run began with it.
pub const SELF: &str = "self";

/// Fields of a request that are the host's to fill.
const OWN_FIELDS: [&str; 8] = [
    "model",
    "messages",
    "input",
    "max_tokens",
    "max_completion_tokens",
    "temperature",
    "stream",
    "n",
];

/// The judges by name.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct JudgesConfig {
    /// Models that plugins may ask where a grant names them.
    pub judges: BTreeMap<String, JudgeConfig>,
}

/// A model that plugins may ask: behind an OpenAI-compatible endpoint, or here.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct JudgeConfig {
    /// Base of the endpoint, such as `https://api.openai.com/v1`. `null`: `model` runs in this process.
    pub endpoint: Option<String>,
    /// The endpoint's name of the model. Without an endpoint `self` (the policy as the run began with it), a folder, a
    /// GGUF file or a hub id. Required.
    pub model: String,
    /// The endpoint's name of the model that embeds texts. `null`: nothing is embedded.
    pub embedding_model: Option<String>,
    /// Environment variable with the key that is sent as bearer token. `null`: none is sent.
    pub api_key_env: Option<String>,
    /// Softmax temperature, 0 to 2. `null`: the field is left out of requests.
    pub temperature: Option<f64>,
    /// The field that limits an answer's tokens; newer models of OpenAI want `max_completion_tokens`.
    pub max_tokens_field: MaxTokensField,
    /// Further fields of each chat request, such as `{reasoning_effort: low}`.
    pub extra: Map<String, Value>,
    /// Requests in flight at the same time, 1 to 256.
    pub concurrency: u32,
    /// Requests in any 60 seconds. `null`: no limit.
    pub requests_per_minute: Option<u32>,
    /// Tokens in any 60 seconds, asked and answered. `null`: no limit.
    pub tokens_per_minute: Option<u64>,
    /// Most time of one attempt, milliseconds.
    pub timeout_ms: u64,
    /// Further attempts after one that failed and may not fail again, 0 to 20.
    pub max_retries: u32,
    /// Longest random wait before the second attempt, milliseconds; it doubles with each further one.
    pub backoff_ms: u64,
    /// Requests over the run, retries included. `null`: no limit.
    pub max_requests: Option<u64>,
    /// Tokens over the run, asked and answered. `null`: no limit.
    pub max_tokens: Option<u64>,
    /// Price of a million tokens asked and of a million answered, in any currency.
    pub prompt_price: f64,
    pub completion_price: f64,
    /// Largest answer of the endpoint, KiB.
    pub max_response_kib: u32,
    /// Allow `http://` to other hosts than this one.
    pub allow_http: bool,
    /// Keep answers on disk and take them from there.
    pub cache: bool,
    /// Take answers from the cache only.
    pub offline: bool,
}

impl Default for JudgeConfig {
    fn default() -> Self {
        Self {
            endpoint: None,
            model: String::new(),
            embedding_model: None,
            api_key_env: None,
            temperature: Some(0.0),
            max_tokens_field: MaxTokensField::MaxTokens,
            extra: Map::new(),
            concurrency: 8,
            requests_per_minute: None,
            tokens_per_minute: None,
            timeout_ms: 30_000,
            max_retries: 4,
            backoff_ms: 500,
            max_requests: None,
            max_tokens: None,
            prompt_price: 0.0,
            completion_price: 0.0,
            max_response_kib: 1024,
            allow_http: false,
            cache: true,
            offline: false,
        }
    }
}

/// How a request limits the tokens of its answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MaxTokensField {
    MaxTokens,
    MaxCompletionTokens,
}

impl MaxTokensField {
    /// As it stands in a request.
    pub fn name(self) -> &'static str {
        match self {
            Self::MaxTokens => "max_tokens",
            Self::MaxCompletionTokens => "max_completion_tokens",
        }
    }
}

impl JudgesConfig {
    /// These judges, which then answer from the cache or not at all.
    pub fn offline(mut self) -> Self {
        self.judges
            .values_mut()
            .for_each(|judge| judge.offline = true);
        self
    }

    /// These judges with what of `now` changes no answer: pace, patience, limits, prices and where answers come from.
    pub fn paced_as(&self, now: &Self) -> Self {
        let judges = self.judges.iter().map(|(name, judge)| {
            let paced = now.judges.get(name).map(|now| JudgeConfig {
                endpoint: judge.endpoint.clone(),
                model: judge.model.clone(),
                embedding_model: judge.embedding_model.clone(),
                temperature: judge.temperature,
                max_tokens_field: judge.max_tokens_field,
                extra: judge.extra.clone(),
                ..now.clone()
            });
            (name.clone(), paced.unwrap_or_else(|| judge.clone()))
        });
        Self {
            judges: judges.collect(),
        }
    }
}

/// Names that can stand in a metric's name, and values in range.
pub(super) fn ranges(ranges: &Ranges<'_>, config: &JudgesConfig) -> Result<(), ConfigError> {
    for (name, judge) in &config.judges {
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        let fits = (1..=64).contains(&name.len()) && name.chars().all(plain);
        let allowed = "names of 1 to 64 letters, digits, `-`, `_` and `.`";
        ranges.check("judges", format!("`{name}`"), allowed, fits)?;
        let key = |key: &str| format!("judges.{name}.{key}");
        let fits = !judge.model.is_empty();
        let allowed = "the name of a model, or self";
        ranges.check(&key("model"), "empty", allowed, fits)?;
        source(ranges, judge, &key)?;
        pace(ranges, judge, &key)?;
    }
    Ok(())
}

/// Where the answers come from.
fn source(
    ranges: &Ranges<'_>,
    judge: &JudgeConfig,
    key: &dyn Fn(&str) -> String,
) -> Result<(), ConfigError> {
    if let Some(endpoint) = &judge.endpoint {
        let wrong = misfit(endpoint, judge.allow_http);
        let allowed = wrong.unwrap_or_default();
        // Neither user nor password of a URL belongs on a screen.
        let shown = match endpoint.contains('@') {
            true => "a URL with a user",
            false => endpoint,
        };
        ranges.check(&key("endpoint"), shown, allowed, wrong.is_none())?;
    } else {
        let allowed = "null without an endpoint";
        let (embeds, has_key) = (&judge.embedding_model, &judge.api_key_env);
        let text = embeds.as_deref().unwrap_or_default();
        ranges.check(&key("embedding_model"), text, allowed, embeds.is_none())?;
        let text = has_key.as_deref().unwrap_or_default();
        ranges.check(&key("api_key_env"), text, allowed, has_key.is_none())?;
        let (text, none) = (
            Value::from(judge.extra.clone()).to_string(),
            judge.extra.is_empty(),
        );
        ranges.check(&key("extra"), text, "{} without an endpoint", none)?;
        // The engine that judges takes the likeliest token, always.
        let greedy = judge.temperature.is_none_or(|t| t == 0.0);
        let text = judge.temperature.unwrap_or_default();
        let allowed = "0 without an endpoint";
        ranges.check(&key("temperature"), text, allowed, greedy)?;
    }
    let temperature = judge.temperature.unwrap_or(0.0);
    let fits = (0.0..=2.0).contains(&temperature);
    ranges.check(&key("temperature"), temperature, "0 to 2, or null", fits)?;
    let taken = OWN_FIELDS
        .iter()
        .find(|field| judge.extra.contains_key(**field));
    let allowed = "fields that no key of the judge and no request of a plugin sets";
    ranges.check(
        &key("extra"),
        taken.copied().unwrap_or_default(),
        allowed,
        taken.is_none(),
    )
}

/// How fast, how long and how much.
fn pace(
    ranges: &Ranges<'_>,
    judge: &JudgeConfig,
    key: &dyn Fn(&str) -> String,
) -> Result<(), ConfigError> {
    ranges.within(&key("concurrency"), judge.concurrency, 256, "1 to 256")?;
    if let Some(limit) = judge.requests_per_minute {
        ranges.within(
            &key("requests_per_minute"),
            limit,
            1_000_000,
            "1 to 1000000",
        )?;
    }
    for (name, limit) in [
        ("tokens_per_minute", judge.tokens_per_minute),
        ("max_requests", judge.max_requests),
        ("max_tokens", judge.max_tokens),
    ] {
        let fits = limit != Some(0);
        ranges.check(&key(name), 0, "1 or more, or null", fits)?;
    }
    let timeout = judge.timeout_ms;
    let fits = (1..=3_600_000).contains(&timeout);
    ranges.check(&key("timeout_ms"), timeout, "1 to 3600000", fits)?;
    let retries = judge.max_retries;
    ranges.check(&key("max_retries"), retries, "0 to 20", retries <= 20)?;
    let backoff = judge.backoff_ms;
    let fits = backoff <= 60_000;
    ranges.check(&key("backoff_ms"), backoff, "0 to 60000", fits)?;
    let size = judge.max_response_kib;
    ranges.within(&key("max_response_kib"), size, 65_536, "1 to 65536")?;
    ranges.not_negative(&key("prompt_price"), judge.prompt_price)?;
    ranges.not_negative(&key("completion_price"), judge.completion_price)?;
    let fits = judge.cache || !judge.offline;
    ranges.check(&key("offline"), true, "false without the cache", fits)
}

/// What an endpoint would have to be, if it is not.
fn misfit(endpoint: &str, allow_http: bool) -> Option<&'static str> {
    let Ok(url) = reqwest::Url::parse(endpoint) else {
        return Some("a URL such as https://api.openai.com/v1");
    };
    if !url.username().is_empty() || url.password().is_some() {
        return Some("a URL without user and password; api_key_env names where the key is");
    }
    if url.query().is_some() || url.fragment().is_some() {
        return Some("a URL without `?` and `#`");
    }
    let here = url.host_str().is_some_and(|host| {
        let address: Result<IpAddr, _> = host.trim_matches(['[', ']']).parse();
        host == "localhost" || address.is_ok_and(|address| address.is_loopback())
    });
    match url.scheme() {
        "https" => None,
        "http" if here || allow_http => None,
        "http" => Some("https://…, or http:// to this host, or any with allow_http: true"),
        _ => Some("a URL with https:// or http://"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::{RawConfig, RunConfig};
    use super::*;

    fn run(yaml: &str) -> Result<RunConfig, ConfigError> {
        RawConfig::from_yaml(yaml, "run.yaml")?.validate()
    }

    fn refusal(keys: &str) -> String {
        let yaml = format!("judges: {{a: {{{keys}}}}}");
        run(&yaml).unwrap_err().to_string()
    }

    #[test]
    fn judges_are_read_and_written_back() {
        let yaml = "
judges:
  strict:
    endpoint: https://api.example.org/v1
    model: m-large
    api_key_env: EXAMPLE_KEY
    temperature: null
    max_tokens_field: max_completion_tokens
    extra: {reasoning_effort: low}
    requests_per_minute: 100
    prompt_price: 0.15
  own: {model: self}
";
        let config = run(yaml).unwrap();
        let strict = &config.judges.judges["strict"];
        assert_eq!(strict.temperature, None);
        assert_eq!(strict.max_tokens_field.name(), "max_completion_tokens");
        assert_eq!(strict.extra["reasoning_effort"], "low");
        assert_eq!(config.judges.judges["own"].temperature, Some(0.0));
        assert_eq!(run(&config.to_yaml().unwrap()).unwrap(), config);
    }

    #[test]
    fn endpoints_are_https_or_here() {
        for good in [
            "https://api.openai.com/v1",
            "http://127.0.0.1:8000/v1",
            "http://localhost:8000",
            "http://[::1]:8000/",
        ] {
            assert_eq!(misfit(good, false), None, "{good}");
        }
        for bad in [
            "api.openai.com/v1",
            "http://127.0.0.1.example.org/",
            "http://10.0.0.7/v1",
            "https://me:secret@api.example.org",
            "https://api.example.org/v1?key=secret",
            "ftp://127.0.0.1/",
        ] {
            assert!(misfit(bad, false).is_some(), "{bad}");
        }
        assert_eq!(misfit("http://10.0.0.7/v1", true), None);
        let shown = refusal("model: m, endpoint: 'https://me:secret@host'");
        assert!(!shown.contains("secret"), "{shown}");
    }

    #[test]
    fn what_cannot_be_meant_is_refused_with_its_key() {
        for (keys, part) in [
            ("endpoint: 'https://x'", "`judges.a.model` is empty"),
            (
                "model: m, api_key_env: KEY",
                "`judges.a.api_key_env` is KEY",
            ),
            (
                "model: m, temperature: 0.5",
                "`judges.a.temperature` is 0.5",
            ),
            ("model: m, extra: {seed: 1}", "`judges.a.extra`"),
            (
                "model: m, endpoint: 'https://x', extra: {stream: true}",
                "is stream; allowed: fields",
            ),
            (
                "model: m, endpoint: 'https://x', temperature: .nan",
                "`judges.a.temperature`",
            ),
            ("model: m, concurrency: 0", "`judges.a.concurrency` is 0"),
            ("model: m, max_tokens: 0", "`judges.a.max_tokens` is 0"),
            (
                "model: m, prompt_price: -1",
                "`judges.a.prompt_price` is -1",
            ),
            (
                "model: m, offline: true, cache: false",
                "`judges.a.offline` is true",
            ),
            ("model: m, max_retry: 3", "unknown key `judges.a.max_retry`"),
        ] {
            let text = refusal(keys);
            assert!(text.contains(part), "{keys}: {text}");
        }
        let text = run("judges: {'a/b': {model: m}}").unwrap_err().to_string();
        assert!(text.contains("`judges` is `a/b`"), "{text}");
    }

    #[test]
    fn pace_may_change_and_answers_may_not() {
        let before = run("judges: {a: {model: m, max_retries: 1}}")
            .unwrap()
            .judges;
        let now = run("judges: {a: {model: m, max_retries: 2, offline: true}}")
            .unwrap()
            .judges;
        assert_eq!(before.paced_as(&now), now);
        let offline = now.clone().offline();
        assert!(offline.judges["a"].offline && offline.paced_as(&now) == now);
        for other in ["{a: {model: n}}", "{b: {model: m}}", "{}"] {
            let now = run(&format!("judges: {other}")).unwrap().judges;
            assert_ne!(before.paced_as(&now), now, "{other}");
        }
    }
}
