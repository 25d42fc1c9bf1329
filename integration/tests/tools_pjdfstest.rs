//! POSIX, as far as the mount promises it: pjdfstest fails only where `docs/semantics.md` says so.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use integration::harness::Place;
use integration::harness::cluster::repository;
use integration::harness::command::try_run_within;
use integration::harness::wait::secs;

fn expected_failures(config: &str) -> BTreeSet<String> {
    let config: toml::Table = toml::from_str(config).unwrap();
    let names = config["settings"]["expected_failures"].as_array().unwrap();
    names.iter().map(|n| n.as_str().unwrap().to_owned()).collect()
}

#[test]
fn pjdfstest_fails_only_where_the_documents_say_so() {
    let place = Place::new("pjdfstest");
    let config_path = repository().join("integration/tests/pjdfstest.toml");
    let config = std::fs::read_to_string(&config_path).unwrap();
    let plain = place.cluster().is_none();
    let expected = if plain { BTreeSet::new() } else { expected_failures(&config) };

    let root = place.path("pjd");
    std::fs::create_dir(&root).unwrap();
    std::fs::set_permissions(&root, std::fs::Permissions::from_mode(0o777)).unwrap();
    // Expectations are compared here: the runner itself does not say which of them passed.
    let mut bare: toml::Table = toml::from_str(&config).unwrap();
    bare["settings"]["expected_failures"] = toml::Value::Array(Vec::new());
    let bare_path = place.outside("pjdfstest.toml");
    std::fs::write(&bare_path, toml::to_string(&bare).unwrap()).unwrap();
    let mut pjdfstest = Command::new("pjdfstest");
    pjdfstest.args(["-c", &bare_path, "-p", &root]);
    let ran = try_run_within(pjdfstest, secs(600));

    let verdicts = |word: &str| -> BTreeSet<String> {
        let lines = ran.stdout.lines().filter_map(|l| l.trim_end().strip_suffix(word));
        lines.map(|l| l.trim_end().to_owned()).filter(|l| l.contains("::")).collect()
    };
    let (passed, failed) = (verdicts(" ok"), verdicts(" FAILED"));
    println!("{}", ran.stdout.lines().last().unwrap_or_default());
    assert!(passed.len() >= 200, "it did not run: {ran}");
    let surprising: Vec<_> = failed.difference(&expected).collect();
    assert!(surprising.is_empty(), "{} undocumented failures: {surprising:#?}\n{ran}", surprising.len());
    let kept: Vec<_> = expected.difference(&failed).collect();
    assert!(kept.is_empty(), "expected to fail, but did not: {kept:#?}");
    if !plain {
        let semantics = std::fs::read_to_string(repository().join("docs/semantics.md")).unwrap();
        // Names that end in a refused kind of file are listed there as a whole.
        let kinds = ["::fifo", "::char", "::block", "::socket"];
        let own = expected.iter().filter(|name| !kinds.iter().any(|kind| name.ends_with(kind)));
        let unlisted: Vec<_> = own.filter(|name| !semantics.contains(name.as_str())).collect();
        assert!(unlisted.is_empty(), "not listed in docs/semantics.md: {unlisted:#?}");
    }
}
