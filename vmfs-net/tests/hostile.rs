//! Peers that are not what they should be, on real connections with real certificates.
#![allow(clippy::unwrap_used)]

mod common;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use common::*;
use quinn::crypto::rustls::QuicClientConfig;
use quinn::{ClientConfig, Connection, ConnectionError, Endpoint, RecvStream, SendStream};
use rustls::RootCertStore;
use rustls::pki_types::PrivatePkcs8KeyDer;
use vmfs_common::{DatastoreId, HostId};
use vmfs_net::hello::Hello;
use vmfs_net::pki::{CaKey, Validity};
use vmfs_net::{Frame, HostIdentity, NetError, Refusal};

/// A client that speaks TLS as it should, and says what it likes afterwards.
struct Rogue {
    host: HostId,
    endpoint: Endpoint,
    connection: Connection,
}

type Certificate = rustls::pki_types::CertificateDer<'static>;

impl Rogue {
    /// Dials `to`, trusting `id`'s CA, showing `certificate` (with `id`'s key), if any.
    async fn dial(
        id: &HostIdentity,
        certificate: Option<Certificate>,
        to: (SocketAddr, HostId),
        alpn: &str,
    ) -> Result<Self, ConnectionError> {
        let mut roots = RootCertStore::empty();
        roots.add(id.trust().ca().clone()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let tls = rustls::ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_root_certificates(roots);
        let mut tls = match certificate {
            Some(c) => {
                let key = PrivatePkcs8KeyDer::from(id.key().to_pkcs8_der().to_vec());
                tls.with_client_auth_cert(vec![c], key.into()).unwrap()
            }
            None => tls.with_no_client_auth(),
        };
        tls.alpn_protocols = vec![alpn.as_bytes().to_vec()];
        let config = ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls).unwrap()));
        let endpoint = Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
        let connection = endpoint.connect_with(config, to.0, &format!("{}.vmfs", to.1)).unwrap().await?;
        Ok(Self { host: id.host(), endpoint, connection })
    }

    /// As host 1 of `ds`, towards host 0.
    async fn as_host1(ds: &Datastore, a: &Host) -> Self {
        let id = ds.identity(1);
        let cert = id.certificate().clone();
        Self::dial(&id, Some(cert), (ds.address(0), a.id()), "vmfs/1").await.unwrap()
    }

    /// Says `hello` and waits until the connection is in use.
    async fn greet(&self, hello: &Hello, a: &mut Host) -> (SendStream, RecvStream) {
        let (mut send, mut recv) = self.connection.open_bi().await.unwrap();
        send.write_all(&frame(0x01, &hello.encode())).await.unwrap();
        let mut prefix = [0; 5];
        recv.read_exact(&mut prefix).await.unwrap();
        assert_eq!(prefix[4], 0x01);
        let mut rest = vec![0; usize::from(prefix[0])];
        recv.read_exact(&mut rest).await.unwrap();
        if a.id() > self.host {
            send.write_all(&frame(0x02, b"")).await.unwrap();
        }
        assert_eq!(a.up().await.0, self.host);
        (send, recv)
    }

    /// Waits for the end of the connection; gives the reason that the other side stated.
    async fn refusal(&self) -> Option<Refusal> {
        let end = tokio::time::timeout(PATIENCE, self.connection.closed()).await.expect("closed in time");
        match end {
            ConnectionError::ApplicationClosed(c) => Refusal::from_code(c.error_code.into_inner()),
            _ => None,
        }
    }
}

impl Drop for Rogue {
    fn drop(&mut self) {
        self.endpoint.close(0_u32.into(), b"");
    }
}

fn frame(kind: u8, body: &[u8]) -> Vec<u8> {
    let len = u32::try_from(body.len()).unwrap().to_le_bytes();
    [&len[..], &[kind], body].concat()
}

fn hello(ds: &Datastore) -> Hello {
    Hello {
        version_min: 1,
        version_max: 1,
        datastore: ds.identity(1).datastore(),
        store: store(2),
        run: 77,
        software: "rogue".into(),
    }
}

/// Host 0 of two, running alone: host 1's place is free for a rogue.
async fn victim() -> (Datastore, Host) {
    let ds = Datastore::new(2);
    let a = ds.start(0).await;
    (ds, a)
}

