//! Plugins shared like container images: OCI artifacts in the layout of the CNCF's Wasm working group, which `wkg` reads and
//! writes too, in registries and in folders that hold OCI image layouts; a cache, and minisign signatures.
//!
//! Bytes and digests only: what a component is and whether it runs is for `plugin`, and what is trusted for `setup`. The
//! distribution protocol is spoken here, in `remote.rs`, rather than by `oci-client`: version 0.17 reads manifests, tokens and
//! error bodies whole whatever their length, follows a redirect to anywhere, and is async. `oci-wasm` would bring a second
//! wasmparser to write two lists of names. The tests hold this room to both, since `wkg` is made of them.

mod auth;
mod error;
mod layout;
mod manifest;
mod reference;
mod remote;
mod signature;

use std::{path::PathBuf, time::Duration};

pub use error::RegistryError;
pub use manifest::Digest;
pub use reference::{Place, Reference, is_reference};
pub use signature::{Signed, Subject, TrustError, TrustList, sign};

use layout::Layout;
use manifest::{Descriptor, Manifest};
use remote::Remote;

/// Signatures of one component that are looked at; a registry may list any number.
const MAX_SIGNATURES: usize = 32;

/// How registries may be used. Nothing here reads the environment.
#[derive(Clone, Debug)]
pub struct RegistryConfig {
    /// Where pulled plugins are kept; `None`: nowhere.
    pub cache_dir: Option<PathBuf>,
    /// Docker's `config.json`, whose credentials are used.
    pub docker_config: Option<PathBuf>,
    /// Use what is cached and never the network.
    pub offline: bool,
    /// Bytes of a component.
    pub max_component_bytes: u64,
    /// Attempts for one download before giving up, at least 1.
    pub attempts: u32,
    /// Wait before the second attempt; doubles with each further one.
    pub backoff: Duration,
    /// Of connecting, of the headers of an answer, and of each single read of its body.
    pub timeout: Duration,
    /// Of one whole answer: a registry that sends a byte now and then is given up too.
    pub deadline: Duration,
}

impl RegistryConfig {
    /// Three attempts of at most five minutes, without cache and credentials.
    pub fn new(max_component_bytes: u64) -> Self {
        Self {
            cache_dir: None,
            docker_config: None,
            offline: false,
            max_component_bytes,
            attempts: 3,
            backoff: Duration::from_millis(500),
            timeout: Duration::from_secs(30),
            deadline: Duration::from_secs(300),
        }
    }
}

/// What to fetch besides the component, and from where.
#[derive(Clone, Copy, Debug, Default)]
pub struct Fetch {
    /// Its signatures too.
    pub signatures: bool,
    /// Ask the registry even for what is cached under its digest.
    pub fresh: bool,
}

/// A component as a registry, a folder or the cache has it, held to its digests.
#[derive(Clone, Debug)]
pub struct Fetched {
    pub bytes: Vec<u8>,
    /// Of the manifest: what a reference pins.
    pub manifest: Digest,
    /// Of the component itself: what `plugins.lock` has.
    pub layer: Digest,
    /// Texts of minisign signatures, which nobody has verified yet.
    pub signatures: Vec<String>,
    /// Not from the network.
    pub cached: bool,
}

/// What to push.
#[derive(Clone, Copy, Debug)]
pub struct Artifact<'a> {
    pub bytes: &'a [u8],
    pub exports: &'a [String],
    pub imports: &'a [String],
}

/// What becomes of a tag that stands for something else already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Taken {
    /// It stays, and nothing is pushed.
    Stays,
    /// It moves.
    Moves,
}

/// Digests of what was pushed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pushed {
    pub manifest: Digest,
    pub layer: Digest,
    /// The manifest that the tag stood for before. The same one: there was nothing to do.
    pub before: Option<Digest>,
}

/// Registries, and the cache of what came from them. Blocking: never use it on an async thread.
#[derive(Clone, Debug)]
pub struct Registry {
    config: RegistryConfig,
}

