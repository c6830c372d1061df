//! The manifest of a component: the custom section `grpo:manifest`, JSON, which says what the plugin is and what it asks of
//! the host. It is part of the component, so that one digest, one signature and one file have both.

use serde::{Deserialize, Serialize};

use super::rules::HostRule;
use crate::plugin::log::is_printable;

/// Name of the custom section at the top level of a component.
const SECTION: &str = "grpo:manifest";
/// Bytes of a manifest.
const MAX_MANIFEST_BYTES: usize = 64 << 10;
/// Bytes of a reason or description, of a name or version.
const MAX_TEXT_BYTES: usize = 500;
const MAX_NAME_BYTES: usize = 64;
/// Hosts, and secrets, of one plugin.
pub(super) const MAX_ENTRIES: usize = 32;
/// What stands before the sections: magic, version, layer.
const PREAMBLE: usize = 8;

/// What a plugin is and what it asks for. Unknown fields are errors: a host that overlooked one might grant too much.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    pub name: String,
    pub version: String,
    pub description: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub license: Option<String>,
    #[serde(default)]
    pub asks: Asks,
}

/// What a plugin asks for, each with the reason that the operator reads.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Asks {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub judge: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub http: Option<HttpAsk>,
    /// By name; the operator says which environment variable has each.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub secrets: Vec<String>,
    /// Why it cannot do without WASI.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub wasi: Option<String>,
}

/// Hosts that a plugin wants to speak with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HttpAsk {
    /// As in a grant: `HOST`, `HOST:PORT`, `http://HOST:PORT`. `["*"]` leaves the choice to the operator.
    pub hosts: Vec<String>,
    pub reason: String,
}

impl HttpAsk {
    /// Whether the operator chooses the hosts.
    pub fn any(&self) -> bool {
        self.hosts == ["*"]
    }
}

impl Asks {
    /// What is asked for and why, a line each.
    pub fn lines(&self) -> Vec<String> {
        let judge = self.judge.iter().map(|why| format!("judge: {why}"));
        let http = self.http.iter().map(|http| {
            let hosts = http.hosts.join(", ");
            format!("http with {hosts}: {}", http.reason)
        });
        let secrets = self.secrets.iter().map(|name| format!("secret {name}"));
        let wasi = self.wasi.iter().map(|why| format!("wasi: {why}"));
        judge.chain(http).chain(secrets).chain(wasi).collect()
    }
}

/// Why a manifest cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ManifestError {
    #[error("is no JSON of a manifest: {0}")]
    Json(String),
    #[error("{0}")]
    Value(String),
    #[error("stands in the component {0} times")]
    Many(usize),
    #[error("has {0} bytes, more than the limit of {MAX_MANIFEST_BYTES}")]
    TooLarge(usize),
    #[error("stands in sections that are cut off")]
    Sections,
}

impl Manifest {
    /// Reads JSON text, such as a project's `plugin.json`.
    ///
    /// # Errors
    /// Unknown, missing and repeated fields, and values that cannot be.
    pub fn parse(text: &[u8]) -> Result<Self, ManifestError> {
        if text.len() > MAX_MANIFEST_BYTES {
            return Err(ManifestError::TooLarge(text.len()));
        }
        let manifest: Self =
            serde_json::from_slice(text).map_err(|e| ManifestError::Json(e.to_string()))?;
        manifest.check()?;
        Ok(manifest)
    }

    /// The manifest of a component's bytes; `None` if there is none, which asks for nothing.
    ///
    /// # Errors
    /// As [`Manifest::parse`]; several manifests; sections that end beyond the file.
    pub fn of(component: &[u8]) -> Result<Option<Self>, ManifestError> {
        let mut found = Vec::new();
        let mut rest = component.get(PREAMBLE..).unwrap_or_default();
        while !rest.is_empty() {
            let (id, payload, after) = section(rest).ok_or(ManifestError::Sections)?;
            if id == 0
                && let Some(text) = custom(payload)
            {
                found.push(text);
            }
            rest = after;
        }
        match found[..] {
            [] => Ok(None),
            [text] => Self::parse(text).map(Some),
            _ => Err(ManifestError::Many(found.len())),
        }
    }

