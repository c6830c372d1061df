//! Components that must not load: no component, the wrong world or version, forbidden imports, names and
//! configs that are none.

use super::{assert_serves, error_of_load, guest, host, limits, load, turn};
use grpo_host::plugin::{Call, Fault, Plugin};
use serde_json::json;

#[test]
fn hostile_21_a_core_module_and_other_files() {
    let _turn = turn();
    let module = wat::parse_str("(module)").unwrap();
    for (bytes, found) in [
        (module.as_slice(), "a core module"),
        (b"".as_slice(), "an empty file"),
        (b"(component)".as_slice(), "something else"),
    ] {
        assert_eq!(error_of_load(bytes).fault, Fault::NotAComponent { found });
    }
}

/// Machine code is what a cache of compiled components would hold. There is none: bytes become code by
/// compiling them, whatever one bit of them says.
#[test]
fn hostile_22_machine_code() {
    let _turn = turn();
    for bytes in [
        b"\x7fELF\x02\x01".as_slice(),
        b"\x7fELF\x02\x01\x01\xc8\0\0\0\0\0\0\0\0\x01\0\x3e\0.wasmtime.engine",
    ] {
        let found = "machine code";
        assert_eq!(error_of_load(bytes).fault, Fault::NotAComponent { found });
    }
    let mut bytes = guest::scoring_after_ones("");
    bytes[0] ^= 1;
    let found = "something else";
    assert_eq!(error_of_load(&bytes).fault, Fault::NotAComponent { found });
}

/// Cut anywhere it is refused; with a bit flipped it is refused or a component like another.
#[test]
fn hostile_20_truncated_and_random_bytes() {
    let _turn = turn();
    let whole = guest::scoring_after_ones("");
    let host = host();
    let refused = |bytes: &[u8]| {
        let error = load(&host, bytes, &limits()).err()?;
        assert!(error.hint().is_some(), "no hint: {error}");
        Some(error.fault)
    };
    for end in (8..whole.len()).step_by(whole.len() / 60) {
        let fault = refused(&whole[..end]).unwrap();
        assert!(
            matches!(fault, Fault::Compile { .. } | Fault::WrongWorld { .. }),
            "{end}: {fault}"
        );
    }
    // Steele and Vigna's mixer (SplitMix64), so that the bytes are the same everywhere.
    let mut state = 1_u64;
    let mut random = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    };
    let mut flipped = 0;
    for _ in 0..150 {
        let mut bytes = whole.clone();
        let place = 8 + random() as usize % (whole.len() - 8);
        bytes[place] ^= 1 << (random() % 8);
        flipped += u32::from(refused(&bytes).is_some());
    }
    assert!(flipped > 50, "{flipped} of 150 refused");
    for _ in 0..100 {
        let length = random() as usize % 400;
        let mut bytes = whole[..8].to_vec();
        bytes.extend((0..length).map(|_| random() as u8));
        bytes.push(0xff);
        assert!(matches!(refused(&bytes), Some(Fault::Compile { .. })));
    }
    assert_serves(&host);
}

#[test]
fn hostile_23_unknown_imports() {
    let _turn = turn();
    let wasi = r#"(component
        (import "wasi:clocks/wall-clock@0.2.0" (instance (export "now" (func (result u64)))))
        (import "grpo:plugin/host@0.1.3" (instance
          (export "log" (func (param "text" string))) (export "exec" (func (param "c" string)))))
        (import "grpo:plugin/host@0.2.0" (instance))
        (instance $i) (export "grpo:plugin/scoring@0.1.0" (instance $i)))"#;
    let error = error_of_load(&wat::parse_str(wasi).unwrap());
    let imports = [
        "wasi:clocks/wall-clock@0.2.0",
        "grpo:plugin/host@0.1.3#exec",
        "grpo:plugin/host@0.2.0",
    ];
    let imports = imports.map(str::to_owned).to_vec();
    assert_eq!(error.fault, Fault::UnknownImports { imports });
    let hint = error.hint().unwrap();
    assert!(hint.contains("version 0.2.0 of grpo:plugin"), "{hint}");
}

