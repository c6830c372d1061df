//! What a completion cost to generate, as terms of a reward: weights, terms, and what is undefined.
//!
//! Shared by `reward-inference`, which emits the terms alone, and `inference-wrapper`, which adds them
//! to another reward. Neither the sandbox nor JSON parts are known here.

use serde::Deserialize;

/// Bytes of a megabyte, as in `kv_weight`'s unit.
const MEGABYTE: f64 = 1e6;

/// The weight of each term; 0 switches one off. Costs are subtracted, rates are added.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Weights {
    /// Per millisecond from the arrival of the request to its last token.
    pub latency_weight: f64,
    /// Per sampled token.
    pub token_weight: f64,
    /// Per megabyte (10^6 bytes) of key-value cache at its longest.
    pub kv_weight: f64,
    /// Of the share of drafted tokens that were accepted, 0 to 1.
    pub accept_weight: f64,
    /// Of the share of prompt tokens found in the cache, 0 to 1.
    pub reuse_weight: f64,
}

impl Default for Weights {
    fn default() -> Self {
        Self {
            latency_weight: 0.001,
            token_weight: 0.001,
            kv_weight: 0.01,
            accept_weight: 1.0,
            reuse_weight: 0.5,
        }
    }
}

/// The telemetry of one completion that a term reads. Fields mean what they mean in the WIT.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Usage {
    pub latency_ms: f64,
    pub prompt_tokens: u32,
    pub cached_prompt_tokens: u32,
    pub generated_tokens: u32,
    pub draft_tokens: u32,
    pub accepted_tokens: u32,
    pub kv_bytes: u64,
}

/// The terms of one completion.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Terms {
    /// Sum of the weighted terms.
    pub total: f64,
    /// Raw values by name, before their weights; a term that is off or undefined has none.
    pub parts: Vec<(&'static str, f64)>,
}

/// Samples of a call, and how many lack a term because its denominator is 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Undefined {
    pub samples: u32,
    pub accept_rate: u32,
    pub cache_reuse: u32,
}

impl Weights {
    /// Refuses weights that are not finite; the error names the key.
    pub fn check(&self) -> Result<(), String> {
        for (key, weight) in [
            ("latency_weight", self.latency_weight),
            ("token_weight", self.token_weight),
            ("kv_weight", self.kv_weight),
            ("accept_weight", self.accept_weight),
            ("reuse_weight", self.reuse_weight),
        ] {
            finite(key, weight)?;
        }
        Ok(())
    }

    /// Rates times their weights less costs times theirs; docs/plugins.md has it as a formula. accept_rate
    /// is accepted over drafted tokens and cache_reuse is cached over all prompt tokens.
    ///
    /// A rate over no tokens is undefined: its term is left out, for 0 would say that every draft was
    /// refused, and is counted in `undefined`. The error says what is wrong with the telemetry.
    pub fn terms(&self, usage: &Usage, undefined: &mut Undefined) -> Result<Terms, String> {
        if !usage.latency_ms.is_finite() || usage.latency_ms < 0.0 {
            return Err(format!("latency_ms is {}", usage.latency_ms));
        }
        let accept_rate = rate(
            "accepted",
            usage.accepted_tokens,
            "draft",
            usage.draft_tokens,
        )?;
        let (cached, prompt) = (usage.cached_prompt_tokens, usage.prompt_tokens);
        let cache_reuse = rate("cached", cached, "prompt", prompt)?;
        #[expect(clippy::cast_precision_loss, reason = "exact below 2^53 bytes")]
        let kv_mb = usage.kv_bytes as f64 / MEGABYTE;
        undefined.samples += 1;
        let mut terms = Terms::default();
        terms.add("latency_ms", -self.latency_weight, usage.latency_ms);
        let generated = f64::from(usage.generated_tokens);
        terms.add("generated_tokens", -self.token_weight, generated);
        terms.add("kv_mb", -self.kv_weight, kv_mb);
        for (name, weight, rate, missing) in [
            (
                "accept_rate",
                self.accept_weight,
                accept_rate,
                &mut undefined.accept_rate,
            ),
            (
                "cache_reuse",
                self.reuse_weight,
                cache_reuse,
                &mut undefined.cache_reuse,
            ),
        ] {
            match rate {
                Some(rate) => terms.add(name, weight, rate),
                None => *missing += u32::from(weight != 0.0),
            }
        }
        Ok(terms)
    }
}

impl Terms {
    fn add(&mut self, name: &'static str, weight: f64, raw: f64) {
        if weight != 0.0 {
            self.total += weight * raw;
            self.parts.push((name, raw));
        }
    }
}

impl Undefined {
    /// A line for each term that some of the samples lack. Without counts, so that the same
    /// trouble is the same line at each call, which the host prints once.
    pub fn warnings(self) -> impl Iterator<Item = String> {
        let lines = [
            (
                self.accept_rate,
                "accept_rate",
                "no token was drafted",
                " (hint: --draft ngram, or accept_weight: 0)",
            ),
            (
                self.cache_reuse,
                "cache_reuse",
                "the prompt has no tokens",
                "",
            ),
        ];
        lines.into_iter().filter(|(missing, ..)| *missing > 0).map(
            move |(missing, term, why, hint)| {
                if missing == self.samples {
                    format!(
                        "{term} is undefined, {why}: left out of the total, not taken for 0{hint}"
                    )
                } else {
                    format!("{term} is undefined for some samples, {why}: left out of their totals")
                }
            },
        )
    }
}

