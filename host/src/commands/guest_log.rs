//! What plugins log, on stderr: a line once, however often it comes, and how often that was at the end.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use crate::plugin::{LogLevel, LogLine, LogSink};

/// Different lines that are remembered; what comes after them is printed each time.
const MAX_KNOWN: usize = 256;

/// Lines of guests, from level info on. The counts are printed when the last plugin is dropped.
pub(super) fn guest_log() -> LogSink {
    // Guests may log at any moment, also while a bar is drawn; plain lines on stderr are what every
    // terminal copes with.
    to(|line| eprintln!("{line}"))
}

fn to(print: impl Fn(&str) + Send + Sync + 'static) -> LogSink {
    let known = Known {
        counts: Mutex::default(),
        print,
    };
    Arc::new(move |line| known.say(&line))
}

/// The lines printed so far and how often each was written. Their order is that of the first time.
struct Known<P: Fn(&str)> {
    counts: Mutex<HashMap<String, (usize, u64)>>,
    print: P,
}

impl<P: Fn(&str)> Known<P> {
    fn say(&self, line: &LogLine<'_>) {
        if line.level < LogLevel::Info {
            return;
        }
        let text = format!("[{}] {:?}: {}", line.plugin, line.level, line.text);
        // A panic elsewhere cannot leave a count half written.
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, count)) = counts.get_mut(&text) {
            *count += 1;
            return;
        }
        (self.print)(&text);
        let place = counts.len();
        if place < MAX_KNOWN {
            counts.insert(text, (place, 1));
        }
    }
}

impl<P: Fn(&str)> Drop for Known<P> {
    fn drop(&mut self) {
        let counts = self
            .counts
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner);
        let mut repeated: Vec<_> = counts.drain().filter(|(_, (_, n))| *n > 1).collect();
        repeated.sort_unstable_by_key(|(_, (place, _))| *place);
        for (text, (_, n)) in repeated {
            (self.print)(&format!("{text} (said {n} times)"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_printed_once_and_counted_at_the_end() {
        let lines = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&lines);
        let sink = to(move |line| seen.lock().unwrap().push(line.to_owned()));
        let say = |plugin, level, text| {
            sink(LogLine {
                plugin,
                digest: "",
                level,
                text,
            });
        };
        for _ in 0..3 {
            say("a", LogLevel::Warn, "odd");
            say("b", LogLevel::Warn, "odd");
            say("a", LogLevel::Debug, "noise");
        }
        say("a", LogLevel::Info, "once");
        let first = ["[a] Warn: odd", "[b] Warn: odd", "[a] Info: once"];
        assert_eq!(*lines.lock().unwrap(), first);
        drop(sink);
        let last = [
            "[a] Warn: odd (said 3 times)",
            "[b] Warn: odd (said 3 times)",
        ];
        assert_eq!(lines.lock().unwrap()[3..], last);
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let count = Arc::new(Mutex::new(0));
        let printed = Arc::clone(&count);
        let sink = to(move |_| *printed.lock().unwrap() += 1);
        for round in 0..2 {
            for i in 0..MAX_KNOWN + 10 {
                sink(LogLine {
                    plugin: "a",
                    digest: "",
                    level: LogLevel::Info,
                    text: &i.to_string(),
                });
            }
            assert_eq!(*count.lock().unwrap(), MAX_KNOWN + 10 * (round + 1));
        }
    }
}
