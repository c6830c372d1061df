//! Lines that guests write: escaped, cut, counted and attributed.

use super::grants::Secrets;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Lines of one call that are passed on; the rest are counted.
pub(super) const MAX_LINES: usize = 200;
/// Bytes of one line that are passed on.
pub(super) const MAX_LINE_BYTES: usize = 2048;

/// Lines a second that a plugin may go on writing, over all its calls, and how many it may save up.
const LINES_PER_SECOND: f64 = 20.0;
const BURST: f64 = 2000.0;

/// How important a guest says its line is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum LogLevel {
    Debug,
    Info,
    Warn,
    Error,
}

/// One line for the run's log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogLine<'a> {
    pub plugin: &'a str,
    pub digest: &'a str,
    pub level: LogLevel,
    /// One line without control characters.
    pub text: &'a str,
}

/// Where lines go. Called on the thread that calls the plugin, while the guest waits.
///
/// An `Arc`, because every running instance holds one.
pub type LogSink = Arc<dyn Fn(LogLine<'_>) + Send + Sync>;

/// Makes foreign text fit for a terminal and a one-line record: at most `max` bytes, control and
/// direction-changing characters spelled out, so that nothing can move the cursor or forge a line.
pub fn printable(text: &str, max: usize) -> String {
    let mut out = String::with_capacity(text.len().min(max));
    for c in text.chars() {
        let before = out.len();
        match c {
            c if changes_direction(c) => out.extend(c.escape_unicode()),
            c if c.is_control() => out.extend(c.escape_default()),
            c => out.push(c),
        }
        if out.len() > max {
            out.truncate(before);
            out.push('…');
            break;
        }
    }
    out
}

/// Whether [`printable`] would leave a text as it is, but for its length.
pub(super) fn is_printable(text: &str) -> bool {
    !text.chars().any(|c| c.is_control() || changes_direction(c))
}

fn changes_direction(c: char) -> bool {
    matches!(c, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// What a plugin may still log, over all its calls: a bucket that fills with time. 200 lines of each
/// call would be millions in a run that scores one by one.
pub(super) struct Flood(Mutex<Bucket>);

struct Bucket {
    lines: f64,
    filled: Instant,
    dropped: u64,
}

/// What becomes of a line.
#[derive(Debug, PartialEq)]
enum Passage {
    /// It is passed on; this many were dropped before it.
    After(u64),
    FirstDropped,
    Dropped,
}

impl Default for Flood {
    fn default() -> Self {
        Self(Mutex::new(Bucket {
            lines: BURST,
            filled: Instant::now(),
            dropped: 0,
        }))
    }
}

impl Flood {
    fn admit(&self, now: Instant) -> Passage {
        let mut bucket = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let passed = now.saturating_duration_since(bucket.filled).as_secs_f64();
        bucket.lines = (bucket.lines + passed * LINES_PER_SECOND).min(BURST);
        bucket.filled = now;
        if bucket.lines >= 1.0 {
            bucket.lines -= 1.0;
            return Passage::After(std::mem::take(&mut bucket.dropped));
        }
        bucket.dropped += 1;
        if bucket.dropped == 1 {
            Passage::FirstDropped
        } else {
            Passage::Dropped
        }
    }
}

/// The log of one call.
pub(super) struct CallLog {
    flood: Arc<Flood>,
    sink: LogSink,
    plugin: Arc<str>,
    digest: Arc<str>,
    secrets: Arc<Secrets>,
    lines: usize,
}

impl CallLog {
    pub(super) fn new(
        sink: LogSink,
        flood: Arc<Flood>,
        plugin: Arc<str>,
        digest: Arc<str>,
        secrets: Arc<Secrets>,
    ) -> Self {
        Self {
            flood,
            sink,
            plugin,
            digest,
            secrets,
            lines: 0,
        }
    }

    /// Takes a line. The time that the sink took is the answer: it is the host's and not the guest's.
    pub(super) fn line(&mut self, level: LogLevel, text: &str) -> Duration {
        self.lines += 1;
        if self.lines > MAX_LINES {
            return Duration::ZERO;
        }
        let begun = Instant::now();
        let text = self.secrets.redact(text);
        self.pass_on(level, &printable(&text, MAX_LINE_BYTES));
        begun.elapsed()
    }

    /// Says how many lines were dropped and starts a new count.
    pub(super) fn end_call(&mut self) {
        let dropped = self.lines.saturating_sub(MAX_LINES);
        if dropped > 0 {
            self.pass_on(
                LogLevel::Warn,
                &format!("{dropped} more lines were dropped"),
            );
        }
        self.lines = 0;
    }

    fn pass_on(&self, level: LogLevel, text: &str) {
        match self.flood.admit(Instant::now()) {
            Passage::After(0) => self.print(level, text),
            Passage::After(dropped) => {
                let gap = format!("{dropped} lines were dropped, being too many a second");
                self.print(LogLevel::Warn, &gap);
                self.print(level, text);
            }
            Passage::FirstDropped => {
                let gap = format!("lines are dropped: more than {LINES_PER_SECOND} a second");
                self.print(LogLevel::Warn, &gap);
            }
            Passage::Dropped => {}
        }
    }

    fn print(&self, level: LogLevel, text: &str) {
        (self.sink)(LogLine {
            plugin: &self.plugin,
            digest: &self.digest,
            level,
            text,
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes_what_moves_the_cursor() {
        assert_eq!(
            printable("a\u{1b}[2J\nb\u{9b}\u{202e}é", 99),
            "a\\u{1b}[2J\\nb\\u{9b}\\u{202e}é"
        );
    }

    #[test]
    fn a_flood_is_thinned_to_a_trickle() {
        let flood = Flood::default();
        let start = Instant::now();
        for _ in 0..2000 {
            assert_eq!(flood.admit(start), Passage::After(0));
        }
        assert_eq!(flood.admit(start), Passage::FirstDropped);
        for _ in 0..9 {
            assert_eq!(flood.admit(start), Passage::Dropped);
        }
        let later = start + Duration::from_secs(1);
        assert_eq!(flood.admit(later), Passage::After(10));
        let passed = (0..100).filter(|_| flood.admit(later) == Passage::After(0));
        assert_eq!(passed.count(), 19);
    }

    #[test]
    fn cuts_between_characters() {
        assert_eq!(printable("ééé", 4), "éé…");
        assert_eq!(printable("ab\n", 3), "ab…");
    }
}