/// A repository, wherever it is.
enum Store<'a> {
    Remote(Remote<'a>),
    Layout(Layout),
}

/// A manifest's bytes with what it describes.
struct Pulled {
    manifest: Vec<u8>,
    digest: Digest,
    layer: Descriptor,
    bytes: Vec<u8>,
    signatures: Vec<Signature>,
}

/// A signature's text, with the manifest that ties it to a component's manifest.
struct Signature {
    manifest: Vec<u8>,
    layer: Descriptor,
    text: String,
}

impl Registry {
    pub fn new(config: RegistryConfig) -> Self {
        Self { config }
    }

    /// The component of a reference. A pinned one is looked for in the cache first, since its bytes never change; a tag is
    /// resolved by the registry each time, and by the cache only when `offline`: whoever can cut the line must not be able to
    /// choose an old version.
    ///
    /// # Errors
    /// Whatever [`RegistryError`] has: nothing is returned whose size and digest are not what was announced.
    pub fn fetch(&self, reference: &Reference, what: Fetch) -> Result<Fetched, RegistryError> {
        let Place::Host(_) = &reference.place else {
            let pulled = self.pull(&mut self.open(reference)?, reference, what.signatures)?;
            return Ok(pulled.fetched(true));
        };
        let mut cache = self.cache(reference).map(Store::Layout);
        let is_enough =
            |p: &Pulled| self.config.offline || !what.signatures || !p.signatures.is_empty();
        if let Some(cache) = &mut cache
            && (self.config.offline || (reference.digest.is_some() && !what.fresh))
        {
            match self.pull(cache, reference, what.signatures) {
                Ok(pulled) if is_enough(&pulled) => return Ok(pulled.fetched(true)),
                // What is damaged or missing here is fetched again.
                Err(error) if self.config.offline && !error.is_missing() => return Err(error),
                _ => {}
            }
        }
        if self.config.offline {
            return Err(RegistryError::Offline {
                reference: reference.to_string(),
            });
        }
        let pulled = self.pull(&mut self.open(reference)?, reference, what.signatures)?;
        if let Some(Store::Layout(cache)) = &cache {
            cache.keep(&pulled, reference.tag())?;
        }
        Ok(pulled.fetched(false))
    }

    /// Puts a component where the reference says, in the CNCF's layout. The same bytes make the same manifest, at any time.
    /// The protocol cannot do this in one piece: of two that push a tag at the same moment both may succeed.
    ///
    /// # Errors
    /// A reference with a digest, which nobody can choose; a tag that is to stay and stands for something else; what the
    /// registry or the disk refuses.
    pub fn push(
        &self,
        reference: &Reference,
        artifact: Artifact<'_>,
        taken: Taken,
    ) -> Result<Pushed, RegistryError> {
        if reference.digest.is_some() {
            return Err(RegistryError::Reference {
                text: reference.to_string(),
                reason: "a digest comes from what is pushed, and cannot be asked for",
            });
        }
        self.refuse_offline(reference)?;
        let (config, manifest) = manifest::of_component(&artifact, reference.name())?;
        let layer = Digest::of(artifact.bytes);
        let digest = Digest::of(&manifest);
        let mut store = self.open_or_create(reference)?;
        let before = store.tagged(reference)?;
        match (&before, taken) {
            (Some(found), Taken::Stays) if *found != digest => {
                return Err(RegistryError::Taken {
                    reference: reference.to_string(),
                    found: found.clone(),
                    pushed: digest,
                });
            }
            (Some(_), Taken::Stays) => {}
            // A tag that is to move may be there with blobs that are not.
            (None, _) | (Some(_), Taken::Moves) => {
                store.put_blob(&layer, artifact.bytes)?;
                store.put_blob(&Digest::of(&config), &config)?;
                store.put_manifest(&manifest, reference.tag())?;
            }
        }
        Ok(Pushed {
            manifest: digest,
            layer,
            before,
        })
    }

