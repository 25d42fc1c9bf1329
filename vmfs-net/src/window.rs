//! How much may be on its way to a peer: what the way there holds, and little more.
//!
//! Whatever was written to a connection and is not acknowledged lies ahead of the next flush, of any image, so a
//! window is to be small. But a way of 100 ms there and back takes no more than one window in that time. So the
//! window begins at the configured size and grows to twice what the connection has carried in one round trip. That
//! round trip is one without our own data waiting ahead of it: while there is data and the window is larger than at
//! first, the shortest of those measured. Now and then the window is small again for a moment, to learn whether the way
//! has changed.
//! (BBR bounds what is under way likewise, and measures the round trip so: draft-ietf-ccwg-bbr, ProbeRTT.)

use std::time::{Duration, Instant};

/// Largest window, in bytes.
pub(crate) const SEND_WINDOW_BYTES_MAX: u64 = 32 << 20;
/// A window grows to no more than is carried in this time: what a narrow line keeps waiting lies ahead of beats, too.
const WAIT_MAX: Duration = Duration::from_millis(500);
/// Measurements after which a window that has grown is small for one.
const MEASUREMENTS: u32 = 40;

/// The send window of one connection.
#[derive(Debug)]
pub(crate) struct SendWindow {
    /// The configured one.
    least_bytes: u64,
    bytes: u64,
    /// The round trip that counts.
    round_trip: Duration,
    /// Most bytes a second since the window was small last.
    rate: u64,
    /// When this measurement began, and what had been sent by then.
    since: (Instant, u64),
    /// Measurements since the window was small last.
    count: u32,
}

impl SendWindow {
    /// `least_bytes` is in force already.
    pub(crate) const fn new(least_bytes: u64, now: Instant) -> Self {
        Self {
            least_bytes,
            bytes: least_bytes,
            round_trip: Duration::ZERO,
            rate: 0,
            since: (now, 0),
            count: 0,
        }
    }

    /// Takes note of the smoothed round trip and of all bytes sent so far; gives the window, in bytes, when it is
    /// another one now.
    pub(crate) fn measure(&mut self, now: Instant, round_trip: Duration, sent_bytes: u64) -> Option<u64> {
        let took = now.saturating_duration_since(self.since.0);
        // Over less, what has just been put on its way would count as carried.
        if took < 2 * round_trip || took.is_zero() {
            return None;
        }
        let sent = sent_bytes.saturating_sub(self.since.1);
        let rate = per(sent, Duration::from_secs(1), took);
        self.since = (now, sent_bytes);
        let small = self.bytes == self.least_bytes;
        let nothing_waits = small || sent < self.least_bytes / 8;
        self.round_trip = if nothing_waits { round_trip } else { self.round_trip.min(round_trip) };
        let before = self.bytes;
        self.count += 1;
        if !small && self.count >= MEASUREMENTS {
            self.bytes = self.least_bytes;
        } else {
            self.rate = self.rate.max(rate);
            let carried = per(self.rate, (2 * self.round_trip).min(WAIT_MAX), Duration::from_secs(1));
            self.bytes = carried.clamp(self.bytes, SEND_WINDOW_BYTES_MAX.max(self.bytes));
        }
        if self.count >= MEASUREMENTS {
            (self.count, self.rate) = (0, rate);
        }
        (self.bytes != before).then_some(self.bytes)
    }
}

