//! The seeded bugs of `integration/mutations` still fit the tree. That each is caught takes a build per
//! bug: `cargo run -p integration --bin mutants` (docs/testing.md).
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use integration::mutants;

#[test]
fn every_mutant_still_applies_to_the_tree() {
    let all = mutants::all().unwrap();
    assert!(all.len() >= 25, "only {} mutants", all.len());
    for m in &all {
        if let Err(why) = mutants::check(m, &mutants::root()) {
            panic!("{} does not apply any more: {why}", m.name);
        }
    }
}

#[test]
fn every_mutant_is_in_the_table_of_the_docs() {
    let doc = std::fs::read_to_string(mutants::root().join("docs/testing.md")).unwrap();
    for m in mutants::all().unwrap() {
        assert!(doc.contains(&format!("| {} |", m.name)), "{} is not in docs/testing.md", m.name);
    }
}
