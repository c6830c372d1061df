//! The `http` grant: requests of guests to hosts that the operator has named, with an end to time, bytes and redirects.
//!
//! A name is resolved here, once a connection, and connected to at the addresses that were looked at, so that a name
//! whose address changes between the look and the connection gains nothing (DNS rebinding).

mod resolver;

use std::io::Read;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use reqwest::blocking::{Client, Response as Answer};
use reqwest::header::{HeaderMap, HeaderName, HeaderValue, LOCATION};
use reqwest::redirect::Policy;
use reqwest::{Method, StatusCode, Url};

use super::rules::{HostRule, Nearness, admit};
use resolver::Resolver;
pub(super) use resolver::{Lookup, system_lookup};

/// Requests of one call, and how many of them are made at the same time.
const MAX_REQUESTS: usize = 256;
const SIDE_BY_SIDE: usize = 8;
/// Redirects of one request.
const MAX_REDIRECTS: usize = 5;
const MAX_URL_BYTES: usize = 8 << 10;
const MAX_REQUEST_BYTES: usize = 1 << 20;
/// Bytes of headers, of a request as of a response.
const MAX_HEADER_BYTES: usize = 64 << 10;
/// Bytes of one response's body, and of those of one call.
const MAX_RESPONSE_BYTES: usize = 4 << 20;
const MAX_CALL_BYTES: usize = 16 << 20;
const CHUNK: usize = 64 << 10;
/// Bytes of an error's text.
const MAX_REASON_BYTES: usize = 300;

/// Headers that frame a message or belong to its connection.
const OWN_HEADERS: [&str; 12] = [
    "host",
    "content-length",
    "transfer-encoding",
    "connection",
    "keep-alive",
    "upgrade",
    "te",
    "trailer",
    "expect",
    "accept-encoding",
    "proxy-authorization",
    "proxy-connection",
];

/// A request as the guest made it.
pub(in crate::plugin) struct Request {
    pub(in crate::plugin) post: bool,
    pub(in crate::plugin) url: String,
    pub(in crate::plugin) headers: Vec<(String, String)>,
    pub(in crate::plugin) body: Vec<u8>,
}

/// A whole response. Header values that are not text are left out.
#[derive(Clone, Debug, PartialEq)]
pub(in crate::plugin) struct Response {
    pub(in crate::plugin) status: u16,
    pub(in crate::plugin) headers: Vec<(String, String)>,
    pub(in crate::plugin) body: Vec<u8>,
}

/// As `http-error` in the WIT.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::plugin) enum HttpError {
    Denied(String),
    Timeout,
    TooLarge(String),
    Failed(String),
}

/// What a plugin with the grant speaks through. Cheap to clone.
#[derive(Clone)]
pub(super) struct Http {
    rules: Arc<[HostRule]>,
    /// For names that must be on the internet, and for those that the operator has named with their port.
    public: Client,
    local: Client,
}

impl Http {
    /// Connects to nothing yet.
    ///
    /// # Errors
    /// TLS that does not start.
    pub(super) fn new(rules: Vec<HostRule>, lookup: &Lookup) -> reqwest::Result<Self> {
        let client = |nearest| {
            let resolver = Resolver::new(nearest, Arc::clone(lookup));
            Client::builder()
                .redirect(Policy::none())
                .no_proxy()
                .referer(false)
                .http1_only()
                .dns_resolver(Arc::new(resolver))
                .user_agent("grpo-host")
                .pool_max_idle_per_host(SIDE_BY_SIDE)
                .build()
        };
        Ok(Self {
            rules: rules.into(),
            public: client(Nearness::Public)?,
            local: client(Nearness::Local)?,
        })
    }