    /// Attaches a minisign signature to the component that the reference names, as an OCI referrer of its manifest.
    ///
    /// # Errors
    /// If there is no such component, or the registry refuses.
    pub fn attach(
        &self,
        reference: &Reference,
        manifest: &Digest,
        signature: &str,
    ) -> Result<(), RegistryError> {
        self.refuse_offline(reference)?;
        let mut store = self.open(reference)?;
        let subject = store.manifest(&reference.pinned(manifest))?;
        let subject = Descriptor::of_manifest(&subject);
        let signed = manifest::of_signature(&subject, signature)?;
        store.put_blob(&Digest::of(manifest::EMPTY), manifest::EMPTY)?;
        store.put_blob(&Digest::of(signature.as_bytes()), signature.as_bytes())?;
        store.put_referrer(&subject, &signed)
    }

    /// Tags of a repository, sorted; those under which referrers are filed are left out. The first thousand, where a registry
    /// has more.
    ///
    /// # Errors
    /// If there is no such repository.
    pub fn tags(&self, reference: &Reference) -> Result<Vec<String>, RegistryError> {
        self.refuse_offline(reference)?;
        let mut tags = match self.open(reference)? {
            Store::Remote(mut remote) => remote.tags()?,
            Store::Layout(layout) => layout.tags()?,
        };
        tags.retain(|tag| reference::is_tag(tag) && !tag.starts_with("sha256-"));
        tags.sort();
        tags.dedup();
        Ok(tags)
    }

    /// Names in a local directory registry with their tags, sorted.
    ///
    /// # Errors
    /// If the folder cannot be read.
    pub fn names(
        &self,
        folder: &std::path::Path,
    ) -> Result<Vec<(String, Vec<String>)>, RegistryError> {
        layout::names(folder)
    }

    fn pull(
        &self,
        store: &mut Store<'_>,
        reference: &Reference,
        signatures: bool,
    ) -> Result<Pulled, RegistryError> {
        let manifest = store.manifest(reference)?;
        let digest = Digest::of(&manifest);
        let parsed = Manifest::parse(&manifest, reference)?;
        let layer = parsed
            .component(reference, self.config.max_component_bytes)?
            .clone();
        let bytes = store.blob(&layer, self.config.max_component_bytes)?;
        manifest::refuse_other_files(&bytes, reference)?;
        let signatures = match signatures {
            true => store.signatures(&digest, reference)?,
            false => Vec::new(),
        };
        Ok(Pulled {
            manifest,
            digest,
            layer,
            bytes,
            signatures,
        })
    }

    fn open(&self, reference: &Reference) -> Result<Store<'_>, RegistryError> {
        Ok(match &reference.place {
            Place::Host(_) => Store::Remote(Remote::new(&self.config, reference)?),
            Place::Folder(root) => Store::Layout(Layout::open(&root.join(&reference.repository))?),
        })
    }

    fn open_or_create(&self, reference: &Reference) -> Result<Store<'_>, RegistryError> {
        if let Place::Folder(root) = &reference.place {
            Layout::create(&root.join(&reference.repository))?;
        }
        self.open(reference)
    }

    /// An image layout per repository, in a folder whose name no other repository's gives.
    fn cache(&self, reference: &Reference) -> Option<Layout> {
        let Place::Host(host) = &reference.place else {
            return None;
        };
        let name = format!("{host}/{}", reference.repository);
        let folder = self.config.cache_dir.as_ref()?;
        Some(Layout::at(
            &folder.join(name.replace('/', "+").replace(':', "_")),
        ))
    }

    fn refuse_offline(&self, reference: &Reference) -> Result<(), RegistryError> {
        match (&reference.place, self.config.offline) {
            (Place::Host(_), true) => Err(RegistryError::Offline {
                reference: reference.to_string(),
            }),
            _ => Ok(()),
        }
    }
}

