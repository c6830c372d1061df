//! minisign signatures (jedisct1.github.io/minisign) of components, and whose are trusted for what.
//!
//! A signature is one of the component's bytes, so `minisign -V` checks the file that was pulled. Its trusted comment, which is
//! signed as well, has `plugin:NAME:TAG` where it was made for a reference: else an old version with its good signature could
//! be served as the new one.

use std::{
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use base64::{Engine, engine::general_purpose::STANDARD};
use minisign::{PublicKey as PublicKeyOf, SecretKey, SecretKeyBox};
use minisign_verify::{PublicKey, Signature};

use super::Reference;

/// Bytes of a signature's text; minisign's own have about 300.
pub(super) const MAX_SIGNATURE_BYTES: u64 = 8192;
const FIELD: &str = "plugin:";

/// What a signature is asked to vouch for.
#[derive(Clone, Copy, Debug)]
pub enum Subject<'a> {
    /// Bytes alone.
    File(&'a str),
    Reference(&'a Reference),
}

impl Subject<'_> {
    fn shown(&self) -> String {
        match self {
            Self::File(name) => (*name).to_owned(),
            Self::Reference(reference) => reference.to_string(),
        }
    }
}

/// Who signed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Signed {
    /// The public key, in minisign's base64.
    pub key: String,
    /// The trusted comment, as it was signed.
    pub comment: String,
}

#[derive(Debug, thiserror::Error)]
pub enum TrustError {
    #[error("{origin}: `{text}` is no trusted key: {reason}")]
    Key {
        origin: String,
        text: String,
        reason: String,
    },
    #[error("{what} has no signature, and {keys} trusted")]
    Unsigned { what: String, keys: String },
    #[error("{what} is signed by none of the trusted keys ({keys} trusted)")]
    Stranger { what: String, keys: String },
    #[error("{what} has a signature of a trusted key that does not fit its bytes: {reason}")]
    Forged { what: String, reason: String },
    #[error("{what} has a signature that was made for {made_for}")]
    Replayed { what: String, made_for: String },
    #[error("cannot sign with {path}: {reason}")]
    SecretKey { path: String, reason: String },
}

impl TrustError {
    /// What the reader can do about it.
    pub fn hint(&self) -> Option<String> {
        Some(
            match self {
                Self::Key { .. } => "write the second line of a minisign .pub file, and after a space what it is trusted for",
                Self::Unsigned { .. } => "have its owner run `grpo-host plugin sign`, or trust keys for other places only",
                Self::Stranger { .. } => "if you trust its signer, add the key to trusted_keys",
                Self::Forged { .. } => "do not use it: its bytes are not those that were signed. Sign again after a rebuild",
                Self::Replayed { .. } => "do not use it: an old version is served as another. Its owner signs each tag",
                Self::SecretKey { .. } => "give a secret key made with `minisign -G`, and its password with --password-file",
            }
            .to_owned(),
        )
    }
}

/// A key, and the places it is trusted for.
#[derive(Clone)]
struct TrustedKey {
    key: PublicKey,
    text: String,
    /// `None`: everything.
    prefix: Option<String>,
}

/// A place under its one name: a folder can be spelled in many ways and be reached through links, none of which may lead past a key.
fn real(place: &str) -> String {
    match place.strip_prefix("dir:") {
        Some(folder) => format!("dir:{}", real_path(Path::new(folder)).display()),
        None => place.to_owned(),
    }
}

/// As [`std::fs::canonicalize`], with names at the end that stand for nothing (yet) as they are.
fn real_path(path: &Path) -> PathBuf {
    let whole = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    match (whole.canonicalize(), whole.parent(), whole.file_name()) {
        (Ok(real), ..) => real,
        (Err(_), Some(parent), Some(name)) => real_path(parent).join(name),
        (Err(_), ..) => whole,
    }
}

/// Keys whose signatures count. Where one of them covers a plugin, the plugin must have a signature of one that does.
#[derive(Clone, Default)]
pub struct TrustList(Vec<TrustedKey>);

impl TrustList {
    /// Adds a line `KEY [PREFIX]`, such as `RWQ… ghcr.io/me`; `origin` stands for where it was read.
    ///
    /// # Errors
    /// [`TrustError::Key`].
    pub fn add(&mut self, line: &str, origin: &str) -> Result<(), TrustError> {
        let mut words = line.split_whitespace();
        let (text, prefix) = (words.next().unwrap_or_default(), words.next());
        let fail = |reason: String| TrustError::Key {
            origin: origin.to_owned(),
            text: line.chars().take(200).collect(),
            reason,
        };
        if words.next().is_some() {
            return Err(fail("more than a key and a prefix".to_owned()));
        }
        let key = PublicKey::from_base64(text).map_err(|e| fail(e.to_string()))?;
        self.0.push(TrustedKey {
            key,
            text: text.to_owned(),
            prefix: prefix.map(|p| real(p.trim_end_matches('/'))),
        });
        Ok(())
    }

    /// Adds the lines of a file; empty ones and those that begin with `#` are comments, and so is minisign's first line.
    ///
    /// # Errors
    /// [`TrustError::Key`], with the number of the line.
    pub fn add_file(&mut self, text: &str, name: &str) -> Result<(), TrustError> {
        for (number, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') || line.starts_with("untrusted comment:") {
                continue;
            }
            self.add(line, &format!("{name}:{}", number + 1))?;
        }
        Ok(())
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether a plugin must be signed.
    pub fn covers(&self, subject: Subject<'_>) -> bool {
        self.keys_for(subject).next().is_some()
    }

