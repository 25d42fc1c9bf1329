//! Promise 9: bad input gets one clear line and the right exit code, and leaves no trace.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use integration::harness::cluster::vmfs_binary;
use integration::harness::command::{Ran, bash, run, try_run_within};
use integration::harness::wait::secs;
use integration::harness::{Cluster, bytes, seed, until};
use rand::{Rng, RngCore};
use toml::{Table, Value};
use vmfs_net::pki::{CaKey, HostIdentity, Validity};

/// Names, sizes, times and content sums of everything in a host's directory.
fn fingerprint(dir: &Path) -> String {
    bash(
        r#"cd "$1"; find . -xdev -printf '%p %y %m %s %T@\n' | sort; find . -xdev -type f -print0 | sort -z | xargs -0 -r sha256sum"#,
        [dir],
    )
    .stdout
}

/// Host b of a cluster that is down, for daemons that must not start.
struct Bench {
    cluster: Cluster,
    config: Table,
}

impl Bench {
    fn new(name: &str) -> Self {
        let cluster = Cluster::start(name);
        std::fs::write(cluster.file("b", "x"), bytes::noise(1, 65536)).unwrap();
        cluster.assert_copies_identical("x");
        cluster.down();
        let text = std::fs::read_to_string(cluster.config("b")).unwrap();
        let mut config: Table = toml::from_str(&text).unwrap();
        // Only the error itself is of interest, not the log.
        config.insert("log".into(), "off".into());
        Self { cluster, config }
    }

    /// A path of the configuration, as the daemon takes it.
    fn path(&self, section: &str, key: &str) -> PathBuf {
        let value = self.config[section][key].as_str().unwrap();
        self.cluster.config("b").parent().unwrap().join(value)
    }

    fn start(&self, config: &str) -> Ran {
        let path = self.cluster.config("b").with_file_name("bad.toml");
        std::fs::write(&path, config).unwrap();
        let mut daemon = Command::new(vmfs_binary());
        daemon.arg0("vmfs-fuse").arg("--config").arg(&path);
        let ran = try_run_within(daemon, secs(20));
        std::fs::remove_file(&path).unwrap();
        ran
    }

    /// Starts b with a changed configuration: exactly one line, which contains all of `words`, and
    /// everything as it was.
    #[track_caller]
    fn refused(&self, change: impl FnOnce(&mut Table), words: &[&str]) {
        let mut config = self.config.clone();
        change(&mut config);
        self.refused_text(&toml::to_string(&config).unwrap(), words);
    }

    #[track_caller]
    fn refused_text(&self, config: &str, words: &[&str]) {
        let dir = self.cluster.dir().join("b");
        // Making and removing the configuration touches its directory: once before, too.
        std::fs::write(dir.join("bad.toml"), "").unwrap();
        std::fs::remove_file(dir.join("bad.toml")).unwrap();
        let times =
            |text: String| text.lines().filter(|l| !l.starts_with(". ")).collect::<Vec<_>>().join("\n");
        let before = times(fingerprint(&dir));
        let ran = self.start(config).refused(1);
        println!("{}", ran.stderr.trim());
        for word in words {
            assert!(ran.stderr.contains(word), "the message does not name {word:?}: {}", ran.stderr);
        }
        assert_eq!(before, times(fingerprint(&dir)), "something changed in b's directory");
    }
}

fn set(section: &str, key: &str, value: impl Into<Value>) -> impl FnOnce(&mut Table) {
    move |config| {
        let section = config.entry(section).or_insert_with(|| Table::new().into());
        section.as_table_mut().unwrap().insert(key.into(), value.into());
    }
}

#[test]
fn bad_configurations_are_refused() {
    let bench = Bench::new("badconfig");
    bench.refused(|c| _ = c.insert("colour".into(), "red".into()), &["bad.toml", "colour"]);
    bench.refused(set("store", "segmnt_size", "16MiB"), &["bad.toml", "segmnt_size"]);
    bench.refused(set("store", "segment_size", "17MiB"), &["segment_size"]);
    bench.refused(set("network", "listen", "nowhere"), &["bad.toml", "line ", "column "]);
    bench.refused(|c| _ = c.remove("store"), &["bad.toml", "store"]);
    bench.refused_text("this is = = no TOML", &["bad.toml", "line 1"]);
    let inside = bench.path("store", "dir").join("mnt");
    bench.refused(set("mount", "point", inside.to_str().unwrap()), &["mount"]);

    let mut daemon = Command::new(vmfs_binary());
    daemon.arg0("vmfs-fuse").args(["--config", "/nonexistent/vmfs.toml"]);
    let ran = try_run_within(daemon, secs(20)).refused(1);
    assert!(ran.stderr.contains("/nonexistent/vmfs.toml"), "{ran}");
}

