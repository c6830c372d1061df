//! A folder with an OCI image layout (image spec 1.1: `oci-layout`, `index.json`, `blobs/sha256/…`): a repository on disk. Local
//! registries have one for each name, and so has the cache. `oras` and `skopeo` read and write the same folders.

use std::{
    fs::{self, File},
    io::{self, Read, Write},
    path::{Path, PathBuf},
};

use super::{
    Digest, Pulled, Reference, RegistryError,
    manifest::{self, Descriptor, Index, MAX_INDEX_BYTES, MAX_MANIFEST_BYTES, Manifest, REF_NAME},
};

/// Entries of an index that are looked at in search of signatures.
const MAX_ENTRIES: usize = 4096;

pub(super) struct Layout {
    root: PathBuf,
}

impl Layout {
    /// A folder that may or may not be there.
    pub(super) fn at(root: &Path) -> Self {
        Self {
            root: root.to_owned(),
        }
    }

    pub(super) fn open(root: &Path) -> Result<Self, RegistryError> {
        if !root.join("oci-layout").is_file() {
            return Err(RegistryError::NotFound {
                what: format!("an OCI image layout at {}", root.display()),
            });
        }
        Ok(Self::at(root))
    }

    /// Makes what is missing of the folder.
    pub(super) fn create(root: &Path) -> Result<Self, RegistryError> {
        let layout = Self::at(root);
        let blobs = root.join("blobs/sha256");
        fs::create_dir_all(&blobs).map_err(|source| RegistryError::File {
            path: blobs,
            source,
        })?;
        let marker = root.join("oci-layout");
        if !marker.exists() {
            let empty = manifest::written(&Index::default(), "an empty index")?;
            layout.write(&root.join("index.json"), &empty)?;
            layout.write(&marker, br#"{"imageLayoutVersion":"1.0.0"}"#)?;
        }
        Ok(layout)
    }

    pub(super) fn manifest(&self, reference: &Reference) -> Result<Vec<u8>, RegistryError> {
        let digest = match &reference.digest {
            Some(digest) => digest.clone(),
            None => self.tagged(reference)?,
        };
        let what = format!("the manifest {digest} in {}", self.root.display());
        let bytes = read(&self.blob_path(&digest), &what, MAX_MANIFEST_BYTES)?;
        verified(bytes, &digest, &what)
    }

    pub(super) fn tagged(&self, reference: &Reference) -> Result<Digest, RegistryError> {
        let tag = reference.tag_or_latest();
        let named = |d: &&Descriptor| d.annotations.get(REF_NAME).is_some_and(|name| name == tag);
        let index = self.index()?;
        let found = index.manifests.iter().rfind(named);
        found
            .map(|d| d.digest.clone())
            .ok_or_else(|| RegistryError::NotFound {
                what: format!("tag `{tag}` in {}", self.root.display()),
            })
    }

    /// Verified at every read: files rot, and other programs write here too.
    pub(super) fn blob(
        &self,
        descriptor: &Descriptor,
        limit: u64,
    ) -> Result<Vec<u8>, RegistryError> {
        let (digest, size) = (&descriptor.digest, descriptor.size);
        let what = format!("{digest} in {}", self.root.display());
        let bytes = read(&self.blob_path(digest), &what, limit)?;
        let bytes = verified(bytes, digest, &what)?;
        if bytes.len() as u64 != size {
            let found = bytes.len().to_string();
            return Err(RegistryError::Size {
                what,
                expected: size,
                found,
            });
        }
        Ok(bytes)
    }

    pub(super) fn put_blob(&self, digest: &Digest, bytes: &[u8]) -> Result<(), RegistryError> {
        self.write(&self.blob_path(digest), bytes)
    }

    /// Adds a manifest to the index: under its tag, which moves, or without one.
    pub(super) fn put_manifest(
        &self,
        bytes: &[u8],
        tag: Option<&str>,
    ) -> Result<(), RegistryError> {
        let mut entry = Descriptor::of_manifest(bytes);
        self.put_blob(&entry.digest, bytes)?;
        let lock = self.root.join(".lock");
        let fail = |source| RegistryError::File {
            path: lock.clone(),
            source,
        };
        let held = File::create(&lock).map_err(fail)?;
        held.lock().map_err(fail)?;
        let mut index = self.index()?;
        if let Some(tag) = tag {
            index
                .manifests
                .retain(|d| d.annotations.get(REF_NAME).is_none_or(|name| name != tag));
            entry
                .annotations
                .insert(REF_NAME.to_owned(), tag.to_owned());
        } else if index.manifests.iter().any(|d| d.digest == entry.digest) {
            return Ok(());
        }
        index.manifests.push(entry);
        self.write(
            &self.root.join("index.json"),
            &manifest::written(&index, "an index")?,
        )
    }

    /// Keeps what came from a registry. Its config is not among it: nothing here reads one.
    pub(super) fn keep(&self, pulled: &Pulled, tag: Option<&str>) -> Result<(), RegistryError> {
        Self::create(&self.root)?;
        self.put_blob(&pulled.layer.digest, &pulled.bytes)?;
        for signature in &pulled.signatures {
            self.put_blob(&signature.layer.digest, signature.text.as_bytes())?;
            self.put_manifest(&signature.manifest, None)?;
        }
        self.put_manifest(&pulled.manifest, tag)
    }

    pub(super) fn tags(&self) -> Result<Vec<String>, RegistryError> {
        let index = self.index()?;
        let names = index
            .manifests
            .into_iter()
            .filter_map(|mut d| d.annotations.remove(REF_NAME));
        Ok(names.collect())
    }

    /// Manifests of signatures of `subject`. One that cannot be read is none.
    pub(super) fn referrers(&self, subject: &Digest) -> Result<Vec<Descriptor>, RegistryError> {
        let mut listed = self.index()?.manifests;
        listed.truncate(MAX_ENTRIES);
        listed.retain(|d| {
            let is_signature = d.artifact_type.as_deref() == Some(manifest::SIGNATURE);
            is_signature && self.subject_of(d).is_some_and(|found| found == *subject)
        });
        Ok(listed)
    }

    fn subject_of(&self, descriptor: &Descriptor) -> Option<Digest> {
        let bytes = self.blob(descriptor, MAX_MANIFEST_BYTES).ok()?;
        let manifest: Manifest = serde_json::from_slice(&bytes).ok()?;
        manifest.subject.map(|subject| subject.digest)
    }

    fn index(&self) -> Result<Index, RegistryError> {
        let path = self.root.join("index.json");
        let what = path.display().to_string();
        Index::parse(&read(&path, &what, MAX_INDEX_BYTES)?, &what)
    }

    fn blob_path(&self, digest: &Digest) -> PathBuf {
        self.root.join("blobs/sha256").join(digest.hex())
    }

    /// Whole or not at all, in case another process reads or this one is killed.
    fn write(&self, path: &Path, bytes: &[u8]) -> Result<(), RegistryError> {
        let fail = |source| RegistryError::File {
            path: path.to_owned(),
            source,
        };
        let mut builder = tempfile::Builder::new();
        builder.prefix(".tmp-");
        // As readable as any other file of the user; tempfile's default is 0600.
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o644));
        let mut file = builder
            .tempfile_in(path.parent().unwrap_or(&self.root))
            .map_err(fail)?;
        file.write_all(bytes).map_err(fail)?;
        file.as_file().sync_all().map_err(fail)?;
        file.persist(path).map_err(|e| fail(e.error))?;
        Ok(())
    }
}

