//! The component: config, telemetry and terms across the border.

use inference_cost::{Priced, Terms, Usage, Weights};
use std::cell::RefCell;

wit_bindgen::generate!({ path: "../../wit/v0.1", world: "reward" });

use exports::grpo::plugin::scoring::Guest;
use grpo::plugin::host::{Level, log, sample_telemetry};
use grpo::plugin::types::{Part, PluginError, Question, Sample, Scored, Telemetry, Verdict};

struct RewardInference;

thread_local! {
    static WEIGHTS: RefCell<Weights> = RefCell::new(Weights::default());
}

impl Guest for RewardInference {
    fn configure(config: String) -> Result<(), PluginError> {
        let weights: Weights =
            serde_json::from_str(&config).map_err(|e| PluginError::Config(e.to_string()))?;
        weights.check().map_err(PluginError::Config)?;
        WEIGHTS.set(weights);
        Ok(())
    }

    fn score(_: Vec<Question>, samples: Vec<Sample>) -> Result<Vec<Verdict>, PluginError> {
        let weights = WEIGHTS.with_borrow(|w| *w);
        let used: Vec<(u32, Usage)> = samples
            .iter()
            .zip(&sample_telemetry())
            .map(|(sample, telemetry)| (sample.question, usage(telemetry)))
            .collect();
        let Priced { terms, undefined } = weights
            .terms(&used)
            .map_err(|e| PluginError::Input(format!("telemetry: {e}")))?;
        for line in undefined.warnings() {
            log(Level::Warn, &line);
        }
        Ok(terms.into_iter().map(verdict).collect())
    }
}

/// Where nothing is defined for a whole question all its samples get 0, which no advantage feels. To skip them was
/// rejected: it would take the group out of training beside a task reward too, for the sake of a term that has nothing
/// to say about it.
fn verdict(terms: Option<Terms>) -> Verdict {
    let terms = terms.unwrap_or_default();
    let part = |(name, value): (&str, f64)| Part {
        name: name.to_owned(),
        value,
    };
    Verdict::Value(Scored {
        total: terms.total,
        parts: terms.parts.into_iter().map(part).collect(),
    })
}

fn usage(telemetry: &Telemetry) -> Usage {
    Usage {
        latency_ms: telemetry.latency_ms,
        prompt_tokens: telemetry.prompt_tokens,
        cached_prompt_tokens: telemetry.cached_prompt_tokens,
        generated_tokens: telemetry.generated_tokens,
        draft_tokens: telemetry.draft_tokens,
        accepted_tokens: telemetry.accepted_tokens,
        kv_bytes: telemetry.kv_bytes,
    }
}

export!(RewardInference);