#[test]
fn bad_identities_are_refused() {
    let bench = Bench::new("badidentity");
    let good = bench.path("identity", "dir");
    // Each case works on a copy of its own.
    let case = |name: &str| -> PathBuf {
        let copy = bench.cluster.scratch().join(name);
        let _ = run("cp", ["-a".as_ref(), good.as_os_str(), copy.as_os_str()]);
        copy
    };
    let refused = |dir: &Path, words: &[&str]| {
        bench.refused(set("identity", "dir", dir.to_str().unwrap()), words);
    };
    refused(Path::new("/nonexistent/identity"), &["/nonexistent/identity"]);
    for file in ["host.crt", "host.key", "ca.crt"] {
        let dir = case(&format!("no-{file}"));
        std::fs::remove_file(dir.join(file)).unwrap();
        refused(&dir, &[file]);
        let dir = case(&format!("garbage-{file}"));
        std::fs::write(dir.join(file), "garbage\n").unwrap();
        refused(&dir, &[file]);
    }
    let dir = case("open-key");
    std::fs::set_permissions(dir.join("host.key"), std::fs::Permissions::from_mode(0o644)).unwrap();
    refused(&dir, &["host.key"]);

    let dir = case("other-key");
    let other = bench.cluster.config("a");
    let config: Table = toml::from_str(&std::fs::read_to_string(&other).unwrap()).unwrap();
    let other = other.parent().unwrap().join(config["identity"]["dir"].as_str().unwrap());
    std::fs::copy(other.join("host.key"), dir.join("host.key")).unwrap();
    refused(&dir, &["host.key"]);

    // A certificate of the real CA that ended yesterday.
    let dir = case("expired");
    let enrolling = bash("dirname \"$(find \"$1\" -name ca.key | head -n 1)\"", [bench.cluster.dir()]).stdout;
    let ca = CaKey::load(Path::new(enrolling.trim())).unwrap();
    let identity = HostIdentity::load(&good).unwrap();
    let validity = Validity { not_before_s: 1_000_000_000, not_after_s: 1_600_000_000 };
    let expired = ca.issue(&identity.key().public(), identity.name(), validity).unwrap();
    std::fs::write(dir.join("host.der"), &expired).unwrap();
    let _ = bash("cd \"$1\"; openssl x509 -inform DER -in host.der -out host.crt; rm host.der", [&dir]);
    refused(&dir, &["host.crt", "expired"]);
}

#[test]
fn bad_mount_points_are_refused() {
    let mut bench = Bench::new("badmount");
    let scratch = bench.cluster.scratch();
    bench.refused(set("mount", "point", "/nonexistent/mnt"), &["/nonexistent/mnt"]);
    let full = scratch.join("full");
    std::fs::create_dir(&full).unwrap();
    std::fs::write(full.join("file"), "x").unwrap();
    bench.refused(set("mount", "point", full.to_str().unwrap()), &["full", "empty"]);
    bench.refused(set("mount", "point", full.join("file").to_str().unwrap()), &["full/file"]);
    let taken = scratch.join("taken");
    std::fs::create_dir(&taken).unwrap();
    let _ = run("mount", ["-t", "tmpfs", "tmpfs", taken.to_str().unwrap()]);
    bench.refused(set("mount", "point", taken.to_str().unwrap()), &["taken", "mounted"]);
    assert!(bytes::is_mounted(&taken), "a foreign mount must stay");
    // And after all that the same host starts with its own configuration.
    let _ = bench.cluster.up();
    bench.cluster.assert_copies_identical("x");
}

#[test]
fn bad_stores_are_refused() {
    let mut bench = Bench::new("badstore");
    let a_store = bench.cluster.store("a");
    let before = fingerprint(&a_store);
    bench.refused(set("store", "dir", a_store.to_str().unwrap()), &["store"]);
    assert_eq!(before, fingerprint(&a_store), "the other host's store changed");
    let file = bench.cluster.scratch().join("file");
    std::fs::write(&file, "x").unwrap();
    bench.refused(set("store", "dir", file.to_str().unwrap()), &["file"]);

    // A store in use: b's own, while b runs.
    let _ = bench.cluster.up();
    let mount = bench.cluster.scratch().join("mnt");
    std::fs::create_dir(&mount).unwrap();
    let mut config = bench.config.clone();
    set("mount", "point", mount.to_str().unwrap())(&mut config);
    set("control", "socket", bench.cluster.scratch().join("s").to_str().unwrap())(&mut config);
    set("network", "listen", "127.0.0.1:0")(&mut config);
    let control = config["control"].as_table_mut().unwrap();
    let _ = control.remove("pid_file");
    let ran = bench.start(&toml::to_string(&config).unwrap()).refused(1);
    assert!(ran.stderr.contains("store"), "{ran}");
    bench.cluster.assert_copies_identical("x");
}

