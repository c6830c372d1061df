//! Manifests that say other than the component does or the operator wants, and secrets that guests try to let out.

use super::granted::{
    asking, asks_http, hosts, listening, load_with, manifested, reading_a_secret, secret,
};
use super::{assert_serves, guest, limits, samples, turn};
use grpo_host::plugin::{Access, Call, Fault, Manifest, Mismatch, PluginError};
use grpo_host::types::Score;
use serde_json::{Value, json};

const HOST: &str = "api.example.com";

/// Refused before anything of the component runs.
#[track_caller]
fn refused(bytes: &[u8], access: Access) -> PluginError {
    let (host, lines) = listening();
    let Err(error) = load_with(&host, bytes, &limits(), access) else {
        panic!("it loaded")
    };
    assert_eq!(error.call, Call::Load);
    assert!(
        error.hint().is_some_and(|hint| !hint.contains('\n')),
        "{error}"
    );
    assert!(!error.to_string().contains('\n'));
    assert!(lines.lock().unwrap().is_empty());
    assert_serves(&host);
    error
}

#[test]
fn hostile_46_manifest_grants_and_imports_must_agree() {
    let _turn = turn();
    let asks = asks_http(&[HOST]);
    let (host, _) = listening();
    let good = manifested(&asking(), &asks);
    load_with(&host, &good, &limits(), hosts(&[HOST])).unwrap();
    let plain = guest::scoring_after_ones("");
    type Case<'a> = (&'a str, Vec<u8>, Access, fn(&Mismatch) -> bool);
    let cases: [Case<'_>; 7] = [
        (
            "more than is granted",
            good.clone(),
            Access::default(),
            |m| matches!(m, Mismatch::NotGranted { .. }),
        ),
        (
            "another host",
            good.clone(),
            hosts(&["other.example"]),
            |m| matches!(m, Mismatch::NotGranted { .. }),
        ),
        (
            "a host too many",
            good,
            hosts(&[HOST, "other.example"]),
            |m| matches!(m, Mismatch::NotAsked { .. }),
        ),
        ("granted for nothing", plain.clone(), hosts(&[HOST]), |m| {
            matches!(m, Mismatch::NotAsked { .. })
        }),
        (
            "asked for nothing",
            manifested(&plain, &asks),
            hosts(&[HOST]),
            |m| matches!(m, Mismatch::Unused { key: "http" }),
        ),
        ("behind the back", asking(), Access::default(), |m| {
            matches!(m, Mismatch::Hidden { .. })
        }),
        (
            "behind the back, granted",
            manifested(&asking(), &json!({ "judge": "to ask" })),
            hosts(&[HOST]),
            |m| {
                matches!(
                    m,
                    Mismatch::Unused { key: "judge" } | Mismatch::Hidden { .. }
                )
            },
        ),
    ];
    for (what, bytes, access, expected) in cases {
        let error = refused(&bytes, access);
        let Fault::Grants(mismatch) = &error.fault else {
            panic!("{what}: {error}")
        };
        assert!(expected(mismatch), "{what}: {error}");
    }
}

#[test]
fn hostile_46_manifests_that_are_none() {
    let _turn = turn();
    let plain = guest::scoring_after_ones("");
    let good = manifested(&plain, &json!({}));
    // The same section with other text: a section's length is told by its own.
    let with = |text: &str| {
        let name = b"grpo:manifest";
        let mut payload = vec![name.len() as u8];
        payload.extend(name);
        payload.extend(text.as_bytes());
        let mut bytes = plain.clone();
        assert!(payload.len() < 1 << 14);
        bytes.extend([
            0,
            (payload.len() & 0x7f) as u8 | 0x80,
            (payload.len() >> 7) as u8,
        ]);
        bytes.extend(payload);
        bytes
    };
    let named = |asks: Value| {
        json!({ "name": "a", "version": "1", "description": "b", "asks": asks }).to_string()
    };
    assert!(Manifest::of(&with(&named(json!({})))).unwrap().is_some());
    for text in [
        String::new(),
        "[]".to_owned(),
        "\u{1b}[2J{".to_owned(),
        named(json!({ "files": "/" })),
        named(json!({ "judge": true })),
        named(json!({ "http": { "hosts": ["*", "a.example"], "reason": "r" } })),
        named(json!({ "http": { "hosts": ["*.example.com"], "reason": "r" } })),
        named(json!({ "secrets": ["A", "A"] })),
        named(json!({})).replace("\"b\"", "\"b\", \"description\": \"c\""),
        named(json!({})) + "x",
    ] {
        let error = refused(&with(&text), Access::default());
        assert!(matches!(error.fault, Fault::Manifest(_)), "{text}: {error}");
    }
    let twice = Manifest::of(&[&good[..], &with(&named(json!({})))[plain.len()..]].concat());
    assert!(twice.unwrap_err().to_string().contains("2 times"));
}

