//! The component: the inner reward's border on one side, the host's on the other.

use crate::curve::Config;
use std::cell::RefCell;

wit_bindgen::generate!({ path: "../../wit/v0.1", world: "reward-wrapper" });

use exports::grpo::plugin::scoring::Guest;
use grpo::plugin::host::sample_telemetry;
use grpo::plugin::scoring as inner;
use grpo::plugin::types::{
    Finish, Part, PluginError, Question, Sample, Scored, Telemetry, Verdict,
};

struct LengthWrapper;

thread_local! {
    static CONFIG: RefCell<Config> = RefCell::new(Config::default());
}

impl Guest for LengthWrapper {
    fn configure(config: String) -> Result<(), PluginError> {
        let config = Config::parse(&config).map_err(PluginError::Config)?;
        inner::configure(config.inner_json()).map_err(of_inner)?;
        CONFIG.set(config);
        Ok(())
    }

    fn score(questions: Vec<Question>, samples: Vec<Sample>) -> Result<Vec<Verdict>, PluginError> {
        let verdicts = inner::score(&questions, &samples).map_err(of_inner)?;
        let (found, expected) = (verdicts.len(), samples.len());
        if found != expected {
            let text = format!("inner: {found} verdicts for {expected} samples");
            return Err(PluginError::Internal(text));
        }
        CONFIG.with_borrow(|config| {
            let judged = samples.iter().zip(verdicts);
            let judged = judged.zip(sample_telemetry());
            Ok(judged
                .map(|((s, v), t)| by_length(config, s, &t, v))
                .collect())
        })
    }
}

/// A sample that the inner reward skips stays skipped.
fn by_length(config: &Config, sample: &Sample, telemetry: &Telemetry, verdict: Verdict) -> Verdict {
    let Verdict::Value(scored) = verdict else {
        return verdict;
    };
    let tokens = telemetry.generated_tokens;
    let truncated = sample.finish == Finish::Length;
    let part = |name: &str, value| Part {
        name: name.to_owned(),
        value,
    };
    Verdict::Value(Scored {
        total: config.reward(scored.total, tokens, truncated),
        parts: vec![
            part("task", scored.total),
            part("tokens", f64::from(tokens)),
        ],
    })
}

fn of_inner(error: PluginError) -> PluginError {
    match error {
        PluginError::Config(text) => PluginError::Config(format!("inner: {text}")),
        PluginError::Input(text) => PluginError::Input(format!("inner: {text}")),
        PluginError::Internal(text) => PluginError::Internal(format!("inner: {text}")),
    }
}

export!(LengthWrapper);
