//! Requests to the hub: repository info, file metadata, resumable downloads, retries.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Seek, SeekFrom, Write},
    path::Path,
    time::Duration,
};

use reqwest::{
    StatusCode,
    blocking::{Client, RequestBuilder, Response},
    header::{CONTENT_LENGTH, CONTENT_RANGE, ETAG, HeaderMap, RANGE},
    redirect::Policy,
};
use serde::Deserialize;
use sha2::{Digest, Sha256};

use super::{HubConfig, HubError, Progress, Repo, RepoKind, cache};

/// Of connecting, and of each single read: a file may take hours as long as bytes keep coming.
const TIMEOUT: Duration = Duration::from_secs(30);

const CHUNK: usize = 128 * 1024;

pub(super) struct Http {
    endpoint: String,
    token: Option<String>,
    attempts: u32,
    backoff: Duration,
    client: Client,
    /// Stays on the hub: the headers that describe a file come before the redirect to the store.
    metadata_client: Client,
}

pub(super) struct RepoInfo {
    pub(super) commit: String,
    pub(super) files: Vec<String>,
}

/// A file as the hub describes it.
pub(super) struct Remote {
    url: String,
    /// SHA-256 for large files, git's blob hash for small ones; checked to be a plain file name.
    pub(super) etag: String,
    size: Option<u64>,
}

impl Http {
    pub(super) fn new(config: &HubConfig) -> Result<Self, HubError> {
        let fail = |source| HubError::Network {
            url: config.endpoint.clone(),
            source,
        };
        let same_origin = Policy::custom(|attempt| {
            let origin = |url: &reqwest::Url| {
                (
                    url.host_str().map(str::to_owned),
                    url.port_or_known_default(),
                )
            };
            let from = attempt.previous().last().map(origin);
            match from == Some(origin(attempt.url())) && attempt.previous().len() < 6 {
                true => attempt.follow(),
                false => attempt.stop(),
            }
        });
        let builder = || {
            Client::builder()
                .user_agent(concat!("grpo-host/", env!("CARGO_PKG_VERSION")))
                .connect_timeout(TIMEOUT)
                .timeout(TIMEOUT)
        };
        Ok(Self {
            endpoint: config.endpoint.trim_end_matches('/').to_owned(),
            token: config.token.clone(),
            attempts: config.attempts.max(1),
            backoff: config.backoff,
            client: builder().build().map_err(fail)?,
            metadata_client: builder().redirect(same_origin).build().map_err(fail)?,
        })
    }

    pub(super) fn repo_info(&self, repo: &Repo) -> Result<RepoInfo, HubError> {
        #[derive(Deserialize)]
        struct Info {
            sha: String,
            siblings: Vec<Sibling>,
        }
        #[derive(Deserialize)]
        struct Sibling {
            rfilename: String,
        }
        let kind = match repo.kind {
            RepoKind::Model => "models",
            RepoKind::Dataset => "datasets",
        };
        // A slash in a revision (`refs/pr/1`) belongs to the name, not to the path.
        let revision = repo.revision.replace('/', "%2F");
        let url = format!(
            "{}/api/{kind}/{}/revision/{revision}",
            self.endpoint, repo.id
        );
        self.retry(|| {
            let body = self.send(self.client.get(&url), &url)?.bytes();
            let body = body.map_err(|source| HubError::Network {
                url: url.clone(),
                source,
            })?;
            let info: Info = serde_json::from_slice(&body).map_err(|e| HubError::Malformed {
                url: url.clone(),
                reason: e.to_string(),
            })?;
            let files = info.siblings.into_iter().map(|s| s.rfilename).collect();
            Ok(RepoInfo {
                commit: info.sha,
                files,
            })
        })
    }

    pub(super) fn metadata(
        &self,
        repo: &Repo,
        commit: &str,
        name: &str,
    ) -> Result<Remote, HubError> {
        let prefix = match repo.kind {
            RepoKind::Model => "",
            RepoKind::Dataset => "datasets/",
        };
        let url = format!(
            "{}/{prefix}{}/resolve/{commit}/{name}",
            self.endpoint, repo.id
        );
        self.retry(|| {
            // Without this, sizes are those of the compressed transfer.
            let request = self
                .metadata_client
                .head(&url)
                .header("accept-encoding", "identity");
            let response = self.send(request, &url)?;
            let header = |name| text(response.headers(), name);
            let etag = header("x-linked-etag").or_else(|| header(ETAG.as_str()));
            let etag = etag.map(|e| e.trim_start_matches("W/").trim_matches('"').to_owned());
            let Some(etag) = etag.filter(|e| !e.is_empty()) else {
                return Err(HubError::Malformed {
                    url: url.clone(),
                    reason: "no ETag".into(),
                });
            };
            if etag.contains('/') {
                return Err(HubError::UnsafeName {
                    id: repo.id.clone(),
                    name: etag,
                });
            }
            cache::check_name(repo, &etag)?;
            let size = header("x-linked-size").or_else(|| header(CONTENT_LENGTH.as_str()));
            Ok(Remote {
                url: url.clone(),
                etag,
                size: size.and_then(|s| s.parse().ok()),
            })
        })
    }

