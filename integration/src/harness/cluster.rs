//! A cluster as `vmfs up DIR` makes it, in a scratch directory.

use std::collections::BTreeMap;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use super::bytes;
use super::command::{Ran, try_run, try_run_within};
use super::lan::Lan;
use super::network::Network;
use super::reaper::Reaper;
use super::status::{ImageStatus, Status};
use super::wait::{secs, until, until_true};

/// How long the contract lets `vmfs up` take until every host is ready.
pub const READY_LIMIT: Duration = Duration::from_secs(5);
/// How long any copy may take to be in sync again in these tests (small images).
pub const SYNC_LIMIT: Duration = Duration::from_secs(60);
/// How long a mount may show an old name of another host's image.
const NAME_LIMIT: Duration = Duration::from_secs(5);

/// The repository's root.
#[must_use]
pub fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("invariant: the crate is inside the repository")
}

/// The release binary under test: `VMFS_BIN`, else the one that cargo builds now from this tree.
#[must_use]
pub fn vmfs_binary() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| {
        if let Some(path) = std::env::var_os("VMFS_BIN") {
            return PathBuf::from(path);
        }
        let mut build = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        build.current_dir(repository()).args([
            "build",
            "--release",
            "--bin",
            "vmfs",
            "--message-format=json-render-diagnostics",
        ]);
        let built = try_run_within(build, secs(1800)).ok();
        built
            .stdout
            .lines()
            .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
            .filter(|message| message["target"]["name"] == "vmfs")
            .find_map(|message| message["executable"].as_str().map(PathBuf::from))
            .expect("cargo names the executable it built")
    })
}

/// How a host's daemon was started, read from the running process, so that it can be started again alike.
#[derive(Debug, Clone)]
struct Launch {
    program: PathBuf,
    argv: Vec<String>,
    env: Vec<(String, String)>,
    cwd: PathBuf,
}

impl Launch {
    fn of(pid: u32) -> Self {
        let proc = PathBuf::from(format!("/proc/{pid}"));
        let words = |file: &str| -> Vec<String> {
            let bytes =
                std::fs::read(proc.join(file)).unwrap_or_else(|e| panic!("daemon {pid}: {file}: {e}"));
            let text = String::from_utf8_lossy(&bytes).into_owned();
            text.split_terminator('\0').map(str::to_owned).collect()
        };
        let link = |file: &str| {
            std::fs::read_link(proc.join(file)).unwrap_or_else(|e| panic!("daemon {pid}: {file}: {e}"))
        };
        let env = words("environ");
        let env = env.iter().filter_map(|e| e.split_once('=')).filter(|(k, _)| *k != "NOTIFY_SOCKET");
        let env = env.map(|(k, v)| (k.to_owned(), v.to_owned()));
        Self { program: link("exe"), argv: words("cmdline"), env: env.collect(), cwd: link("cwd") }
    }
}

/// A running cluster; its end takes daemons, mounts and files with it.
#[derive(Debug)]
pub struct Cluster {
    dir: PathBuf,
    hosts: Vec<String>,
    /// Hosts without a mount, which hold no data.
    witnesses: Vec<String>,
    launches: BTreeMap<String, Launch>,
    network: Option<Network>,
    lan: Option<Lan>,
    launcher: Vec<String>,
    // Last: everything above must be idle when it cleans up.
    reaper: Reaper,
}

impl Cluster {
    /// `vmfs up` with three hosts: a, b and c.
    #[must_use]
    pub fn start(name: &str) -> Self {
        Self::start_with(name, 3, false)
    }

    /// A cluster whose hosts can be cut off from each other (see [`Self::network`]).
    #[must_use]
    pub fn start_in_own_network(name: &str) -> Self {
        Self::start_with(name, 3, true)
    }

    /// `vmfs up` with the first `host_count` hosts of a, b, c, ...
    #[must_use]
    pub fn start_with(name: &str, host_count: usize, own_network: bool) -> Self {
        let hosts: Vec<_> = ('a'..='z').take(host_count).map(String::from).collect();
        let hosts: Vec<_> = hosts.iter().map(String::as_str).collect();
        let mut cluster = Self::empty(name, &hosts, &[], own_network);
        cluster.up();
        cluster
    }

