//! Seeded bugs: patches that each break one rule, and the tests that must notice. The patches are in
//! `integration/mutations`; `mutants` (the binary) runs them. docs/testing.md lists who caught what.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::{fs, io};

/// One seeded bug.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mutant {
    /// Number and name, from the file.
    pub name: String,
    /// The patch.
    pub file: PathBuf,
    /// What it breaks.
    pub breaks: String,
    /// Which promise or rule of DESIGN.md suffers.
    pub promise: String,
    /// Arguments for `cargo nextest run`, one set after the other until a test fails.
    pub tests: Vec<Vec<String>>,
}

/// What became of a mutant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fate {
    /// This test failed.
    Caught(String),
    /// All tests passed: one is missing.
    Survived,
    /// It does not compile, or the tests could not be run.
    Broken(String),
}

/// Root of the project's tree.
#[must_use]
pub fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().expect("invariant: the crate is in the workspace").to_path_buf()
}

/// All of them, in order.
///
/// # Errors
/// The directory's or a file's; [`io::ErrorKind::InvalidData`] for a header that lacks something.
pub fn all() -> io::Result<Vec<Mutant>> {
    let entries = fs::read_dir(root().join("integration/mutations"))?;
    let mut files: Vec<PathBuf> =
        entries.map(|e| e.map(|e| e.path())).collect::<io::Result<Vec<PathBuf>>>()?;
    files.retain(|f| f.extension().is_some_and(|e| e == "patch"));
    files.sort();
    files.into_iter().map(read).collect()
}

fn read(file: PathBuf) -> io::Result<Mutant> {
    let text = fs::read_to_string(&file)?;
    let name = file.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let field = |key: &str| {
        let lines = text.lines().take_while(|l| !l.starts_with("diff "));
        lines.filter_map(|l| l.strip_prefix(key)?.strip_prefix(": ")).map(str::to_owned).collect::<Vec<_>>()
    };
    let one = |key: &str| {
        field(key).pop().ok_or_else(|| {
            io::Error::new(io::ErrorKind::InvalidData, format!("{name}: no {key:?} in its header"))
        })
    };
    let tests: Vec<Vec<String>> =
        field("Tests").iter().map(|l| l.split_whitespace().map(str::to_owned).collect()).collect();
    one("Tests")?;
    Ok(Mutant { breaks: one("Breaks")?, promise: one("Promise")?, name, file, tests })
}

/// Does the patch still fit the tree at `tree`?
///
/// # Errors
/// What git says.
pub fn check(mutant: &Mutant, tree: &Path) -> Result<(), String> {
    git_apply(tree, &["--check"], &mutant.file)
}

fn git_apply(tree: &Path, options: &[&str], patch: &Path) -> Result<(), String> {
    // A copy of the tree may lie inside a repository and is none of its business.
    let out = Command::new("git")
        .arg("apply")
        .args(options)
        .arg(patch)
        .current_dir(tree)
        .env("GIT_CEILING_DIRECTORIES", tree.parent().unwrap_or(tree))
        .env_remove("GIT_DIR")
        .output()
        .map_err(|e| format!("git: {e}"))?;
    if out.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&out.stderr).trim().to_owned()) }
}

/// A copy of the tree to break.
#[derive(Debug)]
pub struct Scratch {
    tree: PathBuf,
    target: PathBuf,
}

impl Scratch {
    /// Copies what git tracks, as it is in the work tree, to `target/mutants/tree`. What was built there
    /// before is used again.
    ///
    /// # Errors
    /// git's, or the file system's.
    pub fn new() -> io::Result<Self> {
        let base = root().join("target/mutants");
        let this = Self { tree: base.join("tree"), target: base.join("target") };
        fs::create_dir_all(&this.tree)?;
        let listed = Command::new("git").args(["ls-files", "-z"]).current_dir(root()).output()?;
        if !listed.status.success() {
            return Err(io::Error::other("git ls-files has failed"));
        }
        let mut kept = Vec::new();
        for name in listed.stdout.split(|b| *b == 0).filter(|n| !n.is_empty()) {
            let name = String::from_utf8_lossy(name).into_owned();
            copy_if_changed(&root().join(&name), &this.tree.join(&name))?;
            kept.push(this.tree.join(name));
        }
        remove_others(&this.tree, &kept)?;
        Ok(this)
    }

