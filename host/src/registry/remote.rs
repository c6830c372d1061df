//! One repository of a registry, by the OCI distribution spec 1.1, with an end to everything: bytes, time, redirects.

use std::{
    io::Read,
    net::IpAddr,
    time::{Duration, Instant},
};

use reqwest::{
    Method, StatusCode, Url,
    blocking::{Client, RequestBuilder, Response},
    header::{ACCEPT, CONTENT_TYPE, LOCATION, WWW_AUTHENTICATE},
    redirect::Policy,
};
use serde::Deserialize;

use super::{
    Digest, Place, Reference, RegistryConfig, RegistryError,
    auth::{self, Authorization},
    layout::verified,
    manifest::{self, Descriptor, INDEX, Index, MANIFEST, MAX_INDEX_BYTES, MAX_MANIFEST_BYTES},
};

/// Redirects of one request.
const MAX_REDIRECTS: usize = 5;
const CHUNK: usize = 64 * 1024;

pub(super) struct Remote<'a> {
    config: &'a RegistryConfig,
    host: String,
    repository: String,
    /// `https://HOST/v2/REPOSITORY`.
    base: String,
    client: Client,
    authorization: Option<Authorization>,
}

/// Why a token is asked for.
#[derive(Clone, Copy)]
enum Access {
    Pull,
    Push,
}

impl<'a> Remote<'a> {
    /// Connects to nothing yet. Plain http is for this machine's own registries.
    pub(super) fn new(
        config: &'a RegistryConfig,
        reference: &Reference,
    ) -> Result<Self, RegistryError> {
        let Place::Host(host) = &reference.place else {
            return Err(RegistryError::Reference {
                text: reference.to_string(),
                reason: "it is a folder's",
            });
        };
        // Docker Hub's registry is not where its references say.
        let (address, repository) = match (host.as_str(), reference.repository.contains('/')) {
            ("docker.io", true) => ("registry-1.docker.io", reference.repository.clone()),
            ("docker.io", false) => (
                "registry-1.docker.io",
                format!("library/{}", reference.repository),
            ),
            (host, _) => (host, reference.repository.clone()),
        };
        let name = address.split_once(':').map_or(address, |(name, _)| name);
        let scheme = if is_loopback(name) { "http" } else { "https" };
        let base = format!("{scheme}://{address}/v2/{repository}");
        let client = client(config).map_err(|source| RegistryError::Network {
            url: base.clone(),
            source,
        })?;
        Ok(Self {
            config,
            host: host.clone(),
            repository,
            base,
            client,
            authorization: None,
        })
    }

    pub(super) fn manifest(
        &mut self,
        digest: Option<&Digest>,
        tag: &str,
    ) -> Result<Vec<u8>, RegistryError> {
        let name = digest.map_or_else(|| tag.to_owned(), Digest::to_string);
        self.manifest_of(digest, &name, Access::Pull)
    }

    pub(super) fn tagged(&mut self, tag: &str) -> Result<Digest, RegistryError> {
        let found = self.manifest_of(None, tag, Access::Push);
        found.map(|bytes| Digest::of(&bytes))
    }

    fn manifest_of(
        &mut self,
        digest: Option<&Digest>,
        name: &str,
        access: Access,
    ) -> Result<Vec<u8>, RegistryError> {
        let url = format!("{}/manifests/{name}", self.base);
        let accept = format!("{MANIFEST}, {INDEX}");
        self.retry(|remote| {
            let ask = |client: &Client| client.get(&url).header(ACCEPT, &accept);
            let (response, begun) = remote.send(&url, access, ask)?;
            // A tag has no digest of its own; what the registry says of it holds at least against a damaged line.
            let announced = header(&response, "docker-content-digest").and_then(|d| d.parse().ok());
            let bytes = remote.read(response, &url, begun, MAX_MANIFEST_BYTES)?;
            match digest.or(announced.as_ref()) {
                Some(expected) => verified(bytes, expected, &url),
                None => Ok(bytes),
            }
        })
    }

