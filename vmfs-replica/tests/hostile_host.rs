//! A host with a valid certificate of the datastore that lies: to a copy about owners, members and
//! ballots, to an owner about what it holds, to everybody about images it has no business with. Nothing
//! of it is accepted, all of it is counted, and the honest hosts go on.

#![allow(clippy::unwrap_used, clippy::missing_panics_doc, reason = "a test fails by panicking")]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use common::*;
use vmfs_common::chain::{Draft, EpochSecret, OwnerChain, Refusal, Tip};
use vmfs_common::election::{EpochStart, Mandate, Proposal, Vote};
use vmfs_common::header::Update;
use vmfs_common::identity::Signature;
use vmfs_common::msg::{self, ImageMsg, Join, Occasion, VoteRefusal};
use vmfs_common::op::{Attrs, Op};
use vmfs_common::policy::{MemberList, MemberRole};
use vmfs_common::{Digest, Epoch, Head, ImageId, Seq, StoreId};

fn control(m: &ImageMsg) -> Bytes {
    Bytes::from(msg::encode(m))
}

/// Of the epoch that `start` begins.
fn offer_of(start: &Update) -> ImageMsg {
    ImageMsg::Offer {
        head: start.head(),
        start: start.head(),
        log_start: Seq(1),
        certificate: start.bytes.to_vec(),
        role: MemberRole::Replica,
    }
}

/// An epoch that `by` begins on `parent`, counted by `list`, with its own vote alone.
fn usurp(by: &ByHand, id: ImageId, parent: &Tip, list: &MemberList) -> (OwnerChain, Update) {
    let secret = EpochSecret::from_bytes([3; 32]);
    let ballot = Epoch { number: parent.head.epoch.number + 1, host: by.identity.host() };
    let proposal = Proposal {
        datastore: by.identity.datastore(),
        image: id,
        ballot,
        members: list.digest(),
        pub0: secret.first_public(id, ballot),
        secret_hash: secret.commitment(),
    };
    let vote = Vote {
        proposal: proposal.digest(),
        host: by.identity.host(),
        store: by.store,
        head: parent.head,
        commit: (Epoch::default(), Seq::ZERO),
        acked: (Epoch::default(), Seq::ZERO),
        degraded: false,
        members_since: Digest::default(),
        signature: Signature([0; 64]),
    }
    .signed(by.identity.key());
    let start = EpochStart {
        proposal,
        mandate: Mandate::Votes(vec![vote]),
        published: None,
        signature: Signature([0; 64]),
    };
    let start = start.signed(parent.head.seq.next(), &parent.head.digest, by.identity.key());
    OwnerChain::begin(secret, parent, start, 3)
}

/// The owner's next update is taken, and it is the owner still.
async fn owner_goes_on(w: &World, fed: &mut Fed) {
    let head = w.head(fed.id);
    let next = write(&mut fed.chain, 5);
    send(&mut fed.stream, &next, &BLOCK).await;
    until("the owner's next update is taken", || w.head(fed.id) == head + 1).await;
    let status = w.node.image(fed.id).unwrap().status();
    assert_eq!(status.owner, Some(w.owner.identity.host()));
    assert_eq!(status.epoch.number, 1);
}

/// The walk along an offered chain believed any change of members that its headers stated: a host that
/// made itself the only member, and voted for itself, was followed, and the copy's tail cut for it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_that_makes_itself_the_only_member_is_not_followed() {
    let mut world = world().await;
    let mut fed = fed(&world, 1).await;
    let parent = world.full_head(fed.id);
    // It has even seen the owner's next update, and so knows what that reveals.
    let seen = fed.chain.append(Draft::op(Op::Resize { size_bytes: 1 << 20 }), 2, Seq(0), vec![]);
    let replica = world.stranger.replica_member();
    let me = world.stranger.member(MemberRole::Replica);
    for members in [
        vec![me.clone()],
        vec![me.clone(), replica],
        vec![me.clone(), world.owner.member(MemberRole::Replica)],
    ] {
        let list = MemberList::new(members).unwrap();
        let forged = altered(&seen, |h| h.op = Op::Members(list.clone()));
        let (_, start) = usurp(&world.stranger, fed.id, &Tip::of(&forged), &list);
        let before = world.count(fed.id, Refusal::BadCertificate);
        let mut stream = world.stranger.net.open_stream(world.stranger.replica, fed.id).unwrap();
        stream.send_control(control(&offer_of(&start))).await.unwrap();
        loop {
            match world.stranger.heard().await {
                ImageMsg::FetchHeaders { upto, .. } if upto == start.head() => break,
                _ => {}
            }
        }
        let headers = vec![forged.bytes.to_vec(), start.bytes.to_vec()];
        let answer = ImageMsg::Headers { parent, headers, upto: start.head() };
        stream.send_control(control(&answer)).await.unwrap();
        let w = &world;
        until("the forged members are refused", || w.count(fed.id, Refusal::BadCertificate) > before).await;
        send(&mut stream, &forged, &[]).await;
        until("its update is refused", || w.count(fed.id, Refusal::NotOwner) >= 1).await;
        assert_eq!(w.full_head(fed.id), parent);
    }
    send(&mut fed.stream, &seen, &[]).await;
    until("the owner's own update is taken", || world.head(fed.id) == parent.seq.0 + 1).await;
    owner_goes_on(&world, &mut fed).await;
}

