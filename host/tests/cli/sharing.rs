//! Plugins shared through a folder, as their users do it: push, pin, sign, trust, run, go on, offline. Registries are in
//! `tests/tests/registry.rs`, and those that mean harm in `tests/tests/hostile/sharing.rs`.

use std::path::Path;

use minisign::KeyPair;
use serde_json::Value;

use super::lab::{Ended, Lab};

const FAILURE: i32 = 1;
const USAGE: i32 = 2;

/// With a component of its own, `reward.wasm`.
fn lab() -> Lab {
    let lab = Lab::new();
    copy(&lab, "reward-inference", "reward.wasm");
    lab
}

fn copy(lab: &Lab, plugin: &str, name: &str) {
    let dist = Path::new(env!("CARGO_MANIFEST_DIR")).join("../plugins/dist");
    lab.write(
        name,
        std::fs::read(dist.join(format!("{plugin}.wasm"))).unwrap(),
    );
}

/// With credentials and caches inside the lab, as its settings are.
fn run(lab: &Lab, args: &str) -> Ended {
    let mut command = lab.command(args);
    command
        .env("XDG_CACHE_HOME", lab.path("cache"))
        .env("DOCKER_CONFIG", lab.path("docker"));
    command.output().unwrap().into()
}

/// Makes `NAME.key` and `NAME.pub`; the public key.
fn key(lab: &Lab, name: &str) -> String {
    let pair = KeyPair::generate_unencrypted_keypair().unwrap();
    lab.write(
        &format!("{name}.key"),
        pair.sk.to_box(None).unwrap().to_bytes(),
    );
    lab.write(&format!("{name}.pub"), pair.pk.to_box().unwrap().to_bytes());
    pair.pk.to_base64()
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap()
}

#[test]
fn a_folder_is_pushed_to_searched_and_pulled_from() {
    let lab = lab();
    let pushed = run(&lab, "plugin push reward.wasm dir:shelf/reward:1.2 --json")
        .fine()
        .json();
    assert_eq!(pushed["role"], "reward");
    let pinned = text(&pushed["pinned"]).to_owned();
    assert!(
        pinned.starts_with("dir:shelf/reward:1.2@sha256:"),
        "{pinned}"
    );
    copy(&lab, "reward-math", "other.wasm");
    run(&lab, "plugin push other.wasm dir:shelf/reward:1.3").fine();
    run(&lab, "plugin push other.wasm dir:shelf/math").fine();
    let found = run(&lab, "plugin search dir:shelf").fine().stdout;
    assert_eq!(found, "math:latest\nreward:1.2\nreward:1.3\n");
    let found = run(&lab, "plugin search dir:shelf/reward --json")
        .fine()
        .json();
    assert_eq!(found["found"][0]["tags"], serde_json::json!(["1.2", "1.3"]));
    let pulled = run(
        &lab,
        "plugin pull dir:shelf/reward:1.2 --out got.wasm --json",
    )
    .fine()
    .json();
    assert_eq!(pulled["pinned"], pinned.as_str());
    let read = |name: &str| std::fs::read(lab.path(name)).unwrap();
    assert_eq!(read("got.wasm"), read("reward.wasm"));
    let again = run(&lab, "plugin pull dir:shelf/reward:1.3 --out got.wasm");
    let (error, hint) = again.refused(FAILURE);
    assert_eq!(error, "got.wasm is there already");
    assert!(hint.contains("--force"), "{hint}");
    run(
        &lab,
        "plugin pull dir:shelf/reward:1.3 --out got.wasm --force",
    )
    .fine();
    assert_eq!(read("got.wasm"), read("other.wasm"));
    for command in ["inspect", "check"] {
        let seen = run(&lab, &format!("plugin {command} {pinned} --json"))
            .fine()
            .json();
        assert_eq!(
            (&seen["name"], &seen["digest"]),
            (&"reward".into(), &pushed["digest"])
        );
    }
}

#[test]
fn a_tag_stays_what_it_is_unless_it_is_forced() {
    let lab = lab();
    let push = |file: &str, flags: &str| {
        run(
            &lab,
            &format!("plugin push {file} dir:shelf/reward:1 {flags}"),
        )
    };
    let first = push("reward.wasm", "--json").fine().json();
    assert!(first["before"].is_null());
    let manifest = text(&first["manifest"]);
    let index = || std::fs::read(lab.path("shelf/reward/index.json")).unwrap();
    let listed = index();
    let again = push("reward.wasm", "").fine().stdout;
    assert!(
        again.starts_with("  same  dir:shelf/reward:1 is this already\npinned  "),
        "{again}"
    );
    copy(&lab, "reward-math", "other.wasm");
    let refused = push("other.wasm", "");
    let (error, hint) = refused.refused(FAILURE);
    let said = format!("dir:shelf/reward:1 is there already, and is something else: {manifest}; ");
    assert!(error.starts_with(&said), "{error}");
    assert!(hint.contains("--force"), "{hint}");
    assert_eq!(index(), listed);
    let moved = push("other.wasm", "--force").fine().stdout;
    let said = format!(" moved  dir:shelf/reward:1 from {manifest}\n");
    assert!(moved.starts_with(&said), "{moved}");
    let now = push("other.wasm", "--force --json").fine().json();
    assert_eq!(now["before"], now["manifest"]);
    assert_ne!(now["manifest"], first["manifest"]);
    // Without a tag it is `latest`, for which the same holds.
    run(&lab, "plugin push other.wasm dir:shelf/reward").fine();
    let refused = run(&lab, "plugin push reward.wasm dir:shelf/reward");
    assert!(refused.refused(FAILURE).0.contains("is something else"));
}

