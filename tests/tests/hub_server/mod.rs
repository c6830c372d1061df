//! A Hugging Face hub in miniature: repository info, file metadata with ETags, and a store on another
//! port that large files are redirected to. Faults can be ordered per path.

use std::{
    collections::{HashMap, VecDeque},
    io::{BufRead, BufReader, Write},
    net::{TcpListener, TcpStream},
    sync::{Arc, Mutex, MutexGuard},
    thread,
};

use sha2::{Digest, Sha256};

/// What goes wrong with the next request whose path ends so.
pub(crate) enum Fault {
    Status(u16),
    /// The body stops after this many bytes and the connection closes.
    CutAfter(usize),
    IgnoreRange,
    FlipFirstByte,
}

#[derive(Clone, Debug)]
pub(crate) struct Request {
    /// The store got it, not the hub.
    pub(crate) store: bool,
    pub(crate) method: String,
    pub(crate) path: String,
    pub(crate) range: Option<String>,
    pub(crate) authorization: Option<String>,
}

/// Names and contents.
type Files = Vec<(String, Vec<u8>)>;

#[derive(Default)]
struct State {
    /// Repository → newest commit.
    heads: HashMap<String, String>,
    /// (repository, commit) → files.
    commits: HashMap<(String, String), Files>,
    faults: Vec<(String, VecDeque<Fault>)>,
    requests: Vec<Request>,
}

pub(crate) struct Server {
    port: u16,
    state: Arc<Mutex<State>>,
}

/// Files from this size on live in the store, as git-LFS files do.
const LARGE: usize = 1000;

pub(crate) fn sha256(bytes: &[u8]) -> String {
    format!("{:x}", Sha256::digest(bytes))
}

impl Server {
    /// Serves from threads that end with the test process.
    pub(crate) fn start() -> Self {
        let state = Arc::new(Mutex::new(State::default()));
        let store = TcpListener::bind("127.0.0.1:0").unwrap();
        let hub = TcpListener::bind("127.0.0.1:0").unwrap();
        let (port, store_port) = (
            hub.local_addr().unwrap().port(),
            store.local_addr().unwrap().port(),
        );
        for (listener, is_store) in [(hub, false), (store, true)] {
            let state = Arc::clone(&state);
            thread::spawn(move || {
                for stream in listener.incoming() {
                    let state = Arc::clone(&state);
                    thread::spawn(move || serve(stream.unwrap(), &state, is_store, store_port));
                }
            });
        }
        Self { port, state }
    }

    pub(crate) fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// Makes `commit` the newest one of the repository.
    pub(crate) fn publish(&self, id: &str, commit: &str, files: &[(&str, &[u8])]) {
        let files = files
            .iter()
            .map(|(name, bytes)| ((*name).to_owned(), bytes.to_vec()))
            .collect();
        let mut state = self.lock();
        state.heads.insert(id.to_owned(), commit.to_owned());
        state
            .commits
            .insert((id.to_owned(), commit.to_owned()), files);
    }

    /// Faults of one path happen one after the other; those of bodies wait for a GET.
    pub(crate) fn fail_next(&self, path_end: &str, fault: Fault) {
        let mut state = self.lock();
        match state.faults.iter_mut().find(|(end, _)| end == path_end) {
            Some((_, faults)) => faults.push_back(fault),
            None => state
                .faults
                .push((path_end.to_owned(), VecDeque::from([fault]))),
        }
    }

    pub(crate) fn requests(&self) -> Vec<Request> {
        self.lock().requests.clone()
    }

    /// `Range` of every request to the store for a file.
    pub(crate) fn ranges(&self, name: &str) -> Vec<Option<String>> {
        let wanted = |r: &Request| r.store && r.path.ends_with(name);
        self.requests()
            .into_iter()
            .filter(wanted)
            .map(|r| r.range)
            .collect()
    }

    pub(crate) fn gets(&self, name: &str) -> usize {
        self.requests()
            .iter()
            .filter(|r| r.method == "GET" && r.path.ends_with(name))
            .count()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }
}

fn serve(stream: TcpStream, state: &Mutex<State>, store: bool, store_port: u16) {
    let mut lines = BufReader::new(stream.try_clone().unwrap())
        .lines()
        .map_while(Result::ok);
    let Some(first) = lines.next() else { return };
    let mut words = first.split(' ').map(str::to_owned);
    let (method, path) = (words.next().unwrap(), words.next().unwrap());
    let (mut range, mut authorization) = (None, None);
    for line in lines.take_while(|line| !line.is_empty()) {
        let (name, value) = line.split_once(": ").unwrap();
        match name.to_ascii_lowercase().as_str() {
            "range" => range = Some(value.to_owned()),
            "authorization" => authorization = Some(value.to_owned()),
            _ => {}
        }
    }
    let request = Request {
        store,
        method,
        path,
        range,
        authorization,
    };
    let answer = {
        let mut state = state.lock().unwrap();
        state.requests.push(request.clone());
        answer(&mut state, &request, store_port)
    };
    write_answer(stream, &request, answer);
}

struct Answer {
    status: u16,
    headers: Vec<String>,
    body: Vec<u8>,
    cut: Option<usize>,
}

