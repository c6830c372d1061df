//! What the judge is asked, and the reward of its answers.

use crate::metrics::Visibility;
use serde::Deserialize;
use serde_json::{Map, Value};

/// The plugin's config.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Column with the question of the engine's user.
    pub query: String,
    /// Column with the texts of the sources, a list.
    pub sources: String,
    /// Column with the place of the source that is rewritten, from 0.
    pub target: String,
    /// Column with the key points of the original, a list of texts; none: they are not asked for.
    pub keypoints: Option<String>,
    /// Weights of the three differences.
    pub adjusted: f64,
    pub position: f64,
    pub word: f64,
    /// Added for the share of key points that the rewritten source supports, and subtracted for those it contradicts.
    pub support: f64,
    pub contradiction: f64,
    /// Most tokens of an answer.
    pub max_tokens: u32,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            query: "query".to_owned(),
            sources: "sources".to_owned(),
            target: "target".to_owned(),
            keypoints: None,
            adjusted: 0.6,
            position: 0.2,
            word: 0.2,
            support: 0.0,
            contradiction: 0.0,
            max_tokens: 1024,
        }
    }
}

/// What a row says.
#[derive(Clone, Debug, PartialEq)]
pub struct Task {
    pub query: String,
    pub sources: Vec<String>,
    pub target: usize,
    pub keypoints: Vec<String>,
}

impl Task {
    /// Reads the columns of a row.
    ///
    /// # Errors
    /// The column that is missing or of another type.
    pub fn read(config: &Config, row: &Map<String, Value>) -> Result<Self, String> {
        let sources = texts(row, &config.sources)?;
        let query = row.get(&config.query).and_then(Value::as_str);
        let target = row.get(&config.target).and_then(Value::as_u64);
        let target = target.and_then(|place| usize::try_from(place).ok());
        let keypoints = config.keypoints.as_ref().map(|column| texts(row, column));
        Ok(Self {
            query: query
                .ok_or_else(|| format!("column `{}` is no text", config.query))?
                .to_owned(),
            target: target
                .filter(|place| *place < sources.len())
                .ok_or_else(|| {
                    format!(
                        "column `{}` is no place among {} sources",
                        config.target,
                        sources.len()
                    )
                })?,
            sources,
            keypoints: keypoints.transpose()?.unwrap_or_default(),
        })
    }

    /// What the judge is asked, with `rewritten` in place of the target if there is one.
    pub fn question(&self, rewritten: Option<&str>) -> String {
        let mut text = String::from(
            "Answer the question from the sources alone. End every sentence with the sources that it rests on, \
             such as [1] or [2][3].\n",
        );
        for (i, source) in self.sources.iter().enumerate() {
            let source = rewritten.filter(|_| i == self.target).unwrap_or(source);
            text.push_str(&format!("\nSource [{}]:\n{source}\n", i + 1));
        }
        text.push_str(&format!("\nQuestion: {}", self.query));
        text
    }

    /// What the judge is asked about key points.
    pub fn check(&self, rewritten: &str) -> String {
        let mut text = String::from(
            "For each key point say whether the text supports it, contradicts it, or does neither. Answer one line for \
             each, its number and one word: supported, contradicted or absent.\n",
        );
        for (i, point) in self.keypoints.iter().enumerate() {
            text.push_str(&format!("\n{}. {point}", i + 1));
        }
        text.push_str(&format!("\n\nText:\n{rewritten}"));
        text
    }

    /// Shares of key points that are supported and contradicted, as an answer to [`Task::check`] says. A point for which it
    /// says none of the three words, or several, counts as contradicted: a text that confuses the judge must not fare
    /// better than one that it understands.
    pub fn rates(&self, answer: &str) -> [f64; 2] {
        let line = |number: usize| {
            let mut lines = answer
                .lines()
                .map(|line| line.trim_start_matches(['-', '*', ' ']));
            lines.find_map(|line| {
                let rest = line.strip_prefix(&number.to_string())?;
                (!rest.starts_with(|c: char| c.is_ascii_digit())).then(|| rest.to_lowercase())
            })
        };
        let (mut supported, mut contradicted) = (0.0, 0.0);
        for number in 1..=self.keypoints.len() {
            let said = line(number).unwrap_or_default();
            let words = ["supported", "contradicted", "absent"].map(|word| said.contains(word));
            match words {
                [true, false, false] => supported += 1.0,
                [false, false, true] => {}
                _ => contradicted += 1.0,
            }
        }
        let points = self.keypoints.len().max(1) as f64;
        [supported / points, contradicted / points]
    }
}

