//! Background work makes way for flushes.
//!
//! A disk serves a flush after what it was given before, so a flush that comes while background work has
//! megabytes on their way waits for all of them: that was what made the slowest hundredth of flushes slow. So
//! background work gives the disk one piece at a time, waits until it is done, and then rests, as long as
//! somebody flushes. Only its own thread rests, and nothing of a guest's waits for the locks it holds then.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// Bytes that background work reads or writes between two rests, about.
pub(crate) const PIECE_BYTES: u64 = 256 << 10;
/// Bytes of a file given back between two rests: they may be discarded on the disk, which takes its time too.
pub(crate) const FREED_BYTES: u64 = 1 << 20;
/// How long a rest is, at least and at most. Between them, it is as long as the piece took.
const REST_MIN: Duration = Duration::from_millis(1);
const REST_MAX: Duration = Duration::from_millis(20);
/// How much longer it is while there is space.
const UNHURRIED: u32 = 4;

/// Who has to wait for whom.
pub(crate) struct Way {
    /// Flushes so far.
    flushes: AtomicU64,
    /// Space has to come back.
    hurry: AtomicBool,
    pause: Mutex<Pause>,
}

struct Pause {
    /// Flushes when the last rest began.
    seen: u64,
    /// When the last rest ended.
    ended: Instant,
    /// There were flushes in this round of work, or since the one before.
    busy: bool,
}

impl Default for Way {
    fn default() -> Self {
        Self {
            flushes: AtomicU64::new(0),
            hurry: AtomicBool::new(false),
            pause: Mutex::new(Pause { seen: 0, ended: Instant::now(), busy: false }),
        }
    }
}

impl Way {
    /// Somebody waits for a log to become durable.
    pub(crate) fn flush(&self) {
        self.flushes.fetch_add(1, Ordering::Relaxed);
    }
    /// Background work begins; flushes until now did not wait for it. It rests less in a `hurry`: when space has
    /// to come back.
    pub(crate) fn begin(&self, hurry: bool) {
        self.hurry.store(hurry, Ordering::Relaxed);
        let flushes = self.flushes.load(Ordering::Relaxed);
        let mut pause = self.pause.lock();
        pause.busy = std::mem::replace(&mut pause.seen, flushes) != flushes;
        pause.ended = Instant::now();
    }
    /// Whether the last work was begun in a hurry.
    pub(crate) fn is_hurried(&self) -> bool {
        self.hurry.load(Ordering::Relaxed)
    }
    /// True while somebody flushes: then work is to be done by pieces. Otherwise that would only be slower, also
    /// for those who read.
    pub(crate) fn is_busy(&self) -> bool {
        let pause = self.pause.lock();
        pause.busy || pause.seen != self.flushes.load(Ordering::Relaxed)
    }
    /// A piece of background work is done. Rests when there were flushes since the last rest began.
    pub(crate) fn rest(&self) {
        let flushes = self.flushes.load(Ordering::Relaxed);
        let mut pause = self.pause.lock();
        let flushed = std::mem::replace(&mut pause.seen, flushes) != flushes;
        pause.busy |= flushed;
        let took = pause.ended.elapsed();
        drop(pause);
        if flushed {
            let times = if self.is_hurried() { 1 } else { UNHURRIED };
            std::thread::sleep(times * took.clamp(REST_MIN, REST_MAX));
        }
        self.pause.lock().ended = Instant::now();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn background_work_rests_only_while_somebody_flushes() {
        let way = Way::default();
        way.flush();
        way.begin(true);
        let began = Instant::now();
        (0..1000).for_each(|_| way.rest());
        assert!(began.elapsed() < 1000 * REST_MIN, "nobody has flushed meanwhile");
        let began = Instant::now();
        for _ in 0..3 {
            way.flush();
            way.rest();
        }
        assert!(began.elapsed() >= 3 * REST_MIN);
        way.begin(false);
        let began = Instant::now();
        way.flush();
        way.rest();
        assert!(began.elapsed() >= UNHURRIED * REST_MIN, "there is space");
    }
}
