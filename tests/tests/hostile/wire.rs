//! Registries that stall, redirect, refuse, cut off and ask for credentials: each is refused with its own error, in bounded time and
//! memory.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use grpo_host::registry::{Fetch, Fetched, Registry, RegistryConfig, RegistryError};
use serde_json::json;
use tempfile::TempDir;

use super::registry_server::{Manner, Reply, Server, sha256};
use super::sharing::{LIMIT, WASM, fetch, reference, refused};

#[test]
fn hostile_45_a_registry_that_stalls_drips_or_never_ends() {
    let server = Server::start();
    server.publish("1", WASM);
    let blob = format!("blobs/{}", sha256(WASM));
    for path in ["manifests/1", blob.as_str()] {
        server.publish("1", WASM);
        for manner in [Manner::Stall, Manner::Drip] {
            server.set(
                path,
                Reply {
                    body: vec![b' '; 24 * 100],
                    ..Reply::manner(manner)
                },
            );
            let error = refused(&server.reference(":1"));
            // A blob that drips is cut off at its size first.
            let fits = matches!(
                error,
                RegistryError::TooSlow { .. } | RegistryError::Size { .. }
            );
            assert!(fits, "{path}: {error}");
        }
        server.set(path, Reply::manner(Manner::Endless));
        let error = refused(&server.reference(":1"));
        let fits = matches!(
            error,
            RegistryError::TooLarge { .. } | RegistryError::Size { .. }
        );
        assert!(fits, "{path}: {error}");
    }
    // Nobody listens: the port of a listener that is gone.
    let gone = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    assert!(matches!(
        refused(&format!("{gone}/me/reward")),
        RegistryError::Network { .. }
    ));
}

#[test]
fn hostile_45_a_download_that_is_cut_off() {
    let server = Server::start();
    server.publish("1", WASM);
    let blob = format!("blobs/{}", sha256(WASM));
    server.set(
        &blob,
        Reply {
            manner: Manner::Cut(10),
            ..Reply::body(WASM)
        },
    );
    let error = refused(&server.reference(":1"));
    assert!(
        matches!(
            error,
            RegistryError::CutOff {
                got: 10,
                expected: 24,
                ..
            }
        ),
        "{error}"
    );
    let asked = server
        .requests()
        .iter()
        .filter(|(what, _)| what.contains("blobs"))
        .count();
    assert_eq!(asked, 2, "it is tried again");
}

#[test]
fn hostile_45_redirects_and_refusals() {
    let server = Server::start();
    server.publish("1", WASM);
    for to in [
        "http://192.0.2.1/x",
        "http://169.254.169.254/latest",
        "file:///etc/passwd",
        "ftp://a/b",
        "/v2/me/reward/manifests/1",
    ] {
        server.set("manifests/1", Reply::status(307).header("location", to));
        let error = refused(&server.reference(":1"));
        assert!(
            matches!(error, RegistryError::Redirect { .. }),
            "{to}: {error}"
        );
    }
    for status in [401, 403] {
        server.set("manifests/1", Reply::status(status));
        let error = refused(&server.reference(":1"));
        assert!(
            matches!(
                error,
                RegistryError::Denied {
                    with_credentials: false,
                    ..
                }
            ),
            "{error}"
        );
        assert!(error.hint().unwrap().contains("docker login"));
    }
    server.set("manifests/1", Reply::status(404));
    assert!(matches!(
        refused(&server.reference(":1")),
        RegistryError::NotFound { .. }
    ));
    for status in [429, 500, 503, 418] {
        server.set("manifests/1", Reply::status(status));
        let error = refused(&server.reference(":1"));
        assert!(
            matches!(error, RegistryError::Status { status: found, .. } if found == status),
            "{error}"
        );
    }
    // A blob's redirect on this machine is what registries do.
    server.publish("1", WASM);
    let store = Server::start();
    store.set("/store", Reply::body(WASM));
    let to = format!("http://{}/store", store.host());
    server.set(
        &format!("blobs/{}", sha256(WASM)),
        Reply::status(307).header("location", &to),
    );
    assert_eq!(fetch(&server.reference(":1")).unwrap().bytes, WASM);
}

