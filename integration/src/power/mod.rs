//! A file system whose power can be cut: a small FUSE file system that keeps what was written, created,
//! renamed or removed in memory until it is synced, and on command forgets a random part of the rest.
//!
//! It stands under the store's directory of a real daemon, served by a process of its own (`power_disk`, which
//! [`crate::harness::power`] starts): a test that uses files of a daemon that uses files of the test could not
//! be killed. The cut is made as
//! the power makes it, between two calls: first no further call takes effect or is answered
//! ([`PowerDisk::freeze`], or by itself after a number of calls, [`PowerDisk::freeze_after`]), then the caller
//! kills the programs, and then [`PowerDisk::cut`] decides what the disk holds.
//!
//! What survives a cut:
//! - everything that an fsync or fdatasync of the file returned for, and the file's length then;
//! - of every page (4 KiB) written since, any one of its versions, or a mixture of two at 512-byte sectors;
//! - names for which an fsync of their directory returned, and of every directory's later changes a prefix.
//!   An fsync of a file does not make its name durable, and one of a directory not the directory's own name:
//!   journalling file systems give more, POSIX does not.
//!
//! A program that is killed without a cut loses nothing: the cache is the file system's, not the program's.
//! Synced content lies in files of a backing directory, by number; names live in this process alone. Reads
//! and writes bypass the kernel's page cache, which would survive the cut. `syncfs` does not reach a FUSE
//! file system, so it makes nothing durable here, and there are no links, devices or attributes.

mod adapter;
mod content;
mod names;
mod state;
#[cfg(test)]
mod tests;

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use fuser::{Config, Session, SessionACL};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rustix::fs::OFlags;
use rustix::mount::{MountFlags, UnmountFlags};

use adapter::Adapter;
use state::{Phase, Shared};

/// Largest request that carries data, in bytes.
const REQUEST_BYTES_MAX: u32 = 1 << 20;
/// Threads that serve the kernel's requests.
const THREADS: usize = 4;

/// What a cut leaves, drawn from a seed.
#[derive(Debug)]
struct Luck {
    rng: StdRng,
    /// Chance that one unsynced thing survives. All at once differ by cut: nothing, something, everything.
    keep: f64,
}

impl Luck {
    fn new(seed: u64) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let keep = match rng.random_range(0..8) {
            0 | 1 => 0.0,
            2 => 1.0,
            3 => 0.98,
            _ => rng.random(),
        };
        Self { rng, keep }
    }

    fn survives(&mut self) -> bool {
        self.rng.random_bool(self.keep)
    }

    fn tears(&mut self) -> bool {
        self.rng.random_ratio(1, 2)
    }
}

/// What a cut met.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Lost {
    /// Pages with unsynced versions.
    pub pages: usize,
    /// Changes of names that no fsync of a directory covered.
    pub names: usize,
}

/// A mounted file system with a power switch. Dropping it unmounts; calls that wait are answered `EIO`.
#[derive(Debug)]
pub struct PowerDisk {
    point: PathBuf,
    shared: Arc<Shared>,
    serving: Option<JoinHandle<io::Result<()>>>,
}

impl PowerDisk {
    /// Takes all files of the directory `point` into `backing` (of the same file system, empty), and mounts
    /// over it what shows them under their old names.
    ///
    /// # Errors
    /// What the kernel said; `point` may be half emptied then.
    pub fn mount(point: &Path, backing: &Path) -> io::Result<Self> {
        let shared = Arc::new(Shared::import(point, backing)?);
        let device: OwnedFd =
            rustix::fs::open("/dev/fuse", OFlags::RDWR | OFlags::CLOEXEC, rustix::fs::Mode::empty())?;
        let data = format!(
            "fd={},rootmode=40000,user_id=0,group_id=0,default_permissions,allow_other,max_read={REQUEST_BYTES_MAX}",
            device.as_raw_fd(),
        );
        let data = CString::new(data).expect("invariant: formatted numbers hold no NUL");
        let flags = MountFlags::NOSUID | MountFlags::NODEV;
        rustix::mount::mount("power", point, "fuse.power", flags, Some(data.as_c_str()))?;
        let mut disk = Self { point: point.to_owned(), shared: Arc::clone(&shared), serving: None };
        let mut config = Config::default();
        config.n_threads = Some(THREADS);
        config.clone_fd = true;
        // From here on a failure drops `disk`, which unmounts.
        let session = Session::from_fd(Adapter::new(shared), device, SessionACL::All, config)?;
        disk.serving =
            Some(std::thread::Builder::new().name("power-disk".into()).spawn(move || session.run())?);
        Ok(disk)
    }

    /// From now on no call takes effect, and none is answered.
    pub fn freeze(&self) {
        self.shared.set_phase(Phase::Frozen);
    }

    /// The same, by itself, when `calls` more calls that change something (writes, syncs, names) have taken
    /// effect. [`Self::is_frozen`] tells whether they have.
    pub fn freeze_after(&self, calls: u64) {
        self.shared.freeze_after(calls);
    }

    /// Whether calls wait now. After a minute they fail instead.
    #[must_use]
    pub fn is_frozen(&self) -> bool {
        self.shared.is_frozen()
    }

    /// Answers all calls that wait, and every further one, with `EIO`: lets programs end that were killed
    /// while it was frozen.
    pub fn fail_waiting(&self) {
        self.shared.set_phase(Phase::Dead);
    }

    /// Forgets what the cut takes, drawn from `seed`, and is ready for the next start.
    ///
    /// Comes after [`Self::fail_waiting`], when nobody has a file open any more.
    ///
    /// # Errors
    /// The backing directory's.
    pub fn cut(&self, seed: u64) -> io::Result<Lost> {
        self.shared.cut(&mut Luck::new(seed))
    }
}

impl Drop for PowerDisk {
    fn drop(&mut self) {
        self.fail_waiting();
        // Whoever cleaned up before may have unmounted it already.
        let _ = rustix::mount::unmount(&self.point, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW);
        let Some(serving) = self.serving.take() else { return };
        // Files that somebody still has open keep the session alive: it ends with this process then.
        for _ in 0..100 {
            if serving.is_finished() {
                let _ = serving.join();
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Opens the backing file of number `ino`.
fn backing_file(backing: &Path, ino: u64) -> io::Result<File> {
    File::options().read(true).write(true).create(true).truncate(false).open(backing.join(ino.to_string()))
}
