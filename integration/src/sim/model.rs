//! What every update was meant to do, as the guests asked for it: a tree of all updates that any owner
//! ever made, with the content after each. Knows nothing of headers, logs or maps.

use std::collections::{HashMap, HashSet};
use std::rc::Rc;

use vmfs_common::policy::{Acks, OnQuorumLoss};
use vmfs_common::{BLOCK_BYTES, BLOCK_BYTES_U64, Digest, Epoch, Head};

use super::check::Check;

/// Blocks of the simulated image.
pub(crate) const BLOCKS: usize = 160;
/// Where in the image they are: across the border between two leaves of the block map, so that it has two levels.
pub(crate) const FIRST_BLOCK: u64 = 512 - BLOCKS as u64 / 2;

/// The size of an image whose last block in use is number `blocks` of the model's.
pub(crate) const fn size_bytes(blocks: usize) -> u64 {
    if blocks == 0 { 0 } else { (FIRST_BLOCK + blocks as u64) * BLOCK_BYTES_U64 }
}
/// Content is remembered at every so many updates.
const SNAPSHOT_EVERY: u64 = 32;

/// An update of the model.
pub(crate) type Ix = usize;

/// Content: what each block was last filled with; zero is zeros.
pub(crate) type Fills = Vec<u32>;

/// What an update does to the content.
#[derive(Debug, Clone)]
pub(crate) enum Effect {
    /// Nothing.
    None,
    /// Writes blocks from `start`, and the image is at least so many blocks long.
    Write { start: usize, fills: Fills },
    /// Zeros.
    Zero { start: usize, count: usize },
    /// The image is so many blocks long.
    Resize { blocks: usize },
}

#[derive(Debug, Clone)]
pub(crate) struct Node {
    pub(crate) head: Head,
    pub(crate) parent: Ix,
    jump: Ix,
    effect: Effect,
    /// Separate lineages begun up to here.
    pub(crate) forced: u32,
    /// Length in blocks after it.
    pub(crate) blocks: usize,
    /// As its header says, nanoseconds.
    pub(crate) time_ns: u64,
    content: Option<Rc<Fills>>,
}

/// All updates ever made.
#[derive(Debug)]
pub(crate) struct Model {
    nodes: Vec<Node>,
    by_digest: HashMap<Digest, Ix>,
    /// Updates that something was put on, and the epochs of what was.
    succeeded: HashSet<(Digest, Epoch)>,
}

