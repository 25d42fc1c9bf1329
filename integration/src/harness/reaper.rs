//! A scratch directory that leaves nothing behind, even when the test is killed.
//!
//! A shell of its own session waits for the end of the test process (its standard input closes), then ends
//! every process whose command line names the directory, detaches every mount below it, runs the commands
//! it was told on the way in reverse order, and removes the directory. Only that path is ever used to choose
//! what to end, and it is unique to the test.

use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::Duration;

use super::command::wait_within;

const SCRIPT: &str = r#"
trap '' INT TERM HUP
commands=()
while IFS= read -r line; do commands=("$line" "${commands[@]}"); done
for round in 1 2 3 4 5; do
    found=
    for p in /proc/[0-9]*; do
        pid=${p#/proc/}
        [ "$pid" != $$ ] || continue
        if tr '\0' '\n' 2>/dev/null <"$p/cmdline" | grep -qF -- "$REAP_DIR/"; then kill -9 "$pid" 2>/dev/null; found=1; fi
    done
    [ -n "$found" ] || break
    sleep 0.05
done
awk -v d="$REAP_DIR/" 'index($5, d) == 1 {print $5}' /proc/self/mountinfo | tac | while IFS= read -r m; do
    umount "$m" 2>/dev/null || umount -l "$m" 2>/dev/null
done
for c in "${commands[@]}"; do bash -c "$c" || echo "reaper: failed: $c" >&2; done
[ -n "$REAP_KEEP" ] || rm -rf --one-file-system "$REAP_DIR"
"#;

/// Owns a scratch directory and all that was started in it.
#[derive(Debug)]
pub struct Reaper {
    dir: PathBuf,
    shell: Child,
    orders: Option<ChildStdin>,
}

impl Reaper {
    /// Makes a new directory below `TMPDIR` (default `/tmp`) and starts its keeper.
    ///
    /// With `VMFS_TEST_KEEP` set, the files (not the processes and mounts) stay for a look.
    #[must_use]
    pub fn new(name: &str) -> Self {
        let dir = tempfile::Builder::new()
            .prefix(&format!("vmfs-{name}-"))
            .tempdir()
            .expect("a scratch directory can be made below TMPDIR")
            .keep();
        // QEMU under libvirt runs as a user of its own and has to get to the mounts.
        std::fs::set_permissions(&dir, std::fs::Permissions::from_mode(0o755))
            .expect("the directory is ours");
        let mut command = Command::new("bash");
        command
            .args(["-c", SCRIPT])
            .env("REAP_DIR", &dir)
            .env("REAP_KEEP", std::env::var_os("VMFS_TEST_KEEP").unwrap_or_default())
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .process_group(0);
        let mut shell = command.spawn().expect("bash is there");
        let orders = shell.stdin.take();
        Self { dir, shell, orders }
    }

    /// The directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Has `command` (one line of shell) run at the end, before commands that were given earlier.
    pub fn at_end(&mut self, command: &str) {
        assert!(!command.contains('\n'), "one line each: {command}");
        if let Some(orders) = &mut self.orders {
            writeln!(orders, "{command}").expect("the reaper reads its orders");
        }
    }
}

impl Drop for Reaper {
    fn drop(&mut self) {
        drop(self.orders.take());
        if wait_within(&mut self.shell, Duration::from_secs(60)).is_none() {
            eprintln!("reaper: still cleaning {} after 60 s", self.dir.display());
        }
    }
}
