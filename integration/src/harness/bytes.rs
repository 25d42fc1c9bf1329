//! Comparing files, and asking the kernel about mounts.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

/// Panics, naming the first 4 KiB block that differs, unless both files have the same size and bytes.
#[track_caller]
pub fn assert_same(a: &Path, b: &Path) {
    if let Err(difference) = compare(a, b) {
        panic!("{difference}");
    }
}

/// The first difference of two files, in words.
///
/// # Errors
/// When there is one.
#[track_caller]
pub fn compare(a: &Path, b: &Path) -> Result<(), String> {
    let open = |p: &Path| File::open(p).unwrap_or_else(|e| panic!("{}: {e}", p.display()));
    let (fa, fb) = (open(a), open(b));
    let size = |f: &File, p: &Path| f.metadata().unwrap_or_else(|e| panic!("{}: {e}", p.display())).len();
    let (sa, sb) = (size(&fa, a), size(&fb, b));
    if sa != sb {
        return Err(format!("{} has {sa} bytes, {} has {sb}", a.display(), b.display()));
    }
    let (mut ba, mut bb) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    let mut at = 0;
    while at < sa {
        let n = usize::try_from((sa - at).min(1 << 20)).expect("invariant: at most 1 MiB");
        fa.read_exact_at(&mut ba[..n], at).unwrap_or_else(|e| panic!("{} at {at}: {e}", a.display()));
        fb.read_exact_at(&mut bb[..n], at).unwrap_or_else(|e| panic!("{} at {at}: {e}", b.display()));
        if ba[..n] != bb[..n] {
            let byte = (0..n).find(|&i| ba[i] != bb[i]).expect("invariant: they differ");
            let block = (at + byte as u64) / 4096;
            return Err(format!("{} and {} differ in block {block}", a.display(), b.display()));
        }
        at += n as u64;
    }
    Ok(())
}

/// Whether something is mounted at `path` (also when its daemon is dead).
#[must_use]
pub fn is_mounted(path: &Path) -> bool {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").expect("procfs is there");
    let wanted = path.to_str().expect("paths of these tests are text");
    mounts.lines().any(|line| line.split(' ').nth(4) == Some(wanted))
}

/// Bytes of disk that the file occupies.
#[must_use]
pub fn allocated_bytes(path: &Path) -> u64 {
    path.metadata().unwrap_or_else(|e| panic!("{}: {e}", path.display())).blocks() * 512
}

/// `count` bytes that compress badly and depend on `seed` alone.
#[must_use]
pub fn noise(seed: u64, count: usize) -> Vec<u8> {
    use rand::{RngCore, SeedableRng, rngs::StdRng};
    let mut bytes = vec![0; count];
    StdRng::seed_from_u64(seed).fill_bytes(&mut bytes);
    bytes
}
