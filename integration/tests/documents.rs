//! What the documents name is there: the tests that prove the promises, and the files that links lead to.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use integration::harness::cluster::repository;

/// Files below `dir` with this extension, without build products.
fn files(dir: &Path, extension: &str, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).unwrap().map(Result::unwrap) {
        let (path, name) = (entry.path(), entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            if name != "target" && !name.to_string_lossy().starts_with('.') {
                files(&path, extension, found);
            }
        } else if path.extension().is_some_and(|e| e == extension) {
            found.push(path);
        }
    }
}

/// Names of all functions that are tests: those with a test attribute just above them, and the cases that a
/// macro makes of a name.
fn tests() -> BTreeSet<String> {
    let mut sources = Vec::new();
    files(repository(), "rs", &mut sources);
    let mut names = BTreeSet::new();
    for source in sources {
        let mut is_test = false;
        for line in std::fs::read_to_string(source).unwrap().lines().map(str::trim) {
            let function = line.strip_prefix("async ").unwrap_or(line).strip_prefix("fn ");
            if line.starts_with("#[test]") || line.starts_with("#[tokio::test") {
                is_test = true;
            } else if let Some(rest) = function {
                let name: String = rest.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
                if std::mem::take(&mut is_test) {
                    names.insert(name);
                }
            } else if !line.starts_with("#[") && !line.starts_with("//") {
                is_test = false;
            }
        }
    }
    assert!(names.len() > 200, "the sources are not where this test looks: {} tests", names.len());
    names
}

/// Words between single backticks.
fn quoted(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

fn matches(pattern: &str, name: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == name,
        Some((head, tail)) => {
            name.len() >= head.len() + tail.len() && name.starts_with(head) && name.ends_with(tail)
        }
    }
}

#[test]
fn every_test_that_the_promises_name_exists() {
    let text = std::fs::read_to_string(repository().join("docs/semantics.md")).unwrap();
    let promises = text.split("\n## ").find(|s| s.starts_with("Promises")).unwrap();
    let rows: Vec<&str> = promises.lines().filter(|l| l.starts_with('|')).skip(2).collect();
    assert_eq!(rows.len(), 9, "one row for each promise of the design");
    let known = tests();
    for row in rows {
        let cells: Vec<&str> = row.split('|').map(str::trim).collect();
        let named: Vec<&str> = quoted(cells[3]).collect();
        assert!(!named.is_empty(), "no test proves: {}", cells[1]);
        for name in named {
            assert!(known.iter().any(|t| matches(name, t)), "{}: there is no test {name}", cells[1]);
        }
    }
    // Elsewhere a test is named by a whole sentence of a name.
    for name in quoted(&text).filter(|w| w.matches('_').count() >= 4 && !w.contains(['/', ':', ' '])) {
        assert!(known.iter().any(|t| matches(name, t)), "there is no test {name}");
    }
}

#[test]
fn every_relative_link_in_the_documents_leads_somewhere() {
    let mut pages = Vec::new();
    files(repository(), "md", &mut pages);
    for page in pages {
        let text = std::fs::read_to_string(&page).unwrap();
        for target in text.split("](").skip(1).filter_map(|rest| rest.split_once(')').map(|(t, _)| t)) {
            let path = target.split('#').next().unwrap_or_default();
            if path.is_empty() || path.contains("://") {
                continue;
            }
            assert!(page.parent().unwrap().join(path).exists(), "{}: {target}", page.display());
        }
    }
}
