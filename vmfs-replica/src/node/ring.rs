//! Recent updates of one image on their way to its members: what its owner has just appended is sent
//! from memory. Bounded over all images of a host; a member further behind is fed from the log.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use vmfs_common::Seq;
use vmfs_common::header::Update;

/// One update with its payload.
#[derive(Debug, Clone)]
pub(crate) struct RingItem {
    pub(crate) seq: Seq,
    pub(crate) header: Bytes,
    pub(crate) payload: Bytes,
}

impl RingItem {
    pub(crate) fn new(update: &Update, payload: Bytes) -> Self {
        Self { seq: update.header.seq, header: Bytes::from_owner(update.bytes.clone()), payload }
    }
    fn cost_bytes(&self) -> usize {
        self.header.len() + self.payload.len() + 128
    }
}

/// One image alone may have this part of the budget.
const IMAGE_PART: usize = 4;

/// What the rings of a host may hold together, and how many of them hold anything.
#[derive(Debug)]
pub(crate) struct RingBudget {
    bytes_max: usize,
    holders: AtomicUsize,
    held_bytes: AtomicUsize,
}

impl RingBudget {
    pub(crate) fn new(bytes_max: usize) -> Arc<Self> {
        Arc::new(Self { bytes_max, holders: AtomicUsize::new(0), held_bytes: AtomicUsize::new(0) })
    }
    /// What all rings hold together.
    pub(crate) fn held_bytes(&self) -> u64 {
        self.held_bytes.load(Ordering::Relaxed) as u64
    }
    /// What one ring may hold now. The more images write, the less each: a ring that was filled when there
    /// were fewer gives way at its next push or trim.
    fn share_bytes(&self) -> usize {
        self.bytes_max / self.holders.load(Ordering::Relaxed).max(IMAGE_PART)
    }
}

/// Consecutive updates, newest last, at most its share of the budget (one is always kept).
#[derive(Debug)]
pub(crate) struct Ring {
    items: VecDeque<RingItem>,
    bytes: usize,
    budget: Arc<RingBudget>,
}

impl Drop for Ring {
    fn drop(&mut self) {
        self.clear();
    }
}

impl Ring {
    pub(crate) const fn new(budget: Arc<RingBudget>) -> Self {
        Self { items: VecDeque::new(), bytes: 0, budget }
    }
    /// Adds the next update. A number that does not follow starts the ring over (roll-back, gap).
    pub(crate) fn push(&mut self, item: RingItem) {
        if self.items.back().is_some_and(|last| last.seq.next() != item.seq) {
            self.clear();
        }
        if self.items.is_empty() {
            self.budget.holders.fetch_add(1, Ordering::Relaxed);
        }
        self.bytes += item.cost_bytes();
        self.budget.held_bytes.fetch_add(item.cost_bytes(), Ordering::Relaxed);
        self.items.push_back(item);
        self.keep_to_share();
    }
    fn keep_to_share(&mut self) {
        let share_bytes = self.budget.share_bytes();
        while self.bytes > share_bytes && self.items.len() > 1 {
            self.pop_oldest();
        }
    }
    fn pop_oldest(&mut self) {
        if let Some(gone) = self.items.pop_front() {
            self.bytes -= gone.cost_bytes();
            self.budget.held_bytes.fetch_sub(gone.cost_bytes(), Ordering::Relaxed);
            if self.items.is_empty() {
                self.budget.holders.fetch_sub(1, Ordering::Relaxed);
                // The room for a hundred thousand small updates is not kept for an image at rest.
                self.items = VecDeque::new();
            }
        }
    }
    pub(crate) fn clear(&mut self) {
        while !self.items.is_empty() {
            self.pop_oldest();
        }
    }
    /// Drops what every reader has passed, and what is more than its share.
    pub(crate) fn trim_below(&mut self, seq: Seq) {
        while self.items.front().is_some_and(|i| i.seq < seq) {
            self.pop_oldest();
        }
        self.keep_to_share();
    }
    /// The updates from `from` on, about `bytes_max` of them; `None` when the ring does not hold `from`.
    pub(crate) fn from(&self, from: Seq, bytes_max: usize) -> Option<Vec<RingItem>> {
        let first = self.items.front()?.seq;
        let skip = usize::try_from(from.0.checked_sub(first.0)?).ok()?;
        if skip >= self.items.len() {
            return None;
        }
        let mut bytes = 0;
        let fits = |i: &&RingItem| {
            let go_on = bytes < bytes_max;
            bytes += i.cost_bytes();
            go_on
        };
        Some(self.items.iter().skip(skip).take_while(fits).cloned().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn item(seq: u64) -> RingItem {
        RingItem { seq: Seq(seq), header: Bytes::from(vec![0; 72]), payload: Bytes::from(vec![0; 800]) }
    }

    #[test]
    fn a_ring_keeps_the_newest_and_starts_over_at_a_gap() {
        let mut ring = Ring::new(RingBudget::new(3000 * IMAGE_PART));
        (1..=10).for_each(|n| ring.push(item(n)));
        assert!(ring.from(Seq(7), 1 << 20).is_none());
        let seqs = |r: Option<Vec<RingItem>>| r.map(|v| v.iter().map(|i| i.seq.0).collect::<Vec<_>>());
        assert_eq!(seqs(ring.from(Seq(8), 1 << 20)), Some(vec![8, 9, 10]));
        assert_eq!(seqs(ring.from(Seq(9), 1)), Some(vec![9]));
        assert!(ring.from(Seq(11), 1).is_none());
        ring.trim_below(Seq(10));
        assert_eq!(seqs(ring.from(Seq(10), 1 << 20)), Some(vec![10]));
        ring.push(item(20));
        assert_eq!(seqs(ring.from(Seq(20), 1 << 20)), Some(vec![20]));
        assert!(ring.from(Seq(10), 1 << 20).is_none());
    }
    #[test]
    fn many_rings_together_keep_to_the_budget() {
        let budget = RingBudget::new(64_000);
        let mut rings: Vec<_> = (0..16).map(|_| Ring::new(budget.clone())).collect();
        // One that filled its share while it was alone, and whose members have been away since.
        (1..=100).for_each(|n| rings[0].push(item(n)));
        assert_eq!(rings[0].bytes, 16_000);
        for ring in &mut rings[1..] {
            (1..=100).for_each(|n| ring.push(item(n)));
        }
        // As each image's slow tick does.
        rings.iter_mut().for_each(|r| r.trim_below(Seq(1)));
        let together: usize = rings.iter().map(|r| r.bytes).sum();
        assert!(together <= 64_000, "{together} bytes");
        assert!(rings.iter().all(|r| r.items.len() == 4 && r.bytes == 4 * 1000), "an equal share for each");
        // Those at rest leave their share to the others.
        rings.truncate(2);
        rings[1].trim_below(Seq(101));
        assert_eq!(budget.holders.load(Ordering::Relaxed), 1);
        (101..=200).for_each(|n| rings[0].push(item(n)));
        assert_eq!(rings[0].bytes, 16_000);
        drop(rings);
        assert_eq!(budget.holders.load(Ordering::Relaxed), 0);
    }
}
