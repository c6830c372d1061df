//! Chat templates: the Jinja dialect of Hugging Face tokenizers, rendered to the text a prompt is made of.
//! Owns the dialect (functions, filters, whitespace rules of transformers' `apply_chat_template`); which
//! messages there are is the formatter's business, ids the tokenizer's.

use minijinja::{
    Environment, Error, ErrorKind, Value,
    syntax::SyntaxConfig,
    value::{Kwargs, Serde},
};
use serde::Serialize;
use serde_json::ser::{Formatter, PrettyFormatter, Serializer};

use crate::error::PolicyError;

/// The texts of a model's special tokens, as far as it names them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SpecialTokens {
    pub bos: Option<String>,
    pub eos: Option<String>,
    pub pad: Option<String>,
    pub unk: Option<String>,
}

impl SpecialTokens {
    /// With the names templates and `tokenizer_config.json` use.
    pub fn named(&self) -> [(&'static str, Option<&str>); 4] {
        [
            ("bos_token", self.bos.as_deref()),
            ("eos_token", self.eos.as_deref()),
            ("pad_token", self.pad.as_deref()),
            ("unk_token", self.unk.as_deref()),
        ]
    }
}

/// What a template may ask beside the messages.
#[derive(Clone, Debug, Default)]
pub struct ChatOptions {
    /// End with the header of the assistant's turn.
    pub add_generation_prompt: bool,
    /// What `strftime_now` formats, seconds since 1970 in UTC. `None` leaves the function undefined, and
    /// templates that test for it (Llama 3.2) use a date of their own. The caller fixes it once per run,
    /// so that a resumed run renders the same prompts.
    pub now: Option<i64>,
    /// Further variables, such as `enable_thinking` (Qwen3) or `tools`.
    pub variables: serde_json::Map<String, serde_json::Value>,
}

/// A compiled chat template.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    special: SpecialTokens,
}

const NAME: &str = "chat_template";

impl ChatTemplate {
    /// Compiles `source`. Errors: [`PolicyError::ChatTemplate`] with line and reason.
    pub fn new(source: &str, special: SpecialTokens) -> Result<Self, PolicyError> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .build()
            .map_err(|error| PolicyError::ChatTemplate(error.to_string()))?;
        environment.set_syntax(syntax);
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function(
            "raise_exception",
            |message: String| -> Result<Value, Error> {
                Err(Error::new(ErrorKind::InvalidOperation, message))
            },
        );
        environment.add_filter("tojson", tojson);
        // In Python None is not iterable, and templates guard `tools | length` with this test.
        environment.add_test("iterable", |value: &Value| {
            !value.is_none() && minijinja::tests::is_iterable(value)
        });
        environment
            .add_template_owned(NAME, normalised(source))
            .map_err(|error| PolicyError::ChatTemplate(error.to_string()))?;
        Ok(Self {
            environment,
            special,
        })
    }

    /// Renders `messages`, structs or maps with at least `role` and `content`.
    ///
    /// Errors: [`PolicyError::ChatTemplate`] when the template raises (for example because it knows no
    /// system role) or fails.
    pub fn render<M: Serialize>(
        &self,
        messages: &[M],
        options: &ChatOptions,
    ) -> Result<String, PolicyError> {
        let mut context = std::collections::BTreeMap::new();
        // Templates test `tools` and `documents` without asking whether they are defined.
        context.insert("tools", Value::from(()));
        context.insert("documents", Value::from(()));
        for (name, token) in self.special.named() {
            if let Some(token) = token {
                context.insert(name, Value::from(token));
            }
        }
        for (name, value) in &options.variables {
            context.insert(name, Value::from(Serde(value)));
        }
        context.insert("messages", Value::from(Serde(messages)));
        context.insert(
            "add_generation_prompt",
            Value::from(options.add_generation_prompt),
        );
        if let Some(now) = options.now {
            let strftime = move |format: &str| strftime(now, format);
            context.insert("strftime_now", Value::from_function(strftime));
        }
        self.environment
            .get_template(NAME)
            .and_then(|template| template.render(context))
            .map_err(|error| PolicyError::ChatTemplate(error.to_string()))
    }
}

/// transformers' `{% generation %}` marks assistant text for its loss mask and prints its body; here the
/// rollout says what was generated, so the tags become a block that always prints.
///
/// Line ends become `\n`, as Jinja makes them.
fn normalised(source: &str) -> String {
    let source = source.replace("\r\n", "\n");
    let mut out = String::with_capacity(source.len());
    let mut rest = source.as_str();
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start);
        out.push_str(before);
        let Some(end) = tag.find("%}") else {
            rest = tag;
            break;
        };
        let (tag, after) = tag.split_at(end + 2);
        let word = tag[2..end].trim_matches(['-', '+']).trim();
        match word {
            "generation" => out.push_str(&tag.replacen("generation", "if true", 1)),
            "endgeneration" => out.push_str(&tag.replacen("endgeneration", "endif", 1)),
            _ => out.push_str(tag),
        }
        rest = after;
    }
    out.push_str(rest);
    out
}

fn strftime(now: i64, format: &str) -> Result<String, Error> {
    use std::fmt::Write;
    let invalid = |detail: String| Error::new(ErrorKind::InvalidOperation, detail);
    let time = chrono::DateTime::from_timestamp(now, 0)
        .ok_or_else(|| invalid(format!("{now} is not a time")))?;
    let mut out = String::new();
    write!(out, "{}", time.format(format))
        .map_err(|error| invalid(format!("strftime_now(`{format}`): {error}")))?;
    Ok(out)
}

/// Python's `json.dumps`: `, ` and `: ` between items, nothing escaped for HTML. minijinja's own filter
/// escapes `<`, which changes what a tool description says.
fn tojson(value: &Value, options: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = options.get("indent")?;
    if options.get::<Option<bool>>("ensure_ascii")? == Some(true) {
        return Err(Error::new(
            ErrorKind::InvalidOperation,
            "tojson(ensure_ascii=true) is not supported",
        ));
    }
    options.assert_all_used()?;
    let mut out = Vec::new();
    let written = match indent {
        Some(n) => {
            let indent = " ".repeat(n);
            let pretty = PrettyFormatter::with_indent(indent.as_bytes());
            value.serialize(&mut Serializer::with_formatter(&mut out, pretty))
        }
        None => value.serialize(&mut Serializer::with_formatter(&mut out, Spaced)),
    };
    let failed = |detail: String| Error::new(ErrorKind::InvalidOperation, detail);
    written.map_err(|error| failed(error.to_string()))?;
    let text = String::from_utf8(out).map_err(|error| failed(error.to_string()))?;
    Ok(Value::from_safe_string(text))
}

/// `{"a": 1, "b": [2, 3]}`.
struct Spaced;

impl Formatter for Spaced {
    fn begin_array_value<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first {
            Ok(())
        } else {
            writer.write_all(b", ")
        }
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first {
            Ok(())
        } else {
            writer.write_all(b", ")
        }
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
    ) -> std::io::Result<()> {
        writer.write_all(b": ")
    }
}

#[cfg(test)]
mod tests;
