//! Secrets: handed to a guest by name, and blotted out of whatever it says.
//!
//! This finds the value as it is and in the encodings that text usually gets. It cannot find one that a guest has cut to
//! pieces, encrypted, or turned into numbers: a granted secret is a secret that the plugin has.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;

use base64::Engine;
use base64::engine::general_purpose::{STANDARD_NO_PAD, URL_SAFE_NO_PAD};

/// Bytes of a secret. Shorter ones would be found in innocent text.
const MIN_BYTES: usize = 8;
const MAX_BYTES: usize = 64 << 10;

/// What a plugin was granted, by its own names.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Secrets {
    values: BTreeMap<String, String>,
    /// What is blotted out, longest first, each with the secret's name.
    traces: Vec<(String, String)>,
}

/// Why a value is no secret.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SecretError {
    #[error("has fewer than {MIN_BYTES} bytes, which would be found in innocent text")]
    Short,
    #[error("has more than {MAX_BYTES} bytes")]
    Long,
    #[error("holds a NUL character")]
    Nul,
}

/// The names alone.
impl fmt::Debug for Secrets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.values.keys()).finish()
    }
}

impl Secrets {
    /// Adds one.
    ///
    /// # Errors
    /// A value that could not be kept secret or is none.
    pub fn add(&mut self, name: &str, value: &str) -> Result<(), SecretError> {
        // A file that was read into a variable ends in a newline, which no key has.
        let value = value.trim_end_matches(['\r', '\n']);
        match value.len() {
            ..MIN_BYTES => return Err(SecretError::Short),
            bytes if bytes > MAX_BYTES => return Err(SecretError::Long),
            _ => {}
        }
        if value.contains('\0') {
            return Err(SecretError::Nul);
        }
        self.values.insert(name.to_owned(), value.to_owned());
        for trace in traces(value) {
            self.traces.push((trace, name.to_owned()));
        }
        self.traces
            .sort_by_key(|(trace, _)| std::cmp::Reverse(trace.len()));
        Ok(())
    }

    pub(in crate::plugin) fn get(&self, name: &str) -> Option<&str> {
        self.values.get(name).map(String::as_str)
    }

    /// The names that were granted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.values.keys().map(String::as_str)
    }

    /// [`Secrets::redact`] of a text of one's own.
    pub(in crate::plugin) fn clean(&self, text: String) -> String {
        match self.redact(&text) {
            Cow::Owned(clean) => clean,
            Cow::Borrowed(_) => text,
        }
    }

    /// A text with `[secret NAME]` where a secret stood, case aside.
    pub(in crate::plugin) fn redact<'a>(&self, text: &'a str) -> Cow<'a, str> {
        let mut text = Cow::Borrowed(text);
        for (trace, name) in &self.traces {
            if let Some(clean) = replaced(&text, trace, name) {
                text = Cow::Owned(clean);
            }
        }
        text
    }
}

/// The text without a trace; `None` if there is none of it.
fn replaced(text: &str, trace: &str, name: &str) -> Option<String> {
    let (bytes, wanted) = (text.as_bytes(), trace.as_bytes());
    let mut out = String::new();
    let mut kept = 0;
    let mut at = 0;
    while at + wanted.len() <= bytes.len() {
        if bytes[at..at + wanted.len()].eq_ignore_ascii_case(wanted) {
            // A trace begins and ends with whole characters, and so does what equals it.
            out.push_str(text.get(kept..at)?);
            out.push_str(&format!("[secret {name}]"));
            at += wanted.len();
            kept = at;
        } else {
            at += 1;
        }
    }
    if kept == 0 {
        return None;
    }
    out.push_str(text.get(kept..)?);
    Some(out)
}

