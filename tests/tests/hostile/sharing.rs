//! Registries, and what comes out of them: nothing is used that is not what its digests, the lock and the trusted keys say, and
//! nothing waits or grows without end. Against a server on this machine.

use std::time::{Duration, Instant};

use grpo_host::registry::{
    Fetch, Fetched, Reference, Registry, RegistryConfig, RegistryError, Subject, TrustError,
    TrustList, sign,
};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::registry_server::{Reply, Server, layer, manifest, sha256};

pub(super) const WASM: &[u8] = b"\0asm the first component";
const OTHER: &[u8] = b"\0asm the other component";
pub(super) const LIMIT: u64 = 100_000;

/// Made with `minisign -GW`, for these tests.
const PUBLIC: &str = "RWTdpfpgbOOTewnFp937ekekcCAy5Q0SEDB/A86tYKTBXfBQHktCCHU9";
const SECRET: &str = "untrusted comment: minisign encrypted secret key
RWQAAEIyAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA3aX6YGzjk3sol7DQGHAxMBiNFXf+PvD10yCh14/diDYg/i9WobogfAnFp937ekekcCAy5Q0SEDB/A86tYKTBXfBQHktCCHU9AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=
";
const STRANGERS_SECRET: &str = "untrusted comment: minisign encrypted secret key
RWQAAEIyAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAwYhVID2tBWIkBQztQCkYmeO33pIfaF4sTDUwTgd5ttxe8whNCtds+N6oKPodeizCnJuCA9Qvq7SKoqUd5sAkQs7gd3DqlLS1AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=
";

const SIGNED: Fetch = Fetch {
    signatures: true,
    fresh: false,
};

/// Impatient, with a cache of its own.
fn registry(cache: &TempDir, offline: bool) -> Registry {
    Registry::new(RegistryConfig {
        cache_dir: Some(cache.path().to_owned()),
        offline,
        attempts: 2,
        backoff: Duration::ZERO,
        timeout: Duration::from_millis(500),
        deadline: Duration::from_millis(1500),
        ..RegistryConfig::new(LIMIT)
    })
}

pub(super) fn reference(text: &str) -> Reference {
    text.parse().unwrap()
}

/// Fetched without a cache.
pub(super) fn fetch(text: &str) -> Result<Fetched, RegistryError> {
    let cache = tempfile::tempdir().unwrap();
    registry(&cache, false).fetch(&reference(text), Fetch::default())
}

/// What is refused in time, with its two texts on one line each.
#[track_caller]
pub(super) fn refused(text: &str) -> RegistryError {
    let begun = Instant::now();
    let error = fetch(text).unwrap_err();
    assert!(
        begun.elapsed() < Duration::from_secs(8),
        "{:?}",
        begun.elapsed()
    );
    assert!(!error.to_string().contains('\n'), "{error}");
    assert!(!error.hint().unwrap().contains('\n'));
    error
}

#[test]
fn a_good_component_arrives_and_is_cached() {
    let (server, cache) = (Server::start(), tempfile::tempdir().unwrap());
    let digest = server.publish("1.2", WASM);
    let online = registry(&cache, false);
    let tag = server.reference(":1.2");
    let found = online.fetch(&reference(&tag), Fetch::default()).unwrap();
    assert_eq!((&found.bytes[..], found.cached), (WASM, false));
    assert_eq!(
        (found.manifest.to_string(), found.layer.to_string()),
        (digest.clone(), sha256(WASM))
    );
    // A pin needs no network, a tag does unless it is given up.
    let asked = server.requests().len();
    let pin = reference(&format!("{tag}@{digest}"));
    assert!(online.fetch(&pin, Fetch::default()).unwrap().cached);
    assert_eq!(server.requests().len(), asked);
    let offline = registry(&cache, true);
    assert_eq!(
        offline
            .fetch(&reference(&tag), Fetch::default())
            .unwrap()
            .bytes,
        WASM
    );
    let missing = offline.fetch(&reference(&server.reference(":9")), Fetch::default());
    assert!(
        matches!(missing, Err(RegistryError::Offline { .. })),
        "{missing:?}"
    );
}

