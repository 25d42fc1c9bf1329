//! A disk that does not keep what was written: bits flip at rest, writes land elsewhere or nowhere. One host
//! of a run has it. What it loses is as good as gone; what it shows must be right, or an error.

use vmfs_common::BLOCK_BYTES;
use vmfs_common::hash::block_digest;
use vmfs_common::policy::MemberRole;
use vmfs_store::{BadPayload, Scrub, StoreError};

use super::At;
use super::broken::Broken;
use super::check::Check;
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

    /// A whole scrub on the host with the bad disk. False when damage is left.
    pub(crate) fn scrub(&mut self, at: At) -> bool {
        if !self.hosts[at].bad_disk {
            return true;
        }
        let Some(copy) = self.hosts[at].copy() else { return true };
        let store = copy.store.clone();
        // Else a repair does damage elsewhere, perhaps behind the scrub.
        let true_writes = !self.hosts[at].disk.has_bad_write_ahead();
        let step = self.begin_scrub(at).and_then(|mut scrub| self.scrub_step(at, &mut scrub, u64::MAX));
        let whole = match step {
            Ok(step) => step.left == 0,
            Err(e) => {
                self.note(|| format!("{at} cannot scrub: {e}"));
                return false;
            }
        };
        // Damage to what describes the payload hides it; it is reported by itself.
        let of_payload = |what: &String| what.starts_with("block ") || what.starts_with("payload ");
        let described = store.rot().open.iter().all(of_payload);
        // What a scrub did not find, or has not repaired, nobody will.
        match store.verify(&mut |_, _| {}) {
            Ok(report)
                if whole
                    && true_writes
                    && described
                    && report.bad_blocks.len() + report.bad_updates.len() > 0 =>
            {
                self.fail(Check::ScrubFinds, format!("after a scrub of host {at}: {report:?}"));
                false
            }
            Ok(report) => report.bad_blocks.is_empty(),
            Err(e) => {
                self.note(|| format!("{at} cannot be verified: {e}"));
                false
            }
        }
    }

    /// Looks at what all images share, and begins a scrub of the image.
    fn begin_scrub(&self, at: At) -> Result<Scrub, StoreError> {
        let running = self.hosts[at].running.as_ref().expect("invariant: it is up");
        running.store.scrub_shared()?;
        let copy = running.copy.as_ref().expect("invariant: it has a copy");
        Ok(copy.store.begin_scrub())
    }

    /// A part of a scrub, as the engine does it: damaged payload is fetched from whoever has the right one.
    fn scrub_step(&mut self, at: At, scrub: &mut Scrub, budget_bytes: u64) -> Result<Scrubbed, StoreError> {
        let stepped = scrub.step(budget_bytes);
        let (mut found, mut left) = (0, 0);
        for bad in scrub.take_bad() {
            if self.is_broken(Broken::ScrubForgets) {
                continue;
            }
            let fixed = self.repair(at, &bad);
            self.counts.repaired += u64::from(fixed);
            self.note(|| format!("{} of {at} is damaged, repaired: {fixed}", bad.name()));
            found += 1;
            left += usize::from(!fixed);
        }
        stepped.map(|p| Scrubbed { finished: p.finished, found, left })
    }

    /// Goes on with a scrub between everything else that a host does, or begins one.
    pub(crate) fn scrub_on(&mut self, at: At) {
        let Some(copy) = self.hosts[at].copy_mut() else { return };
        let begun = copy.scrub.take().map(Ok);
        let begun = match begun {
            Some(scrub) => Some(scrub),
            None if self.scrubs && self.rng.one_in(8) => Some(self.begin_scrub(at)),
            None => None,
        };
        let Some(begun) = begun else { return };
        let budget = self.rng.between(1, 256 << 10);
        let found = |world: &Self| world.hosts[at].copy().map_or(0, |copy| copy.store.rot().found);
        let before = found(self);
        let stepped = begun.and_then(|mut scrub| {
            let step = self.scrub_step(at, &mut scrub, budget)?;
            Ok((scrub, step))
        });
        let excused = self.hosts[at].is_excused() || self.hosts[at].stop_call.is_some();
        match stepped {
            Ok(_) if found(self) > before && !self.hosts[at].bad_disk && !excused => {
                let rot = self.hosts[at].copy().map(|copy| copy.store.rot());
                self.fail(Check::SoundIsWhole, format!("a scrub of host {at} found damage: {rot:?}"));
            }
            Ok((_, step)) if step.found > 0 && !self.hosts[at].bad_disk => {
                let what = format!("a scrub of host {at} found {} damaged blocks", step.found);
                self.fail(Check::SoundIsWhole, what);
            }
            Ok((scrub, step)) => {
                self.counts.scrubbed += u64::from(step.finished);
                if let Some(copy) = self.hosts[at].copy_mut().filter(|_| !step.finished) {
                    copy.scrub = Some(scrub);
                }
            }
            Err(e) if excused => self.note(|| format!("{at} cannot scrub: {e}")),
            Err(e) => {
                self.fail(Check::ScrubWorks, format!("the scrub of host {at} failed on a sound disk: {e}"))
            }
        }
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

    fn repair(&self, at: At, bad: &BadPayload) -> bool {
        let Some(store) = self.hosts[at].copy().map(|c| c.store.clone()) else { return false };
        for peer in (0..self.hosts.len()).filter(|p| *p != at) {
            if self.net.session(at, peer).is_none() {
                continue;
            }
            let Some(theirs) = self.hosts[peer].copy().map(|c| c.store.clone()) else { continue };
            let block = bad.block.and_then(|index| {
                let mut block = vec![0u8; BLOCK_BYTES];
                (theirs.read(index, &mut block).is_ok() && block_digest(&block) == bad.digest)
                    .then_some(block)
            });
            let of_update = || bad.update.and_then(|seq| theirs.payload_of(seq, &bad.digest).ok()?);
            let Some(raw) = block.or_else(of_update) else { continue };
            // False: nothing refers to it any more.
            if let Ok(repaired) = store.repair(bad, &raw) {
                if repaired {
                    store.note_repair(&bad.name(), "from another host's copy");
                }
                return true;
            }
        }
        false
    }
}

/// What came of a part of a scrub.
struct Scrubbed {
    finished: bool,
    /// Damaged payload blocks.
    found: usize,
    /// Those without a good copy.
    left: usize,
}
