//! Credentials from docker's `config.json`, and the answer to a registry's challenge: basic, or a token from its token server.

use std::{
    fs::File,
    io::{self, Read},
    sync::mpsc::{RecvTimeoutError, channel},
    time::Instant,
};

use docker_credential::{CredentialRetrievalError, DockerCredential, get_credential_from_reader};
use reqwest::{Method, Url, blocking::RequestBuilder, header::CONTENT_TYPE};
use serde::Deserialize;

use super::{RegistryError, remote::Remote};

/// Bytes of docker's config, and of a token server's answer.
const MAX_BYTES: u64 = 1 << 20;
/// Under which docker keeps what it knows of Docker Hub.
const DOCKER_HUB: &str = "https://index.docker.io/v1/";

/// What goes into the header. Not `Debug`: it must never reach a log.
pub(super) enum Authorization {
    Basic(String, String),
    Bearer { token: String, anonymous: bool },
}

impl Authorization {
    pub(super) fn on(&self, request: RequestBuilder) -> RequestBuilder {
        match self {
            Self::Basic(user, password) => request.basic_auth(user, Some(password)),
            Self::Bearer { token, .. } => request.bearer_auth(token),
        }
    }

    /// It stands for an account.
    pub(super) fn is_somebodys(&self) -> bool {
        !matches!(
            self,
            Self::Bearer {
                anonymous: true,
                ..
            }
        )
    }
}

/// What the registry's `WWW-Authenticate` asks for; `None` where there is nothing to answer with.
pub(super) fn answer(
    remote: &Remote<'_>,
    challenge: &str,
    scope: &str,
) -> Result<Option<Authorization>, RegistryError> {
    let (scheme, parameters) = challenge.split_once(' ').unwrap_or((challenge, ""));
    let credential = credential(remote)?;
    if scheme.eq_ignore_ascii_case("basic") {
        return Ok(match credential {
            Some(DockerCredential::UsernamePassword(user, password)) => {
                Some(Authorization::Basic(user, password))
            }
            _ => None,
        });
    }
    if !scheme.eq_ignore_ascii_case("bearer") {
        return Ok(None);
    }
    let parameters = parameters_of(parameters);
    let get = |name: &str| {
        parameters
            .iter()
            .find(|(key, _)| key == name)
            .map(|(_, value)| value.as_str())
    };
    let realm = get("realm").unwrap_or_default();
    let realm = Url::parse(realm).map_err(|e| RegistryError::Malformed {
        what: format!("the token server of {}", remote.host()),
        reason: e.to_string(),
    })?;
    if !remote.may_follow(&realm) {
        return Err(RegistryError::Redirect {
            url: remote.host().to_owned(),
            to: realm.to_string(),
        });
    }
    let anonymous = credential.is_none();
    let token = token(remote, realm, get("service"), scope, credential)?;
    Ok(Some(Authorization::Bearer { token, anonymous }))
}

fn token(
    remote: &Remote<'_>,
    mut realm: Url,
    service: Option<&str>,
    scope: &str,
    credential: Option<DockerCredential>,
) -> Result<String, RegistryError> {
    #[derive(Deserialize)]
    struct Answer {
        token: Option<String>,
        access_token: Option<String>,
    }
    let shown = realm.to_string();
    let mut pairs = vec![("scope", scope)];
    pairs.extend(service.map(|service| ("service", service)));
    let request = match &credential {
        Some(DockerCredential::IdentityToken(refresh)) => {
            pairs.extend([
                ("grant_type", "refresh_token"),
                ("client_id", "grpo-host"),
                ("refresh_token", refresh),
            ]);
            // A URL's query is written as a form is.
            let mut form = realm.clone();
            form.query_pairs_mut().clear().extend_pairs(&pairs);
            let form = form.query().unwrap_or_default().to_owned();
            let request = remote.request(Method::POST, realm).body(form);
            request.header(CONTENT_TYPE, "application/x-www-form-urlencoded")
        }
        other => {
            realm.query_pairs_mut().extend_pairs(&pairs);
            let request = remote.request(Method::GET, realm);
            match other {
                Some(DockerCredential::UsernamePassword(user, password)) => {
                    request.basic_auth(user, Some(password))
                }
                _ => request,
            }
        }
    };
    let begun = Instant::now();
    let response = request.send().map_err(|e| remote.failed(&shown, e))?;
    let refused = response.status().as_u16();
    if matches!(refused, 400 | 401 | 403) {
        return Err(RegistryError::Denied {
            url: shown,
            status: refused,
            with_credentials: credential.is_some(),
        });
    }
    let response = remote.checked(response, &shown)?;
    let bytes = remote.read(response, &shown, begun, MAX_BYTES)?;
    let answer: Option<Answer> = serde_json::from_slice(&bytes).ok();
    let token = answer.and_then(|answer| answer.token.or(answer.access_token));
    token
        .filter(|token| token.bytes().all(|b| b.is_ascii_graphic()))
        .ok_or_else(|| RegistryError::Malformed {
            what: shown,
            reason: "no token in it".to_owned(),
        })
}

/// `key="value"` pairs; commas inside quotes belong to the value.
fn parameters_of(text: &str) -> Vec<(String, String)> {
    let mut quoted = false;
    let parts = text.split(|c| {
        quoted ^= c == '"';
        c == ',' && !quoted
    });
    let pair = |part: &str| {
        let (key, value) = part.split_once('=')?;
        Some((
            key.trim().to_ascii_lowercase(),
            value.trim().trim_matches('"').to_owned(),
        ))
    };
    parts.filter_map(pair).collect()
}

/// What docker's config has for the registry. A credential helper is a program, so it is waited for no longer than a registry.
fn credential(remote: &Remote<'_>) -> Result<Option<DockerCredential>, RegistryError> {
    let Some(path) = &remote.config().docker_config else {
        return Ok(None);
    };
    let fail = |reason: String| RegistryError::Credentials {
        host: remote.host().to_owned(),
        reason,
    };
    let mut text = Vec::new();
    match File::open(path).and_then(|file| file.take(MAX_BYTES).read_to_end(&mut text)) {
        Ok(_) => {}
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(fail(format!("{}: {e}", path.display()))),
    }
    let server = match remote.host() {
        "docker.io" => DOCKER_HUB.to_owned(),
        host => host.to_owned(),
    };
    let (sender, found) = channel();
    std::thread::spawn(move || sender.send(get_credential_from_reader(&text[..], &server)));
    let found = found
        .recv_timeout(remote.config().timeout)
        .map_err(|e| match e {
            RecvTimeoutError::Timeout => fail("the credential helper does not answer".to_owned()),
            RecvTimeoutError::Disconnected => {
                fail("the credential helper cannot be run".to_owned())
            }
        })?;
    match found {
        Ok(credential) => Ok(Some(credential)),
        Err(CredentialRetrievalError::NoCredentialConfigured) => Ok(None),
        // Its output may have what must not be shown.
        Err(CredentialRetrievalError::HelperFailure { helper, .. }) => {
            Err(fail(format!("the credential helper `{helper}` failed")))
        }
        Err(e) => Err(fail(format!("{}: {e}", path.display()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_challenge_is_read_with_commas_in_its_values() {
        let text = r#"realm="https://a.b/token?x=1", Service="a.b",scope="repository:x:pull,push""#;
        let expected = [
            ("realm", "https://a.b/token?x=1"),
            ("service", "a.b"),
            ("scope", "repository:x:pull,push"),
        ];
        let expected = expected.map(|(k, v)| (k.to_owned(), v.to_owned()));
        assert_eq!(parameters_of(text), expected);
    }
}
