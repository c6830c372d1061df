//! `HOST/REPOSITORY[:TAG][@sha256:…]` and `dir:FOLDER/NAME[:TAG][@sha256:…]`: which plugin, and where.

use std::{fmt, path::PathBuf, str::FromStr};

use super::{Digest, RegistryError};

/// The tag of a reference that has none.
pub(super) const LATEST: &str = "latest";
/// Bytes of a repository's name; the distribution spec leaves it to clients, and Docker takes as many.
const MAX_REPOSITORY: usize = 255;

/// Where repositories are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// A registry, `host` or `host:port`.
    Host(String),
    /// A folder with an OCI image layout for each name.
    Folder(PathBuf),
}

/// A plugin in a registry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reference {
    pub place: Place,
    /// Such as `me/reward`; a single name in a folder. Lower case, and never a path that leaves its folder.
    pub repository: String,
    tag: Option<String>,
    /// Of the manifest: the reference is pinned.
    pub digest: Option<Digest>,
}

/// Whether a plugin's source is a reference and not a path: `dir:…`, `oci://…`, or what begins with a host's name (one with a
/// dot or a port, or `localhost`) as Docker reads it. What ends in `.wasm` is a path.
pub fn is_reference(source: &str) -> bool {
    if source.starts_with("dir:") || source.starts_with("oci://") {
        return true;
    }
    let Some((host, _)) = source.split_once('/') else {
        return false;
    };
    let is_host = host == "localhost" || host.contains(['.', ':']);
    is_host && !host.starts_with('.') && !source.ends_with(".wasm")
}

/// What the distribution spec calls a tag.
pub(super) fn is_tag(text: &str) -> bool {
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    let bytes = text.as_bytes();
    (1..=128).contains(&bytes.len())
        && word(bytes[0])
        && bytes.iter().all(|b| word(*b) || b".-".contains(b))
}

/// Lower-case words with single separators between them, so neither empty nor `..`.
fn is_name(text: &str) -> bool {
    let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let (Some(first), Some(last)) = (text.bytes().next(), text.bytes().last()) else {
        return false;
    };
    inner(first)
        && inner(last)
        && text.bytes().all(|b| inner(b) || b"._-".contains(&b))
        && !text.contains("..")
}

fn is_host(text: &str) -> bool {
    let (name, port) = text
        .split_once(':')
        .map_or((text, None), |(n, p)| (n, Some(p)));
    let label = |label: &str| {
        !label.is_empty()
            && label
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b == b'-')
    };
    name.len() <= 253
        && name.split('.').all(label)
        && port.is_none_or(|port| port.parse::<u16>().is_ok_and(|port| port > 0))
}

impl Reference {
    /// The last part of the repository, under which the plugin stands in logs and metrics.
    pub fn name(&self) -> &str {
        self.repository
            .rsplit('/')
            .next()
            .unwrap_or(&self.repository)
    }

    pub fn tag(&self) -> Option<&str> {
        self.tag
            .as_deref()
            .or(self.digest.is_none().then_some(LATEST))
    }

    pub(super) fn tag_or_latest(&self) -> &str {
        self.tag.as_deref().unwrap_or(LATEST)
    }

    /// The same, held to a manifest.
    pub fn pinned(&self, manifest: &Digest) -> Self {
        Self {
            tag: self.tag().map(str::to_owned),
            digest: Some(manifest.clone()),
            ..self.clone()
        }
    }

