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
    calm_since: Option<Millis>,
}

impl GiveBack {
    /// Called every look with what is appended so far; true when it is time.
    pub(super) fn is_due(&mut self, now: Millis, appended: u64, busy: bool) -> bool {
        if busy || appended - self.appended < APPENDED_BYTES_MIN {
            self.calm_since = None;
            return false;
        }
        let since = *self.calm_since.get_or_insert(now);
        if now.since(since) < CALM_MS {
            return false;
        }
        *self = Self { appended, calm_since: None };
        true
    }
}

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
        assert!(!give.is_due(Millis(0), 0, false));
        assert!(!give.is_due(Millis(60_000), 1 << 20, false), "too little to be worth it");
        assert!(!give.is_due(Millis(61_000), 100 << 20, true));
        assert!(!give.is_due(Millis(62_000), 200 << 20, false));
        assert!(!give.is_due(Millis(64_000), 200 << 20, true), "the load goes on: calm begins anew");
        assert!(!give.is_due(Millis(65_000), 200 << 20, false));
        assert!(!give.is_due(Millis(67_999), 200 << 20, false));
        assert!(give.is_due(Millis(68_000), 200 << 20, false));
        assert!(!give.is_due(Millis(90_000), 200 << 20, false), "once");
    }
}