#[test]
fn hostile_45_a_layer_that_is_not_its_digest() {
    let server = Server::start();
    server.publish("1", WASM);
    server.blob(&sha256(WASM), b"\0asm the first componenT");
    let error = refused(&server.reference(":1"));
    assert!(matches!(error, RegistryError::Tampered { .. }), "{error}");
}

#[test]
fn hostile_45_a_manifest_that_is_not_its_pin() {
    let server = Server::start();
    let digest = server.publish("1", WASM);
    let other = manifest(&[layer(OTHER)]).to_string();
    server.set(
        &format!("manifests/{digest}"),
        Reply::body(other.as_bytes()),
    );
    let error = refused(&server.reference(&format!(":1@{digest}")));
    assert!(matches!(error, RegistryError::Tampered { .. }), "{error}");
    // Without a pin the registry's own word is held against it.
    let lying = Reply::body(other.as_bytes()).header("docker-content-digest", &digest);
    server.set("manifests/2", lying);
    let error = refused(&server.reference(":2"));
    assert!(matches!(error, RegistryError::Tampered { .. }), "{error}");
}

#[test]
fn hostile_45_a_tag_that_has_moved() {
    let (server, cache) = (Server::start(), tempfile::tempdir().unwrap());
    let first = server.publish("1", WASM);
    let other = server.publish("1", OTHER);
    assert_ne!(first, other);
    let online = registry(&cache, false);
    let get = |text: &str| online.fetch(&reference(text), Fetch::default());
    assert_eq!(get(&server.reference(":1")).unwrap().bytes, OTHER);
    let pinned = server.reference(&format!(":1@{first}"));
    assert_eq!(get(&pinned).unwrap().bytes, WASM);
    // Nor does the tag stand in where the pinned version is gone.
    let gone = tempfile::tempdir().unwrap();
    server.unset(&format!("manifests/{first}"));
    let error = registry(&gone, false)
        .fetch(&reference(&pinned), Fetch::default())
        .unwrap_err();
    assert!(matches!(error, RegistryError::NotFound { .. }), "{error}");
    // An old answer is no answer: whoever cuts the line must not choose the version.
    server.set("manifests/1", Reply::status(500));
    let error = get(&server.reference(":1")).unwrap_err();
    assert!(
        matches!(error, RegistryError::Status { status: 500, .. }),
        "{error}"
    );
}

#[test]
fn hostile_45_a_cache_that_was_tampered_with() {
    let (server, cache) = (Server::start(), tempfile::tempdir().unwrap());
    let digest = server.publish("1", WASM);
    let pinned = reference(&server.reference(&format!(":1@{digest}")));
    registry(&cache, false)
        .fetch(&pinned, Fetch::default())
        .unwrap();
    let folder = std::fs::read_dir(cache.path())
        .unwrap()
        .next()
        .unwrap()
        .unwrap()
        .path();
    let blob = folder
        .join("blobs/sha256")
        .join(&sha256(WASM)["sha256:".len()..]);
    std::fs::write(&blob, OTHER).unwrap();
    let error = registry(&cache, true)
        .fetch(&pinned, Fetch::default())
        .unwrap_err();
    assert!(matches!(error, RegistryError::Tampered { .. }), "{error}");
    // With a network it is fetched again, which mends it.
    let found = registry(&cache, false)
        .fetch(&pinned, Fetch::default())
        .unwrap();
    assert_eq!((&found.bytes[..], found.cached), (WASM, false));
    assert_eq!(
        registry(&cache, true)
            .fetch(&pinned, Fetch::default())
            .unwrap()
            .bytes,
        WASM
    );
    // A pipe would be waited for.
    std::fs::remove_file(&blob).unwrap();
    assert!(
        std::process::Command::new("mkfifo")
            .arg(&blob)
            .status()
            .unwrap()
            .success()
    );
    let error = registry(&cache, true)
        .fetch(&pinned, Fetch::default())
        .unwrap_err();
    assert!(error.to_string().contains("no plain file"), "{error}");
}

