//! A real mount over the engine in memory, and what tests ask of it.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::backend::MemBackend;
use vmfs_common::op::Attrs;
use vmfs_fuse::catalog::{Catalog, Meta};
use vmfs_fuse::fs::{Fs, Options};
use vmfs_fuse::mount::{Detached, MountOptions, Mounted, mount};
use vmfs_store::simdisk::SimDisk;

/// A mount in a directory of its own; everything is gone with it.
pub(crate) struct Rig {
    pub(crate) backend: Arc<MemBackend>,
    pub(crate) mounted: Option<Mounted>,
    pub(crate) point: PathBuf,
    _dir: tempfile::TempDir,
}

impl Rig {
    pub(crate) fn new() -> Self {
        Self::with(Options::default())
    }

    pub(crate) fn with(options: Options) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let point = dir.path().join("mnt");
        fs::create_dir(&point).unwrap();
        let backend = Arc::new(MemBackend::default());
        let meta = Meta { attrs: Attrs { mode: 0o755, ..options.root }, ..Meta::default() };
        let catalog = Catalog::open(Arc::new(SimDisk::new(1 << 30)), &meta).unwrap();
        let fs = Fs::start(backend.clone(), catalog, options).unwrap();
        let mounted = mount(&fs, &MountOptions::new(&point)).unwrap();
        Self { backend, mounted: Some(mounted), point, _dir: dir }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.point.join(name)
    }

    pub(crate) fn write(&self, name: &str, data: &[u8]) {
        fs::write(self.path(name), data).unwrap();
    }

    pub(crate) fn rw(&self, name: &str, flags: i32) -> File {
        OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .custom_flags(flags)
            .open(self.path(name))
            .unwrap()
    }

    pub(crate) fn sh(&self, script: &str) -> String {
        let out = Command::new("bash").arg("-euc").arg(script).current_dir(&self.point).output().unwrap();
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        assert!(out.status.success(), "{script}: {text}{}", String::from_utf8_lossy(&out.stderr));
        text
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        if let Some(mounted) = self.mounted.take() {
            self.backend.hold_flushes(false);
            let detached = mounted.detach(Duration::from_secs(10));
            if !std::thread::panicking() {
                assert_eq!(detached.unwrap(), Detached::Gone);
            }
        }
    }
}

pub(crate) fn errno<T>(result: std::io::Result<T>) -> i32 {
    result.err().and_then(|e| e.raw_os_error()).unwrap_or(0)
}

/// Waits for a condition, not for a time.
pub(crate) fn until(what: &str, condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < Duration::from_secs(10), "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

pub(crate) fn pattern(len: usize, seed: u32) -> Vec<u8> {
    let mix = |i: u32| i.wrapping_mul(2_654_435_761).wrapping_add(seed).to_le_bytes()[3];
    (0..u32::try_from(len).unwrap()).map(mix).collect()
}