    /// Downloads to `BLOB.incomplete` and renames when size and hash are right.
    pub(super) fn download(
        &self,
        remote: &Remote,
        blob: &Path,
        name: &str,
        progress: &mut dyn FnMut(Progress<'_>),
    ) -> Result<(), HubError> {
        let mut part = blob.as_os_str().to_owned();
        part.push(".incomplete");
        let part = Path::new(&part);
        cache::make_parent(part)?;
        let fail = |source| HubError::File {
            path: part.to_owned(),
            source,
        };
        let mut file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .open(part)
            .map_err(fail)?;
        // Two processes may want the same file; the second one waits and then finds it done.
        file.lock().map_err(fail)?;
        if blob.exists() {
            return match fs::remove_file(part) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => Err(fail(e)),
                _ => Ok(()),
            };
        }
        self.retry(|| self.fetch(remote, &mut file, part, name, progress))?;
        file.sync_all().map_err(fail)?;
        verify(remote, &mut file, part)?;
        fs::rename(part, blob).map_err(fail)
    }

    /// One attempt: asks for what is missing and appends it.
    fn fetch(
        &self,
        remote: &Remote,
        file: &mut File,
        part: &Path,
        name: &str,
        progress: &mut dyn FnMut(Progress<'_>),
    ) -> Result<(), HubError> {
        let fail = |source| HubError::File {
            path: part.to_owned(),
            source,
        };
        let mut done = file.seek(SeekFrom::End(0)).map_err(fail)?;
        if remote.size.is_some_and(|size| done > size) {
            // Not a beginning of this file.
            done = restart(file).map_err(fail)?;
        }
        if done > 0 && remote.size == Some(done) {
            return Ok(());
        }
        let mut response = self.ask(remote, done)?;
        if done > 0 && !continues_at(&response, done) {
            // The server sends the whole file, or something else than was asked for.
            done = restart(file).map_err(fail)?;
            if response.status() == StatusCode::PARTIAL_CONTENT {
                response = self.ask(remote, 0)?;
            }
        }
        let mut buffer = vec![0; CHUNK];
        loop {
            progress(Progress {
                file: name,
                done,
                total: remote.size,
            });
            let n = match response.read(&mut buffer) {
                Ok(0) => break,
                Ok(n) => n,
                // What has arrived is kept, so a cut connection costs only what was on the wire.
                Err(_) if remote.size.is_some() => break,
                Err(source) => return Err(fail(source)),
            };
            file.write_all(&buffer[..n]).map_err(fail)?;
            done += n as u64;
        }
        match remote.size {
            Some(expected) if done != expected => Err(HubError::CutOff {
                url: remote.url.clone(),
                got: done,
                expected,
            }),
            _ => Ok(()),
        }
    }

    /// Asks for the bytes from `from` on.
    fn ask(&self, remote: &Remote, from: u64) -> Result<Response, HubError> {
        let mut request = self
            .client
            .get(&remote.url)
            .header("accept-encoding", "identity");
        if from > 0 {
            request = request.header(RANGE, format!("bytes={from}-"));
        }
        self.send(request, &remote.url)
    }

    fn send(&self, request: RequestBuilder, url: &str) -> Result<Response, HubError> {
        let request = match &self.token {
            Some(token) => request.bearer_auth(token),
            None => request,
        };
        let response = request.send().map_err(|e| HubError::Network {
            url: url.to_owned(),
            source: e.without_url(),
        })?;
        let (url, status) = (url.to_owned(), response.status().as_u16());
        match status {
            // 3xx: the metadata client stopped before leaving the hub, which is what it should do.
            200..=399 => Ok(response),
            401 | 403 => Err(HubError::Denied {
                url,
                status,
                with_token: self.token.is_some(),
            }),
            404 | 410 => Err(HubError::NotFound { url }),
            _ => Err(HubError::Status { url, status }),
        }
    }

    fn retry<T>(&self, mut attempt: impl FnMut() -> Result<T, HubError>) -> Result<T, HubError> {
        let mut wait = self.backoff;
        for _ in 1..self.attempts {
            match attempt() {
                Err(error) if error.is_transient() => std::thread::sleep(wait),
                other => return other,
            }
            wait *= 2;
        }
        attempt()
    }
}

fn text(headers: &HeaderMap, name: &str) -> Option<String> {
    headers.get(name)?.to_str().ok().map(str::to_owned)
}

/// The answer is the rest of the file from byte `at` on.
fn continues_at(response: &Response, at: u64) -> bool {
    let range = text(response.headers(), CONTENT_RANGE.as_str());
    response.status() == StatusCode::PARTIAL_CONTENT
        && range.is_some_and(|range| range.starts_with(&format!("bytes {at}-")))
}

fn restart(file: &mut File) -> io::Result<u64> {
    file.set_len(0)?;
    file.seek(SeekFrom::Start(0))
}

/// Compares with the announced SHA-256. Small files carry git's SHA-1, for which the size has to do.
fn verify(remote: &Remote, file: &mut File, part: &Path) -> Result<(), HubError> {
    let is_sha256 = remote.etag.len() == 64 && remote.etag.bytes().all(|b| b.is_ascii_hexdigit());
    if !is_sha256 {
        return Ok(());
    }
    let fail = |source| HubError::File {
        path: part.to_owned(),
        source,
    };
    file.seek(SeekFrom::Start(0)).map_err(fail)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; CHUNK];
    loop {
        let n = file.read(&mut buffer).map_err(fail)?;
        if n == 0 {
            break;
        }
        hash.update(&buffer[..n]);
    }
    let found = format!("{:x}", hash.finalize());
    if found != remote.etag.to_ascii_lowercase() {
        // Kept, it would be taken for a finished download at every further attempt.
        fs::remove_file(part).map_err(fail)?;
        let (url, expected) = (remote.url.clone(), remote.etag.clone());
        return Err(HubError::Checksum {
            url,
            expected,
            found,
        });
    }
    Ok(())
}
