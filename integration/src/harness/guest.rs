//! The journal guest of `../shared/guest`: a tiny Linux that writes numbered records to its disk and says
//! `ACK n` on its console only after fdatasync returned, and the check of what is left of them.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::Duration;

use rustix::fs::FlockOperation;

use super::cluster::repository;
use super::command::{Ran, try_run, try_run_within, wait_within};
use super::qmp::Qmp;
use super::wait::{secs, until, until_true};

/// From the start of QEMU to the first acknowledgement; 2-3 s on an idle machine.
const BOOT_LIMIT: Duration = secs(60);

/// Kernel, initramfs and host-side verifier, built once per machine and boot of the build scripts.
#[derive(Debug)]
pub struct Kit {
    dir: PathBuf,
}

impl Kit {
    /// The kit, built now when it is not there yet (some seconds).
    #[must_use]
    pub fn get() -> &'static Self {
        static KIT: OnceLock<Kit> = OnceLock::new();
        KIT.get_or_init(|| {
            let scripts = shared("guest");
            let base = std::env::temp_dir().join("vmfs-guest-kit");
            std::fs::create_dir_all(&base).unwrap_or_else(|e| panic!("{}: {e}", base.display()));
            let lock = std::fs::File::create(base.join("lock")).expect("the kit's directory is ours");
            // Tests run in parallel processes: one builds, the others wait. Closing the file unlocks.
            rustix::fs::flock(&lock, FlockOperation::LockExclusive).expect("a local file can be locked");
            let complete = base.join("complete");
            if !complete.exists() {
                let mut build = Command::new(scripts.join("build-guest.sh"));
                build.arg("mini").env("WORK", &base);
                let _ = try_run_within(build, secs(300)).ok();
                std::fs::write(&complete, "").expect("the kit's directory is ours");
            }
            Kit { dir: base.join("guest") }
        })
    }

    /// The kernel.
    #[must_use]
    pub fn kernel(&self) -> PathBuf {
        self.dir.join("vmlinuz")
    }

    /// The initramfs.
    #[must_use]
    pub fn initramfs(&self) -> PathBuf {
        self.dir.join("initramfs.gz")
    }

    /// The directory that `../shared/guest/lab.sh` expects as `WORK` to find the kit in.
    #[must_use]
    pub fn work_dir(&self) -> &Path {
        self.dir.parent().expect("invariant: the kit is in WORK/guest")
    }
}

/// A file or directory of `../shared`, which lies beside the repository.
#[must_use]
pub fn shared(path: &str) -> PathBuf {
    let shared = repository().parent().expect("the repository is not the root").join("shared").join(path);
    assert!(shared.exists(), "{} is missing: it has to lie beside the repository", shared.display());
    shared
}

/// What the guest does with its disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Journal {
    /// Records scattered over the bare disk.
    Raw,
    /// Records appended to a file on the disk's ext4.
    File,
}

/// How to start a guest.
#[derive(Debug, Clone)]
pub struct GuestSpec {
    /// The disk image.
    pub image: PathBuf,
    /// `raw` or `qcow2`.
    pub format: &'static str,
    /// QEMU's cache mode.
    pub cache: &'static str,
    /// QEMU's asynchronous I/O.
    pub aio: &'static str,
    /// What it writes where.
    pub journal: Journal,
    /// Seed of the records' places and contents.
    pub seed: u64,
    /// Records per fdatasync.
    pub burst: u64,
    /// Pause between two acknowledgements.
    pub sleep_ms: u64,
    /// Bytes of the disk that a raw journal uses, in the guest's notation.
    pub span: &'static str,
    /// Wait for a migration instead of booting.
    pub incoming: bool,
}

impl GuestSpec {
    /// A guest that writes as fast as it can, with `cache=none,aio=native`.
    #[must_use]
    pub fn new(image: impl Into<PathBuf>, journal: Journal) -> Self {
        Self {
            image: image.into(),
            format: "raw",
            cache: "none",
            aio: "native",
            journal,
            seed: 1,
            burst: 4,
            sleep_ms: 0,
            span: "16M",
            incoming: false,
        }
    }

