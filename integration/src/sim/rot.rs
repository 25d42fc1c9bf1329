//! A disk that does not keep what was written: bits flip at rest, writes land elsewhere or nowhere. One host
//! of a run has it. What it loses is as good as gone; what it shows must be right, or an error.

use vmfs_common::hash::block_digest;
use vmfs_common::policy::MemberRole;
use vmfs_common::{BLOCK_BYTES, BlockIndex};

use super::At;
use super::world::World;

/// Where bits are looked for.
const PAGE_BYTES: u64 = 4096;

impl World {
    /// Something happens on the bad disk.
    pub(crate) fn rot(&mut self) {
        let Some(at) = self.hosts.iter().position(|h| h.bad_disk) else { return };
        match self.rng.below(8) {
            0 => {
                let pages = 1 + self.rng.below(4);
                self.hosts[at].disk.misdirect_next_write(pages);
                self.note(|| format!("the next write of {at} lands {pages} pages further on"));
            }
            1 => {
                self.hosts[at].disk.lose_next_write();
                self.note(|| format!("the next write of {at} is lost"));
            }
            2 => {
                self.scrub(at);
            }
            _ => self.flip(at),
        }
    }

    pub(crate) fn flip(&mut self, at: At) {
        let files: Vec<(String, u64)> =
            self.hosts[at].disk.files().into_iter().filter(|(n, len)| *len > 0 && n != "lock").collect();
        if files.is_empty() {
            return;
        }
        let (name, len) = files[self.rng.index(files.len())].clone();
        // Most of a file was never written: some tries.
        for _ in 0..8 {
            let page = self.rng.below(len.div_ceil(PAGE_BYTES));
            let (offset, bit) = (page * PAGE_BYTES + self.rng.below(PAGE_BYTES), self.rng.index(8));
            let bit = u32::try_from(bit).expect("invariant: below eight");
            if self.hosts[at].disk.flip_bit(&name, offset, bit) {
                self.counts.rotten += 1;
                self.note(|| format!("bit {bit} of byte {offset} of {name} flips at {at}"));
                return;
            }
        }
    }

    /// As the engine's scrub and repair: damaged blocks are fetched from whoever has the right ones. False when
    /// damage is left.
    pub(crate) fn scrub(&mut self, at: At) -> bool {
        if !self.hosts[at].bad_disk {
            return true;
        }
        let Some(copy) = self.hosts[at].copy() else { return true };
        let store = copy.store.clone();
        if store.kind() == MemberRole::Witness || store.latched().is_some() {
            return store.latched().is_none();
        }
        let bad = match store.verify(&mut |_, _| {}) {
            Ok(report) => report.bad_blocks,
            Err(e) => {
                self.note(|| format!("{at} cannot scrub: {e}"));
                return false;
            }
        };
        let mut clean = true;
        for index in bad {
            let fixed = self.repair(at, index);
            self.counts.repaired += u64::from(fixed);
            clean &= fixed;
            self.note(|| format!("block {} of {at} is damaged, repaired: {fixed}", index.0));
        }
        clean
    }

    /// The operator replaces the bad disk.
    pub(crate) fn replace_disk(&mut self, at: At) {
        self.oracle.wiped = true;
        // With a bad disk, the members are those of the beginning.
        let members = self.hosts.len();
        let data = (0..members).filter(|x| *x != at && self.hosts[*x].role == MemberRole::Replica).count();
        self.oracle.bereft |= data < members.saturating_sub(1) / 2 + 1;
        self.wipe(at);
    }

    fn repair(&mut self, at: At, index: BlockIndex) -> bool {
        let Some(store) = self.hosts[at].copy().map(|c| c.store.clone()) else { return false };
        let Ok(digest) = store.view().digests(index, 1).map(|d| d[0]) else { return false };
        for peer in (0..self.hosts.len()).filter(|p| *p != at) {
            if self.net.session(at, peer).is_none() {
                continue;
            }
            let Some(theirs) = self.hosts[peer].copy().map(|c| c.store.clone()) else { continue };
            let mut block = vec![0u8; BLOCK_BYTES];
            if theirs.read(index, &mut block).is_ok() && block_digest(&block) == digest {
                return store.rewrite_block(index, &block).is_ok();
            }
        }
        false
    }
}