const SECRET: &str = "sk-live-0123456789abcdef";

#[test]
fn hostile_48_a_secret_in_log_skip_part_or_error() {
    let _turn = turn();
    let ways = [
        (
            "log",
            "(call $log (i32.const 1) (local.get $at) (local.get $len)) (i32.const 0)",
        ),
        (
            "skip",
            "(i32.store8 (i32.const 4096) (i32.const 1))
             (i32.store offset=8 (i32.const 4096) (local.get $at))
             (i32.store offset=12 (i32.const 4096) (local.get $len)) (i32.const 0)",
        ),
        (
            "part",
            "(i32.store (i32.const 2048) (local.get $at)) (i32.store (i32.const 2052) (local.get $len))
             (i32.store offset=16 (i32.const 4096) (i32.const 2048))
             (i32.store offset=20 (i32.const 4096) (i32.const 1)) (i32.const 0)",
        ),
        (
            "bad part",
            "(i32.store (i32.const 2048) (local.get $at)) (i32.store (i32.const 2052) (local.get $len))
             (f64.store (i32.const 2056) (f64.const nan))
             (i32.store offset=16 (i32.const 4096) (i32.const 2048))
             (i32.store offset=20 (i32.const 4096) (i32.const 1)) (i32.const 0)",
        ),
        (
            "error",
            "(i32.store8 (i32.const 0) (i32.const 1)) (i32.store8 (i32.const 4) (i32.const 2))
             (i32.store (i32.const 8) (local.get $at)) (i32.store (i32.const 12) (local.get $len))
             (i32.const 0)",
        ),
    ];
    for (way, body) in ways {
        let bytes = manifested(&reading_a_secret(body), &json!({ "secrets": ["KEY"] }));
        let (host, lines) = listening();
        let plugin = load_with(&host, &bytes, &limits(), secret(SECRET)).unwrap();
        let scoring = plugin.score(&samples(&["x"])).unwrap();
        let mut said = format!("{scoring:?} {:?}", lines.lock().unwrap());
        for fault in &scoring.faults {
            said += &format!(" {fault} {:?}", fault.hint());
        }
        assert!(!said.contains("0123456789"), "{way}: {said}");
        // It was said, and blotted out: a guest that never had it would pass otherwise.
        assert!(said.contains("[secret KEY]"), "{way}: {said}");
        if way == "log" {
            assert!(matches!(scoring.scores[..], [Score::Value(_)]));
        }
        assert_serves(&host);
    }
}

#[test]
fn hostile_48_only_secrets_that_were_granted() {
    let _turn = turn();
    // 1 for a secret, 0 for none.
    let body = "(f64.store offset=8 (i32.const 4096)
        (f64.convert_i32_u (i32.load8_u (i32.const 2000)))) (i32.const 0)";
    let other = json!({ "secrets": ["OTHER"] });
    let bytes = manifested(&reading_a_secret(body), &other);
    let mut access = secret(SECRET);
    access.grants.secrets = [("OTHER".to_owned(), "VARIABLE".to_owned())].into();
    access.secrets = grpo_host::plugin::Secrets::default();
    access.secrets.add("OTHER", SECRET).unwrap();
    let (host, _) = listening();
    let plugin = load_with(&host, &bytes, &limits(), access).unwrap();
    let scoring = plugin.score(&samples(&["x"])).unwrap();
    assert_eq!(super::totals(&scoring.scores), [Some(0.0)]);
    let granted = manifested(&reading_a_secret(body), &json!({ "secrets": ["KEY"] }));
    let plugin = load_with(&host, &granted, &limits(), secret(SECRET)).unwrap();
    let scoring = plugin.score(&samples(&["x"])).unwrap();
    assert_eq!(super::totals(&scoring.scores), [Some(1.0)]);
}
