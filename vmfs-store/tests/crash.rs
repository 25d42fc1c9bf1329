//! Random work with power cuts, kills and failing disks at random moments, against the naive model.
//! `VMFS_SEEDS=from..to` runs other seeds.

#![allow(missing_docs, clippy::unwrap_used, clippy::cast_possible_truncation)]

mod common;

use std::sync::Arc;

use common::{BLOCKS, IMAGE, Maker, Model, append, block, create, open, small};
use vmfs_common::hash::block_digest;
use vmfs_common::policy::MemberRole;
use vmfs_common::{BlockIndex, Head, Seq};
use vmfs_store::simdisk::SimDisk;
use vmfs_store::{ImageStore, Store, StoreConfig, StoreError};

struct Rng(u64);

impl Rng {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % n
    }
}

fn trace() -> bool {
    std::env::var("TRACE").is_ok()
}

struct Sim {
    seed: u64,
    rng: Rng,
    disk: SimDisk,
    store: Arc<Store>,
    image: Arc<ImageStore>,
    maker: Maker,
    model: Model,
    epoch: u64,
    /// Known to be durable.
    floor: Head,
    commit: Seq,
    /// Where an operation under way may end.
    also: Option<Model>,
    forks: Vec<(String, Model)>,
    fork_under_way: Option<(String, Model)>,
    meta: Vec<u64>,
    crashes: u32,
    /// Bytes compacted by one process, the most.
    compacted: u64,
}

/// Seeds differ in their bounds, too.
fn config(seed: u64) -> StoreConfig {
    StoreConfig {
        retain_log_bytes_max: [256 << 10, 0, 4 << 20][seed as usize % 3],
        segment_bytes_max: [128 << 10, 1 << 20][seed as usize % 2],
        // Also so many that several compactions share one.
        checkpoint_log_bytes: [96 << 10, 2 << 20][seed as usize / 2 % 2],
        idle_bytes_max: [0, 1 << 20][seed as usize / 4 % 2],
        ..small()
    }
}

/// Where in the image the work is: across the borders of map pages of every level.
fn offset(seed: u64) -> u64 {
    let borders = [0u64, 512, 1 << 18, 1 << 27, 1 << 36, (1 << 40) - 2 * BLOCKS];
    borders[seed as usize % borders.len()].saturating_sub(BLOCKS / 2)
}

type Done = Result<(), StoreError>;

impl Sim {
    fn new(seed: u64) -> Self {
        let disk = SimDisk::new(64 << 20);
        let store = create(&disk, config(seed)).unwrap();
        let image = store.create_image(IMAGE, MemberRole::Replica).unwrap();
        let (maker, genesis) = Maker::genesis(IMAGE);
        append(&image, &genesis, &[]).unwrap();
        let mut model = Model::new();
        model.push(&genesis, &[], |_| {});
        store.put_meta(IMAGE, &0u64.to_le_bytes()).unwrap();
        model.offset = offset(seed);
        Self {
            seed,
            rng: Rng(seed),
            disk,
            store,
            image,
            maker,
            model,
            epoch: 1,
            floor: Head::default(),
            commit: Seq::ZERO,
            also: None,
            forks: Vec::new(),
            fork_under_way: None,
            meta: vec![0],
            crashes: 0,
            compacted: 0,
        }
    }

