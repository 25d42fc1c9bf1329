//! How far two copies agree, from their epoch marks alone.

use vmfs_common::Seq;
use vmfs_common::ids::Head;
use vmfs_common::msg::{EpochMark, Join, MARKS_MAX};
use vmfs_common::state::ImageState;

/// The last seq up to which a copy that states `join` holds `chain`; `None` when its history and
/// the chain's cannot be brought together from what both remember.
///
/// An epoch has one owner and one order of updates, so two copies that hold the same epoch agree up
/// to where the shorter of them leaves it. A copy whose last epoch the chain does not contain is
/// looked at below that epoch.
pub(crate) fn common(chain: &ImageState, join: &Join) -> Option<Seq> {
    let mut head = join.head;
    // No copy states more marks; each is looked up among all.
    if join.marks.len() > MARKS_MAX {
        return None;
    }
    for _ in 0..=join.marks.len() {
        if head.seq == Seq::ZERO {
            return Some(Seq::ZERO);
        }
        let mark = join.marks.iter().find(|m| m.start.epoch == head.epoch);
        if let Some(i) = chain.epochs.iter().position(|e| e.epoch == head.epoch) {
            if mark.is_some_and(|m| m.start != chain.epochs[i].start) {
                return None;
            }
            let end = chain.epochs.get(i + 1).map_or(chain.head().seq, |next| next.parent.seq);
            return Some(head.seq.min(end));
        }
        head = mark?.parent;
    }
    None
}

/// The latest epochs of a copy, newest first.
pub(crate) fn marks(state: &ImageState) -> Vec<EpochMark> {
    state
        .epochs
        .iter()
        .rev()
        .take(MARKS_MAX)
        .map(|e| EpochMark { start: e.start, parent: e.parent })
        .collect()
}

/// True when `head` lies in `parent`'s epoch at or below it: certainly part of what `parent` ends.
pub(crate) fn is_prefix_of(head: &Head, parent: &Head) -> bool {
    head.seq == Seq::ZERO || head == parent || (head.epoch == parent.epoch && head.seq < parent.seq)
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmfs_common::state::EpochEntry;
    use vmfs_common::{Digest, Epoch, HostId, StoreId};

    fn head(epoch: u64, seq: u64) -> Head {
        let byte = |n| u8::try_from(n).unwrap();
        let digest = [byte(epoch), byte(seq)];
        let mut d = [0; 32];
        d[..2].copy_from_slice(&digest);
        Head {
            epoch: Epoch { number: epoch, host: HostId::from_bytes([1; 16]) },
            seq: Seq(seq),
            digest: Digest::from_bytes(d),
        }
    }
    fn chain(entries: &[(Head, Head)], tip: Head) -> ImageState {
        let entry = |(start, parent): &(Head, Head)| EpochEntry {
            epoch: start.epoch,
            start: *start,
            parent: *parent,
        };
        let mut s = ImageState { epochs: entries.iter().map(entry).collect(), ..ImageState::default() };
        s.tip.head = tip;
        s
    }
    fn join(entries: &[(Head, Head)], tip: Head) -> Join {
        let s = chain(entries, tip);
        Join { store: StoreId::default(), head: tip, durable: tip, marks: marks(&s), witness: false }
    }

    #[test]
    fn the_common_point_is_found_below_epochs_the_chain_does_not_contain() {
        let zero = Head::default();
        // The chain: epoch 1 up to 59, epoch 3 from 60 on.
        let ours = chain(&[(head(1, 1), zero), (head(3, 60), head(1, 59))], head(3, 80));
        let first = (head(1, 1), zero);
        assert_eq!(common(&ours, &join(&[], zero)), Some(Seq(0)));
        assert_eq!(common(&ours, &join(&[first], head(1, 40))), Some(Seq(40)));
        assert_eq!(common(&ours, &join(&[first], head(1, 70))), Some(Seq(59)), "a longer old epoch");
        assert_eq!(common(&ours, &join(&[first, (head(3, 60), head(1, 59))], head(3, 75))), Some(Seq(75)));
        assert_eq!(common(&ours, &join(&[first, (head(2, 50), head(1, 49))], head(2, 90))), Some(Seq(49)));
        assert_eq!(common(&ours, &join(&[first, (head(2, 70), head(1, 69))], head(2, 90))), Some(Seq(59)));
        assert_eq!(common(&ours, &join(&[(head(1, 2), zero)], head(1, 40))), None, "another genesis");
        assert_eq!(common(&ours, &join(&[], head(9, 40))), None, "no marks");
    }
}
