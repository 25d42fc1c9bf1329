//! One seed per random test, printed, and taken from `VMFS_TEST_SEED` to run the same again.

use rand::{SeedableRng, rngs::StdRng};

/// A generator for the test `name`; prints the seed that repeats it.
#[must_use]
pub fn rng(name: &str) -> StdRng {
    let seed = match std::env::var("VMFS_TEST_SEED") {
        Ok(text) => text.parse().unwrap_or_else(|_| panic!("VMFS_TEST_SEED is not a number: {text}")),
        Err(_) => rand::random::<u64>(),
    };
    println!("{name}: VMFS_TEST_SEED={seed}");
    StdRng::seed_from_u64(seed)
}
