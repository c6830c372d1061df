//! An OpenAI-compatible endpoint in miniature that misbehaves as it is told. Left alone it answers a chat with the last
//! message and its length, and a text with the vector of its length and first byte.

use std::{
    collections::VecDeque,
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    sync::{Arc, Condvar, Mutex, MutexGuard},
    thread,
    time::Duration,
};

use serde_json::{Value, json};

/// What becomes of a request instead of an answer.
#[derive(Clone)]
pub(crate) enum Fault {
    /// Status, further header lines, body.
    Status(u16, &'static str, &'static str),
    /// The connection closes without a word.
    Reset,
    /// The answer stops after so many bytes of its body.
    CutAfter(usize),
    /// A body with status 200.
    Says(&'static str),
    /// Nothing comes, until the client hangs up.
    Hang,
    /// A body without an end.
    Endless,
}

#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub(crate) path: String,
    pub(crate) authorization: Option<String>,
    pub(crate) body: Value,
}

#[derive(Default)]
struct State {
    faults: VecDeque<Fault>,
    /// For all requests that have none of their own.
    always: Option<Fault>,
    requests: Vec<Request>,
    in_flight: usize,
    most_in_flight: usize,
    hung_up: usize,
    /// Answers wait until so many requests are in flight.
    gate: usize,
    /// What it says to a question, if not the question again.
    script: Option<fn(&str) -> &'static str>,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

pub(crate) struct Server {
    port: u16,
    shared: Arc<Shared>,
}

/// Longest wait for what a test expects to happen.
const PATIENCE: Duration = Duration::from_secs(20);

impl Server {
    /// Serves from threads that end with the test process.
    pub(crate) fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        let served = Arc::clone(&shared);
        thread::spawn(move || {
            for stream in listener.incoming() {
                let shared = Arc::clone(&served);
                thread::spawn(move || shared.serve(stream.unwrap()));
            }
        });
        Self { port, shared }
    }

    pub(crate) fn url(&self) -> String {
        format!("http://127.0.0.1:{}/v1", self.port)
    }

    pub(crate) fn say(&self, script: fn(&str) -> &'static str) {
        self.shared.lock().script = Some(script);
    }

    /// What happens to the next requests, one after the other.
    pub(crate) fn fail_next(&self, faults: &[Fault]) {
        self.shared.lock().faults.extend(faults.iter().cloned());
    }

    pub(crate) fn fail_always(&self, fault: Option<Fault>) {
        self.shared.lock().always = fault;
    }

    /// Holds answers back until so many requests are in flight.
    pub(crate) fn gather(&self, requests: usize) {
        self.shared.lock().gate = requests;
    }

    pub(crate) fn requests(&self) -> Vec<Request> {
        self.shared.lock().requests.clone()
    }

    pub(crate) fn most_in_flight(&self) -> usize {
        self.shared.lock().most_in_flight
    }

    /// Waits until so many clients have hung up on it.
    pub(crate) fn wait_for_hang_ups(&self, count: usize) {
        let state = self.shared.lock();
        let waits = |state: &mut State| state.hung_up < count;
        let (state, waited) = self
            .shared
            .changed
            .wait_timeout_while(state, PATIENCE, waits)
            .unwrap();
        drop(state);
        assert!(!waited.timed_out(), "fewer than {count} clients hung up");
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// One request for each connection.
    fn serve(&self, mut stream: TcpStream) {
        let Some(request) = read(&stream) else { return };
        let fault = {
            let mut state = self.lock();
            state.requests.push(request.clone());
            state.in_flight += 1;
            state.most_in_flight = state.most_in_flight.max(state.in_flight);
            self.changed.notify_all();
            let gate = state.gate;
            let waits = |state: &mut State| state.most_in_flight < gate;
            let (mut state, _waited) = self
                .changed
                .wait_timeout_while(state, PATIENCE, waits)
                .unwrap();
            state.faults.pop_front().or_else(|| state.always.clone())
        };
        let hung_up = self.act(&mut stream, &request, fault);
        let mut state = self.lock();
        state.in_flight -= 1;
        state.hung_up += usize::from(hung_up);
        self.changed.notify_all();
        drop(state);
    }

    /// Whether the client hung up before the end.
    fn act(&self, stream: &mut TcpStream, request: &Request, fault: Option<Fault>) -> bool {
        let script = self.lock().script;
        let body = answer(request, script).to_string();
        match fault {
            None => write(stream, 200, "", &body, body.len()),
            Some(Fault::Says(body)) => write(stream, 200, "", body, body.len()),
            Some(Fault::Status(status, headers, body)) => {
                write(stream, status, headers, body, body.len())
            }
            Some(Fault::CutAfter(end)) => write(stream, 200, "", &body, end),
            Some(Fault::Reset) => false,
            // The client sends nothing more, so this ends when it closes.
            Some(Fault::Hang) => stream.read(&mut [0]).is_ok_and(|n| n == 0),
            Some(Fault::Endless) => {
                let head = "HTTP/1.1 200 X\r\nConnection: close\r\n\r\n";
                let mut sent = stream.write_all(head.as_bytes());
                while sent.is_ok() {
                    sent = stream.write_all(&[b' '; 8192]);
                }
                true
            }
        }
    }
}

fn read(stream: &TcpStream) -> Option<Request> {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut lines = reader.by_ref().lines().map_while(Result::ok);
    let first = lines.next()?;
    let path = first.split(' ').nth(1)?.to_owned();
    let (mut length, mut authorization) = (0, None);
    for line in lines.take_while(|line| !line.is_empty()) {
        let (name, value) = line.split_once(": ")?;
        match name.to_ascii_lowercase().as_str() {
            "content-length" => length = value.parse().unwrap(),
            "authorization" => authorization = Some(value.to_owned()),
            _ => {}
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    Some(Request {
        path,
        authorization,
        body: serde_json::from_slice(&body).unwrap(),
    })
}

fn write(stream: &mut TcpStream, status: u16, headers: &str, body: &str, end: usize) -> bool {
    let head = format!(
        "HTTP/1.1 {status} X\r\nConnection: close\r\nContent-Length: {}\r\n{headers}\r\n",
        body.len()
    );
    let sent = stream
        .write_all(head.as_bytes())
        .and_then(|()| stream.write_all(&body.as_bytes()[..end]));
    sent.is_err()
}

fn answer(request: &Request, script: Option<fn(&str) -> &'static str>) -> Value {
    if request.path.ends_with("/embeddings") {
        let texts = request.body["input"].as_array().unwrap();
        let item = |(index, text): (usize, &Value)| {
            let text = text.as_str().unwrap();
            let first = text.bytes().next().unwrap_or(0);
            json!({ "index": index, "embedding": [text.len(), first] })
        };
        let data: Vec<Value> = texts.iter().enumerate().map(item).collect();
        return json!({ "data": data, "usage": { "prompt_tokens": 5 * texts.len() } });
    }
    let said = request.body["messages"].as_array().unwrap().last().unwrap();
    let said = said["content"].as_str().unwrap();
    let echo = || format!("{said}! {}", said.len());
    let content = script.map_or_else(echo, |script| script(said).to_owned());
    json!({
        "choices": [{
            "message": { "role": "assistant", "content": content },
            "finish_reason": "stop",
        }],
        "usage": { "prompt_tokens": 10, "completion_tokens": 2 },
    })
}