fn texts(row: &Map<String, Value>, column: &str) -> Result<Vec<String>, String> {
    let list = row
        .get(column)
        .and_then(Value::as_array)
        .filter(|list| !list.is_empty());
    let text = |value: &Value| value.as_str().map(str::to_owned);
    let texts = list.and_then(|list| list.iter().map(text).collect::<Option<Vec<_>>>());
    texts.ok_or_else(|| format!("column `{column}` is no list of texts"))
}

/// The reward and its parts.
pub fn reward(
    config: &Config,
    [original, rewritten]: [Visibility; 2],
    rates: Option<[f64; 2]>,
) -> (f64, Vec<(&'static str, f64)>) {
    let mut parts = vec![
        ("adjusted", rewritten.adjusted - original.adjusted),
        ("position", rewritten.position - original.position),
        ("word", rewritten.word - original.word),
    ];
    let weights = [config.adjusted, config.position, config.word];
    let mut total: f64 = parts
        .iter()
        .zip(weights)
        .map(|((_, part), weight)| part * weight)
        .sum();
    if let Some([support, contradiction]) = rates {
        total += config.support * support - config.contradiction * contradiction;
        parts.extend([("support", support), ("contradiction", contradiction)]);
    }
    (total, parts)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::visibility;
    use serde_json::json;

    fn task() -> Task {
        let row = json!({"query": "Why?", "sources": ["one", "two"], "target": 1, "points": ["a", "b", "c"]});
        let config = Config {
            keypoints: Some("points".to_owned()),
            ..Config::default()
        };
        Task::read(&config, row.as_object().unwrap()).unwrap()
    }

    #[test]
    fn the_difference_to_the_original() {
        let before = visibility("First this [1]. Then that [2].", 2)[1];
        let after = visibility("First that [2]. Then that [2].", 2)[1];
        let (total, parts) = reward(&Config::default(), [before, after], None);
        // Half of the words; positions 1 and e^-1/2 before, all after.
        let late = (-0.5_f64).exp() / (1.0 + (-0.5_f64).exp());
        assert_eq!(parts.len(), 3);
        assert!((parts[2].1 - 0.5).abs() < 1e-12 && (parts[0].1 - (1.0 - late)).abs() < 1e-12);
        assert!(
            (total - (0.8 * (1.0 - late) + 0.2 * 0.5)).abs() < 1e-12,
            "{total}"
        );
        let same = reward(&Config::default(), [after, after], None);
        assert_eq!(same.0, 0.0);
        let config = Config {
            support: 1.0,
            contradiction: 2.0,
            ..Config::default()
        };
        assert_eq!(reward(&config, [after, after], Some([0.5, 0.25])).0, 0.0);
    }

    #[test]
    fn questions_hold_the_rewritten_source() {
        let asked = task().question(Some("new"));
        assert!(
            asked.contains("Source [1]:\none\n") && asked.contains("Source [2]:\nnew\n"),
            "{asked}"
        );
        assert!(task().question(None).contains("Source [2]:\ntwo\n"));
        assert!(
            task()
                .check("new")
                .ends_with("1. a\n2. b\n3. c\n\nText:\nnew")
        );
    }

    #[test]
    fn key_points_without_a_clear_word_are_contradicted() {
        for (answer, supported, contradicted) in [
            ("1. Supported\n2: contradicted\n- 3 absent", 1.0, 1.0),
            ("", 0.0, 3.0),
            ("1. supported\n2. supported", 2.0, 1.0),
            ("1. yes\n2. no\n3. no", 0.0, 3.0),
            ("1 supported or absent\n2 absent\n3 absent", 0.0, 1.0),
            ("11 supported\n2 absent\n3 absent", 0.0, 1.0),
        ] {
            let expected = [supported / 3.0, contradicted / 3.0];
            assert_eq!(task().rates(answer), expected, "{answer}");
        }
    }

    #[test]
    fn rows_are_refused_with_the_column() {
        for (row, why) in [
            (
                json!({"sources": ["a"], "target": 0}),
                "column `query` is no text",
            ),
            (
                json!({"query": "q", "sources": [], "target": 0}),
                "column `sources` is no list of texts",
            ),
            (
                json!({"query": "q", "sources": ["a", 1], "target": 0}),
                "column `sources` is no list of texts",
            ),
            (
                json!({"query": "q", "sources": ["a"], "target": 1}),
                "column `target` is no place among 1 sources",
            ),
            (
                json!({"query": "q", "sources": ["a"], "target": -1}),
                "column `target` is no place among 1 sources",
            ),
        ] {
            assert_eq!(
                Task::read(&Config::default(), row.as_object().unwrap()).unwrap_err(),
                why
            );
        }
    }
}
