//! A real datastore from nothing: `datastore init`, `host invite`, `host join`, services, a witness.
//! Needs root and `/dev/fuse`.

#![expect(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

const VMFS: &str = env!("CARGO_BIN_EXE_vmfs");

/// One host's files.
struct Host {
    dir: PathBuf,
    port: u16,
    daemon: Option<Child>,
}

impl Host {
    fn new(place: &Path, name: &str) -> Self {
        assert!(rustix::process::geteuid().is_root(), "these tests mount: run them as root");
        let dir = place.join(name);
        std::fs::create_dir_all(dir.join("mnt")).unwrap();
        let free = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        Self { dir, port: free.local_addr().unwrap().port(), daemon: None }
    }
    fn path(&self, name: &str) -> String {
        self.dir.join(name).to_str().unwrap().to_owned()
    }
    /// `--address`, `--config` and the like.
    fn place(&self) -> Vec<String> {
        let mut words = vec!["--address".to_owned(), format!("127.0.0.1:{}", self.port)];
        words.extend(["--listen".to_owned(), format!("127.0.0.1:{}", self.port)]);
        for (option, name) in [("--config", "vmfs.toml"), ("--identity", "identity"), ("--store", "store")] {
            words.extend([option.to_owned(), self.path(name)]);
        }
        words
    }
    /// Moves the control socket from its default into the host's directory.
    fn own_socket(&self) {
        let path = self.dir.join("vmfs.toml");
        let text = std::fs::read_to_string(&path).unwrap();
        let moved = text.replace("/run/vmfs/vmfs.sock", &self.path("vmfs.sock"));
        assert_ne!(moved, text);
        std::fs::write(&path, moved).unwrap();
    }
    /// Starts the daemon and returns when it tells its service manager that it is ready.
    fn start(&mut self, program: &str) {
        self.own_socket();
        let notify = self.dir.join("notify");
        let socket = UnixDatagram::bind(&notify).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        let log = std::fs::File::create(self.dir.join("log")).unwrap();
        let mut command = Command::new(VMFS);
        command.arg0(program).arg("--config").arg(self.path("vmfs.toml")).env("NOTIFY_SOCKET", &notify);
        self.daemon = Some(command.stdin(Stdio::null()).stderr(log).spawn().unwrap());
        let mut said = [0; 64];
        let n = socket.recv(&mut said).unwrap_or_else(|e| panic!("{e}: {}", self.log()));
        assert_eq!(&said[..n], b"READY=1");
    }
    fn stop(&mut self) {
        let Some(mut daemon) = self.daemon.take() else { return };
        kill_process(Pid::from_raw(i32::try_from(daemon.id()).unwrap()).unwrap(), Signal::TERM).unwrap();
        let status = daemon.wait().unwrap();
        assert_eq!(status.code(), Some(0), "a clean stop: {}", self.log());
    }
    fn log(&self) -> String {
        std::fs::read_to_string(self.dir.join("log")).unwrap_or_default()
    }
    fn vmfs(&self, args: &[&str]) -> Output {
        Command::new(VMFS).arg("--socket").arg(self.path("vmfs.sock")).args(args).output().unwrap()
    }
    fn ok(&self, args: &[&str]) -> String {
        let output = self.vmfs(args);
        assert!(output.status.success(), "{args:?}: {output:?}\n{}", self.log());
        String::from_utf8(output.stdout).unwrap()
    }
    fn json(&self, args: &[&str]) -> serde_json::Value {
        serde_json::from_str(&self.ok(&[args, &["--json"]].concat())).unwrap()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if let Some(daemon) = &mut self.daemon {
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
        let mount = self.dir.join("mnt");
        if std::fs::read_to_string("/proc/self/mountinfo").unwrap().contains(mount.to_str().unwrap()) {
            let _ = rustix::mount::unmount(&mount, rustix::mount::UnmountFlags::DETACH);
        }
    }
}

fn run(args: &[String]) -> Output {
    Command::new(VMFS).args(args).output().unwrap()
}

fn words(first: &[&str], rest: Vec<String>) -> Vec<String> {
    first.iter().map(|w| (*w).to_owned()).chain(rest).collect()
}

#[track_caller]
fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(30);
    while !condition() {
        assert!(Instant::now() < end, "in vain: {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn two_hosts_and_a_witness_from_nothing() {
    let place = tempfile::Builder::new().prefix("vmfs-ds").tempdir().unwrap();
    let [mut a, mut b, mut w] = ["a", "b", "w"].map(|name| Host::new(place.path(), name));
    let mount = ["--mount".to_owned(), a.path("mnt")];
    let init = words(&["datastore", "init", "--host", "a"], [a.place(), mount.to_vec()].concat());
    assert!(run(&init).status.success());
    a.start("vmfs-fuse");

    for (host, name) in [(&b, "b"), (&w, "w")] {
        let said = a.ok(&["host", "invite", name, "--output", &host.path("invitation")]);
        assert!(said.contains("good for one use"), "{said}");
        let mode = std::fs::metadata(host.path("invitation")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }
    let mount = ["--mount".to_owned(), b.path("mnt")];
    let join = words(&["host", "join", &b.path("invitation")], [b.place(), mount.to_vec()].concat());
    let joined = run(&join);
    assert!(joined.status.success(), "{joined:?}\n{}", a.log());
    let join = words(&["host", "join", &w.path("invitation"), "--witness"], w.place());
    assert!(run(&join).status.success());
    assert!(!b.dir.join("identity/ca.key").exists(), "the CA's key stays where it was made");

    // A used invitation is worth nothing on another machine, and nothing is left there.
    let thief = Host::new(place.path(), "thief");
    let again = run(&words(&["host", "join", &b.path("invitation")], thief.place()));
    assert_eq!(again.status.code(), Some(1));
    assert_eq!(String::from_utf8(again.stderr).unwrap().lines().count(), 1);
    assert!(!thief.dir.join("vmfs.toml").exists());

    b.start("vmfs-fuse");
    w.start("vmfs-replica");
    eventually("all know all", || {
        [&a, &b, &w].iter().all(|h| {
            let hosts = h.json(&["host", "list"]);
            let hosts = hosts["hosts"].as_array().unwrap();
            hosts.len() == 3 && hosts.iter().all(|x| x["this"] == true || x["connected"] == true)
        })
    });
    std::fs::write(a.dir.join("mnt/x.img"), "hello").unwrap();
    let refused = a.vmfs(&["replica", "add", "x.img", "nobody"]);
    assert_eq!(refused.status.code(), Some(1), "{refused:?}");
    a.ok(&["wait", "x.img", "--in-sync", "--timeout", "30"]);
    a.ok(&["replica", "add", "x.img", "w", "--witness"]);
    a.ok(&["wait", "x.img", "--in-sync", "--timeout", "30"]);
    let members = a.json(&["policy", "show", "x.img"])["members"].clone();
    let mut roles: Vec<_> =
        members.as_array().unwrap().iter().map(|m| format!("{} {}", m["host"], m["role"])).collect();
    roles.sort();
    assert_eq!(roles, [r#""a" "owner""#, r#""b" "replica""#, r#""w" "witness""#]);
    assert_eq!(w.json(&["ls"])["images"][0]["role"], "witness");
    assert_eq!(std::fs::read_to_string(b.dir.join("mnt/x.img")).unwrap(), "hello");

    let refused = a.vmfs(&["host", "remove", "w"]);
    assert_eq!(refused.status.code(), Some(1), "a member is not removed: {refused:?}");
    a.ok(&["replica", "remove", "x.img", "w"]);
    w.stop();
    assert!(!a.ok(&["host", "remove", "w"]).contains("\nw "));
    b.stop();
    a.stop();
}

#[test]
fn daemons_name_what_is_wrong_with_their_identity_in_one_line() {
    let place = tempfile::Builder::new().prefix("vmfs-id").tempdir().unwrap();
    let a = Host::new(place.path(), "a");
    assert!(run(&words(&["datastore", "init", "--host", "a"], a.place())).status.success());
    a.own_socket();
    let attempt = |what: &str| {
        let mut command = Command::new(VMFS);
        command.arg0("vmfs-replica").arg("--config").arg(a.path("vmfs.toml")).stderr(Stdio::piped());
        let mut daemon = command.spawn().unwrap();
        let end = Instant::now() + Duration::from_secs(30);
        while daemon.try_wait().unwrap().is_none() {
            if Instant::now() > end {
                daemon.kill().unwrap();
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let output = daemon.wait_with_output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        let errors: Vec<_> = said.lines().filter(|l| l.starts_with("vmfs-replica: ")).collect();
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(errors.len() == 1 && errors[0].contains(what), "{said}");
        assert!(!a.dir.join("vmfs.sock").exists(), "no trace");
    };
    let key = a.dir.join("identity/host.key");
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o644)).unwrap();
    attempt("host.key has mode 0644");
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o600)).unwrap();
    let cert = a.dir.join("identity/host.crt");
    let good = std::fs::read(&cert).unwrap();
    std::fs::write(&cert, "nonsense").unwrap();
    attempt("host.crt");
    std::fs::remove_file(&cert).unwrap();
    attempt("cannot read");
    std::fs::write(&cert, good).unwrap();
    let config = std::fs::read_to_string(a.dir.join("vmfs.toml")).unwrap();
    std::fs::write(a.dir.join("vmfs.toml"), config.replace("host = \"a\"", "host = \"b\"")).unwrap();
    attempt("\"b\"");
}
