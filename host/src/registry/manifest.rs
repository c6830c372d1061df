//! Manifests, indexes and the Wasm config of the OCI image spec 1.1 and of the CNCF's Wasm OCI artifact layout
//! (tag-runtime.cncf.io/wgs/wasm/deliverables/wasm-oci-artifact): what is written, and what is accepted.

use std::{collections::BTreeMap, fmt, path::Path, str::FromStr};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use sha2::{Digest as _, Sha256};

use super::{Artifact, Reference, RegistryError, signature::MAX_SIGNATURE_BYTES};

pub(super) const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub(super) const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const WASM: &str = "application/wasm";
const WASM_CONFIG: &str = "application/vnd.wasm.config.v0+json";
/// What `oras` and older tools call the same, for registries that refuse the types above (GitLab's does).
const WASM_LAYERS: [&str; 2] = [WASM, "application/vnd.wasm.content.layer.v1+wasm"];
const EMPTY_TYPE: &str = "application/vnd.oci.empty.v1+json";
/// The bytes of [`EMPTY_TYPE`], as the image spec has them.
pub(super) const EMPTY: &[u8] = b"{}";
pub(super) const SIGNATURE: &str = "application/vnd.grpo-host.minisign.v1";
const TITLE: &str = "org.opencontainers.image.title";
/// The tag of a manifest in an image layout's index.
pub(super) const REF_NAME: &str = "org.opencontainers.image.ref.name";

/// Bytes of a manifest; one of a plugin has less than 2 KiB.
pub(super) const MAX_MANIFEST_BYTES: u64 = 1 << 20;
/// Bytes of an index, of a list of tags.
pub(super) const MAX_INDEX_BYTES: u64 = 4 << 20;

/// `sha256:` and 64 lower-case hex digits.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest(String);

impl Digest {
    /// Of these bytes.
    pub fn of(bytes: &[u8]) -> Self {
        Self(format!("sha256:{:x}", Sha256::digest(bytes)))
    }

    pub fn hex(&self) -> &str {
        &self.0["sha256:".len()..]
    }
}

impl FromStr for Digest {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, &'static str> {
        let digit = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
        match text.strip_prefix("sha256:") {
            Some(hex) if hex.len() == 64 && hex.bytes().all(digit) => Ok(Self(text.to_owned())),
            _ => Err("a digest is `sha256:` and 64 lower-case hex digits"),
        }
    }
}

impl TryFrom<String> for Digest {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, &'static str> {
        text.parse()
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> Self {
        digest.0
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Type, digest and size of a blob or manifest. Members this host does not know are kept: an index is rewritten.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Descriptor {
    pub(super) media_type: String,
    pub(super) digest: Digest,
    pub(super) size: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) artifact_type: Option<String>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(super) annotations: BTreeMap<String, String>,
    #[serde(flatten)]
    other: Map<String, Value>,
}

impl Descriptor {
    pub(super) fn of(media_type: &str, bytes: &[u8]) -> Self {
        Self {
            media_type: media_type.to_owned(),
            digest: Digest::of(bytes),
            size: bytes.len() as u64,
            artifact_type: None,
            annotations: BTreeMap::new(),
            other: Map::new(),
        }
    }

    /// Of a manifest, with the type of artifact that it says it is.
    pub(super) fn of_manifest(bytes: &[u8]) -> Self {
        let parsed: Option<Manifest> = serde_json::from_slice(bytes).ok();
        Self {
            artifact_type: parsed.and_then(|manifest| manifest.artifact_type),
            ..Self::of(MANIFEST, bytes)
        }
    }
}

/// A list of manifests: the `index.json` of an image layout, or a list of referrers.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Index {
    schema_version: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    media_type: Option<String>,
    pub(super) manifests: Vec<Descriptor>,
    #[serde(flatten)]
    other: Map<String, Value>,
}

impl Default for Index {
    fn default() -> Self {
        Self {
            schema_version: 2,
            media_type: Some(INDEX.to_owned()),
            manifests: Vec::new(),
            other: Map::new(),
        }
    }
}

impl Index {
    pub(super) fn parse(bytes: &[u8], what: &str) -> Result<Self, RegistryError> {
        serde_json::from_slice(bytes).map_err(|e| malformed(what, &e))
    }
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Manifest {
    schema_version: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    media_type: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    artifact_type: Option<String>,
    config: Descriptor,
    layers: Vec<Descriptor>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) subject: Option<Descriptor>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    annotations: BTreeMap<String, String>,
}

impl Manifest {
    pub(super) fn parse(bytes: &[u8], reference: &Reference) -> Result<Self, RegistryError> {
        let what = format!("the manifest of {reference}");
        let value: Value = serde_json::from_slice(bytes).map_err(|e| malformed(&what, &e))?;
        if value.get("manifests").is_some() {
            return Err(unsuitable(reference, "it is an index of several images"));
        }
        serde_json::from_slice(bytes).map_err(|e| malformed(&what, &e))
    }