/// Sends `hello` and expects this end of it.
async fn refused_hello(bend: impl FnOnce(&mut Hello), want: Refusal) {
    let (ds, a) = victim().await;
    let rogue = Rogue::as_host1(&ds, &a).await;
    let mut h = hello(&ds);
    bend(&mut h);
    let (mut send, _recv) = rogue.connection.open_bi().await.unwrap();
    send.write_all(&frame(0x01, &h.encode())).await.unwrap();
    assert_eq!(rogue.refusal().await, Some(want));
    a.refused(want.name(), 1).await;
    assert!(!a.net.is_connected(ds.identity(1).host()));
}

#[tokio::test]
async fn another_protocol_version_is_refused() {
    refused_hello(|h| (h.version_min, h.version_max) = (7, 9), Refusal::Version).await;
}

#[tokio::test]
async fn a_hello_for_another_datastore_is_refused() {
    refused_hello(|h| h.datastore = DatastoreId::from_bytes([9; 16]), Refusal::OtherDatastore).await;
}

#[tokio::test]
async fn a_host_of_another_datastore_is_refused_by_both_sides() {
    let (ds, other) = (Datastore::new(1), Datastore::new(1));
    let a = ds.start(0).await;
    let id = other.identity(0);
    // It does not trust us: its own check fails first.
    let err = Rogue::dial(&id, Some(id.certificate().clone()), (ds.address(0), a.id()), "vmfs/1")
        .await
        .err()
        .unwrap();
    assert!(matches!(err, ConnectionError::TransportError(_)), "{err}");
    a.refused("other-datastore", 1).await;
}

#[tokio::test]
async fn a_client_with_a_foreign_expired_or_no_certificate_gets_nowhere() {
    let (ds, other) = (Datastore::new(2), Datastore::new(2));
    let a = ds.start(0).await;
    let (id, to) = (ds.identity(1), (ds.address(0), a.id()));
    let now = Validity::days(0).not_after_s;
    let issue = |ds: &Datastore, ago| {
        let ca = CaKey::load(&ds.dir(0)).unwrap();
        let v = Validity { not_before_s: now - 9000, not_after_s: now - ago };
        ca.issue(&id.info().public_key, "host1", v).unwrap()
    };
    let cases = [
        (Some(issue(&other, -9000)), "other-datastore"),
        (Some(issue(&ds, 100)), "expired-certificate"),
        (None, "untrusted-certificate"),
    ];
    for (certificate, reason) in cases {
        if let Ok(rogue) = Rogue::dial(&id, certificate, to, "vmfs/1").await {
            rogue.refusal().await;
        }
        a.refused(reason, 1).await;
        assert!(!a.net.is_connected(id.host()), "{reason}");
    }
    // Not even a stream: without a certificate there is only enrolment.
    let stranger = Rogue::dial(&id, None, to, "vmfs-enrol/1").await.unwrap();
    let (mut send, _recv) = stranger.connection.open_bi().await.unwrap();
    send.write_all(&frame(0x01, &hello(&ds).encode())).await.unwrap();
    assert_eq!(stranger.refusal().await, Some(Refusal::BadFrame));
    let err = Rogue::dial(&id, None, to, "http/1.1").await.err().unwrap();
    assert!(matches!(err, ConnectionError::ConnectionClosed(_)), "{err}");
    a.refused("version", 1).await;
}

#[tokio::test]
async fn an_outdated_peer_is_told_why() {
    let (ds, a) = victim().await;
    let rogue = Rogue::as_host1(&ds, &a).await;
    let (mut send, _recv) = rogue.connection.open_bi().await.unwrap();
    let h = Hello { version_min: 2, version_max: 3, ..hello(&ds) };
    send.write_all(&frame(0x01, &h.encode())).await.unwrap();
    let ConnectionError::ApplicationClosed(close) = rogue.connection.closed().await else { panic!() };
    let text = String::from_utf8_lossy(&close.reason).into_owned();
    assert!(text.contains("it speaks protocol 2..3") && text.contains("this host 1..1"), "{text}");
}

/// The last error of host 0 about host 1.
fn last_error(a: &Host) -> String {
    let peers = a.net.peers();
    let peer = peers.iter().find(|p| p.entry.name == "host1").unwrap();
    assert!(peer.connection.is_none());
    peer.last_error.clone().unwrap_or_default()
}

