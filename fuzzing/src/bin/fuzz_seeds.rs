//! Writes the seed corpus: `cargo run -p fuzzing --bin fuzz_seeds` in the repository's root makes
//! `fuzz/corpus/TARGET/seed-NN` out of real encodings. Run it after a change of a format.

use std::path::Path;

fn main() -> std::io::Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus");
    for target in fuzzing::TARGETS {
        let dir = root.join(target.name);
        std::fs::create_dir_all(&dir)?;
        for (i, seed) in (target.seeds)().iter().enumerate() {
            std::fs::write(dir.join(format!("seed-{i:02}")), seed)?;
        }
    }
    Ok(())
}