    /// A cluster of hosts that the test enrols and starts itself, with [`Self::run_daemon`].
    ///
    /// Their files are to lie where `vmfs up` puts them; `witnesses` are those of `hosts` without a mount.
    #[must_use]
    pub fn empty(name: &str, hosts: &[&str], witnesses: &[&str], own_network: bool) -> Self {
        assert!(Path::new("/dev/fuse").exists(), "these tests need /dev/fuse");
        assert!(rustix::process::geteuid().is_root(), "these tests need to run as root");
        let mut reaper = Reaper::new(name);
        let dir = reaper.dir().join("vs");
        let network = own_network.then(|| Network::new(&mut reaper));
        let launcher = network.as_ref().map(Network::launcher).unwrap_or_default();
        let owned = |names: &[&str]| names.iter().map(|&n| n.to_owned()).collect();
        let (hosts, witnesses) = (owned(hosts), owned(witnesses));
        Self { dir, hosts, witnesses, launches: BTreeMap::new(), network, lan: None, launcher, reaper }
    }

    /// `vmfs up` with `host_count` hosts, which then move to network namespaces of their own ([`Self::lan`]).
    #[must_use]
    pub fn start_on_lan(name: &str, host_count: usize) -> Self {
        let mut cluster = Self::start_with(name, host_count, false);
        cluster.down();
        let lan = Lan::new(&mut cluster.reaper, &cluster.hosts);
        for host in &cluster.hosts {
            move_config(&cluster.config(host), host, &cluster.hosts, &lan);
        }
        cluster.lan = Some(lan);
        for host in cluster.hosts.clone() {
            cluster.run_daemon(&host, "vmfs-fuse");
        }
        cluster
    }

    /// Starts `program` (`vmfs-fuse` or `vmfs-replica`) for `host` as a service manager does, and waits until
    /// it says that it is ready.
    pub fn run_daemon(&mut self, host: &str, program: &str) {
        let notify_path = self.reaper.dir().join(format!("{host}.notify"));
        let notify =
            std::os::unix::net::UnixDatagram::bind(&notify_path).expect("the scratch directory is ours");
        notify.set_read_timeout(Some(secs(20))).expect("a socket takes a timeout");
        let mut env: Vec<_> = std::env::vars().collect();
        env.push(("NOTIFY_SOCKET".into(), path_text(&notify_path)));
        let config = path_text(&self.dir.join(host).join("vmfs.toml"));
        let argv = vec![program.to_owned(), "--config".into(), config];
        let program = vmfs_binary().to_owned();
        self.launches.insert(host.to_owned(), Launch { program, argv, env, cwd: "/".into() });
        self.spawn(host);
        let mut message = [0; 4096];
        loop {
            let n = notify.recv(&mut message).unwrap_or_else(|e| panic!("{host} never said READY=1: {e}"));
            if String::from_utf8_lossy(&message[..n]).lines().any(|l| l == "READY=1") {
                break;
            }
        }
        std::fs::remove_file(notify_path).expect("it is there");
    }

    /// `vmfs up --detach` on this cluster's directory; returns when it did.
    pub fn up(&mut self) -> Ran {
        let up = try_run_within(self.up_command(), secs(60)).ok();
        for host in self.hosts.clone() {
            self.launches.insert(host.clone(), Launch::of(self.pid(&host)));
        }
        up
    }

