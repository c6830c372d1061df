//! The three-way check, case by case.

use super::*;

const IMPORTS: [&str; 5] = [
    "grpo:plugin/host@0.1.0",
    "grpo:plugin/judge@0.1.3",
    "grpo:plugin/http@0.1.0",
    "grpo:plugin/secrets@0.1.0",
    "wasi:clocks/wall-clock@0.2.6",
];

fn asks() -> Asks {
    Asks {
        judge: Some("it asks a model".to_owned()),
        http: Some(HttpAsk {
            hosts: vec!["a.example".to_owned(), "b.example:8443".to_owned()],
            reason: "it looks things up".to_owned(),
        }),
        secrets: vec!["KEY".to_owned()],
        wasi: Some("it prints".to_owned()),
    }
}

fn grants() -> Grants {
    Grants {
        judge: Some("qwen".to_owned()),
        http: Some(HttpGrant {
            hosts: vec!["b.example:8443".to_owned(), "a.example".to_owned()],
        }),
        secrets: [("KEY".to_owned(), "MY_KEY".to_owned())].into(),
        wasi: true,
    }
}

fn check(asks: &Asks, grants: &Grants, imports: &[&str]) -> Result<(), String> {
    let imports: Vec<String> = imports.iter().map(|i| (*i).to_owned()).collect();
    agree(asks, grants, &imports, Role::Reward).map_err(|mismatch| {
        assert!(!mismatch.hint().is_empty() && !mismatch.to_string().contains('\n'));
        mismatch.to_string()
    })
}

#[test]
fn what_agrees_in_all_three_passes() {
    assert_eq!(check(&asks(), &grants(), &IMPORTS), Ok(()));
    let (nothing, none) = (Asks::default(), Grants::default());
    assert_eq!(check(&nothing, &none, &IMPORTS[..1]), Ok(()));
}

#[test]
fn each_disagreement_has_its_line() {
    for (without, key) in [(1, "judge"), (2, "http"), (3, "secrets"), (4, "wasi")] {
        let mut imports = IMPORTS.to_vec();
        let import = imports.remove(without);
        let unused = format!("asks for `{key}` in its manifest and imports nothing of it");
        assert_eq!(check(&asks(), &grants(), &imports), Err(unused));
        let hidden = format!("imports `{import}`, which its manifest does not ask for");
        let found = check(&Asks::default(), &grants(), &[IMPORTS[0], import]);
        assert_eq!(found, Err(hidden));
        let found = check(&Asks::default(), &grants(), &IMPORTS[..1]).unwrap_err();
        assert!(found.contains("is granted `judge`"), "{found}");
    }
    type Change = fn(&mut Asks, &mut Grants);
    let cases: [(Change, &str); 9] = [
        (
            |_, g| g.judge = None,
            "asks for `judge` (\"it asks a model\")",
        ),
        (|_, g| g.http = None, "asks for `http: a.example`"),
        (|_, g| g.secrets.clear(), "asks for `secrets: KEY`"),
        (
            |_, g| {
                g.secrets.insert("MORE".to_owned(), "X".to_owned());
            },
            "is granted `secrets: MORE` by the config",
        ),
        (
            |a, _| a.wasi = None,
            "imports `wasi:clocks/wall-clock@0.2.6`, which its manifest",
        ),
        (
            |_, g| g.wasi = false,
            "asks for `wasi` (\"it prints\"), which the config does not grant",
        ),
        (
            |_, g| {
                if let Some(http) = &mut g.http {
                    http.hosts.push("c.example".to_owned());
                }
            },
            "is granted `http: c.example` by the config",
        ),
        (
            |_, g| {
                if let Some(http) = &mut g.http {
                    http.hosts.pop();
                }
            },
            "asks for `http: a.example` (\"it looks things up\"), which the config does not grant",
        ),
        (
            |_, g| g.http = Some(HttpGrant { hosts: Vec::new() }),
            "asks for `http: a.example`",
        ),
    ];
    for (change, expected) in cases {
        let (mut asks, mut grants) = (asks(), grants());
        change(&mut asks, &mut grants);
        let found = check(&asks, &grants, &IMPORTS).unwrap_err();
        assert!(found.contains(expected), "{found}");
    }
}

#[test]
fn a_plugin_may_leave_hosts_to_the_operator() {
    let mut asks = asks();
    if let Some(http) = &mut asks.http {
        http.hosts = vec!["*".to_owned()];
    }
    assert_eq!(check(&asks, &grants(), &IMPORTS), Ok(()));
    let mut none = grants();
    none.http = None;
    let found = check(&asks, &none, &IMPORTS).unwrap_err();
    assert!(found.contains("asks for `http: HOST`"), "{found}");
    let mut star = grants();
    star.http = Some(HttpGrant {
        hosts: vec!["*".to_owned()],
    });
    let access = Access {
        grants: star,
        ..Access::default()
    };
    assert!(matches!(access.reach(), Err(Mismatch::Host { .. })));
}

#[test]
fn a_curriculum_gets_nothing() {
    let imports = IMPORTS.map(str::to_owned);
    let found = agree(&asks(), &grants(), &imports, Role::Curriculum);
    assert_eq!(found, Err(Mismatch::Curriculum { key: "judge" }));
}