#[test]
fn hostile_45_signatures_of_nobody_of_strangers_and_of_other_versions() {
    let (server, cache) = (Server::start(), tempfile::tempdir().unwrap());
    let digest = server.publish("2", WASM);
    let text = server.reference(":2");
    let now = reference(&text);
    let mut trust = TrustList::default();
    let place = server.reference("");
    trust.add(&format!("{PUBLIC} {place}"), "config").unwrap();
    assert!(trust.covers(Subject::Reference(&now)));
    let elsewhere = reference(&format!("{place}er:2"));
    assert!(!trust.covers(Subject::Reference(&elsewhere)));
    let check = |texts: &[&str]| {
        server.signatures(&digest, texts);
        let found = registry(&cache, false).fetch(&now, SIGNED).unwrap();
        trust.check(Subject::Reference(&now), &found.bytes, &found.signatures)
    };
    let by = |key: &str, bytes: &[u8], tag: &str| {
        sign(
            key,
            "test",
            None,
            bytes,
            Some(&reference(&server.reference(tag))),
        )
        .unwrap()
    };
    let good = by(SECRET, WASM, ":2");
    assert_eq!(check(&[&good]).unwrap().key, PUBLIC);
    assert!(matches!(check(&[]), Err(TrustError::Unsigned { .. })));
    let stranger = by(STRANGERS_SECRET, WASM, ":2");
    assert!(matches!(
        check(&[&stranger]),
        Err(TrustError::Stranger { .. })
    ));
    // Theirs beside a good one does no harm, nor does rubbish before it.
    check(&[&stranger, "rubbish", &good]).unwrap();
    let of_other = by(SECRET, OTHER, ":2");
    assert!(matches!(
        check(&[&of_other]),
        Err(TrustError::Forged { .. })
    ));
    // The key's number is not signed; with another's it is still no signature.
    let number = |text: &str| text.lines().nth(1).unwrap()[..14].to_owned();
    let forged = stranger.replacen(&number(&stranger), &number(&good), 1);
    assert!(check(&[&forged]).is_err());
    let old = by(SECRET, WASM, ":1");
    let error = check(&[&old]).unwrap_err();
    assert!(
        matches!(&error, TrustError::Replayed { made_for, .. } if made_for == "reward:1"),
        "{error}"
    );
    // The comment that says so is signed too.
    let edited = old.replace("reward:1", "reward:2");
    assert!(matches!(check(&[&edited]), Err(TrustError::Forged { .. })));
    // Offline, from the cache, with the signature that came with it.
    check(&[&good]).unwrap();
    let cached = registry(&cache, true).fetch(&now, SIGNED).unwrap();
    assert!(cached.cached);
    trust
        .check(Subject::Reference(&now), &cached.bytes, &cached.signatures)
        .unwrap();
}

#[test]
fn hostile_45_keys_that_are_none() {
    let mut trust = TrustList::default();
    for line in [
        "",
        "RWQ",
        "not base64 at all",
        &PUBLIC[1..],
        &format!("{PUBLIC} a b"),
    ] {
        let error = trust.add(line, "keys:1").unwrap_err();
        assert!(matches!(error, TrustError::Key { .. }), "{error}");
        assert!(error.to_string().starts_with("keys:1: "), "{error}");
    }
    for key in ["", "rubbish", PUBLIC, &SECRET[..100]] {
        let error = sign(key, "my.key", None, WASM, None).unwrap_err();
        assert!(
            error.to_string().starts_with("cannot sign with my.key: "),
            "{error}"
        );
    }
}

