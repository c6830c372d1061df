//! The config, and the share of n-grams that were there before.

use serde::Deserialize;
use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasherDefault, DefaultHasher};

/// What an n-gram is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Unit {
    /// Words between white space, whatever their case.
    Words,
    /// Characters, for languages that are written without spaces.
    Chars,
}

/// The plugin's config.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Units of an n-gram.
    pub n: usize,
    pub unit: Unit,
    /// Reward of a completion that is nothing but repetition, reached in proportion.
    pub penalty: f64,
    /// Share of repeated n-grams that costs nothing.
    pub free: f64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            n: 3,
            unit: Unit::Words,
            penalty: -1.0,
            free: 0.0,
        }
    }
}

/// Most units of an n-gram.
const LONGEST: usize = 64;

/// Without random keys, which a plugin has no source for.
type Hasher = BuildHasherDefault<DefaultHasher>;
type Seen<T> = HashSet<T, Hasher>;
type Numbers = HashMap<String, usize, Hasher>;

impl Config {
    /// Reads the JSON object of `configure`; the error says which key is wrong.
    pub fn parse(json: &str) -> Result<Self, String> {
        let config: Self = serde_json::from_str(json).map_err(|e| e.to_string())?;
        if !(1..=LONGEST).contains(&config.n) {
            return Err(format!("n {} is not within 1 and {LONGEST}", config.n));
        }
        if !(-1e6..=0.0).contains(&config.penalty) {
            return Err(format!(
                "penalty {} is not within -1e6 and 0",
                config.penalty
            ));
        }
        if !(0.0..1.0).contains(&config.free) {
            return Err(format!(
                "free {} is not at least 0 and below 1",
                config.free
            ));
        }
        Ok(config)
    }

    /// The share of n-grams that stood in the text before, in [0, 1); 0 for a text of less than two (1 − distinct/all, the
    /// penalty of Yeo et al. 2025 and the complement of Li et al. 2016's distinct-n).
    pub fn repeated(&self, text: &str) -> f64 {
        match self.unit {
            Unit::Words => {
                // Numbers for words: a window of them is hashed in a fraction of the time.
                let mut numbers = Numbers::default();
                let words = text.split_whitespace().map(str::to_lowercase);
                let words = words.map(|word| {
                    let next = numbers.len();
                    *numbers.entry(word).or_insert(next)
                });
                repeated(&words.collect::<Vec<_>>(), self.n)
            }
            Unit::Chars => {
                let chars: Vec<char> = text.chars().collect();
                repeated(&chars, self.n)
            }
        }
    }

    /// The reward of a text of which this share is repeated.
    pub fn reward(&self, repeated: f64) -> f64 {
        let beyond = (repeated - self.free).max(0.0) / (1.0 - self.free);
        // Not -0 where nothing is punished.
        self.penalty * beyond + 0.0
    }
}

fn repeated<T: Eq + std::hash::Hash>(units: &[T], n: usize) -> f64 {
    let windows = units.windows(n);
    let all = windows.len();
    if all < 2 {
        return 0.0;
    }
    let distinct = windows.collect::<Seen<_>>().len();
    #[expect(
        clippy::cast_precision_loss,
        reason = "texts have less than 2^53 words"
    )]
    let share = distinct as f64 / all as f64;
    1.0 - share
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(json: &str) -> Config {
        Config::parse(json).unwrap()
    }

    #[test]
    fn counts_what_was_there_before() {
        let words = of(r#"{"n": 2}"#);
        // a b, b a, a b, b a, a b: two of five are new.
        assert!((words.repeated("a b A  b\na B") - 0.6).abs() < 1e-15);
        assert_eq!(words.repeated("one two three four"), 0.0);
        assert_eq!(words.repeated("one two"), 0.0);
        assert_eq!(words.repeated(""), 0.0);
        let chars = of(r#"{"n": 1, "unit": "chars"}"#);
        assert_eq!(chars.repeated("好好好好"), 0.75);
    }

    #[test]
    fn the_penalty_grows_with_the_share() {
        let plain = of(r#"{"penalty": -2}"#);
        assert_eq!([plain.reward(0.0), plain.reward(0.25)], [0.0, -0.5]);
        assert!(plain.reward(0.0).is_sign_positive());
        let lenient = of(r#"{"free": 0.5}"#);
        assert_eq!(
            [
                lenient.reward(0.5),
                lenient.reward(0.75),
                lenient.reward(1.0)
            ],
            [0.0, -0.5, -1.0]
        );
    }

    #[test]
    fn configs_are_strict() {
        let refuse = |json| Config::parse(json).unwrap_err();
        assert!(refuse(r#"{"n": 0}"#).starts_with("n 0"));
        assert!(refuse(r#"{"penalty": 1}"#).starts_with("penalty 1"));
        assert!(refuse(r#"{"free": 1}"#).starts_with("free 1"));
        assert!(refuse(r#"{"unit": "tokens"}"#).contains("unknown variant"));
        assert!(refuse(r#"{"ngram": 3}"#).contains("unknown field"));
    }
}
