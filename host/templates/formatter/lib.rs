//! The formatter: a question and an instruction become a prompt; what stands behind the last `####` of a completion is its
//! answer, and what stands before it the reasoning.

use serde_json::{Map, Value};
use std::cell::RefCell;

wit_bindgen::generate!({ path: "wit", world: "formatter" });

use exports::grpo::plugin::formatting::Guest;
use grpo::plugin::types::{Message, Parsed, PluginError, Prompt, PromptBody};

/// Stands before the answer.
const MARK: &str = "####";

/// The plugin's `config`.
struct Settings {
    /// Column with the question.
    column: String,
    /// Comes behind it; may be empty.
    instruction: String,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            column: "question".to_owned(),
            instruction: "Think first. Then write #### and the answer.".to_owned(),
        }
    }
}

thread_local! {
    static SETTINGS: RefCell<Settings> = RefCell::default();
}

struct Plugin;

impl Guest for Plugin {
    fn configure(config: String) -> Result<(), PluginError> {
        let config: Map<String, Value> =
            serde_json::from_str(&config).map_err(|e| PluginError::Config(e.to_string()))?;
        let mut settings = Settings::default();
        for (key, value) in &config {
            let setting = match key.as_str() {
                "column" => &mut settings.column,
                "instruction" => &mut settings.instruction,
                _ => return Err(PluginError::Config(format!("unknown setting `{key}`"))),
            };
            let text = value.as_str();
            text.ok_or_else(|| PluginError::Config(format!("`{key}` must be a text")))?
                .clone_into(setting);
        }
        SETTINGS.set(settings);
        Ok(())
    }

    fn format(rows: Vec<String>) -> Result<Vec<Prompt>, PluginError> {
        SETTINGS.with_borrow(|settings| rows.iter().map(|row| settings.prompt(row)).collect())
    }

    fn parse(completions: Vec<String>) -> Result<Vec<Parsed>, PluginError> {
        Ok(completions.iter().map(|text| parsed(text)).collect())
    }
}

impl Settings {
    fn prompt(&self, row: &str) -> Result<Prompt, PluginError> {
        let row: Map<String, Value> =
            serde_json::from_str(row).map_err(|e| PluginError::Input(format!("row: {e}")))?;
        let Some(question) = row.get(&self.column).and_then(Value::as_str) else {
            let text = format!("row has no text in column `{}`", self.column);
            return Err(PluginError::Input(text));
        };
        let content = match self.instruction.as_str() {
            "" => question.to_owned(),
            instruction => format!("{question}\n\n{instruction}"),
        };
        let role = "user".to_owned();
        Ok(Prompt {
            body: PromptBody::Messages(vec![Message { role, content }]),
            stop: vec![],
        })
    }
}

fn parsed(completion: &str) -> Parsed {
    match completion.rsplit_once(MARK) {
        Some((reasoning, answer)) => Parsed {
            reasoning: filled(reasoning),
            answer: filled(answer),
        },
        None => Parsed {
            reasoning: filled(completion),
            answer: None,
        },
    }
}

/// The text without blanks around it; nothing if nothing is left.
fn filled(text: &str) -> Option<String> {
    let text = text.trim_matches([' ', '\t', '\r', '\n']);
    (!text.is_empty()).then(|| text.to_owned())
}

export!(Plugin);
