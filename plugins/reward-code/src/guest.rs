//! The component: config, rows and scores across the border.

use crate::program::{self, Config};
use crate::run::{self, Report};
use serde_json::{Map, Value};
use std::cell::RefCell;

wit_bindgen::generate!({ path: "../../wit/v0.1", world: "reward" });

use exports::grpo::plugin::scoring::Guest;
use grpo::plugin::types::{Part, PluginError, Question, Sample, Scored, Verdict};

/// Counts bytes, for the limit of memory.
#[global_allocator]
static ALLOCATOR: monty_alloc::LimitedAllocator = monty_alloc::LimitedAllocator;

struct RewardCode;

thread_local! {
    static CONFIG: RefCell<Config> = RefCell::new(Config::default());
}

impl Guest for RewardCode {
    fn configure(config: String) -> Result<(), PluginError> {
        let config: Config =
            serde_json::from_str(&config).map_err(|e| PluginError::Config(e.to_string()))?;
        config.check().map_err(PluginError::Config)?;
        CONFIG.set(config);
        Ok(())
    }

    fn score(questions: Vec<Question>, samples: Vec<Sample>) -> Result<Vec<Verdict>, PluginError> {
        CONFIG.with_borrow(|config| {
            let rows = questions.iter().map(|question| row(config, &question.row));
            let rows = rows.collect::<Result<Vec<_>, _>>()?;
            let judge = |sample: &Sample| judge(config, &rows[sample.question as usize], sample);
            Ok(samples.iter().map(judge).collect())
        })
    }
}

fn row(config: &Config, row: &str) -> Result<Map<String, Value>, PluginError> {
    let columns: Map<String, Value> =
        serde_json::from_str(row).map_err(|e| PluginError::Input(format!("row: {e}")))?;
    let wanted = [Some(&config.tests), config.setup.as_ref()];
    match wanted
        .into_iter()
        .flatten()
        .find(|name| !columns.contains_key(*name))
    {
        None => Ok(columns),
        Some(column) => {
            let found = columns
                .keys()
                .map(String::as_str)
                .collect::<Vec<_>>()
                .join(", ");
            Err(PluginError::Input(format!(
                "row has no column `{column}`; it has {found}"
            )))
        }
    }
}

fn judge(config: &Config, row: &Map<String, Value>, sample: &Sample) -> Verdict {
    let text = sample.answer.as_deref().unwrap_or(&sample.completion);
    let Some(block) = program::last_block(text) else {
        return value(config.missing, &Report::default());
    };
    let tests = match program::tests(config, row, &block) {
        Ok(tests) => tests,
        Err(reason) => return Verdict::Skip(reason),
    };
    let setup = config
        .setup
        .as_ref()
        .and_then(|column| row[column].as_str());
    let code = setup.map_or(block.clone(), |setup| format!("{setup}\n{block}"));
    match (run::report(config, &code, &tests), config.unsupported) {
        (Ok(report), _) => {
            let share = report.passed as f64 / report.tests as f64;
            value(if config.all { share.floor() } else { share }, &report)
        }
        (Err(_), Some(reward)) => value(reward, &Report::default()),
        (Err(what), None) => Verdict::Skip(format!("the interpreter cannot judge it: {what}")),
    }
}

fn value(total: f64, report: &Report) -> Verdict {
    let part = |(name, value): (&str, usize)| Part {
        name: name.to_owned(),
        value: value as f64,
    };
    let parts = [
        ("passed", report.passed),
        ("tests", report.tests),
        ("runs", usize::from(report.runs)),
        ("limited", usize::from(report.limited)),
    ];
    Verdict::Value(Scored {
        total,
        parts: parts.map(part).into(),
    })
}

export!(RewardCode);