    fn keys_for(&self, subject: Subject<'_>) -> impl Iterator<Item = &TrustedKey> {
        let path = match subject {
            Subject::File(_) => None,
            Subject::Reference(reference) => Some(real(&reference.path())),
        };
        self.0.iter().filter(move |key| match (&key.prefix, &path) {
            (Some(prefix), Some(path)) => {
                let rest = path.strip_prefix(prefix.as_str());
                rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
            }
            // A file has come from nowhere in particular: any of the keys will do.
            _ => true,
        })
    }

    /// The first good signature of the bytes by a key that is trusted for them.
    ///
    /// # Errors
    /// What comes closest: made for another version, forged, a stranger's, none.
    pub fn check(
        &self,
        subject: Subject<'_>,
        bytes: &[u8],
        signatures: &[String],
    ) -> Result<Signed, TrustError> {
        let what = subject.shown();
        let count = self.keys_for(subject).count();
        let keys = if count == 1 {
            "1 key is".to_owned()
        } else {
            format!("{count} keys are")
        };
        let (mut forged, mut replayed) = (None, None);
        for signature in signatures
            .iter()
            .filter_map(|text| Signature::decode(text).ok())
        {
            for trusted in self.keys_for(subject) {
                match trusted.key.verify(bytes, &signature, false) {
                    Ok(()) => match replay(subject, signature.trusted_comment()) {
                        None => {
                            return Ok(Signed {
                                key: trusted.text.clone(),
                                comment: signature.trusted_comment().to_owned(),
                            });
                        }
                        other => replayed = other,
                    },
                    Err(minisign_verify::Error::UnexpectedKeyId) => {}
                    Err(e) => forged = Some(e.to_string()),
                }
            }
        }
        Err(match (replayed, forged, signatures.is_empty()) {
            (Some(made_for), _, _) => TrustError::Replayed { what, made_for },
            (None, Some(reason), _) => TrustError::Forged { what, reason },
            (None, None, true) => TrustError::Unsigned { what, keys },
            (None, None, false) => TrustError::Stranger { what, keys },
        })
    }
}

/// The plugin that a signature was made for, if it is another.
fn replay(subject: Subject<'_>, comment: &str) -> Option<String> {
    let Subject::Reference(reference) = subject else {
        return None;
    };
    let made_for = comment
        .split_whitespace()
        .find_map(|field| field.strip_prefix(FIELD))?;
    let (name, tag) = made_for.rsplit_once(':').unwrap_or((made_for, ""));
    // A digest alone says which bytes are meant, and no tag was asked for.
    let same = name == reference.name() && reference.tag().is_none_or(|asked| asked == tag);
    (!same).then(|| made_for.chars().take(200).collect())
}

/// Signs a component with the text of a minisign secret key, for a reference or for nothing in particular. A key without
/// a password needs none; otherwise `None` asks for it on the terminal.
///
/// # Errors
/// [`TrustError::SecretKey`]; `path` stands for the key in it.
pub fn sign(
    secret_key: &str,
    path: &str,
    password: Option<String>,
    bytes: &[u8],
    reference: Option<&Reference>,
) -> Result<String, TrustError> {
    let fail = |e: minisign::PError| TrustError::SecretKey {
        path: path.to_owned(),
        reason: e.to_string(),
    };
    let key = match without_password(secret_key) {
        Some(key) => key,
        None => {
            let boxed = SecretKeyBox::from_string(secret_key).map_err(fail)?;
            boxed.into_secret_key(password).map_err(fail)?
        }
    };
    let public = PublicKeyOf::from_secret_key(&key).map_err(fail)?;
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |now| now.as_secs());
    let made_for =
        reference.map(|r| format!("\t{FIELD}{}:{}", r.name(), r.tag().unwrap_or_default()));
    let comment = format!("timestamp:{now}{}", made_for.unwrap_or_default());
    let signed = minisign::sign(
        Some(&public),
        &key,
        bytes,
        Some(&comment),
        Some("signature of a grpo-host plugin"),
    )
    .map_err(fail)?;
    Ok(signed.into_string())
}

/// A key that has no password. The crate takes none of those that `minisign -W` makes, which have no checksum; a damaged one
/// is found out when its signature is verified at once.
fn without_password(text: &str) -> Option<SecretKey> {
    let bytes = STANDARD.decode(text.lines().nth(1)?.trim()).ok()?;
    // Signature algorithm, then how the password becomes a key: not at all.
    let plain = bytes.get(2..4) == Some(&[0, 0]);
    SecretKey::from_bytes(&bytes).ok().filter(|_| plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_spelling_of_a_folder_leads_past_a_key() {
        let lab = tempfile::tempdir().unwrap();
        let root = lab.path().canonicalize().unwrap();
        std::fs::create_dir(root.join("shelf")).unwrap();
        std::os::unix::fs::symlink(root.join("shelf"), root.join("link")).unwrap();
        let root = root.display();
        let public = "RWQf6LRCGA9i53mlYecO4IzT51TGPpvWucNSCh1CBM0QTaLn73Y7GFO3";
        let mut trust = TrustList::default();
        trust
            .add(&format!("{public} dir:{root}/link"), "a test")
            .unwrap();
        let covers = |place: &str| {
            let reference = format!("dir:{place}:1").parse::<Reference>().unwrap();
            trust.covers(Subject::Reference(&reference))
        };
        for covered in [
            "shelf/a",
            "link/a",
            "./shelf//a",
            "link/../shelf/a",
            "shelf/a/b",
        ] {
            assert!(covers(&format!("{root}/{covered}")), "{covered}");
        }
        for other in ["shelf-2/a", "a", "other/shelf/a"] {
            assert!(!covers(&format!("{root}/{other}")), "{other}");
        }
    }
}