/// A lineage that names its victim as a member was followed, on its maker's word alone.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lineage_that_somebody_forced_is_not_followed_by_who_it_names() {
    let world = world().await;
    let mut fed = fed(&world, 1).await;
    let by = &world.stranger;
    let list = MemberList::new(vec![by.member(MemberRole::Replica), by.replica_member()]).unwrap();
    let tip = *fed.chain.tip();
    let secret = EpochSecret::from_bytes([3; 32]);
    let ballot = Epoch { number: 2, host: by.identity.host() };
    let proposal = Proposal {
        datastore: by.identity.datastore(),
        image: fed.id,
        ballot,
        members: list.digest(),
        pub0: secret.first_public(fed.id, ballot),
        secret_hash: secret.commitment(),
    };
    let mandate = Mandate::Forced(list);
    let start = EpochStart { proposal, mandate, published: None, signature: Signature([0; 64]) };
    let start = start.signed(tip.head.seq.next(), &tip.head.digest, by.identity.key());
    let (_, start) = OwnerChain::begin(secret, &tip, start, 3);
    let mut stream = by.net.open_stream(by.replica, fed.id).unwrap();
    stream.send_control(control(&offer_of(&start))).await.unwrap();
    until("the offer is refused", || world.count(fed.id, Refusal::Fork) == 1).await;
    send(&mut stream, &start, &[]).await;
    until("its EpochStart is refused", || world.count(fed.id, Refusal::NotOwner) == 1).await;
    owner_goes_on(&world, &mut fed).await;
}

/// An offer nobody can check, left hanging, kept the copy from taking up its owner again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_offer_that_is_never_proven_does_not_shut_the_owner_out() {
    let mut world = world().await;
    let mut fed = fed(&world, 1).await;
    let list = MemberList::new(vec![world.stranger.member(MemberRole::Replica)]).unwrap();
    let (_, start) = usurp(&world.stranger, fed.id, fed.chain.tip(), &list);
    let mut stream = world.stranger.net.open_stream(world.stranger.replica, fed.id).unwrap();
    stream.send_control(control(&offer_of(&start))).await.unwrap();
    while !matches!(world.stranger.heard().await, ImageMsg::FetchHeaders { .. }) {}
    // The owner starts over, while the claim hangs; and again when it cannot be looked into. (Then the
    // claim was followed, and could have the copy's content replaced.)
    for answer in [None, Some(ImageMsg::FetchFailed { upto: start.head(), log_start: Seq(9) })] {
        if let Some(answer) = answer {
            stream.send_control(control(&answer)).await.unwrap();
        }
        fed.stream.send_control(offer(&fed.chain, &fed.first)).await.unwrap();
        loop {
            match world.owner.heard().await {
                ImageMsg::Join(join) if join.head == world.full_head(fed.id) => break,
                ImageMsg::Refused { why, .. } => panic!("the owner was refused: {why:?}"),
                _ => {}
            }
        }
        let head = world.head(fed.id);
        let next = write(&mut fed.chain, 6);
        send(&mut fed.stream, &next, &BLOCK).await;
        until("the owner is followed", || world.head(fed.id) == head + 1).await;
    }
}

fn propose(by: &ByHand, id: ImageId, number: u64, head: Head) -> ImageMsg {
    let proposal = Proposal {
        datastore: by.identity.datastore(),
        image: id,
        ballot: Epoch { number, host: by.identity.host() },
        members: Digest::from_bytes([1; 32]),
        pub0: Digest::from_bytes([2; 32]),
        secret_hash: Digest::from_bytes([3; 32]),
    };
    ImageMsg::Propose {
        proposal,
        occasion: Occasion::Operator,
        head,
        consent: None,
        role: MemberRole::Replica,
    }
}

