//! Files that are there whole or not at all.

use std::{
    fs::{self, File},
    io::{self, Write},
    path::Path,
};

use super::RunError;

/// Writes through a temporary file in the same folder, which is synced and then renamed. A failure leaves
/// the previous file, if any, and no temporary.
pub(super) fn write(path: &Path, bytes: &[u8]) -> Result<(), RunError> {
    write_with(path, |file| file.write_all(bytes))
}

/// The same for a writer that produces the bytes.
pub(super) fn write_with(
    path: &Path,
    fill: impl FnOnce(&mut File) -> io::Result<()>,
) -> Result<(), RunError> {
    let fail = |source| RunError::Write {
        path: path.to_owned(),
        source,
    };
    let folder = path.parent().unwrap_or(Path::new("."));
    let mut builder = tempfile::Builder::new();
    builder.prefix(".tmp-");
    // A run directory is as readable as any other file of the user; tempfile's default is 0600.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o644));
    let mut file = builder.tempfile_in(folder).map_err(fail)?;
    fill(file.as_file_mut()).map_err(fail)?;
    file.as_file().sync_all().map_err(fail)?;
    file.persist(path).map_err(|e| fail(e.error))?;
    sync_folder(folder)
}

/// Makes renames in the folder survive a power cut.
pub(super) fn sync_folder(folder: &Path) -> Result<(), RunError> {
    let sync = File::open(folder).and_then(|f| f.sync_all());
    sync.map_err(|source| RunError::Write {
        path: folder.to_owned(),
        source,
    })
}

/// Paths in a folder in the order of their names; none when there is no such folder.
pub(super) fn entries(folder: &Path) -> Result<Vec<std::path::PathBuf>, RunError> {
    let fail = |source| RunError::Read {
        path: folder.to_owned(),
        source,
    };
    let found = match fs::read_dir(folder) {
        Ok(found) => found,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(fail(e)),
    };
    let paths: Result<Vec<_>, _> = found.map(|entry| entry.map(|e| e.path())).collect();
    let mut paths = paths.map_err(fail)?;
    paths.sort();
    Ok(paths)
}
