//! What a judge was asked and what that cost, and the budget that the operator has set.

use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::Serialize;

use super::JudgeError;
use crate::config::JudgeConfig;

/// Counts since the judge was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Usage {
    /// Questions of plugins.
    pub asked: u64,
    /// Those answered from the cache, or by the same question of the same batch.
    pub cached: u64,
    /// Requests sent to the endpoint, retries included; for a model of ours, prompts generated from.
    pub requests: u64,
    /// Requests after a first one that failed.
    pub retries: u64,
    /// Questions without an answer.
    pub failures: u64,
    /// Tokens asked and answered, as the endpoint counts them, or estimated where it does not.
    pub prompt_tokens: u64,
    pub completion_tokens: u64,
    /// By the prices of the config.
    pub cost: f64,
    /// Wall time that plugins waited.
    pub seconds: f64,
}

impl Usage {
    /// What came after `before`.
    pub fn since(&self, before: &Self) -> Self {
        Self {
            asked: self.asked - before.asked,
            cached: self.cached - before.cached,
            requests: self.requests - before.requests,
            retries: self.retries - before.retries,
            failures: self.failures - before.failures,
            prompt_tokens: self.prompt_tokens - before.prompt_tokens,
            completion_tokens: self.completion_tokens - before.completion_tokens,
            cost: self.cost - before.cost,
            seconds: self.seconds - before.seconds,
        }
    }

    /// As `judge/NAME/…` of a metrics line has it.
    pub fn metrics(&self) -> [(&'static str, f64); 9] {
        [
            ("asked", self.asked as f64),
            ("cached", self.cached as f64),
            ("requests", self.requests as f64),
            ("retries", self.retries as f64),
            ("failures", self.failures as f64),
            ("prompt_tokens", self.prompt_tokens as f64),
            ("completion_tokens", self.completion_tokens as f64),
            ("cost", self.cost),
            ("seconds", self.seconds),
        ]
    }
}

/// The account of one judge.
pub(super) struct Ledger {
    max_requests: Option<u64>,
    max_tokens: Option<u64>,
    prompt_price: f64,
    completion_price: f64,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    usage: Usage,
    /// Requests and tokens of earlier sessions of the run.
    earlier: (u64, u64),
    /// Tokens that requests in flight may take.
    reserved: u64,
}

/// Tokens set aside for a request; given back when it ends.
pub(super) struct Reservation<'l> {
    ledger: &'l Ledger,
    tokens: u64,
}

impl Ledger {
    pub(super) fn new(config: &JudgeConfig) -> Self {
        Self {
            max_requests: config.max_requests,
            max_tokens: config.max_tokens,
            prompt_price: config.prompt_price,
            completion_price: config.completion_price,
            state: Mutex::default(),
        }
    }

    pub(super) fn usage(&self) -> Usage {
        self.lock().usage
    }

    /// Counts what earlier sessions have spent of the budget.
    pub(super) fn spent_earlier(&self, requests: u64, tokens: u64) {
        self.lock().earlier = (requests, tokens);
    }

    /// Counts a batch.
    pub(super) fn batch(&self, asked: u64, cached: u64, failures: u64, seconds: f64) {
        let usage = &mut self.lock().usage;
        usage.asked += asked;
        usage.cached += cached;
        usage.failures += failures;
        usage.seconds += seconds;
    }

    /// Takes a request and up to `tokens` out of the budget.
    ///
    /// # Errors
    /// [`JudgeError::Exhausted`], and nothing is taken.
    pub(super) fn reserve(
        &self,
        tokens: u64,
        is_retry: bool,
    ) -> Result<Reservation<'_>, JudgeError> {
        let mut state = self.lock();
        let (requests, spent) = state.spent();
        if let Some(limit) = self.max_requests.filter(|limit| requests >= *limit) {
            let why = format!("all {limit} requests of max_requests are made");
            return Err(JudgeError::Exhausted(why));
        }
        let wanted = spent + state.reserved + tokens;
        if let Some(limit) = self.max_tokens.filter(|limit| wanted > *limit) {
            let why = format!(
                "{spent} of {limit} tokens of max_tokens are spent, and the next request may take {tokens}"
            );
            return Err(JudgeError::Exhausted(why));
        }
        state.usage.requests += 1;
        state.usage.retries += u64::from(is_retry);
        state.reserved += tokens;
        Ok(Reservation {
            ledger: self,
            tokens,
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Requests and tokens of the whole run.
    fn spent(&self) -> (u64, u64) {
        let Usage {
            requests,
            prompt_tokens,
            completion_tokens,
            ..
        } = self.usage;
        let (earlier_requests, earlier_tokens) = self.earlier;
        (
            earlier_requests + requests,
            earlier_tokens + prompt_tokens + completion_tokens,
        )
    }
}

impl Reservation<'_> {
    /// Books what the request took.
    pub(super) fn settle(self, prompt_tokens: u64, completion_tokens: u64) {
        let ledger = self.ledger;
        let usage = &mut ledger.lock().usage;
        usage.prompt_tokens += prompt_tokens;
        usage.completion_tokens += completion_tokens;
        usage.cost += (prompt_tokens as f64 * ledger.prompt_price
            + completion_tokens as f64 * ledger.completion_price)
            / 1e6;
    }
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        self.ledger.lock().reserved -= self.tokens;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_budget_is_never_overdrawn() {
        let ledger = Ledger::new(&JudgeConfig {
            max_requests: Some(3),
            max_tokens: Some(100),
            prompt_price: 2.0,
            completion_price: 10.0,
            ..JudgeConfig::default()
        });
        let first = ledger.reserve(60, false).unwrap();
        // What is in flight may take all it asked for.
        let error = ledger.reserve(41, false).err().unwrap();
        assert_eq!(
            error.to_string(),
            "the judge's budget is used up: 0 of 100 tokens of max_tokens are spent, and the next \
             request may take 41"
        );
        first.settle(20, 5);
        drop(ledger.reserve(75, true).unwrap());
        let usage = ledger.usage();
        assert_eq!(
            (usage.requests, usage.retries, usage.prompt_tokens),
            (2, 1, 20)
        );
        assert!((usage.cost - 90e-6).abs() < 1e-12, "{}", usage.cost);
        drop(ledger.reserve(1, true).unwrap());
        let error = ledger.reserve(1, false).err().unwrap();
        assert!(matches!(error, JudgeError::Exhausted(why) if why.contains("all 3 requests")));
    }

    #[test]
    fn earlier_sessions_count_for_the_budget_and_not_for_usage() {
        let ledger = Ledger::new(&JudgeConfig {
            max_tokens: Some(100),
            ..JudgeConfig::default()
        });
        ledger.spent_earlier(7, 99);
        assert!(ledger.reserve(2, false).is_err());
        ledger.reserve(1, false).unwrap().settle(1, 0);
        assert_eq!(ledger.usage().requests, 1);
    }
}
