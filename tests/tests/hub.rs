//! Downloads against a hub on this machine: resuming, errors, offline mode, changing files.

#![expect(
    clippy::unwrap_used,
    reason = "clippy spares #[test] functions, not what they share"
)]

mod hub_server;

use std::{fs, path::Path, time::Duration};

use grpo_host::{
    data::{HubDataset, LoadOptions, load_hub},
    hub::{Hub, HubConfig, HubError, Progress, Repo, Snapshot},
};
use hub_server::{Fault, Server, sha256};

const ID: &str = "org/tiny";

fn config(server: &Server, cache: &Path) -> HubConfig {
    HubConfig {
        endpoint: server.url(),
        attempts: 3,
        backoff: Duration::ZERO,
        ..HubConfig::new(cache.to_owned())
    }
}

fn hub(server: &Server, cache: &Path) -> Hub {
    Hub::new(&config(server, cache)).unwrap()
}

fn quiet(_: Progress<'_>) {}

fn fetch(hub: &Hub, name: &str) -> Result<Vec<u8>, HubError> {
    let snapshot = hub.resolve(&Repo::model(ID))?;
    Ok(fs::read(hub.file(&snapshot, name, &mut quiet)?).unwrap())
}

/// Enough bytes for several reads, without a period that could hide a shifted resume.
fn weights(seed: u32) -> Vec<u8> {
    let spread = |i: u32| i.wrapping_add(seed << 24).wrapping_mul(2_654_435_761) >> 24;
    (0..300_000).map(|i| spread(i) as u8).collect()
}

#[test]
fn a_sharded_model_arrives_in_the_cache_layout() {
    let server = Server::start();
    let index = br#"{"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}"#;
    server.publish(
        ID,
        "c0ffee",
        &[
            ("config.json", b"{}"),
            ("README.md", b"not needed"),
            ("model.safetensors.index.json", index),
            ("m-1.safetensors", &weights(1)),
            ("m-2.safetensors", &weights(2)),
        ],
    );
    let cache = tempfile::tempdir().unwrap();
    let hub = Hub::new(&HubConfig {
        token: Some("secret".into()),
        ..config(&server, cache.path())
    })
    .unwrap();
    let mut seen = Vec::new();
    let folder = hub
        .model(&Repo::model(ID), &mut |p| {
            seen.push((p.file.to_owned(), p.done, p.total))
        })
        .unwrap();

    let repo = cache.path().join("models--org--tiny");
    assert_eq!(folder, repo.join("snapshots/c0ffee"));
    assert_eq!(
        fs::read_to_string(repo.join("refs/main")).unwrap(),
        "c0ffee"
    );
    assert_eq!(
        fs::read(folder.join("m-2.safetensors")).unwrap(),
        weights(2)
    );
    let link = fs::read_link(folder.join("m-2.safetensors")).unwrap();
    assert_eq!(link, Path::new("../../blobs").join(sha256(&weights(2))));
    assert!(!folder.join("README.md").exists());
    assert!(seen.contains(&("m-1.safetensors".to_owned(), 300_000, Some(300_000))));
    // The store behind the hub must not see the hub's token.
    let requests = server.requests();
    assert!(requests.iter().any(|r| r.store && r.method == "GET"));
    assert!(
        requests
            .iter()
            .all(|r| r.authorization.is_some() != r.store),
        "{requests:?}"
    );

    // Again: the commit is asked for, no file is.
    let before = server.requests().len();
    hub.model(&Repo::model(ID), &mut quiet).unwrap();
    assert_eq!(server.requests().len(), before + 1);
}

#[test]
fn a_cut_download_continues_where_it_stopped() {
    let server = Server::start();
    server.publish(ID, "c1", &[("model.safetensors", &weights(3))]);
    let cache = tempfile::tempdir().unwrap();
    server.fail_next("model.safetensors", Fault::CutAfter(200_000));
    assert_eq!(
        fetch(&hub(&server, cache.path()), "model.safetensors").unwrap(),
        weights(3)
    );
    let ranges = server.ranges("model.safetensors");
    assert_eq!(ranges, [None, Some("bytes=200000-".to_owned())]);
}

#[test]
fn another_process_continues_too() {
    let server = Server::start();
    server.publish(ID, "c1", &[("model.safetensors", &weights(3))]);
    let cache = tempfile::tempdir().unwrap();
    server.fail_next("model.safetensors", Fault::CutAfter(100_000));
    let once = HubConfig {
        attempts: 1,
        ..config(&server, cache.path())
    };
    let error = fetch(&Hub::new(&once).unwrap(), "model.safetensors").unwrap_err();
    assert!(
        matches!(
            error,
            HubError::CutOff {
                got: 100_000,
                expected: 300_000,
                ..
            }
        ),
        "{error}"
    );
    assert!(error.hint().unwrap().contains("continues where it stopped"));
    assert_eq!(
        fetch(&Hub::new(&once).unwrap(), "model.safetensors").unwrap(),
        weights(3)
    );
    let ranges = server.ranges("model.safetensors");
    assert_eq!(ranges, [None, Some("bytes=100000-".to_owned())]);
    let blobs = cache.path().join("models--org--tiny/blobs");
    assert_eq!(
        fs::read_dir(blobs).unwrap().count(),
        1,
        "no .incomplete is left"
    );
}

#[test]
fn a_server_without_ranges_sends_the_whole_file_again() {
    let server = Server::start();
    server.publish(ID, "c1", &[("model.safetensors", &weights(4))]);
    let cache = tempfile::tempdir().unwrap();
    server.fail_next("model.safetensors", Fault::CutAfter(100_000));
    server.fail_next("model.safetensors", Fault::IgnoreRange);
    assert_eq!(
        fetch(&hub(&server, cache.path()), "model.safetensors").unwrap(),
        weights(4)
    );
}

#[test]
fn server_errors_are_retried_and_then_reported() {
    let server = Server::start();
    server.publish(ID, "c1", &[("config.json", b"{}")]);
    let cache = tempfile::tempdir().unwrap();
    server.fail_next("config.json", Fault::Status(503));
    server.fail_next("config.json", Fault::Status(500));
    assert_eq!(
        fetch(&hub(&server, cache.path()), "config.json").unwrap(),
        b"{}"
    );

    let cache = tempfile::tempdir().unwrap();
    (0..3).for_each(|_| server.fail_next("revision/main", Fault::Status(503)));
    let error = fetch(&hub(&server, cache.path()), "config.json").unwrap_err();
    assert!(
        matches!(error, HubError::Status { status: 503, .. }),
        "{error}"
    );
}

#[test]
fn missing_and_forbidden() {
    let server = Server::start();
    server.publish(ID, "c1", &[("config.json", b"{}")]);
    let cache = tempfile::tempdir().unwrap();
    let open = hub(&server, cache.path());
    let snapshot = open.resolve(&Repo::model(ID)).unwrap();
    let error = open.file(&snapshot, "nope.bin", &mut quiet).unwrap_err();
    assert!(matches!(&error, HubError::NotFound { url } if url.ends_with("resolve/c1/nope.bin")));
    let error = open.resolve(&Repo::model("org/none")).unwrap_err();
    assert!(matches!(error, HubError::NotFound { .. }), "{error}");
    let error = open.resolve(&Repo::model(ID).at("v9")).unwrap_err();
    assert!(matches!(&error, HubError::NotFound { url } if url.ends_with("revision/v9")));
    let error = open.model(&Repo::model(ID), &mut quiet).unwrap_err();
    assert!(matches!(&error, HubError::NoWeights { found, .. } if found == &["config.json"]));

    server.fail_next("revision/main", Fault::Status(401));
    let error = open.resolve(&Repo::model(ID)).unwrap_err();
    assert!(matches!(
        error,
        HubError::Denied {
            status: 401,
            with_token: false,
            ..
        }
    ));
    assert!(error.hint().unwrap().contains("HF_TOKEN"));
    let with_token = HubConfig {
        token: Some("secret".into()),
        ..config(&server, cache.path())
    };
    assert!(!format!("{with_token:?}").contains("secret"));
    server.fail_next("revision/main", Fault::Status(403));
    let error = Hub::new(&with_token)
        .unwrap()
        .resolve(&Repo::model(ID))
        .unwrap_err();
    assert!(matches!(
        error,
        HubError::Denied {
            status: 403,
            with_token: true,
            ..
        }
    ));
    assert!(!error.to_string().contains("secret"));
}

#[test]
fn offline_uses_the_cache_or_says_what_is_missing() {
    let server = Server::start();
    server.publish(
        ID,
        "c1",
        &[("config.json", b"{}"), ("model.safetensors", b"w")],
    );
    let cache = tempfile::tempdir().unwrap();
    let offline = Hub::new(&HubConfig {
        offline: true,
        ..config(&server, cache.path())
    })
    .unwrap();
    let error = offline.resolve(&Repo::model(ID)).unwrap_err();
    assert_eq!(
        error.to_string(),
        "offline, and org/tiny is not in the cache"
    );
    assert_eq!(
        fetch(&hub(&server, cache.path()), "config.json").unwrap(),
        b"{}"
    );

    let before = server.requests().len();
    assert_eq!(fetch(&offline, "config.json").unwrap(), b"{}");
    let error = fetch(&offline, "model.safetensors").unwrap_err();
    assert_eq!(
        error.to_string(),
        "offline, and model.safetensors of org/tiny is not in the cache"
    );
    assert!(error.hint().unwrap().contains("HF_HUB_OFFLINE"));
    assert_eq!(server.requests().len(), before);
}

#[test]
fn a_hub_that_is_down_counts_as_offline() {
    let server = Server::start();
    server.publish(ID, "c1", &[("config.json", b"{}")]);
    let cache = tempfile::tempdir().unwrap();
    let hub = hub(&server, cache.path());
    fetch(&hub, "config.json").unwrap();
    (0..3).for_each(|_| server.fail_next("revision/main", Fault::Status(502)));
    let snapshot = hub.resolve(&Repo::model(ID)).unwrap();
    let files = vec!["config.json".to_owned()];
    let repo = Repo::model(ID);
    assert_eq!(
        snapshot,
        Snapshot {
            repo,
            commit: "c1".into(),
            files,
            cached: true
        }
    );
    // A refusal is an answer: the cache does not hide it.
    server.fail_next("revision/main", Fault::Status(403));
    assert!(matches!(
        hub.resolve(&Repo::model(ID)).unwrap_err(),
        HubError::Denied { .. }
    ));
}

#[test]
fn a_changed_file_is_downloaded_beside_the_old_one() {
    let server = Server::start();
    let (old, new) = (weights(5), weights(6));
    assert_ne!(old, new);
    server.publish(
        ID,
        "c1",
        &[("model.safetensors", &old), ("config.json", b"{}")],
    );
    let cache = tempfile::tempdir().unwrap();
    let hub = hub(&server, cache.path());
    let first = hub.resolve(&Repo::model(ID)).unwrap();
    let old_path = hub.file(&first, "model.safetensors", &mut quiet).unwrap();
    hub.file(&first, "config.json", &mut quiet).unwrap();

    server.publish(
        ID,
        "c2",
        &[("model.safetensors", &new), ("config.json", b"{}")],
    );
    assert_eq!(fetch(&hub, "model.safetensors").unwrap(), new);
    assert_eq!(fs::read(old_path).unwrap(), old);
    // The unchanged file has the same ETag, so its blob serves both commits.
    let gets = server.gets("config.json");
    assert_eq!(fetch(&hub, "config.json").unwrap(), b"{}");
    assert_eq!(server.gets("config.json"), gets);
    // The old commit stays available by name, without the hub knowing it any more.
    let offline = Hub::new(&HubConfig {
        offline: true,
        ..config(&server, cache.path())
    })
    .unwrap();
    let pinned = offline.resolve(&Repo::model(ID).at("c1")).unwrap();
    let path = offline
        .file(&pinned, "model.safetensors", &mut quiet)
        .unwrap();
    assert_eq!(fs::read(path).unwrap(), old);
}

#[test]
fn half_of_an_old_file_is_not_continued_with_a_new_one() {
    let server = Server::start();
    server.publish(ID, "c1", &[("model.safetensors", &weights(5))]);
    let cache = tempfile::tempdir().unwrap();
    let once = HubConfig {
        attempts: 1,
        ..config(&server, cache.path())
    };
    let hub = Hub::new(&once).unwrap();
    server.fail_next("model.safetensors", Fault::CutAfter(100_000));
    fetch(&hub, "model.safetensors").unwrap_err();
    server.publish(ID, "c2", &[("model.safetensors", &weights(6))]);
    assert_eq!(fetch(&hub, "model.safetensors").unwrap(), weights(6));
    assert_eq!(server.ranges("model.safetensors"), [None, None]);
}

#[test]
fn damaged_bytes_are_noticed_and_not_kept() {
    let server = Server::start();
    server.publish(ID, "c1", &[("model.safetensors", &weights(7))]);
    let cache = tempfile::tempdir().unwrap();
    let hub = hub(&server, cache.path());
    server.fail_next("model.safetensors", Fault::FlipFirstByte);
    let error = fetch(&hub, "model.safetensors").unwrap_err();
    assert!(
        matches!(&error, HubError::Checksum { expected, found, .. }
            if *expected == sha256(&weights(7)) && found != expected),
        "{error}"
    );
    assert_eq!(fetch(&hub, "model.safetensors").unwrap(), weights(7));
}

#[test]
fn names_that_would_leave_the_cache_are_refused() {
    let server = Server::start();
    server.publish(ID, "c1", &[("../../evil", b"x")]);
    let cache = tempfile::tempdir().unwrap();
    let hub = hub(&server, cache.path());
    let error = hub.resolve(&Repo::model(ID)).unwrap_err();
    assert!(matches!(&error, HubError::UnsafeName { name, .. } if name == "../../evil"));
    for id in ["../x", "/etc", "a/../../b"] {
        let error = hub.resolve(&Repo::model(id)).unwrap_err();
        assert!(matches!(error, HubError::UnsafeName { .. }), "{error}");
    }
}

#[test]
fn an_index_with_a_missing_shard() {
    let server = Server::start();
    let index = br#"{"weight_map": {"a": "gone.safetensors"}}"#;
    server.publish(ID, "c1", &[("model.safetensors.index.json", index)]);
    let cache = tempfile::tempdir().unwrap();
    let error = hub(&server, cache.path())
        .model(&Repo::model(ID), &mut quiet)
        .unwrap_err();
    assert!(matches!(&error, HubError::MissingShard { shard, .. } if shard == "gone.safetensors"));
}

#[test]
fn rows_of_a_hub_dataset() {
    let server = Server::start();
    server.publish(
        ID,
        "d1",
        &[
            ("README.md", b"-"),
            ("main/train-1.jsonl", b"{\"q\":2}\n"),
            ("main/train-0.jsonl", b"{\"q\":0}\n{\"q\":1}\n"),
            ("main/test.jsonl", b"{\"q\":9}\n"),
        ],
    );
    let cache = tempfile::tempdir().unwrap();
    let dataset = HubDataset {
        repo: Repo::dataset(ID),
        subset: None,
        split: "train".into(),
    };
    let hub = hub(&server, cache.path());
    let data = load_hub(&hub, &dataset, &LoadOptions::default(), &mut quiet).unwrap();
    let numbers: Vec<i64> = data
        .rows
        .iter()
        .map(|r| r.json["q"].as_i64().unwrap())
        .collect();
    assert_eq!(numbers, [0, 1, 2]);
    assert_eq!(data.source, "org/tiny:train");
    assert!(
        cache
            .path()
            .join("datasets--org--tiny/snapshots/d1/main/train-0.jsonl")
            .exists()
    );
}