async fn vote_refused(by: &mut ByHand) -> VoteRefusal {
    loop {
        match by.heard().await {
            ImageMsg::VoteRefused { why, .. } => return why,
            ImageMsg::Voted { vote, .. } => panic!("voted for a stranger: {vote:?}"),
            _ => {}
        }
    }
}

/// Any host that claimed a head above a member's got its promise, and the owner was refused from then on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stranger_gets_no_promise_while_the_owner_lives() {
    let mut world = world().await;
    let mut fed = fed(&world, 1).await;
    let mut stream = world.stranger.net.open_stream(world.stranger.replica, fed.id).unwrap();
    let claimed = Head {
        epoch: Epoch { number: 9, host: world.owner.identity.host() },
        seq: Seq(1 << 40),
        digest: Digest::from_bytes([9; 32]),
    };
    // One by the owner, one by nobody, and one by itself: it says that it was the last owner.
    let its_own = Epoch { number: 9, host: world.stranger.identity.host() };
    let heads = [
        claimed,
        Head { epoch: Epoch { number: u64::MAX, ..claimed.epoch }, ..claimed },
        Head { epoch: its_own, ..claimed },
    ];
    for head in heads {
        stream.send_control(control(&propose(&world.stranger, fed.id, 10, head))).await.unwrap();
        let why = vote_refused(&mut world.stranger).await;
        assert!(matches!(why, VoteRefusal::OwnerAlive(_)), "{why:?}");
    }
    owner_goes_on(&world, &mut fed).await;
}

/// A ballot of 2^64 - 1 left no higher one: with it promised, nobody could ever be elected again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_cannot_use_up_all_ballots() {
    let mut world = world().await;
    let members = [&world.owner, &world.stranger].map(|h| h.member(MemberRole::Replica));
    let mut fed = fed_with(&world, 1, &members).await;
    let head = world.full_head(fed.id);
    let mut stream = world.stranger.net.open_stream(world.stranger.replica, fed.id).unwrap();
    for number in [u64::MAX, 1 << 60] {
        stream.send_control(control(&propose(&world.stranger, fed.id, number, head))).await.unwrap();
        let why = vote_refused(&mut world.stranger).await;
        assert_eq!(why, VoteRefusal::OtherMembers);
    }
    owner_goes_on(&world, &mut fed).await;
}