#[tokio::test]
async fn dialling_a_host_of_another_version_is_a_typed_error_on_this_side_too() {
    let ds = Datastore::new(2);
    let id = ds.identity(1);
    let key = PrivatePkcs8KeyDer::from(id.key().to_pkcs8_der().to_vec());
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut tls = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![id.certificate().clone()], key.into())
        .unwrap();
    tls.alpn_protocols = vec![b"vmfs/1".to_vec()];
    let tls = quinn::crypto::rustls::QuicServerConfig::try_from(tls).unwrap();
    let server = Endpoint::server(quinn::ServerConfig::with_crypto(Arc::new(tls)), ds.address(1)).unwrap();
    let answer = frame(0x01, &Hello { version_min: 7, version_max: 9, ..hello(&ds) }.encode());
    let rogue = tokio::spawn(async move {
        let mut all = Vec::new();
        while let Some(incoming) = server.accept().await {
            let connection = incoming.await.unwrap();
            let (mut send, recv) = connection.accept_bi().await.unwrap();
            send.write_all(&answer).await.unwrap();
            all.push((connection, send, recv));
        }
    });
    let a = ds.start(0).await;
    a.refused("version", 2).await;
    let text = last_error(&a);
    assert!(text.starts_with("host1: version: it speaks protocol 7..9"), "{text}");
    rogue.abort();
}

#[tokio::test]
async fn another_host_at_a_known_address_is_not_taken_for_it() {
    let ds = Datastore::new(3);
    let _c = start(config(&ds.addresses[1]), ds.identity(2)).await.unwrap();
    let a = ds.start(0).await;
    a.refused("wrong-host", 1).await;
    eventually("told", || last_error(&a).contains("another host answers at this address")).await;
    let other = Datastore::new(2);
    let ds = Datastore::new(2);
    let _z = start(config(&ds.addresses[1]), other.identity(1)).await.unwrap();
    let a = ds.start(0).await;
    a.refused("other-datastore", 1).await;
    eventually("told", || last_error(&a).starts_with("host1 at 127.0.0.1:")).await;
}

/// A host that joined elsewhere is connected before its directory entry has come: what it signs can be judged.
#[tokio::test]
async fn the_key_of_a_peer_is_known_before_its_directory_entry_is() {
    let ds = Datastore::new(2);
    let id = ds.identity(1);
    std::fs::remove_file(ds.dir(0).join("hosts").join(format!("{}.json", id.host()))).unwrap();
    let mut a = ds.start(0).await;
    assert_eq!(a.net.public_key(id.host()), None);
    let rogue = Rogue::as_host1(&ds, &a).await;
    let _streams = rogue.greet(&hello(&ds), &mut a).await;
    assert!(a.net.directory().get(id.host()).is_none());
    assert_eq!(a.net.public_key(id.host()), Some(id.key().public()));
}

#[tokio::test]
async fn garbage_in_place_of_the_hello_is_refused() {
    for bytes in [vec![0xa5; 300], frame(0x03, b"beat"), frame(0x01, b"no hello"), vec![0xff; 5]] {
        let (ds, a) = victim().await;
        let rogue = Rogue::as_host1(&ds, &a).await;
        let (mut send, _recv) = rogue.connection.open_bi().await.unwrap();
        send.write_all(&bytes).await.unwrap();
        let got = rogue.refusal().await;
        assert!(matches!(got, Some(Refusal::BadFrame | Refusal::Oversize)), "{got:?}");
        let counted = a.net.counters();
        assert_eq!(counted.values().sum::<u64>(), 1, "{counted:?}");
    }
}

#[tokio::test]
async fn a_silent_stranger_is_dropped() {
    let ds = Datastore::new(2);
    let mut cfg = ds.config(0);
    cfg.handshake_timeout = Duration::from_millis(300);
    let a = start(cfg, ds.identity(0)).await.unwrap();
    let rogue = Rogue::as_host1(&ds, &a).await;
    rogue.refusal().await;
    assert!(!a.net.is_connected(ds.identity(1).host()));
}