    fn write(&mut self) -> Done {
        let len = match self.rng.below(8) {
            0 => 1 + self.rng.below(200),
            1..=3 => 1 + self.rng.below(10),
            _ => 1,
        };
        let start = if self.rng.below(2) == 0 { self.rng.below(BLOCKS - len) } else { self.rng.below(20) };
        let fills: Vec<u64> =
            (0..len).map(|_| if self.rng.below(6) == 0 { 0 } else { 1 + self.rng.below(1 << 20) }).collect();
        let data: Vec<u8> = fills.iter().zip(start..).flat_map(|(f, i)| block(i, *f)).collect();
        let (u, payload) = self.maker.write(start + self.model.offset, &data, self.commit);
        self.model.push(&u, &payload, |m| {
            m[usize::try_from(start).unwrap()..][..fills.len()].copy_from_slice(&fills);
        });
        append(&self.image, &u, &payload)
    }
    fn zero(&mut self) -> Done {
        let start = self.rng.below(BLOCKS);
        let count = 1 + self.rng.below(BLOCKS - start);
        let u = self.maker.zero(start + self.model.offset, count, self.commit);
        self.model.push(&u, &[], |m| {
            m[usize::try_from(start).unwrap()..usize::try_from(start + count).unwrap()].fill(0);
        });
        append(&self.image, &u, &[])
    }
    fn resize(&mut self) -> Done {
        let blocks = self.rng.below(2 * BLOCKS);
        let u = self.maker.resize(blocks + self.model.offset, self.commit);
        self.model.push(&u, &[], |m| {
            if blocks < BLOCKS {
                m[usize::try_from(blocks).unwrap()..].fill(0);
            }
        });
        append(&self.image, &u, &[])
    }
    fn sync(&mut self) -> Done {
        let head = self.image.sync()?;
        assert_eq!(head, self.model.head());
        self.floor = head;
        if self.rng.below(3) == 0 {
            self.commit = self.commit.max(Seq(head.seq.0.saturating_sub(self.rng.below(20))));
            self.image.set_commit(self.commit);
        }
        Ok(())
    }
    fn new_epoch(&mut self) -> Done {
        self.epoch += 1;
        let tip = self.image.state().tip;
        let u = self.maker.next_epoch(self.epoch, &tip);
        self.model.push(&u, &[], |_| {});
        append(&self.image, &u, &[])
    }
    fn roll_back(&mut self) -> Done {
        let top = self.model.history.len() - 1;
        let back = usize::try_from(self.rng.below(60)).unwrap();
        let to = top.saturating_sub(back);
        let target = self.model.history[to].0;
        if target.seq < self.commit || target.seq == Seq::ZERO {
            return Ok(());
        }
        let keep = self.rng.below(2) == 0;
        let mut after = self.model.clone();
        after.truncate(to);
        self.also = Some(after.clone());
        if keep {
            self.fork_under_way = Some((String::new(), self.model.clone()));
        }
        let done = self.image.roll_back(target, keep);
        if trace() {
            eprintln!(
                "roll back to {target:?} of {top}: {done:?}; log from {}, commit {}",
                self.image.log_start(),
                self.commit
            );
            eprintln!(
                "{:?}\n{:?}",
                self.image.head_at(target.seq),
                self.image.update_at(target.seq).map(|u| u.map(|u| u.head()))
            );
        }
        let fork = done?;
        assert_eq!(fork.is_some(), keep && target != self.model.head());
        if let Some(fork) = fork {
            assert_eq!((fork.ancestor, fork.head), (target, self.model.head()));
            self.forks.push((fork.name, self.model.clone()));
        }
        self.model = after;
        self.also = None;
        self.fork_under_way = None;
        self.floor = target;
        assert_eq!(self.image.head(), target);
        assert_eq!(self.image.durable_head(), target);
        self.new_epoch()
    }
    fn drop_fork(&mut self) -> Done {
        if self.forks.is_empty() {
            return Ok(());
        }
        let at = usize::try_from(self.rng.below(self.forks.len() as u64)).unwrap();
        let (name, model) = self.forks.remove(at);
        self.fork_under_way = Some((name.clone(), model));
        self.image.drop_fork(&name)?;
        self.fork_under_way = None;
        Ok(())
    }
    /// Replaces the content by one that shares about half of it.
    fn import(&mut self) -> Done {
        let copy = self.rng.below(2) == 0;
        let (_, fills, _) = self.model.history.last().unwrap().clone();
        let mut next = fills.clone();
        for f in &mut next {
            if self.rng.below(2) == 0 {
                *f = if self.rng.below(3) == 0 { 0 } else { 1 + self.rng.below(1 << 20) };
            }
        }
        // The update whose content it is: made elsewhere, on top of a head this copy never had.
        let mut elsewhere = self.model.clone();
        self.epoch += 1;
        let tip = self.model.history.last().unwrap().2.tip;
        let start = self.maker.next_epoch(self.epoch, &tip);
        elsewhere.push(&start, &[], |_| {});
        let (base, payload) = self.maker.write(self.model.offset, &block(0, 77), self.commit);
        next[0] = 77;
        elsewhere.push(&base, &payload, |m| m.clone_from(&next));
        self.also = Some(elsewhere.clone());
        let import = self.image.begin_import(copy)?;
        assert!(matches!(self.image.begin_import(false), Err(StoreError::Importing(_))));
        let mut at = 0;
        while at < BLOCKS {
            let n = (1 + self.rng.below(100)).min(BLOCKS - at);
            let piece = usize::try_from(at).unwrap()..usize::try_from(at + n).unwrap();
            if !copy || fills[piece.clone()] != next[piece.clone()] {
                let blocks: Vec<Vec<u8>> = piece.clone().map(|i| block(i as u64, next[i])).collect();
                let digests: Vec<_> = blocks.iter().map(|b| block_digest(b)).collect();
                let payload: Vec<u8> = blocks
                    .into_iter()
                    .zip(&digests)
                    .filter(|(_, d)| !d.is_zero())
                    .flat_map(|(b, _)| b)
                    .collect();
                import.write(BlockIndex(at + self.model.offset), &digests, &payload)?;
            }
            at += n;
        }
        if self.rng.below(4) == 0 {
            self.also = None;
            drop(import);
            return self.new_epoch();
        }
        let root = import.merkle_tree()?.root();
        import.finish(&base, elsewhere.history.last().unwrap().2.clone(), false)?;
        assert_eq!(self.image.view().merkle_tree()?.root(), root);
        self.model = elsewhere;
        self.also = None;
        self.floor = self.model.head();
        self.commit = self.commit.max(base.header.seq);
        assert_eq!(self.image.log_start(), base.header.seq.next());
        Ok(())
    }
    /// Some of it, or all there is.
    fn compact(&mut self) -> Done {
        if self.rng.below(3) > 0 {
            // What would keep the segments: what may be rolled back, and log that somebody may want.
            self.sync()?;
            self.commit = self.commit.max(self.floor.seq);
            self.image.set_commit(self.commit);
            self.image.retain_from(self.floor.seq.next());
            self.image.checkpoint()?;
        }
        // Now and then at rest for so long that scattered blocks are put in order.
        let calm = self.rng.below(3) == 0;
        for _ in 0..1 + self.rng.below(6) {
            for _ in 0..if calm { 3 } else { 0 } {
                self.store.background(0)?;
            }
            self.store.compact(1 + self.rng.below(256 << 10))?;
            self.compacted = self.compacted.max(self.image.space_use().compacted_bytes);
            if self.rng.below(2) == 0 {
                self.store.background(0)?;
            }
        }
        Ok(())
    }
    fn put_meta(&mut self) -> Done {
        let n = self.meta[self.meta.len() - 1] + 1;
        self.meta.push(n);
        let mut value = n.to_le_bytes().to_vec();
        value.resize(8 + usize::try_from(self.rng.below(9000)).unwrap(), 7);
        self.store.put_meta(IMAGE, &value)?;
        self.meta = vec![n];
        Ok(())
    }

