//! What a completion cost to generate, as terms of a reward: weights, terms, and what is undefined.
//!
//! Shared by `reward-inference`, which emits the terms alone, and `inference-wrapper`, which adds them
//! to another reward. Neither the sandbox nor JSON parts are known here.

use std::collections::BTreeMap;

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
    /// Raw values by name, before their weights; a term that is off or undefined has none, also where the
    /// mean of the group stands in for it in the total.
    pub parts: Vec<(&'static str, f64)>,
}

/// The completions of a call, priced.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Priced {
    /// One per sample; `None` where every term that is on is undefined for the whole question.
    pub terms: Vec<Option<Terms>>,
    pub undefined: Undefined,
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

    /// Rates times their weights less costs times theirs, for all samples of a call, each with the position
    /// of its question; docs/plugins.md has it as a formula. accept_rate is accepted over drafted tokens and
    /// cache_reuse is cached over all prompt tokens.
    ///
    /// A rate over no tokens is undefined. Leaving its term out of one total of a group would be the same as a
    /// rate of 0, so the mean over the question's samples that have one stands in, which no advantage
    /// feels. Where none has one there is no term. Both are counted.
    ///
    /// # Errors
    /// What is wrong with the telemetry.
    pub fn terms(&self, samples: &[(u32, Usage)]) -> Result<Priced, String> {
        let mut accept_rates = Vec::with_capacity(samples.len());
        let mut cache_reuses = Vec::with_capacity(samples.len());
        for (question, usage) in samples {
            if !usage.latency_ms.is_finite() || usage.latency_ms < 0.0 {
                return Err(format!("latency_ms is {}", usage.latency_ms));
            }
            let (accepted, drafted) = (usage.accepted_tokens, usage.draft_tokens);
            accept_rates.push((*question, rate("accepted", accepted, "draft", drafted)?));
            let (cached, prompt) = (usage.cached_prompt_tokens, usage.prompt_tokens);
            cache_reuses.push((*question, rate("cached", cached, "prompt", prompt)?));
        }
        let count = |weight: f64, rates: &[(u32, Option<f64>)]| {
            let missing = rates.iter().filter(|(_, rate)| rate.is_none());
            missing.fold(0, |n, _| n + u32::from(weight != 0.0))
        };
        let undefined = Undefined {
            samples: samples.iter().fold(0, |n, _| n + 1),
            accept_rate: count(self.accept_weight, &accept_rates),
            cache_reuse: count(self.reuse_weight, &cache_reuses),
        };
        let (accepts, reuses) = (means(&accept_rates), means(&cache_reuses));
        let rates = accept_rates.into_iter().zip(cache_reuses);
        let terms = samples.iter().zip(rates).map(|((question, usage), rates)| {
            let ((_, accept_rate), (_, cache_reuse)) = rates;
            let accept = (accept_rate, accepts.get(question).copied());
            let reuse = (cache_reuse, reuses.get(question).copied());
            self.one(usage, accept, reuse)
        });
        Ok(Priced {
            terms: terms.collect(),
            undefined,
        })
    }

    /// The terms of one sample; a rate comes with its mean over the question's samples that have one.
    fn one(
        &self,
        usage: &Usage,
        accept: (Option<f64>, Option<f64>),
        reuse: (Option<f64>, Option<f64>),
    ) -> Option<Terms> {
        #[expect(clippy::cast_precision_loss, reason = "exact below 2^53 bytes")]
        let kv_mb = usage.kv_bytes as f64 / MEGABYTE;
        let mut terms = Terms::default();
        terms.add("latency_ms", -self.latency_weight, usage.latency_ms);
        let generated = f64::from(usage.generated_tokens);
        terms.add("generated_tokens", -self.token_weight, generated);
        terms.add("kv_mb", -self.kv_weight, kv_mb);
        let (mut replaced, mut missing) = (0, 0);
        for (name, weight, (rate, mean)) in [
            ("accept_rate", self.accept_weight, accept),
            ("cache_reuse", self.reuse_weight, reuse),
        ] {
            match (rate, mean) {
                _ if weight == 0.0 => {}
                (Some(rate), _) => terms.add(name, weight, rate),
                (None, Some(mean)) => {
                    terms.total += weight * mean;
                    replaced += 1;
                }
                (None, None) => missing += 1,
            }
        }
        let nothing = terms.parts.is_empty() && replaced == 0;
        (!nothing || missing == 0).then_some(terms)
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
                    format!(
                        "{term} is undefined for some samples, {why}: the mean of their group stands in"
                    )
                }
            },
        )
    }
}