    pub(super) fn blob(
        &mut self,
        descriptor: &Descriptor,
        limit: u64,
    ) -> Result<Vec<u8>, RegistryError> {
        let (digest, size) = (&descriptor.digest, descriptor.size);
        let url = format!("{}/blobs/{digest}", self.base);
        if size > limit {
            return Err(RegistryError::TooLarge { what: url, limit });
        }
        self.retry(|remote| {
            let ask = |client: &Client| client.get(&url).header("accept-encoding", "identity");
            let (response, begun) = remote.send(&url, Access::Pull, ask)?;
            let bytes = match remote.read(response, &url, begun, size) {
                Err(RegistryError::TooLarge { what, .. }) => Err(RegistryError::Size {
                    what,
                    expected: size,
                    found: "more".to_owned(),
                }),
                other => other,
            }?;
            let found = bytes.len() as u64;
            if found < size {
                return Err(RegistryError::Size {
                    what: url.clone(),
                    expected: size,
                    found: found.to_string(),
                });
            }
            verified(bytes, digest, &url)
        })
    }

    pub(super) fn put_blob(&mut self, digest: &Digest, bytes: &[u8]) -> Result<(), RegistryError> {
        let url = format!("{}/blobs/{digest}", self.base);
        match self.send(&url, Access::Push, |client| client.head(&url)) {
            Ok(_) => return Ok(()),
            Err(error) if error.is_missing() => {}
            Err(error) => return Err(error),
        }
        let uploads = format!("{}/blobs/uploads/", self.base);
        let (response, _) = self.send(&uploads, Access::Push, |client| {
            client.post(&uploads).body("")
        })?;
        let malformed = |reason: &str| RegistryError::Malformed {
            what: uploads.clone(),
            reason: reason.to_owned(),
        };
        let location = header(&response, LOCATION.as_str())
            .ok_or_else(|| malformed("no place to upload to"))?;
        let mut target = response
            .url()
            .join(&location)
            .map_err(|e| malformed(&e.to_string()))?;
        if !self.may_follow(&target) {
            return Err(RegistryError::Redirect {
                url: uploads,
                to: shown(&target),
            });
        }
        target
            .query_pairs_mut()
            .append_pair("digest", &digest.to_string());
        let put = |client: &Client| {
            let body = client.put(target.clone()).body(bytes.to_vec());
            body.header(CONTENT_TYPE, "application/octet-stream")
                .timeout(self.config.deadline)
        };
        self.send_to(&target, Access::Push, put).map(drop)
    }

    pub(super) fn put_manifest(&mut self, bytes: &[u8], name: &str) -> Result<(), RegistryError> {
        self.put(bytes, name, MANIFEST).map(drop)
    }

    /// Files a manifest under its subject: the registry does where it knows how, else the index under the tag
    /// `sha256-HEX` has it, as the spec says.
    pub(super) fn put_referrer(
        &mut self,
        subject: &Descriptor,
        bytes: &[u8],
    ) -> Result<(), RegistryError> {
        let entry = Descriptor::of_manifest(bytes);
        let response = self.put(bytes, &entry.digest.to_string(), MANIFEST)?;
        if header(&response, "oci-subject").is_some() {
            return Ok(());
        }
        let mut index = self.filed(&subject.digest)?;
        if index.manifests.iter().any(|d| d.digest == entry.digest) {
            return Ok(());
        }
        index.manifests.push(entry);
        let bytes = manifest::written(&index, "an index of referrers")?;
        self.put(&bytes, &referrers_tag(&subject.digest), INDEX)
            .map(drop)
    }

    fn put(
        &mut self,
        bytes: &[u8],
        name: &str,
        media_type: &str,
    ) -> Result<Response, RegistryError> {
        let url = format!("{}/manifests/{name}", self.base);
        let put = |client: &Client| {
            client
                .put(&url)
                .header(CONTENT_TYPE, media_type)
                .body(bytes.to_vec())
        };
        self.send(&url, Access::Push, put)
            .map(|(response, _)| response)
    }

    /// Signatures filed under a manifest.
    pub(super) fn referrers(&mut self, subject: &Digest) -> Result<Vec<Descriptor>, RegistryError> {
        let url = format!("{}/referrers/{subject}", self.base);
        let asked = self.retry(|remote| {
            let (response, begun) = remote.send(&url, Access::Pull, |client| {
                client.get(&url).header(ACCEPT, INDEX)
            })?;
            let bytes = remote.read(response, &url, begun, MAX_INDEX_BYTES)?;
            Index::parse(&bytes, &url)
        });
        let index = match asked {
            // Registries older than the spec's 1.1 take the path for anything.
            Err(
                RegistryError::NotFound { .. }
                | RegistryError::Status {
                    status: 400 | 405, ..
                },
            ) => self.filed(subject)?,
            other => other?,
        };
        let mut listed = index.manifests;
        listed.retain(|d| d.artifact_type.as_deref() == Some(manifest::SIGNATURE));
        Ok(listed)
    }

