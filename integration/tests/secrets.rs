//! Who can read what: keys, invitations, stores and secrets are the daemon's user's alone, the control
//! socket answers nobody else, and no log says a secret.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeSet;
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use integration::harness::command::try_run;
use integration::harness::{Cluster, bytes};
use vmfs_common::ids::hex_encode;
use vmfs_net::HostIdentity;
use vmfs_store::disk::FileDisk;
use vmfs_store::{Store, StoreConfig};

/// Every file and directory below `dir`, mounts left out.
fn tree(dir: &Path, skip: &BTreeSet<PathBuf>) -> Vec<PathBuf> {
    let mut all = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if skip.contains(&path) {
            continue;
        }
        if path.symlink_metadata().unwrap().is_dir() {
            all.extend(tree(&path, skip));
        }
        all.push(path);
    }
    all
}

fn mode(path: &Path) -> u32 {
    path.symlink_metadata().unwrap().permissions().mode() & 0o7777
}

/// A cluster that logs everything, with an image that has changed hands.
fn busy_cluster(name: &str) -> Cluster {
    let mut cluster = Cluster::start(name);
    cluster.down();
    for host in ["a", "b", "c"] {
        let path = cluster.dir().join(host).join("vmfs.toml");
        let mut config: toml::Table = toml::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
        config.insert("log".to_owned(), "trace".into());
        std::fs::write(&path, toml::to_string(&config).unwrap()).unwrap();
    }
    cluster.up();
    std::fs::write(cluster.file("a", "disk"), bytes::noise(1, 1 << 20)).unwrap();
    cluster.wait_in_sync("disk");
    let _ = cluster.vmfs("a", &["handover", "disk", "--to", "b"]).ok();
    let _ = cluster.vmfs("c", &["promote", "disk"]).ok();
    cluster.wait_in_sync("disk");
    let token = cluster.scratch().join("d.invitation");
    let _ = cluster.vmfs("a", &["host", "invite", "d", "--output", token.to_str().unwrap()]).ok();
    cluster
}

#[test]
fn what_is_private_is_private_over_a_whole_datastore() {
    let cluster = busy_cluster("modes");
    let token = cluster.scratch().join("d.invitation");
    assert_eq!(mode(&token), 0o600, "the invitation that an operator carries away");
    let mut seen = BTreeSet::new();
    for host in cluster.hosts() {
        let dir = cluster.dir().join(host);
        let (identity, store) = (dir.join("identity"), cluster.store(host));
        for path in tree(&dir, &BTreeSet::from([cluster.mnt(host)])) {
            let kind = path.symlink_metadata().unwrap().file_type();
            let name = path.file_name().unwrap().to_str().unwrap();
            let secret = path.starts_with(&store)
                || name.ends_with(".key")
                || path.starts_with(identity.join("invites"))
                || kind.is_socket();
            assert_eq!(mode(&path) & 0o022, 0, "{}: others may write it", path.display());
            if secret {
                let want = if kind.is_dir() { 0o700 } else { 0o600 };
                assert_eq!(mode(&path), want, "{}", path.display());
                seen.insert(name.split('.').next_back().unwrap().to_owned());
            }
        }
        assert_eq!((mode(&identity), mode(&store)), (0o700, 0o700), "{host}");
    }
    for must in ["key", "json", "sock", "meta"] {
        assert!(seen.contains(must), "no {must} among {seen:?}: the test looks at the wrong place");
    }
}