    /// Applies the patch, runs the tests until one fails, and takes the patch back.
    ///
    /// # Errors
    /// The file system's.
    pub fn run(&self, mutant: &Mutant) -> io::Result<Fate> {
        if let Err(why) = git_apply(&self.tree, &[], &mutant.file) {
            return Ok(Fate::Broken(why));
        }
        let fate = self.tests(&mutant.tests);
        if let Err(why) = git_apply(&self.tree, &["-R"], &mutant.file) {
            return Err(io::Error::other(format!("{}: cannot be taken back: {why}", mutant.name)));
        }
        fate
    }

    /// Runs sets of tests on the tree as it is.
    ///
    /// # Errors
    /// When cargo cannot be run.
    pub fn tests(&self, sets: &[Vec<String>]) -> io::Result<Fate> {
        for args in sets {
            let out = self.nextest(args)?;
            let text = String::from_utf8_lossy(&out.stderr).into_owned();
            if out.status.success() {
                continue;
            }
            return Ok(match failed_test(&text) {
                Some(test) => Fate::Caught(test),
                None => Fate::Broken(text.lines().rev().take(30).collect::<Vec<_>>().join("\n")),
            });
        }
        Ok(Fate::Survived)
    }

    fn nextest(&self, args: &[String]) -> io::Result<Output> {
        Command::new(env!("CARGO"))
            .args(["nextest", "run", "--fail-fast", "--color", "never", "--status-level", "fail"])
            .args(args)
            .current_dir(&self.tree)
            .env("CARGO_TARGET_DIR", &self.target)
            // Named seeds of a person's shell would change what is run.
            .env_remove("VMFS_SEED")
            .env_remove("VMFS_SEEDS")
            .output()
    }
}

/// The first test that nextest says has failed; on a busy machine one that ran out of time proves nothing.
fn failed_test(text: &str) -> Option<String> {
    let line = text.lines().map(str::trim).find(|l| {
        ["FAIL [", "TIMEOUT [", "SIGABRT [", "SIGSEGV [", "ABORT ["].iter().any(|s| l.starts_with(s))
    })?;
    let (_, test) = line.split_once(']')?;
    // Newer versions count the tests before the name.
    let test = test
        .trim()
        .trim_start_matches(|c: char| c == '(' || c == '/' || c == ')' || c.is_ascii_digit() || c == ' ');
    Some(if line.starts_with("TIMEOUT") { format!("{test} (ran out of time)") } else { test.to_owned() })
}

fn copy_if_changed(from: &Path, to: &Path) -> io::Result<()> {
    let Ok(new) = fs::read(from) else { return Ok(()) };
    if fs::read(to).is_ok_and(|old| old == new) {
        return Ok(());
    }
    if let Some(dir) = to.parent() {
        fs::create_dir_all(dir)?;
    }
    fs::write(to, new)?;
    fs::set_permissions(to, fs::metadata(from)?.permissions())
}

fn remove_others(dir: &Path, kept: &[PathBuf]) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() {
            remove_others(&path, kept)?;
        } else if !kept.contains(&path) {
            fs::remove_file(&path)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_failed_test_is_found_in_what_nextest_prints() {
        let old = "   Compiling x\n        FAIL [   0.512s] vmfs-proto::model promotion\n";
        assert_eq!(failed_test(old).as_deref(), Some("vmfs-proto::model promotion"));
        let new = "        FAIL [   0.512s] ( 3/12) vmfs-store::crash any_crash\n";
        assert_eq!(failed_test(new).as_deref(), Some("vmfs-store::crash any_crash"));
        let late = "     TIMEOUT [ 300.423s] (1/1) vmfs-store::crash any_crash\n";
        assert_eq!(failed_test(late).as_deref(), Some("vmfs-store::crash any_crash (ran out of time)"));
        assert_eq!(failed_test("error: could not compile `vmfs-proto`"), None);
    }
}
