//! A registry in miniature that does as it is told: good answers by default, and any kind of bad one per path.

use std::{
    collections::HashMap,
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    sync::{Arc, Mutex},
    thread,
    time::Duration,
};

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const SIGNATURE: &str = "application/vnd.grpo-host.minisign.v1";

pub(super) fn sha256(bytes: &[u8]) -> String {
    format!("sha256:{:x}", Sha256::digest(bytes))
}

/// An answer.
#[derive(Clone)]
pub(super) struct Reply {
    pub(super) status: u16,
    pub(super) headers: Vec<(&'static str, String)>,
    pub(super) body: Vec<u8>,
    pub(super) manner: Manner,
}

/// How the body is sent.
#[derive(Clone, Copy)]
pub(super) enum Manner {
    Whole,
    /// Announced whole, and cut off after so many bytes.
    Cut(usize),
    /// Nothing at all, and the connection stays open.
    Stall,
    /// The headers, then a byte now and then.
    Drip,
    /// Without a length and without an end.
    Endless,
}

impl Reply {
    pub(super) fn status(status: u16) -> Self {
        Self {
            status,
            headers: Vec::new(),
            body: Vec::new(),
            manner: Manner::Whole,
        }
    }

    pub(super) fn body(bytes: &[u8]) -> Self {
        Self {
            body: bytes.to_vec(),
            ..Self::status(200)
        }
    }

    pub(super) fn manner(manner: Manner) -> Self {
        Self {
            manner,
            ..Self::body(&[b'x'; 64])
        }
    }

    pub(super) fn header(mut self, name: &'static str, value: &str) -> Self {
        self.headers.push((name, value.to_owned()));
        self
    }
}

#[derive(Default)]
struct State {
    /// By path below `/v2/me/reward/`, or the whole path of others.
    replies: HashMap<String, Reply>,
    /// Method and path with the `Authorization` of each request.
    requests: Vec<(String, Option<String>)>,
    /// Sent with a 401 to whoever has no `Authorization`.
    challenge: Option<String>,
}

pub(super) struct Server {
    port: u16,
    state: Arc<Mutex<State>>,
}

impl Server {
    /// Serves from threads that end with the test process.
    pub(super) fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let state = Arc::new(Mutex::new(State::default()));
        let shared = Arc::clone(&state);
        thread::spawn(move || {
            for stream in listener.incoming() {
                let state = Arc::clone(&shared);
                thread::spawn(move || serve(stream.unwrap(), &state));
            }
        });
        Self { port, state }
    }