    fn kernel_arguments(&self, mode: &str) -> String {
        format!(
            "console=ttyS0 quiet panic=-1 gj.mode={mode} gj.seed={} gj.burst={} gj.size={} gj.sleep={}",
            self.seed, self.burst, self.span, self.sleep_ms
        )
    }

    /// Boots the guest; its console and monitor are files in `scratch` that start with `name`.
    #[must_use]
    pub fn boot(&self, scratch: &Path, name: &str) -> Guest {
        let mode = match self.journal {
            Journal::Raw => "raw",
            Journal::File => "file",
        };
        self.boot_with(scratch, name, &self.kernel_arguments(mode))
    }

    fn boot_with(&self, scratch: &Path, name: &str, kernel_arguments: &str) -> Guest {
        let kit = Kit::get();
        let console = scratch.join(format!("{name}.console"));
        let monitor = scratch.join(format!("{name}.qmp"));
        for old in [&console, &monitor] {
            let _ = std::fs::remove_file(old);
        }
        let Self { format, cache, aio, .. } = self;
        let drive = format!(
            "file={},format={format},if=none,id=d,cache={cache},aio={aio},werror=enospc",
            self.image.display()
        );
        let mut qemu = Command::new("qemu-system-x86_64");
        qemu.args(["-M", "q35", "-accel", "tcg,thread=multi", "-m", "256", "-nodefaults", "-no-reboot"])
            .args(["-display", "none", "-serial", &format!("file:{}", console.display())])
            .args(["-qmp", &format!("unix:{},server=on,wait=off", monitor.display())])
            .arg("-kernel")
            .arg(kit.kernel())
            .arg("-initrd")
            .arg(kit.initramfs())
            .args(["-append", kernel_arguments, "-drive", &drive, "-device", "virtio-blk-pci,drive=d"]);
        if self.incoming {
            qemu.args(["-incoming", "defer"]);
        }
        let errors_path = scratch.join(format!("{name}.qemu.log"));
        let errors = std::fs::File::create(&errors_path).expect("the scratch directory is ours");
        let child = qemu
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(errors)
            .process_group(0)
            .spawn()
            .unwrap_or_else(|e| panic!("cannot start qemu-system-x86_64: {e}"));
        Guest { child, console, monitor, errors: errors_path }
    }

    /// Checks that nothing acknowledged up to `acked` is missing from `image`, that write order was kept and
    /// nothing is torn.
    ///
    /// A raw journal is read on the host. A journal in a file is checked by a guest that boots the image
    /// itself (not a copy) and mounts its filesystem, which replays the filesystem's journal.
    #[track_caller]
    pub fn assert_journal(&self, scratch: &Path, acked: i64) {
        assert!(acked >= 0, "a check without one acknowledged record proves nothing");
        match self.journal {
            Journal::Raw => {
                let ran = self.verify_raw(acked);
                println!("{}", ran.stdout.trim());
                let _ = ran.ok();
            }
            Journal::File => {
                let arguments = format!("{} gj.kind=append gj.acked={acked}", self.kernel_arguments("check"));
                let mut guest = self.boot_with(scratch, "check", &arguments);
                guest.wait_end(secs(90));
                let said = guest.console_text();
                let verdict = said.lines().find(|l| l.starts_with("VERIFY"));
                println!("{}", verdict.unwrap_or("no verdict"));
                assert!(verdict.is_some_and(|v| v.starts_with("VERIFY ok")), "the check guest said:\n{said}");
            }
        }
    }

    /// Writes the last burst of a raw journal again, whole.
    ///
    /// Of a burst that no flush confirmed, any part may be there, and the next boot goes on behind it: what
    /// is missing of it would look like a loss in the next check. (A filesystem's journal hides such parts.)
    #[track_caller]
    pub fn complete_burst(&self) {
        if self.journal != Journal::Raw {
            return;
        }
        let said = self.verify_raw(0).stdout;
        let last = said.split_whitespace().find_map(|word| word.strip_prefix("last=")?.parse::<u64>().ok());
        let first = last.expect("a journal with records has a last one") / self.burst * self.burst;
        let mut write = Command::new(Kit::get().dir.join("gjournal"));
        write.args(["write", "--kind", "slots", "--size", self.span, "--target"]).arg(&self.image);
        write.args(["--seed", &self.seed.to_string(), "--burst", &self.burst.to_string()]);
        write.args(["--start", &first.to_string(), "--count", &self.burst.to_string()]);
        let _ = try_run(write).ok();
    }

