//! The mount itself: attached, served and detached by code of ours.
//!
//! fuser only carries the messages. It does not mount (its unmounting may take down a foreign
//! file system that was mounted over the path, and leaves ours behind on `EBUSY`): [`attach`]
//! opens `/dev/fuse`, mounts, and remembers the mount's id, so that only this very mount is ever
//! detached. `adapter` converts, calls [`Fs`] and replies; it decides nothing.

mod adapter;
mod attach;
mod convert;

use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use fuser::{Config, INodeNo, Notifier, Session, SessionACL};
use parking_lot::Mutex;

use crate::backend::Backend;
use crate::fs::{Fs, KernelCache};

pub use attach::{MountError, check_point};

use adapter::Adapter;
use attach::Attached;

/// Threads that serve the kernel's requests unless told otherwise. Each has its own clone of
/// the device; none ever waits for the network.
pub const THREADS_DEFAULT: usize = 4;
/// Corrections of the kernel's memory that may be queued; beyond, the short time-outs do it.
const CORRECTIONS_MAX: usize = 4096;

/// How to mount.
#[derive(Debug, Clone)]
pub struct MountOptions {
    /// An empty directory.
    pub point: PathBuf,
    /// Whether other users than the daemon's may use the mount.
    pub allow_other: bool,
    /// Serving threads.
    pub threads: usize,
}

impl MountOptions {
    /// The defaults for a mount point.
    pub fn new(point: impl Into<PathBuf>) -> Self {
        Self { point: point.into(), allow_other: true, threads: THREADS_DEFAULT }
    }
}

/// A mounted file system. Dropping it detaches it.
pub struct Mounted {
    attached: Attached,
    serving: Option<JoinHandle<std::io::Result<()>>>,
    ended: mpsc::Receiver<()>,
    close: Box<dyn Fn() + Send + Sync>,
}

impl std::fmt::Debug for Mounted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Mounted").field("attached", &self.attached).finish_non_exhaustive()
    }
}

/// How detaching went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Detached {
    /// Gone, and every request was answered.
    Gone,
    /// No longer reachable by path, but files in it are still open; they work until the daemon
    /// ends.
    Busy,
    /// Another file system is mounted over it, which is not ours to take down. The mount under
    /// it stops answering when the daemon ends.
    Covered,
}

/// Mounts `fs` and serves it.
///
/// # Errors
/// What is wrong with the mount point, or what the kernel refused; nothing is mounted then.
pub fn mount<B: Backend>(fs: &Arc<Fs<B>>, options: &MountOptions) -> Result<Mounted, MountError> {
    let (device, attached) = attach::attach(&options.point, options.allow_other)?;
    let mut config = Config::default();
    config.n_threads = Some(options.threads.max(1));
    config.clone_fd = true;
    let acl = if options.allow_other { SessionACL::All } else { SessionACL::RootAndOwner };
    // From here on a failure drops `attached`, which detaches.
    let session = Session::from_fd(Adapter::new(fs.clone()), device, acl, config)
        .map_err(|source| MountError::Handshake { source })?;
    attached.widen_readahead();
    let correct = Corrector::start(session.notifier()).map_err(|source| MountError::Threads { source })?;
    fs.set_kernel(Box::new(correct));
    let (tell, ended) = mpsc::channel();
    let serving = std::thread::Builder::new()
        .name("vmfs-serve".to_owned())
        .spawn(move || {
            let result = session.run();
            // Nobody may be waiting.
            let _ = tell.send(());
            result
        })
        .map_err(|source| MountError::Threads { source })?;
    let fs = fs.clone();
    let mounted = Mounted { attached, serving: Some(serving), ended, close: Box::new(move || fs.close()) };
    tracing::info!(point = %mounted.attached.point().display(), "mounted");
    Ok(mounted)
}

impl Mounted {
    /// Where.
    #[must_use]
    pub fn point(&self) -> &Path {
        self.attached.point()
    }

    /// Waits until the kernel has let go of the mount: somebody unmounted it. `None`: not within
    /// `limit`.
    ///
    /// # Errors
    /// How serving ended, when it did not end by an unmount.
    pub fn wait(&mut self, limit: Duration) -> Option<std::io::Result<()>> {
        match self.ended.recv_timeout(limit) {
            Err(mpsc::RecvTimeoutError::Timeout) => None,
            Ok(()) | Err(mpsc::RecvTimeoutError::Disconnected) => Some(match self.serving.take() {
                Some(thread) => thread.join().unwrap_or_else(|_| Err(std::io::ErrorKind::Other.into())),
                None => Ok(()),
            }),
        }
    }

    /// Takes the mount off its path, lets what is open go on for up to `grace`, and then fails
    /// the requests that still wait.
    ///
    /// # Errors
    /// The kernel's, when even a lazy detach was refused; the mount is still there.
    pub fn detach(mut self, grace: Duration) -> Result<Detached, MountError> {
        let covered = !self.attached.detach()?;
        let mut gone = !covered && self.wait(grace).is_some();
        (self.close)();
        if covered {
            return Ok(Detached::Covered);
        }
        gone = gone || self.wait(Duration::from_millis(100)).is_some();
        Ok(if gone { Detached::Gone } else { Detached::Busy })
    }
}

/// Corrects the kernel's memory from a thread of its own, because the kernel may make it wait
/// for locks that requests hold.
struct Corrector(mpsc::SyncSender<Correction>);

enum Correction {
    Name(u64, String),
    Content(u64),
    /// Nothing to correct: says that everything before it was told.
    Barrier(mpsc::SyncSender<()>),
}

impl Corrector {
    fn start(notifier: Notifier) -> std::io::Result<Self> {
        let (send, receive) = mpsc::sync_channel(CORRECTIONS_MAX);
        let notifier = Mutex::new(notifier);
        std::thread::Builder::new().name("vmfs-correct".to_owned()).spawn(move || {
            for correction in receive {
                let notifier = notifier.lock();
                let told = match correction {
                    Correction::Name(parent, name) => notifier.inval_entry(INodeNo(parent), name.as_ref()),
                    Correction::Content(ino) => notifier.inval_inode(INodeNo(ino), 0, 0),
                    Correction::Barrier(done) => {
                        // Whoever waited may have given up.
                        let _ = done.try_send(());
                        continue;
                    }
                };
                if let Err(error) = told {
                    tracing::debug!(%error, "the kernel did not take a correction");
                }
            }
        })?;
        Ok(Self(send))
    }

    fn send(&self, correction: Correction) {
        if self.0.try_send(correction).is_err() {
            tracing::warn!("too many corrections at once; time-outs have to do");
        }
    }
}

impl KernelCache for Corrector {
    fn forget_name(&self, parent: u64, name: &str) {
        self.send(Correction::Name(parent, name.to_owned()));
    }
    fn forget_content(&self, ino: u64) {
        self.send(Correction::Content(ino));
    }
    fn settle(&self) {
        let (done, told) = mpsc::sync_channel(1);
        if self.0.send(Correction::Barrier(done)).is_ok() {
            // An error means that the mount is gone, and its cache with it.
            let _ = told.recv();
        }
    }
}
