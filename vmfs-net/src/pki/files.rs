//! Files of the identity directory: secrets are made with mode 0600 from their first moment, nothing
//! is overwritten in place, and everything is on stable storage when a function returns.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use zeroize::Zeroizing;

use super::PkiError;

/// Longest file read from an identity directory.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// Who may read a new file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    /// The owner alone.
    Secret,
    /// Everybody.
    Public,
}

impl Mode {
    const fn bits(self) -> u32 {
        match self {
            Self::Secret => 0o600,
            Self::Public => 0o644,
        }
    }
}

fn write_error(path: &Path) -> impl Fn(std::io::Error) -> PkiError + '_ {
    move |source| match source.kind() {
        ErrorKind::AlreadyExists => PkiError::Exists { path: path.to_owned() },
        _ => PkiError::Write { path: path.to_owned(), source },
    }
}

/// Makes a directory (and its parents) that only the owner can enter; an existing one is left alone.
pub(crate) fn make_dir(path: &Path) -> Result<(), PkiError> {
    let mut builder = std::fs::DirBuilder::new();
    builder.recursive(true).mode(0o700).create(path).map_err(write_error(path))
}

/// Makes a new file. Fails when there is one.
pub(crate) fn create(path: &Path, mode: Mode, content: &[u8]) -> Result<(), PkiError> {
    let err = write_error(path);
    let mut file =
        OpenOptions::new().write(true).create_new(true).mode(mode.bits()).open(path).map_err(&err)?;
    let written = file.write_all(content).and_then(|()| file.sync_all());
    if let Err(e) = written {
        // Half a key is of no use to anybody; the first error is the one to tell.
        let _ = std::fs::remove_file(path);
        return Err(err(e));
    }
    sync_parent(path)
}

/// Replaces a file, or makes it: either the old content is there or the whole new one.
pub(crate) fn replace(path: &Path, mode: Mode, content: &[u8]) -> Result<(), PkiError> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".new");
    let beside: PathBuf = path.with_file_name(name);
    // Left over from a crash in the lines below.
    match std::fs::remove_file(&beside) {
        Err(e) if e.kind() != ErrorKind::NotFound => return Err(write_error(&beside)(e)),
        _ => {}
    }
    create(&beside, mode, content)?;
    std::fs::rename(&beside, path).map_err(write_error(path))?;
    sync_parent(path)
}

/// Removes a file durably; one that is not there is fine.
pub(crate) fn remove(path: &Path) -> Result<(), PkiError> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
        Err(e) => Err(write_error(path)(e)),
        Ok(()) => sync_parent(path),
    }
}

fn sync_parent(path: &Path) -> Result<(), PkiError> {
    let parent = match path.parent() {
        Some(p) if !p.as_os_str().is_empty() => p,
        _ => Path::new("."),
    };
    File::open(parent).and_then(|d| d.sync_all()).map_err(write_error(path))
}

/// The content of a file, at most a mebibyte.
pub(crate) fn read(path: &Path) -> Result<Vec<u8>, PkiError> {
    let err = |source| PkiError::Read { path: path.to_owned(), source };
    let len = std::fs::metadata(path).map_err(err)?.len();
    if len > FILE_BYTES_MAX {
        return Err(PkiError::malformed(path.display(), format!("{len} bytes are too many")));
    }
    std::fs::read(path).map_err(err)
}

/// The content of a secret file, which nobody but its owner may be able to read.
pub(crate) fn read_secret(path: &Path) -> Result<Zeroizing<Vec<u8>>, PkiError> {
    let err = |source| PkiError::Read { path: path.to_owned(), source };
    let mode = std::fs::metadata(path).map_err(err)?.permissions().mode() & 0o777;
    if mode & 0o077 != 0 {
        return Err(PkiError::OpenMode { path: path.to_owned(), mode });
    }
    read(path).map(Zeroizing::new)
}

/// The files of a directory whose names end in `.suffix`, sorted; none when it does not exist.
pub(crate) fn list(dir: &Path, suffix: &str) -> Result<Vec<PathBuf>, PkiError> {
    let err = |source| PkiError::Read { path: dir.to_owned(), source };
    let entries = match std::fs::read_dir(dir) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.map_err(err)?,
    };
    let mut paths = Vec::new();
    for entry in entries {
        let path = entry.map_err(err)?.path();
        if path.extension().is_some_and(|e| e == suffix) {
            paths.push(path);
        }
    }
    paths.sort();
    Ok(paths)
}
