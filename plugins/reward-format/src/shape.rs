//! The checks, each worth a number from 0 to 1, and how they add up.

use regex_lite::Regex;
use serde::Deserialize;

/// The plugin's config. With `{}` a completion must be `<think>…</think>` and something after it.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Tags that must appear once each, in this order, not nested, with text inside.
    pub tags: Vec<String>,
    /// The prompt already ends in the first opening tag, so the completion begins inside it.
    pub opened: bool,
    /// Ask for text after the last tag.
    pub answer: bool,
    /// Regular expression (regex-lite's syntax) to be found in the completion. Anchor it with `^…$`.
    pub pattern: Option<String>,
    /// Bounds of the length in characters, both included.
    pub min_chars: usize,
    pub max_chars: Option<usize>,
    /// `true`: the share of the checks that hold (tags count one by one). `false`: all or nothing.
    pub partial: bool,
    /// The reward of a completion that passes everything.
    pub reward: f64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            tags: vec!["think".to_owned()],
            opened: false,
            answer: true,
            pattern: None,
            min_chars: 0,
            max_chars: None,
            partial: false,
            reward: 1.0,
        }
    }
}

/// A config ready to use.
#[derive(Debug, Default)]
pub struct Checker {
    config: Config,
    /// Opening and closing text of each tag.
    tags: Vec<(String, String)>,
    pattern: Option<Regex>,
}

/// The total and each check that was asked for, by name.
#[derive(Debug, PartialEq)]
pub struct Verdict {
    pub total: f64,
    pub parts: Vec<(&'static str, f64)>,
}

impl Checker {
    /// Compiles the pattern; the error says what is wrong with which key.
    pub fn new(config: Config) -> Result<Self, String> {
        if let Some(bad) = config
            .tags
            .iter()
            .find(|t| t.is_empty() || t.contains(['<', '>']))
        {
            return Err(format!(
                "tags: `{bad}` is not a tag name; write `think`, not `<think>`"
            ));
        }
        if config.max_chars.is_some_and(|max| max < config.min_chars) {
            return Err(format!("max_chars is below min_chars {}", config.min_chars));
        }
        let pattern = match &config.pattern {
            Some(text) => Some(Regex::new(text).map_err(|e| format!("pattern `{text}`: {e}"))?),
            None => None,
        };
        let tags = config
            .tags
            .iter()
            .map(|t| (format!("<{t}>"), format!("</{t}>")))
            .collect();
        Ok(Self {
            config,
            tags,
            pattern,
        })
    }

    pub fn check(&self, completion: &str) -> Verdict {
        let mut parts = Vec::with_capacity(3);
        if !self.tags.is_empty() {
            parts.push(("tags", self.tags_in_order(completion)));
        }
        if let Some(pattern) = &self.pattern {
            parts.push(("pattern", f64::from(u8::from(pattern.is_match(completion)))));
        }
        if self.config.min_chars > 0 || self.config.max_chars.is_some() {
            let chars = completion.chars().count();
            let fits = chars >= self.config.min_chars
                && self.config.max_chars.is_none_or(|max| chars <= max);
            parts.push(("length", f64::from(u8::from(fits))));
        }
        let sum: f64 = parts.iter().map(|(_, v)| v).sum();
        #[expect(clippy::cast_precision_loss, reason = "at most three checks")]
        let share = if parts.is_empty() {
            1.0
        } else {
            sum / parts.len() as f64
        };
        // Only exact ones add up to a share of exactly one.
        let total = if self.config.partial || share >= 1.0 {
            share
        } else {
            0.0
        };
        Verdict {
            total: total * self.config.reward,
            parts,
        }
    }