/// A folder with docker's config, which has `me:secret` for the server.
fn credentials(server: &Server) -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let docker = folder.path().join("config.json");
    let auths = json!({ "auths": { server.host(): { "auth": "bWU6c2VjcmV0" } } });
    std::fs::write(&docker, auths.to_string()).unwrap();
    (folder, docker)
}

/// Fetched with the credentials of a config.
fn get(server: &Server, docker: Option<&Path>) -> Result<Fetched, RegistryError> {
    let config = RegistryConfig {
        docker_config: docker.map(Into::into),
        attempts: 1,
        timeout: Duration::from_millis(500),
        ..RegistryConfig::new(LIMIT)
    };
    Registry::new(config).fetch(&reference(&server.reference(":1")), Fetch::default())
}

#[test]
fn hostile_45_token_servers_that_lie_stall_or_are_elsewhere() {
    let server = Server::start();
    let (_folder, docker) = credentials(&server);
    let realm = |to: &str| format!("Bearer realm=\"{to}\",service=\"s\",scope=\"x,y\"");
    for (path, reply) in [
        ("http://192.0.2.1/token", None),
        ("file:///etc/passwd", None),
        ("nowhere", None),
        ("/token", Some(Reply::body(b"{}"))),
        ("/token", Some(Reply::body(b"{\"token\": \"a\\r\\nb\"}"))),
        ("/token", Some(Reply::manner(Manner::Stall))),
        ("/token", Some(Reply::manner(Manner::Endless))),
        ("/token", Some(Reply::status(401))),
    ] {
        let to = if path == "/token" {
            format!("http://{}{path}", server.host())
        } else {
            path.to_owned()
        };
        server.set(
            "manifests/1",
            Reply::status(401).header("www-authenticate", &realm(&to)),
        );
        if let Some(reply) = reply {
            server.set(
                "/token?scope=repository%3Ame%2Freward%3Apull&service=s",
                reply,
            );
        }
        let error = get(&server, Some(&docker)).unwrap_err();
        assert!(!error.to_string().contains("secret"), "{error}");
        assert!(!format!("{error:?}").contains("secret"), "{error:?}");
    }
    // The token server got the password: what is asserted above would hold of one that was never asked, too.
    let basic = Some("Basic bWU6c2VjcmV0".to_owned());
    assert!(
        server
            .requests()
            .iter()
            .any(|(what, sent)| what.contains("/token") && *sent == basic)
    );
}

#[test]
fn hostile_45_credentials_go_to_the_registry_alone() {
    let (server, store) = (Server::start(), Server::start());
    let (_folder, docker) = credentials(&server);
    server.publish("1", WASM);
    let to = format!("http://{}/store", store.host());
    store.set("/store", Reply::body(WASM));
    let blob = format!("blobs/{}", sha256(WASM));
    server.set(&blob, Reply::status(307).header("location", &to));
    server.set(
        "manifests/1",
        Reply::status(401).header("www-authenticate", "Basic realm=\"x\""),
    );
    assert!(matches!(
        get(&server, Some(&docker)),
        Err(RegistryError::Denied {
            with_credentials: true,
            ..
        })
    ));
    assert!(matches!(
        get(&server, None),
        Err(RegistryError::Denied {
            with_credentials: false,
            ..
        })
    ));
    server.publish("1", WASM);
    server.set(&blob, Reply::status(307).header("location", &to));
    server.challenge("Basic realm=\"x\"");
    assert_eq!(get(&server, Some(&docker)).unwrap().bytes, WASM);
    assert_eq!(store.requests(), [("GET /store".to_owned(), None)]);
    std::fs::write(&docker, "{ not json").unwrap();
    server.set(
        "manifests/1",
        Reply::status(401).header("www-authenticate", "Basic realm=\"x\""),
    );
    assert!(matches!(
        get(&server, Some(&docker)),
        Err(RegistryError::Credentials { .. })
    ));
}