    fn filed(&mut self, subject: &Digest) -> Result<Index, RegistryError> {
        let tag = referrers_tag(subject);
        match self.manifest(None, &tag) {
            Ok(bytes) => Index::parse(&bytes, &format!("{}/manifests/{tag}", self.base)),
            Err(error) if error.is_missing() => Ok(Index::default()),
            Err(error) => Err(error),
        }
    }

    pub(super) fn tags(&mut self) -> Result<Vec<String>, RegistryError> {
        #[derive(Deserialize)]
        struct List {
            tags: Option<Vec<String>>,
        }
        let url = format!("{}/tags/list?n=1000", self.base);
        let bytes = self.retry(|remote| {
            let (response, begun) = remote.send(&url, Access::Pull, |client| client.get(&url))?;
            remote.read(response, &url, begun, MAX_INDEX_BYTES)
        })?;
        let list: List = serde_json::from_slice(&bytes).map_err(|e| RegistryError::Malformed {
            what: url,
            reason: e.to_string(),
        })?;
        Ok(list.tags.unwrap_or_default())
    }

    fn send(
        &mut self,
        url: &str,
        access: Access,
        request: impl Fn(&Client) -> RequestBuilder,
    ) -> Result<(Response, Instant), RegistryError> {
        let parsed = Url::parse(url).map_err(|e| RegistryError::Malformed {
            what: url.to_owned(),
            reason: e.to_string(),
        })?;
        self.send_to(&parsed, access, request)
    }

    /// Sends, answers a challenge once, and makes an error of every status but success. Credentials go to the registry itself
    /// and never to where it sends uploads or downloads.
    fn send_to(
        &mut self,
        url: &Url,
        access: Access,
        request: impl Fn(&Client) -> RequestBuilder,
    ) -> Result<(Response, Instant), RegistryError> {
        let begun = Instant::now();
        let own = Url::parse(&self.base).is_ok_and(|base| base.origin() == url.origin());
        let once = |remote: &Self| {
            let authorization = remote.authorization.as_ref().filter(|_| own);
            let request = request(&remote.client);
            let request = match authorization {
                Some(authorization) => authorization.on(request),
                None => request,
            };
            request.send().map_err(|e| remote.failed(&shown(url), e))
        };
        let mut response = once(self)?;
        if response.status() == StatusCode::UNAUTHORIZED && own {
            let challenge = header(&response, WWW_AUTHENTICATE.as_str()).unwrap_or_default();
            let actions = match access {
                Access::Pull => "pull",
                Access::Push => "pull,push",
            };
            let scope = format!("repository:{}:{actions}", self.repository);
            self.authorization = auth::answer(self, &challenge, &scope)?;
            response = once(self)?;
        }
        self.checked(response, &shown(url))
            .map(|response| (response, begun))
    }

    pub(super) fn checked(&self, response: Response, url: &str) -> Result<Response, RegistryError> {
        let (url, status) = (url.to_owned(), response.status().as_u16());
        Err(match status {
            200..=299 => return Ok(response),
            300..=399 => {
                let to = header(&response, LOCATION.as_str()).unwrap_or_default();
                let to = response
                    .url()
                    .join(&to)
                    .map_or_else(|_not_a_url| "nowhere".to_owned(), |to| shown(&to));
                RegistryError::Redirect { url, to }
            }
            401 | 403 => RegistryError::Denied {
                url,
                status,
                with_credentials: self
                    .authorization
                    .as_ref()
                    .is_some_and(Authorization::is_somebodys),
            },
            404 | 410 => RegistryError::NotFound { what: url },
            _ => RegistryError::Status { url, status },
        })
    }

    pub(super) fn failed(&self, url: &str, error: reqwest::Error) -> RegistryError {
        match error.is_timeout() {
            true => self.too_slow(url, self.config.timeout),
            false => RegistryError::Network {
                url: url.to_owned(),
                source: error.without_url(),
            },
        }
    }

    fn too_slow(&self, url: &str, limit: Duration) -> RegistryError {
        RegistryError::TooSlow {
            url: url.to_owned(),
            seconds: limit.as_secs(),
        }
    }

