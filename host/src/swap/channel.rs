//! The control channel: a Unix socket in the run directory, for its owner alone.
//!
//! A client sends one line and reads events until the connection ends. What clients do, or fail to do, costs a thread each
//! for a bounded time and nothing else; the run only ever looks at a queue.

use std::{
    fs::{self, DirBuilder, File, Permissions},
    io::{self, ErrorKind, Read, Write},
    os::{
        fd::AsRawFd,
        unix::{
            fs::{DirBuilderExt, PermissionsExt},
            net::{UnixListener, UnixStream},
        },
    },
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
        mpsc::{Sender, SyncSender, TrySendError, channel},
    },
    time::{Duration, Instant},
};

use super::protocol::{Event, Request};
use crate::types::Seat;

/// Folder of the socket inside the run directory. Nobody else may enter it, so there is no moment at which a socket that
/// has just been made is open to others.
const FOLDER: &str = "control";
const SOCKET: &str = "socket";
/// Bytes of a request and of an event.
const MAX_LINE: usize = 256 << 10;
/// Clients served at the same time.
const MAX_CLIENTS: usize = 8;
/// Longest time for a client's request to arrive, and for an event to be taken from us.
const PATIENCE: Duration = Duration::from_secs(2);
/// Longest path that `sockaddr_un` holds, with its terminating zero.
const MAX_PATH: usize = 107;

/// A request with where to tell what becomes of it.
pub(super) struct Incoming {
    pub(super) request: Request,
    /// Whose place it is for, if that is known.
    pub(super) seat: Option<Seat>,
    /// `None`: nobody waits.
    pub(super) reply: Option<Sender<Event>>,
}

/// The listening end; the socket's file goes with it.
pub(super) struct Control {
    root: PathBuf,
    clients: Arc<AtomicUsize>,
}

/// Listens in the run directory `root`; a socket that a dead run has left is replaced. Only one process has a run open.
///
/// # Errors
/// A folder or socket that cannot be made.
pub(super) fn listen(root: &Path, requests: SyncSender<Incoming>) -> io::Result<Control> {
    let folder = root.join(FOLDER);
    match DirBuilder::new().mode(0o700).create(&folder) {
        Err(error) if error.kind() != ErrorKind::AlreadyExists => return Err(error),
        _ => fs::set_permissions(&folder, Permissions::from_mode(0o700))?,
    }
    match fs::remove_file(folder.join(SOCKET)) {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let (address, _open) = address(root)?;
    let listener = UnixListener::bind(address)?;
    fs::set_permissions(folder.join(SOCKET), Permissions::from_mode(0o600))?;
    let clients = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&clients);
    std::thread::Builder::new()
        .name("control".to_owned())
        .spawn(move || accept(&listener, &requests, &counted))?;
    let root = root.to_owned();
    Ok(Control { root, clients })
}

/// A path to the socket that `sockaddr_un` can hold, and what must stay open while it is used.
fn address(root: &Path) -> io::Result<(PathBuf, Option<File>)> {
    let path = root.join(FOLDER).join(SOCKET);
    if path.as_os_str().len() <= MAX_PATH {
        return Ok((path, None));
    }
    let folder = File::open(root.join(FOLDER))?;
    let short = PathBuf::from(format!("/proc/self/fd/{}/{SOCKET}", folder.as_raw_fd()));
    Ok((short, Some(folder)))
}

/// Opens the channel of a run.
///
/// # Errors
/// [`ErrorKind::NotFound`] and [`ErrorKind::ConnectionRefused`] where no run is going on.
pub fn connect(root: &Path) -> io::Result<UnixStream> {
    let (address, _open) = address(root)?;
    UnixStream::connect(address)
}

/// Sends one line.
///
/// # Errors
/// A peer that is gone, or does not take it in time.
pub fn send(stream: &mut UnixStream, line: &impl serde::Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(line)?;
    line.push(b'\n');
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.write_all(&line)
}

