//! Which code to run: the completion's program and the row's tests.

use serde::Deserialize;
use serde_json::{Map, Value};

/// The plugin's config.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Column with the tests: a list of Python statements or of `{"input": …, "expected": …}`, or one text.
    pub tests: String,
    /// Column with Python code to run before the completion's.
    pub setup: Option<String>,
    /// Column with the name of the function under test; a row may lack it.
    pub entry_point: String,
    /// All tests or nothing.
    pub all: bool,
    /// Reward of a completion without code.
    pub missing: f64,
    /// Reward of code that the interpreter cannot judge; none skips it.
    pub unsupported: Option<f64>,
    /// Most instructions of one run, about.
    pub steps: u64,
    /// Most mebibytes of one run.
    pub memory_mib: u32,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            tests: "tests".to_owned(),
            setup: None,
            entry_point: "entry_point".to_owned(),
            all: false,
            missing: 0.0,
            unsupported: None,
            steps: 1_000_000,
            memory_mib: 64,
        }
    }
}

impl Config {
    /// Refuses limits that nothing could run under, and memory beyond an instance's own.
    ///
    /// # Errors
    /// The key and its value.
    pub fn check(&self) -> Result<(), String> {
        if self.steps < 1000 {
            return Err(format!(
                "steps is {}, and has to be 1000 or more",
                self.steps
            ));
        }
        if !(1..=1024).contains(&self.memory_mib) {
            return Err(format!("memory_mib is {}, not 1 to 1024", self.memory_mib));
        }
        Ok(())
    }
}

/// The code of a completion: its last fenced block, also one that is cut off. None without any fence.
pub fn last_block(text: &str) -> Option<String> {
    let mut last: Option<Vec<&str>> = None;
    let mut open: Option<(usize, Vec<&str>)> = None;
    for line in text.lines() {
        let ticks = line.trim_start().bytes().take_while(|b| *b == b'`').count();
        open = match open.take() {
            Some((fence, lines)) if ticks >= fence && line.trim().len() == ticks => {
                last = Some(lines);
                None
            }
            Some((fence, mut lines)) => {
                lines.push(line);
                Some((fence, lines))
            }
            None => (ticks >= 3).then(|| (ticks, Vec::new())),
        };
    }
    let lines = open.map(|(_, lines)| lines).or(last)?;
    // A block in a list is indented as a whole.
    let indent = |line: &&str| line.len() - line.trim_start_matches([' ', '\t']).len();
    let full = lines.iter().filter(|line| !line.trim().is_empty());
    let margin = full.map(indent).min().unwrap_or(0);
    let cut: Vec<&str> = lines
        .iter()
        .map(|l| l.get(margin..).unwrap_or(""))
        .collect();
    Some(cut.join("\n"))
}

/// The tests of a row, each a few Python statements to run behind `code`.
///
/// # Errors
/// Why the row has none.
pub fn tests(config: &Config, row: &Map<String, Value>, code: &str) -> Result<Vec<String>, String> {
    let entry = row.get(&config.entry_point).and_then(Value::as_str);
    let column = &config.tests;
    let tests = match row.get(column) {
        Some(Value::String(text)) => vec![whole(text, entry)],
        Some(Value::Array(tests)) => {
            let each = tests.iter().map(|test| one(test, entry, code));
            each.collect::<Result<_, _>>()
                .map_err(|why| format!("column `{column}`: {why}"))?
        }
        _ => return Err(format!("column `{column}` is neither a list nor a text")),
    };
    match tests.iter().all(|test| test.trim().is_empty()) {
        true => Err(format!("column `{column}` holds no test")),
        false => Ok(tests),
    }
}

/// Text as `HumanEval` has it defines `check` and leaves the call to us.
fn whole(text: &str, entry: Option<&str>) -> String {
    match entry.filter(|_| text.lines().any(|line| line.starts_with("def check("))) {
        Some(entry) => format!("{text}\ncheck({entry})"),
        None => text.to_owned(),
    }
}

fn one(test: &Value, entry: Option<&str>, code: &str) -> Result<String, String> {
    let pair = match test {
        Value::String(statements) => return Ok(statements.clone()),
        Value::Object(pair) => pair,
        _ => return Err("a test is neither a text nor an object".to_owned()),
    };
    let (Some(input), Some(expected)) = (pair.get("input"), pair.get("expected")) else {
        return Err("a test wants `input` and `expected`".to_owned());
    };
    let function = entry.or_else(|| last_function(code)).unwrap_or("solution");
    let arguments: Vec<String> = match input {
        Value::Array(values) => values.iter().map(literal).collect(),
        Value::Object(named) => named
            .iter()
            .map(|(k, v)| format!("{k}={}", literal(v)))
            .collect(),
        value => vec![literal(value)],
    };
    Ok(format!(
        "assert {function}({}) == {}",
        arguments.join(", "),
        literal(expected)
    ))
}

fn last_function(code: &str) -> Option<&str> {
    let mut lines = code.lines().rev();
    let name = lines.find_map(|line| line.strip_prefix("def ")?.split('(').next());
    name.map(str::trim)
}

/// A JSON value in Python's words. JSON's escapes in texts are Python's as well.
fn literal(value: &Value) -> String {
    match value {
        Value::Null => "None".to_owned(),
        Value::Bool(true) => "True".to_owned(),
        Value::Bool(false) => "False".to_owned(),
        Value::Number(_) | Value::String(_) => value.to_string(),
        Value::Array(values) => {
            format!(
                "[{}]",
                values.iter().map(literal).collect::<Vec<_>>().join(", ")
            )
        }
        Value::Object(map) => {
            let pair =
                |(k, v): (&String, &Value)| format!("{}: {}", Value::from(k.as_str()), literal(v));
            format!(
                "{{{}}}",
                map.iter().map(pair).collect::<Vec<_>>().join(", ")
            )
        }
    }
}
