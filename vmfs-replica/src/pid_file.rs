//! The file with a daemon's process id. It is locked while the daemon runs, so that nobody takes a number
//! left by a crash, and used again by the kernel, for a daemon.
//!
//! A killed process keeps its locks, ports and mounts until the kernel has taken it apart, which can last
//! longer than somebody needs to type the next command: such a holder is [`Holder::Ending`], neither running
//! nor gone, and whoever wants its place waits.

use std::fs::File;
use std::io::{self, Read as _, Seek as _, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open};

/// A question by [`holder`] holds the lock for a moment: tries, and the pause between them.
const TRIES_MAX: u32 = 20;
const PAUSE: Duration = Duration::from_millis(10);
/// How long the kernel may take to end a killed process.
pub const ENDING_MAX: Duration = Duration::from_secs(30);
/// `PF_EXITING` in the flags of proc_pid_stat(5).
const FLAG_EXITING: u64 = 4;

/// Who holds a pid file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Holder {
    /// Nobody: it is missing, or was left by a process that is gone.
    Nobody,
    /// This process runs.
    Running(u32),
    /// This process was killed or is exiting, and what it held is not free yet.
    Ending(u32),
}

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
    /// Writes and locks the file; a number left by a crash is replaced. Waits, [`ENDING_MAX`] at most, for
    /// a holder that is ending.
    ///
    /// # Errors
    /// [`PidFileError::Running`] when another process holds it.
    pub fn create(path: &Path) -> Result<Self, PidFileError> {
        let io = |source| PidFileError::Io { path: path.to_owned(), source };
        let (begun, mut tries) = (Instant::now(), 0);
        loop {
            let mut options = File::options();
            options.read(true).write(true).create(true).truncate(false).mode(0o644);
            let mut file = options.open(path).map_err(io)?;
            let locked = match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Err(Errno::WOULDBLOCK) => false,
                Err(e) => return Err(io(e.into())),
                // The one who held it may have removed it just before: then this lock is on no file.
                Ok(()) => is_file_at(&file, path),
            };
            // Without its lock the last holder may still have its store, its port and its mount.
            let last = read_pid(&mut file).map_err(io)?;
            if locked && !last.is_some_and(|pid| fate(pid) == Fate::Ending) {
                write_pid(&mut file).map_err(io)?;
                return Ok(Self { path: path.to_owned(), _file: file });
            }
            drop(file);
            let holder = holder(path).map_err(io)?;
            let patient = matches!(holder, Holder::Ending(_)) && begun.elapsed() < ENDING_MAX;
            if !patient {
                tries += 1;
            }
            if let (true, Holder::Running(pid) | Holder::Ending(pid)) = (tries >= TRIES_MAX, holder) {
                return Err(PidFileError::Running { path: path.to_owned(), pid });
            }
            std::thread::sleep(PAUSE);
        }
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

/// The process id in the file; none while it is being written.
fn read_pid(file: &mut File) -> io::Result<Option<u32>> {
    let mut text = String::new();
    file.rewind()?;
    std::io::Read::by_ref(file).take(32).read_to_string(&mut text)?;
    Ok(text.trim().parse().ok())
}

/// What became of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Alive,
    Ending,
    Gone,
}

fn fate(pid: u32) -> Fate {
    let Some(raw) = i32::try_from(pid).ok().and_then(Pid::from_raw) else { return Fate::Gone };
    // Also when the number belongs to a mere thread now: that is not the process that wrote it.
    let Ok(process) = pidfd_open(raw, PidfdFlags::empty()) else { return Fate::Gone };
    let mut fds = [PollFd::new(&process, PollFlags::IN)];
    // Readable once every thread has let go of everything, also when nobody has reaped it.
    if matches!(poll(&mut fds, Some(&Timespec::default())), Ok(n) if n > 0) {
        return Fate::Gone;
    }
    if is_ending(pid) { Fate::Ending } else { Fate::Alive }
}

