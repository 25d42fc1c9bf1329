//! Numbered block writes, and the check that a file is the state after some prefix of them.

use std::fs::File;
use std::os::unix::fs::FileExt;

use rand::{Rng, RngCore, SeedableRng, rngs::StdRng};

/// Size of one write.
pub const BLOCK: usize = 4096;

/// Writes whole blocks, each of which says which write made it, and remembers which were flushed.
#[derive(Debug)]
pub struct NumberedWrites {
    block_count: u64,
    /// The block of write `i` (numbers start at 1; entry 0 is unused).
    places: Vec<u64>,
    flushed: usize,
    rng: StdRng,
}

impl NumberedWrites {
    /// Nothing written yet to a file of `block_count` blocks.
    #[must_use]
    pub fn new(block_count: u64, rng: StdRng) -> Self {
        Self { block_count, places: vec![u64::MAX], flushed: 0, rng }
    }

    /// Number of the last write that was begun.
    #[must_use]
    pub fn begun(&self) -> usize {
        self.places.len() - 1
    }

    /// Number of the last write before the last flush that returned.
    #[must_use]
    pub fn flushed(&self) -> usize {
        self.flushed
    }

    /// One write to a random block.
    ///
    /// # Errors
    /// The write's own; it then counts as begun.
    pub fn write(&mut self, file: &File) -> std::io::Result<()> {
        let place = self.rng.random_range(0..self.block_count);
        self.places.push(place);
        file.write_all_at(&block(self.begun()), place * BLOCK as u64)
    }

    /// fsync; after success everything begun counts as flushed.
    ///
    /// # Errors
    /// The fsync's own.
    pub fn flush(&mut self, file: &File) -> std::io::Result<()> {
        file.sync_all()?;
        self.flushed = self.begun();
        Ok(())
    }

    /// Whether to flush now, with a chance of one in `n`.
    pub fn chance(&mut self, n: u32) -> bool {
        self.rng.random_ratio(1, n)
    }

    /// Panics unless `file` is exactly the state after the first k writes, for some k from the last flushed
    /// to the last begun. Returns k and forgets the writes after it.
    #[track_caller]
    pub fn assert_prefix(&mut self, file: &File) -> usize {
        let k = self.assert_some_prefix(file);
        assert!(k >= self.flushed, "only {k} writes are there, but {} were flushed", self.flushed);
        self.places.truncate(k + 1);
        k
    }

    /// Panics unless `file` is exactly the state after the first k writes, for some k up to the last begun,
    /// flushed or not: what a replica may show. Returns k.
    #[track_caller]
    pub fn assert_some_prefix(&self, file: &File) -> usize {
        let found: Vec<usize> = (0..self.block_count).map(|b| self.number_at(file, b)).collect();
        // Writes can be missing only from the end: the newest one found dates the state.
        let k = found.iter().copied().max().unwrap_or(0);
        let mut expected = vec![0; found.len()];
        for (number, &place) in self.places.iter().enumerate().take(k + 1).skip(1) {
            expected[usize::try_from(place).expect("invariant: fewer blocks than memory")] = number;
        }
        for (b, (&is, &should)) in found.iter().zip(&expected).enumerate() {
            assert_eq!(
                is, should,
                "block {b} holds write {is}, but after write {k} (flushed {}) it must hold {should}",
                self.flushed
            );
        }
        k
    }

    fn number_at(&self, file: &File, at: u64) -> usize {
        let mut bytes = vec![0; BLOCK];
        file.read_exact_at(&mut bytes, at * BLOCK as u64).unwrap_or_else(|e| panic!("block {at}: {e}"));
        if bytes.iter().all(|&b| b == 0) {
            return 0;
        }
        let number = usize::try_from(u64::from_le_bytes(bytes[..8].try_into().expect("invariant: 8 bytes")))
            .unwrap_or(usize::MAX);
        assert!(number <= self.begun() && bytes == block(number), "block {at} was never written like this");
        assert_eq!(self.places[number], at, "write {number} is in a wrong place");
        number
    }
}

/// The bytes of write `number`.
fn block(number: usize) -> Vec<u8> {
    let mut bytes = vec![0; BLOCK];
    StdRng::seed_from_u64(number as u64).fill_bytes(&mut bytes);
    bytes[..8].copy_from_slice(&(number as u64).to_le_bytes());
    bytes
}