    fn step(&mut self) -> Done {
        let what = self.rng.below(100);
        if trace() {
            eprintln!(
                "{what} head {} floor {} commit {}",
                self.image.head().seq,
                self.floor.seq,
                self.commit
            );
        }
        match what {
            0..=49 => self.write(),
            50..=54 => self.zero(),
            55..=57 => self.resize(),
            58..=72 => self.sync(),
            73..=76 => self.image.checkpoint(),
            77..=78 => self.store.background(1 << 20).map(|_| ()),
            79..=81 => self.compact(),
            82..=85 => self.roll_back(),
            86..=87 => self.drop_fork(),
            88..=89 => self.import(),
            90..=92 => self.put_meta(),
            93..=94 => self.new_epoch(),
            95 => {
                self.image.retain_from(Seq(self.image.head().seq.0.saturating_sub(self.rng.below(100))));
                Ok(())
            }
            96 => {
                self.model.check(&self.image);
                self.check_forks();
                Ok(())
            }
            _ => self.crash(),
        }
    }

    /// The process is killed, or the power goes. True: killed.
    fn stop(&mut self) -> bool {
        let kill = self.rng.below(3) == 0;
        let seed = self.rng.below(u64::MAX);
        self.disk = if kill { self.disk.kill() } else { self.disk.power_cut(seed) };
        kill
    }

