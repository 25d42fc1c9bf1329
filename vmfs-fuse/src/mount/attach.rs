//! Mounting and unmounting, by mount id.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{AtFlags, CWD, OFlags, StatxFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags};

/// Largest request that carries data, in bytes.
pub(super) const REQUEST_BYTES_MAX: u32 = 1 << 20;
/// What `/proc/mounts` shows as the device.
const SOURCE: &str = "vmfs";
/// What it shows as the type.
const FS_TYPE: &str = "fuse.vmfs";
const READAHEAD_KIB: u32 = 1024;
/// `STATX_MNT_ID_UNIQUE`, Linux 6.8: ids that are never reused.
const MNT_ID_UNIQUE: StatxFlags = StatxFlags::from_bits_retain(0x4000);

/// Why it could not be mounted, or unmounted.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// No such directory.
    #[error("mount point {0} does not exist")]
    Missing(PathBuf),
    /// Something else is there.
    #[error("mount point {0} is not a directory")]
    NotADirectory(PathBuf),
    /// Files would be hidden.
    #[error("mount point {0} is not empty")]
    NotEmpty(PathBuf),
    /// Somebody was first.
    #[error("mount point {point} is already mounted ({fs_type}, from {source_name})")]
    AlreadyMounted {
        /// Where.
        point: PathBuf,
        /// What type.
        fs_type: String,
        /// What device.
        source_name: String,
    },
    /// The mount point cannot be looked at.
    #[error("mount point {point}: {source}")]
    Point {
        /// Where.
        point: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// No FUSE in the kernel, or no permission.
    #[error("/dev/fuse: {source}")]
    Device {
        /// The kernel's answer.
        source: io::Error,
    },
    /// The kernel would not mount.
    #[error("mounting on {point}: {source}{}", if source.kind() == io::ErrorKind::PermissionDenied { " (CAP_SYS_ADMIN is needed)" } else { "" })]
    Mount {
        /// Where.
        point: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The kernel and we do not understand each other.
    #[error("the FUSE handshake failed: {source}")]
    Handshake {
        /// How.
        source: io::Error,
    },
    /// No threads.
    #[error("starting the mount's threads: {source}")]
    Threads {
        /// The kernel's answer.
        source: io::Error,
    },
    /// The kernel would not unmount.
    #[error("unmounting {point}: {source}")]
    Unmount {
        /// Where.
        point: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// Our mount, and how to tell it from any other.
#[derive(Debug)]
pub(super) struct Attached {
    point: PathBuf,
    id: MountId,
    attached: AtomicBool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct MountId {
    id: u64,
    major: u32,
    minor: u32,
}

/// The id of the topmost mount at the path, without asking its file system anything.
fn mount_id(path: &Path) -> Result<MountId, Errno> {
    let flags = AtFlags::from_bits_retain(libc::AT_STATX_DONT_SYNC as u32) | AtFlags::SYMLINK_NOFOLLOW;
    let stat = rustix::fs::statx(CWD, path, flags, MNT_ID_UNIQUE)?;
    let stat = if stat.stx_mask & MNT_ID_UNIQUE.bits() == 0 {
        rustix::fs::statx(CWD, path, flags, StatxFlags::MNT_ID)?
    } else {
        stat
    };
    Ok(MountId { id: stat.stx_mnt_id, major: stat.stx_dev_major, minor: stat.stx_dev_minor })
}

/// Resolves the path without touching what is mounted on it (a dead mount answers nothing).
fn resolve(point: &Path) -> Result<PathBuf, MountError> {
    let whole =
        std::path::absolute(point).map_err(|source| MountError::Point { point: point.to_owned(), source })?;
    let (Some(parent), Some(name)) = (whole.parent(), whole.file_name()) else {
        return Err(MountError::AlreadyMounted {
            point: whole,
            fs_type: "the root".to_owned(),
            source_name: "boot".to_owned(),
        });
    };
    match parent.canonicalize() {
        Ok(parent) => Ok(parent.join(name)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Err(MountError::Missing(point.to_owned())),
        Err(source) => Err(MountError::Point { point: point.to_owned(), source }),
    }
}

/// Undoes the octal escapes of `/proc/self/mountinfo`.
fn unescape(field: &str) -> Vec<u8> {
    let bytes = field.as_bytes();
    let (mut out, mut at) = (Vec::with_capacity(bytes.len()), 0);
    while at < bytes.len() {
        let octal = (bytes[at] == b'\\').then(|| field.get(at + 1..at + 4)).flatten();
        if let Some(byte) = octal.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            out.push(byte);
            at += 4;
        } else {
            out.push(bytes[at]);
            at += 1;
        }
    }
    out
}

/// Type and source of what is mounted at the path, topmost last in the table.
fn mounted_at(table: &str, point: &Path) -> Option<(String, String)> {
    let mut at_point = table.lines().filter(|line| {
        line.split(' ').nth(4).is_some_and(|field| unescape(field) == point.as_os_str().as_bytes())
    });
    let mut rest = at_point.next_back()?.split(" - ").nth(1)?.split(' ');
    Some((rest.next()?.to_owned(), rest.next()?.to_owned()))
}

/// Checks the mount point; a dead mount that an earlier daemon left there is taken away.
fn prepare(point: &Path) -> Result<(), MountError> {
    let error = |source| MountError::Point { point: point.to_owned(), source };
    for _dead in 0..16 {
        let table = std::fs::read_to_string("/proc/self/mountinfo").map_err(error)?;
        let Some((fs_type, source_name)) = mounted_at(&table, point) else { break };
        // Attributes of the root may be answered from the kernel's cache for a while; statfs never is.
        let dead = fs_type == FS_TYPE
            && source_name == SOURCE
            && rustix::fs::statfs(point).is_err_and(|e| matches!(e, Errno::NOTCONN | Errno::CONNABORTED));
        if !dead {
            return Err(MountError::AlreadyMounted { point: point.to_owned(), fs_type, source_name });
        }
        tracing::warn!(point = %point.display(), "taking away the dead mount of an earlier daemon");
        rustix::mount::unmount(point, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW)
            .map_err(|e| MountError::Unmount { point: point.to_owned(), source: e.into() })?;
    }
    let meta = match std::fs::symlink_metadata(point) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Err(MountError::Missing(point.to_owned())),
        other => other.map_err(error)?,
    };
    if !meta.is_dir() {
        return Err(MountError::NotADirectory(point.to_owned()));
    }
    if std::fs::read_dir(point).map_err(error)?.next().is_some() {
        return Err(MountError::NotEmpty(point.to_owned()));
    }
    Ok(())
}

/// Checks a mount point without mounting, and takes a dead mount of an earlier daemon away.
///
/// # Errors
/// What is wrong with it.
pub fn check_point(point: &Path) -> Result<(), MountError> {
    prepare(&resolve(point)?)
}

/// Mounts on `point` and gives the device to talk to.
pub(super) fn attach(point: &Path, allow_other: bool) -> Result<(OwnedFd, Attached), MountError> {
    let point = resolve(point)?;
    prepare(&point)?;
    let device: OwnedFd =
        rustix::fs::open("/dev/fuse", OFlags::RDWR | OFlags::CLOEXEC, rustix::fs::Mode::empty())
            .map(|fd| File::from(fd).into())
            .map_err(|e| MountError::Device { source: e.into() })?;
    let mut data = format!(
        "fd={},rootmode=40000,user_id={},group_id={},default_permissions,max_read={REQUEST_BYTES_MAX}",
        device.as_raw_fd(),
        rustix::process::geteuid().as_raw(),
        rustix::process::getegid().as_raw(),
    );
    if allow_other {
        data.push_str(",allow_other");
    }
    let data = CString::new(data).expect("invariant: formatted numbers hold no NUL");
    let flags = MountFlags::NOSUID | MountFlags::NODEV;
    rustix::mount::mount(SOURCE, &point, FS_TYPE, flags, Some(data.as_c_str()))
        .map_err(|e| MountError::Mount { point: point.clone(), source: e.into() })?;
    match mount_id(&point) {
        Ok(id) => Ok((device, Attached { point, id, attached: AtomicBool::new(true) })),
        Err(e) => {
            // It was mounted a moment ago, and nothing is known that could be over it.
            let _ = rustix::mount::unmount(&point, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW);
            Err(MountError::Mount { point, source: e.into() })
        }
    }
}

impl Attached {
    pub(super) fn point(&self) -> &Path {
        &self.point
    }

    /// Takes the mount off the path. False: another one is over it, and nothing was done. An
    /// operator may have unmounted it before: then there is nothing to do.
    pub(super) fn detach(&self) -> Result<bool, MountError> {
        if !self.attached.swap(false, Ordering::SeqCst) {
            return Ok(true);
        }
        match mount_id(&self.point) {
            Ok(id) if id == self.id => {}
            found => {
                let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
                let device = format!("{}:{}", self.id.major, self.id.minor);
                let still_there = table.lines().any(|l| {
                    let mut fields = l.split(' ');
                    fields.nth(2) == Some(&device)
                        && fields.nth(1).is_some_and(|f| unescape(f) == self.point.as_os_str().as_bytes())
                });
                if still_there {
                    tracing::error!(point = %self.point.display(), ?found, "another file system is mounted over ours");
                }
                return Ok(!still_there);
            }
        }
        rustix::mount::unmount(&self.point, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW)
            .map_err(|e| MountError::Unmount { point: self.point.clone(), source: e.into() })?;
        Ok(true)
    }

    /// The kernel's default of 128 KiB halves sequential reads. Best effort: sysfs may be read-only.
    pub(super) fn widen_readahead(&self) {
        let path = format!("/sys/class/bdi/{}:{}/read_ahead_kb", self.id.major, self.id.minor);
        if let Err(error) = std::fs::write(&path, READAHEAD_KIB.to_string()) {
            tracing::debug!(%error, path, "read-ahead stays at the kernel's default");
        }
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        if let Err(error) = self.detach() {
            tracing::error!(%error, "the mount stays behind");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mount_table_is_read_with_its_escapes_and_the_topmost_mount_counts() {
        let table = "36 35 98:0 / /a\\040b rw,noatime master:1 - ext3 /dev/root rw\n\
                     37 36 0:44 / /a\\040b rw shared:2 - fuse.vmfs vmfs rw\n\
                     38 36 0:45 / /c rw - tmpfs none rw\n";
        let found = mounted_at(table, Path::new("/a b"));
        assert_eq!(found, Some(("fuse.vmfs".to_owned(), "vmfs".to_owned())));
        assert_eq!(mounted_at(table, Path::new("/a")), None);
    }

    #[test]
    fn each_bad_mount_point_has_its_own_error() {
        let dir = tempfile::tempdir().unwrap();
        let check = |name: &str| attach(&dir.path().join(name), true).map(|_| ()).unwrap_err().to_string();
        assert!(check("none").contains("does not exist"));
        assert!(check("none/below").contains("does not exist"));
        std::fs::write(dir.path().join("file"), b"").unwrap();
        assert!(check("file").contains("is not a directory"));
        assert!(attach(dir.path(), true).unwrap_err().to_string().contains("is not empty"));
        let proc = attach(Path::new("/proc"), true).unwrap_err().to_string();
        assert!(proc.contains("already mounted") && proc.contains("proc"), "{proc}");
    }
}