    /// The body, if it has at most `limit` bytes and comes in time.
    pub(super) fn read(
        &self,
        mut response: Response,
        url: &str,
        begun: Instant,
        limit: u64,
    ) -> Result<Vec<u8>, RegistryError> {
        let expected = response.content_length();
        let (mut bytes, mut buffer) = (Vec::new(), vec![0; CHUNK]);
        loop {
            if begun.elapsed() > self.config.deadline {
                return Err(self.too_slow(url, self.config.deadline));
            }
            let cut = |got: usize| RegistryError::CutOff {
                url: url.to_owned(),
                got: got as u64,
                expected: expected.unwrap_or(limit),
            };
            match response.read(&mut buffer) {
                Ok(0) if expected.is_some_and(|e| e > bytes.len() as u64) => {
                    return Err(cut(bytes.len()));
                }
                Ok(0) => return Ok(bytes),
                Ok(n) => bytes.extend_from_slice(&buffer[..n]),
                Err(e) if is_timeout(&e) => return Err(self.too_slow(url, self.config.timeout)),
                Err(_) => return Err(cut(bytes.len())),
            }
            if bytes.len() as u64 > limit {
                return Err(RegistryError::TooLarge {
                    what: url.to_owned(),
                    limit,
                });
            }
        }
    }

    fn retry<T>(
        &mut self,
        mut attempt: impl FnMut(&mut Self) -> Result<T, RegistryError>,
    ) -> Result<T, RegistryError> {
        let mut wait = self.config.backoff;
        for _ in 1..self.config.attempts {
            match attempt(self) {
                Err(error) if error.is_transient() => std::thread::sleep(wait),
                other => return other,
            }
            wait *= 2;
        }
        attempt(self)
    }

    /// Whether a token or an upload may go there: to https, or from this machine to itself.
    pub(super) fn may_follow(&self, url: &Url) -> bool {
        Url::parse(&self.base).is_ok_and(|base| is_allowed(&base, url))
    }

    pub(super) fn config(&self) -> &RegistryConfig {
        self.config
    }

    pub(super) fn host(&self) -> &str {
        &self.host
    }

    pub(super) fn request(&self, method: Method, url: Url) -> RequestBuilder {
        self.client.request(method, url)
    }
}

fn client(config: &RegistryConfig) -> Result<Client, reqwest::Error> {
    // reqwest itself takes the credentials off when the host changes.
    let policy = Policy::custom(|attempt| {
        let first = attempt.previous().first();
        let allowed = first.is_some_and(|first| is_allowed(first, attempt.url()));
        match allowed && attempt.previous().len() <= MAX_REDIRECTS {
            true => attempt.follow(),
            false => attempt.stop(),
        }
    });
    Client::builder()
        .user_agent(concat!("grpo-host/", env!("CARGO_PKG_VERSION")))
        .connect_timeout(config.timeout)
        .timeout(config.timeout)
        .redirect(policy)
        .build()
}

fn is_allowed(from: &Url, to: &Url) -> bool {
    let loopback = |url: &Url| url.host_str().is_some_and(is_loopback);
    match to.scheme() {
        "https" => true,
        "http" => from.scheme() == "http" && loopback(from) && loopback(to),
        _ => false,
    }
}

fn is_loopback(host: &str) -> bool {
    let address = host.trim_start_matches('[').trim_end_matches(']').parse();
    host == "localhost" || address.is_ok_and(|address: IpAddr| address.is_loopback())
}

/// Without the query, in which stores have their signatures.
fn shown(url: &Url) -> String {
    let mut url = url.clone();
    url.set_query(None);
    url.to_string()
}

fn is_timeout(error: &std::io::Error) -> bool {
    let inner = error
        .get_ref()
        .and_then(|e| e.downcast_ref::<reqwest::Error>());
    error.kind() == std::io::ErrorKind::TimedOut || inner.is_some_and(reqwest::Error::is_timeout)
}

pub(super) fn header(response: &Response, name: &str) -> Option<String> {
    response
        .headers()
        .get(name)?
        .to_str()
        .ok()
        .map(str::to_owned)
}

/// The distribution spec's tag for registries without its referrers API.
fn referrers_tag(subject: &Digest) -> String {
    format!("sha256-{}", subject.hex())
}