impl Pulled {
    fn fetched(self, cached: bool) -> Fetched {
        Fetched {
            bytes: self.bytes,
            manifest: self.digest,
            layer: self.layer.digest,
            signatures: self.signatures.into_iter().map(|s| s.text).collect(),
            cached,
        }
    }
}

impl Store<'_> {
    /// A manifest by its digest, else by its tag.
    fn manifest(&mut self, reference: &Reference) -> Result<Vec<u8>, RegistryError> {
        match self {
            Self::Remote(remote) => {
                remote.manifest(reference.digest.as_ref(), reference.tag_or_latest())
            }
            Self::Layout(layout) => layout.manifest(reference),
        }
    }

    /// The manifest that a reference's tag stands for, asked with the rights of who pushes: others a registry may not even tell
    /// that there is none.
    fn tagged(&mut self, reference: &Reference) -> Result<Option<Digest>, RegistryError> {
        let found = match self {
            Self::Remote(remote) => remote.tagged(reference.tag_or_latest()),
            Self::Layout(layout) => layout.tagged(reference),
        };
        match found {
            Err(error) if error.is_missing() => Ok(None),
            found => found.map(Some),
        }
    }

    fn blob(&mut self, descriptor: &Descriptor, limit: u64) -> Result<Vec<u8>, RegistryError> {
        match self {
            Self::Remote(remote) => remote.blob(descriptor, limit),
            Self::Layout(layout) => layout.blob(descriptor, limit),
        }
    }

    fn put_blob(&mut self, digest: &Digest, bytes: &[u8]) -> Result<(), RegistryError> {
        match self {
            Self::Remote(remote) => remote.put_blob(digest, bytes),
            Self::Layout(layout) => layout.put_blob(digest, bytes),
        }
    }

    fn put_manifest(&mut self, bytes: &[u8], tag: Option<&str>) -> Result<(), RegistryError> {
        match self {
            Self::Remote(remote) => remote.put_manifest(bytes, tag.unwrap_or(reference::LATEST)),
            Self::Layout(layout) => {
                layout.put_manifest(bytes, Some(tag.unwrap_or(reference::LATEST)))
            }
        }
    }

    fn put_referrer(&mut self, subject: &Descriptor, bytes: &[u8]) -> Result<(), RegistryError> {
        match self {
            Self::Remote(remote) => remote.put_referrer(subject, bytes),
            Self::Layout(layout) => layout.put_manifest(bytes, None),
        }
    }

    /// The first signatures of a manifest. One that is not as its descriptor says is left out: whoever may add a signature to a
    /// repository must not be able to keep others from being seen.
    fn signatures(
        &mut self,
        subject: &Digest,
        reference: &Reference,
    ) -> Result<Vec<Signature>, RegistryError> {
        let listed = match self {
            Self::Remote(remote) => remote.referrers(subject)?,
            Self::Layout(layout) => layout.referrers(subject)?,
        };
        let mut found = Vec::new();
        for descriptor in listed.iter().take(MAX_SIGNATURES) {
            match self.signature(descriptor, subject, reference) {
                Ok(signature) => found.push(signature),
                Err(error) if error.is_of_content() => {}
                Err(error) => return Err(error),
            }
        }
        Ok(found)
    }

    fn signature(
        &mut self,
        listed: &Descriptor,
        subject: &Digest,
        reference: &Reference,
    ) -> Result<Signature, RegistryError> {
        let bytes = match self {
            Self::Remote(remote) => remote.manifest(Some(&listed.digest), "")?,
            Self::Layout(layout) => layout.blob(listed, manifest::MAX_MANIFEST_BYTES)?,
        };
        let layer = Manifest::parse(&bytes, reference)?.signature(reference, subject)?;
        let text = self.blob(&layer, signature::MAX_SIGNATURE_BYTES)?;
        let text = String::from_utf8(text).map_err(|e| RegistryError::Malformed {
            what: format!("a signature of {reference}"),
            reason: e.to_string(),
        })?;
        Ok(Signature {
            manifest: bytes,
            layer,
            text,
        })
    }
}