    /// The command of [`Self::up`].
    #[must_use]
    pub fn up_command(&self) -> Command {
        let mut words = self.launcher.clone();
        words.extend([path_text(vmfs_binary()), "up".into(), path_text(&self.dir)]);
        words.extend(["--hosts".into(), self.hosts.len().to_string(), "--detach".into()]);
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]);
        command
    }

    /// `vmfs down`; panics unless it succeeds and every daemon and mount is gone.
    pub fn down(&self) {
        let pids: Vec<u32> = self.hosts.iter().filter_map(|h| self.live_pid(h)).collect();
        let mut command = Command::new(vmfs_binary());
        command.arg("down").arg(&self.dir);
        let _ = try_run(command).ok();
        for pid in pids {
            until_true("the daemon is gone", secs(10), || !is_alive(pid));
        }
        for host in &self.hosts {
            assert!(!bytes::is_mounted(&self.mnt(host)), "{host} is still mounted after `vmfs down`");
        }
    }

    /// The directory given to `vmfs up`.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What `host`'s daemon has logged since the harness started it (not `vmfs up`).
    #[must_use]
    pub fn log(&self, host: &str) -> String {
        let path = self.reaper.dir().join(format!("{host}-restarted.log"));
        std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
    }

    /// A scratch directory beside the cluster, gone with it.
    #[must_use]
    pub fn scratch(&self) -> PathBuf {
        let scratch = self.reaper.dir().join("scratch");
        std::fs::create_dir_all(&scratch).expect("the scratch directory is ours");
        scratch
    }

    /// Has `command` (one line of shell) run when the cluster ends.
    pub fn at_end(&mut self, command: &str) {
        self.reaper.at_end(command);
    }

    /// Names of all hosts.
    #[must_use]
    pub fn hosts(&self) -> Vec<&str> {
        self.hosts.iter().map(String::as_str).collect()
    }

    /// The network of [`Self::start_in_own_network`].
    #[must_use]
    pub fn network(&self) -> &Network {
        self.network.as_ref().expect("this cluster was started in its own network")
    }

    /// The network of [`Self::start_on_lan`].
    #[must_use]
    pub fn lan(&mut self) -> &mut Lan {
        self.lan.as_mut().expect("this cluster was started on a network of its own")
    }

    /// Where `host`'s mount is.
    #[must_use]
    pub fn mnt(&self, host: &str) -> PathBuf {
        self.dir.join(host).join("mnt")
    }

    /// The file of `image` in `host`'s mount.
    #[must_use]
    pub fn file(&self, host: &str, image: &str) -> PathBuf {
        self.mnt(host).join(image)
    }

    /// Where `host`'s store is.
    #[must_use]
    pub fn store(&self, host: &str) -> PathBuf {
        self.dir.join(host).join("store")
    }

    /// `host`'s control socket.
    #[must_use]
    pub fn socket(&self, host: &str) -> PathBuf {
        self.dir.join(host).join("vmfs.sock")
    }

    /// `host`'s configuration file, as its daemon was given it.
    #[must_use]
    pub fn config(&self, host: &str) -> PathBuf {
        let launch = &self.launches[host];
        let at = launch.argv.iter().position(|w| w == "--config").expect("daemons are started with --config");
        launch.cwd.join(&launch.argv[at + 1])
    }

    /// `host`'s daemon; panics when it is not running.
    #[must_use]
    pub fn pid(&self, host: &str) -> u32 {
        self.live_pid(host).unwrap_or_else(|| panic!("{host}'s daemon is not running"))
    }

    /// `host`'s daemon, when it runs.
    #[must_use]
    pub fn live_pid(&self, host: &str) -> Option<u32> {
        let text = std::fs::read_to_string(self.dir.join(host).join("vmfs.pid")).ok()?;
        text.trim().parse().ok().filter(|&pid| is_alive(pid))
    }

    /// Runs `vmfs` against `host`'s daemon, however it ends.
    #[must_use]
    #[track_caller]
    pub fn vmfs(&self, host: &str, args: &[&str]) -> Ran {
        let mut command = Command::new(vmfs_binary());
        command.arg("--socket").arg(self.socket(host)).args(args);
        try_run(command)
    }

    /// `vmfs status --json` of `host`.
    #[must_use]
    #[track_caller]
    pub fn status(&self, host: &str) -> Status {
        let said = self.vmfs(host, &["status", "--json"]).ok();
        serde_json::from_str(&said.stdout).unwrap_or_else(|e| panic!("{e} in the status: {said}"))
    }

    /// What `host` says about `image`; none when it does not know it or does not answer.
    #[must_use]
    pub fn image(&self, host: &str, image: &str) -> Option<ImageStatus> {
        let said = self.vmfs(host, &["status", "--json"]);
        let status: Status = serde_json::from_str(&said.stdout).ok()?;
        status.image(image).cloned()
    }

    /// The host that says it owns `image`; none while nobody does.
    #[must_use]
    pub fn owner(&self, image: &str) -> Option<String> {
        let owns = |h: &&String| {
            self.live_pid(h).is_some() && self.image(h, image).is_some_and(|i| i.role == "owner")
        };
        self.hosts.iter().find(owns).cloned()
    }

    /// Kills `host`'s daemon as a crash would, and waits until it is gone.
    pub fn kill9(&self, host: &str) {
        let pid = self.pid(host);
        signal(pid, rustix::process::Signal::KILL);
        until_true("the killed daemon is gone", secs(10), || !is_alive(pid));
    }

    /// Sends `signal` to `host`'s daemon.
    pub fn signal(&self, host: &str, sig: rustix::process::Signal) {
        signal(self.pid(host), sig);
    }

    /// Starts `host`'s daemon again, as `vmfs up` had started it, and waits until it answers.
    pub fn restart(&self, host: &str) {
        self.spawn(host);
        until(&format!("{host} answers after its restart"), secs(20), || {
            self.live_pid(host)?;
            self.vmfs(host, &["status", "--json"]).status.success().then_some(())
        });
        until_true(&format!("{host} is mounted after its restart"), secs(10), || {
            self.witnesses.iter().any(|w| w == host) || bytes::is_mounted(&self.mnt(host))
        });
    }

    fn spawn(&self, host: &str) {
        let launch = &self.launches[host];
        let log = std::fs::File::options()
            .append(true)
            .create(true)
            .open(self.reaper.dir().join(format!("{host}-restarted.log")))
            .expect("the scratch directory is ours");
        let launcher = self.lan.as_ref().map_or_else(|| self.launcher.clone(), |lan| lan.launcher(host));
        let mut command = if let Some((program, words)) = launcher.split_first() {
            // The launcher cannot choose argv[0], bash can.
            let mut c = Command::new(program);
            c.args(words).args(["bash", "-c", "exec -a \"$1\" \"$0\" \"${@:2}\""]).arg(&launch.program);
            c.args(&launch.argv);
            c
        } else {
            let mut c = Command::new(&launch.program);
            c.arg0(&launch.argv[0]).args(&launch.argv[1..]);
            c
        };
        command.env_clear().envs(launch.env.iter().cloned()).current_dir(&launch.cwd);
        command.stdin(Stdio::null()).stdout(log.try_clone().expect("a file can be shared")).stderr(log);
        let mut child = command.process_group(0).spawn().expect("the daemon can be started");
        std::thread::spawn(move || child.wait());
    }

    /// Waits, with `vmfs wait` at its owner, until every copy of `image` is in sync.
    #[track_caller]
    pub fn wait_in_sync(&self, image: &str) {
        let owner = until(&format!("{image} has an owner"), SYNC_LIMIT, || self.owner(image));
        let limit = SYNC_LIMIT.as_secs().to_string();
        let _ = self.vmfs(&owner, &["wait", image, "--in-sync", "--timeout", &limit]).ok();
    }

    /// Waits until `host` shows `image` in its mount with the size it has at its owner.
    pub fn wait_visible(&self, host: &str, image: &str) {
        let path = self.file(host, image);
        until_true(&format!("{} is there", path.display()), secs(20), || path.exists());
    }

    /// Panics unless `image` has the same bytes in every mount and passes `vmfs verify --deep` everywhere.
    ///
    /// Nothing may be writing it.
    #[track_caller]
    pub fn assert_copies_identical(&self, image: &str) {
        self.wait_in_sync(image);
        let first = self.file(&self.hosts[0], image);
        for host in self.hosts.iter().filter(|h| !self.witnesses.contains(h)) {
            self.wait_visible(host, image);
            // Mounts look for changed names of others' images several times a second: a moment ago another
            // image may have had this name.
            let start = Instant::now();
            while let Err(difference) = bytes::compare(&first, &self.file(host, image)) {
                assert!(start.elapsed() < NAME_LIMIT, "{difference}");
                std::thread::sleep(Duration::from_millis(50));
            }
            let _ = self.vmfs(host, &["verify", image, "--deep"]).ok();
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            show_logs(self.reaper.dir());
        }
    }
}