#[test]
fn hostile_23_wrong_world() {
    let _turn = turn();
    let none = r#"(component
        (core module $m (func (export "f")))
        (core instance $i (instantiate $m))
        (func (export "run") (canon lift (core func $i "f")))
        (instance $e) (export "grpo:plugin/scoring@0.2.0" (instance $e)))"#;
    let error = error_of_load(&wat::parse_str(none).unwrap());
    let exports = vec!["grpo:plugin/scoring@0.2.0".to_owned(), "run".to_owned()];
    assert_eq!(error.fault, Fault::WrongWorld { exports });
    let text = error.to_string();
    assert!(
        text.contains("`grpo:plugin/scoring@0.2.0`, `run`"),
        "{text}"
    );
    assert!(
        text.contains("expected one of grpo:plugin/scoring@0.1.0, grpo:"),
        "{text}"
    );
    let hollow = r#"(component (instance $i) (export "grpo:plugin/scoring@0.1.0" (instance $i)))"#;
    let error = error_of_load(&wat::parse_str(hollow).unwrap());
    assert!(
        matches!(&error.fault, Fault::Signature { reason } if reason.contains("configure")),
        "{error}"
    );
    let both = r#"(component (instance $i) (export "grpo:plugin/scoring@0.1.0" (instance $i))
        (instance $j) (export "grpo:plugin/planning@0.1.0" (instance $j)))"#;
    let error = error_of_load(&wat::parse_str(both).unwrap());
    assert!(
        matches!(&error.fault, Fault::ManyRoles { roles } if roles.len() == 2),
        "{error}"
    );
}

/// What a plugin exports beside its role is nobody's business, and `inspect` lists it.
#[test]
fn hostile_23_extra_exports() {
    let _turn = turn();
    let extra = r#"(core module $more (func (export "f"))) (core instance $more (instantiate $more))
      (func $more (canon lift (core func $more "f"))) (export "backdoor" (func $more))"#;
    let main = guest::score(guest::ONES);
    let parts = guest::Parts {
        around: extra,
        main: &main,
        ..guest::Parts::default()
    };
    let (host, bytes) = (host(), parts.build());
    assert!(load(&host, &bytes, &limits()).is_ok());
    let described = host.describe("evil", &bytes).unwrap();
    assert!(
        described.exports.contains(&"backdoor".to_owned()),
        "{described:?}"
    );
    assert_eq!(described.imports, ["grpo:plugin/host@0.1.0"]);
}

#[test]
fn features_that_are_off() {
    let _turn = turn();
    let simd = r#"(func (export "score") (param i32 i32 i32 i32) (result i32)
        (i32x4.extract_lane 0 (v128.const i32x4 1 2 3 4)))"#;
    let error = error_of_load(&guest::component(simd));
    assert!(
        matches!(&error.fault, Fault::Compile { reason } if reason.contains("SIMD")),
        "{error}"
    );
}

