//! What a completion is worth: config, the two ways to find an answer, and the judgement.

use crate::number::{self, Rational, Reading};
use serde::Deserialize;

/// Which form of answer earns full marks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// A number after `####`, or the formatter's answer being nothing but a number.
    Strict,
    /// The last number anywhere in the answer.
    Flexible,
}

/// The plugin's config, with the rewards of each judgement.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Column of the row that holds the expected answer; GSM8K's `… #### 42` is understood.
    pub column: String,
    pub mode: Mode,
    pub correct: f64,
    /// The right number in the wrong form; only in strict mode.
    pub partial: f64,
    pub wrong: f64,
    /// No number at all.
    pub missing: f64,
    /// Read `50%` as 1/2.
    pub percent: bool,
    /// Read `1/2` as one number.
    pub fractions: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            column: "answer".to_owned(),
            mode: Mode::Flexible,
            correct: 1.0,
            partial: 0.0,
            wrong: 0.0,
            missing: 0.0,
            percent: true,
            fractions: true,
        }
    }
}

/// A reward and whether each form held the right number.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Judgement {
    pub total: f64,
    pub strict: bool,
    pub flexible: bool,
}

impl Config {
    fn reading(&self) -> Reading {
        Reading {
            percent: self.percent,
            fractions: self.fractions,
        }
    }

    /// The expected number: what follows the last `####`, else the whole text, else its last number.
    pub fn gold(&self, text: &str) -> Option<Rational> {
        let tail = after_mark(text).unwrap_or(text);
        number::whole(tail, self.reading()).or_else(|| number::last(tail, self.reading()))
    }

    /// Judges what a model wrote; `answer` is the formatter's reading of it, if it has one.
    pub fn judge(&self, completion: &str, answer: Option<&str>, gold: Rational) -> Judgement {
        let text = answer.unwrap_or(completion);
        let marked = after_mark(text).map(|tail| tail.lines().next().unwrap_or(""));
        let strict = match marked {
            Some(line) => number::whole(line, self.reading()),
            None => answer.and_then(|a| number::whole(a, self.reading())),
        };
        let flexible = number::last(text, self.reading());
        let (strict_right, flexible_right) = (strict == Some(gold), flexible == Some(gold));
        let total = match (self.mode, strict_right, flexible_right) {
            (Mode::Strict, true, _) | (Mode::Flexible, _, true) => self.correct,
            // A number marked as the answer speaks for the model even if another follows.
            (Mode::Flexible, true, false) => self.correct,
            (Mode::Strict, false, true) => self.partial,
            (_, false, false) if strict.or(flexible).is_some() => self.wrong,
            (_, false, false) => self.missing,
        };
        Judgement {
            total,
            strict: strict_right,
            flexible: strict_right || flexible_right,
        }
    }
}

/// What follows the last `####`. Most completions have no `#` at all, so that is asked first.
fn after_mark(text: &str) -> Option<&str> {
    let mut end = text.len();
    while let Some(at) = last_hash(&text.as_bytes()[..end]) {
        if text[..at].ends_with("###") {
            return Some(&text[at + 1..]);
        }
        end = at;
    }
    None
}

/// Position of the last `#`, 32 bytes at a time: without vector instructions this is twice as fast as
/// the standard library, and reading the completion is most of this plugin's work.
fn last_hash(bytes: &[u8]) -> Option<usize> {
    const ONES: u64 = u64::MAX / 255;
    let is_hash = |b: &u8| *b == b'#';
    let (head, blocks) = bytes.as_rchunks::<32>();
    for (i, block) in blocks.iter().enumerate().rev() {
        // A byte of `x` is zero where there is a `#`; subtracting one borrows into its high bit.
        let zeros = block.as_chunks::<8>().0.iter().fold(0, |zeros, word| {
            let x = u64::from_ne_bytes(*word) ^ (ONES * u64::from(b'#'));
            zeros | (x.wrapping_sub(ONES) & !x)
        });
        if zeros & (ONES << 7) != 0 {
            return block
                .iter()
                .rposition(is_hash)
                .map(|at| head.len() + 32 * i + at);
        }
    }
    head.iter().rposition(is_hash)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn total(config: &Config, completion: &str, gold: &str) -> f64 {
        config
            .judge(completion, None, config.gold(gold).unwrap())
            .total
    }

    #[test]
    fn gsm8k_strict_and_flexible() {
        let gold = "She has 3*4=<<3*4=12>>12 eggs.\n#### 1,012";
        let strict = Config {
            mode: Mode::Strict,
            partial: 0.25,
            wrong: -0.5,
            missing: -1.0,
            ..Config::default()
        };
        assert_eq!(total(&strict, "1000+12\n#### 1012", gold), 1.0);
        assert_eq!(total(&strict, "#### $1,012.00\nDone in 3 steps", gold), 1.0);
        assert_eq!(total(&strict, "The answer is 1012.", gold), 0.25);
        assert_eq!(total(&strict, "#### 1013", gold), -0.5);
        assert_eq!(total(&strict, "I do not know", gold), -1.0);
        let flexible = Config::default();
        assert_eq!(total(&flexible, "The answer is 1012.", gold), 1.0);
        assert_eq!(total(&flexible, "1012 or 7", gold), 0.0);
    }

    #[test]
    fn a_bare_answer_of_the_formatter_is_strict() {
        let config = Config {
            mode: Mode::Strict,
            ..Config::default()
        };
        let gold = config.gold("1/2").unwrap();
        let judgement = config.judge("<think>7</think>50%", Some("50%"), gold);
        assert_eq!(
            judgement,
            Judgement {
                total: 1.0,
                strict: true,
                flexible: true
            }
        );
        assert!(!config.judge("it is 0.5", Some("it is 0.5"), gold).strict);
    }

    #[test]
    fn the_last_mark_is_found_at_every_offset() {
        for before in 0..70 {
            for after in [0, 1, 40] {
                let text = format!("{}####7 # {}", "é".repeat(before), "x".repeat(after));
                assert_eq!(after_mark(&text), text.split("####").last(), "{text}");
                assert_eq!(after_mark(&text.replace("####", "###")), None);
            }
        }
    }

    #[test]
    fn percent_as_configured() {
        let literal = Config {
            percent: false,
            ..Config::default()
        };
        assert_eq!(total(&literal, "50%", "0.5"), 0.0);
        assert_eq!(total(&literal, "50%", "50"), 1.0);
    }
}
