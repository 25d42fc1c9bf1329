//! What an owner's engine does with bytes: random writes, discards and truncations of every alignment
//! against a vector, several writers in one block, and handles that were shown something else.
//! `VMFS_SEEDS=from..to` runs other seeds.

#![allow(clippy::unwrap_used, clippy::missing_panics_doc, reason = "a test fails by panicking")]

mod common;

use std::path::Path;
use std::sync::Arc;

use common::{free_port, until};
use vmfs_common::config::Config;
use vmfs_common::op::Attrs;
use vmfs_net::HostRole;
use vmfs_net::pki::{init_datastore, invite};
use vmfs_replica::node::{self, Image, IoError, Node};

/// Ends of the images stay below this.
const END_MAX: u64 = 40 * 4096;

struct Rng(u64);

impl Rng {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % n
    }
    /// Ragged, on a block's border, or next to one.
    fn place(&mut self, end: u64) -> u64 {
        let at = self.below(end);
        match self.below(4) {
            0 => at / 4096 * 4096,
            1 => (at / 4096 * 4096 + 1).min(end - 1),
            2 => (at / 4096 * 4096).saturating_sub(1),
            _ => at,
        }
    }
}

/// A datastore of one host, so that its engine owns what it makes.
fn alone(dir: &Path) {
    let ca = dir.join("ca");
    init_datastore(&ca).unwrap();
    let listen = free_port().to_string();
    invite::join_local(&ca, "alone", &dir.join("alone"), &listen, &[HostRole::Replica]).unwrap();
}

async fn start(dir: &Path) -> Node {
    let text = format!(
        "host = \"alone\"\n[store]\ndir = {:?}\n[identity]\ndir = {:?}\n[network]\nlisten = \"{}\"\n\
         [control]\nsocket = {:?}\n",
        dir.join("store"),
        dir.join("alone"),
        free_port(),
        dir.join("sock"),
    );
    node::start(Config::parse(&text).unwrap(), vec![HostRole::Replica]).await.unwrap()
}

async fn writable(node: &Node, path: &str) -> Arc<Image> {
    let image = node.image_claiming(path).unwrap();
    let lineage = image.lineage();
    until("the image may be written", || image.write(lineage, 0, &[]).is_ok() && image.is_writable()).await;
    image
}

fn change(rng: &mut Rng, image: &Arc<Image>, model: &mut Vec<u8>) {
    let lineage = image.lineage();
    let at = rng.place(END_MAX);
    let len =
        1 + if rng.below(3) == 0 { rng.place(END_MAX - at) } else { rng.below(9000).min(END_MAX - at - 1) };
    let (from, to) = (usize::try_from(at).unwrap(), usize::try_from(at + len).unwrap());
    match rng.below(8) {
        0..=3 => {
            let fill = u8::try_from(rng.below(256)).unwrap();
            image.write(lineage, at, &vec![fill; to - from]).unwrap();
            model.resize(model.len().max(to), 0);
            model[from..to].fill(fill);
        }
        4 => {
            image.zero(lineage, at, len, false).unwrap();
            model.resize(model.len().max(to), 0);
            model[from..to].fill(0);
        }
        5 | 6 => {
            image.zero(lineage, at, len, true).unwrap();
            let to = to.min(model.len());
            model[from.min(to)..to].fill(0);
        }
        _ => {
            image.resize(lineage, at).unwrap();
            model.resize(from, 0);
        }
    }
}

fn check(rng: &mut Rng, image: &Arc<Image>, model: &[u8], what: &str) {
    assert_eq!(image.state().size_bytes, model.len() as u64, "{what}: the size");
    let mut got = Vec::new();
    image.read(image.lineage(), 0, model.len() + 1, &mut got).unwrap();
    let differs = got.iter().zip(model).position(|(a, b)| a != b);
    assert!(got.len() == model.len() && differs.is_none(), "{what}: differs at byte {differs:?}");
    let (at, len) = (rng.place(END_MAX), usize::try_from(rng.below(20_000)).unwrap());
    let from = usize::try_from(at).unwrap().min(model.len());
    image.read(image.lineage(), at, len, &mut got).unwrap();
    assert!(got == model[from..(from + len).min(model.len())], "{what}: {len} bytes at {at}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bytes_of_any_alignment_are_what_a_vector_holds() {
    let dir = tempfile::tempdir().unwrap();
    alone(dir.path());
    let range = std::env::var("VMFS_SEEDS").unwrap_or_else(|_| "0..6".into());
    let (from, to) = range.split_once("..").unwrap();
    let node = start(dir.path()).await;
    for seed in from.parse().unwrap()..to.parse::<u64>().unwrap() {
        println!("seed {seed}");
        let (path, mut rng, mut model) = (format!("image-{seed}"), Rng(seed), Vec::new());
        node.create_image(&path, &Attrs::default(), &[]).unwrap();
        let image = writable(&node, &path).await;
        for step in 0..300 {
            change(&mut rng, &image, &mut model);
            check(&mut rng, &image, &model, &format!("seed {seed} step {step}"));
        }
    }
    node.stop().await;
}

/// Sectors of one block and of the border to the next, each with a writer of its own.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writers_of_different_parts_of_a_block_do_not_undo_each_other() {
    let dir = tempfile::tempdir().unwrap();
    alone(dir.path());
    let node = start(dir.path()).await;
    node.create_image("shared", &Attrs::default(), &[]).unwrap();
    let image = writable(&node, "shared").await;
    let lineage = image.lineage();
    tokio::task::block_in_place(|| {
        std::thread::scope(|s| {
            for at in [0u64, 512, 1024, 4096 - 256, 4096 + 1024] {
                let image = &image;
                s.spawn(move || {
                    let mut got = Vec::new();
                    for n in 0..400u64 {
                        let data = [n.to_le_bytes(); 64].concat();
                        image.write(lineage, at, &data).unwrap();
                        image.read(lineage, at, data.len(), &mut got).unwrap();
                        assert!(got == data, "write {n} at {at} was undone by another one");
                    }
                });
            }
        });
    });
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_handle_that_was_shown_another_lineage_reads_and_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    alone(dir.path());
    let node = start(dir.path()).await;
    node.create_image("cut", &Attrs::default(), &[]).unwrap();
    let image = writable(&node, "cut").await;
    let (now, stale) = (image.lineage(), image.lineage() - 1);
    image.write(now, 0, &[7; 10_000]).unwrap();
    let head = image.state().head();
    let failed = |r: Result<(), IoError>| assert!(matches!(r, Err(IoError::Failed)), "{r:?}");
    let mut got = Vec::new();
    failed(image.read(stale, 0, 10, &mut got));
    failed(image.write(stale, 0, &[8; 4096]));
    failed(image.write(stale, 5, &[8; 10]));
    failed(image.zero(stale, 0, 8192, true));
    failed(image.resize(stale, 5));
    assert_eq!(image.state().head(), head);
    image.read(now, 0, 20_000, &mut got).unwrap();
    assert!(got == [7; 10_000]);
    node.stop().await;
}
