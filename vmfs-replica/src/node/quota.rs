//! How much of this host one peer can occupy with what it sends. Every peer has a certificate of the
//! datastore, and still none may stop the images of the others: whatever one sends, at most half of the
//! cores work on its frames, few of its questions are answered at a time, and what leads to nothing is
//! read more slowly than it costs.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, SemaphorePermit};
use vmfs_common::HostId;

/// Questions of one peer that are worked on at a time.
const ANSWERS_MAX: usize = 4;
/// Frames that led to nothing may take one in this many parts of the time, on each stream.
const IDLE_SHARE: u32 = 4;
/// What a message of a host that is no member costs at least: so it is heard 50 times a second.
const STRANGER_COST: Duration = Duration::from_millis(5);
/// As much is free at once.
const FREE: Duration = Duration::from_millis(50);

/// One peer's.
#[derive(Debug)]
pub(super) struct Quota {
    frames: Semaphore,
    answers: Arc<Semaphore>,
}

impl Quota {
    fn new() -> Self {
        let cores = std::thread::available_parallelism().map_or(2, usize::from);
        Self { frames: Semaphore::new((cores / 2).max(1)), answers: Arc::new(Semaphore::new(ANSWERS_MAX)) }
    }
    /// The right to have a frame worked on.
    pub(super) async fn turn(&self) -> SemaphorePermit<'_> {
        self.frames.acquire().await.expect("invariant: never closed")
    }
    /// The right to have a question worked on.
    pub(super) async fn answer(&self) -> OwnedSemaphorePermit {
        Arc::clone(&self.answers).acquire_owned().await.expect("invariant: never closed")
    }
}

/// Everybody's; as many as there are hosts in the datastore.
#[derive(Debug, Default)]
pub(super) struct Quotas(Mutex<HashMap<HostId, Arc<Quota>>>);

impl Quotas {
    pub(super) fn of(&self, host: HostId) -> Arc<Quota> {
        Arc::clone(self.0.lock().entry(host).or_insert_with(|| Arc::new(Quota::new())))
    }
}

/// The processor's time that this thread has had. What a peer is charged is what its frames cost, and not how
/// long they waited for the image's lock while this host was busy with something else, such as taking over
/// blocks that it has copied: an owner was not heard for minutes for the seconds that this had lasted.
pub(super) fn cpu_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is to a timespec of ours; the clock is always there.
    let got = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    assert_eq!(got, 0, "invariant: every thread has its clock");
    let (s, ns) = (u64::try_from(time.tv_sec), u32::try_from(time.tv_nsec));
    Duration::new(s.unwrap_or(0), ns.unwrap_or(0))
}

/// Frames that led to nothing, and the processor's time they took.
#[derive(Debug, Default)]
pub(super) struct Wasted {
    pub(super) frames: u32,
    spent: Duration,
    /// Of acknowledgements, and of what asks for them: with members that is what a flush is made of.
    routine: Duration,
}

impl Wasted {
    pub(super) fn add(&mut self, frames: usize, spent: Duration, routine: bool) {
        self.frames = self.frames.saturating_add(u32::try_from(frames).unwrap_or(u32::MAX));
        *if routine { &mut self.routine } else { &mut self.spent } += spent;
    }
}

/// Slows the reading of one stream down by what its frames cost that led to nothing.
#[derive(Debug)]
pub(super) struct Pace {
    /// When all that was charged will have been paid for.
    paid_at: Instant,
}

impl Pace {
    pub(super) fn new() -> Self {
        Self { paid_at: Instant::now() }
    }
    pub(super) async fn charge(&mut self, wasted: Wasted, stranger: bool) {
        let strangers = || (wasted.spent + wasted.routine).max(STRANGER_COST.saturating_mul(wasted.frames));
        let cost = if stranger { strangers() } else { wasted.spent };
        let now = Instant::now();
        self.paid_at = self.paid_at.max(now) + cost * IDLE_SHARE;
        let debt = self.paid_at.duration_since(now);
        if debt > FREE {
            tokio::time::sleep(debt - FREE).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wasted(frames: usize, us: u64, routine: bool) -> Wasted {
        let mut wasted = Wasted::default();
        wasted.add(frames, Duration::from_micros(us), routine);
        wasted
    }

    #[test]
    fn waiting_costs_nothing_and_work_does() {
        let began = cpu_time();
        std::thread::sleep(Duration::from_millis(100));
        assert!(cpu_time() - began < Duration::from_millis(50));
        let worked = Instant::now();
        while cpu_time() - began < Duration::from_millis(60) {
            assert!(worked.elapsed() < Duration::from_secs(60), "work is not counted");
        }
    }

    #[tokio::test]
    async fn a_members_acknowledgements_are_free_and_a_strangers_are_not() {
        let (mut member, mut stranger) = (Pace::new(), Pace::new());
        let begun = Instant::now();
        member.charge(wasted(1, 10_000_000, true), false).await;
        assert!(begun.elapsed() < Duration::from_secs(5), "as if it had led to nothing");
        stranger.charge(wasted(1, 100_000, true), true).await;
        assert!(begun.elapsed() >= Duration::from_millis(300), "{:?}", begun.elapsed());
    }

    #[tokio::test]
    async fn a_stranger_is_heard_fifty_times_a_second_and_a_member_as_often_as_it_is_cheap() {
        let (mut stranger, mut member) = (Pace::new(), Pace::new());
        let begun = Instant::now();
        for _ in 0..1000 {
            member.charge(wasted(1, 10, false), false).await;
        }
        assert_eq!(member.paid_at.max(begun), member.paid_at);
        assert!(member.paid_at <= Instant::now() + FREE, "a member never waits for more than it has cost");
        let begun = Instant::now();
        for frames in [1, 9, 10] {
            stranger.charge(wasted(frames, 0, true), true).await;
        }
        // 20 messages, 20 ms each, the first 50 ms free.
        assert!(begun.elapsed() >= Duration::from_millis(340), "{:?}", begun.elapsed());
    }
}