#[test]
fn bad_command_lines_are_refused() {
    let cluster = Cluster::start("badcli");
    std::fs::write(cluster.file("a", "x"), bytes::noise(1, 65536)).unwrap();
    cluster.assert_copies_identical("x");
    let before: Vec<_> = cluster.hosts().iter().map(|h| cluster.image(h, "x").unwrap().seq).collect();
    let long = "n".repeat(300);
    // Nothing of that name is here (1), or nothing can have that name (2).
    let unknown = [("no-such-image", 1), ("/etc/passwd", 1), ("x/y", 1)];
    let impossible = [("../x", 2), ("../../etc/passwd", 2), ("", 2), (long.as_str(), 2)];
    for (image, code) in unknown.into_iter().chain(impossible) {
        for command in [
            &["info"][..],
            &["promote"],
            &["promote", "--force"],
            &["handover", "--to", "b"],
            &["verify"],
            &["wait", "--in-sync", "--timeout", "1"],
            &["fail"],
            &["policy", "show"],
            &["policy", "set", "--acks", "all"],
        ] {
            let words = if command[0] == "policy" { 2 } else { 1 };
            let mut args = command.to_vec();
            args.insert(words, image);
            let ran = cluster.vmfs("a", &args).refused(code);
            assert!(ran.stderr.len() < 1000, "{ran}");
        }
        let _ = cluster.vmfs("a", &["replica", "add", image, "b"]).refused(code);
        let _ = cluster.vmfs("a", &["replica", "remove", image, "b"]).refused(code);
    }
    for args in [
        &["replica", "add", "x", "nobody"][..],
        &["replica", "remove", "x", "nobody"],
        &["replica", "add", "x", "b"],
        &["handover", "x", "--to", "nobody"],
        &["fork", "drop", "nothing"],
        &["host", "remove", "nobody"],
        &["host", "join", "garbage"],
        &["promote", "x"],
    ] {
        let _ = cluster.vmfs("a", args).refused(1);
    }
    for args in [
        &["no-such-command"][..],
        &["info"],
        &["promote", "x", "--quickly"],
        &["handover", "x"],
        &["wait", "x", "--timeout", "soon"],
        &["policy", "set", "x", "--acks", "some"],
        &["up"],
    ] {
        let ran = cluster.vmfs("a", args);
        assert_eq!(ran.code(), 2, "wrong usage: {ran}");
    }
    let mut lost = Command::new(vmfs_binary());
    lost.args(["--socket", "/nonexistent/vmfs.sock", "status"]);
    let _ = try_run_within(lost, secs(20)).refused(1);
    let after: Vec<_> = cluster.hosts().iter().map(|h| cluster.image(h, "x").unwrap().seq).collect();
    assert_eq!(before, after, "a refused command changed the image");
    assert_eq!(cluster.image("a", "x").unwrap().role, "owner");
    cluster.assert_copies_identical("x");
}

#[test]
fn bad_names_in_the_mount_get_the_right_errno() {
    let cluster = Cluster::start("badnames");
    let errno = |r: std::io::Result<std::fs::File>| r.unwrap_err().raw_os_error().unwrap();
    let create = |name: &str| std::fs::File::create_new(cluster.file("a", name));
    assert_eq!(errno(create(&"n".repeat(256))), libc::ENAMETOOLONG);
    let _ = create(&"n".repeat(255)).unwrap();
    assert_eq!(errno(create("missing/x")), libc::ENOENT);
    let _ = create("file").unwrap();
    assert_eq!(errno(create("file/x")), libc::ENOTDIR);
    assert_eq!(errno(create("file")), libc::EEXIST);
    // A name that a reachable member claims already.
    cluster.wait_in_sync("file");
    cluster.wait_visible("b", "file");
    assert_eq!(errno(std::fs::File::create_new(cluster.file("b", "file"))), libc::EEXIST);
}

#[test]
fn garbage_datagrams_change_nothing() {
    let cluster = Cluster::start("garbage");
    std::fs::write(cluster.file("a", "x"), bytes::noise(1, 65536)).unwrap();
    cluster.assert_copies_identical("x");
    let mut rng = seed::rng("garbage_datagrams_change_nothing");
    let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    for host in cluster.hosts() {
        let pid = cluster.pid(host).to_string();
        let ports =
            bash(r#"ss -H -u -a -n -p | grep -F "pid=$1," | awk '{print $4}' | sed 's/.*://'"#, [&pid])
                .stdout;
        for port in ports.lines().map(|l| l.parse::<u16>().unwrap()) {
            for _ in 0..3000 {
                let mut datagram = vec![0; rng.random_range(1..1500)];
                rng.fill_bytes(&mut datagram);
                // Half of them look like the start of a QUIC long header, some of a version nobody has.
                if rng.random() {
                    datagram[0] |= 0xC0;
                }
                let _ = socket.send_to(&datagram, ("127.0.0.1", port));
            }
        }
        assert_eq!(cluster.pid(host).to_string(), pid);
    }
    std::fs::write(cluster.file("a", "y"), bytes::noise(2, 65536)).unwrap();
    until("the cluster goes on", secs(20), || cluster.image("c", "y"));
    cluster.assert_copies_identical("x");
    cluster.assert_copies_identical("y");
}