    /// One result per request, in order, before `end`.
    pub(super) fn send(
        &self,
        requests: &[Request],
        end: Instant,
    ) -> Vec<Result<Response, HttpError>> {
        if requests.len() > MAX_REQUESTS {
            let reason = format!(
                "{} requests in one call, at most {MAX_REQUESTS}",
                requests.len()
            );
            return vec![Err(HttpError::Denied(reason)); requests.len()];
        }
        let (next, room) = (AtomicUsize::new(0), AtomicUsize::new(MAX_CALL_BYTES));
        let answers = Mutex::new(Vec::with_capacity(requests.len()));
        std::thread::scope(|scope| {
            for _ in 0..requests.len().min(SIDE_BY_SIDE) {
                scope.spawn(|| {
                    loop {
                        let place = next.fetch_add(1, Ordering::Relaxed);
                        let Some(request) = requests.get(place) else {
                            return;
                        };
                        let answer = self.one(request, end, &room);
                        let mut answers = answers.lock().unwrap_or_else(PoisonError::into_inner);
                        answers.push((place, answer));
                    }
                });
            }
        });
        let mut answers = answers.into_inner().unwrap_or_else(PoisonError::into_inner);
        answers.sort_by_key(|(place, _)| *place);
        answers.into_iter().map(|(_, answer)| answer).collect()
    }

    fn one(
        &self,
        request: &Request,
        end: Instant,
        room: &AtomicUsize,
    ) -> Result<Response, HttpError> {
        let mut url = checked_url(request)?;
        let mut headers = checked_headers(&request.headers)?;
        let mut method = if request.post {
            Method::POST
        } else {
            Method::GET
        };
        for _ in 0..=MAX_REDIRECTS {
            let nearest = admit(&url, &self.rules).map_err(HttpError::Denied)?;
            let client = match nearest {
                Nearness::Public => &self.public,
                Nearness::Local | Nearness::Special => &self.local,
            };
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(HttpError::Timeout);
            }
            let mut asked = client
                .request(method.clone(), url.clone())
                .headers(headers.clone())
                .timeout(left);
            if method == Method::POST {
                asked = asked.body(request.body.clone());
            }
            let answer = asked.send().map_err(|e| failed(&e))?;
            let Some(next) = redirect(&answer, &url)? else {
                return read(answer, end, room);
            };
            // As browsers do: only 307 and 308 keep method and body.
            let keeps = matches!(
                answer.status(),
                StatusCode::TEMPORARY_REDIRECT | StatusCode::PERMANENT_REDIRECT
            );
            if !keeps {
                method = Method::GET;
            }
            // What was meant for one server, a key above all, is not shown to another.
            if next.origin() != url.origin() {
                headers = HeaderMap::new();
                if method == Method::POST {
                    let to = next.host_str().unwrap_or_default();
                    let reason = format!("the body of a request is sent on to `{to}`");
                    return Err(HttpError::Denied(reason));
                }
            }
            url = next;
        }
        let reason = format!("more than {MAX_REDIRECTS} redirects");
        Err(HttpError::Denied(reason))
    }
}

fn checked_url(request: &Request) -> Result<Url, HttpError> {
    let denied = |reason: &str| HttpError::Denied(reason.to_owned());
    if request.url.len() > MAX_URL_BYTES {
        return Err(denied(&format!("a URL of more than {MAX_URL_BYTES} bytes")));
    }
    if request.body.len() > MAX_REQUEST_BYTES {
        return Err(denied(&format!(
            "a body of more than {MAX_REQUEST_BYTES} bytes"
        )));
    }
    if !request.post && !request.body.is_empty() {
        return Err(denied("a `get` with a body"));
    }
    Url::parse(&request.url).map_err(|e| denied(&format!("no URL: {e}")))
}