/// Commands, their exit codes, and what the error says.
const REFUSED: &[(&str, i32, &str)] = &[
    (
        "plugin pull ghcr.io/../x",
        USAGE,
        "`ghcr.io/../x` names no plugin: a repository's name is",
    ),
    (
        "plugin pull nothing",
        USAGE,
        "no repository after the registry's name",
    ),
    (
        "plugin search ghcr.io",
        USAGE,
        "and cannot be searched for names",
    ),
    (
        "plugin pull dir:none/reward:1",
        FAILURE,
        "not found: an OCI image layout at none/reward",
    ),
    ("plugin search dir:none", FAILURE, "none: No such file"),
    (
        "plugin push none.wasm dir:shelf/x",
        USAGE,
        "cannot read plugin `none.wasm`",
    ),
    (
        "plugin push text.wasm dir:shelf/x",
        FAILURE,
        "not a WebAssembly component",
    ),
    (
        "plugin push reward.wasm dir:shelf/X",
        USAGE,
        "`dir:shelf/X` names no plugin",
    ),
    (
        "plugin pull ghcr.io/me/reward:1",
        FAILURE,
        "offline, and ghcr.io/me/reward:1 is not in the cache",
    ),
    (
        "plugin push reward.wasm ghcr.io/me/reward:1",
        FAILURE,
        "offline, and ghcr.io/me/reward:1",
    ),
    (
        "--config run.yaml --plugin dir:none/reward:1 --out out",
        FAILURE,
        "not found: an OCI image layout",
    ),
    (
        "plugin sign reward.wasm --key none.key",
        FAILURE,
        "cannot sign with none.key: there is no such file",
    ),
    (
        "plugin sign reward.wasm --key run.yaml",
        FAILURE,
        "cannot sign with run.yaml",
    ),
    (
        "plugin verify reward.wasm --key rubbish",
        USAGE,
        "--key: `rubbish` is no trusted key",
    ),
];

#[test]
fn bad_references_and_files_are_told_in_two_lines() {
    let lab = lab();
    lab.write("text.wasm", "not a component");
    for (args, code, expected) in REFUSED {
        let ended = run(&lab, args);
        let (error, _) = ended.refused(*code);
        assert!(error.contains(expected), "{args}: {error}");
        assert_eq!(ended.stderr.lines().count(), 2, "{ended:?}");
    }
    assert!(!lab.path("shelf").exists() && !lab.path("out").exists());
}

#[test]
fn hostile_45_signatures_that_a_run_demands() {
    let lab = lab();
    let (mine, _) = (key(&lab, "mine"), key(&lab, "theirs"));
    run(&lab, "plugin push reward.wasm dir:shelf/reward:1").fine();
    let unsigned = run(&lab, "plugin verify dir:shelf/reward:1 --key mine.pub");
    assert!(
        unsigned
            .refused(FAILURE)
            .0
            .contains("has no signature, and 1 key is trusted")
    );
    std::fs::create_dir_all(lab.path("settings/grpo-host")).unwrap();
    // Another folder's plugins need none.
    lab.write(
        "settings/grpo-host/trusted_keys",
        format!("# mine\n{mine} dir:other\n"),
    );
    run(&lab, "plugin check dir:shelf/reward:1").fine();
    lab.write(
        "settings/grpo-host/trusted_keys",
        format!("# mine\n{mine} dir:shelf\n"),
    );
    let refused = run(&lab, "plugin check dir:shelf/reward:1");
    assert!(refused.refused(FAILURE).0.contains("has no signature"));
    run(&lab, "plugin sign dir:shelf/reward:1 --key theirs.key").fine();
    let refused = run(&lab, "plugin check dir:shelf/reward:1");
    assert!(
        refused
            .refused(FAILURE)
            .0
            .contains("signed by none of the trusted keys")
    );
    run(&lab, "plugin sign dir:shelf/reward:1 --key mine.key").fine();
    run(&lab, "plugin check dir:shelf/reward:1").fine();
    let verified = run(&lab, "plugin verify dir:shelf/reward:1 --json")
        .fine()
        .json();
    assert_eq!(verified["key"], mine.as_str());
    // The signed version 1 under the tag of the next: what replaying an old one looks like.
    run(&lab, "plugin push reward.wasm dir:shelf/reward:2").fine();
    let refused = run(&lab, "plugin check dir:shelf/reward:2");
    assert!(
        refused
            .refused(FAILURE)
            .0
            .contains("signature that was made for reward:1"),
        "{refused:?}"
    );
    // A file keeps its signatures beside it, and is held to them.
    run(&lab, "plugin pull dir:shelf/reward:1 --out got.wasm").fine();
    run(&lab, "plugin check got.wasm").fine();
    run(&lab, "plugin verify got.wasm --key mine.pub").fine();
    copy(&lab, "reward-math", "got.wasm");
    let refused = run(&lab, "plugin check got.wasm");
    assert!(
        refused
            .refused(FAILURE)
            .0
            .contains("does not fit its bytes")
    );
    run(&lab, "plugin sign got.wasm --key mine.key").fine();
    run(&lab, "plugin check got.wasm").fine();
}

