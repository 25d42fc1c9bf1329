//! The file with a daemon's process id. It is locked while the daemon runs, so that nobody takes a number
//! left by a crash, and used again by the kernel, for a daemon.

use std::fs::File;
use std::io::{self, Read as _, Seek as _, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

/// A question by [`running`] holds the lock for a moment: tries, and the pause between them.
const TRIES_MAX: u32 = 20;
const PAUSE: Duration = Duration::from_millis(10);

/// Why there is no pid file.
#[derive(Debug, thiserror::Error)]
pub enum PidFileError {
    /// A daemon holds it.
    #[error("pid file {}: process {pid} holds it", path.display())]
    Running {
        /// The file.
        path: PathBuf,
        /// What it says.
        pid: u32,
    },
    /// It cannot be written.
    #[error("pid file {}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// This process's pid file; removed when dropped.
#[derive(Debug)]
pub struct PidFile {
    path: PathBuf,
    // Holds the lock.
    _file: File,
}

impl PidFile {
    /// Writes and locks the file; a number left by a crash is replaced.
    ///
    /// # Errors
    /// [`PidFileError::Running`] when another process holds it.
    pub fn create(path: &Path) -> Result<Self, PidFileError> {
        let io = |source| PidFileError::Io { path: path.to_owned(), source };
        for _ in 0..TRIES_MAX {
            let mut options = File::options();
            options.read(true).write(true).create(true).truncate(false).mode(0o644);
            let mut file = options.open(path).map_err(io)?;
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Err(Errno::WOULDBLOCK) => std::thread::sleep(PAUSE),
                Err(e) => return Err(io(e.into())),
                // The one who held it may have removed it just before: then this lock is on no file.
                Ok(()) if is_file_at(&file, path) => {
                    write_pid(&mut file).map_err(io)?;
                    return Ok(Self { path: path.to_owned(), _file: file });
                }
                Ok(()) => {}
            }
        }
        let pid = running(path).map_err(io)?.unwrap_or(0);
        Err(PidFileError::Running { path: path.to_owned(), pid })
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        // Without the lock, which ends with this process, the number means nothing anyway.
        let _ = std::fs::remove_file(&self.path);
    }
}

fn is_file_at(file: &File, path: &Path) -> bool {
    let key = |m: std::fs::Metadata| (m.dev(), m.ino());
    matches!((file.metadata().map(key), std::fs::metadata(path).map(key)), (Ok(a), Ok(b)) if a == b)
}

fn write_pid(file: &mut File) -> io::Result<()> {
    file.set_len(0)?;
    file.rewind()?;
    writeln!(file, "{}", std::process::id())
}

/// The running process that holds the pid file at `path`; none when the file is missing or was left by a
/// process that has ended.
///
/// # Errors
/// When the file cannot be read.
pub fn running(path: &Path) -> io::Result<Option<u32>> {
    let mut file = match File::open(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other?,
    };
    for _ in 0..TRIES_MAX {
        match flock(&file, FlockOperation::NonBlockingLockShared) {
            Ok(()) => return Ok(None),
            Err(Errno::WOULDBLOCK) => {}
            Err(e) => return Err(e.into()),
        }
        let mut text = String::new();
        file.rewind()?;
        std::io::Read::by_ref(&mut file).take(32).read_to_string(&mut text)?;
        if let Ok(pid) = text.trim().parse() {
            return Ok(Some(pid));
        }
        // Locked and not written yet: its process is just starting.
        std::thread::sleep(PAUSE);
    }
    Err(io::Error::new(io::ErrorKind::InvalidData, "locked, but there is no process id in it"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_counts_only_while_its_process_holds_it() {
        let path = std::env::temp_dir().join(format!("vmfs-pid-{}", std::process::id()));
        assert_eq!(running(&path).unwrap(), None);
        std::fs::write(&path, "1\n").unwrap();
        assert_eq!(running(&path).unwrap(), None, "left by a crash");
        let held = PidFile::create(&path).unwrap();
        assert_eq!(running(&path).unwrap(), Some(std::process::id()));
        assert_eq!(std::fs::read_to_string(&path).unwrap(), format!("{}\n", std::process::id()));
        let second = PidFile::create(&path);
        assert!(matches!(second, Err(PidFileError::Running { pid, .. }) if pid == std::process::id()));
        drop(held);
        assert!(!path.exists());
        assert_eq!(running(&path).unwrap(), None);
    }
}
