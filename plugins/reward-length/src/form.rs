//! The config, and the reward of a length.

use length_curve::{Cosine, overlong};
use serde::Deserialize;

/// The plugin's config. One of the two forms is wanted.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Tokens at which a completion is at its limit: the run's `max_completion_length`. There is no default, since plugins
    /// are not told what the run's is.
    pub max_tokens: u32,
    /// DAPO's punishment over that many tokens before the limit.
    pub overlong: Option<u32>,
    /// A half-cosine from `short` to `long`.
    pub cosine: Option<Cosine>,
}

impl Config {
    /// Reads the JSON object of `configure`; the error says which key is wrong.
    pub fn parse(json: &str) -> Result<Self, String> {
        let config: Self = serde_json::from_str(json).map_err(|e| e.to_string())?;
        if config.max_tokens == 0 {
            return Err("max_tokens: give the run's max_completion_length".to_owned());
        }
        match (config.overlong, config.cosine) {
            (Some(cache), None) if cache > config.max_tokens => Err(format!(
                "overlong {cache} is more than max_tokens {}",
                config.max_tokens
            )),
            (Some(_), None) => Ok(config),
            (None, Some(cosine)) => cosine.check("cosine").map(|()| config),
            _ => Err("give one of overlong and cosine".to_owned()),
        }
    }

    /// The reward of a completion of so many tokens; 0 without a form.
    pub fn reward(&self, tokens: u32) -> f64 {
        let overlong = |cache| overlong(tokens, self.max_tokens, cache);
        let cosine = |curve: Cosine| curve.at(tokens, self.max_tokens);
        let reward = self.overlong.map(overlong).or(self.cosine.map(cosine));
        reward.unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_form_has_its_reward() {
        let of = |json| Config::parse(json).unwrap();
        let soft = of(r#"{"max_tokens": 100, "overlong": 20}"#);
        assert_eq!(
            [soft.reward(80), soft.reward(90), soft.reward(100)],
            [0.0, -0.5, -1.0]
        );
        let cosine = of(r#"{"max_tokens": 100, "cosine": {"short": 0, "long": 2}}"#);
        assert_eq!([cosine.reward(0), cosine.reward(100)], [0.0, 2.0]);
    }

    #[test]
    fn configs_are_strict() {
        let refuse = |json| Config::parse(json).unwrap_err();
        assert!(refuse("{}").starts_with("max_tokens"));
        assert!(refuse(r#"{"max_tokens": 9}"#).contains("one of overlong and cosine"));
        assert!(
            refuse(r#"{"max_tokens": 9, "overlong": 3, "cosine": {"short": 0, "long": 1}}"#)
                .contains("one of")
        );
        assert!(refuse(r#"{"max_tokens": 9, "overlong": 10}"#).starts_with("overlong 10"));
        assert!(
            refuse(r#"{"max_tokens": 9, "cosine": {"short": 0}}"#).contains("missing field `long`")
        );
        assert!(
            refuse(r#"{"max_tokens": 9, "cosine": {"short": 0, "long": 1e9}}"#)
                .starts_with("cosine.long")
        );
        assert!(refuse(r#"{"max_tokens": 9, "cos": 1}"#).contains("unknown field `cos`"));
    }
}