    /// The one layer of a component.
    ///
    /// # Errors
    /// [`RegistryError::NotAPlugin`] for anything else: several layers, archives, compressed layers (nothing is ever
    /// decompressed here), a name that would leave the folder it is written to; [`RegistryError::TooLarge`].
    pub(super) fn component(
        &self,
        reference: &Reference,
        limit: u64,
    ) -> Result<&Descriptor, RegistryError> {
        let [layer] = &self.layers[..] else {
            let count = self.layers.len();
            return Err(unsuitable(
                reference,
                &format!("it has {count} layers instead of one"),
            ));
        };
        if !WASM_LAYERS.contains(&layer.media_type.as_str()) {
            let reason = format!("its layer is `{}` and not `{WASM}`", layer.media_type);
            return Err(unsuitable(reference, &reason));
        }
        if let Some(title) = layer.annotations.get(TITLE) {
            refuse_paths(reference, title)?;
        }
        if layer.size > limit {
            return Err(RegistryError::TooLarge {
                what: format!("the component of {reference}"),
                limit,
            });
        }
        Ok(layer)
    }

    /// The layer of a signature of `subject`.
    pub(super) fn signature(
        &self,
        reference: &Reference,
        subject: &Digest,
    ) -> Result<Descriptor, RegistryError> {
        let about = self.subject.as_ref().map(|s| &s.digest);
        match &self.layers[..] {
            [layer]
                if layer.media_type == SIGNATURE
                    && layer.size <= MAX_SIGNATURE_BYTES
                    && about == Some(subject) =>
            {
                Ok(layer.clone())
            }
            _ => Err(unsuitable(
                reference,
                "a referrer is not the signature it is listed as",
            )),
        }
    }
}

/// Config and manifest of a component. `created` is fixed: it is required, and would make each push another artifact.
pub(super) fn of_component(
    artifact: &Artifact<'_>,
    name: &str,
) -> Result<(Vec<u8>, Vec<u8>), RegistryError> {
    let layer = Descriptor::of(WASM, artifact.bytes);
    let config = json!({
        "created": "1970-01-01T00:00:00Z",
        "architecture": "wasm",
        "os": "wasip2",
        "layerDigests": [layer.digest],
        "component": { "exports": artifact.exports, "imports": artifact.imports },
    });
    let config = config.to_string().into_bytes();
    let manifest = Manifest {
        schema_version: 2,
        media_type: Some(MANIFEST.to_owned()),
        artifact_type: None,
        config: Descriptor::of(WASM_CONFIG, &config),
        layers: vec![layer],
        subject: None,
        annotations: [(TITLE.to_owned(), name.to_owned())].into(),
    };
    Ok((config, written(&manifest, "a manifest")?))
}

/// The manifest that ties a signature to the manifest of what it signs.
pub(super) fn of_signature(
    subject: &Descriptor,
    signature: &str,
) -> Result<Vec<u8>, RegistryError> {
    let manifest = Manifest {
        schema_version: 2,
        media_type: Some(MANIFEST.to_owned()),
        artifact_type: Some(SIGNATURE.to_owned()),
        config: Descriptor::of(EMPTY_TYPE, EMPTY),
        layers: vec![Descriptor::of(SIGNATURE, signature.as_bytes())],
        subject: Some(subject.clone()),
        annotations: BTreeMap::new(),
    };
    written(&manifest, "a signature's manifest")
}

pub(super) fn written(value: &impl Serialize, what: &str) -> Result<Vec<u8>, RegistryError> {
    serde_json::to_vec(value).map_err(|e| malformed(what, &e))
}

/// Bytes that are no WebAssembly, whatever their type says. A gzip file is named, since it is what people push by mistake.
pub(super) fn refuse_other_files(bytes: &[u8], reference: &Reference) -> Result<(), RegistryError> {
    match bytes {
        [0, b'a', b's', b'm', ..] => Ok(()),
        [0x1f, 0x8b, ..] => Err(unsuitable(
            reference,
            "its layer is a gzip file, which is never decompressed",
        )),
        _ => Err(unsuitable(reference, "its layer is no WebAssembly")),
    }
}

fn refuse_paths(reference: &Reference, title: &str) -> Result<(), RegistryError> {
    let mut parts = Path::new(title).components();
    let first = parts.next();
    let plain = matches!(first, Some(std::path::Component::Normal(name)) if name == title);
    if plain && parts.next().is_none() && !title.contains(['\\', '\0']) {
        return Ok(());
    }
    Err(RegistryError::UnsafeName {
        reference: reference.to_string(),
        name: title.chars().take(200).collect(),
    })
}

fn malformed(what: &str, reason: &serde_json::Error) -> RegistryError {
    RegistryError::Malformed {
        what: what.to_owned(),
        reason: reason.to_string(),
    }
}

fn unsuitable(reference: &Reference, reason: &str) -> RegistryError {
    RegistryError::NotAPlugin {
        reference: reference.to_string(),
        reason: reason.to_owned(),
    }
}
