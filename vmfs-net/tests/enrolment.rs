//! Invitations over the network, certificates and files.
#![allow(clippy::unwrap_used)]

mod common;

use std::time::Duration;

use common::*;
use tempfile::TempDir;
use vmfs_net::pki::invite::Invitation;
use vmfs_net::pki::{CaKey, Validity, init_datastore};
use vmfs_net::{HostIdentity, HostRole, NetError, PkiError, join};

const HOUR: Duration = Duration::from_secs(3600);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_invited_host_joins_and_connects_and_its_key_stays_home() {
    let ds = Datastore::new(2);
    let (mut a, mut b) = (ds.start(0).await, ds.start(1).await);
    a.up().await;
    b.up().await;
    let token = a.net.invite("carol", HOUR).unwrap().to_string();
    let home = TempDir::new().unwrap();
    let dir = home.path().join("new/host");
    let address = free_address();
    let invitation: Invitation = token.parse().unwrap();
    let id = join(&dir, &invitation, &address, &[HostRole::Witness]).await.unwrap();
    assert_eq!((id.name(), id.datastore()), ("carol", a.net.identity().datastore()));
    assert_eq!(mode(&dir.join("host.key")), 0o600);
    assert!(!dir.join("ca.key").exists());
    let c = start(config(&address), id).await.unwrap();
    for host in [&mut a, &mut b] {
        assert_eq!(host.up().await.0, c.id());
    }
    let entry = b.net.directory().by_name("carol").unwrap();
    assert_eq!((entry.address, entry.host), (address, c.id()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_invitation_serves_one_host_once() {
    let ds = Datastore::new(1);
    let a = ds.start(0).await;
    let invitation = a.net.invite("carol", HOUR).unwrap();
    let (one, two) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    join(one.path(), &invitation, &free_address(), &[]).await.unwrap();
    let err = join(two.path(), &invitation, &free_address(), &[]).await.unwrap_err();
    assert!(matches!(&err, NetError::Declined(why) if why.contains("used already")), "{err}");
    assert!(!two.path().join("host.crt").exists());
    // The same host again, after it lost the answer.
    let before = std::fs::read(one.path().join("host.crt")).unwrap();
    std::fs::remove_file(one.path().join("host.crt")).unwrap();
    join(one.path(), &invitation, &free_address(), &[]).await.unwrap();
    assert_eq!(std::fs::read(one.path().join("host.crt")).unwrap(), before);
    // A host that is one already.
    let err = join(one.path(), &invitation, &free_address(), &[]).await.unwrap_err();
    assert!(err.to_string().contains("host.crt exists already"), "{err}");
    // Its name is taken now.
    assert!(matches!(a.net.invite("carol", HOUR), Err(NetError::Pki(PkiError::NameTaken { .. }))));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_hosts_racing_for_one_invitation_cannot_both_get_in() {
    let ds = Datastore::new(1);
    let a = ds.start(0).await;
    let invitation = a.net.invite("carol", HOUR).unwrap();
    let (one, two) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let (x, y) = (free_address(), free_address());
    let (r1, r2) =
        tokio::join!(join(one.path(), &invitation, &x, &[]), join(two.path(), &invitation, &y, &[]));
    assert_eq!(u8::from(r1.is_ok()) + u8::from(r2.is_ok()), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn expired_forged_and_foreign_invitations_are_refused() {
    let (ds, other) = (Datastore::new(1), Datastore::new(1));
    let (a, z) = (ds.start(0).await, other.start(0).await);
    let tmp = TempDir::new().unwrap();
    let address = free_address();

    let late = a.net.invite("late", Duration::ZERO).unwrap();
    let err = join(tmp.path(), &late, &address, &[]).await.unwrap_err();
    assert!(matches!(err, NetError::Pki(PkiError::InviteExpired(_))), "{err}");

    // Expired for the inviter although the joiner's copy says otherwise: patch the file there.
    let good = a.net.invite("dave", HOUR).unwrap();
    let file = std::fs::read_dir(ds.dir(0).join("invites"))
        .unwrap()
        .map(|e| e.unwrap().path())
        .find(|p| std::fs::read_to_string(p).unwrap().contains("dave"))
        .unwrap();
    let text = std::fs::read_to_string(&file).unwrap();
    let expires = good.expires_s().to_string();
    std::fs::write(&file, text.replace(&expires, "1000000000")).unwrap();
    let err = join(tmp.path(), &good, &address, &[]).await.unwrap_err();
    assert!(matches!(&err, NetError::Declined(why) if why.contains("expired")), "{err}");
    // Same id, another secret.
    let mut v: serde_json::Value = serde_json::from_str(&text).unwrap();
    v["secret"] = "00".repeat(32).into();
    std::fs::write(&file, v.to_string()).unwrap();
    let err = join(tmp.path(), &good, &address, &[]).await.unwrap_err();
    assert!(matches!(&err, NetError::Declined(why) if why.contains("proof")), "{err}");
    std::fs::remove_file(&file).unwrap();
    let err = join(tmp.path(), &good, &address, &[]).await.unwrap_err();
    assert!(matches!(&err, NetError::Declined(why) if why.contains("no such invitation")), "{err}");

    // The address of another datastore's host: its CA has another fingerprint.
    let foreign = z.net.invite("eve", HOUR).unwrap();
    z.stop().await;
    let cfg = config(&other.addresses[0]);
    let _impostor = start_again(cfg, ds.identity(0)).await;
    let err = join(tmp.path(), &foreign, &address, &[]).await.unwrap_err();
    assert_eq!(err.blame(), Some(vmfs_net::Refusal::OtherDatastore), "{err}");
    assert!(!tmp.path().join("host.crt").exists() && !tmp.path().join("ca.crt").exists());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_removed_host_is_cut_off_and_refused_everywhere() {
    let ds = Datastore::new(3);
    let (a, b, c) = (ds.start(0).await, ds.start(1).await, ds.start(2).await);
    eventually("all connected", || {
        a.net.is_connected(c.id()) && b.net.is_connected(c.id()) && a.net.is_connected(b.id())
    })
    .await;
    assert!(matches!(b.net.remove_host(c.id()), Err(NetError::Pki(PkiError::NoCaKey { .. }))));
    assert!(matches!(a.net.remove_host(a.id()), Err(NetError::Pki(PkiError::OwnHost(_)))));
    a.net.remove_host(c.id()).unwrap();
    eventually("cut off", || !a.net.is_connected(c.id()) && !b.net.is_connected(c.id())).await;
    assert!(b.net.directory().is_removed(c.id()));
    let cid = c.id();
    c.stop().await;
    let c = ds.start(2).await;
    c.refused("removed-host", 1).await;
    assert!(!a.net.is_connected(cid) && !b.net.is_connected(cid) && !c.net.is_connected(b.id()));
    // For ever: also after a restart of the others.
    b.stop().await;
    let b = ds.start(1).await;
    assert!(b.net.directory().is_removed(cid) && b.net.hosts().len() == 2);
    b.refused("removed-host", 1).await;
    // The name is free for a new key.
    let invitation = a.net.invite("host2", HOUR).unwrap();
    let again = TempDir::new().unwrap();
    let address = free_address();
    let id = join(again.path(), &invitation, &address, &[]).await.unwrap();
    assert_ne!(id.host(), cid);
    let c = start(config(&address), id).await.unwrap();
    eventually("back with a new key", || b.net.is_connected(c.id())).await;
    // The old key and a new invitation do not make a host.
    let invitation = a.net.invite("host9", HOUR).unwrap();
    std::fs::remove_file(ds.dir(2).join("host.crt")).unwrap();
    let err = join(&ds.dir(2), &invitation, &address, &[]).await.unwrap_err();
    assert!(matches!(&err, NetError::Declined(why) if why.contains("was removed")), "{err}");
}

#[test]
fn tokens_survive_transport_and_nothing_else_passes_for_one() {
    let ds = Datastore::new(1);
    let id = ds.identity(0);
    let directory = vmfs_net::Directory::open(id.dir(), id.trust()).unwrap();
    let make = |name: &str| vmfs_net::pki::invite::create(&id, &directory, name, "a.example:7", HOUR);
    let invitation = make("bob").unwrap();
    let token = invitation.to_string();
    let file = ds.tmp.path().join("bob.invite");
    invitation.write_to(&file).unwrap();
    assert_eq!(mode(&file), 0o600);
    for text in [token.clone(), format!("  {token}\n"), file.display().to_string()] {
        let back = Invitation::from_token_or_file(&text).unwrap();
        assert_eq!((back.to_string(), back.address()), (token.clone(), "a.example:7"));
    }
    let last = if token.ends_with('0') { '1' } else { '0' };
    let bent = format!("{}{last}", &token[..token.len() - 1]);
    for bad in [&token[..token.len() - 2], &bent, "vmfs1-invite-", "vmfs1-invite-zz", "/nonexistent/file"] {
        assert!(Invitation::from_token_or_file(bad).is_err(), "{bad}");
    }
    for bad in ["", "-x", "a b", "ü", &"a".repeat(64)] {
        assert!(matches!(make(bad), Err(PkiError::Name(_))), "{bad:?}");
    }
    for invite in std::fs::read_dir(ds.dir(0).join("invites")).unwrap() {
        assert_eq!(mode(&invite.unwrap().path()), 0o600);
    }
    assert!(!format!("{invitation:?}").contains(&token[60..80]), "debug output shows no secret");
}

#[test]
fn secrets_are_private_and_nothing_is_overwritten() {
    let ds = Datastore::new(2);
    for file in ["0/ca.key", "0/host.key", "1/host.key"] {
        assert_eq!(mode(&ds.tmp.path().join(file)), 0o600, "{file}");
    }
    let key = std::fs::read(ds.dir(0).join("ca.key")).unwrap();
    assert!(matches!(init_datastore(&ds.dir(0)), Err(PkiError::Exists { .. })));
    assert_eq!(std::fs::read(ds.dir(0).join("ca.key")).unwrap(), key);
    use std::os::unix::fs::PermissionsExt as _;
    let path = ds.dir(1).join("host.key");
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).unwrap();
    let err = HostIdentity::load(&ds.dir(1)).unwrap_err().to_string();
    assert!(err.contains("host.key has mode 0640"), "{err}");
}

/// Loads host 1's identity after `spoil` and gives the one line.
fn spoiled(spoil: impl FnOnce(&Datastore)) -> String {
    let ds = Datastore::new(2);
    spoil(&ds);
    let line = HostIdentity::load(&ds.dir(1)).unwrap_err().to_string();
    assert_eq!(line.lines().count(), 1, "{line}");
    line
}

fn copy(from: &std::path::Path, to: &std::path::Path) {
    std::fs::copy(from, to).unwrap();
}

fn pem_of(der: &[u8]) -> String {
    pem::encode(&pem::Pem::new("CERTIFICATE", der))
}

fn reissue(ds: &Datastore, validity: Validity) {
    let ca = CaKey::load(&ds.dir(0)).unwrap();
    let key = ds.identity(1).info().public_key;
    let cert = ca.issue(&key, "host1", validity).unwrap();
    std::fs::write(ds.dir(1).join("host.crt"), pem_of(&cert)).unwrap();
}

#[test]
fn every_defect_of_an_identity_is_one_line_that_names_the_file() {
    let day = 24 * 3600;
    let now = Validity::days(0).not_after_s;
    let line = spoiled(|ds| reissue(ds, Validity { not_before_s: now - 2 * day, not_after_s: now - day }));
    assert!(line.contains("1/host.crt: the certificate expired on 20"), "{line}");
    let line = spoiled(|ds| reissue(ds, Validity { not_before_s: now + day, not_after_s: now + 2 * day }));
    assert!(line.contains("1/host.crt: the certificate is not valid before 20"), "{line}");
    let line = spoiled(|ds| std::fs::remove_file(ds.dir(1).join("host.crt")).unwrap());
    assert!(line.starts_with("cannot read ") && line.contains("1/host.crt"), "{line}");
    let line = spoiled(|ds| std::fs::write(ds.dir(1).join("ca.crt"), "rubbish").unwrap());
    assert!(line.contains("1/ca.crt: not PEM"), "{line}");
    let line = spoiled(|ds| std::fs::write(ds.dir(1).join("host.crt"), pem_of(b"rubbish")).unwrap());
    assert!(line.contains("1/host.crt: not an X.509 certificate"), "{line}");
    let line = spoiled(|ds| copy(&ds.dir(0).join("host.key"), &ds.dir(1).join("host.key")));
    assert!(line.contains("1/host.key is not the key of "), "{line}");
    let line = spoiled(|ds| {
        let other = Datastore::new(2);
        copy(&other.dir(1).join("host.crt"), &ds.dir(1).join("host.crt"));
    });
    assert!(line.contains("1/host.crt: not signed by the CA of datastore"), "{line}");
    let line = spoiled(|ds| copy(&ds.dir(1).join("host.crt"), &ds.dir(1).join("ca.crt")));
    assert!(line.contains("1/ca.crt: not a CA's certificate"), "{line}");
    let line = spoiled(|ds| copy(&ds.dir(1).join("ca.crt"), &ds.dir(1).join("host.crt")));
    assert!(line.contains("1/host.crt: a CA's certificate where a host's is due"), "{line}");
}