/// A value as text may hold it: as it is, its longer lines, in base64 of either alphabet (which ends where padding would begin),
/// hex, percent-encoded, escaped as in JSON, backwards.
fn traces(value: &str) -> Vec<String> {
    let hex = |bytes: &[u8]| {
        bytes
            .iter()
            .fold(String::new(), |hex, byte| hex + &format!("{byte:02x}"))
    };
    let percent = |c: char| match c {
        c if c.is_ascii_alphanumeric() || "-._~".contains(c) => c.to_string(),
        c => c
            .to_string()
            .bytes()
            .fold(String::new(), |text, byte| text + &format!("%{byte:02X}")),
    };
    let json = serde_json::Value::from(value).to_string();
    let mut all = vec![
        value.to_owned(),
        hex(value.as_bytes()),
        value.chars().map(percent).collect(),
        json.trim_matches('"').to_owned(),
        value.chars().rev().collect(),
    ];
    all.extend(
        value
            .lines()
            .filter(|l| l.len() >= MIN_BYTES)
            .map(str::to_owned),
    );
    // What stands before the value shifts its base64 by one or two bytes: what is the same then is the middle.
    for engine in [STANDARD_NO_PAD, URL_SAFE_NO_PAD] {
        for shift in 0..3 {
            let shifted = [&[0; 2][..shift], value.as_bytes()].concat();
            let encoded = engine.encode(&shifted);
            let first = (shift * 8).div_ceil(6);
            let last = shifted.len() * 8 / 6;
            all.extend(encoded.get(first..last).map(str::to_owned));
        }
    }
    all.sort();
    all.dedup();
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use base64::engine::general_purpose::{STANDARD, URL_SAFE};

    const VALUE: &str = "sk-Ab\"cd/ef+42é";

    fn secrets() -> Secrets {
        let mut secrets = Secrets::default();
        secrets.add("KEY", VALUE).unwrap();
        secrets
    }

    #[test]
    fn a_secret_is_found_in_usual_encodings() {
        let secrets = secrets();
        let pairs = format!("user:{VALUE}");
        for text in [
            VALUE.to_owned(),
            VALUE.to_uppercase().replace('É', "é"),
            STANDARD.encode(VALUE),
            URL_SAFE.encode(VALUE),
            STANDARD.encode(&pairs),
            STANDARD.encode(format!("u:{VALUE}!")),
            STANDARD.encode(format!("me:{VALUE}")),
            "736b2d41622263642f65662b3432c3a9".to_owned(),
            "736B2D41622263642F65662B3432C3A9".to_owned(),
            "sk-Ab%22cd%2Fef%2B42%C3%A9".to_owned(),
            r#"sk-Ab\"cd/ef+42é"#.to_owned(),
            "é24+fe/dc\"bA-ks".to_owned(),
        ] {
            let clean = secrets
                .redact(&format!("<{text}> and <{text}>"))
                .into_owned();
            assert_eq!(clean.matches("[secret KEY]").count(), 2, "{text}: {clean}");
            assert!(!clean.contains("sk-") && !clean.contains("cd/"), "{clean}");
        }
        assert!(matches!(
            secrets.redact("nothing here, é"),
            Cow::Borrowed(_)
        ));
        assert_eq!(format!("{secrets:?}"), r#"{"KEY"}"#);
    }

    #[test]
    fn lines_of_a_long_secret_are_secrets() {
        let mut secrets = Secrets::default();
        secrets
            .add("PEM", "-----BEGIN-----\nMIIEvQIBADAN\nx\n")
            .unwrap();
        assert_eq!(secrets.redact("a MIIEvQIBADAN b x"), "a [secret PEM] b x");
        assert_eq!(secrets.get("PEM"), Some("-----BEGIN-----\nMIIEvQIBADAN\nx"));
    }

    #[test]
    fn the_longer_of_two_secrets_goes_first() {
        let mut secrets = Secrets::default();
        secrets.add("A", "12345678").unwrap();
        secrets.add("B", "1234567890").unwrap();
        assert_eq!(
            secrets.redact("1234567890 12345678"),
            "[secret B] [secret A]"
        );
    }

    #[test]
    fn hostile_values_are_refused() {
        let mut secrets = Secrets::default();
        let huge = "x".repeat(MAX_BYTES + 1);
        for (value, error) in [
            ("", SecretError::Short),
            ("seven77\n", SecretError::Short),
            ("with\0nul-inside", SecretError::Nul),
            (&huge, SecretError::Long),
        ] {
            assert_eq!(secrets.add("KEY", value), Err(error));
        }
        assert_eq!(secrets, Secrets::default());
    }
}