/// What host 0 does about `bytes` on a fresh image stream of an admitted peer.
async fn on_image_stream(bytes: Vec<u8>) -> (Option<Refusal>, Host) {
    let (ds, mut a) = victim().await;
    let rogue = Rogue::as_host1(&ds, &a).await;
    let _control = rogue.greet(&hello(&ds), &mut a).await;
    let mut s = rogue.connection.open_uni().await.unwrap();
    s.write_all(&frame(0x10, image(5).as_bytes())).await.unwrap();
    s.write_all(&frame(0x11, b"fine")).await.unwrap();
    assert!(matches!(a.next().await, Got::Opened(_, i) if i == image(5)));
    let Got::Frame(_, Frame::Control(body)) = a.next().await else { panic!() };
    assert_eq!(&body[..], b"fine");
    s.write_all(&bytes).await.unwrap();
    let _ = s.finish();
    let refusal = rogue.refusal().await;
    if let Some(r) = refusal {
        a.refused(r.name(), 1).await;
        a.down().await;
    }
    (refusal, a)
}

#[tokio::test]
async fn a_frame_that_claims_four_gigabytes_ends_the_connection_before_any_allocation() {
    let (refusal, mut a) = on_image_stream(vec![0xff, 0xff, 0xff, 0xff, 0x12]).await;
    assert_eq!(refusal, Some(Refusal::Oversize));
    let Got::Ended(_, Some(NetError::Oversize { len_bytes, max_bytes, .. })) = a.next().await else {
        panic!()
    };
    assert_eq!((len_bytes, max_bytes), (0xffff_ffff, 4 << 20));
}

#[tokio::test]
async fn garbage_on_an_image_stream_ends_the_connection() {
    for bytes in [
        vec![0x5a; 64],
        frame(0x01, b"hello again"),
        frame(0x12, b"\xff\0\0\0short"),
        frame(0x12, b"xx"),
        frame(0x11, b"cut off")[..8].to_vec(),
    ] {
        let (refusal, _) = on_image_stream(bytes.clone()).await;
        assert!(
            matches!(refusal, Some(Refusal::BadFrame | Refusal::Oversize)),
            "{refusal:?} for {bytes:02x?}"
        );
    }
}

#[tokio::test]
async fn garbage_on_the_control_stream_ends_the_connection() {
    for bytes in [frame(0x03, b"short"), frame(0x04, b"no json"), frame(0x11, b"misplaced")] {
        let (ds, mut a) = victim().await;
        let rogue = Rogue::as_host1(&ds, &a).await;
        let (mut send, _recv) = rogue.greet(&hello(&ds), &mut a).await;
        send.write_all(&bytes).await.unwrap();
        assert_eq!(rogue.refusal().await, Some(Refusal::BadFrame));
        a.down().await;
        a.refused("bad-frame", 1).await;
    }
}

#[tokio::test]
async fn unfinished_frames_are_bounded_per_peer() {
    let (ds, mut a) = victim().await;
    let rogue = Rogue::as_host1(&ds, &a).await;
    let _control = rogue.greet(&hello(&ds), &mut a).await;
    // Each stream stops one byte short of a 4 MiB frame: 48 of them reach the limit of 192 MiB.
    let body = Bytes::from(vec![0; (4 << 20) - 1]);
    let mut streams = Vec::new();
    for _ in 0..60 {
        let Ok(mut s) = rogue.connection.open_uni().await else { break };
        let prefix = [&frame(0x10, image(1).as_bytes())[..], &[0, 0, 0x40, 0, 0x12]].concat();
        if s.write_all(&prefix).await.is_err() || s.write_chunk(body.clone()).await.is_err() {
            break;
        }
        streams.push(s);
    }
    assert_eq!(rogue.refusal().await, Some(Refusal::Flood));
    assert!((40..60).contains(&streams.len()), "{}", streams.len());
    a.refused("flood", 1).await;
}

#[tokio::test]
async fn a_peer_cannot_open_more_streams_than_allowed() {
    let ds = Datastore::new(2);
    let mut cfg = ds.config(0);
    cfg.streams_max = 8;
    let mut a = start(cfg, ds.identity(0)).await.unwrap();
    let rogue = Rogue::as_host1(&ds, &a).await;
    let _control = rogue.greet(&hello(&ds), &mut a).await;
    let mut streams = Vec::new();
    let ninth = tokio::time::timeout(Duration::from_millis(500), async {
        for _ in 0..9 {
            streams.push(rogue.connection.open_uni().await.unwrap());
        }
    });
    assert!(ninth.await.is_err());
    assert_eq!(streams.len(), 8);
}