/// Its main thread is exiting, or a SIGKILL waits for one of its threads: there is no way back.
fn is_ending(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The name in parentheses may hold anything.
    let words: Vec<&str> =
        stat.rsplit_once(')').map_or("", |(_, rest)| rest).split_ascii_whitespace().collect();
    let flags: u64 = words.get(6).and_then(|w| w.parse().ok()).unwrap_or(0);
    if matches!(words.first(), Some(&("Z" | "X"))) || flags & FLAG_EXITING != 0 {
        return true;
    }
    let kill = 1 << (Signal::KILL.as_raw() - 1);
    let killed = |task: &Path| {
        let status = std::fs::read_to_string(task.join("status")).unwrap_or_default();
        let pending = |line: &str| {
            let mask = line.strip_prefix("SigPnd:").or_else(|| line.strip_prefix("ShdPnd:"))?;
            u64::from_str_radix(mask.trim(), 16).ok()
        };
        status.lines().filter_map(pending).any(|mask| mask & kill != 0)
    };
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    tasks.into_iter().any(|task| killed(&task.path()))
}

/// Who holds the pid file at `path`. Does not wait for an ending process.
///
/// # Errors
/// When the file cannot be read.
pub fn holder(path: &Path) -> io::Result<Holder> {
    let mut last = None;
    for _ in 0..TRIES_MAX {
        let mut file = match File::open(path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Holder::Nobody),
            other => other?,
        };
        let locked = match flock(&file, FlockOperation::NonBlockingLockShared) {
            Ok(()) => false,
            Err(Errno::WOULDBLOCK) => true,
            Err(e) => return Err(e.into()),
        };
        last = read_pid(&mut file)?;
        match (locked, last.map(|pid| (pid, fate(pid)))) {
            (_, Some((pid, Fate::Ending))) => return Ok(Holder::Ending(pid)),
            (true, Some((pid, Fate::Alive))) => return Ok(Holder::Running(pid)),
            // Locked, and its number not written yet: its process is just starting.
            (true, Some((_, Fate::Gone)) | None) => {}
            (false, _) => return Ok(Holder::Nobody),
        }
        drop(file);
        std::thread::sleep(PAUSE);
    }
    // A child of it may have the file too.
    let none = || io::Error::new(io::ErrorKind::InvalidData, "locked, but there is no process id in it");
    last.map(Holder::Ending).ok_or_else(none)
}

/// The running process that holds the pid file at `path`; none when the file is missing, or was left by a
/// process that has ended or is ending.
///
/// # Errors
/// When the file cannot be read.
pub fn running(path: &Path) -> io::Result<Option<u32>> {
    Ok(match holder(path)? {
        Holder::Running(pid) => Some(pid),
        Holder::Nobody | Holder::Ending(_) => None,
    })
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

    /// A process that has written its number, then died, and whose child keeps the lock for `seconds`: as
    /// slow to go as one with much memory or many files.
    fn slow_to_end(path: &Path, seconds: &str) -> std::process::Child {
        let script = r#"exec 9<>"$0"; flock 9; echo $$ >&9; sleep "$1" & kill -9 $$"#;
        let mut command = std::process::Command::new("bash");
        let mut child = command.arg("-c").arg(script).arg(path).arg(seconds).spawn().unwrap();
        child.wait().unwrap();
        child
    }

    #[test]
    fn holder_that_is_ending_is_waited_for_and_never_taken_for_running() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pid");
        std::fs::write(&path, "").unwrap();
        let dead = slow_to_end(&path, "0.6").id();
        assert_eq!(holder(&path).unwrap(), Holder::Ending(dead));
        assert_eq!(running(&path).unwrap(), None);
        let begun = Instant::now();
        let held = PidFile::create(&path).unwrap();
        assert!(begun.elapsed() < Duration::from_secs(10));
        assert_eq!(running(&path).unwrap(), Some(std::process::id()));
        drop(held);
    }

    #[test]
    fn killed_process_is_ending_from_the_moment_of_the_signal() {
        for _ in 0..50 {
            let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
            assert_eq!(fate(child.id()), Fate::Alive);
            child.kill().unwrap();
            assert_ne!(fate(child.id()), Fate::Alive);
            child.wait().unwrap();
            assert_eq!(fate(child.id()), Fate::Gone);
        }
    }
}
