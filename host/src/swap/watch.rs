//! Watch mode: a plugin's file that changes is a candidate.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{RecvTimeoutError, Sender, SyncSender, TrySendError, channel},
    },
    time::{Duration, SystemTime},
};

use super::{channel::Incoming, protocol::Request};
use crate::{plugin::digest, setup::read_component, types::Seat};

/// How often files are looked at. One that has changed is read once it is the same at two looks: a compiler may be
/// writing it.
const EVERY: Duration = Duration::from_millis(250);

/// A file that may change.
pub(super) struct Watched {
    seat: Seat,
    path: PathBuf,
    /// Of the component that was last loaded from it, or tried.
    digest: String,
    /// When it was modified and its length: as read, and at the last look.
    read: Option<Stamp>,
    seen: Option<Stamp>,
}

type Stamp = (SystemTime, u64);

impl Watched {
    pub(super) fn new(seat: Seat, path: &Path, digest: &str) -> Self {
        Self {
            seat,
            path: path.to_owned(),
            digest: digest.to_owned(),
            read: None,
            seen: None,
        }
    }

    /// The request that a change makes, once it has settled. A file that cannot be read now may be there again later.
    fn look(&mut self) -> Option<Incoming> {
        let found = fs::metadata(&self.path).ok()?;
        let stamp = (found.modified().ok()?, found.len());
        if self.seen.replace(stamp) != Some(stamp) || self.read == Some(stamp) {
            return None;
        }
        let bytes = read_component(&self.path).ok()?;
        self.read = Some(stamp);
        let digest = digest(&bytes);
        if digest == self.digest {
            return None;
        }
        self.digest = digest;
        Some(Incoming {
            request: Request {
                role: self.seat.role.to_string(),
                source: self.path.to_string_lossy().into_owned(),
                ..Request::default()
            },
            seat: Some(self.seat),
            reply: None,
        })
    }
}

impl Watched {
    /// What was just read found no place in the queue.
    fn look_again(&mut self) {
        self.read = None;
        self.digest.clear();
    }
}

/// The files of a run's plugins, and the thread that looks at them until this is dropped.
pub(super) struct Watch {
    files: Arc<Mutex<Vec<Watched>>>,
    _stop: Sender<()>,
}

impl Watch {
    pub(super) fn start(
        files: Vec<Watched>,
        requests: SyncSender<Incoming>,
    ) -> std::io::Result<Self> {
        let files = Arc::new(Mutex::new(files));
        let looked_at = Arc::clone(&files);
        let (stop, stopped) = channel();
        std::thread::Builder::new()
            .name("watch-plugins".to_owned())
            .spawn(move || {
                while stopped.recv_timeout(EVERY) == Err(RecvTimeoutError::Timeout) {
                    let mut files = looked_at.lock().unwrap_or_else(PoisonError::into_inner);
                    for file in files.iter_mut() {
                        let Some(incoming) = file.look() else {
                            continue;
                        };
                        match requests.try_send(incoming) {
                            Ok(()) => {}
                            Err(TrySendError::Full(_)) => file.look_again(),
                            Err(TrySendError::Disconnected(_)) => return,
                        }
                    }
                }
            })?;
        Ok(Self { files, _stop: stop })
    }

    /// Watches another file for a seat from now on.
    pub(super) fn follow(&self, file: Watched) {
        let mut files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        files.retain(|known| known.seat != file.seat || known.path == file.path);
        match files.iter_mut().find(|known| known.seat == file.seat) {
            Some(known) => known.digest = file.digest,
            None => files.push(file),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_a_candidate_once_it_has_settled_and_once_only() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("r.wasm");
        fs::write(&path, "one").unwrap();
        let seat = Seat {
            role: crate::types::Role::Curriculum,
            slot: 0,
        };
        let mut file = Watched::new(seat, &path, &digest(b"one"));
        assert!((0..4).all(|_| file.look().is_none()));
        fs::write(&path, "three").unwrap();
        assert!(file.look().is_none(), "it may still be written");
        let incoming = file.look().unwrap();
        assert_eq!(incoming.seat, Some(seat));
        assert_eq!(incoming.request.role, "curriculum");
        assert_eq!(incoming.request.source, path.to_string_lossy());
        assert!((0..4).all(|_| file.look().is_none()));
        fs::remove_file(&path).unwrap();
        assert!(file.look().is_none());
        fs::write(&path, "seventh").unwrap();
        assert!(file.look().is_none());
        assert!(file.look().is_some());
    }
}
