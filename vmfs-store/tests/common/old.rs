//! The content of the stores under `tests/formats`, as the release that wrote them said it is.
//!
//! `expected` has a line for each image: its id, kind, head, log start, and the fills of its blocks.

use std::path::Path;

use vmfs_common::policy::MemberRole;
use vmfs_common::{Digest, ImageId};

/// Written by every step of the generator; a later release only adds images.
pub const DATA: ImageId = ImageId::from_bytes([0xd1; 16]);
pub const FORKED: ImageId = ImageId::from_bytes([0xd2; 16]);
pub const COPIED: ImageId = ImageId::from_bytes([0xd3; 16]);
pub const HEADERS: ImageId = ImageId::from_bytes([0xd4; 16]);
/// The value that the store keeps under [`DATA`].
pub const META: &[u8] = b"a promise of an earlier release";

/// One image of an old store.
#[derive(Debug)]
pub struct Expected {
    pub image: ImageId,
    pub kind: MemberRole,
    pub seq: u64,
    pub digest: Digest,
    pub log_start: u64,
    pub forks: usize,
    /// What [`super::block`] made each block of.
    pub fills: Vec<u64>,
}

impl Expected {
    pub fn line(&self) -> String {
        let kind = if self.kind == MemberRole::Witness { "witness" } else { "replica" };
        let fills: Vec<String> = self.fills.iter().map(u64::to_string).collect();
        format!(
            "{} {kind} {} {} {} {} {}\n",
            self.image,
            self.seq,
            self.digest,
            self.log_start,
            self.forks,
            fills.join(",")
        )
    }
    fn parse(line: &str) -> Self {
        let words: Vec<&str> = line.split(' ').collect();
        let [image, kind, seq, digest, log_start, forks, fills] = words[..] else {
            panic!("not an image: {line}")
        };
        let number = |w: &str| w.parse().unwrap();
        Self {
            image: image.parse().unwrap(),
            kind: if kind == "witness" { MemberRole::Witness } else { MemberRole::Replica },
            seq: number(seq),
            digest: digest.parse().unwrap(),
            log_start: number(log_start),
            forks: forks.parse().unwrap(),
            fills: fills.split(',').filter(|w| !w.is_empty()).map(number).collect(),
        }
    }
    /// What the file `expected` beside a store says.
    pub fn read(dir: &Path) -> Vec<Self> {
        std::fs::read_to_string(dir.join("expected")).unwrap().lines().map(Self::parse).collect()
    }
}