#[tokio::test]
async fn a_copied_identity_directory_is_noticed() {
    let ds = Datastore::new(1);
    let a = ds.start(0).await;
    let id = ds.identity(0);
    let to = (ds.address(0), a.id());
    let rogue = Rogue::dial(&id, Some(id.certificate().clone()), to, "vmfs/1").await.unwrap();
    assert_eq!(rogue.refusal().await, Some(Refusal::SameIdentity));
    a.refused("same-identity", 1).await;
}

#[tokio::test]
async fn lies_about_hosts_are_skipped() {
    let (ds, mut a) = victim().await;
    let rogue = Rogue::as_host1(&ds, &a).await;
    let (mut send, mut recv) = rogue.greet(&hello(&ds), &mut a).await;
    // Take host 0's own entries and bend the address of each.
    let gossip = loop {
        let mut prefix = [0; 5];
        recv.read_exact(&mut prefix).await.unwrap();
        let len = u32::from_le_bytes(prefix[..4].try_into().unwrap());
        let mut body = vec![0; usize::try_from(len).unwrap()];
        recv.read_exact(&mut body).await.unwrap();
        if prefix[4] == 0x04 {
            break body;
        }
    };
    let mut v: serde_json::Value = serde_json::from_slice(&gossip).unwrap();
    let before = a.net.hosts();
    for host in v["hosts"].as_array_mut().unwrap() {
        host["address"] = "10.9.9.9:9".into();
        host["version"] = 99_999_999_999_999_u64.into();
    }
    let me = ds.identity(0).host().to_string();
    v["removed"] = serde_json::json!([{ "host": me, "at_ms": 1, "signature": "00".repeat(64) }]);
    send.write_all(&frame(0x04, v.to_string().as_bytes())).await.unwrap();
    // A beat after it is handled after it.
    let beat = [1_u64.to_le_bytes(), 0_u64.to_le_bytes()].concat();
    send.write_all(&frame(0x03, &beat)).await.unwrap();
    let heard = tokio::time::timeout(PATIENCE, a.events.recv()).await.unwrap();
    assert!(matches!(heard, Some(vmfs_net::NetEvent::Beat { .. })), "{heard:?}");
    assert_eq!(a.net.hosts(), before);
    assert!(!a.net.directory().is_removed(a.id()));
}

/// Every change of a pair's connection is work for every image: a peer that restarts without end is
/// made to wait.
#[tokio::test]
async fn a_peer_that_connects_anew_without_end_is_slowed_down() {
    let (ds, mut a) = victim().await;
    for run in 0..40 {
        while a.events.try_recv().is_ok() {}
        let rogue = Rogue::as_host1(&ds, &a).await;
        let (mut send, mut recv) = rogue.connection.open_bi().await.unwrap();
        send.write_all(&frame(0x01, &Hello { run, ..hello(&ds) }.encode())).await.unwrap();
        let mut prefix = [0; 5];
        recv.read_exact(&mut prefix).await.unwrap();
        if a.id() > ds.identity(1).host() {
            send.write_all(&frame(0x02, b"")).await.unwrap();
        }
        // Until it is in use, or closed.
        let _ = tokio::time::timeout(Duration::from_millis(20), rogue.connection.closed()).await;
        if a.net.counters().contains_key("busy") {
            assert!(run >= 16, "{run} restarts are an honest host's bad day");
            return;
        }
    }
    panic!("40 restarts in a row, and nobody minded: {:?}", a.net.counters());
}

/// Beats of all peers go through one channel; one peer's thousands must not push out the others' few.
#[tokio::test]
async fn beats_are_taken_no_faster_than_they_can_matter() {
    let (ds, mut a) = victim().await;
    let rogue = Rogue::as_host1(&ds, &a).await;
    let (mut send, _recv) = rogue.greet(&hello(&ds), &mut a).await;
    let flood = tokio::spawn(async move {
        for n in 1..4000_u64 {
            let beat = [n.to_le_bytes(), 0_u64.to_le_bytes()].concat();
            if send.write_all(&frame(0x03, &beat)).await.is_err() {
                break;
            }
        }
        send
    });
    let begun = std::time::Instant::now();
    let mut beats = 0;
    while begun.elapsed() < Duration::from_secs(1) {
        if let Ok(Some(vmfs_net::NetEvent::Beat { .. })) =
            tokio::time::timeout(Duration::from_millis(100), a.events.recv()).await
        {
            beats += 1;
        }
    }
    // 50 at once, and one each 20 ms.
    assert!((50..=120).contains(&beats), "{beats} beats in a second");
    flood.abort();
}