    /// `gjournal verify` of a raw journal, however it ends.
    #[must_use]
    pub fn verify_raw(&self, acked: i64) -> Ran {
        let mut verify = Command::new(Kit::get().dir.join("gjournal"));
        verify.args(["verify", "--kind", "slots", "--size", self.span, "--target"]).arg(&self.image);
        verify.args(["--seed", &self.seed.to_string(), "--burst", &self.burst.to_string()]);
        verify.args(["--acked", &acked.to_string()]);
        try_run(verify)
    }
}

/// A running guest; killed when dropped.
#[derive(Debug)]
pub struct Guest {
    child: Child,
    console: PathBuf,
    monitor: PathBuf,
    errors: PathBuf,
}

impl Guest {
    /// QEMU's process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Everything the guest has printed.
    #[must_use]
    pub fn console_text(&self) -> String {
        // QEMU makes the file when it starts; serial lines end in CR LF.
        std::fs::read(&self.console)
            .map(|b| String::from_utf8_lossy(&b).replace('\r', ""))
            .unwrap_or_default()
    }

    /// The last record that the guest knows to be durable; -1 for none. Counts whole lines only.
    #[must_use]
    pub fn acked(&self) -> i64 {
        last_acked(&self.console_text())
    }

    /// Waits until the guest has acknowledged record `n`; panics when the guest ends or reports an error.
    #[track_caller]
    pub fn wait_acked(&mut self, n: i64) {
        until(&format!("the guest acknowledges record {n}"), BOOT_LIMIT, || {
            if self.acked() >= n {
                return Some(());
            }
            let ended = self.child.try_wait().expect("QEMU is our child");
            assert!(ended.is_none(), "QEMU ended ({ended:?}): {}\n{}", self.errors(), self.console_text());
            self.assert_no_errors();
            None
        });
    }

    /// Waits until the guest has acknowledged `more` records more than now.
    #[track_caller]
    pub fn wait_more(&mut self, more: i64) {
        let now = self.acked();
        self.wait_acked(now + more);
    }

    /// Panics when the guest saw an error of its disk.
    #[track_caller]
    pub fn assert_no_errors(&self) {
        let text = self.console_text();
        let bad = ["WRITE-ERROR", "SYNC-ERROR", "MOUNT-FAILED", "Kernel panic", "I/O error", "EXT4-fs error"];
        let said = text.lines().find(|l| bad.iter().any(|b| l.contains(b)));
        assert!(said.is_none(), "the guest said: {said:?}\n{}", self.errors());
    }

    /// Connects to the monitor.
    #[must_use]
    pub fn qmp(&self) -> Qmp {
        Qmp::connect(&self.monitor)
    }

    /// SIGKILL, and waits for the end.
    pub fn kill9(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Waits until QEMU ends by itself.
    #[track_caller]
    pub fn wait_end(&mut self, limit: Duration) {
        let ended = wait_within(&mut self.child, limit);
        assert!(ended.is_some(), "QEMU did not end within {limit:?}:\n{}", self.console_text());
    }

    /// What QEMU printed on standard error.
    #[must_use]
    pub fn errors(&self) -> String {
        std::fs::read_to_string(&self.errors).unwrap_or_default()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.kill9();
    }
}

/// The last record that this console says is durable; -1 for none. Counts whole lines only.
#[must_use]
pub fn last_acked(console: &str) -> i64 {
    let whole = console.rsplit_once('\n').map_or("", |(whole, _)| whole);
    whole.lines().rev().find_map(|l| l.strip_prefix("ACK ")?.parse().ok()).unwrap_or(-1)
}

/// Makes a raw image of `bytes` bytes for a journal: empty, or with an ext4 on it.
pub fn make_disk(path: &Path, journal: Journal, bytes: u64) {
    let file = std::fs::File::create_new(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    file.set_len(bytes).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    if journal == Journal::File {
        let mut mkfs = Command::new("mkfs.ext4");
        mkfs.args(["-q", "-F"]).arg(path);
        let _ = try_run(mkfs).ok();
    }
    file.sync_all().unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    until_true("the disk is there", secs(5), || path.exists());
}
