//! Waiting for a condition, with a time limit. Tests never sleep for a guessed time.

use std::time::{Duration, Instant};

/// How often a condition is looked at.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// Looks at `probe` until it gives a value, and returns it with the time that took.
///
/// Panics with `what` when `limit` has passed.
pub fn until_timed<T>(what: &str, limit: Duration, mut probe: impl FnMut() -> Option<T>) -> (T, Duration) {
    let start = Instant::now();
    loop {
        if let Some(value) = probe() {
            return (value, start.elapsed());
        }
        assert!(start.elapsed() < limit, "gave up after {limit:?} waiting until {what}");
        std::thread::sleep(POLL_INTERVAL);
    }
}

/// [`until_timed`] without the time.
pub fn until<T>(what: &str, limit: Duration, probe: impl FnMut() -> Option<T>) -> T {
    until_timed(what, limit, probe).0
}

/// Waits until `probe` is true.
pub fn until_true(what: &str, limit: Duration, mut probe: impl FnMut() -> bool) {
    until(what, limit, || probe().then_some(()));
}

/// Seconds, to keep the tests readable.
#[must_use]
pub const fn secs(n: u64) -> Duration {
    Duration::from_secs(n)
}
