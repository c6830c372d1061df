//! The cache folder: `models--org--name/{blobs/ETAG, refs/REVISION, snapshots/COMMIT/FILE → blob}`.

#[cfg(unix)]
use std::os::unix::fs::symlink;
#[cfg(windows)]
use std::os::windows::fs::symlink_file as symlink;
use std::{
    fs, io,
    path::{Component, Path, PathBuf},
};

use super::{HubError, Repo, RepoKind, Snapshot};

pub(super) struct Cache {
    root: PathBuf,
}

impl Cache {
    pub(super) fn new(root: &Path) -> Self {
        Self {
            root: root.to_owned(),
        }
    }

    fn repo(&self, repo: &Repo) -> PathBuf {
        let kind = match repo.kind {
            RepoKind::Model => "models",
            RepoKind::Dataset => "datasets",
        };
        self.root
            .join(format!("{kind}--{}", repo.id.replace('/', "--")))
    }

    pub(super) fn blob(&self, repo: &Repo, etag: &str) -> PathBuf {
        self.repo(repo).join("blobs").join(etag)
    }

    pub(super) fn pointer(&self, repo: &Repo, commit: &str, name: &str) -> PathBuf {
        self.repo(repo).join("snapshots").join(commit).join(name)
    }

    pub(super) fn write_ref(&self, repo: &Repo, commit: &str) -> Result<(), HubError> {
        if repo.revision == commit {
            return Ok(());
        }
        let path = self.repo(repo).join("refs").join(&repo.revision);
        let fail = |source| HubError::File {
            path: path.clone(),
            source,
        };
        make_parent(&path)?;
        fs::write(&path, commit).map_err(fail)
    }

    /// The newest known snapshot of the revision, which may itself be a commit.
    pub(super) fn snapshot(&self, repo: &Repo) -> Result<Option<Snapshot>, HubError> {
        let path = self.repo(repo).join("refs").join(&repo.revision);
        let commit = match fs::read_to_string(&path) {
            Ok(commit) => commit.trim().to_owned(),
            Err(e) if e.kind() == io::ErrorKind::NotFound => repo.revision.clone(),
            Err(source) => return Err(HubError::File { path, source }),
        };
        check_name(repo, &commit)?;
        let folder = self.repo(repo).join("snapshots").join(&commit);
        let mut files = Vec::new();
        if folder.is_dir() {
            list(&folder, "", &mut files)?;
        }
        files.sort();
        let repo = repo.clone();
        Ok((!files.is_empty()).then_some(Snapshot {
            repo,
            commit,
            files,
            cached: true,
        }))
    }
}

fn list(folder: &Path, prefix: &str, out: &mut Vec<String>) -> Result<(), HubError> {
    let fail = |source| HubError::File {
        path: folder.to_owned(),
        source,
    };
    for entry in fs::read_dir(folder).map_err(fail)? {
        let entry = entry.map_err(fail)?;
        let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
        if entry.path().is_dir() {
            list(&entry.path(), &format!("{name}/"), out)?;
        } else if entry.path().exists() {
            out.push(name);
        }
    }
    Ok(())
}

/// Refuses names that would leave the folder they are joined to. Ids, revisions, commits, ETags and file
/// names all come from outside.
pub(super) fn check_name(repo: &Repo, name: &str) -> Result<(), HubError> {
    let plain = |c: Component<'_>| matches!(c, Component::Normal(_));
    if name.is_empty() || name.contains(['\\', '\0']) || !Path::new(name).components().all(plain) {
        return Err(HubError::UnsafeName {
            id: repo.id.clone(),
            name: name.to_owned(),
        });
    }
    Ok(())
}

pub(super) fn make_parent(path: &Path) -> Result<(), HubError> {
    let Some(parent) = path.parent() else {
        return Ok(());
    };
    fs::create_dir_all(parent).map_err(|source| HubError::File {
        path: parent.to_owned(),
        source,
    })
}

/// Points `pointer` at `blob` with a relative link, as the hub's own tools do, so that a cache can move.
pub(super) fn link(blob: &Path, pointer: &Path) -> Result<(), HubError> {
    make_parent(pointer)?;
    let fail = |source| HubError::File {
        path: pointer.to_owned(),
        source,
    };
    match fs::remove_file(pointer) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(fail(e)),
        _ => {}
    }
    // blobs/ and snapshots/ are siblings: leave the folders between the pointer and their parent.
    let repo = blob.parent().and_then(Path::parent).unwrap_or(blob);
    let depth = pointer
        .strip_prefix(repo)
        .map_or(0, |p| p.components().count() - 1);
    let mut target: PathBuf = std::iter::repeat_n("..", depth).collect();
    target.push(blob.strip_prefix(repo).unwrap_or(blob));
    match symlink(&target, pointer) {
        // Another process finished the same file first.
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        other => other.map_err(fail),
    }
}