    /// The end of a process: what is on the disk, or what is in the cache, is opened again.
    fn crash(&mut self) -> Done {
        self.crashes += 1;
        let kill = self.stop();
        let mut told = None;
        if self.rng.below(4) == 0 {
            // Again, in the middle of the recovery (some thirty calls), or soon after it.
            self.disk.stop_at_call(Some(self.disk.calls() + self.rng.below(50)));
            let opened = open(&self.disk, config(self.seed)).ok();
            told = opened.and_then(|s| s.image(IMAGE)).map(|i| i.head());
            self.stop();
        }
        self.store = open(&self.disk, config(self.seed)).unwrap();
        assert_eq!(self.store.damaged(), []);
        self.image = self.store.image(IMAGE).expect("the image is there");
        let head = self.image.head();
        assert!(
            told.is_none_or(|t| t == head),
            "the recovery before this one reported {told:?}, not {head:?}"
        );
        if trace() {
            eprintln!(
                "crash {kill}: head {head:?}, floor {:?} also {:?}",
                self.floor,
                self.also.as_ref().map(Model::head)
            );
        }
        if let Some(also) = self.also.take()
            && (also.head() == head || self.model.at(head).is_none())
        {
            if also.history.len() > self.model.history.len() {
                // An import: the updates before it were never here.
                self.commit = self.commit.max(also.head().seq);
            }
            self.model = also;
            self.floor = self.model.head();
        }
        let at = self.model.at(head).unwrap_or_else(|| panic!("head {head:?} was never there"));
        assert!(head.seq >= self.floor.seq, "{head:?} is below the durable {:?}", self.floor);
        self.model.truncate(at);
        self.floor = head;
        assert_eq!(self.image.durable_head(), head);
        self.model.check(&self.image);
        let report = self.image.verify(&mut |_, _| {}).unwrap();
        assert_eq!((report.bad_blocks, report.bad_updates), (vec![], vec![]));
        if let Some((_, model)) = self.fork_under_way.take() {
            let known: Vec<_> = self.forks.iter().map(|f| f.0.clone()).collect();
            let new = self.image.forks().into_iter().find(|f| !known.contains(&f.name));
            if let Some(f) = new {
                self.forks.push((f.name, model));
            }
        }
        self.check_forks();
        let value = self.store.get_meta(IMAGE).unwrap();
        let n = u64::from_le_bytes(value[..8].try_into().unwrap());
        assert!(self.meta.contains(&n), "metadata {n} is none of {:?}", self.meta);
        self.meta = vec![n];
        self.new_epoch()
    }
    fn check_forks(&self) {
        let forks = self.image.forks();
        let names: Vec<_> = forks.iter().map(|f| f.name.clone()).collect();
        let mut want: Vec<_> = self.forks.iter().map(|f| f.0.clone()).collect();
        let mut got = names.clone();
        want.sort();
        got.sort();
        assert_eq!(got, want);
        for info in forks {
            let (_, model) = self.forks.iter().find(|f| f.0 == info.name).unwrap();
            let mut next = info.ancestor.seq.next();
            while next <= info.head.seq {
                for e in self.image.read_fork(&info.name, next, 50_000).unwrap() {
                    let at = model.history.iter().position(|h| h.0.seq == next).unwrap();
                    let (update, payload) = model.updates[at].as_ref().unwrap();
                    assert!(e.update == *update && e.payload == *payload);
                    next = next.next();
                }
            }
        }
    }
}

/// Returns how much was compacted.
fn run(seed: u64, steps: u64) -> u64 {
    let mut sim = Sim::new(seed);
    for _ in 0..steps {
        let armed = sim.rng.below(12) == 0;
        if armed {
            let n = sim.disk.calls() + sim.rng.below(10);
            match sim.rng.below(4) {
                0 => sim.disk.fail_call(Some(n)),
                1 => sim.disk.fail_syncs(true),
                _ => sim.disk.stop_at_call(Some(n)),
            }
            if trace() {
                eprintln!("armed from call {n}");
            }
        }
        let done = sim.step();
        let failed = match done {
            Err(StoreError::CannotRollBack { .. } | StoreError::Trimmed { .. }) if !armed => {
                panic!("seed {seed}: {done:?}")
            }
            Err(e) if !armed => panic!("seed {seed}: {e}"),
            other => other.is_err(),
        };
        if failed || armed {
            sim.crash().unwrap();
        }
    }
    sim.model.check(&sim.image);
    assert!(sim.crashes > 0);
    sim.compacted
}

#[test]
fn every_durable_update_survives_and_nothing_else_appears() {
    let range = std::env::var("VMFS_SEEDS").unwrap_or_else(|_| "0..24".into());
    let (from, to) = range.split_once("..").unwrap();
    let (mut seeds, mut seeds_compacted) = (0, 0);
    for seed in from.parse().unwrap()..to.parse::<u64>().unwrap() {
        let compacted = run(seed, 400);
        println!("seed {seed}: {compacted} bytes compacted");
        seeds_compacted += u64::from(compacted > 0);
        seeds += 1;
    }
    assert!(2 * seeds_compacted >= seeds, "{seeds_compacted} of {seeds} seeds have compacted");
}
