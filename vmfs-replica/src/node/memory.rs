//! Memory that a load has needed goes back to the system when the load is over.
//!
//! glibc keeps what was freed in the middle of its arenas: payloads are allocated on one thread and freed on
//! another, so after minutes at full rate hundreds of MiB are free and resident.

use vmfs_common::Millis;

/// How long there has to be calm before memory is given back: doing so takes the allocator's locks.
const CALM_MS: u64 = 3000;
/// Less than this was not worth it.
const APPENDED_BYTES_MIN: u64 = 16 << 20;

/// Decides when.
#[derive(Debug, Default)]
pub(super) struct GiveBack {
    /// Bytes appended when memory was last given back.
    appended: u64,
    /// Bytes in rings at the last look, and how many have come and gone since memory was last given back.
    held: u64,
    moved: u64,
    calm_since: Option<Millis>,
}

impl GiveBack {
    /// Called every look with what is appended so far and what rings hold now; true when it is time. What
    /// members were still to be sent when the load ended is freed later: that is waited for, too.
    pub(super) fn is_due(&mut self, now: Millis, appended: u64, held: u64, busy: bool) -> bool {
        let moving = held != self.held;
        self.moved += held.abs_diff(self.held);
        self.held = held;
        if busy || moving || appended - self.appended + self.moved < APPENDED_BYTES_MIN {
            self.calm_since = None;
            return false;
        }
        let since = *self.calm_since.get_or_insert(now);
        if now.since(since) < CALM_MS {
            return false;
        }
        *self = Self { appended, held, moved: 0, calm_since: None };
        true
    }
}

/// Before any thread starts: as many arenas as threads can be busy with payloads, and no more. With glibc's
/// eight per processor, what many threads freed stayed resident for good (183 instead of 28 MiB after 16
/// images were written at full rate).
#[cfg(target_env = "gnu")]
pub(crate) fn bound_arenas() {
    let processors = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let arenas = libc::c_int::try_from(processors.max(4)).unwrap_or(libc::c_int::MAX);
    // SAFETY: a setting of the allocator, made while this is the only thread. A refusal leaves the default.
    let _ = unsafe { libc::mallopt(libc::M_ARENA_MAX, arenas) };
}

/// Other C libraries have no such setting.
#[cfg(not(target_env = "gnu"))]
pub(crate) fn bound_arenas() {}

/// Gives free pages back.
#[cfg(target_env = "gnu")]
pub(super) fn give_back() {
    // SAFETY: callable at any time from any thread; it touches only what the allocator holds free.
    let _ = unsafe { libc::malloc_trim(0) };
}

/// Other C libraries give it back by themselves.
#[cfg(not(target_env = "gnu"))]
pub(super) fn give_back() {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_given_back_once_after_a_load_and_not_during_it() {
        let mut give = GiveBack::default();
        assert!(!give.is_due(Millis(0), 0, 0, false));
        assert!(!give.is_due(Millis(60_000), 1 << 20, 0, false), "too little to be worth it");
        assert!(!give.is_due(Millis(61_000), 100 << 20, 0, true));
        assert!(!give.is_due(Millis(62_000), 200 << 20, 0, false));
        assert!(!give.is_due(Millis(64_000), 200 << 20, 0, true), "the load goes on: calm begins anew");
        assert!(!give.is_due(Millis(65_000), 200 << 20, 0, false));
        assert!(!give.is_due(Millis(67_999), 200 << 20, 0, false));
        assert!(give.is_due(Millis(68_000), 200 << 20, 0, false));
        assert!(!give.is_due(Millis(90_000), 200 << 20, 0, false), "once");
    }

    #[test]
    fn what_rings_let_go_after_the_load_is_given_back_too() {
        let (mut give, full) = (GiveBack::default(), 64 << 20);
        assert!(!give.is_due(Millis(0), 200 << 20, full, true));
        assert!(!give.is_due(Millis(1_000), 200 << 20, full, false));
        assert!(give.is_due(Millis(4_000), 200 << 20, full, false));
        assert!(!give.is_due(Millis(9_000), 200 << 20, full, false));
        // A member comes back and is sent what it missed.
        assert!(!give.is_due(Millis(10_000), 200 << 20, full / 2, false));
        assert!(!give.is_due(Millis(14_000), 200 << 20, 0, false), "not while it is being freed");
        assert!(!give.is_due(Millis(15_000), 200 << 20, 0, false));
        assert!(give.is_due(Millis(18_000), 200 << 20, 0, false));
    }
}
