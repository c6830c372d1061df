//! An OpenAI-compatible endpoint: one question at a time to its end, over attempts, waits and limits. How a batch is
//! made of questions is not its business.

use std::{
    error::Error,
    hash::{BuildHasher, RandomState},
    sync::Arc,
    time::{Duration, Instant},
};

use reqwest::{
    Client, Response, StatusCode,
    header::{AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderValue, RETRY_AFTER},
    redirect::Policy,
};
use tokio::{
    sync::Semaphore,
    time::{sleep, timeout, timeout_at},
};

use super::{
    JudgeError, JudgeSetupError,
    health::{Health, Pass},
    ledger::Ledger,
    rate::Rate,
    wire::{self, Answer, Read, Wrong},
};
use crate::{config::JudgeConfig, error::one_line};

/// Of one attempt, to connect.
const CONNECT: Duration = Duration::from_secs(10);
/// Longest wait between attempts that the endpoint has not asked for.
const MOST_BACKOFF: Duration = Duration::from_secs(30);
/// Bytes of a refusal that are read, and characters of it that are told.
const COMPLAINT_BYTES: usize = 16 << 10;
const COMPLAINT_CHARS: usize = 200;

/// See the file header.
pub(super) struct Endpoint {
    base: String,
    client: Client,
    authorization: Option<HeaderValue>,
    /// The same as it was given, to be taken out of texts.
    secret: Option<String>,
    permits: Semaphore,
    rate: Rate,
    health: Health,
    ledger: Arc<Ledger>,
    timeout: Duration,
    backoff: Duration,
    max_retries: u32,
    max_bytes: usize,
}

/// A request and how to read its answer.
pub(super) struct Call<T> {
    pub(super) path: &'static str,
    pub(super) body: String,
    /// Tokens that it may take, asked and answered.
    pub(super) estimate: u64,
    /// Values that the answer must have.
    pub(super) values: usize,
    pub(super) read: Read<T>,
}

/// What came of one attempt instead of an answer.
enum Fault {
    /// Not in the time of one attempt.
    Slow,
    /// May go better next time; the wait is the endpoint's wish.
    Transient {
        why: String,
        wait: Option<Duration>,
    },
    /// Would not go better.
    Useless(String),
    Refused(String),
    /// No question would go better: there is no money, or no key that the endpoint knows.
    Closed {
        why: JudgeError,
        /// It may be about the question after all.
        is_guess: bool,
    },
}

