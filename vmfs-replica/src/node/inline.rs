//! Whether a log may be made durable on the network's own thread. Handing the sync to another thread and its
//! result back costs two wake-ups, about as much as the sync itself on a fast disk; but while it lasts the thread
//! serves nobody else, and it cannot share its device flush with others. So only while one image alone is
//! written here, and while the disk is quick.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use vmfs_common::{ImageId, Millis};

/// For how long no other image must have been written.
const ALONE_MS: u64 = 100;
/// What a sync may last on average.
const QUICK_MAX: Duration = Duration::from_micros(500);
/// Syncs that the average is over, roughly.
const AVERAGE_OVER: u64 = 16;
/// The longest that one sync counts for: a single slow one among many does not change the way.
const COUNTED_MAX: Duration = Duration::from_millis(5);

/// Whether one image alone is being written.
#[derive(Default)]
pub(super) struct Alone {
    /// The image written last, and since when no other was.
    last: Mutex<(ImageId, Millis)>,
}

impl Alone {
    /// `image` is being written. True when no other was for a while.
    pub(super) fn note(&self, image: ImageId, now: Millis) -> bool {
        let mut last = self.last.lock();
        if last.0 != image {
            *last = (image, now);
        }
        now.since(last.1) >= ALONE_MS
    }
}

/// See the module.
pub(super) struct InlineSyncs {
    alone: Alone,
    average_us: AtomicU64,
}

impl Default for InlineSyncs {
    fn default() -> Self {
        // Until it has shown that it is quick, the disk counts as slow.
        Self { alone: Alone::default(), average_us: AtomicU64::new(micros(COUNTED_MAX)) }
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

impl InlineSyncs {
    /// A peer has sent something about `image`. True when a sync of it may be done in place.
    pub(super) fn note(&self, image: ImageId, now: Millis) -> bool {
        self.alone.note(image, now) && self.average_us.load(Ordering::Relaxed) <= micros(QUICK_MAX)
    }
    /// A sync lasted `time`. Of two at once one may go uncounted.
    pub(super) fn lasted(&self, time: Duration) {
        let old = self.average_us.load(Ordering::Relaxed);
        let new = (old * (AVERAGE_OVER - 1) + micros(time.min(COUNTED_MAX))) / AVERAGE_OVER;
        self.average_us.store(new, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_lone_image_on_a_quick_disk_is_synced_in_place() {
        let (a, b) = (ImageId::from_bytes([1; 16]), ImageId::from_bytes([2; 16]));
        let syncs = InlineSyncs::default();
        let at = |ms| Millis(1_000_000 + ms);
        let many = |time| (0..100).for_each(|_| syncs.lasted(time));
        assert!(!syncs.note(a, at(0)), "another may have been written just before");
        assert!(!syncs.note(a, at(ALONE_MS)), "the disk may be slow");
        many(Duration::from_micros(100));
        assert!(syncs.note(a, at(ALONE_MS)));
        assert!(!syncs.note(b, at(101)));
        assert!(!syncs.note(a, at(102)));
        assert!(!syncs.note(a, at(201)));
        assert!(syncs.note(a, at(202)));
        syncs.lasted(Duration::from_secs(3));
        assert!(syncs.note(a, at(202)), "one of many");
        many(Duration::from_millis(1));
        assert!(!syncs.note(a, at(203)));
        many(Duration::from_micros(100));
        assert!(syncs.note(a, at(204)));
    }
}
