//! The reward: how near the last number of an answer is to the number in the row's column `answer`.

use serde_json::{Map, Value};
use std::cell::Cell;

wit_bindgen::generate!({ path: "wit", world: "reward" });

use exports::grpo::plugin::scoring::Guest;
use grpo::plugin::types::{Part, PluginError, Question, Sample, Scored, Verdict};

/// The plugin's `config`.
#[derive(Clone, Copy)]
struct Settings {
    /// Relative error that still earns 1.
    tolerance: f64,
    /// What a number just outside of the tolerance would earn at an error of 0.
    partial: f64,
}

const DEFAULT: Settings = Settings {
    tolerance: 1e-6,
    partial: 0.1,
};

thread_local! {
    static SETTINGS: Cell<Settings> = const { Cell::new(DEFAULT) };
}

struct Plugin;

impl Guest for Plugin {
    fn configure(config: String) -> Result<(), PluginError> {
        let config: Map<String, Value> =
            serde_json::from_str(&config).map_err(|e| PluginError::Config(e.to_string()))?;
        let mut settings = DEFAULT;
        for (key, value) in &config {
            let setting = match key.as_str() {
                "tolerance" => &mut settings.tolerance,
                "partial" => &mut settings.partial,
                _ => return Err(PluginError::Config(format!("unknown setting `{key}`"))),
            };
            let number = value.as_f64().filter(|number| *number >= 0.0);
            *setting = number.ok_or_else(|| {
                PluginError::Config(format!("`{key}` must be a number of at least 0"))
            })?;
        }
        SETTINGS.set(settings);
        Ok(())
    }

    fn score(questions: Vec<Question>, samples: Vec<Sample>) -> Result<Vec<Verdict>, PluginError> {
        let settings = SETTINGS.get();
        let golds = questions.iter().map(|question| gold(&question.row));
        let golds = golds.collect::<Result<Vec<_>, _>>()?;
        let judge = |sample: &Sample| match golds[sample.question as usize] {
            Some(gold) => {
                let answer = sample.answer.as_ref().unwrap_or(&sample.completion);
                Verdict::Value(settings.judge(answer, gold))
            }
            None => Verdict::Skip("column `answer` holds no number".to_owned()),
        };
        Ok(samples.iter().map(judge).collect())
    }
}

impl Settings {
    fn judge(&self, answer: &str, gold: f64) -> Scored {
        let Some(number) = last_number(answer) else {
            return Scored {
                total: 0.0,
                parts: vec![],
            };
        };
        let error = (number - gold).abs() / gold.abs().max(1.0);
        let total = if error <= self.tolerance {
            1.0
        } else {
            self.partial / (1.0 + error)
        };
        let part = Part {
            name: "error".to_owned(),
            value: error.min(1e9),
        };
        Scored {
            total,
            parts: vec![part],
        }
    }
}

/// The number in the row's column `answer`, or `None` if it holds none.
fn gold(row: &str) -> Result<Option<f64>, PluginError> {
    let row: Map<String, Value> =
        serde_json::from_str(row).map_err(|e| PluginError::Input(format!("row: {e}")))?;
    match row.get("answer") {
        None => Err(PluginError::Input("row has no column `answer`".to_owned())),
        Some(Value::String(text)) => Ok(last_number(text)),
        Some(value) => Ok(value.as_f64()),
    }
}

/// The last decimal number of a text. Commas between its digits are ignored.
fn last_number(text: &str) -> Option<f64> {
    let end = text.rfind(|c: char| c.is_ascii_digit())? + 1;
    let in_number = |c: char| c.is_ascii_digit() || c == '.' || c == ',';
    let before = text[..end].trim_end_matches(in_number);
    let run = text[before.len()..end].replace(',', "");
    // Of `1.2.3` the last two pieces are a number.
    let point = run.rfind('.').unwrap_or(0);
    let first = run[..point].rfind('.').map_or(0, |earlier| earlier + 1);
    let number: f64 = run[first..].parse().ok()?;
    let signed = if before.ends_with('-') { -number } else { number };
    signed.is_finite().then_some(signed)
}

export!(Plugin);
