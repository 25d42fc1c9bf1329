//! Tails that are no longer part of an image: listed, written to a file, dropped.

use std::fs::File;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::sync::Arc;

use vmfs_common::op::Op;
use vmfs_common::{BLOCK_BYTES, BLOCK_BYTES_U64};
use vmfs_store::LogEntry;

use super::NodeControl;
use crate::api::{ApiError, ForkDropRequest, ForkExportReport, ForkExportRequest, ForkInfo, Progress, Unit};
use crate::node::Image;

/// Payload read from a fork at a time.
const READ_BYTES_MAX: usize = 4 << 20;

impl NodeControl {
    pub(super) fn fork_list(&self, images: &[Arc<Image>]) -> Vec<ForkInfo> {
        let mut forks: Vec<_> = images.iter().flat_map(|i| i.fork_infos()).collect();
        forks.sort_by(|a, b| (&a.image, a.first_seq, &a.fork).cmp(&(&b.image, b.first_seq, &b.fork)));
        forks
    }

    fn fork(&self, fork: &str) -> Result<(Arc<Image>, ForkInfo), ApiError> {
        let of = |image: Arc<Image>| {
            let info = image.fork_infos().into_iter().find(|f| f.fork == fork)?;
            Some((image, info))
        };
        let found = self.node.images().into_iter().find_map(of);
        found.ok_or_else(|| ApiError::not_found(format!("no fork {fork:?} on this host")))
    }

    pub(super) fn fork_drop(&self, request: &ForkDropRequest) -> Result<ForkInfo, ApiError> {
        let (image, info) = self.fork(&request.fork)?;
        let name = image.fork_name(&request.fork).unwrap_or_default();
        image.drop_fork(&name).map_err(ApiError::failed)?;
        Ok(info)
    }

    pub(super) async fn fork_export(
        &self,
        request: ForkExportRequest,
        progress: Progress,
    ) -> Result<ForkExportReport, ApiError> {
        let (image, info) = self.fork(&request.fork)?;
        let work = move || export(&image, &info, &request, &progress);
        tokio::task::spawn_blocking(work).await.map_err(ApiError::failed)?
    }
}

/// Writes what a fork has changed to a file. A file that it has made itself is removed when that fails.
fn export(
    image: &Image,
    info: &ForkInfo,
    request: &ForkExportRequest,
    progress: &Progress,
) -> Result<ForkExportReport, ApiError> {
    let path = Path::new(&request.file);
    let failed = |e: &dyn std::fmt::Display| ApiError::failed(format!("{}: {e}", path.display()));
    let mut options = File::options();
    options.read(true).write(true).create_new(!request.onto).mode(0o600);
    let file = options.open(path).map_err(|e| failed(&e))?;
    let begin = || -> std::io::Result<Target<'_>> {
        if !request.onto {
            file.set_len(image.state().size_bytes)?;
        }
        Ok(Target { size: file.metadata()?.len(), file: &file, written: 0, zeroed: 0 })
    };
    let done = begin().map_err(|e| failed(&e)).and_then(|mut target| {
        each_entry(image, info, progress, |entry| target.apply(entry).map_err(|e| failed(&e)))?;
        file.sync_all().map_err(|e| failed(&e))?;
        Ok(target)
    });
    if done.is_err() && !request.onto {
        let _ = std::fs::remove_file(path);
    }
    let target = done?;
    Ok(ForkExportReport {
        fork: info.fork.clone(),
        image: info.image.clone(),
        file: request.file.clone(),
        updates: info.last_seq - info.first_seq + 1,
        written_bytes: target.written,
        zeroed_bytes: target.zeroed,
        size_bytes: target.size,
    })
}

fn each_entry(
    image: &Image,
    info: &ForkInfo,
    progress: &Progress,
    mut each: impl FnMut(&LogEntry) -> Result<(), ApiError>,
) -> Result<(), ApiError> {
    let gone = || ApiError::failed(format!("fork {}: it was dropped, or cannot be read whole", info.fork));
    let (mut next, total) = (info.first_seq, info.last_seq - info.first_seq + 1);
    while next <= info.last_seq {
        let entries = image.read_fork(&info.fork, next, READ_BYTES_MAX).map_err(ApiError::failed)?;
        for entry in &entries {
            each(entry)?;
        }
        next = entries.last().ok_or_else(gone)?.update.header.seq.next().0;
        progress.report("exporting", next - info.first_seq, Some(total), Unit::Updates);
    }
    Ok(())
}