    /// Place and repository, without tag and digest: what a trusted key's prefix is held against.
    pub fn path(&self) -> String {
        match &self.place {
            Place::Host(host) => format!("{host}/{}", self.repository),
            Place::Folder(folder) => format!("dir:{}", folder.join(&self.repository).display()),
        }
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.path())?;
        if let Some(tag) = self.tag() {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

impl FromStr for Reference {
    type Err = RegistryError;

    fn from_str(text: &str) -> Result<Self, RegistryError> {
        let fail = |reason| RegistryError::Reference {
            text: text.to_owned(),
            reason,
        };
        let (rest, digest) = match text.rsplit_once('@') {
            Some((rest, digest)) => (rest, Some(digest.parse().map_err(fail)?)),
            None => (text, None),
        };
        // A colon before the last slash is a port's, or part of a folder's name.
        let split = rest.rsplit_once(':').filter(|(_, tag)| !tag.contains('/'));
        let (rest, tag) = match split.filter(|(rest, _)| *rest != "dir") {
            Some((rest, tag)) => (rest, Some(tag.to_owned())),
            None => (rest, None),
        };
        if tag.as_deref().is_some_and(|tag| !is_tag(tag)) {
            return Err(fail(
                "the tag is not 1 to 128 of a-z, A-Z, 0-9, `_`, `.` and `-`",
            ));
        }
        let (place, repository) = if let Some(path) = rest.strip_prefix("dir:") {
            let (folder, name) = path.rsplit_once('/').unwrap_or((".", path));
            let folder = if folder.is_empty() { "/" } else { folder };
            (Place::Folder(PathBuf::from(folder)), name)
        } else {
            let rest = rest.strip_prefix("oci://").unwrap_or(rest);
            let (host, path) = rest
                .split_once('/')
                .ok_or_else(|| fail("no repository after the registry's name"))?;
            if !is_host(host) {
                return Err(fail(
                    "what comes before the first slash is no registry's name",
                ));
            }
            (Place::Host(host.to_ascii_lowercase()), path)
        };
        if repository.len() > MAX_REPOSITORY || !repository.split('/').all(is_name) {
            return Err(fail(
                "a repository's name is lower-case words with `.`, `_` or `-` inside them, and `/` between them",
            ));
        }
        Ok(Self {
            place,
            repository: repository.to_owned(),
            tag,
            digest,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEX: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn references_are_read_and_written() {
        for (text, name, tag, written) in [
            (
                "ghcr.io/me/reward:1.2",
                "reward",
                Some("1.2"),
                "ghcr.io/me/reward:1.2",
            ),
            (
                "ghcr.io/me/reward",
                "reward",
                Some("latest"),
                "ghcr.io/me/reward:latest",
            ),
            (
                "oci://Ghcr.IO/me/a_b",
                "a_b",
                Some("latest"),
                "ghcr.io/me/a_b:latest",
            ),
            (
                "localhost:5000/reward",
                "reward",
                Some("latest"),
                "localhost:5000/reward:latest",
            ),
            (
                "127.0.0.1:5000/a/b:x",
                "b",
                Some("x"),
                "127.0.0.1:5000/a/b:x",
            ),
            (
                "dir:shelf/reward:1",
                "reward",
                Some("1"),
                "dir:shelf/reward:1",
            ),
            (
                "dir:/a:b/reward",
                "reward",
                Some("latest"),
                "dir:/a:b/reward:latest",
            ),
            ("dir:reward:1", "reward", Some("1"), "dir:./reward:1"),
            (
                "dir:reward",
                "reward",
                Some("latest"),
                "dir:./reward:latest",
            ),
        ] {
            assert!(is_reference(text), "{text}");
            let read: Reference = text.parse().unwrap();
            assert_eq!((read.name(), read.tag()), (name, tag), "{text}");
            assert_eq!(read.to_string(), written);
            let pinned = format!("{text}@sha256:{HEX}");
            let read: Reference = pinned.parse().unwrap();
            assert_eq!(read.digest.unwrap().hex(), HEX);
        }
        let pinned: Reference = format!("ghcr.io/me/r@sha256:{HEX}").parse().unwrap();
        assert_eq!(pinned.tag(), None);
        assert_eq!(pinned.to_string(), format!("ghcr.io/me/r@sha256:{HEX}"));
    }

    #[test]
    fn paths_and_built_in_names_are_no_references() {
        for text in [
            "reward.wasm",
            "reward-math",
            "./a/b",
            "../x.y/z",
            "a/b",
            "my.dir/reward.wasm",
            "/a.b/c",
            "C:x",
        ] {
            assert!(!is_reference(text), "{text}");
        }
    }

    #[test]
    fn hostile_47_names_that_leave_their_folder() {
        for text in [
            "ghcr.io/../x",
            "ghcr.io/a/../../x",
            "ghcr.io/a//b",
            "ghcr.io/.a",
            "ghcr.io/a..b",
            "ghcr.io/A",
            "ghcr.io/",
            "ghcr.io/a:",
            "ghcr.io/a:../x",
            "ghcr.io/a:-",
            "ghcr.io/a\u{1b}[2J",
            "ghcr.io/a%2e%2e",
            "ghcr.io/a?b#c",
            "a@b.c/d",
            "u:p@ghcr.io/a",
            "a..b/c",
            "ghcr.io:0/a",
            "ghcr.io:99999/a",
            "ghcr.io:/a",
            "https://ghcr.io/a",
            "dir:",
            "dir:x/..",
            "dir:x/",
            "ghcr.io/a@sha256:12",
            "ghcr.io/a@md5:12",
            "ghcr.io/a@sha256:../../x",
        ] {
            let refused = text.parse::<Reference>();
            assert!(
                matches!(refused, Err(RegistryError::Reference { .. })),
                "{text}: {refused:?}"
            );
        }
        assert!(
            format!("ghcr.io/{}", "a".repeat(256))
                .parse::<Reference>()
                .is_err()
        );
        assert!(
            format!("ghcr.io/a:{}", "a".repeat(129))
                .parse::<Reference>()
                .is_err()
        );
        assert!(
            format!("ghcr.io/a@sha256:{}", HEX.to_uppercase())
                .parse::<Reference>()
                .is_err()
        );
    }
}
