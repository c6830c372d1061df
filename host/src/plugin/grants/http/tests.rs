//! What guests in WAT cannot show: names whose address changes, bodies, headers.

use super::*;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener};
use std::time::Duration;

/// A server on this machine that gives each connection the next of `replies`, and notes the heads of requests.
fn server(replies: Vec<String>) -> (u16, Arc<Mutex<Vec<String>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let heads = Arc::new(Mutex::new(Vec::new()));
    let noted = Arc::clone(&heads);
    std::thread::spawn(move || {
        for reply in replies {
            let (mut stream, _) = listener.accept().unwrap();
            let lines = BufReader::new(stream.try_clone().unwrap()).lines();
            let head = lines
                .map_while(Result::ok)
                .take_while(|line| !line.is_empty());
            let head = head.collect::<Vec<_>>().join("\n");
            noted.lock().unwrap().push(head);
            write!(stream, "HTTP/1.1 {reply}\r\nconnection: close\r\n\r\n").unwrap();
        }
    });
    (port, heads)
}

/// Answers with each address once, the last one for ever; counts.
fn changing(addresses: &'static [&'static str]) -> (Lookup, Arc<AtomicUsize>) {
    let asked = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&asked);
    let lookup: Lookup = Arc::new(move |_| {
        let turn = count.fetch_add(1, Ordering::Relaxed);
        let address = addresses[turn.min(addresses.len() - 1)];
        Ok(vec![SocketAddr::new(address.parse().unwrap(), 0)])
    });
    (lookup, asked)
}

fn send(hosts: &[&str], lookup: &Lookup, request: Request) -> Result<Response, HttpError> {
    let rules = hosts.iter().map(|h| HostRule::parse(h).unwrap()).collect();
    let http = Http::new(rules, lookup).unwrap();
    let end = Instant::now() + Duration::from_secs(5);
    http.send(&[request], end).remove(0)
}

fn get(url: &str) -> Request {
    Request {
        post: false,
        url: url.to_owned(),
        headers: Vec::new(),
        body: Vec::new(),
    }
}

#[test]
fn hostile_36_a_name_whose_address_changes() {
    let (port, heads) = server(vec!["204 x".to_owned(), "204 x".to_owned()]);
    // What was looked at is what is connected to; another look would have found nobody.
    let (lookup, asked) = changing(&["127.0.0.1", "192.0.2.1"]);
    let own = format!("http://own.example:{port}");
    let found = send(&[&own], &lookup, get(&own)).unwrap();
    assert_eq!((found.status, asked.load(Ordering::Relaxed)), (204, 1));
    assert!(heads.lock().unwrap()[0].contains("own.example"));
    // A name of the internet may be on the internet only, now and later.
    for address in [
        &["127.0.0.1"],
        &["10.0.0.1"],
        &["169.254.169.254"],
        &["::ffff:127.0.0.1"],
    ] {
        let (lookup, _) = changing(address);
        let found = send(&["http://a.example"], &lookup, get("http://a.example/"));
        assert!(
            matches!(&found, Err(HttpError::Denied(why)) if why.contains("a.example")),
            "{found:?}"
        );
    }
    // Nor is the metadata service behind a port.
    let (lookup, _) = changing(&["169.254.169.254"]);
    let found = send(&[&own], &lookup, get(&own));
    assert!(matches!(found, Err(HttpError::Denied(_))), "{found:?}");
    assert_eq!(heads.lock().unwrap().len(), 1);
}

#[test]
fn keys_and_bodies_stay_with_the_server_they_were_for() {
    let (there, seen) = server(vec!["204 x".to_owned()]);
    let to = |status: &str| format!("{status} x\r\nlocation: http://127.0.0.1:{there}/next");
    let (here, _) = server(vec![to("302"), to("307")]);
    let hosts = [here, there].map(|port| format!("http://127.0.0.1:{port}"));
    let named = hosts.each_ref().map(String::as_str);
    let with_key = |post: bool| Request {
        post,
        headers: vec![("authorization".to_owned(), "Bearer key".to_owned())],
        body: if post { b"body".to_vec() } else { Vec::new() },
        ..get(&hosts[0])
    };
    let lookup = system_lookup();
    assert_eq!(send(&named, &lookup, with_key(false)).unwrap().status, 204);
    let head = seen.lock().unwrap()[0].to_lowercase();
    assert!(
        head.starts_with("get /next") && !head.contains("bearer"),
        "{head}"
    );
    let sent_on = send(&named, &lookup, with_key(true)).unwrap_err();
    assert!(matches!(sent_on, HttpError::Denied(_)), "{sent_on:?}");
}

#[test]
fn requests_that_are_none_are_denied() {
    let lookup = system_lookup();
    let base = || get("https://a.example/");
    let header = |name: &str, value: &str| Request {
        headers: vec![(name.to_owned(), value.to_owned())],
        ..base()
    };
    for request in [
        header("Host", "b.example"),
        header("content-length", "5"),
        header("Transfer-Encoding", "chunked"),
        header("x", "a\r\nevil: 1"),
        header("a b", "1"),
        header("x", &"y".repeat(MAX_HEADER_BYTES)),
        Request {
            body: vec![1],
            ..base()
        },
        Request {
            post: true,
            body: vec![0; MAX_REQUEST_BYTES + 1],
            ..base()
        },
        get(&format!("https://a.example/{}", "x".repeat(MAX_URL_BYTES))),
    ] {
        let found = send(&["a.example"], &lookup, request);
        assert!(matches!(found, Err(HttpError::Denied(_))), "{found:?}");
    }
    let http = Http::new(Vec::new(), &lookup).unwrap();
    let many = (0..=MAX_REQUESTS).map(|_| base()).collect::<Vec<_>>();
    let found = http.send(&many, Instant::now() + Duration::from_secs(5));
    assert_eq!(found.len(), MAX_REQUESTS + 1);
    assert!(found.iter().all(|f| matches!(f, Err(HttpError::Denied(_)))));
}
