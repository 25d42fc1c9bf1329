//! Recent updates of one image on their way to its members: what has just been appended is sent
//! from memory. Bounded; a member further behind is fed from the log.

use std::collections::VecDeque;

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

/// Consecutive updates, newest last, at most `bytes_max` of them (one is always kept).
#[derive(Debug)]
pub(crate) struct Ring {
    items: VecDeque<RingItem>,
    bytes: usize,
    bytes_max: usize,
}

impl Ring {
    pub(crate) const fn new(bytes_max: usize) -> Self {
        Self { items: VecDeque::new(), bytes: 0, bytes_max }
    }
    /// Adds the next update. A number that does not follow starts the ring over (roll-back, gap).
    pub(crate) fn push(&mut self, item: RingItem) {
        if self.items.back().is_some_and(|last| last.seq.next() != item.seq) {
            self.clear();
        }
        self.bytes += item.cost_bytes();
        self.items.push_back(item);
        while self.bytes > self.bytes_max && self.items.len() > 1 {
            let gone = self.items.pop_front().expect("invariant: more than one item");
            self.bytes -= gone.cost_bytes();
        }
    }
    pub(crate) fn clear(&mut self) {
        self.items.clear();
        self.bytes = 0;
    }
    /// Drops what every reader has passed.
    pub(crate) fn trim_below(&mut self, seq: Seq) {
        while self.items.front().is_some_and(|i| i.seq < seq) {
            let gone = self.items.pop_front().expect("invariant: there is a front");
            self.bytes -= gone.cost_bytes();
        }
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
        let mut ring = Ring::new(3000);
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
}