/// The file that a fork is written to.
struct Target<'a> {
    file: &'a File,
    /// As the image would be after the updates so far, in bytes.
    size: u64,
    written: u64,
    zeroed: u64,
}

impl Target<'_> {
    fn apply(&mut self, entry: &LogEntry) -> std::io::Result<()> {
        let h = &entry.update.header;
        let start = h.start.0 * BLOCK_BYTES_U64;
        match h.op {
            Op::Write { size_after_bytes } => {
                self.grow(size_after_bytes)?;
                let mut blocks = entry.payload.chunks_exact(BLOCK_BYTES);
                for (at, digest) in (start..).step_by(BLOCK_BYTES).zip(&h.digests) {
                    // The payload leaves blocks of zeros out.
                    match if digest.is_zero() { None } else { blocks.next() } {
                        Some(block) => self.write(at, block)?,
                        None => self.zero(at, BLOCK_BYTES_U64)?,
                    }
                }
            }
            Op::Zero { size_after_bytes } => {
                self.grow(size_after_bytes)?;
                self.zero(start, h.count.0 * BLOCK_BYTES_U64)?;
            }
            Op::Resize { size_bytes } => {
                self.size = size_bytes;
                self.file.set_len(size_bytes)?;
            }
            Op::Rewind { .. } => return Err(std::io::Error::other("the fork goes back to an older state")),
            _ => {}
        }
        Ok(())
    }

    fn grow(&mut self, size: Option<u64>) -> std::io::Result<()> {
        if let Some(size) = size.filter(|s| *s > self.size) {
            self.size = size;
            self.file.set_len(size)?;
        }
        Ok(())
    }

    /// `count` bytes from `at` on, as far as the image reaches.
    fn inside(&self, at: u64, count: u64) -> u64 {
        count.min(self.size.saturating_sub(at))
    }

    fn write(&mut self, at: u64, block: &[u8]) -> std::io::Result<()> {
        let count = self.inside(at, block.len() as u64);
        self.written += count;
        let count = usize::try_from(count).expect("invariant: no longer than the block");
        self.file.write_all_at(&block[..count], at)
    }

    fn zero(&mut self, at: u64, count: u64) -> std::io::Result<()> {
        let count = self.inside(at, count);
        self.zeroed += count;
        if count == 0 {
            return Ok(());
        }
        let mode = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
        match rustix::fs::fallocate(self.file, mode, at, count) {
            // Not every filesystem has holes.
            Err(rustix::io::Errno::OPNOTSUPP) => write_zeros(self.file, at, count),
            done => Ok(done?),
        }
    }
}

fn write_zeros(file: &File, at: u64, count: u64) -> std::io::Result<()> {
    const PIECE: u64 = 1 << 20;
    let zeros = vec![0; 1 << 20];
    for start in (at..at + count).step_by(1 << 20) {
        let n = usize::try_from((at + count - start).min(PIECE)).expect("invariant: a mebibyte at most");
        file.write_all_at(&zeros[..n], start)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    #[test]
    fn zeros_are_written_where_they_belong_and_nowhere_else() {
        let path = std::env::temp_dir().join(format!("vmfs-zeros-{}", std::process::id()));
        let mut expected = vec![7u8; (3 << 20) + 100];
        std::fs::write(&path, &expected).unwrap();
        let file = std::fs::File::options().read(true).write(true).open(&path).unwrap();
        for (at, count) in [(5, 0), (10, 1), (4096, (2 << 20) + 50)] {
            super::write_zeros(&file, at, count).unwrap();
            expected[usize::try_from(at).unwrap()..][..usize::try_from(count).unwrap()].fill(0);
        }
        let mut got = vec![0; expected.len()];
        file.read_exact_at(&mut got, 0).unwrap();
        std::fs::remove_file(&path).unwrap();
        assert!(got == expected);
    }
}
