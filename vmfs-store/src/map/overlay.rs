//! Map changes in memory: a radix tree of fan-out 16 with shared, copy-on-write nodes, in which a
//! whole subtree may be one entry. Cloning is O(1).

use std::sync::Arc;

use super::{BLOCKS_MAX, Entry};

const BITS: u32 = 4;
const FANOUT: usize = 1 << BITS;
/// Approximate bytes of one node.
const NODE_BYTES: usize = 16 * FANOUT + 16;

#[derive(Clone)]
enum Node {
    Uniform(Entry),
    Leaf(Arc<[Entry; FANOUT]>),
    Inner(Arc<[Node; FANOUT]>),
}

impl Node {
    const UNSET: Self = Self::Uniform(Entry::UNSET);

    fn leaf_mut(&mut self, bytes: &mut usize) -> &mut [Entry; FANOUT] {
        if let Self::Uniform(e) = *self {
            *self = Self::Leaf(Arc::new([e; FANOUT]));
            *bytes += NODE_BYTES / 2;
        }
        match self {
            Self::Leaf(l) => Arc::make_mut(l),
            _ => unreachable!("invariant: leaves are at level 0"),
        }
    }
    fn inner_mut(&mut self, bytes: &mut usize) -> &mut [Self; FANOUT] {
        if let Self::Uniform(e) = *self {
            *self = Self::Inner(Arc::new([const { Self::UNSET }; FANOUT].map(|_| Self::Uniform(e))));
            *bytes += NODE_BYTES;
        }
        match self {
            Self::Inner(i) => Arc::make_mut(i),
            _ => unreachable!("invariant: inner nodes are above level 0"),
        }
    }
}

/// Blocks below a node of `level` (0 = leaf).
const fn span(level: u32) -> u64 {
    1 << (BITS * (level + 1))
}

/// Which child of a node of `level` block `at` is in.
fn child(level: u32, at: u64) -> usize {
    usize::try_from(at >> (BITS * level)).unwrap_or(usize::MAX) % FANOUT
}

/// Recent map changes.
#[derive(Clone)]
pub(crate) struct Overlay {
    root: Node,
    level: u32,
    bytes: usize,
}

impl Default for Overlay {
    fn default() -> Self {
        Self { root: Node::UNSET, level: 0, bytes: 0 }
    }
}

impl Overlay {
    /// True when nothing was ever set.
    pub(crate) fn is_empty(&self) -> bool {
        matches!(self.root, Node::Uniform(Entry::UNSET))
    }
    /// Approximate memory taken.
    pub(crate) const fn bytes(&self) -> usize {
        self.bytes
    }
    fn grow_to(&mut self, end: u64) {
        while span(self.level) < end {
            self.level += 1;
            if self.is_empty() {
                continue;
            }
            let old = std::mem::replace(&mut self.root, Node::UNSET);
            self.root.inner_mut(&mut self.bytes)[0] = old;
        }
    }
    /// Sets consecutive blocks.
    pub(crate) fn set_each(&mut self, start: u64, entries: &[Entry]) {
        if entries.is_empty() {
            return;
        }
        debug_assert!(start + entries.len() as u64 <= BLOCKS_MAX);
        self.grow_to(start + entries.len() as u64);
        let Self { root, level, bytes } = self;
        let mut done = 0;
        while done < entries.len() {
            let at = start + done as u64;
            let mut node = &mut *root;
            for l in (1..=*level).rev() {
                node = &mut node.inner_mut(bytes)[child(l, at)];
            }
            let first = child(0, at);
            let n = (FANOUT - first).min(entries.len() - done);
            node.leaf_mut(bytes)[first..first + n].copy_from_slice(&entries[done..done + n]);
            done += n;
        }
    }
    /// Sets a range to one special entry.
    pub(crate) fn set_range(&mut self, range: std::ops::Range<u64>, entry: Entry) {
        if range.is_empty() {
            return;
        }
        self.grow_to(range.end);
        set_range(&mut self.root, self.level, 0, &range, entry, &mut self.bytes);
    }
    /// Fills in what is still [`Entry::UNSET`] in `out`.
    pub(crate) fn fill(&self, start: u64, out: &mut [Entry]) {
        if self.is_empty() {
            return;
        }
        let mut done = 0;
        while done < out.len() {
            let at = start + done as u64;
            if at >= span(self.level) {
                return;
            }
            let (node, level) = self.descend(at);
            let left = span(level) - at % span(level);
            let n = usize::try_from(left).unwrap_or(usize::MAX).min(out.len() - done);
            let piece = &mut out[done..done + n];
            match node {
                Node::Uniform(Entry::UNSET) => {}
                Node::Uniform(e) => piece.iter_mut().filter(|o| **o == Entry::UNSET).for_each(|o| *o = *e),
                Node::Leaf(l) => {
                    let first = child(0, at);
                    for (o, e) in piece.iter_mut().zip(&l[first..]) {
                        if *o == Entry::UNSET {
                            *o = *e;
                        }
                    }
                }
                Node::Inner(_) => unreachable!("invariant: descend ends at a leaf or a uniform node"),
            }
            done += n;
        }
    }
    /// The leaf or uniform node that covers `at`, and its level.
    fn descend(&self, at: u64) -> (&Node, u32) {
        let (mut node, mut level) = (&self.root, self.level);
        while let Node::Inner(i) = node {
            node = &i[child(level, at)];
            level -= 1;
        }
        (node, level)
    }
    /// The special entry that all blocks from `at` have for at least the returned length, if they do.
    pub(crate) fn uniform(&self, at: u64) -> (Option<Entry>, u64) {
        if self.is_empty() {
            return (Some(Entry::UNSET), u64::MAX - at);
        }
        if at >= span(self.level) {
            return (Some(Entry::UNSET), u64::MAX - at);
        }
        let (node, level) = self.descend(at);
        let left = span(level) - at % span(level);
        match node {
            Node::Uniform(e) => (Some(*e), left),
            _ => (None, left),
        }
    }
    /// True when some block of the range is set.
    pub(crate) fn touches(&self, range: &std::ops::Range<u64>) -> bool {
        let mut at = range.start;
        while at < range.end {
            match self.uniform(at) {
                (Some(Entry::UNSET), len) => at = at.saturating_add(len),
                _ => return true,
            }
        }
        false
    }
}