    /// The share of tags (and the answer after them, if asked for) found where they belong.
    fn tags_in_order(&self, completion: &str) -> f64 {
        let found = self.occurrences(completion);
        let (mut good, mut wanted, mut at) = (0_u32, 0_u32, 0);
        for (i, (open, close)) in self.tags.iter().enumerate() {
            let opened = i == 0 && self.config.opened;
            let blank = |begin: &usize| {
                let before = completion.get(at..*begin);
                before.is_some_and(|text| text.trim().is_empty())
            };
            let body = match (only(&found, i, false), opened) {
                (Only::Never, true) => Some(0),
                (Only::At(begin), false) => Some(begin).filter(blank).map(|b| b + open.len()),
                _ => None,
            };
            if let (Some(begin), Only::At(end)) = (body, only(&found, i, true))
                && completion
                    .get(begin..end)
                    .is_some_and(|body| !body.trim().is_empty())
            {
                good += 1;
                at = end + close.len();
            }
            wanted += 1;
        }
        if self.config.answer {
            let last = self.tags.len() - 1;
            let closed = !matches!(only(&found, last, true), Only::Never);
            good += u32::from(closed && !completion[at..].trim().is_empty());
            wanted += 1;
        }
        f64::from(good) / f64::from(wanted)
    }

    /// Every tag in the text: where, which, and whether it closes. One pass over the text that stops
    /// at `<` only; searching for each tag by itself took ten times as long.
    fn occurrences(&self, text: &str) -> Vec<(usize, usize, bool)> {
        let mut found = Vec::new();
        for (at, _) in text.match_indices('<') {
            for (i, (open, close)) in self.tags.iter().enumerate() {
                if text[at..].starts_with(open.as_str()) {
                    found.push((at, i, false));
                } else if text[at..].starts_with(close.as_str()) {
                    found.push((at, i, true));
                }
            }
        }
        found
    }
}

/// How often a tag was found.
enum Only {
    Never,
    At(usize),
    Often,
}

fn only(found: &[(usize, usize, bool)], tag: usize, closes: bool) -> Only {
    let mut same = found.iter().filter(|f| (f.1, f.2) == (tag, closes));
    match (same.next(), same.next()) {
        (None, _) => Only::Never,
        (Some(first), None) => Only::At(first.0),
        (Some(_), Some(_)) => Only::Often,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn total(config: Config, completion: &str) -> f64 {
        Checker::new(config).unwrap().check(completion).total
    }

    #[test]
    fn think_then_answer() {
        for (completion, expected) in [
            ("<think>a</think> 42", 1.0),
            ("\n<think>\na\n</think>\n\n42", 1.0),
            ("<think>a</think>", 0.0),
            ("<think> </think> 42", 0.0),
            ("<think>a", 0.0),
            ("well <think>a</think> 42", 0.0),
            ("<think>a</think><think>b</think> 42", 0.0),
            ("42", 0.0),
        ] {
            assert_eq!(
                total(Config::default(), completion),
                expected,
                "{completion}"
            );
        }
        let opened = Config {
            opened: true,
            ..Config::default()
        };
        assert_eq!(total(opened, "a</think> 42"), 1.0);
    }

    #[test]
    fn partial_counts_what_holds() {
        let config = Config {
            tags: vec!["think".to_owned(), "answer".to_owned()],
            answer: false,
            partial: true,
            pattern: Some("[0-9]+</answer>$".to_owned()),
            max_chars: Some(40),
            reward: 2.0,
            ..Config::default()
        };
        let checker = Checker::new(config).unwrap();
        let good = checker.check("<think>a</think><answer>42</answer>");
        assert_eq!(
            good,
            Verdict {
                total: 2.0,
                parts: vec![("tags", 1.0), ("pattern", 1.0), ("length", 1.0)]
            }
        );
        let half = checker.check("<think>a</think> forty-two, or something else entirely");
        assert_eq!(
            half,
            Verdict {
                total: 2.0 * (0.5 / 3.0),
                parts: vec![("tags", 0.5), ("pattern", 0.0), ("length", 0.0)]
            }
        );
    }

    #[test]
    fn bad_configs_name_the_key() {
        let bad = |config| Checker::new(config).unwrap_err();
        assert!(
            bad(Config {
                pattern: Some("(".to_owned()),
                ..Config::default()
            })
            .starts_with("pattern `(`")
        );
        assert!(
            bad(Config {
                tags: vec!["<a>".to_owned()],
                ..Config::default()
            })
            .starts_with("tags: `<a>`")
        );
        assert!(
            bad(Config {
                min_chars: 5,
                max_chars: Some(4),
                ..Config::default()
            })
            .starts_with("max_chars")
        );
    }
}
