//! Clients that stall, flood or send rubbish, and paths that no socket address holds.

use super::*;
use std::{
    io::{BufRead, BufReader},
    sync::mpsc::sync_channel,
};

fn request() -> Request {
    Request {
        role: "reward".to_owned(),
        source: "/new.wasm".to_owned(),
        ..Request::default()
    }
}

fn answer(stream: &UnixStream) -> Event {
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).unwrap();
    serde_json::from_str(&line).unwrap()
}

#[test]
fn a_long_path_and_a_stale_socket_are_no_obstacle_and_others_have_no_access() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("x".repeat(120));
    fs::create_dir(&root).unwrap();
    for _ in 0..2 {
        let (sender, requests) = sync_channel(2);
        let control = listen(&root, sender).unwrap();
        let mode = |path: PathBuf| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(root.join(FOLDER)), 0o700);
        assert_eq!(mode(root.join(FOLDER).join(SOCKET)), 0o600);
        let mut stream = connect(&root).unwrap();
        send(&mut stream, &request()).unwrap();
        let incoming = requests.recv_timeout(PATIENCE).unwrap();
        assert_eq!(incoming.request, request());
        incoming.reply.unwrap().send(Event::Ended {}).unwrap();
        assert_eq!(answer(&stream), Event::Ended {});
        // As a killed process leaves it.
        std::mem::forget(control);
    }
}

#[test]
fn hostile_clients_are_answered_and_forgotten() {
    let dir = tempfile::tempdir().unwrap();
    let (sender, requests) = sync_channel(2);
    let control = listen(dir.path(), sender).unwrap();
    for (text, reason) in [
        (b"rubbish\n".to_vec(), "not a request"),
        (b"{\"role\": \"reward\"}\n".to_vec(), "missing field"),
        (b"\xff\xfe\n".to_vec(), "not a request"),
        (vec![b'['; MAX_LINE + 8192], "more than 262144 bytes"),
        (b"{\"role\"".to_vec(), "no request came in time"),
    ] {
        let mut stream = connect(dir.path()).unwrap();
        // The server may have had enough before all is written.
        drop(stream.write_all(&text));
        match answer(&stream) {
            Event::Refused { reason: found, .. } => assert!(found.contains(reason), "{found}"),
            other => panic!("{other}"),
        }
    }
    // All places taken by clients that say nothing: the next is sent away, and served once they are timed out.
    // A thread of a client above that ends only now would leave a place.
    control.drain();
    let begun = Instant::now();
    let idle: Vec<UnixStream> = (0..MAX_CLIENTS)
        .map(|_| connect(dir.path()).unwrap())
        .collect();
    loop {
        let mut stream = connect(dir.path()).unwrap();
        // Refused at once: its line may find nobody.
        drop(send(&mut stream, &request()));
        if let Ok(incoming) = requests.recv_timeout(Duration::from_millis(50)) {
            assert_eq!(incoming.request, request());
            break;
        }
        assert!(begun.elapsed() < 10 * PATIENCE);
    }
    assert!(begun.elapsed() > PATIENCE / 2, "{:?}", begun.elapsed());
    drop(idle);
}