/// A good plugin that also imports `function` of `interface`, and is refused by name.
#[track_caller]
fn refuses_import(interface: &str, function: &str) {
    let imports = format!(r#"(import "{interface}" (instance (export {function})))"#);
    let main = guest::score(guest::ONES);
    let parts = guest::Parts {
        imports: &imports,
        main: &main,
        ..guest::Parts::default()
    };
    let error = error_of_load(&parts.build());
    let imports = vec![interface.to_owned()];
    assert_eq!(
        (error.call, &error.fault),
        (Call::Load, &Fault::UnknownImports { imports })
    );
    assert!(error.to_string().contains(interface));
    assert!(error.hint().unwrap().contains("WASI"));
}

#[test]
fn hostile_32_no_clock() {
    let _turn = turn();
    let now = r#""now" (func (result u64))"#;
    refuses_import("wasi:clocks/monotonic-clock@0.2.0", now);
    refuses_import("wasi:clocks/wall-clock@0.2.0", now);
}

#[test]
fn hostile_33_no_randomness() {
    let _turn = turn();
    let bytes = r#""get-random-bytes" (func (param "len" u64) (result (list u8)))"#;
    refuses_import("wasi:random/random@0.2.0", bytes);
    refuses_import(
        "wasi:random/insecure-seed@0.2.0",
        r#""insecure-seed" (func (result u64))"#,
    );
}

#[test]
fn hostile_34_no_environment_and_no_files() {
    let _turn = turn();
    let variables = r#""get-environment" (func (result (list (tuple string string))))"#;
    refuses_import("wasi:cli/environment@0.2.0", variables);
    refuses_import("wasi:cli/stdin@0.2.0", r#""get-stdin" (func (result u32))"#);
    let folders = r#""get-directories" (func (result (list (tuple u32 string))))"#;
    refuses_import("wasi:filesystem/preopens@0.2.0", folders);
}

#[test]
fn hostile_35_no_sockets() {
    let _turn = turn();
    refuses_import(
        "wasi:sockets/tcp@0.2.0",
        r#""connect" (func (param "to" string))"#,
    );
    refuses_import(
        "wasi:sockets/udp@0.2.0",
        r#""send" (func (param "to" string))"#,
    );
    let resolve = r#""resolve-addresses" (func (param "name" string))"#;
    refuses_import("wasi:sockets/ip-name-lookup@0.2.0", resolve);
}

/// Later patches of our version are the same to us; another version is told apart with both numbers.
#[test]
fn hostile_44_another_version_of_the_interface() {
    let _turn = turn();
    let host = host();
    let main = guest::score(guest::ONES);
    let at = |version: &str| {
        let parts = guest::Parts {
            main: &main,
            ..guest::Parts::default()
        };
        parts.build_at(version)
    };
    assert!(load(&host, &at("0.1.9"), &limits()).is_ok());
    for version in ["0.2.0", "1.0.0", "0.1.0-rc1"] {
        let error = error_of_load(&at(version));
        let exports = format!("grpo:plugin/scoring@{version}");
        let sees =
            |f: &Fault| matches!(f, Fault::WrongWorld { exports: all } if all.contains(&exports));
        assert!(sees(&error.fault), "{error}");
        let hint = error.hint().unwrap();
        if version != "0.1.0-rc1" {
            let both = format!("version {version} of grpo:plugin and this host has 0.1.0");
            assert!(hint.contains(&both), "{hint}");
        }
    }
}

#[test]
fn hostile_47_names_that_leave_their_place() {
    let _turn = turn();
    let host = host();
    let bytes = guest::scoring_after_ones("");
    let load = |name: &str| host.load(name, &bytes, &json!({}), &limits());
    for name in ["reward", "my reward-2.1", "belöhnung"] {
        let Plugin::Reward(plugin) = load(name).unwrap() else {
            panic!("{name}")
        };
        assert_eq!(plugin.id().name, name);
    }
    let long = "x".repeat(129);
    for name in [
        "",
        "..",
        ".hidden",
        "../../etc/passwd",
        "/etc/passwd",
        "a\\b",
        "a/mean",
        "a#2",
        "a\nb",
        "a\0",
        "\u{1b}[2J",
        "gpj.\u{202e}drawer",
        &long,
    ] {
        let error = load(name).err().unwrap();
        assert_eq!(
            (error.call, &error.fault),
            (Call::Load, &Fault::Name),
            "{name:?}"
        );
        assert!(error.hint().unwrap().contains("rename"));
        assert!(!error.to_string().contains(char::is_control), "{error}");
        let described = host.describe(name, &bytes).unwrap_err();
        assert_eq!(described.fault, Fault::Name);
    }
    assert_serves(&host);
}

/// The half of case 48 that has no secrets in it.
#[test]
fn a_huge_config_is_refused() {
    let _turn = turn();
    let host = host();
    let bytes = guest::scoring_after_ones("");
    let load = |text: String| host.load("evil", &bytes, &json!({ "a": text }), &limits());
    assert!(load("x".repeat(1 << 19)).is_ok());
    let error = load("x".repeat(1 << 20)).err().unwrap();
    let (bytes, limit) = ((1 << 20) + 8, 1 << 20);
    assert_eq!(error.fault, Fault::ConfigSize { bytes, limit });
    assert!(error.hint().unwrap().contains("shorten the config"));
    assert!(load("\0".to_owned()).is_ok(), "NUL is escaped in JSON");
}