#[test]
fn hostile_47_manifests_that_are_no_plugins() {
    let server = Server::start();
    server.blob(&sha256(WASM), WASM);
    let with = |key: &str, value: Value| {
        let mut layer = layer(WASM);
        layer[key] = value;
        manifest(&[layer])
    };
    let gzip = with(
        "mediaType",
        json!("application/vnd.oci.image.layer.v1.tar+gzip"),
    );
    let wasm_gzip = with("mediaType", json!("application/wasm+gzip"));
    let two = manifest(&[layer(WASM), layer(WASM)]);
    let index = json!({ "schemaVersion": 2, "manifests": [layer(WASM)] });
    for (what, expected) in [
        (two, "2 layers instead of one"),
        (manifest(&[]), "0 layers instead of one"),
        (gzip, "tar+gzip` and not"),
        (wasm_gzip, "wasm+gzip` and not"),
        (index, "an index of several images"),
    ] {
        server.manifest("1", &what);
        let error = refused(&server.reference(":1"));
        assert!(matches!(error, RegistryError::NotAPlugin { .. }), "{error}");
        assert!(error.to_string().contains(expected), "{error}");
    }
    for what in [
        json!([]),
        json!({}),
        with("digest", json!("sha256:../../etc/passwd")),
        with("digest", json!("md5:00")),
    ] {
        server.manifest("1", &what);
        let error = refused(&server.reference(":1"));
        assert!(matches!(error, RegistryError::Malformed { .. }), "{error}");
    }
    let deep = "[".repeat(500_000);
    server.set("manifests/1", Reply::body(deep.as_bytes()));
    assert!(matches!(
        refused(&server.reference(":1")),
        RegistryError::Malformed { .. }
    ));
}

#[test]
fn hostile_47_titles_that_leave_their_folder() {
    let server = Server::start();
    server.blob(&sha256(WASM), WASM);
    let titled = |title: &str| {
        let mut layer = layer(WASM);
        layer["annotations"] = json!({ "org.opencontainers.image.title": title });
        manifest(&[layer])
    };
    for title in [
        "../../.bashrc",
        "/etc/passwd",
        "a/b.wasm",
        "..",
        "",
        "a\\b",
        "./a",
    ] {
        server.manifest("1", &titled(title));
        let error = refused(&server.reference(":1"));
        assert!(
            matches!(error, RegistryError::UnsafeName { .. }),
            "{title}: {error}"
        );
    }
    server.manifest("1", &titled("reward.wasm"));
    assert_eq!(fetch(&server.reference(":1")).unwrap().bytes, WASM);
}

#[test]
fn hostile_47_layers_of_other_sizes_and_kinds() {
    let server = Server::start();
    for (claimed, expected) in [(10, "more"), (0, "more"), (60, "24")] {
        let mut short = layer(WASM);
        short["size"] = json!(claimed);
        server.blob(&sha256(WASM), WASM);
        server.manifest("1", &manifest(&[short]));
        let error = refused(&server.reference(":1"));
        assert!(
            matches!(&error, RegistryError::Size { found, .. } if found == expected),
            "{error}"
        );
    }
    // Refused by what it claims, before a byte of it is asked for.
    let mut huge = layer(WASM);
    huge["size"] = json!(LIMIT + 1);
    server.manifest("1", &manifest(&[huge]));
    let asked = server.requests().len();
    assert!(matches!(
        refused(&server.reference(":1")),
        RegistryError::TooLarge { .. }
    ));
    assert_eq!(server.requests().len(), asked + 1);
    // A zip bomb stays as small as it was sent, whatever its type claims: nothing here decompresses.
    let bomb = [&[0x1f, 0x8b, 8, 0][..], &[0; 64]].concat();
    server.publish("1", &bomb);
    let error = refused(&server.reference(":1"));
    assert!(
        error
            .to_string()
            .contains("gzip file, which is never decompressed"),
        "{error}"
    );
    server.publish("1", b"#!/bin/sh");
    assert!(
        refused(&server.reference(":1"))
            .to_string()
            .contains("no WebAssembly")
    );
}