    /// The component with this manifest in the place of any that it has.
    ///
    /// # Errors
    /// Sections that end beyond the file, a manifest that [`Manifest::parse`] would refuse.
    pub fn embed(&self, component: &[u8]) -> Result<Vec<u8>, ManifestError> {
        self.check()?;
        let text = serde_json::to_vec(self).map_err(|e| ManifestError::Json(e.to_string()))?;
        if text.len() > MAX_MANIFEST_BYTES {
            return Err(ManifestError::TooLarge(text.len()));
        }
        let (preamble, mut rest) = component
            .split_at_checked(PREAMBLE)
            .ok_or(ManifestError::Sections)?;
        let mut out = preamble.to_vec();
        while !rest.is_empty() {
            let (id, payload, after) = section(rest).ok_or(ManifestError::Sections)?;
            if id != 0 || custom(payload).is_none() {
                out.extend(&rest[..rest.len() - after.len()]);
            }
            rest = after;
        }
        let mut payload = leb128(SECTION.len());
        payload.extend(SECTION.as_bytes());
        payload.extend(text);
        out.push(0);
        out.extend(leb128(payload.len()));
        out.extend(payload);
        Ok(out)
    }

    fn check(&self) -> Result<(), ManifestError> {
        let asks = &self.asks;
        let http = asks.http.as_ref();
        for (what, text, max) in [
            ("name", Some(&self.name), MAX_NAME_BYTES),
            ("version", Some(&self.version), MAX_NAME_BYTES),
            ("description", Some(&self.description), MAX_TEXT_BYTES),
            ("license", self.license.as_ref(), MAX_NAME_BYTES),
            ("asks.judge", asks.judge.as_ref(), MAX_TEXT_BYTES),
            ("asks.http.reason", http.map(|h| &h.reason), MAX_TEXT_BYTES),
            ("asks.wasi", asks.wasi.as_ref(), MAX_TEXT_BYTES),
        ] {
            let fits = |text: &String| (1..=max).contains(&text.len()) && is_printable(text);
            if !text.is_none_or(fits) {
                return Err(value(format!(
                    "`{what}` is not 1 to {max} bytes without control characters"
                )));
            }
        }
        if let Some(http) = http.filter(|http| !http.any()) {
            entries("asks.http.hosts", &http.hosts, 1)?;
            for host in &http.hosts {
                HostRule::parse(host).map_err(|e| value(format!("`asks.http.hosts`: {e}")))?;
            }
        }
        entries("asks.secrets", &asks.secrets, 0)?;
        match asks.secrets.iter().find(|name| !is_secret_name(name)) {
            Some(name) => Err(value(format!(
                "`asks.secrets`: `{}` is not 1 to {MAX_NAME_BYTES} letters, digits, `-` and `_`",
                crate::plugin::printable(name, MAX_NAME_BYTES)
            ))),
            None => Ok(()),
        }
    }
}

/// Whether a plugin may call a secret so.
pub(super) fn is_secret_name(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_');
    (1..=MAX_NAME_BYTES).contains(&name.len()) && name.chars().all(plain)
}

/// A list of reasonable length in which nothing stands twice.
fn entries(what: &str, list: &[String], least: usize) -> Result<(), ManifestError> {
    if !(least..=MAX_ENTRIES).contains(&list.len()) {
        let found = list.len();
        return Err(value(format!(
            "`{what}` has {found} entries; allowed: {least} to {MAX_ENTRIES}"
        )));
    }
    let twice = |(i, entry): (usize, &String)| list[..i].contains(entry);
    match list.iter().enumerate().any(twice) {
        true => Err(value(format!("`{what}` has an entry twice"))),
        false => Ok(()),
    }
}

fn value(reason: String) -> ManifestError {
    ManifestError::Value(reason)
}

/// The first section: its id, its payload, and what comes after it.
fn section(bytes: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let (&id, rest) = bytes.split_first()?;
    let (size, rest) = length(rest)?;
    let (payload, after) = rest.split_at_checked(size)?;
    Some((id, payload, after))
}

/// What a custom section of our name holds.
fn custom(payload: &[u8]) -> Option<&[u8]> {
    let (size, rest) = length(payload)?;
    let (name, text) = rest.split_at_checked(size)?;
    (name == SECTION.as_bytes()).then_some(text)
}

