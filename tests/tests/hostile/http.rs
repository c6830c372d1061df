//! Guests with the `http` grant that reach for more, and servers that stall, never end or send elsewhere.

use super::granted::{asking, asks_http, hosts, insisting, listening, load_with, manifested};
use super::registry_server::{Manner, Reply, Server};
use super::{PATIENCE, assert_serves, limits, samples, totals, turn};
use grpo_host::plugin::{Fault, Limits};
use std::time::{Duration, Instant};

const DENIED: f64 = -1.0;
const TIMEOUT: f64 = -2.0;
const TOO_LARGE: f64 = -3.0;
const FAILED: f64 = -4.0;

/// Time for servers; the guest's own stays short.
fn patient() -> Limits {
    Limits {
        wait_ms: 1500,
        ..limits()
    }
}

/// What a guest with these hosts gets for each URL, and what the host said of it.
fn get(granted: &[&str], urls: &[&str]) -> (Vec<f64>, Vec<String>) {
    let (host, lines) = listening();
    let bytes = manifested(&asking(), &asks_http(granted));
    let plugin = load_with(&host, &bytes, &patient(), hosts(granted)).unwrap();
    let begun = Instant::now();
    let scoring = plugin.score(&samples(urls)).unwrap();
    assert!(begun.elapsed() < PATIENCE);
    assert_eq!(scoring.faults, []);
    assert_serves(&host);
    let lines = lines.lock().unwrap().clone();
    (
        totals(&scoring.scores).into_iter().flatten().collect(),
        lines,
    )
}

#[test]
fn hostile_36_hosts_that_were_not_named() {
    let _turn = turn();
    let urls = [
        "https://evil.example/",
        "https://api.example.com.evil.example/",
        "https://93.184.216.34/",
        "https://[::ffff:127.0.0.1]/",
        "http://169.254.169.254/latest/meta-data",
        "https://api.example.com@evil.example/",
        "https://me:pw@api.example.com/",
        "http://api.example.com/",
        "https://api.example.com:8443/",
        "https://api.example.com./",
        "file:///etc/passwd",
        "gopher://api.example.com/",
        "//api.example.com/",
        "",
    ];
    let (statuses, lines) = get(&["api.example.com"], &urls);
    assert_eq!(statuses, [DENIED; 14]);
    assert_eq!(lines.len(), 14);
    let server = Server::start();
    server.set("/", Reply::body(b"never"));
    // A name for this machine, and the machine itself by a port that was not named.
    let port = server.host().rsplit_once(':').unwrap().1.to_owned();
    let here = format!("http://127.0.0.1:{port}/");
    let (statuses, lines) = get(
        &["localhost", "http://localhost"],
        &["https://localhost/", "http://localhost/", &here],
    );
    assert_eq!(statuses, [DENIED; 3], "{lines:?}");
    let near = lines
        .iter()
        .filter(|line| line.contains("not an address of the internet"));
    assert_eq!(near.count(), 2, "{lines:?}");
    assert_eq!(server.requests(), []);
}

#[test]
fn hostile_36_redirects_are_held_to_the_same_rules() {
    let _turn = turn();
    let (server, other) = (Server::start(), Server::start());
    other.set("/", Reply::body(b"never"));
    let named = format!("http://{}", server.host());
    let elsewhere = format!("http://{}/", other.host());
    server.set("/here", Reply::status(302).header("location", "/there"));
    server.set("/there", Reply::body(b"found"));
    server.set("/loop", Reply::status(302).header("location", "/loop"));
    for (path, to) in [
        ("/other", elsewhere.as_str()),
        ("/metadata", "http://169.254.169.254/latest"),
        ("/user", "http://me:pw@127.0.0.1/"),
        ("/file", "file:///etc/passwd"),
    ] {
        server.set(path, Reply::status(307).header("location", to));
    }
    let paths = [
        "/here",
        "/there",
        "/loop",
        "/other",
        "/metadata",
        "/user",
        "/file",
        "/none",
    ];
    let urls = paths.map(|path| format!("{named}{path}"));
    let (statuses, lines) = get(&[&named], &urls.each_ref().map(String::as_str));
    let expected = [200.0, 200.0, DENIED, DENIED, DENIED, DENIED, DENIED, 404.0];
    assert_eq!(statuses, expected, "{lines:?}");
    assert_eq!(other.requests(), []);
}