/// Mean rate of each question that has one.
fn means(rates: &[(u32, Option<f64>)]) -> BTreeMap<u32, f64> {
    let mut sums: BTreeMap<u32, (f64, f64)> = BTreeMap::new();
    for (question, rate) in rates {
        if let Some(rate) = rate {
            let (sum, n) = sums.entry(*question).or_default();
            *sum += rate;
            *n += 1.0;
        }
    }
    let mean = |(question, (sum, n))| (question, sum / n);
    sums.into_iter().map(mean).collect()
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
        let Priced { terms, undefined } = weights.terms(&[(0, usage)]).unwrap();
        (terms[0].clone().unwrap(), undefined)
    }

    fn drafted(accepted_tokens: u32, draft_tokens: u32) -> Usage {
        Usage {
            draft_tokens,
            accepted_tokens,
            ..USAGE
        }
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
    fn a_rate_over_nothing_counts_with_the_mean_of_its_question() {
        let samples = [
            (0, drafted(6, 8)),
            (1, drafted(0, 8)),
            (0, drafted(0, 0)),
            (0, drafted(2, 8)),
        ];
        let Priced { terms, undefined } = Weights::default().terms(&samples).unwrap();
        let terms: Vec<Terms> = terms.into_iter().map(Option::unwrap).collect();
        let names = |terms: &Terms| terms.parts.iter().map(|p| p.0).collect::<Vec<_>>();
        let without = ["latency_ms", "generated_tokens", "kv_mb", "cache_reuse"];
        assert_eq!(names(&terms[2]), without);
        // A question of its own has refused everything, which is a rate like another.
        assert_eq!(terms[1].parts[3], ("accept_rate", 0.0));
        // 0.75 and 0.25: centred in the group, the mean is nothing.
        let mean = (terms[0].total + terms[3].total) / 2.0;
        assert!((terms[2].total - mean).abs() < 1e-12, "{terms:?}");
        assert!((terms[2].total - 0.58).abs() < 1e-12, "{terms:?}");
        let lines: Vec<_> = undefined.warnings().collect();
        let line = "accept_rate is undefined for some samples, no token was drafted: the mean of their \
                    group stands in";
        assert_eq!(lines, [line]);
    }

    #[test]
    fn a_rate_that_no_sample_of_the_question_has_is_no_term() {
        let empty = Usage {
            prompt_tokens: 0,
            cached_prompt_tokens: 0,
            ..drafted(0, 0)
        };
        let samples = [(0, drafted(0, 0)), (1, empty), (0, drafted(0, 0))];
        let Priced { terms, undefined } = Weights::default().terms(&samples).unwrap();
        let total = |i: usize| terms[i].as_ref().unwrap().total;
        // -0.25 - 0.02 - 0.025, and 0.375 of the cache.
        assert!((total(0) - 0.08).abs() < 1e-12 && total(2) == total(0));
        assert!((total(1) + 0.295).abs() < 1e-12);
        let lines: Vec<_> = undefined.warnings().collect();
        let all = "accept_rate is undefined, no token was drafted: left out of the total, not taken for 0 \
                   (hint: --draft ngram, or accept_weight: 0)";
        let some = "cache_reuse is undefined for some samples, the prompt has no tokens: the mean of their \
                    group stands in";
        assert_eq!(lines, [all, some]);
    }

    #[test]
    fn a_question_of_which_nothing_is_defined_has_no_terms() {
        let only: Weights = serde_json::from_str(
            r#"{"latency_weight": 0, "token_weight": 0, "kv_weight": 0, "reuse_weight": 0}"#,
        )
        .unwrap();
        let samples = [(0, drafted(0, 0)), (1, drafted(0, 0)), (1, drafted(4, 8))];
        let found = only.terms(&samples).unwrap().terms;
        let half = |parts: &[(&'static str, f64)]| {
            Some(Terms {
                total: 0.5,
                parts: parts.to_vec(),
            })
        };
        assert_eq!(found, [None, half(&[]), half(&[("accept_rate", 0.5)])]);
        // With every term off 0 is what was asked for.
        let off = Weights {
            accept_weight: 0.0,
            ..only
        };
        let found = off.terms(&samples[..1]).unwrap().terms;
        assert_eq!(found, [Some(Terms::default())]);
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
        let refuse = |usage: Usage| Weights::default().terms(&[(0, usage)]).unwrap_err();
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
