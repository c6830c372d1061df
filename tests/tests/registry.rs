//! Sharing with a real registry on this machine (`docker-registry`, which `cargo xtask test` installs) and with what `wkg` is made
//! of, `oci-client` and `oci-wasm`: each reads what the other has pushed.

#![expect(
    clippy::unwrap_used,
    reason = "clippy spares #[test] functions, not what they share"
)]

use std::{
    fs,
    net::{TcpListener, TcpStream},
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use grpo_host::registry::{
    Artifact, Fetch, Reference, Registry, RegistryConfig, RegistryError, Taken, sign,
};
use oci_client::{
    Client,
    client::{ClientConfig, ClientProtocol},
    secrets::RegistryAuth,
};
use oci_wasm::{WasmClient, WasmConfig};
use tempfile::TempDir;

const SECRET: &str = "untrusted comment: minisign encrypted secret key
RWQAAEIyAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA3aX6YGzjk3sol7DQGHAxMBiNFXf+PvD10yCh14/diDYg/i9WobogfAnFp937ekekcCAy5Q0SEDB/A86tYKTBXfBQHktCCHU9AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=
";

const SIGNED: Fetch = Fetch {
    signatures: true,
    fresh: true,
};

/// `docker-registry`, ended with the test.
struct Server {
    child: Child,
    port: u16,
    _folder: TempDir,
}

impl Server {
    /// `extra` is YAML of its config; `%` stands for its folder.
    fn start(extra: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let port = TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap()
            .port();
        let path = folder.path().display().to_string();
        let config = format!(
            "version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {path}/data}}}}\n\
             http: {{addr: 127.0.0.1:{port}}}\n{}",
            extra.replace('%', &path)
        );
        fs::write(folder.path().join("config.yml"), config).unwrap();
        // `me` and `secret`, as `htpasswd -B` writes them.
        let users = "me:$2y$05$abcdefghijklmnopqrstuuOQiyCxlgf/oeuTqixKmWdcYUh4Hjl0a\n";
        fs::write(folder.path().join("htpasswd"), users).unwrap();
        let mut command = Command::new("docker-registry");
        command.arg("serve").arg(folder.path().join("config.yml"));
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let child = command
            .spawn()
            .expect("install it: apt-get install docker-registry");
        let begun = Instant::now();
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            assert!(
                begun.elapsed() < Duration::from_secs(20),
                "docker-registry does not listen"
            );
            std::thread::park_timeout(Duration::from_millis(20));
        }
        Self {
            child,
            port,
            _folder: folder,
        }
    }

    fn reference(&self, rest: &str) -> Reference {
        format!("localhost:{}/{rest}", self.port).parse().unwrap()
    }

    fn theirs(&self, rest: &str) -> oci_client::Reference {
        format!("localhost:{}/{rest}", self.port).parse().unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

fn registry() -> Registry {
    Registry::new(RegistryConfig::new(1 << 26))
}

fn component() -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../plugins/dist/reward-math.wasm");
    fs::read(path).unwrap()
}

fn artifact<'a>(bytes: &'a [u8], exports: &'a [String]) -> Artifact<'a> {
    Artifact {
        bytes,
        exports,
        imports: &[],
    }
}

#[test]
fn what_is_pushed_is_pulled_signed_and_listed() {
    let server = Server::start("");
    let (ours, bytes) = (registry(), component());
    let exports = ["grpo:plugin/scoring@0.1.0".to_owned()];
    let first = server.reference("me/reward:1.0");
    let pushed = ours
        .push(&first, artifact(&bytes, &exports), Taken::Stays)
        .unwrap();
    // Again, and under another tag: the same manifest.
    let second = server.reference("me/reward:1.1");
    assert_eq!(
        ours.push(&second, artifact(&bytes, &exports), Taken::Stays)
            .unwrap(),
        pushed
    );
    let found = ours.fetch(&first, SIGNED).unwrap();
    assert_eq!(
        (&found.bytes, &found.manifest, &found.layer),
        (&bytes, &pushed.manifest, &pushed.layer)
    );
    assert!(found.signatures.is_empty());
    // What a tag stands for stays, unless it is to move.
    let again = ours.push(&first, artifact(&bytes, &exports), Taken::Stays);
    assert_eq!(again.unwrap().before.as_ref(), Some(&pushed.manifest));
    let third = server.reference("me/reward:1.2");
    ours.push(&third, artifact(&bytes, &[]), Taken::Stays)
        .unwrap();
    let refused = ours
        .push(&third, artifact(&bytes, &exports), Taken::Stays)
        .unwrap_err();
    assert!(
        matches!(&refused, RegistryError::Taken { found, .. } if *found != pushed.manifest),
        "{refused}"
    );
    assert_ne!(
        ours.fetch(&third, SIGNED).unwrap().manifest,
        pushed.manifest
    );
    let moved = ours.push(&third, artifact(&bytes, &exports), Taken::Moves);
    assert_ne!(moved.unwrap().before.as_ref(), Some(&pushed.manifest));
    assert_eq!(
        ours.fetch(&third, SIGNED).unwrap().manifest,
        pushed.manifest
    );
    // This registry has no API for referrers: they go under a tag of their own, one after the other.
    let signatures = [":1.0", ":1.1"].map(|tag| {
        let reference = server.reference(&format!("me/reward{tag}"));
        let text = sign(SECRET, "key", None, &bytes, Some(&reference)).unwrap();
        ours.attach(&reference, &pushed.manifest, &text).unwrap();
        text
    });
    let pinned = first.pinned(&pushed.manifest);
    assert_eq!(ours.fetch(&pinned, SIGNED).unwrap().signatures, signatures);
    assert_eq!(ours.tags(&first).unwrap(), ["1.0", "1.1", "1.2"]);
    let missing = ours
        .fetch(&server.reference("me/reward:9"), SIGNED)
        .unwrap_err();
    assert!(
        matches!(missing, RegistryError::NotFound { .. }),
        "{missing}"
    );
    let missing = ours.tags(&server.reference("nobody/nothing")).unwrap_err();
    assert!(
        matches!(missing, RegistryError::NotFound { .. }),
        "{missing}"
    );
    let chosen = ours
        .push(&pinned, artifact(&bytes, &exports), Taken::Stays)
        .unwrap_err();
    assert!(
        matches!(chosen, RegistryError::Reference { .. }),
        "{chosen}"
    );
}

#[test]
fn wkgs_client_reads_ours_and_we_read_its() {
    let server = Server::start("");
    let (ours, bytes) = (registry(), component());
    let exports = ["grpo:plugin/scoring@0.1.0".to_owned()];
    let pushed = ours
        .push(
            &server.reference("me/ours:1"),
            artifact(&bytes, &exports),
            Taken::Stays,
        )
        .unwrap();
    let config = ClientConfig {
        protocol: ClientProtocol::Http,
        ..ClientConfig::default()
    };
    let theirs = WasmClient::new(Client::new(config));
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let (image, read) = runtime.block_on(async {
        let (reference, nobody) = (server.theirs("me/ours:1"), RegistryAuth::Anonymous);
        let image = theirs.pull(&reference, &nobody).await.unwrap();
        let read = theirs
            .pull_manifest_and_config(&reference, &nobody)
            .await
            .unwrap();
        let (config, layer) = WasmConfig::from_raw_component(bytes.clone(), None).unwrap();
        theirs
            .push(&server.theirs("me/theirs:1"), &nobody, layer, config, None)
            .await
            .unwrap();
        (image, read)
    });
    assert_eq!(&image.layers[0].data[..], &bytes[..]);
    let (manifest, config, digest) = read;
    assert_eq!(digest, pushed.manifest.to_string());
    assert_eq!(manifest.layers[0].digest, pushed.layer.to_string());
    assert_eq!(config.layer_digests, [pushed.layer.to_string()]);
    assert_eq!(
        (config.os.as_str(), config.architecture.as_str()),
        ("wasip2", "wasm")
    );
    assert_eq!(config.component.unwrap().exports, exports);
    let found = ours
        .fetch(&server.reference("me/theirs:1"), SIGNED)
        .unwrap();
    assert_eq!((found.bytes, found.layer), (bytes, pushed.layer));
}

#[test]
fn dockers_credentials_open_what_is_closed() {
    let server = Server::start("auth: {htpasswd: {realm: x, path: %/htpasswd}}\n");
    let bytes = component();
    let reference = server.reference("me/reward:1");
    let denied = registry()
        .push(&reference, artifact(&bytes, &[]), Taken::Stays)
        .unwrap_err();
    assert!(
        matches!(
            denied,
            RegistryError::Denied {
                with_credentials: false,
                ..
            }
        ),
        "{denied}"
    );
    let folder = tempfile::tempdir().unwrap();
    let docker = folder.path().join("config.json");
    let with = |auth: &str| {
        let host = format!("localhost:{}", server.port);
        let auths = serde_json::json!({ "auths": { host: { "auth": auth } } });
        fs::write(&docker, auths.to_string()).unwrap();
        Registry::new(RegistryConfig {
            docker_config: Some(docker.clone()),
            ..RegistryConfig::new(1 << 26)
        })
    };
    // `me:wrong` and `me:secret`.
    let denied = with("bWU6d3Jvbmc=")
        .push(&reference, artifact(&bytes, &[]), Taken::Stays)
        .unwrap_err();
    assert!(
        matches!(
            denied,
            RegistryError::Denied {
                with_credentials: true,
                ..
            }
        ),
        "{denied}"
    );
    let known = with("bWU6c2VjcmV0");
    known
        .push(&reference, artifact(&bytes, &[]), Taken::Stays)
        .unwrap();
    assert_eq!(known.fetch(&reference, SIGNED).unwrap().bytes, bytes);
    assert!(registry().fetch(&reference, SIGNED).is_err());
}