    pub(super) fn host(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// `me/reward` at a tag or pin: what follows the repository's name.
    pub(super) fn reference(&self, rest: &str) -> String {
        format!("{}/me/reward{rest}", self.host())
    }

    pub(super) fn set(&self, path: &str, reply: Reply) {
        self.state
            .lock()
            .unwrap()
            .replies
            .insert(path.to_owned(), reply);
    }

    pub(super) fn challenge(&self, challenge: &str) {
        self.state.lock().unwrap().challenge = Some(challenge.to_owned());
    }

    pub(super) fn unset(&self, path: &str) {
        self.state.lock().unwrap().replies.remove(path);
    }

    pub(super) fn requests(&self) -> Vec<(String, Option<String>)> {
        self.state.lock().unwrap().requests.clone()
    }

    /// A blob, under its digest or another.
    pub(super) fn blob(&self, digest: &str, bytes: &[u8]) {
        self.set(&format!("blobs/{digest}"), Reply::body(bytes));
    }

    /// A manifest under its digest and a tag; its digest.
    pub(super) fn manifest(&self, tag: &str, manifest: &Value) -> String {
        let bytes = manifest.to_string().into_bytes();
        let digest = sha256(&bytes);
        let reply = Reply::body(&bytes).header("content-type", MANIFEST);
        let reply = reply.header("docker-content-digest", &digest);
        self.set(&format!("manifests/{digest}"), reply.clone());
        self.set(&format!("manifests/{tag}"), reply);
        digest
    }

    /// A component as it should be; the digest of its manifest.
    pub(super) fn publish(&self, tag: &str, bytes: &[u8]) -> String {
        self.blob(&sha256(bytes), bytes);
        self.manifest(tag, &manifest(&[layer(bytes)]))
    }

    /// Signatures, as an index of referrers.
    pub(super) fn signatures(&self, subject: &str, texts: &[&str]) {
        let list = texts.iter().map(|text| {
            self.blob(&sha256(text.as_bytes()), text.as_bytes());
            let signed = json!({
                "schemaVersion": 2, "mediaType": MANIFEST, "artifactType": SIGNATURE,
                "config": { "mediaType": "application/vnd.oci.empty.v1+json", "digest": sha256(b"{}"), "size": 2 },
                "layers": [{ "mediaType": SIGNATURE, "digest": sha256(text.as_bytes()), "size": text.len() }],
                "subject": { "mediaType": MANIFEST, "digest": subject, "size": 1 },
            });
            let digest = self.manifest("signature", &signed);
            let size = signed.to_string().len();
            json!({ "mediaType": MANIFEST, "digest": digest, "size": size, "artifactType": SIGNATURE })
        });
        let index = json!({ "schemaVersion": 2, "mediaType": INDEX, "manifests": list.collect::<Vec<_>>() });
        self.set(
            &format!("referrers/{subject}"),
            Reply::body(index.to_string().as_bytes()),
        );
    }
}

pub(super) fn layer(bytes: &[u8]) -> Value {
    json!({ "mediaType": "application/wasm", "digest": sha256(bytes), "size": bytes.len() })
}

pub(super) fn manifest(layers: &[Value]) -> Value {
    json!({
        "schemaVersion": 2, "mediaType": MANIFEST,
        "config": { "mediaType": "application/vnd.wasm.config.v0+json", "digest": sha256(b"{}"), "size": 2 },
        "layers": layers,
    })
}

fn serve(stream: TcpStream, state: &Mutex<State>) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut line = String::new();
    let (mut authorization, mut length) = (None, 0);
    if reader.read_line(&mut line).unwrap_or(0) == 0 {
        return;
    }
    let mut words = line.split(' ').map(str::to_owned);
    let (method, path) = (words.next().unwrap(), words.next().unwrap());
    loop {
        let mut header = String::new();
        reader.read_line(&mut header).unwrap();
        let Some((name, value)) = header.trim_end().split_once(": ") else {
            break;
        };
        match name.to_ascii_lowercase().as_str() {
            "authorization" => authorization = Some(value.to_owned()),
            "content-length" => length = value.parse().unwrap(),
            _ => {}
        }
    }
    std::io::copy(&mut reader.take(length), &mut std::io::sink()).unwrap();
    let short = path.strip_prefix("/v2/me/reward/").unwrap_or(&path);
    let reply = {
        let mut state = state.lock().unwrap();
        state
            .requests
            .push((format!("{method} {path}"), authorization.clone()));
        match state.challenge.clone().filter(|_| authorization.is_none()) {
            Some(challenge) => Some(Reply::status(401).header("www-authenticate", &challenge)),
            None => state.replies.get(short).cloned(),
        }
    };
    // A client that has seen enough closes the connection; that is not this server's failure.
    drop(send(stream, &reply.unwrap_or_else(|| Reply::status(404))));
}

fn send(mut stream: TcpStream, reply: &Reply) -> std::io::Result<()> {
    if let Manner::Stall = reply.manner {
        // Until the client hangs up.
        stream.read_to_end(&mut Vec::new())?;
        return Ok(());
    }
    write!(
        stream,
        "HTTP/1.1 {} x\r\nconnection: close\r\n",
        reply.status
    )?;
    for (name, value) in &reply.headers {
        write!(stream, "{name}: {value}\r\n")?;
    }
    if !matches!(reply.manner, Manner::Endless) {
        write!(stream, "content-length: {}\r\n", reply.body.len())?;
    }
    stream.write_all(b"\r\n")?;
    match reply.manner {
        Manner::Whole => stream.write_all(&reply.body),
        Manner::Cut(bytes) => stream.write_all(&reply.body[..bytes]),
        Manner::Endless => loop {
            stream.write_all(&[b' '; 65536])?;
        },
        Manner::Drip => reply.body.iter().try_for_each(|byte| {
            thread::sleep(Duration::from_millis(50));
            stream.write_all(&[*byte])?;
            stream.flush()
        }),
        Manner::Stall => Ok(()),
    }
}
