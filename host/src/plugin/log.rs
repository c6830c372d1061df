//! Lines that guests write: escaped, cut, counted and attributed.

use std::sync::Arc;

/// Lines of one call that are passed on; the rest are counted.
pub(super) const MAX_LINES: usize = 200;
/// Bytes of one line that are passed on.
pub(super) const MAX_LINE_BYTES: usize = 2048;

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
            '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => {
                out.extend(c.escape_unicode());
            }
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

/// The log of one call.
pub(super) struct CallLog {
    sink: LogSink,
    plugin: Arc<str>,
    digest: Arc<str>,
    lines: usize,
}

impl CallLog {
    pub(super) fn new(sink: LogSink, plugin: Arc<str>, digest: Arc<str>) -> Self {
        Self {
            sink,
            plugin,
            digest,
            lines: 0,
        }
    }

    pub(super) fn line(&mut self, level: LogLevel, text: &str) {
        self.lines += 1;
        if self.lines <= MAX_LINES {
            self.pass_on(level, &printable(text, MAX_LINE_BYTES));
        }
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
    fn cuts_between_characters() {
        assert_eq!(printable("ééé", 4), "éé…");
        assert_eq!(printable("ab\n", 3), "ab…");
    }
}
