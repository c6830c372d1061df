//! Answers on disk, each in a file named by what was asked: endpoint, model, parameters and messages. A replay finds
//! them there and needs no network.
//!
//! `cacache` was looked at: it brings an index with a log of its own and two async runtimes for what is here one
//! rename. Nothing is synced, since a file that is not whole is not believed.

use std::{
    fs::{self, File},
    io::{self, ErrorKind, Read, Write},
    path::{Path, PathBuf},
};

use serde::{Serialize, de::DeserializeOwned};
use sha2::{Digest, Sha256};

/// Larger files are no answers of ours.
const MAX_BYTES: u64 = 80 << 20;

/// Of all judges; several processes may share it.
pub(super) struct Cache {
    root: PathBuf,
}

/// What the cache has for a question.
pub(super) enum Found<T> {
    Answer(T),
    Nothing,
    /// A file that cannot be used, and why.
    Damaged(String),
}

/// The name of a question: `sha256` of its parts, in hex. No part has a NUL.
pub(super) fn key(parts: &[&str]) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update(part.as_bytes());
        hash.update([0]);
    }
    format!("{:x}", hash.finalize())
}

impl Cache {
    pub(super) fn new(root: &Path) -> Self {
        Self {
            root: root.to_owned(),
        }
    }

    /// Answers under one folder are thousands.
    fn path(&self, key: &str) -> PathBuf {
        let (folder, _) = key.split_at(key.len().min(2));
        self.root.join(folder).join(key)
    }

    pub(super) fn read<T: DeserializeOwned>(&self, key: &str) -> Found<T> {
        let path = self.path(key);
        let damaged = |why: &str| Found::Damaged(format!("{}: {why}", path.display()));
        let bytes = match read_file(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == ErrorKind::NotFound => return Found::Nothing,
            Err(error) => return damaged(&error.to_string()),
        };
        let Some((head, answer)) = bytes.split_at_checked(65) else {
            return damaged("it is cut off");
        };
        if head != head_of(key, answer).as_bytes() {
            return damaged("its contents are not what was written");
        }
        match serde_json::from_slice(answer) {
            Ok(answer) => Found::Answer(answer),
            Err(error) => damaged(&error.to_string()),
        }
    }

    /// # Errors
    /// Those of the file system; an answer that was there stays.
    pub(super) fn write<T: Serialize>(&self, key: &str, answer: &T) -> io::Result<()> {
        let path = self.path(key);
        let folder = path.parent().unwrap_or(&self.root);
        fs::create_dir_all(folder)?;
        let answer = serde_json::to_vec(answer)?;
        let mut file = tempfile::Builder::new()
            .prefix(".tmp-")
            .tempfile_in(folder)?;
        file.write_all(head_of(key, &answer).as_bytes())?;
        file.write_all(&answer)?;
        file.persist(&path).map_err(|error| error.error)?;
        Ok(())
    }
}

/// The first line of a file. The key is in it, so that a file under another's name is found out.
fn head_of(key: &str, answer: &[u8]) -> String {
    let mut hash = Sha256::new();
    hash.update(key.as_bytes());
    hash.update(answer);
    format!("{:x}\n", hash.finalize())
}

fn read_file(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(MAX_BYTES).read_to_end(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(cache: &Cache, key: &str) -> Result<Option<String>, String> {
        match cache.read::<String>(key) {
            Found::Answer(answer) => Ok(Some(answer)),
            Found::Nothing => Ok(None),
            Found::Damaged(why) => Err(why),
        }
    }

    #[test]
    fn an_answer_comes_back_and_a_damaged_one_does_not() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::new(&folder.path().join("judge"));
        let (one, two) = (key(&["a", "bc"]), key(&["ab", "c"]));
        assert_ne!(one, two);
        assert_eq!(read(&cache, &one), Ok(None));
        cache.write(&one, &"seven").unwrap();
        assert_eq!(read(&cache, &one), Ok(Some("seven".to_owned())));
        let path = cache.path(&one);
        let whole = fs::read(&path).unwrap();
        for end in 0..whole.len() {
            fs::write(&path, &whole[..end]).unwrap();
            assert!(read(&cache, &one).is_err(), "{end} bytes");
        }
        let mut flipped = whole.clone();
        *flipped.last_mut().unwrap() ^= 1;
        fs::write(&path, flipped).unwrap();
        let why = read(&cache, &one).unwrap_err();
        assert!(why.ends_with("are not what was written"), "{why}");
        // Whole, but another question's.
        let elsewhere = cache.path(&two);
        fs::create_dir_all(elsewhere.parent().unwrap()).unwrap();
        fs::write(&elsewhere, &whole).unwrap();
        assert!(read(&cache, &two).is_err());
        cache.write(&two, &"eight").unwrap();
        assert_eq!(read(&cache, &two), Ok(Some("eight".to_owned())));
        let left = fs::read_dir(elsewhere.parent().unwrap()).unwrap().count();
        assert_eq!(left, 1, "no temporary file stays");
    }
}