fn plain(status: u16, body: Vec<u8>) -> Answer {
    Answer {
        status,
        headers: Vec::new(),
        body,
        cut: None,
    }
}

fn write_answer(mut stream: TcpStream, request: &Request, answer: Answer) {
    let mut head = format!("HTTP/1.1 {} X\r\nConnection: close\r\n", answer.status);
    head.push_str(&format!("Content-Length: {}\r\n", answer.body.len()));
    answer
        .headers
        .iter()
        .for_each(|h| head.push_str(&format!("{h}\r\n")));
    head.push_str("\r\n");
    let end = answer.cut.unwrap_or(answer.body.len());
    let body = if request.method == "HEAD" {
        &[][..]
    } else {
        &answer.body[..end]
    };
    // The client may hang up early, which is its right.
    drop(
        stream
            .write_all(head.as_bytes())
            .and_then(|()| stream.write_all(body)),
    );
}

fn answer(state: &mut State, request: &Request, store_port: u16) -> Answer {
    let fault = next_fault(state, request);
    if let Some(Fault::Status(status)) = fault {
        return plain(status, Vec::new());
    }
    let path = request.path.trim_start_matches('/');
    let path = path.strip_prefix("store/").unwrap_or(path);
    let parts: Vec<&str> = path.splitn(6, '/').collect();
    match parts[..] {
        [
            "api",
            "models" | "datasets",
            org,
            name,
            "revision",
            revision,
        ] => info(state, &format!("{org}/{name}"), revision),
        ["datasets", org, name, "resolve", ..] => {
            let rest = path.splitn(5, '/').nth(4).unwrap_or("");
            file(
                state,
                &format!("{org}/{name}"),
                rest,
                request,
                fault,
                store_port,
            )
        }
        [org, name, "resolve", ..] => {
            let rest = path.splitn(4, '/').nth(3).unwrap_or("");
            file(
                state,
                &format!("{org}/{name}"),
                rest,
                request,
                fault,
                store_port,
            )
        }
        _ => plain(404, Vec::new()),
    }
}

/// Body faults only fit where the body is: in a GET that is not answered with a redirect.
fn next_fault(state: &mut State, request: &Request) -> Option<Fault> {
    let (_, faults) = state
        .faults
        .iter_mut()
        .find(|(end, _)| request.path.ends_with(&**end))?;
    let fits = matches!(faults.front()?, Fault::Status(_)) || request.store;
    if fits { faults.pop_front() } else { None }
}

fn info(state: &State, id: &str, revision: &str) -> Answer {
    let Some(commit) = state.heads.get(id).filter(|_| revision == "main") else {
        return plain(404, Vec::new());
    };
    let files = &state.commits[&(id.to_owned(), commit.clone())];
    let names = files
        .iter()
        .map(|(name, _)| serde_json::json!({ "rfilename": name }));
    let json = serde_json::json!({ "sha": commit, "siblings": names.collect::<Vec<_>>() });
    plain(200, json.to_string().into_bytes())
}

fn file(
    state: &State,
    id: &str,
    commit_and_name: &str,
    request: &Request,
    fault: Option<Fault>,
    store_port: u16,
) -> Answer {
    let (commit, name) = commit_and_name.split_once('/').unwrap();
    let files = state.commits.get(&(id.to_owned(), commit.to_owned()));
    let Some((_, bytes)) = files.and_then(|f| f.iter().find(|(n, _)| n == name)) else {
        return plain(404, Vec::new());
    };
    if bytes.len() < LARGE {
        let mut answer = plain(200, bytes.clone());
        answer
            .headers
            .push(format!("ETag: W/\"{}\"", &sha256(bytes)[..40]));
        return answer;
    }
    if !request.store {
        let mut answer = plain(302, Vec::new());
        let location = format!("http://127.0.0.1:{store_port}/store{}", request.path);
        answer.headers.push(format!("Location: {location}"));
        answer
            .headers
            .push(format!("X-Linked-Etag: \"{}\"", sha256(bytes)));
        answer
            .headers
            .push(format!("X-Linked-Size: {}", bytes.len()));
        return answer;
    }
    body(bytes, request, fault)
}

fn body(bytes: &[u8], request: &Request, fault: Option<Fault>) -> Answer {
    let from = request.range.as_deref().map(|range| {
        range
            .strip_prefix("bytes=")
            .unwrap()
            .strip_suffix('-')
            .unwrap()
            .parse::<usize>()
            .unwrap()
    });
    match (from, fault) {
        (Some(from), None) => {
            let mut answer = plain(206, bytes[from..].to_vec());
            let (last, all) = (bytes.len() - 1, bytes.len());
            answer
                .headers
                .push(format!("Content-Range: bytes {from}-{last}/{all}"));
            answer
        }
        (_, Some(Fault::FlipFirstByte)) => {
            let mut answer = plain(200, bytes.to_vec());
            answer.body[0] ^= 1;
            answer
        }
        (_, fault) => {
            let mut answer = plain(200, bytes.to_vec());
            if let Some(Fault::CutAfter(n)) = fault {
                answer.cut = Some(n);
            }
            answer
        }
    }
}
