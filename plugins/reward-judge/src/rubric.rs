//! The question to the judge, and the number in its answer.

use judge_text::{fill, last_number, without_thinking};
use serde::Deserialize;
use serde_json::{Map, Value};

/// The plugin's config.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// What the judge is told, with `{column}` and `{completion}` filled in. Required.
    pub rubric: String,
    /// The lowest and the highest number that count.
    pub range: [f64; 2],
    /// Divide the number so that the range becomes 0 to 1.
    pub scale: bool,
    /// The reward where the judge's answer holds no number within the range; none: the sample is skipped. A policy that learns to
    /// confuse the judge dodges low marks by a skip.
    pub unreadable: Option<f64>,
    /// Most tokens of the judge's answer.
    pub max_tokens: u32,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            rubric: String::new(),
            range: [0.0, 10.0],
            scale: true,
            unreadable: None,
            max_tokens: 256,
        }
    }
}

impl Config {
    /// Refuses a rubric that says nothing of the completion, and a range without an inside.
    ///
    /// # Errors
    /// The key and its value.
    pub fn check(&self) -> Result<(), String> {
        let [low, high] = self.range;
        if !self.rubric.contains("{completion}") {
            return Err(
                "rubric has no {completion}, so that the judge would not see it".to_owned(),
            );
        }
        if high <= low {
            return Err(format!(
                "range is [{low}, {high}], and wants the lower number first"
            ));
        }
        if self.max_tokens == 0 {
            return Err("max_tokens is 0".to_owned());
        }
        Ok(())
    }

    /// What the judge is asked; the completion without its thinking.
    ///
    /// # Errors
    /// A column that the row lacks, a broken template.
    pub fn question(&self, row: &Map<String, Value>, completion: &str) -> Result<String, String> {
        fill(&self.rubric, row, &without_thinking(completion))
    }

    /// The reward that an answer gives and the number in it, if there is one within the range; nothing if
    /// there is none and [`Config::unreadable`] says nothing.
    pub fn reward(&self, answer: &str) -> Option<(f64, Option<f64>)> {
        let Some(number) = last_number(&without_thinking(answer), self.range) else {
            return Some((self.unreadable?, None));
        };
        let [low, high] = self.range;
        let scaled = (number - low) / (high - low);
        Some((if self.scale { scaled } else { number }, Some(number)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn config(value: Value) -> Config {
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn an_answer_becomes_a_reward() {
        let config = config(json!({"rubric": "{completion}", "range": [1, 5]}));
        assert_eq!(
            config.reward("<think>maybe 2</think>Score: 4"),
            Some((0.75, Some(4.0)))
        );
        assert_eq!(config.reward("6"), None);
        assert_eq!(config.reward("<think>4"), None);
        let plain = Config {
            scale: false,
            unreadable: Some(-1.0),
            ..config
        };
        assert_eq!(plain.reward("It deserves 4."), Some((4.0, Some(4.0))));
        assert_eq!(plain.reward("6"), Some((-1.0, None)));
    }

    #[test]
    fn the_judge_sees_the_answer_and_not_the_thinking() {
        let config = config(json!({"rubric": "Q: {question}\nA: {completion}"}));
        let row = json!({"question": "Why?"});
        let asked = config.question(row.as_object().unwrap(), "<think>hm</think>Because.");
        assert_eq!(asked.unwrap(), "Q: Why?\nA: Because.");
    }

    #[test]
    fn settings_that_cannot_work_are_refused() {
        for (value, why) in [
            (json!({}), "rubric has no {completion}"),
            (
                json!({"rubric": "{completion}", "range": [1, 1]}),
                "range is [1, 1]",
            ),
            (
                json!({"rubric": "{completion}", "max_tokens": 0}),
                "max_tokens is 0",
            ),
        ] {
            let error = config(value).check().unwrap_err();
            assert!(error.starts_with(why), "{error}");
        }
    }
}
