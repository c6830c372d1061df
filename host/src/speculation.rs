//! What drafts came to: counts over completions, under vLLM's names. Rates are of the counts, and undefined
//! where nothing was drafted.

use crate::types::Completion;

/// Counts of speculative decoding, added up over completions.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Speculation {
    /// Verifications of a draft.
    pub drafts: u64,
    /// Tokens drafted, and those of them that were accepted.
    pub draft_tokens: u64,
    pub accepted_tokens: u64,
    /// Drafts whose token at this position, from 0, was accepted.
    pub accepted_per_pos: Vec<u64>,
}

impl Speculation {
    /// The counts of some completions together.
    pub fn of<'a>(completions: impl Iterator<Item = &'a Completion>) -> Self {
        let mut out = Self::default();
        completions.for_each(|completion| out.add(completion));
        out
    }

    /// Counts one more completion.
    pub fn add(&mut self, completion: &Completion) {
        self.drafts += u64::from(completion.drafts);
        self.draft_tokens += u64::from(completion.telemetry.draft_tokens);
        self.accepted_tokens += u64::from(completion.telemetry.accepted_tokens);
        let positions = completion.accepted_per_pos.len();
        if positions > self.accepted_per_pos.len() {
            self.accepted_per_pos.resize(positions, 0);
        }
        let pairs = self
            .accepted_per_pos
            .iter_mut()
            .zip(&completion.accepted_per_pos);
        pairs.for_each(|(sum, n)| *sum += u64::from(*n));
    }

    /// Share of the drafted tokens that were accepted, 0 to 1; `None` where none was drafted.
    pub fn acceptance_rate(&self) -> Option<f64> {
        (self.draft_tokens > 0).then(|| self.accepted_tokens as f64 / self.draft_tokens as f64)
    }

    /// The rate with its counts, for people; `None` where none was drafted.
    pub fn acceptance(&self) -> Option<String> {
        let rate = self.acceptance_rate()?;
        Some(format!(
            "accept_rate={:.1}% ({}/{} draft tokens accepted)",
            100.0 * rate,
            self.accepted_tokens,
            self.draft_tokens,
        ))
    }

    /// `(name, value)` for the metrics file; empty where nothing was drafted.
    ///
    /// `num_accepted_tokens_per_pos/I` is vLLM's count, `accepted_per_pos/I` its share of the drafts.
    pub fn metrics(&self) -> Vec<(String, f64)> {
        let Some(rate) = self.acceptance_rate() else {
            return Vec::new();
        };
        let (drafts, accepted) = (self.drafts as f64, self.accepted_tokens as f64);
        let mut out: Vec<(String, f64)> = [
            ("num_drafts", drafts),
            ("num_draft_tokens", self.draft_tokens as f64),
            ("num_accepted_tokens", accepted),
            ("acceptance_rate", rate),
            // The token that every verification yields counts, as in vLLM.
            ("mean_accepted_length", 1.0 + accepted / drafts),
        ]
        .map(|(name, value)| (format!("spec_decode/{name}"), value))
        .into();
        for (position, count) in self.accepted_per_pos.iter().enumerate() {
            let (count, name) = (*count as f64, "spec_decode/num_accepted_tokens_per_pos");
            out.push((format!("{name}/{position}"), count));
            let share = format!("spec_decode/accepted_per_pos/{position}");
            out.push((share, count / drafts));
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{Finish, Telemetry};

    fn completion(drafts: u32, draft_tokens: u32, accepted_per_pos: &[u32]) -> Completion {
        Completion {
            request: 0,
            index: 0,
            tokens: Vec::new(),
            logprobs: Vec::new(),
            policy_logprobs: Vec::new(),
            text: String::new(),
            finish: Finish::Stop,
            telemetry: Telemetry {
                draft_tokens,
                accepted_tokens: accepted_per_pos.iter().sum(),
                ..Telemetry::default()
            },
            drafts,
            accepted_per_pos: accepted_per_pos.to_vec(),
            top: Vec::new(),
        }
    }

    #[test]
    fn counts_add_up_and_rates_are_of_the_sums() {
        let completions = [
            completion(2, 4, &[1]),
            completion(0, 0, &[]),
            completion(2, 6, &[2, 1]),
        ];
        let all = Speculation::of(completions.iter());
        let text = "accept_rate=40.0% (4/10 draft tokens accepted)";
        assert_eq!(all.acceptance().as_deref(), Some(text));
        let metrics = all.metrics();
        let found: Vec<_> = metrics.iter().map(|(n, v)| (n.as_str(), *v)).collect();
        let expected = [
            ("spec_decode/num_drafts", 4.0),
            ("spec_decode/num_draft_tokens", 10.0),
            ("spec_decode/num_accepted_tokens", 4.0),
            ("spec_decode/acceptance_rate", 0.4),
            ("spec_decode/mean_accepted_length", 2.0),
            ("spec_decode/num_accepted_tokens_per_pos/0", 3.0),
            ("spec_decode/accepted_per_pos/0", 0.75),
            ("spec_decode/num_accepted_tokens_per_pos/1", 1.0),
            ("spec_decode/accepted_per_pos/1", 0.25),
        ];
        assert_eq!(found, expected);
    }

    #[test]
    fn without_a_draft_there_is_no_rate() {
        let none = Speculation::of([completion(0, 0, &[])].iter());
        assert_eq!((none.acceptance(), none.metrics()), (None, Vec::new()));
    }
}
