//! The component: config, rows and scores across the border.

use crate::judge::{Config, Judgement};
use crate::number::Rational;
use serde_json::value::RawValue;
use std::borrow::Cow;
use std::cell::RefCell;
use std::collections::BTreeMap;

wit_bindgen::generate!({ path: "../../wit/v0.1", world: "reward" });

use exports::grpo::plugin::scoring::Guest;
use grpo::plugin::types::{Part, PluginError, Sample, Scored, Verdict};

struct RewardMath;

thread_local! {
    static CONFIG: RefCell<Config> = RefCell::new(Config::default());
}

impl Guest for RewardMath {
    fn configure(config: String) -> Result<(), PluginError> {
        let config =
            serde_json::from_str(&config).map_err(|e| PluginError::Config(e.to_string()))?;
        CONFIG.set(config);
        Ok(())
    }

    fn score(samples: Vec<Sample>) -> Result<Vec<Verdict>, PluginError> {
        CONFIG.with_borrow(|config| {
            // The completions of a group share their row: read it once.
            let mut last: Option<(&str, Result<Rational, String>)> = None;
            let mut scores = Vec::with_capacity(samples.len());
            for sample in &samples {
                if last.as_ref().is_none_or(|(row, _)| !same(row, &sample.row)) {
                    last = Some((&sample.row, gold(config, &sample.row)?));
                }
                scores.push(match &last {
                    Some((_, Ok(gold))) => {
                        let answer = sample.answer.as_deref();
                        value(config.judge(&sample.completion, answer, *gold))
                    }
                    Some((_, Err(reason))) => Verdict::Skip(reason.clone()),
                    None => Verdict::Skip("no row".to_owned()),
                });
            }
            Ok(scores)
        })
    }
}

/// Equality by words: the compiler's `memcmp` for wasm goes byte by byte.
fn same(a: &str, b: &str) -> bool {
    let ((a, a_rest), (b, b_rest)) = (a.as_bytes().as_chunks::<8>(), b.as_bytes().as_chunks::<8>());
    let words = |(a, b): (&[u8; 8], &[u8; 8])| u64::from_ne_bytes(*a) == u64::from_ne_bytes(*b);
    a.len() == b.len() && a_rest == b_rest && a.iter().zip(b).all(words)
}

/// The number of the row's answer column, or why the row cannot be judged.
fn gold(config: &Config, row: &str) -> Result<Result<Rational, String>, PluginError> {
    let columns: BTreeMap<Cow<str>, &RawValue> =
        serde_json::from_str(row).map_err(|e| PluginError::Input(format!("row: {e}")))?;
    let Some(raw) = columns.get(config.column.as_str()) else {
        let found = columns
            .keys()
            .map(|k| k.as_ref())
            .collect::<Vec<_>>()
            .join(", ");
        let column = &config.column;
        return Err(PluginError::Input(format!(
            "row has no column `{column}`; it has {found}"
        )));
    };
    // A string column holds text; anything else is judged as it is written.
    let text = serde_json::from_str::<Cow<str>>(raw.get()).unwrap_or(Cow::Borrowed(raw.get()));
    Ok(config.gold(&text).ok_or_else(|| {
        let column = &config.column;
        format!("column `{column}` holds no number")
    }))
}

fn value(judgement: Judgement) -> Verdict {
    let part = |name: &str, holds: bool| Part {
        name: name.to_owned(),
        value: f64::from(u8::from(holds)),
    };
    Verdict::Value(Scored {
        total: judgement.total,
        parts: vec![
            part("strict", judgement.strict),
            part("flexible", judgement.flexible),
        ],
    })
}

export!(RewardMath);
