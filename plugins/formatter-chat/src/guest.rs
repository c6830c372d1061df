//! The component: config, rows, prompts and completions across the border.

use crate::split::Marks;
use crate::template::Template;
use serde::Deserialize;
use serde_json::{Map, Value};
use std::cell::RefCell;

wit_bindgen::generate!({ path: "../../wit/v0.1", world: "formatter" });

use exports::grpo::plugin::formatting::Guest;
use grpo::plugin::types::{Message, Parsed, PluginError, Prompt, PromptBody};

/// The plugin's config.
#[derive(Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Config {
    /// Template of a system message; none is sent if it is missing.
    system: Option<String>,
    /// Template of the user message.
    template: String,
    /// Hand over text instead of messages: no chat template, for base models.
    raw: bool,
    /// Texts that end a completion.
    stop: Vec<String>,
    /// How `parse` splits a completion.
    marks: Marks,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            system: None,
            template: "{question}".to_owned(),
            raw: false,
            stop: Vec::new(),
            marks: Marks::default(),
        }
    }
}

struct Ready {
    system: Option<Template>,
    user: Template,
    raw: bool,
    stop: Vec<String>,
    marks: Marks,
}

struct FormatterChat;

thread_local! {
    static READY: RefCell<Option<Ready>> = const { RefCell::new(None) };
}

impl Guest for FormatterChat {
    fn configure(config: String) -> Result<(), PluginError> {
        let config: Config =
            serde_json::from_str(&config).map_err(|e| PluginError::Config(e.to_string()))?;
        let template = |text: &str| Template::new(text).map_err(PluginError::Config);
        if config.marks.think_open.is_empty() || config.marks.think_close.is_empty() {
            return Err(PluginError::Config(
                "marks: think_open and think_close are texts".to_owned(),
            ));
        }
        READY.set(Some(Ready {
            system: config.system.as_deref().map(template).transpose()?,
            user: template(&config.template)?,
            raw: config.raw,
            stop: config.stop,
            marks: config.marks,
        }));
        Ok(())
    }

    fn format(rows: Vec<String>) -> Result<Vec<Prompt>, PluginError> {
        with_ready(|ready| rows.iter().map(|row| prompt(ready, row)).collect())
    }

    fn parse(completions: Vec<String>) -> Result<Vec<Parsed>, PluginError> {
        with_ready(|ready| {
            let parsed = |completion: &String| {
                let split = ready.marks.split(completion);
                Parsed {
                    reasoning: split.reasoning.map(str::to_owned),
                    answer: split.answer.map(str::to_owned),
                }
            };
            Ok(completions.iter().map(parsed).collect())
        })
    }
}

fn with_ready<T>(f: impl FnOnce(&Ready) -> Result<T, PluginError>) -> Result<T, PluginError> {
    READY.with_borrow(|ready| match ready {
        Some(ready) => f(ready),
        None => Err(PluginError::Internal("configure was not called".to_owned())),
    })
}

fn prompt(ready: &Ready, row: &str) -> Result<Prompt, PluginError> {
    let row: Map<String, Value> =
        serde_json::from_str(row).map_err(|e| PluginError::Input(format!("row: {e}")))?;
    let fill = |template: &Template| template.fill(&row).map_err(PluginError::Input);
    let user = fill(&ready.user)?;
    let system = ready.system.as_ref().map(fill).transpose()?;
    let body = if ready.raw {
        PromptBody::Text(system.unwrap_or_default() + &user)
    } else {
        let message = |role: &str, content| Message {
            role: role.to_owned(),
            content,
        };
        let system = system.map(|content| message("system", content));
        PromptBody::Messages(system.into_iter().chain([message("user", user)]).collect())
    };
    Ok(Prompt {
        body,
        stop: ready.stop.clone(),
    })
}

export!(FormatterChat);