/// Names in a folder of layouts with their tags, sorted.
pub(super) fn names(folder: &Path) -> Result<Vec<(String, Vec<String>)>, RegistryError> {
    let fail = |source| RegistryError::File {
        path: folder.to_owned(),
        source,
    };
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).map_err(fail)? {
        let entry = entry.map_err(fail)?;
        if !entry.path().join("oci-layout").is_file() {
            continue;
        }
        let mut tags = Layout::at(&entry.path()).tags()?;
        tags.sort();
        found.push((entry.file_name().to_string_lossy().into_owned(), tags));
    }
    found.sort();
    Ok(found)
}

/// At most `limit` bytes of a plain file; a pipe would be waited for, and a device may never end.
fn read(path: &Path, what: &str, limit: u64) -> Result<Vec<u8>, RegistryError> {
    let fail = |source: io::Error| match source.kind() {
        io::ErrorKind::NotFound => RegistryError::NotFound {
            what: what.to_owned(),
        },
        _ => RegistryError::File {
            path: path.to_owned(),
            source,
        },
    };
    if !fs::metadata(path).map_err(fail)?.is_file() {
        return Err(RegistryError::Malformed {
            what: what.to_owned(),
            reason: "it is no plain file".to_owned(),
        });
    }
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(fail)?;
    file.take(limit + 1).read_to_end(&mut bytes).map_err(fail)?;
    if bytes.len() as u64 > limit {
        return Err(RegistryError::TooLarge {
            what: what.to_owned(),
            limit,
        });
    }
    Ok(bytes)
}

pub(super) fn verified(
    bytes: Vec<u8>,
    expected: &Digest,
    what: &str,
) -> Result<Vec<u8>, RegistryError> {
    let found = Digest::of(&bytes);
    if found == *expected {
        return Ok(bytes);
    }
    Err(RegistryError::Tampered {
        what: what.to_owned(),
        expected: expected.clone(),
        found,
    })
}