/// As much in `time` as `bytes` in `took`.
fn per(bytes: u64, time: Duration, took: Duration) -> u64 {
    let scaled = u128::from(bytes).saturating_mul(time.as_nanos());
    u64::try_from(scaled / took.as_nanos().max(1)).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEAST: u64 = 2 << 20;
    const TICK: Duration = Duration::from_millis(250);
    const SECOND: Duration = Duration::from_secs(1);

    /// A way that carries so many bytes a second and takes so long there and back; what it cannot carry at once
    /// waits ahead of it.
    struct Way {
        rate: u64,
        round_trip: Duration,
        window: SendWindow,
        now: Instant,
        sent: u64,
    }

    impl Way {
        fn new(mib_s: u64, round_trip_ms: u64) -> Self {
            let now = Instant::now();
            let round_trip = Duration::from_millis(round_trip_ms);
            Self { rate: mib_s << 20, round_trip, window: SendWindow::new(LEAST, now), now, sent: 0 }
        }

        /// Some seconds in which there is always more to send, or none; the rate of the last tick, in MiB/s.
        fn run(&mut self, seconds: u32, busy: bool) -> u64 {
            let mut carried = 0;
            for _ in 0..4 * seconds {
                let full = Duration::from_nanos(self.window.bytes * 1_000_000_000 / self.rate);
                let round_trip = if busy { self.round_trip.max(full) } else { self.round_trip };
                carried = if busy { per(self.window.bytes, SECOND, round_trip) } else { 0 };
                self.sent += per(carried, TICK, SECOND);
                self.now += TICK;
                let _ = self.window.measure(self.now, round_trip, self.sent);
            }
            carried >> 20
        }
    }

    #[test]
    fn a_long_way_is_filled_within_seconds() {
        for (mib_s, round_trip_ms) in [(110, 20), (110, 100), (200, 100), (30, 300)] {
            let mut way = Way::new(mib_s, round_trip_ms);
            let filled = way.run(5, true);
            assert!(filled + 1 >= mib_s, "{filled} of {mib_s} MiB/s over {round_trip_ms} ms");
            assert!(way.window.bytes <= per(way.rate, way.round_trip, SECOND) * 21 / 10);
        }
    }

    #[test]
    fn on_a_short_way_the_window_stays_small_however_long_it_is_full() {
        for mib_s in [11, 110, 1100] {
            let mut way = Way::new(mib_s, 0);
            assert_eq!(way.run(4, false), 0);
            for _ in 0..20 {
                let _ = way.run(30, true);
                assert!(way.window.bytes <= 2 * LEAST, "{} bytes at {mib_s} MiB/s", way.window.bytes);
            }
        }
    }

    #[test]
    fn on_a_narrow_way_the_window_never_grows() {
        for (mib_s, round_trip_ms) in [(1, 0), (1, 200), (4, 20)] {
            let mut way = Way::new(mib_s, round_trip_ms);
            for _ in 0..200 {
                let _ = way.run(1, true);
                assert_eq!(way.window.bytes, LEAST, "{mib_s} MiB/s over {round_trip_ms} ms");
            }
        }
    }

    #[test]
    fn no_window_exceeds_the_largest() {
        let mut way = Way::new(4000, 200);
        let _ = way.run(55, true);
        assert!(way.window.bytes <= SEND_WINDOW_BYTES_MAX);
        assert!(way.window.bytes > SEND_WINDOW_BYTES_MAX / 2);
    }

    #[test]
    fn a_way_that_changes_is_measured_again() {
        let mut way = Way::new(110, 100);
        assert!(way.run(20, true) >= 109);
        way.round_trip = Duration::from_millis(1);
        let _ = way.run(30, true);
        assert!(way.window.bytes <= 2 * LEAST, "{} bytes where the way is short now", way.window.bytes);
        way.round_trip = Duration::from_millis(100);
        assert!(way.run(30, true) >= 109, "the way is long again");
        way.round_trip = Duration::from_millis(10);
        let _ = way.run(20, true);
        way.round_trip = Duration::from_millis(100);
        let _ = way.run(1, false);
        assert!(way.run(2, true) >= 109, "a pause shows at once that it has become longer");
        let grown = way.window.bytes;
        assert_eq!(way.run(5, false), 0);
        assert_eq!(way.window.bytes, grown, "a pause takes nothing away at once");
        let _ = way.run(30, false);
        assert_eq!(way.window.bytes, LEAST, "and after a longer one it is measured anew");
    }
}
