//! Mounts whose daemon was killed: "transport endpoint is not connected".

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::io::Errno;
use rustix::mount::{UnmountFlags, unmount};

/// Mounts on one place, one over the other, that are taken away at once.
const STACKED_MAX: usize = 16;

/// A mount that cannot be taken away.
#[derive(Debug, thiserror::Error)]
#[error("the dead mount {} cannot be detached: {source}", point.display())]
pub(super) struct MountError {
    point: PathBuf,
    source: io::Error,
}

/// Whether something of FUSE is mounted on `point`.
pub(super) fn is_mounted(point: &Path) -> io::Result<bool> {
    Ok(fuse_mounts(&std::fs::read("/proc/self/mountinfo")?).iter().any(|p| p == point))
}

/// Detaches the FUSE mounts on `point` that have no daemon any more. A living one stays.
pub(super) fn detach_dead(point: &Path) -> Result<(), MountError> {
    let fail = |source| MountError { point: point.to_owned(), source };
    for _ in 0..STACKED_MAX {
        if !is_mounted(point).map_err(fail)? || !matches!(rustix::fs::stat(point), Err(Errno::NOTCONN)) {
            return Ok(());
        }
        match unmount(point, UnmountFlags::DETACH) {
            Ok(()) => {}
            // Mounted by an ordinary user: the setuid helper may do it.
            Err(Errno::PERM) => fusermount(point).map_err(fail)?,
            Err(e) => return Err(fail(e.into())),
        }
    }
    Err(fail(io::Error::other(format!("more than {STACKED_MAX} mounts on it"))))
}

fn fusermount(point: &Path) -> io::Result<()> {
    let mut command = Command::new("fusermount3");
    let output = command.args(["-u", "-z", "--"]).arg(point).stdin(Stdio::null()).output()?;
    if output.status.success() {
        return Ok(());
    }
    Err(io::Error::other(format!("fusermount3: {}", String::from_utf8_lossy(&output.stderr).trim())))
}

/// The mount points of FUSE filesystems in a `mountinfo` (proc_pid_mountinfo(5)).
fn fuse_mounts(mountinfo: &[u8]) -> Vec<PathBuf> {
    let parse = |line: &[u8]| {
        let words: Vec<&[u8]> = line.split(|b| *b == b' ').collect();
        let dash = words.iter().position(|w| *w == b"-")?;
        let kind = words.get(dash + 1)?;
        let is_fuse = *kind == b"fuse" || kind.starts_with(b"fuse.");
        is_fuse.then(|| words.get(4).map(|point| unescape(point))).flatten()
    };
    mountinfo.split(|b| *b == b'\n').filter_map(parse).collect()
}

/// A path in which `\ooo` stands for a byte.
fn unescape(text: &[u8]) -> PathBuf {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((first, tail)) = rest.split_first() {
        let octal = tail.get(..3).filter(|_| *first == b'\\').and_then(|d| std::str::from_utf8(d).ok());
        match octal.and_then(|d| u8::from_str_radix(d, 8).ok()) {
            Some(byte) => {
                out.push(byte);
                rest = &tail[3..];
            }
            None => {
                out.push(*first);
                rest = tail;
            }
        }
    }
    PathBuf::from(OsStr::from_bytes(&out))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fuse_mounts_are_found_whatever_their_name() {
        let info = b"22 1 8:1 / / rw - ext4 /dev/sda1 rw\n\
            36 22 0:31 / /srv/my\\040vm\\134s/mnt rw,nosuid shared:5 master:1 - fuse.vmfs a rw\n\
            37 22 0:32 / /plain rw - fuse x rw\n\
            38 22 0:33 / /ctl rw - fusectl x rw\n\
            broken line\n";
        assert_eq!(fuse_mounts(info), [PathBuf::from("/srv/my vm\\s/mnt"), PathBuf::from("/plain")]);
    }

    #[test]
    fn ordinary_directory_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        assert!(!is_mounted(dir.path()).unwrap());
        detach_dead(dir.path()).unwrap();
        detach_dead(&dir.path().join("missing")).unwrap();
        assert!(dir.path().exists());
    }
}