fn checked_headers(headers: &[(String, String)]) -> Result<HeaderMap, HttpError> {
    let mut checked = HeaderMap::new();
    let bytes: usize = headers.iter().map(|(n, v)| n.len() + v.len()).sum();
    if bytes > MAX_HEADER_BYTES || headers.len() > 100 {
        return Err(HttpError::Denied(format!(
            "more than 100 headers or {MAX_HEADER_BYTES} bytes of them"
        )));
    }
    for (name, value) in headers {
        let shown = || crate::plugin::printable(name, 60);
        let parsed = (HeaderName::try_from(name), HeaderValue::try_from(value));
        let (Ok(name), Ok(value)) = parsed else {
            return Err(HttpError::Denied(format!("the header `{}`", shown())));
        };
        if OWN_HEADERS.contains(&name.as_str()) {
            return Err(HttpError::Denied(format!(
                "the header `{}`, which is the host's own",
                shown()
            )));
        }
        checked.append(name, value);
    }
    Ok(checked)
}

/// Where a response sends the request on to; not yet admitted.
fn redirect(answer: &Answer, url: &Url) -> Result<Option<Url>, HttpError> {
    if !matches!(answer.status().as_u16(), 301 | 302 | 303 | 307 | 308) {
        return Ok(None);
    }
    let Some(location) = answer.headers().get(LOCATION) else {
        return Ok(None);
    };
    let next = location.to_str().ok().and_then(|to| url.join(to).ok());
    match next {
        Some(next) => Ok(Some(next)),
        None => Err(HttpError::Failed("a redirect to no URL".to_owned())),
    }
}

fn read(mut answer: Answer, end: Instant, room: &AtomicUsize) -> Result<Response, HttpError> {
    let mut headers = Vec::new();
    let mut bytes = 0;
    for (name, value) in answer.headers() {
        bytes += name.as_str().len() + value.len();
        if let Ok(value) = value.to_str() {
            headers.push((name.as_str().to_owned(), value.to_owned()));
        }
    }
    if bytes > MAX_HEADER_BYTES {
        let reason = format!("more than {MAX_HEADER_BYTES} bytes of headers");
        return Err(HttpError::TooLarge(reason));
    }
    let too_large = |limit| HttpError::TooLarge(format!("more than {limit} bytes of body"));
    let announced = answer.content_length().unwrap_or(0);
    if announced > MAX_RESPONSE_BYTES as u64 {
        return Err(too_large(MAX_RESPONSE_BYTES));
    }
    let status = answer.status().as_u16();
    let (mut body, mut chunk) = (Vec::new(), vec![0; CHUNK]);
    loop {
        if Instant::now() >= end {
            return Err(HttpError::Timeout);
        }
        let count = answer.read(&mut chunk).map_err(|e| match e.get_ref() {
            Some(inner) => inner.downcast_ref::<reqwest::Error>().map_or_else(
                || HttpError::Failed("the response broke off".to_owned()),
                failed,
            ),
            None => HttpError::Failed(e.kind().to_string()),
        })?;
        if count == 0 {
            return Ok(Response {
                status,
                headers,
                body,
            });
        }
        if body.len() + count > MAX_RESPONSE_BYTES {
            return Err(too_large(MAX_RESPONSE_BYTES));
        }
        let taken = room.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |room| {
            room.checked_sub(count)
        });
        if taken.is_err() {
            let reason = format!("more than {MAX_CALL_BYTES} bytes of bodies in one call");
            return Err(HttpError::TooLarge(reason));
        }
        body.extend(chunk.iter().take(count));
    }
}

/// In words without the URL, whose query may hold a key.
fn failed(error: &reqwest::Error) -> HttpError {
    if error.is_timeout() {
        return HttpError::Timeout;
    }
    let mut innermost: &dyn std::error::Error = error;
    loop {
        if let Some(near) = innermost.downcast_ref::<resolver::TooNear>() {
            return HttpError::Denied(near.to_string());
        }
        match innermost.source() {
            Some(source) => innermost = source,
            None => break,
        }
    }
    let reason = innermost.to_string();
    HttpError::Failed(crate::plugin::printable(&reason, MAX_REASON_BYTES))
}

#[cfg(test)]
mod tests;