fn accept(listener: &UnixListener, requests: &SyncSender<Incoming>, clients: &Arc<AtomicUsize>) {
    loop {
        let Ok((mut stream, _)) = listener.accept() else {
            // Out of descriptors, mostly; those who have some give them back in time.
            std::thread::sleep(Duration::from_millis(100));
            continue;
        };
        if clients.load(Ordering::Relaxed) >= MAX_CLIENTS {
            drop(send(
                &mut stream,
                &refused("too many clients at once", "try again"),
            ));
            continue;
        }
        clients.fetch_add(1, Ordering::Relaxed);
        let guard = Counted(Arc::clone(clients));
        let requests = requests.clone();
        let serving = std::thread::Builder::new().name("control-client".to_owned());
        // A thread that cannot be had drops the client, who sees the end of the stream.
        drop(serving.spawn(move || {
            let _guard = guard;
            // A client that is gone needs no answer.
            drop(serve(stream, &requests));
        }));
    }
}

/// One client less when dropped.
struct Counted(Arc<AtomicUsize>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

fn serve(mut stream: UnixStream, requests: &SyncSender<Incoming>) -> io::Result<()> {
    let request = match read_line(&mut stream).map(|line| serde_json::from_slice(&line)) {
        Ok(Ok(request)) => request,
        Ok(Err(error)) => {
            let reason = format!("not a request: {error}");
            return send(&mut stream, &refused(&reason, UPDATE));
        }
        Err(error) => return send(&mut stream, &refused(&error.to_string(), UPDATE)),
    };
    let (reply, events) = channel();
    let incoming = Incoming {
        request,
        seat: None,
        reply: Some(reply),
    };
    match requests.try_send(incoming) {
        Ok(()) => {}
        Err(TrySendError::Full(_)) => {
            return send(&mut stream, &refused("too many requests wait", "try again"));
        }
        Err(TrySendError::Disconnected(_)) => return send(&mut stream, &Event::Ended {}),
    }
    while let Ok(event) = events.recv() {
        send(&mut stream, &event)?;
    }
    Ok(())
}

const UPDATE: &str = "use the `grpo-host` that runs the training: `grpo-host plugin swap`";

pub(super) fn refused(reason: &str, hint: &str) -> Event {
    Event::Refused {
        reason: reason.to_owned(),
        hint: Some(hint.to_owned()),
    }
}

/// A line without its end, which must be there in time; a byte at a time would be a way to stay for ever.
fn read_line(stream: &mut UnixStream) -> io::Result<Vec<u8>> {
    let end = Instant::now() + PATIENCE;
    let mut line = Vec::new();
    let mut chunk = [0; 4096];
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let late = || io::Error::new(ErrorKind::TimedOut, "no request came in time");
        if left.is_zero() {
            return Err(late());
        }
        stream.set_read_timeout(Some(left))?;
        let count = match stream.read(&mut chunk) {
            Ok(0) => {
                return Err(io::Error::new(
                    ErrorKind::UnexpectedEof,
                    "no whole line came",
                ));
            }
            Ok(count) => count,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Err(late()),
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        line.extend_from_slice(&chunk[..count]);
        if let Some(at) = line.iter().position(|byte| *byte == b'\n') {
            line.truncate(at);
            return Ok(line);
        }
        if line.len() > MAX_LINE {
            let reason = format!("the request has more than {MAX_LINE} bytes");
            return Err(io::Error::new(ErrorKind::InvalidData, reason));
        }
    }
}

impl Control {
    /// Waits until clients have been told what they wait for, a moment at most.
    pub(super) fn drain(&self) {
        let end = Instant::now() + PATIENCE;
        while self.clients.load(Ordering::Relaxed) > 0 && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        // The next run of this directory replaces what cannot be removed.
        drop(fs::remove_file(self.root.join(FOLDER).join(SOCKET)));
    }
}

#[cfg(test)]
#[path = "channel_tests.rs"]
mod tests;
