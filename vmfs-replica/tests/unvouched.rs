//! A suffix that a peer serves and that does not reach the head it has voted with: sent by hand over
//! a real connection, by a member with a valid certificate, to a real engine that is a candidate. It
//! takes none of it, says so in its counters, and keeps what it had.

#![allow(clippy::unwrap_used, clippy::missing_panics_doc, reason = "a test fails by panicking")]

mod common;

use bytes::Bytes;
use common::*;
use vmfs_common::chain::Refusal;
use vmfs_common::election::Vote;
use vmfs_common::header::Update;
use vmfs_common::identity::Signature;
use vmfs_common::msg::{self, ImageMsg};
use vmfs_common::policy::MemberRole;
use vmfs_common::{Digest, Epoch, Head, Seq};
use vmfs_net::StreamSender;
use vmfs_replica::api::{Control as _, Progress, PromoteRequest};
use vmfs_replica::control::NodeControl;

/// The image of three members: the owner is gone, the replica is ordered to take over, the peer has
/// seen more than the replica.
struct Stage {
    world: World,
    fed: Fed,
    /// The owner's updates that the replica has not seen.
    ahead: Vec<Update>,
}

async fn stage() -> Stage {
    let world = world().await;
    let members = [&world.owner, &world.stranger].map(|h| h.member(MemberRole::Replica));
    let mut fed = fed_with(&world, 1, &members).await;
    let name = fed.chain.append(
        vmfs_common::chain::Draft::op(vmfs_common::op::Op::Name { path: "disk.img".to_owned() }),
        2,
        Seq(0),
        vec![],
    );
    send(&mut fed.stream, &name, &[]).await;
    until("the replica knows the image's name", || world.head(fed.id) == 4).await;
    let ahead = (2..5).map(|block| write(&mut fed.chain, block)).collect();
    Stage { world, fed, ahead }
}

impl Stage {
    fn say(&self) -> StreamSender {
        let peer = &self.world.stranger;
        peer.net.open_stream(peer.replica, self.fed.id).unwrap()
    }

    /// Orders the replica to take over; it will not get far.
    fn promote(&self) -> tokio::task::JoinHandle<bool> {
        let control = NodeControl::new(self.world.node.clone(), None);
        tokio::spawn(async move {
            let request = PromoteRequest { image: "disk.img".to_owned(), force: false, members: Vec::new() };
            control.promote(request, Progress::ignored()).await.is_ok()
        })
    }

    /// The next proposal that the peer is sent.
    async fn proposal(&mut self) -> Digest {
        loop {
            if let ImageMsg::Propose { proposal, .. } = self.world.stranger.heard().await {
                return proposal.digest();
            }
        }
    }

    /// Votes for it, naming `head` as what the peer holds.
    async fn vote(&self, stream: &mut StreamSender, proposal: Digest, head: Head) {
        let peer = &self.world.stranger;
        let vote = Vote {
            proposal,
            host: peer.identity.host(),
            store: peer.store,
            head,
            commit: (Epoch::default(), Seq::ZERO),
            acked: (Epoch::default(), Seq::ZERO),
            degraded: false,
            members_since: self.fed.first.digest,
            signature: Signature([0; 64]),
        }
        .signed(peer.identity.key());
        stream.send_control(control(&ImageMsg::Voted { vote, share: None })).await.unwrap();
    }

    /// What the candidate already has, when it asks for the headers up to the voted head.
    async fn asked_for_headers(&mut self, upto: Head) {
        loop {
            match self.world.stranger.heard().await {
                ImageMsg::FetchHeaders { upto: wanted, .. } if wanted == upto => return,
                _ => {}
            }
        }
    }

    async fn refused_and_unchanged(&self, before: (u64, Vec<u8>)) {
        let (w, id) = (&self.world, self.fed.id);
        until("the suffix is refused as unvouched", || w.count(id, Refusal::Unvouched) == 1).await;
        assert_eq!((w.head(id), w.content(id)), before, "an unvouched suffix changed something");
        assert_eq!(w.node.image(id).unwrap().status().epoch.number, 1, "no epoch began over it");
    }
}

fn control(m: &ImageMsg) -> Bytes {
    Bytes::from(msg::encode(m))
}

fn headers(updates: &[Update]) -> Vec<Vec<u8>> {
    updates.iter().map(|u| u.bytes.to_vec()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn headers_that_do_not_lead_to_the_voted_head_are_refused_and_change_nothing() {
    let mut s = stage().await;
    let parent = s.world.full_head(s.fed.id);
    let before = (s.world.head(s.fed.id), s.world.content(s.fed.id));
    let promoted = s.promote();
    // The peer votes with the owner's real head, and serves a suffix of its own making of the same
    // length: it chains update by update, and ends elsewhere.
    let voted = s.ahead.last().unwrap().head();
    let mut forged = s.ahead.clone();
    let last = forged.pop().unwrap();
    forged.push(altered(&last, |h| h.digests[0] = Digest::from_bytes([0x66; 32])));
    let mut stream = s.say();
    let proposal = s.proposal().await;
    s.vote(&mut stream, proposal, voted).await;
    s.asked_for_headers(voted).await;
    let answer = ImageMsg::Headers { parent, headers: headers(&forged), upto: voted };
    stream.send_control(control(&answer)).await.unwrap();
    s.refused_and_unchanged(before.clone()).await;
    assert!(!promoted.await.unwrap(), "promoted without a vouched head");
    s.refused_and_unchanged(before).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn updates_other_than_those_the_headers_named_are_refused_and_change_nothing() {
    let mut s = stage().await;
    let parent = s.world.full_head(s.fed.id);
    let before = (s.world.head(s.fed.id), s.world.content(s.fed.id));
    let promoted = s.promote();
    let voted = s.ahead.last().unwrap().head();
    let mut stream = s.say();
    let proposal = s.proposal().await;
    s.vote(&mut stream, proposal, voted).await;
    s.asked_for_headers(voted).await;
    // Honest headers, then other updates, with payload that fits them.
    let answer = ImageMsg::Headers { parent, headers: headers(&s.ahead), upto: voted };
    stream.send_control(control(&answer)).await.unwrap();
    let other = altered(&s.ahead[0], |h| h.start = vmfs_common::BlockIndex(7));
    send(&mut stream, &other, &BLOCK).await;
    s.refused_and_unchanged(before.clone()).await;
    assert!(!promoted.await.unwrap(), "promoted without a vouched head");
    s.refused_and_unchanged(before).await;
}