#[test]
fn the_control_socket_answers_no_other_user() {
    let cluster = Cluster::start("socket");
    // Not the directories above are what keeps others out here.
    let mut above = cluster.dir().to_owned();
    while above.starts_with(std::env::temp_dir()) && above != std::env::temp_dir() {
        std::fs::set_permissions(&above, std::fs::Permissions::from_mode(0o755)).unwrap();
        above.pop();
    }
    let as_nobody = |socket: &Path| {
        let script = "import socket,sys\ns=socket.socket(socket.AF_UNIX)\ns.connect(sys.argv[1])\n\
                      s.sendall(b'GET /v1/status HTTP/1.1\\r\\nHost: x\\r\\nConnection: close\\r\\n\\r\\n')\n\
                      sys.stdout.write(s.recv(64).decode())";
        let mut command = Command::new("setpriv");
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups", "/usr/bin/python3", "-c", script]);
        command.arg(socket);
        try_run(command)
    };
    for host in cluster.hosts() {
        let socket = cluster.socket(host);
        let refused = as_nobody(&socket);
        assert!(!refused.status.success(), "{host} answered another user: {refused}");
        assert!(refused.stderr.contains("PermissionError"), "{refused}");
        // It is the mode that does it: with another one, the same question is answered.
        std::fs::set_permissions(&socket, std::fs::Permissions::from_mode(0o666)).unwrap();
        assert!(as_nobody(&socket).stdout.starts_with("HTTP/1.1 200"), "the question itself is a good one");
    }
}

/// The forms in which bytes end up in a text by mistake.
fn forms(secret: &[u8]) -> Vec<Vec<u8>> {
    let hex = hex_encode(&secret[..12]);
    let list: Vec<_> = secret[..8].iter().map(u8::to_string).collect();
    vec![
        secret[..12].to_vec(),
        hex.clone().into_bytes(),
        hex.to_uppercase().into_bytes(),
        list.join(", ").into_bytes(),
    ]
}

fn contains(text: &[u8], what: &[u8]) -> bool {
    let Some(first) = what.first() else { return false };
    let starts = text.iter().enumerate().filter(|(_, b)| *b == first);
    starts.map(|(i, _)| i).any(|i| text[i..].starts_with(what))
}

#[test]
fn no_log_says_a_secret() {
    let cluster = busy_cluster("logs");
    cluster.down();
    let mut secrets: Vec<Vec<u8>> = Vec::new();
    let mut texts: Vec<Vec<u8>> = Vec::new();
    for host in cluster.hosts() {
        let dir = cluster.dir().join(host);
        let identity = HostIdentity::load(&dir.join("identity")).unwrap();
        // The seed of the key is in its PKCS#8 form from the 17th byte on.
        secrets.push(identity.key().to_pkcs8_der()[16..48].to_vec());
        let disk = Arc::new(FileDisk::open(&cluster.store(host)).unwrap());
        let (datastore, me) = (identity.datastore(), identity.host());
        let store = Store::open(disk, datastore, me, StoreConfig::default()).unwrap();
        let records = store.meta_keys().into_iter().filter_map(|k| store.get_meta(k));
        let found: Vec<_> = records.flat_map(|r| vmfs_proto::fuzzing::secrets_of(&r)).collect();
        assert!(!found.is_empty(), "{host} has no secrets: the test looks at the wrong place");
        secrets.extend(found);
        let invites = dir.join("identity").join("invites");
        for invite in std::fs::read_dir(invites).into_iter().flatten() {
            let text = std::fs::read_to_string(invite.unwrap().path()).unwrap();
            let secret = serde_json::from_str::<serde_json::Value>(&text).unwrap()["secret"].clone();
            texts.push(secret.as_str().unwrap().as_bytes()[..24].to_vec());
        }
    }
    texts.extend(secrets.iter().flat_map(|s| forms(s)));
    let mut looked_at = 0;
    for log in tree(cluster.dir(), &BTreeSet::new())
        .into_iter()
        .filter(|p| p.extension().is_some_and(|e| e == "log"))
    {
        let said = std::fs::read(&log).unwrap();
        assert!(contains(&said, b"TRACE"), "{} is no log at trace level", log.display());
        looked_at += 1;
        for secret in &texts {
            assert!(
                !contains(&said, secret),
                "{} says a secret: {:?}",
                log.display(),
                String::from_utf8_lossy(secret)
            );
        }
    }
    assert_eq!(looked_at, 3, "one log for each host");
}
