//! The component: the inner reward's border on one side, the host's on the other.

use crate::join::Config;
use inference_cost::{Priced, Terms, Usage};
use std::cell::RefCell;

wit_bindgen::generate!({ path: "../../wit/v0.1", world: "reward-wrapper" });

use exports::grpo::plugin::scoring::Guest;
use grpo::plugin::host::{Level, log, sample_telemetry};
use grpo::plugin::scoring as inner;
use grpo::plugin::types::{Part, PluginError, Question, Sample, Scored, Telemetry, Verdict};

struct InferenceWrapper;

thread_local! {
    static CONFIG: RefCell<Config> = RefCell::new(Config::default());
}

impl Guest for InferenceWrapper {
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
        // A skipped sample has no total that terms could be part of, so it has no say in its group's mean.
        let judged = |((sample, telemetry), verdict): ((&Sample, &Telemetry), _)| match verdict {
            &Verdict::Value(_) => Some((sample.question, usage(telemetry))),
            Verdict::Skip(_) => None,
        };
        let costs = sample_telemetry();
        let samples = samples.iter().zip(&costs);
        let used: Vec<_> = samples.zip(&verdicts).filter_map(judged).collect();
        CONFIG.with_borrow(|config| {
            let Priced { terms, undefined } = config
                .inference
                .terms(&used)
                .map_err(|e| PluginError::Input(format!("telemetry: {e}")))?;
            for line in undefined.warnings() {
                log(Level::Warn, &line);
            }
            let mut terms = terms.into_iter();
            let joined = verdicts.into_iter().map(|verdict| match verdict {
                Verdict::Value(scored) => {
                    // Where no term is defined, the inner reward is all there is to say.
                    let terms = terms.next().flatten().unwrap_or_default();
                    Verdict::Value(join(config, scored, terms))
                }
                Verdict::Skip(_) => verdict,
            });
            Ok(joined.collect())
        })
    }
}

/// A sample that the inner reward skips stays skipped: a total of cost terms alone would rank it
/// against totals that have a task reward in them.
fn join(config: &Config, scored: Scored, terms: Terms) -> Scored {
    let parts = scored.parts.into_iter().map(|p| (p.name, p.value));
    let (total, parts) = config.join(scored.total, parts.collect(), terms);
    let parts = parts.into_iter().map(|(name, value)| Part { name, value });
    Scored {
        total,
        parts: parts.collect(),
    }
}

fn of_inner(error: PluginError) -> PluginError {
    match error {
        PluginError::Config(text) => PluginError::Config(format!("inner: {text}")),
        PluginError::Input(text) => PluginError::Input(format!("inner: {text}")),
        PluginError::Internal(text) => PluginError::Internal(format!("inner: {text}")),
    }
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

export!(InferenceWrapper);
