//! Two and three honest hosts: connecting, streams, requests, restarts.
#![allow(clippy::unwrap_used)]

mod common;

use std::time::Duration;

use bytes::Bytes;
use common::*;
use tokio::time::{Instant, timeout};
use vmfs_net::{Frame, NetError, NetEvent};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn simultaneous_dials_give_one_connection_that_stays() {
    for _ in 0..5 {
        let ds = Datastore::new(2);
        let (ia, ib) = (ds.identity(0), ds.identity(1));
        let (a, b) = tokio::join!(start(ds.config(0), ia), start(ds.config(1), ib));
        let (mut a, mut b) = (a.unwrap(), b.unwrap());
        let (_, sa) = a.up().await;
        let (_, sb) = b.up().await;
        // Longer than any second dial could take on loopback.
        let quiet = timeout(Duration::from_millis(600), async {
            tokio::select! { e = a.event() => e, e = b.event() => e }
        });
        assert!(quiet.await.is_err(), "the pair changed its connection");
        assert_eq!((a.net.session(b.id()), b.net.session(a.id())), (Some(sa), Some(sb)));
        a.stop().await;
        b.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_hosts_find_each_other_through_gossip() {
    let ds = Datastore::new(3);
    // Host 1 joined before host 2 and has never heard of it.
    let (a, b, c) = (ds.start(0).await, ds.start(1).await, ds.start(2).await);
    eventually("all pairs", || {
        [(&a, &b), (&a, &c), (&b, &c)]
            .iter()
            .all(|(x, y)| x.net.is_connected(y.id()) && y.net.is_connected(x.id()))
    })
    .await;
    eventually("all entries", || [&a, &b, &c].iter().all(|h| h.net.hosts().len() == 3)).await;
    let names: Vec<_> = b.net.peers().into_iter().map(|p| p.entry.name).collect();
    assert!(names.contains(&"host2".to_owned()), "{names:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn frames_arrive_whole_in_order_and_per_image() {
    let (_ds, a, mut b) = pair().await;
    let mut s = a.net.open_stream(b.id(), image(7)).unwrap();
    let block = |n: u8| Bytes::from(vec![n; 4096]);
    s.send_control(Bytes::from_static(b"first")).await.unwrap();
    s.send_update(Bytes::from_static(b"header"), &[block(1), block(2)]).await.unwrap();
    let large: Vec<_> = (0..=255).map(block).collect();
    s.send_update(Bytes::from_static(b"large"), &large).await.unwrap();
    s.send_update(Bytes::new(), &[]).await.unwrap();
    drop(s);
    assert!(matches!(b.next().await, Got::Opened(from, i) if from == a.id() && i == image(7)));
    let want = [
        Frame::Control(Bytes::from_static(b"first")),
        Frame::Update {
            header: Bytes::from_static(b"header"),
            payload: Bytes::from([block(1), block(2)].concat()),
        },
        Frame::Update { header: Bytes::from_static(b"large"), payload: Bytes::from(large.concat()) },
        Frame::Update { header: Bytes::new(), payload: Bytes::new() },
    ];
    for want in want {
        match b.next().await {
            Got::Frame(i, frame) => assert!(i == image(7) && frame == want),
            other => panic!("{other:?}"),
        }
    }
    assert!(matches!(b.next().await, Got::Ended(_, None)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stalled_image_blocks_no_other_and_a_cancelled_send_never_looks_finished() {
    let (_ds, a, mut b) = pair().await;
    let (to, net) = (b.id(), a.net.clone());
    let stuck = tokio::spawn(async move {
        let mut s = net.open_stream(to, SLOW_IMAGE).unwrap();
        loop {
            s.send_update(Bytes::new(), &[Bytes::from(vec![0; 1 << 20])]).await.unwrap();
        }
    });
    assert!(matches!(b.next().await, Got::Opened(_, SLOW_IMAGE)));
    // More than the window of one stream.
    let start = Instant::now();
    let mut s = a.net.open_stream(b.id(), image(2)).unwrap();
    for _ in 0..20 {
        s.send_update(Bytes::new(), &[Bytes::from(vec![1; 1 << 20])]).await.unwrap();
    }
    let mut heard = 0;
    while heard < 20 {
        match b.next().await {
            Got::Frame(SLOW_IMAGE, _) => panic!("it should be asleep"),
            Got::Frame(..) => heard += 1,
            _ => {}
        }
    }
    assert!(start.elapsed() < SLOW_READER);
    assert!(!stuck.is_finished(), "the sender waits for its reader");
    stuck.abort();
    let end = loop {
        if let Got::Ended(SLOW_IMAGE, end) = b.next().await {
            break end;
        }
    };
    assert!(matches!(end, Some(NetError::Reset(_))), "{end:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reset_stream_never_looks_finished() {
    let (_ds, a, mut b) = pair().await;
    let mut s = a.net.open_stream(b.id(), image(1)).unwrap();
    s.send_control(Bytes::from_static(b"x")).await.unwrap();
    assert!(matches!(b.next().await, Got::Opened(..)));
    s.reset();
    let end = loop {
        if let Got::Ended(_, end) = b.next().await {
            break end;
        }
    };
    assert!(matches!(end, Some(NetError::Reset(_))), "{end:?}");
    assert!(a.net.is_connected(b.id()), "a reset stream leaves the connection alone");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_are_answered_declined_or_time_out() {
    let (_ds, a, b) = pair().await;
    let ask = |body: &'static [u8]| a.net.request(b.id(), Bytes::from_static(body));
    assert_eq!(&ask(b"ping").await.unwrap()[..], b"ping");
    assert!(matches!(ask(b"no").await, Err(NetError::Declined(why)) if why == "it said no"));
    let start = Instant::now();
    let err = ask(b"sleep").await.unwrap_err();
    assert!(matches!(err, NetError::Timeout(2000) | NetError::Lost(_) | NetError::Reset(_)), "{err:?}");
    assert!(start.elapsed() < Duration::from_secs(4));
    let long = Bytes::from(vec![0; (1 << 20) + 1]);
    assert!(matches!(a.net.request(b.id(), long).await, Err(NetError::Oversize { .. })));
    let full = Bytes::from(vec![9; 1 << 20]);
    assert_eq!(a.net.request(b.id(), full.clone()).await.unwrap(), full);
    let nobody = vmfs_common::HostId::from_bytes([9; 16]);
    assert!(matches!(a.net.request(nobody, Bytes::new()).await, Err(NetError::NotConnected(_))));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn more_requests_than_slots_all_get_their_answers() {
    let (_ds, a, b) = pair().await;
    let mut tasks = tokio::task::JoinSet::new();
    for n in 0..500_u32 {
        let (net, to) = (a.net.clone(), b.id());
        tasks.spawn(async move {
            let body = Bytes::copy_from_slice(&n.to_le_bytes());
            assert_eq!(net.request(to, body.clone()).await.unwrap(), body);
        });
    }
    while let Some(done) = tasks.join_next().await {
        done.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn beats_show_that_contact_is_fresh_in_both_directions() {
    let (_ds, mut a, b) = pair().await;
    let fresh = timeout(PATIENCE, async {
        loop {
            if let Some(NetEvent::Beat { host, echo_age_ms: Some(age), .. }) = a.events.recv().await {
                return (host, age);
            }
        }
    });
    let (host, age) = fresh.await.unwrap();
    assert_eq!(host, b.id());
    assert!(age < 1500, "{age} ms");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restarted_peer_is_back_at_once_in_a_new_session() {
    let (ds, mut a, mut b) = pair().await;
    let (bid, first) = (b.id(), a.net.session(b.id()).unwrap());
    for round in 0..3 {
        b.stop().await;
        assert_eq!(a.down().await.0, bid);
        assert!(a.net.open_stream(bid, image(1)).is_err());
        b = ds.start(1).await;
        let (host, session) = a.up().await;
        assert!(host == bid && session > first, "round {round}");
        b.up().await;
        let mut s = a.net.open_stream(bid, image(1)).unwrap();
        s.send_control(Bytes::from_static(b"again")).await.unwrap();
        assert!(matches!(b.next().await, Got::Opened(..)));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_dies_silently_is_down_within_the_idle_timeout_and_its_successor_accepted() {
    let ds = Datastore::new(2);
    let mut a = ds.start(0).await;
    // A runtime of its own, killed without a farewell.
    let rt = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let (cfg, id) = (ds.config(1), ds.identity(1));
    let b = rt.spawn(start(cfg, id)).await.unwrap().unwrap();
    let (bid, _) = a.up().await;
    rt.shutdown_background();
    drop(b);
    let died = Instant::now();
    assert_eq!(a.down().await.0, bid);
    assert!(died.elapsed() < Duration::from_secs(4), "{:?}", died.elapsed());
    let mut b = ds.start(1).await;
    b.up().await;
    assert_eq!(a.up().await.0, bid);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_changed_address_is_learned_by_those_who_are_dialled() {
    let ds = Datastore::new(2);
    let mut a = ds.start(0).await;
    let elsewhere = free_address();
    let mut b = start(config(&elsewhere), ds.identity(1)).await.unwrap();
    assert_eq!(a.up().await.0, b.id());
    b.up().await;
    eventually("the new address", || a.net.directory().get(b.id()).unwrap().address == elsewhere).await;
}