/// Refuses a weight that is not finite.
pub fn finite(key: &str, weight: f64) -> Result<(), String> {
    if weight.is_finite() {
        Ok(())
    } else {
        Err(format!("{key} is {weight}, it must be finite"))
    }
}

/// `some / all`, or `None` where there is nothing to be a share of.
fn rate(part: &str, some: u32, whole: &str, all: u32) -> Result<Option<f64>, String> {
    if some > all {
        return Err(format!("{some} {part} of {all} {whole} tokens"));
    }
    Ok((all > 0).then(|| f64::from(some) / f64::from(all)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const USAGE: Usage = Usage {
        latency_ms: 250.0,
        prompt_tokens: 40,
        cached_prompt_tokens: 30,
        generated_tokens: 20,
        draft_tokens: 8,
        accepted_tokens: 6,
        kv_bytes: 2_500_000,
    };

    fn terms(weights: Weights, usage: Usage) -> (Terms, Undefined) {
        let mut undefined = Undefined::default();
        let terms = weights.terms(&usage, &mut undefined).unwrap();
        (terms, undefined)
    }

    #[test]
    fn defaults_are_the_reference_runs() {
        let (terms, undefined) = terms(Weights::default(), USAGE);
        // -0.25 - 0.02 - 0.025 + 0.75 + 0.375
        assert!((terms.total - 0.83).abs() < 1e-12, "{terms:?}");
        let parts = [
            ("latency_ms", 250.0),
            ("generated_tokens", 20.0),
            ("kv_mb", 2.5),
            ("accept_rate", 0.75),
            ("cache_reuse", 0.75),
        ];
        assert_eq!(terms.parts, parts);
        assert_eq!(undefined.warnings().count(), 0);
    }

    #[test]
    fn a_rate_over_nothing_is_no_zero() {
        let mut undefined = Undefined::default();
        let usage = Usage {
            draft_tokens: 0,
            accepted_tokens: 0,
            ..USAGE
        };
        let all_refused = Usage {
            accepted_tokens: 0,
            ..USAGE
        };
        let weights = Weights::default();
        let without = weights.terms(&usage, &mut undefined).unwrap();
        let refused = weights.terms(&all_refused, &mut undefined).unwrap();
        let names = |terms: &Terms| terms.parts.iter().map(|p| p.0).collect::<Vec<_>>();
        assert_eq!(
            names(&without),
            ["latency_ms", "generated_tokens", "kv_mb", "cache_reuse"]
        );
        assert_eq!(refused.parts[3], ("accept_rate", 0.0));
        let empty = Usage {
            prompt_tokens: 0,
            cached_prompt_tokens: 0,
            ..usage
        };
        weights.terms(&empty, &mut undefined).unwrap();
        let lines: Vec<_> = undefined.warnings().collect();
        assert_eq!(
            lines,
            [
                "accept_rate is undefined for some samples, no token was drafted: left out of their totals",
                "cache_reuse is undefined for some samples, the prompt has no tokens: left out of their totals"
            ]
        );
        let mut undefined = Undefined::default();
        weights.terms(&usage, &mut undefined).unwrap();
        let all = undefined.warnings().next().unwrap();
        assert_eq!(
            all,
            "accept_rate is undefined, no token was drafted: left out of the total, not taken for 0 \
             (hint: --draft ngram, or accept_weight: 0)"
        );
    }

    #[test]
    fn weight_0_switches_a_term_off() {
        let off: Weights = serde_json::from_str(
            r#"{"latency_weight": 0, "kv_weight": 0, "accept_weight": 0, "reuse_weight": -2}"#,
        )
        .unwrap();
        let usage = Usage {
            draft_tokens: 0,
            accepted_tokens: 0,
            ..USAGE
        };
        let (terms, undefined) = terms(off, usage);
        assert_eq!(
            terms.parts,
            [("generated_tokens", 20.0), ("cache_reuse", 0.75)]
        );
        assert!((terms.total + 1.52).abs() < 1e-12, "{terms:?}");
        assert_eq!(undefined.warnings().count(), 0);
    }

    #[test]
    fn refusals_name_key_and_telemetry() {
        let weights = Weights {
            kv_weight: f64::INFINITY,
            ..Weights::default()
        };
        assert_eq!(
            weights.check().unwrap_err(),
            "kv_weight is inf, it must be finite"
        );
        assert_eq!(Weights::default().check(), Ok(()));
        assert!(serde_json::from_str::<Weights>(r#"{"latency": 1}"#).is_err());
        let refuse = |usage: Usage| {
            let mut undefined = Undefined::default();
            Weights::default()
                .terms(&usage, &mut undefined)
                .unwrap_err()
        };
        assert_eq!(
            refuse(Usage {
                accepted_tokens: 9,
                ..USAGE
            }),
            "9 accepted of 8 draft tokens"
        );
        assert_eq!(
            refuse(Usage {
                prompt_tokens: 3,
                ..USAGE
            }),
            "30 cached of 3 prompt tokens"
        );
        assert_eq!(
            refuse(Usage {
                latency_ms: f64::NAN,
                ..USAGE
            }),
            "latency_ms is NaN"
        );
    }
}