/// The bytes of a block.
pub(crate) fn block_bytes(fill: u32, index: usize, out: &mut [u8]) {
    if fill == 0 {
        out.fill(0);
        return;
    }
    let word = (u64::from(fill) << 32 | index as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    for (i, chunk) in out.chunks_exact_mut(8).enumerate() {
        chunk.copy_from_slice(&(word ^ i as u64).to_le_bytes());
    }
}

/// True when flushes under this policy may be lost with one host.
pub(crate) fn is_lax(acks: Acks, loss: OnQuorumLoss, members: usize) -> bool {
    acks == Acks::Local || (loss == OnQuorumLoss::Degrade && members == 2)
}

impl Model {
    pub(crate) fn new() -> Self {
        let root = Node {
            head: Head::default(),
            parent: 0,
            jump: 0,
            effect: Effect::None,
            forced: 0,
            blocks: 0,
            time_ns: 0,
            content: Some(Rc::new(vec![0; BLOCKS])),
        };
        let by_digest = HashMap::from([(Digest::default(), 0)]);
        Self { nodes: vec![root], by_digest, succeeded: HashSet::new() }
    }
    pub(crate) fn node(&self, ix: Ix) -> &Node {
        &self.nodes[ix]
    }
    pub(crate) fn updates(&self) -> usize {
        self.nodes.len() - 1
    }
    /// The update that a copy's head names; `None`: nobody ever made it.
    pub(crate) fn find(&self, head: Head) -> Option<Ix> {
        self.by_digest.get(&head.digest).copied().filter(|ix| self.nodes[*ix].head == head)
    }
    /// True when an update of this epoch was put on `parent`.
    pub(crate) fn has_successor(&self, parent: Digest, epoch: Epoch) -> bool {
        self.succeeded.contains(&(parent, epoch))
    }
    /// An owner has made an update.
    pub(crate) fn add(
        &mut self,
        head: Head,
        parent: Digest,
        effect: Effect,
        time_ns: u64,
        forced: bool,
    ) -> Result<Ix, (Check, String)> {
        let Some(parent) = self.by_digest.get(&parent).copied() else {
            let what = format!("an owner has put {head:?} on an update that nobody made");
            return Err((Check::MadeOnKnown, what));
        };
        let p = &self.nodes[parent];
        if head.seq != p.head.seq.next() || head.epoch < p.head.epoch {
            return Err((Check::MadeInOrder, format!("{head:?} cannot follow {:?}", p.head)));
        }
        let (pj, pjj) = (p.jump, self.nodes[p.jump].jump);
        let depth = |i: Ix| self.nodes[i].head.seq.0;
        let jump = if depth(parent) - depth(pj) == depth(pj) - depth(pjj) { pjj } else { parent };
        let blocks = match &effect {
            Effect::None => p.blocks,
            Effect::Write { start, fills } => p.blocks.max(start + fills.len()),
            Effect::Zero { start, count } => p.blocks.max(start + count),
            Effect::Resize { blocks } => *blocks,
        };
        let forced = p.forced + u32::from(forced);
        let ix = self.nodes.len();
        if self.by_digest.contains_key(&head.digest) {
            return Err((Check::MadeOnce, format!("{head:?} was made twice")));
        }
        self.by_digest.insert(head.digest, ix);
        self.succeeded.insert((self.nodes[parent].head.digest, head.epoch));
        self.nodes.push(Node { head, parent, jump, effect, forced, blocks, time_ns, content: None });
        if head.seq.0.is_multiple_of(SNAPSHOT_EVERY) {
            self.nodes[ix].content = Some(self.content(ix));
        }
        Ok(ix)
    }
    /// The content after an update.
    pub(crate) fn content(&self, ix: Ix) -> Rc<Fills> {
        let mut path = Vec::new();
        let mut at = ix;
        let base = loop {
            if let Some(c) = &self.nodes[at].content {
                break c.clone();
            }
            path.push(at);
            at = self.nodes[at].parent;
        };
        if path.is_empty() {
            return base;
        }
        let mut fills = (*base).clone();
        for at in path.into_iter().rev() {
            match &self.nodes[at].effect {
                Effect::None => {}
                Effect::Write { start, fills: new } => fills[*start..start + new.len()].copy_from_slice(new),
                Effect::Zero { start, count } => fills[*start..start + count].fill(0),
                Effect::Resize { blocks } => fills[*blocks..].fill(0),
            }
        }
        Rc::new(fills)
    }
    /// Compares bytes read from `first` on with the content after an update.
    pub(crate) fn check(&self, ix: Ix, first: usize, bytes: &[u8]) -> Result<(), String> {
        let content = self.content(ix);
        let mut want = [0u8; BLOCK_BYTES];
        for (i, got) in bytes.chunks_exact(BLOCK_BYTES).enumerate() {
            block_bytes(content[first + i], first + i, &mut want);
            if got != want {
                let head = self.nodes[ix].head;
                return Err(format!(
                    "block {} is not what it was after update {} of epoch {} (fill {})",
                    first + i,
                    head.seq,
                    head.epoch,
                    content[first + i]
                ));
            }
        }
        Ok(())
    }
    pub(crate) fn ancestor_at(&self, ix: Ix, seq: u64) -> Ix {
        let depth = |i: Ix| self.nodes[i].head.seq.0;
        let mut at = ix;
        while depth(at) > seq {
            at = if depth(self.nodes[at].jump) >= seq { self.nodes[at].jump } else { self.nodes[at].parent };
        }
        at
    }
    /// True when the chain that ends with `of` contains `ix`.
    pub(crate) fn contains(&self, of: Ix, ix: Ix) -> bool {
        let seq = self.nodes[ix].head.seq.0;
        self.nodes[of].head.seq.0 >= seq && self.ancestor_at(of, seq) == ix
    }
    /// The last update that two chains share.
    pub(crate) fn common(&self, a: Ix, b: Ix) -> Ix {
        let depth = |i: Ix| self.nodes[i].head.seq.0;
        let seq = depth(a).min(depth(b));
        let (mut a, mut b) = (self.ancestor_at(a, seq), self.ancestor_at(b, seq));
        while a != b {
            if self.nodes[a].jump == self.nodes[b].jump {
                (a, b) = (self.nodes[a].parent, self.nodes[b].parent);
            } else {
                (a, b) = (self.nodes[a].jump, self.nodes[b].jump);
            }
        }
        a
    }
    /// The last update of the epoch before that of an update.
    pub(crate) fn end_of_previous(&self, ix: Ix) -> Ix {
        let epoch = self.nodes[ix].head.epoch;
        let mut at = ix;
        while at != 0 && self.nodes[at].head.epoch == epoch {
            at = self.nodes[at].parent;
        }
        at
    }
    /// True when an operator's force lies between two chains: neither owes the other anything.
    pub(crate) fn split_by_force(&self, a: Ix, b: Ix) -> bool {
        let at = self.nodes[self.common(a, b)].forced;
        self.nodes[a].forced > at || self.nodes[b].forced > at
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmfs_common::Seq;

    fn head(seq: u64, branch: u8) -> Head {
        let mut d = [branch; 32];
        d[..8].copy_from_slice(&seq.to_le_bytes());
        Head { epoch: Epoch { number: 1, ..Epoch::default() }, seq: Seq(seq), digest: Digest::from_bytes(d) }
    }

    #[test]
    fn ancestors_and_content_are_found_across_branches() {
        let mut m = Model::new();
        let mut parent = Digest::default();
        for seq in 1..=100 {
            let effect = Effect::Write { start: 0, fills: vec![u32::try_from(seq).unwrap()] };
            m.add(head(seq, 1), parent, effect, seq, false).unwrap();
            parent = head(seq, 1).digest;
        }
        let mut parent = head(40, 1).digest;
        for seq in 41..=90 {
            m.add(head(seq, 2), parent, Effect::Zero { start: 0, count: 1 }, seq, seq == 50).unwrap();
            parent = head(seq, 2).digest;
        }
        let at = |seq, branch| m.find(head(seq, branch)).unwrap();
        assert_eq!(m.common(at(100, 1), at(90, 2)), at(40, 1));
        assert!(m.contains(at(90, 2), at(17, 1)) && !m.contains(at(90, 2), at(41, 1)));
        assert!(m.split_by_force(at(100, 1), at(50, 2)) && !m.split_by_force(at(100, 1), at(49, 2)));
        assert_eq!(m.content(at(77, 1))[0], 77);
        assert_eq!(m.content(at(77, 2))[0], 0);
        // What is refused leaves nothing behind.
        let before = (m.updates(), m.find(head(77, 1)));
        assert!(m.add(head(7, 9), head(3, 1).digest, Effect::None, 0, false).is_err());
        assert!(m.add(head(77, 1), head(76, 1).digest, Effect::None, 0, false).is_err());
        assert_eq!((m.updates(), m.find(head(77, 1))), before);
    }
}