fn set_range(
    node: &mut Node,
    level: u32,
    base: u64,
    range: &std::ops::Range<u64>,
    entry: Entry,
    bytes: &mut usize,
) {
    let end = base + span(level);
    if range.start <= base && end <= range.end {
        *node = Node::Uniform(entry);
        return;
    }
    let step = span(level) / FANOUT as u64;
    for i in 0..FANOUT {
        let from = base + i as u64 * step;
        if range.start >= from + step || range.end <= from {
            continue;
        }
        if level == 0 {
            node.leaf_mut(bytes)[i] = entry;
        } else {
            set_range(&mut node.inner_mut(bytes)[i], level - 1, from, range, entry, bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn behaves_like_an_array(ops in proptest::collection::vec((0u64..5000, 1u64..900, 0u64..6), 1..60)) {
            let mut overlay = Overlay::default();
            let mut model = vec![Entry::UNSET; 6000];
            let mut snapshots = Vec::new();
            for (start, len, what) in ops {
                let range = start..start + len;
                let at = usize::try_from(start).unwrap()..usize::try_from(start + len).unwrap();
                match what {
                    0 | 1 => {
                        overlay.set_range(range, Entry(what));
                        model[at].fill(Entry(what));
                    }
                    2 => {
                        overlay.set_each(start, &[Entry(7 << 24)]);
                        model[at.start] = Entry(7 << 24);
                    }
                    3 => snapshots.push((overlay.clone(), model.clone())),
                    _ => {
                        let entries: Vec<_> = (0..len).map(|i| Entry((start + i + 1) << 24)).collect();
                        overlay.set_each(start, &entries);
                        model[at].copy_from_slice(&entries);
                    }
                }
                snapshots.truncate(4);
            }
            snapshots.push((overlay, model));
            for (overlay, model) in snapshots {
                let mut out = vec![Entry::UNSET; 6000];
                overlay.fill(0, &mut out);
                prop_assert_eq!(&out, &model);
                let mut at = 0usize;
                while at < 6000 {
                    let (entry, len) = overlay.uniform(at as u64);
                    let end = at.saturating_add(usize::try_from(len).unwrap()).min(6000);
                    if let Some(e) = entry {
                        prop_assert!(model[at..end].iter().all(|m| *m == e));
                    }
                    at = end;
                }
                for (i, window) in model.chunks(97).enumerate() {
                    let start = i as u64 * 97;
                    let set = window.iter().any(|e| *e != Entry::UNSET);
                    // May say "set" for a leaf without set blocks in the window, never the reverse.
                    prop_assert!(overlay.touches(&(start..start + window.len() as u64)) || !set);
                }
            }
        }
    }
}