impl Endpoint {
    /// Connects to nothing yet. `key`: the variable it is from, and its value.
    ///
    /// # Errors
    /// A key that no header can carry, a client that cannot be built.
    pub(super) fn new(
        judge: &str,
        base: &str,
        config: &JudgeConfig,
        key: Option<(&str, String)>,
        ledger: Arc<Ledger>,
    ) -> Result<Self, JudgeSetupError> {
        let authorization = key.as_ref().map(|(variable, key)| {
            let header = HeaderValue::from_str(&format!("Bearer {key}"));
            let mut header = header.map_err(|_invalid| JudgeSetupError::BadKey {
                judge: judge.to_owned(),
                variable: (*variable).to_owned(),
            })?;
            header.set_sensitive(true);
            Ok(header)
        });
        // A proxy from the environment would see keys and questions that were meant for the endpoint, and a redirect
        // would send them elsewhere.
        let client = Client::builder()
            .user_agent(concat!("grpo-host/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(CONNECT)
            .redirect(Policy::none())
            .no_proxy()
            .build()
            .map_err(|reason| JudgeSetupError::Client {
                judge: judge.to_owned(),
                reason,
            })?;
        let limit = config.requests_per_minute.map(u64::from);
        Ok(Self {
            base: base.trim_end_matches('/').to_owned(),
            client,
            authorization: authorization.transpose()?,
            secret: key.map(|(_, key)| key),
            permits: Semaphore::new(config.concurrency as usize),
            rate: Rate::new(limit, config.tokens_per_minute),
            health: Health::new(),
            ledger,
            timeout: Duration::from_millis(config.timeout_ms),
            backoff: Duration::from_millis(config.backoff_ms),
            max_retries: config.max_retries,
            max_bytes: config.max_response_kib as usize * 1024,
        })
    }

    /// Where the questions go.
    pub(super) fn base(&self) -> &str {
        &self.base
    }

    /// Asks until there is an answer, a refusal, no attempt left or no time.
    pub(super) async fn ask<T>(
        &self,
        call: &Call<T>,
        deadline: Instant,
    ) -> Result<Vec<T>, JudgeError> {
        let attempts = self.attempts(call, deadline);
        let answered = timeout_at(deadline.into(), attempts).await;
        answered.unwrap_or(Err(JudgeError::Timeout))
    }

    async fn attempts<T>(&self, call: &Call<T>, deadline: Instant) -> Result<Vec<T>, JudgeError> {
        let mut pass = None;
        for attempt in 0.. {
            let permit = self.permits.acquire().await;
            let ticket = match &pass {
                // Known to be resting, it need not wait for its place.
                None => {
                    let pass = pass.insert(self.health.admit()?);
                    let ticket = self.rate.admit(call.estimate, deadline).await;
                    pass.sent();
                    ticket
                }
                Some(_) => {
                    if let Err(in_vain) = self.health.check() {
                        pass.into_iter().for_each(Pass::withdraw);
                        return Err(in_vain);
                    }
                    self.rate.admit(call.estimate, deadline).await
                }
            };
            // What our own limits refuse says nothing of the endpoint.
            let Some(ticket) = ticket else {
                pass.into_iter().for_each(Pass::withdraw);
                return Err(JudgeError::Timeout);
            };
            // Others may have found out while this one waited for its place.
            let reserved = self.health.is_open();
            let reserved = reserved.and_then(|()| self.ledger.reserve(call.estimate, attempt > 0));
            let reservation = match reserved {
                Ok(reservation) => reservation,
                Err(error) => {
                    pass.into_iter().for_each(Pass::withdraw);
                    return Err(error);
                }
            };
            let fault = match timeout(self.timeout, self.attempt(call)).await {
                Ok(Ok(answer)) => {
                    let (prompt, completion) = tokens(&answer, call.estimate);
                    reservation.settle(prompt, completion);
                    self.rate.settle(&ticket, prompt + completion);
                    pass.into_iter().for_each(|pass| pass.answered());
                    return Ok(answer.value);
                }
                Ok(Err(fault)) => fault,
                Err(_elapsed) => Fault::Slow,
            };
            drop(reservation);
            let Some(wait) = self.wait(&fault, attempt, deadline) else {
                // Before the next one has the permit: it may be in vain now.
                pass.into_iter().for_each(|pass| fault.tell(pass));
                return Err(fault.into());
            };
            drop(permit);
            sleep(wait).await;
        }
        Err(JudgeError::Timeout)
    }

    /// How long to wait before the next attempt; `None`: there is none. Exponential backoff with full jitter (Brooker,
    /// "Exponential Backoff and Jitter", 2015), on top of what the endpoint asks for.
    fn wait(&self, fault: &Fault, attempt: u32, deadline: Instant) -> Option<Duration> {
        let asked = match fault {
            Fault::Slow => Duration::ZERO,
            Fault::Transient { wait, .. } => wait.unwrap_or_default(),
            Fault::Useless(_) | Fault::Refused(_) | Fault::Closed { .. } => return None,
        };
        if !asked.is_zero() {
            // It is told to all that ask it. An instant too far off for the clock is one that nobody waits for.
            self.rate
                .hold(Instant::now().checked_add(asked).unwrap_or(deadline));
        }
        if attempt >= self.max_retries {
            return None;
        }
        let most = self.backoff.saturating_mul(2_u32.saturating_pow(attempt));
        let wait = asked.saturating_add(most.min(MOST_BACKOFF).mul_f64(random_share()));
        let left = deadline.saturating_duration_since(Instant::now());
        (wait < left).then_some(wait)
    }

    async fn attempt<T>(&self, call: &Call<T>) -> Result<Answer<Vec<T>>, Fault> {
        let url = format!("{}{}", self.base, call.path);
        let mut request = self.client.post(url).body(call.body.clone());
        request = request.header(CONTENT_TYPE, "application/json");
        if let Some(authorization) = &self.authorization {
            request = request.header(AUTHORIZATION, authorization.clone());
        }
        let response = request.send().await.map_err(|error| self.network(error))?;
        let status = response.status();
        if !status.is_success() {
            return Err(self.refusal(response).await);
        }
        let body = self.read(response, self.max_bytes).await?;
        (call.read)(&body, call.values).map_err(|wrong| match wrong {
            Wrong::Nonsense(why) => Fault::Transient {
                why: self.clean(&format!("not an answer: {why}")),
                wait: None,
            },
            Wrong::Refused(why) => Fault::Refused(self.clean(&why)),
        })
    }

    /// The body, if it is no larger than `most`; what is beyond is not waited for.
    async fn read(&self, mut response: Response, most: usize) -> Result<Vec<u8>, Fault> {
        let mut body = Vec::new();
        while let Some(chunk) = response
            .chunk()
            .await
            .map_err(|error| self.network(error))?
        {
            if body.len() + chunk.len() > most {
                let why = format!("its answer is larger than {most} bytes");
                return Err(Fault::Useless(why));
            }
            body.extend_from_slice(&chunk);
        }
        Ok(body)
    }

    /// What a status other than success means.
    async fn refusal(&self, response: Response) -> Fault {
        let status = response.status();
        let wait = retry_after(response.headers());
        // Whatever is wrong with the explanation, the status stands.
        let body = self
            .read(response, COMPLAINT_BYTES)
            .await
            .unwrap_or_default();
        let (message, no_money) = wire::complaint(&body);
        let why = self.clean(&format!("HTTP {} {message}", status.as_u16()));
        let for_good = || format!("{why}; it is asked no more in this run");
        match status {
            // OpenAI's word for an account without money; waiting does not help.
            status if no_money || status == StatusCode::PAYMENT_REQUIRED => Fault::Closed {
                why: JudgeError::Exhausted(for_good()),
                is_guess: false,
            },
            StatusCode::UNAUTHORIZED => Fault::Closed {
                why: JudgeError::Refused(for_good()),
                is_guess: false,
            },
            // Some say so of a question that their moderation does not like, to a key that they know.
            StatusCode::FORBIDDEN if !self.health.has_answered() => Fault::Closed {
                why: JudgeError::Refused(for_good()),
                is_guess: true,
            },
            StatusCode::REQUEST_TIMEOUT
            | StatusCode::CONFLICT
            | StatusCode::TOO_EARLY
            | StatusCode::TOO_MANY_REQUESTS => Fault::Transient { why, wait },
            status if status.is_server_error() => Fault::Transient { why, wait },
            status if status.is_client_error() => Fault::Refused(why),
            status if status.is_redirection() => {
                Fault::Useless(format!("{why}: redirects are not followed"))
            }
            _ => Fault::Useless(why),
        }
    }

    fn network(&self, error: reqwest::Error) -> Fault {
        let error = error.without_url();
        // The outermost text alone says as little as "error sending request".
        let mut why = error.to_string();
        let mut cause = error.source();
        while let Some(inner) = cause {
            why = format!("{why}: {inner}");
            cause = inner.source();
        }
        let why = self.clean(&why);
        Fault::Transient { why, wait: None }
    }

    /// A text from outside as it may be told: without the key, short, on one line.
    fn clean(&self, text: &str) -> String {
        let text = match &self.secret {
            Some(secret) => text.replace(secret, "…"),
            None => text.to_owned(),
        };
        let line = one_line(&text);
        let end = line.char_indices().nth(COMPLAINT_CHARS);
        let end = end.map_or(line.len(), |(at, _)| at);
        line[..end].trim_end().to_owned()
    }
}

impl Fault {
    /// What it says of the endpoint.
    fn tell(&self, pass: Pass<'_>) {
        match self {
            Self::Slow => pass.failed("no answer in time"),
            Self::Transient { why, .. } => pass.failed(why),
            Self::Useless(_) | Self::Refused(_) => pass.refused(),
            Self::Closed { why, is_guess } => pass.closed(why.clone(), *is_guess),
        }
    }
}

impl From<Fault> for JudgeError {
    fn from(fault: Fault) -> Self {
        match fault {
            Fault::Slow => Self::Timeout,
            Fault::Transient { why, .. } | Fault::Useless(why) => Self::Unavailable(why),
            Fault::Refused(why) => Self::Refused(why),
            Fault::Closed { why, .. } => why,
        }
    }
}

/// Tokens asked and answered. Where the endpoint does not count, a call is taken to have cost what it might.
fn tokens<T>(answer: &Answer<T>, estimate: u64) -> (u64, u64) {
    let (prompt, completion) = (answer.prompt_tokens, answer.completion_tokens);
    match (prompt.map(u64::from), completion.map(u64::from)) {
        (Some(prompt), Some(completion)) => (prompt, completion),
        (Some(prompt), None) => (prompt, estimate.saturating_sub(prompt)),
        (None, completion) => {
            let completion = completion.unwrap_or(0);
            (estimate.saturating_sub(completion), completion)
        }
    }
}

/// Seconds, or OpenAI's milliseconds. A date is not read: judging by another clock, it may be any time.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let number = |name: &str| -> Option<f64> { headers.get(name)?.to_str().ok()?.parse().ok() };
    let milliseconds = number("retry-after-ms").map(|ms| ms / 1e3);
    let seconds = milliseconds.or_else(|| number(RETRY_AFTER.as_str()))?;
    Duration::try_from_secs_f64(seconds).ok()
}

/// In [0, 1). The standard library's hasher is seeded by the system; nothing here needs a better generator.
fn random_share() -> f64 {
    (RandomState::new().hash_one(0_u8) >> 11) as f64 / (1_u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_wish_for_a_wait_is_read_in_seconds_and_milliseconds() {
        let of = |pairs: &[(&'static str, &'static str)]| {
            let pairs = pairs.iter();
            let headers =
                pairs.map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap()));
            retry_after(&headers.collect())
        };
        assert_eq!(of(&[("retry-after", "3")]), Some(Duration::from_secs(3)));
        let both = [("retry-after", "3"), ("retry-after-ms", "250")];
        assert_eq!(of(&both), Some(Duration::from_millis(250)));
        for odd in ["Wed, 21 Oct 2026 07:28:00 GMT", "-1", "NaN", "1e400", ""] {
            assert_eq!(of(&[("retry-after", odd)]), None, "{odd}");
        }
    }

    #[test]
    fn shares_are_spread_over_the_unit_interval() {
        let shares: Vec<f64> = (0..1000).map(|_| random_share()).collect();
        assert!(shares.iter().all(|s| (0.0..1.0).contains(s)));
        let mean = shares.iter().sum::<f64>() / 1000.0;
        // Ten standard errors.
        assert!((mean - 0.5).abs() < 0.1, "{mean}");
    }
}