/// A length in LEB128, of at most 32 bits.
fn length(bytes: &[u8]) -> Option<(usize, &[u8])> {
    let mut value = 0_u64;
    for (i, &byte) in bytes.iter().take(5).enumerate() {
        value |= u64::from(byte & 0x7f) << (7 * i);
        if byte & 0x80 == 0 {
            let value = u32::try_from(value).ok()?;
            return Some((value as usize, &bytes[i + 1..]));
        }
    }
    None
}

fn leb128(mut value: usize) -> Vec<u8> {
    let mut out = Vec::new();
    loop {
        let low = (value & 0x7f) as u8;
        value >>= 7;
        if value == 0 {
            out.push(low);
            return out;
        }
        out.push(low | 0x80);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EMPTY: &[u8] = b"\0asm\x0d\0\x01\0";

    fn whole() -> &'static str {
        r#"{"name": "a", "version": "1.0.0", "description": "b", "license": "MIT", "asks":
            {"judge": "why", "http": {"hosts": ["a.example:8443"], "reason": "r"}, "secrets": ["KEY"]}}"#
    }

    #[test]
    fn what_is_embedded_is_found_and_replaced() {
        assert_eq!(Manifest::of(EMPTY), Ok(None));
        let manifest = Manifest::parse(whole().as_bytes()).unwrap();
        // Another custom section before it, one of 200 bytes after it.
        let mut component = [EMPTY, &[0, 3, 1, b'x', 9]].concat();
        component = manifest.embed(&component).unwrap();
        component.extend([0, 0xc8, 0x01, 1, b'y']);
        component.extend([0; 198]);
        assert_eq!(Manifest::of(&component), Ok(Some(manifest.clone())));
        let other = Manifest {
            name: "other".to_owned(),
            ..manifest
        };
        let replaced = other.embed(&component).unwrap();
        assert_eq!(Manifest::of(&replaced), Ok(Some(other)));
        assert_eq!(replaced.len(), component.len() + 4);
        assert!(replaced.starts_with(&[EMPTY, &[0, 3, 1, b'x', 9, 0, 0xc8]].concat()));
    }

    #[test]
    fn two_manifests_and_cut_off_sections_are_refused() {
        let manifest = Manifest::parse(whole().as_bytes()).unwrap();
        let once = manifest.embed(EMPTY).unwrap();
        let twice = [&once[..], &once[PREAMBLE..]].concat();
        assert_eq!(Manifest::of(&twice), Err(ManifestError::Many(2)));
        for cut in PREAMBLE + 1..once.len() {
            assert_eq!(Manifest::of(&once[..cut]), Err(ManifestError::Sections));
        }
        let endless = [EMPTY, &[0, 0xff, 0xff, 0xff, 0xff, 0xff]].concat();
        assert_eq!(Manifest::of(&endless), Err(ManifestError::Sections));
    }

    #[test]
    fn only_known_fields_with_sane_values() {
        let reason = |from: &str, to: &str| {
            assert!(whole().contains(from), "{from}");
            let text = whole().replacen(from, to, 1);
            Manifest::parse(text.as_bytes()).unwrap_err().to_string()
        };
        for (from, to, why) in [
            (r#""license""#, r#""licence""#, "unknown field `licence`"),
            (
                r#""judge""#,
                r#""files": "x", "judge""#,
                "unknown field `files`",
            ),
            (
                r#""reason""#,
                r#""port": 1, "reason""#,
                "unknown field `port`",
            ),
            (r#""name": "a","#, "", "missing field `name`"),
            (
                r#""name""#,
                r#""name": "b", "name""#,
                "duplicate field `name`",
            ),
            (r#""why""#, r#""""#, "`asks.judge` is not 1 to 500 bytes"),
            (r#""why""#, r#""a\nb""#, "`asks.judge`"),
            (r#"["a.example:8443"]"#, "[]", "has 0 entries"),
            (
                r#"["a.example:8443"]"#,
                r#"["u@a"]"#,
                "`asks.http.hosts`: `u@a`",
            ),
            (r#"["KEY"]"#, r#"["KEY", "KEY"]"#, "an entry twice"),
            (r#"["KEY"]"#, r#"["K=E"]"#, "`K=E` is not"),
        ] {
            let found = reason(from, to);
            assert!(found.contains(why), "{to}: {found}");
        }
        let large = vec![b' '; MAX_MANIFEST_BYTES + 1];
        assert!(matches!(
            Manifest::parse(&large),
            Err(ManifestError::TooLarge(_))
        ));
    }
}