/// Has the host listen where the network has it, and look for the others there.
fn move_config(path: &Path, host: &str, hosts: &[String], lan: &Lan) {
    let text = std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let mut config: toml::Table = toml::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let network = config.get_mut("network").and_then(toml::Value::as_table_mut);
    network.expect("`vmfs up` says where to listen").insert("listen".into(), lan.listen(host).into());
    let others = hosts.iter().filter(|h| *h != host);
    let peers: toml::Table = others.map(|h| (h.clone(), lan.listen(h).into())).collect();
    config.insert("peers".into(), peers.into());
    let text = toml::to_string(&config).expect("what was read can be written");
    std::fs::write(path, text).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
}

fn path_text(path: &Path) -> String {
    path.to_str().expect("paths of these tests are text").to_owned()
}

/// Whether the process exists and is not a zombie. While other threads of it are still ending, its first
/// thread may be a zombie already: then it still holds its files and locks.
#[must_use]
pub fn is_alive(pid: u32) -> bool {
    let Ok(stat) = std::fs::read_to_string(format!("/proc/{pid}/stat")) else { return false };
    let Some((_, rest)) = stat.rsplit_once(") ") else { return false };
    let threads = rest.split(' ').nth(17).and_then(|n| n.parse::<u32>().ok()).unwrap_or(0);
    !rest.starts_with(['Z', 'X']) || threads > 1
}

/// Sends a signal to one process.
pub fn signal(pid: u32, sig: rustix::process::Signal) {
    let raw = i32::try_from(pid).expect("invariant: the kernel's process ids fit");
    let pid = rustix::process::Pid::from_raw(raw).expect("invariant: a process id is not 0");
    rustix::process::kill_process(pid, sig).unwrap_or_else(|e| panic!("cannot send {sig:?} to {raw}: {e}"));
}

/// Prints the ends of all logs, for the report of a failed test.
fn show_logs(dir: &Path) {
    let mut command = Command::new("bash");
    command.args(["-c", r#"find "$1" -xdev -name '*.log' -size +0 2>/dev/null | sort | while read -r f; do echo "=== $f"; tail -n 40 "$f"; done"#, "bash"]);
    command.arg(dir);
    if let Ok(output) = command.output() {
        eprintln!("{}", String::from_utf8_lossy(&output.stdout));
    }
}
