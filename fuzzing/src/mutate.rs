//! Mutations of byte strings, from a seed: simple ones, for the smoke run. The long runs have libFuzzer's.

use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

/// Longest input made.
const LEN_MAX: usize = 64 << 10;
/// Numbers that tend to be where mistakes are.
const EDGES: [u64; 10] =
    [0, 1, 0x7f, 0xff, 0xffff, 0x7fff_ffff, 0xffff_ffff, 1 << 40, u64::MAX >> 1, u64::MAX];

/// Makes inputs of a corpus.
#[derive(Debug)]
pub struct Mutator<'a> {
    rng: StdRng,
    corpus: &'a [Vec<u8>],
}

impl<'a> Mutator<'a> {
    /// The same seed makes the same inputs.
    #[must_use]
    pub fn new(seed: u64, corpus: &'a [Vec<u8>]) -> Self {
        Self { rng: StdRng::seed_from_u64(seed), corpus }
    }

    fn below(&mut self, n: usize) -> usize {
        if n == 0 { 0 } else { self.rng.random_range(0..n) }
    }

    /// One more input.
    pub fn next_input(&mut self) -> Vec<u8> {
        let pick = self.below(self.corpus.len());
        let mut bytes = self.corpus.get(pick).cloned().unwrap_or_default();
        for _ in 0..=self.below(6) {
            self.step(&mut bytes);
        }
        bytes.truncate(LEN_MAX);
        bytes
    }

    fn step(&mut self, b: &mut Vec<u8>) {
        let at = self.below(b.len());
        match self.rng.random_range(0..8) {
            0 => {
                if let Some(x) = b.get_mut(at) {
                    *x ^= 1 << self.rng.random_range(0..8);
                }
            }
            1 => b.insert(at, self.rng.random()),
            2 => b.truncate(at),
            3 | 4 => self.number(b, at),
            5 => {
                let end = (at + self.below(64)).min(b.len());
                b.drain(at..end);
            }
            6 => {
                let end = (at + self.below(64)).min(b.len());
                let part = b[at..end].to_vec();
                let to = self.below(b.len());
                b.splice(to..to, part);
            }
            _ => {
                let other = self.below(self.corpus.len());
                let other = self.corpus.get(other).cloned().unwrap_or_default();
                let from = self.below(other.len());
                b.truncate(at);
                b.extend_from_slice(&other[from..]);
            }
        }
    }

    fn number(&mut self, b: &mut [u8], at: usize) {
        let edge = EDGES[self.below(EDGES.len())];
        let value = edge.wrapping_add(u64::from(self.rng.random::<bool>())).to_le_bytes();
        let width = [1, 2, 4, 8][self.below(4)];
        if let Some(to) = b.get_mut(at..at + width) {
            to.copy_from_slice(&value[..width]);
        }
    }
}