#[test]
fn hostile_45_keys_of_a_config_and_keys_that_are_none() {
    let lab = lab();
    let mine = key(&lab, "mine");
    run(&lab, "plugin push reward.wasm dir:shelf/reward:1").fine();
    run(&lab, "plugin sign dir:shelf/reward:1 --key mine.key").fine();
    run(&lab, "plugin push reward.wasm dir:shelf/reward:2").fine();
    // A config's keys count as the user's do.
    let args = format!(
        "--config run.yaml --plugin dir:shelf/reward:2 --set trusted_keys=[\"{mine}\"] --out out"
    );
    let refused = run(&lab, &args);
    assert!(refused.refused(FAILURE).0.contains("made for reward:1"));
    std::fs::create_dir_all(lab.path("settings/grpo-host")).unwrap();
    lab.write("settings/grpo-host/trusted_keys", "rubbish\n");
    let refused = run(&lab, "plugin check dir:shelf/reward:1");
    assert!(
        refused
            .refused(USAGE)
            .0
            .contains("trusted_keys:1: `rubbish` is no trusted key")
    );
}

#[test]
fn a_key_with_a_password() {
    let lab = lab();
    let pair = KeyPair::generate_encrypted_keypair(Some("open sesame".to_owned())).unwrap();
    lab.write("my.key", pair.sk.to_box(None).unwrap().to_bytes());
    lab.write("right", "open sesame\n");
    lab.write("wrong", "open barley\n");
    let sign = "plugin sign reward.wasm --key my.key --password-file";
    let refused = run(&lab, &format!("{sign} wrong"));
    let (error, hint) = refused.refused(FAILURE);
    assert!(
        error.starts_with("cannot sign with my.key: Wrong password"),
        "{error}"
    );
    assert!(hint.contains("--password-file"), "{hint}");
    assert!(!lab.path("reward.wasm.minisig").exists());
    run(&lab, &format!("{sign} right")).fine();
    let verify = format!("plugin verify reward.wasm --key {}", pair.pk.to_base64());
    let told = run(&lab, &verify).fine().stdout;
    assert!(told.starts_with("ok: signed by RW"), "{told}");
}

#[test]
fn hostile_45_a_tag_that_moves_under_a_run() {
    let lab = lab();
    run(&lab, "plugin push reward.wasm dir:shelf/reward:1").fine();
    let train = "--config run.yaml --plugin dir:shelf/reward:1 --set max_steps=2 --set eval_steps=0 --out out";
    run(&lab, train).fine();
    let lock = std::fs::read_to_string(lab.path("out/plugins.lock")).unwrap();
    let digest =
        text(&run(&lab, "plugin inspect reward.wasm --json").fine().json()["digest"]).to_owned();
    assert!(lock.contains(&digest), "{lock}");
    assert!(
        lock.contains("source: dir:shelf/reward:1@sha256:"),
        "{lock}"
    );
    copy(&lab, "reward-math", "other.wasm");
    run(&lab, "plugin push other.wasm dir:shelf/reward:1 --force").fine();
    // The run's config has the pin, so replaying and going on mean what they meant.
    let replayed = run(&lab, "replay out").fine();
    assert!(
        replayed.stdout.contains(" 0 differ (reward)"),
        "{replayed:?}"
    );
    let compared = run(&lab, "replay out --plugin dir:shelf/reward:1").fine();
    assert!(compared.stdout.contains("reward"), "{compared:?}");
    run(&lab, "--resume out --set max_steps=3").fine();
    assert_eq!(
        std::fs::read_to_string(lab.path("out/plugins.lock")).unwrap(),
        lock
    );
    // What the tag is now is another setting.
    let refused = run(
        &lab,
        "--resume out --set max_steps=4 --plugin dir:shelf/reward:1",
    );
    assert!(
        refused.refused(USAGE).0.contains("cannot change `plugins`"),
        "{refused:?}"
    );
    // And what is pinned must still be what it was.
    let blobs = lab.path("shelf/reward/blobs/sha256");
    std::fs::copy(
        lab.path("other.wasm"),
        blobs.join(&digest["sha256:".len()..]),
    )
    .unwrap();
    let refused = run(&lab, "--resume out --set max_steps=4");
    assert!(
        refused
            .refused(FAILURE)
            .0
            .contains("is not what its digest says"),
        "{refused:?}"
    );
}