/// What the engine answers to raw bytes of a question; the number of its variant, and what follows.
async fn asked(by: &ByHand, question: &[u8]) -> (u32, usize) {
    let answer = by.net.request(by.replica, Bytes::copy_from_slice(question)).await.unwrap();
    let len = u32::from_le_bytes(answer[..4].try_into().unwrap()) as usize;
    (u32::from_le_bytes(answer[4..8].try_into().unwrap()), answer.len() - 4 - len)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_content_of_an_image_is_for_its_members() {
    let mut world = world().await;
    // The image that the sample questions are about.
    let fed = fed(&world, 7).await;
    let questions = vmfs_replica::fuzzing::question_seeds();
    const GONE: u32 = 9;
    // SyncOpen, Fetch, PinSeal, MerkleAt by image; SyncNode, SyncBlocks by a token that is not theirs.
    for which in [1, 5, 7, 8, 2, 3] {
        assert_eq!(asked(&world.stranger, &questions[which]).await, (GONE, 0), "question {which}");
    }
    let not_allowed = world.node.refusals().get("not-allowed").copied();
    assert_eq!(not_allowed, Some(4), "counted in status");
    // A member gets an answer; blocks that no image can have are none.
    assert_ne!(asked(&world.owner, &questions[5]).await.0, GONE);
    let mut far = questions[5].clone();
    let at = far.len() - 40;
    far[at..at + 8].copy_from_slice(&u64::MAX.to_le_bytes());
    assert_ne!(asked(&world.owner, &far).await.0, GONE);
    // Nor is the log.
    let upto = world.full_head(fed.id);
    let store = world.stranger.store;
    let join = Join { store, head: Head::default(), durable: Head::default(), marks: vec![], witness: false };
    let mut stream = world.stranger.net.open_stream(world.stranger.replica, fed.id).unwrap();
    for ask in [
        ImageMsg::FetchUpdates { after: Seq::ZERO, upto, witness: false },
        ImageMsg::FetchHeaders { join, upto, after: Seq::ZERO },
    ] {
        let before = world.count(fed.id, Refusal::NotAllowed);
        stream.send_control(control(&ask)).await.unwrap();
        until("it is refused", || world.count(fed.id, Refusal::NotAllowed) > before).await;
        loop {
            match world.stranger.heard().await {
                ImageMsg::FetchFailed { .. } => break,
                ImageMsg::Headers { .. } => panic!("the stranger was given headers"),
                _ => {}
            }
        }
    }
}

/// Acknowledgements of the engine's own image that are not what its members have said.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn false_acknowledgements_do_not_answer_a_flush() {
    let mut world = world().await;
    until("both others and their stores are known", || {
        let known = world.node.network().hosts();
        [&world.owner, &world.stranger]
            .map(|h| h.identity.host())
            .iter()
            .all(|host| known.iter().any(|h| h.host == *host) && world.node.met_store(*host).is_some())
    })
    .await;
    let image = world.node.create_image("own.img", &Attrs::default(), &[]).unwrap();
    assert_eq!(image.state().members.len(), 3, "the engine and both others are members");
    let flushed = Arc::new(AtomicBool::new(false));
    let done = flushed.clone();
    image.flush(Box::new(move |r| done.store(r.is_ok(), Ordering::Release)));
    let head = image.state().head();
    let mut liar = world.stranger.net.open_stream(world.stranger.replica, image.id).unwrap();
    let join = |by: &ByHand| Join {
        store: by.store,
        head: Head::default(),
        durable: Head::default(),
        marks: vec![],
        witness: false,
    };
    liar.send_control(control(&ImageMsg::Join(join(&world.stranger)))).await.unwrap();
    let other = Digest::from_bytes([6; 32]);
    let old = Epoch { number: 0, ..head.epoch };
    for (head, store) in [
        (head, world.owner.store),
        (head, StoreId::from_bytes([0x55; 16])),
        (Head { digest: other, ..head }, world.stranger.store),
        (Head { seq: Seq(head.seq.0 + 1), ..head }, world.stranger.store),
        (Head { seq: Seq(u64::MAX), ..head }, world.stranger.store),
        (Head { epoch: old, ..head }, world.stranger.store),
        (Head { epoch: Epoch { number: 2, ..head.epoch }, ..head }, world.stranger.store),
    ] {
        liar.send_control(control(&ImageMsg::Ack { head, store })).await.unwrap();
    }
    // Refusals of a ballot that never was, and votes nobody has asked for.
    let promised = Epoch { number: u64::MAX, host: world.stranger.identity.host() };
    let refused =
        ImageMsg::Refused { why: Refusal::Promised, seq: head.seq, promised, join: join(&world.stranger) };
    liar.send_control(control(&refused)).await.unwrap();
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(!flushed.load(Ordering::Acquire), "a flush was answered by lies");
    assert!(image.is_owner_here());
    assert_eq!(image.status().epoch.number, 1, "the owner was driven out of its epoch");

    // The honest member's own word is enough.
    let mut honest = world.owner.net.open_stream(world.owner.replica, image.id).unwrap();
    honest.send_control(control(&ImageMsg::Join(join(&world.owner)))).await.unwrap();
    while !matches!(world.owner.heard().await, ImageMsg::Sync { .. }) {}
    let head = image.state().head();
    honest.send_control(control(&ImageMsg::Ack { head, store: world.owner.store })).await.unwrap();
    until("the flush is answered", || flushed.load(Ordering::Acquire)).await;
}

/// Offers of images without end: each was a file and a record on the disk.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn images_that_are_offered_and_never_sent_are_bounded() {
    let world = world().await;
    let w = &world;
    let mut streams = Vec::new();
    for n in 0..300u16 {
        let mut id = [0xee; 16];
        id[..2].copy_from_slice(&n.to_le_bytes());
        let id = ImageId::from_bytes(id);
        let (chain, first) = genesis(&w.owner, id, &[w.owner.member(MemberRole::Replica)]);
        let mut stream = w.owner.net.open_stream(w.owner.replica, id).unwrap();
        // Signed by somebody else than it comes from: nothing is made for it.
        let mut liar = w.stranger.net.open_stream(w.stranger.replica, id).unwrap();
        if n < 20 {
            liar.send_control(offer(&chain, &first)).await.unwrap();
        }
        stream.send_control(offer(&chain, &first)).await.unwrap();
        streams.push((stream, liar));
    }
    until("it is too many", || w.node.refusals().contains_key("flood")).await;
    until("lies are counted", || w.node.refusals().get("bad-certificate").is_some_and(|n| *n > 0)).await;
    assert!(w.node.images().len() <= 256, "{}", w.node.images().len());
}