#[test]
fn hostile_37_responses_without_an_end() {
    let _turn = turn();
    let server = Server::start();
    let named = format!("http://{}", server.host());
    server.set("/stall", Reply::manner(Manner::Stall));
    server.set("/drip", Reply::manner(Manner::Drip));
    server.set("/endless", Reply::manner(Manner::Endless));
    server.set(
        "/cut",
        Reply {
            manner: Manner::Cut(3),
            ..Reply::body(b"cut off")
        },
    );
    server.set("/large", Reply::body(&vec![b'x'; (4 << 20) + 1]));
    let many = (0..33_000).fold(Reply::body(b"x"), |reply, _| reply.header("x-a", "1"));
    server.set("/many", many);
    let long = "y".repeat(1000);
    let wide = (0..70).fold(Reply::body(b"x"), |reply, _| reply.header("x-b", &long));
    server.set("/wide", wide);
    server.set("/good", Reply::body(b"x"));
    let paths = [
        "/stall", "/drip", "/endless", "/cut", "/large", "/many", "/wide", "/good",
    ];
    let urls = paths.map(|path| format!("{named}{path}"));
    let (statuses, lines) = get(&[&named], &urls.each_ref().map(String::as_str));
    let expected = [
        TIMEOUT, TIMEOUT, TOO_LARGE, FAILED, TOO_LARGE, FAILED, TOO_LARGE, 200.0,
    ];
    assert_eq!(statuses, expected, "{lines:?}");
    // 64 requests of 4 MiB each are more than one call gets.
    server.set("/four", Reply::body(&vec![b'x'; 1 << 20]));
    let four = format!("{named}/four");
    let (host, _) = listening();
    let bytes = manifested(&asking(), &asks_http(&[&named]));
    let roomy = Limits {
        wait_ms: 10_000,
        ..limits()
    };
    let plugin = load_with(&host, &bytes, &roomy, hosts(&[&named])).unwrap();
    let scoring = plugin.score(&samples(&vec![four.as_str(); 40])).unwrap();
    // The guest has 4 MiB for all of it, and traps; the host has never held more than 16.
    assert_eq!(scoring.scores.len(), 40);
    assert_serves(&host);
}

#[test]
fn hostile_38_a_guest_that_waits_for_ever() {
    let _turn = turn();
    let server = Server::start();
    server.set("/stall", Reply::manner(Manner::Stall));
    let named = format!("http://{}", server.host());
    let url = format!("{named}/stall");
    let bytes = manifested(&insisting(), &asks_http(&[&named]));
    let waits = Limits {
        wait_ms: 300,
        ..limits()
    };
    let walled = Limits {
        wall_ms: 300,
        ..patient()
    };
    for (limits, expected) in [
        (waits, Fault::Wait { limit_ms: 300 }),
        (walled, Fault::Wall { limit_ms: 300 }),
    ] {
        let (host, _) = listening();
        let plugin = load_with(&host, &bytes, &limits, hosts(&[&named])).unwrap();
        let begun = Instant::now();
        let scoring = plugin.score(&samples(&[&url])).unwrap();
        assert!(
            begun.elapsed() < Duration::from_secs(8),
            "{:?}",
            begun.elapsed()
        );
        let [error] = scoring.faults.as_slice() else {
            panic!("{scoring:?}")
        };
        assert_eq!(error.fault, expected);
        assert!(error.hint().is_some());
        assert_serves(&host);
    }
}

/// The deadline is the guest's; a server that takes longer is not the guest's fault.
#[test]
fn hostile_40_waiting_for_a_server() {
    let _turn = turn();
    let server = Server::start();
    server.set(
        "/slow",
        Reply {
            manner: Manner::Drip,
            ..Reply::body(&[b'x'; 8])
        },
    );
    let named = format!("http://{}", server.host());
    let url = format!("{named}/slow");
    let begun = Instant::now();
    let (statuses, lines) = get(&[&named], &[&url]);
    assert_eq!(statuses, [200.0], "{lines:?}");
    let took = begun.elapsed();
    assert!(took > Duration::from_millis(300), "{took:?}");
}
