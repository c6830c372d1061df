//! The wrapper's config, and the reward of a judged length.

use length_curve::Cosine;
use serde::Deserialize;
use serde_json::value::RawValue;

/// The wrapper's config. The values are those of Yeo et al. 2025 as open implementations ship them.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The config of the inner reward. Text, so that no number changes on its way through.
    pub inner: Option<Box<RawValue>>,
    /// Tokens at which a completion is at its limit: the run's `max_completion_length`.
    pub max_tokens: u32,
    /// The inner reward from which on a completion is right.
    pub threshold: f64,
    /// Reward of right completions by length.
    pub right: Cosine,
    /// Reward of the others.
    pub wrong: Cosine,
    /// Reward of a completion that was cut off at the limit, whatever the inner reward says; none: as of any other.
    pub truncated: Option<f64>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            inner: None,
            max_tokens: 0,
            threshold: 1.0,
            right: Cosine {
                short: 1.0,
                long: 0.5,
            },
            wrong: Cosine {
                short: -1.0,
                long: -0.5,
            },
            truncated: None,
        }
    }
}

impl Config {
    /// Reads the JSON object of `configure`; the error says which key is wrong.
    pub fn parse(json: &str) -> Result<Self, String> {
        let config: Self = serde_json::from_str(json).map_err(|e| e.to_string())?;
        if config.max_tokens == 0 {
            return Err("max_tokens: give the run's max_completion_length".to_owned());
        }
        config.right.check("right")?;
        config.wrong.check("wrong")?;
        if let Some(value) = config.truncated {
            let same = Cosine {
                short: value,
                long: value,
            };
            same.check("truncated")?;
        }
        Ok(config)
    }

    /// The JSON object for the inner reward's `configure`.
    pub fn inner_json(&self) -> &str {
        self.inner.as_deref().map_or("{}", RawValue::get)
    }

    /// The reward of a completion of so many tokens that the inner reward gave `task`.
    pub fn reward(&self, task: f64, tokens: u32, truncated: bool) -> f64 {
        let curve = match task >= self.threshold {
            true => &self.right,
            false => &self.wrong,
        };
        let of_curve = || curve.at(tokens, self.max_tokens);
        let cut = self.truncated.filter(|_| truncated);
        cut.unwrap_or_else(of_curve)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn right_and_wrong_have_curves_of_their_own() {
        let config = Config::parse(r#"{"max_tokens": 100}"#).unwrap();
        let reward = |task, tokens| config.reward(task, tokens, false);
        assert_eq!([reward(1.0, 0), reward(1.0, 100)], [1.0, 0.5]);
        assert_eq!([reward(0.9, 0), reward(0.0, 100)], [-1.0, -0.5]);
        assert!(reward(1.0, 20) > reward(1.0, 80) && reward(0.0, 20) < reward(0.0, 80));
        assert_eq!(config.reward(1.0, 100, true), 0.5);
        let hard = Config::parse(r#"{"max_tokens": 100, "truncated": -10}"#).unwrap();
        assert_eq!(
            [hard.reward(1.0, 100, true), hard.reward(1.0, 100, false)],
            [-10.0, 0.5]
        );
    }

    #[test]
    fn configs_are_strict() {
        let config = r#"{"inner": {"column": 0.10000000000000000001}, "max_tokens": 5}"#;
        let config = Config::parse(config).unwrap();
        assert_eq!(config.inner_json(), r#"{"column": 0.10000000000000000001}"#);
        let refuse = |json| Config::parse(json).unwrap_err();
        assert!(refuse("{}").starts_with("max_tokens"));
        assert!(
            refuse(r#"{"max_tokens": 5, "right": {"short": 1}}"#).contains("missing field `long`")
        );
        assert!(refuse(r#"{"max_tokens": 5, "truncated": -1e7}"#).starts_with("truncated"));
        assert!(refuse(r#"{"max_tokens": 5, "colum": 1}"#).contains("unknown field `colum`"));
    }
}
