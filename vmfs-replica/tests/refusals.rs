//! Every refusal of the chain, sent over a real connection by a host with a valid certificate, to a
//! real engine: it answers with the typed reason, counts it, and changes nothing. (A peer's suffix that
//! reaches no vouched head: `unvouched.rs`.)

#![allow(clippy::unwrap_used, clippy::missing_panics_doc, reason = "a test fails by panicking")]

mod common;

use bytes::Bytes;
use common::*;
use vmfs_common::chain::{EpochSecret, OwnerChain, Refusal};
use vmfs_common::election::Mandate;
use vmfs_common::op::Op;
use vmfs_common::{Digest, Epoch, ImageId};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_refusal_is_typed_counted_and_changes_nothing() {
    let world = world().await;
    let w = &world;

    let mut f = fed(w, 1).await;
    let next = write(&mut f.chain, 2);
    let other = altered(&next, |h| h.image = ImageId::from_bytes([99; 16]));
    w.refuses(&mut f, &other, &BLOCK, Refusal::WrongImage).await;

    let mut f = fed(w, 2).await;
    let next = write(&mut f.chain, 2);
    let later = altered(&next, |h| h.epoch.number = 2);
    w.refuses(&mut f, &later, &BLOCK, Refusal::WrongEpoch).await;

    let mut f = fed(w, 3).await;
    let (_skipped, next) = (write(&mut f.chain, 2), write(&mut f.chain, 3));
    w.refuses(&mut f, &next, &BLOCK, Refusal::Gap).await;

    let mut f = fed(w, 4).await;
    let first = f.first.clone();
    w.refuses(&mut f, &altered(&first, |h| h.op = Op::Unlink), &[], Refusal::Replay).await;

    let mut f = fed(w, 5).await;
    let next = write(&mut f.chain, 2);
    w.refuses(&mut f, &next, &[0x5b; 4096], Refusal::AlteredPayload).await;

    let mut f = fed(w, 6).await;
    let next = write(&mut f.chain, 2);
    w.refuses(&mut f, &altered(&next, |h| h.parent = Digest::default()), &BLOCK, Refusal::WrongParent).await;

    let mut f = fed(w, 7).await;
    let next = write(&mut f.chain, 2);
    w.refuses(&mut f, &altered(&next, |h| h.reveal[3] ^= 1), &BLOCK, Refusal::WrongReveal).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn damaged_header_is_malformed_and_a_forged_head_is_found_out_by_its_successor() {
    let world = world().await;
    let w = &world;

    let mut f = fed(w, 1).await;
    let next = write(&mut f.chain, 2);
    let mut bytes = next.bytes.to_vec();
    bytes[70] ^= 1;
    f.stream.send_update(Bytes::from(bytes), &[Bytes::copy_from_slice(&BLOCK)]).await.unwrap();
    until("malformed is counted", || w.count(f.id, Refusal::Malformed) == 1).await;
    assert_eq!(w.head(f.id), 3);

    // The tag of the head itself can only be judged by what the next update reveals.
    let mut f = fed(w, 2).await;
    let (forged, next) = (write(&mut f.chain, 2), write(&mut f.chain, 3));
    let forged = altered(&forged, |h| h.tag[0] ^= 1);
    send(&mut f.stream, &forged, &BLOCK).await;
    send(&mut f.stream, &next, &BLOCK).await;
    until("the head's wrong tag is counted", || w.count(f.id, Refusal::WrongHeadTag) == 1).await;
    assert!(w.head(f.id) <= 4, "nothing was built on the forged head");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_but_the_owner_can_send_updates_or_offer_its_epoch() {
    let world = world().await;
    let w = &world;
    let mut f = fed(w, 1).await;
    let before = (w.head(f.id), w.content(f.id));
    let next = write(&mut f.chain, 2);

    // Honest bytes, a valid certificate of the datastore, but not the owner's connection.
    let mut stream = w.stranger.net.open_stream(w.stranger.replica, f.id).unwrap();
    stream.send_control(offer(&f.chain, &f.first)).await.unwrap();
    until("the stranger's offer is refused", || w.count(f.id, Refusal::NotOwner) >= 1).await;
    send(&mut stream, &next, &BLOCK).await;
    until("the stranger's update is refused", || w.count(f.id, Refusal::NotOwner) >= 2).await;
    assert_eq!((w.head(f.id), w.content(f.id)), before);

    // The stranger's own epoch, without a single vote.
    let mut start = match &f.first.header.op {
        Op::EpochStart(start) => (**start).clone(),
        _ => unreachable!("the first update is an EpochStart"),
    };
    start.proposal.ballot = Epoch { number: 2, host: w.stranger.identity.host() };
    start.mandate = Mandate::Votes(vec![]);
    let secret = EpochSecret::from_bytes([1; 32]);
    start.proposal.secret_hash = secret.commitment();
    start.proposal.pub0 = secret.first_public(f.id, start.proposal.ballot);
    let tip = *f.chain.tip();
    let start = start.signed(tip.head.seq.next(), &tip.head.digest, w.stranger.identity.key());
    let (usurper, usurped) = OwnerChain::begin(secret, &tip, start, 3);
    stream.send_control(offer(&usurper, &usurped)).await.unwrap();
    until("the certificate without votes is refused", || w.count(f.id, Refusal::BadCertificate) >= 1).await;
    assert_eq!((w.head(f.id), w.content(f.id)), before);

    // And the owner goes on as if nothing had happened.
    send(&mut f.stream, &next, &BLOCK).await;
    until("the owner's next update is taken", || w.head(f.id) == 4).await;
}
