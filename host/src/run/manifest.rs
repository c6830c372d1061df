//! `manifest.json` of a checkpoint: size and SHA-256 of each of its other files, so that a folder that rotted,
//! was cut off or lost a file is found out before anything is read from it.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{RunError, atomic};

const NAME: &str = "manifest.json";

/// By path inside the folder, with `/`.
#[derive(Serialize, Deserialize)]
struct Manifest {
    files: BTreeMap<String, Entry>,
}

#[derive(Serialize, Deserialize)]
struct Entry {
    bytes: u64,
    /// 64 hex digits.
    sha256: String,
}

/// A file of a checkpoint that is not as it was written.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{} {reason}", path.display())]
pub struct Damage {
    pub path: PathBuf,
    pub reason: String,
}

/// How much of the files to look at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Look {
    /// Their sizes; reads none.
    Sizes,
    /// Every byte.
    Bytes,
}

/// Writes the manifest of whatever is in the folder. The last file to be written.
pub(super) fn write(folder: &Path) -> Result<(), RunError> {
    let mut files = BTreeMap::new();
    list(folder, "", &mut |name, path| {
        let read = |source| RunError::Read {
            path: path.to_owned(),
            source,
        };
        let bytes = fs::metadata(path).map_err(read)?.len();
        let sha256 = digest(path).map_err(read)?;
        files.insert(name, Entry { bytes, sha256 });
        Ok(())
    })?;
    let path = folder.join(NAME);
    let text = serde_json::to_vec_pretty(&Manifest { files }).map_err(|e| RunError::Malformed {
        path: path.clone(),
        reason: e.to_string(),
    })?;
    fs::write(&path, text).map_err(|source| RunError::Write { path, source })
}

/// Holds the folder against its manifest. What is there beyond it is nobody's business.
///
/// # Errors
/// The first file, by name, that is missing or differs; the manifest itself, if it cannot be read.
pub(super) fn check(folder: &Path, look: Look) -> Result<(), Damage> {
    let manifest = folder.join(NAME);
    let damaged = |path: &Path, reason: String| Damage {
        path: path.to_owned(),
        reason,
    };
    let text = fs::read(&manifest).map_err(|e| damaged(&manifest, format!("is missing: {e}")))?;
    let Manifest { files } = serde_json::from_slice(&text)
        .map_err(|e| damaged(&manifest, format!("is not what was written: {e}")))?;
    for (name, entry) in files {
        let path = folder.join(&name);
        let unreadable = |e: io::Error| damaged(&path, format!("cannot be read: {e}"));
        let found = fs::metadata(&path).map_err(unreadable)?.len();
        if found != entry.bytes {
            let reason = format!("has {found} bytes instead of {}", entry.bytes);
            return Err(damaged(&path, reason));
        }
        if look == Look::Bytes && digest(&path).map_err(unreadable)? != entry.sha256 {
            return Err(damaged(&path, "is not what was written".to_owned()));
        }
    }
    Ok(())
}

fn list(
    folder: &Path,
    prefix: &str,
    found: &mut dyn FnMut(String, &Path) -> Result<(), RunError>,
) -> Result<(), RunError> {
    for path in atomic::entries(folder)? {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let name = format!("{prefix}{name}");
        if path.is_dir() {
            list(&path, &format!("{name}/"), found)?;
        } else {
            found(name, &path)?;
        }
    }
    Ok(())
}

fn digest(path: &Path) -> io::Result<String> {
    let mut hash = Sha256::new();
    io::copy(&mut File::open(path)?, &mut hash)?;
    Ok(format!("{:x}", hash.finalize()))
}
