//! One host of the cluster lies: with a valid certificate, its own key, and everything it has heard. What it
//! can do is withhold, forge, alter, reorder, repeat, claim what is not durable, vote for what it does not
//! hold, and, while it owns the image, sign two updates with one parent.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use vmfs_common::chain::{Draft, EpochSecret, OwnerChain, Refusal, Tip};
use vmfs_common::election::{EpochStart, Proposal, Vote};
use vmfs_common::hash::block_digest;
use vmfs_common::header::{FLAG_DEGRADED, Update};
use vmfs_common::identity::Signature;
use vmfs_common::msg::{self, ImageMsg, Join, VoteRefusal};
use vmfs_common::op::Op;
use vmfs_common::{BLOCK_BYTES, Digest, Epoch, Head, Seq};

use super::At;
use super::link::Packet;
use super::model::{Effect, block_bytes};
use super::world::World;

/// Header bytes and payload.
type Frame = (Rc<[u8]>, Rc<[u8]>);

/// What the liar has in mind.
#[derive(Debug, Default)]
pub(crate) struct Lying {
    /// So many of the next packets are altered.
    bend: u64,
    /// The next proposal is answered with a false vote.
    false_vote: bool,
    /// Until its turn: a packet that is sent after its successor.
    late: BTreeMap<At, Packet>,
    /// The tenure that the liar owns the image in, update by update.
    tenure: Option<Tenure>,
    branch: Option<Branch>,
    /// So many updates of the next branch.
    pub(crate) depth: u64,
    /// It has claimed what no protocol can tell from the truth: whoever trusts it may have lost something, and
    /// will not follow those who do not have it.
    pub(crate) beyond: bool,
}

#[derive(Debug)]
struct Tenure {
    secret: [u8; 32],
    updates: Vec<(Update, Effect)>,
}

/// Other updates for some members, with one parent as the true ones have.
#[derive(Debug)]
struct Branch {
    chain: OwnerChain,
    made: BTreeMap<Seq, Frame>,
    victims: BTreeSet<At>,
    left: u64,
}

impl World {
    fn liar(&self) -> Option<At> {
        self.hosts.iter().position(|h| h.liar)
    }

    /// Tells a lie, or prepares one.
    pub(crate) fn lie(&mut self) {
        let Some(liar) = self.liar().filter(|at| self.hosts[*at].copy().is_some()) else { return };
        self.counts.lies += 1;
        match self.rng.below(12) {
            0..=2 => self.forge(Some(liar)),
            3 | 4 => self.lying.bend = 1 + self.rng.below(4),
            5 => self.false_ack(liar),
            6 => self.lying.false_vote = true,
            7 | 8 => self.lying.depth = 1 + self.rng.below(3),
            9 => self.repeat_others(liar),
            _ => self.claim_a_ballot(liar),
        }
    }

    /// From here on it is as honest as the others.
    pub(crate) fn reform(&mut self) {
        if let Some(liar) = self.liar() {
            // What it has withheld on its streams is said anew.
            self.kill(liar);
        }
        self.lying = Lying { beyond: self.lying.beyond, ..Lying::default() };
    }

    fn inject(&mut self, from: At, to: At, m: &ImageMsg) {
        if from == to || self.net.session(to, from).is_none() || self.hosts[to].running.is_none() {
            return;
        }
        self.note(|| format!("{from} lies to {to}: {}", super::drive::brief(m)));
        self.receive(from, to, &Packet::Control(msg::encode(m).into()));
        self.settle(to);
    }

    /// Acknowledges what is not durable.
    fn false_ack(&mut self, liar: At) {
        let Some(copy) = self.hosts[liar].copy() else { return };
        let head = copy.store.head();
        let (store, owner) = (self.hosts[liar].id.store, self.at(head.epoch.host));
        if let Some(owner) = owner {
            self.lying.beyond = true;
            self.inject(liar, owner, &ImageMsg::Ack { head, store });
        }
    }

    /// Says in its own name what another host has said.
    fn repeat_others(&mut self, liar: At) {
        if self.oracle.heard.is_empty() {
            return;
        }
        let i = self.rng.index(self.oracle.heard.len());
        let (_, to, packet) = self.oracle.heard[i].clone();
        if to == liar || self.net.session(to, liar).is_none() || self.hosts[to].running.is_none() {
            return;
        }
        self.note(|| format!("{liar} says to {to} what another host has said"));
        self.receive(liar, to, &packet);
        self.settle(to);
    }

    /// Claims ballots that nobody has made, or asks for absurd ones.
    fn claim_a_ballot(&mut self, liar: At) {
        let to = self.rng.index(self.hosts.len());
        let Some(machine) = self.hosts[liar].machine() else { return };
        let state = machine.state();
        let (epoch, members, head) = (state.head().epoch, state.members.digest(), state.head());
        let store = self.hosts[liar].id.store;
        let witness = self.hosts[liar].role == vmfs_common::policy::MemberRole::Witness;
        let join = Join { store, head, durable: head, marks: Vec::new(), witness };
        let number = match self.rng.below(3) {
            0 => u64::MAX,
            1 => u64::MAX - self.rng.below(4),
            _ => epoch.number + 1 + self.rng.below(1000),
        };
        let named = if self.rng.one_in(2) { liar } else { to };
        let host = self.host_id(named);
        let claimed = Epoch { number, host };
        let m = match self.rng.below(3) {
            0 => ImageMsg::Refused { why: Refusal::Promised, seq: head.seq, promised: claimed, join },
            1 => ImageMsg::VoteRefused { ballot: self.ballot_of(to), why: VoteRefusal::Promised(claimed) },
            _ => {
                let (datastore, image) = (super::host::DATASTORE, super::host::IMAGE);
                let ballot = Epoch { number, host: self.host_id(liar) };
                let (pub0, secret_hash) = (Digest::from_bytes([1; 32]), Digest::from_bytes([2; 32]));
                let proposal = Proposal { datastore, image, ballot, members, pub0, secret_hash };
                self.oracle.proposals.insert(proposal.digest(), ballot);
                let occasion = vmfs_common::msg::Occasion::Operator;
                let role = self.hosts[to].role;
                ImageMsg::Propose { proposal, occasion, head, consent: None, role }
            }
        };
        self.inject(liar, to, &m);
    }

    /// The ballot that a host bids for at the moment, as far as it has said so.
    fn ballot_of(&self, at: At) -> Epoch {
        let host = self.host_id(at);
        self.oracle.proposals.values().copied().filter(|b| b.host == host).max().unwrap_or_default()
    }

    /// A proposal reaches the liar; true when it was answered with a false vote.
    pub(crate) fn false_vote(&mut self, from: At, liar: At, packet: &Packet) -> bool {
        let Packet::Control(bytes) = packet else { return false };
        if !self.hosts[liar].liar || !self.lying.false_vote {
            return false;
        }
        let Ok(ImageMsg::Propose { proposal, .. }) = msg::decode::<ImageMsg>(bytes) else { return false };
        let Some(copy) = self.hosts[liar].copy() else { return false };
        let (store, state) = (copy.store.clone(), copy.store.state());
        let below = Seq(self.rng.between(0, state.head().seq.0));
        let head = match (self.rng.below(3), store.head_at(below)) {
            (0, _) => Head {
                seq: Seq(state.head().seq.0 + 3),
                digest: Digest::from_bytes([9; 32]),
                epoch: state.head().epoch,
            },
            (_, Ok(Some(head))) => head,
            _ => return false,
        };
        let id = self.hosts[liar].id.clone();
        let vote = Vote {
            proposal: proposal.digest(),
            host: id.host,
            store: id.store,
            head,
            commit: Default::default(),
            acked: Default::default(),
            degraded: false,
            members_since: state.members_since,
            signature: Signature([0; 64]),
        };
        let vote = vote.signed(&id.key);
        (self.lying.false_vote, self.lying.beyond) = (false, true);
        self.inject(liar, from, &ImageMsg::Voted { vote, share: None });
        true
    }

    /// What the liar puts on the wire instead of `packet`.
    pub(crate) fn bent(&mut self, liar: At, to: At, packet: Packet) -> Vec<Packet> {
        let packet = self.forked(liar, to, packet);
        if self.lying.bend == 0 || matches!(packet, Packet::Beat { .. } | Packet::Close) {
            let late = self.lying.late.remove(&to);
            return std::iter::once(packet).chain(late).collect();
        }
        self.lying.bend -= 1;
        match self.rng.below(4) {
            0 => Vec::new(),
            1 => vec![packet.clone(), packet],
            2 => self.lying.late.insert(to, packet).into_iter().collect(),
            _ => vec![self.altered(packet)],
        }
    }

    fn altered(&mut self, packet: Packet) -> Packet {
        let mut flip = |bytes: &Rc<[u8]>| -> Rc<[u8]> {
            let mut bytes = bytes.to_vec();
            if !bytes.is_empty() {
                let at = self.rng.index(bytes.len());
                bytes[at] ^= 1 << self.rng.below(8);
            }
            bytes.into()
        };
        match packet {
            Packet::Control(bytes) => {
                // An altered acknowledgement or a Join may claim more than there is.
                let bent = flip(&bytes);
                self.lying.beyond = true;
                Packet::Control(bent)
            }
            Packet::Update(header, payload) if payload.is_empty() => Packet::Update(flip(&header), payload),
            Packet::Update(header, payload) => Packet::Update(header, flip(&payload)),
            other => other,
        }
    }

    // --- a lying owner ---

    /// The liar has made an update of its own.
    pub(crate) fn liar_made(&mut self, at: At, update: &Update, effect: &Effect) {
        if let Op::EpochStart(start) = &update.header.op {
            let secret = self.secret_of(at, start);
            let first = vec![(update.clone(), Effect::None)];
            self.lying.tenure = secret.map(|secret| Tenure { secret, updates: first });
            self.lying.branch = None;
        } else if let Some(t) = &mut self.lying.tenure {
            t.updates.push((update.clone(), effect.clone()));
        }
    }

    /// The epoch's secret, from the liar's own records.
    fn secret_of(&self, at: At, start: &EpochStart) -> Option<[u8; 32]> {
        let next = self.hosts[at].copy().and_then(|c| c.meta_next.as_ref()).map(|(_, m)| m.as_slice());
        let records =
            [next, self.hosts[at].known.meta.as_deref(), self.hosts[at].known.meta_maybe.as_deref()];
        let windows = records.into_iter().flatten().flat_map(|r| r.windows(32));
        let mut secrets = windows.filter_map(|w| <[u8; 32]>::try_from(w).ok());
        secrets.find(|s| EpochSecret::from_bytes(*s).commitment() == start.proposal.secret_hash)
    }

    /// The other update that this member gets in the place of a true one.
    fn forked(&mut self, liar: At, to: At, packet: Packet) -> Packet {
        let Packet::Update(header, _) = &packet else { return packet };
        let Ok(update) = Update::decode(header) else { return packet };
        if self.lying.tenure.as_ref().is_none_or(|t| t.updates[0].0.header.epoch != update.header.epoch) {
            return packet;
        }
        let seq = update.header.seq;
        let writes = matches!(update.header.op, Op::Write { .. }) && update.header.payload_blocks() > 0;
        if self.lying.branch.is_none() && self.lying.depth > 0 && writes {
            self.begin_branch(liar, to, seq);
        }
        let Some(branch) = &self.lying.branch else { return packet };
        if !branch.victims.contains(&to) {
            return packet;
        }
        if let Some((header, payload)) = branch.made.get(&seq) {
            let payload = if self.is_bare(&packet) { Rc::from([]) } else { payload.clone() };
            return Packet::Update(header.clone(), payload);
        }
        if branch.left == 0 || branch.chain.tip().head.seq.next() != seq {
            return packet;
        }
        match self.twin(liar, &update) {
            Some((header, payload)) => {
                let payload = if self.is_bare(&packet) { Rc::from([]) } else { payload };
                Packet::Update(header, payload)
            }
            None => packet,
        }
    }

    fn is_bare(&self, packet: &Packet) -> bool {
        let Packet::Update(header, payload) = packet else { return false };
        payload.is_empty() && Update::decode(header).is_ok_and(|u| u.header.payload_blocks() > 0)
    }

    fn begin_branch(&mut self, liar: At, to: At, seq: Seq) {
        let left = std::mem::take(&mut self.lying.depth);
        let Some(t) = &self.lying.tenure else { return };
        let Some(chain) = chain_to(t, seq.prev()) else { return };
        let mut victims = BTreeSet::from([to]);
        let other = self.rng.index(self.hosts.len());
        if self.rng.one_in(3) && other != liar {
            victims.insert(other);
        }
        self.note(|| format!("{liar} forks its chain at {seq} for {victims:?}, {left} updates deep"));
        self.lying.beyond = true;
        self.lying.branch = Some(Branch { chain, made: BTreeMap::new(), victims, left });
    }

    /// Makes the branch's next update after the model of the true one.
    fn twin(&mut self, liar: At, update: &Update) -> Option<Frame> {
        let h = &update.header;
        let t = self.lying.tenure.as_ref()?;
        let mut effect = t.updates.iter().find(|(u, _)| u.digest == update.digest)?.1.clone();
        let mut draft = draft_of(update);
        let mut payload = Vec::new();
        if let Effect::Write { start, fills } = &mut effect {
            let fresh = u32::try_from(self.next_token & 0xff_ffff).ok()? + 1;
            self.next_token += 1;
            let mut block = [0u8; BLOCK_BYTES];
            draft.digests.clear();
            for (i, fill) in fills.iter_mut().enumerate() {
                *fill = if *fill == 0 { 0 } else { fresh };
                block_bytes(*fill, *start + i, &mut block);
                draft.digests.push(block_digest(&block));
                if *fill != 0 {
                    payload.extend_from_slice(&block);
                }
            }
        }
        let key = self.hosts[liar].id.key.clone();
        let branch = self.lying.branch.as_mut()?;
        let twin = match &h.op {
            Op::Seal(_) => branch.chain.seal(&key, h.time_ns, h.commit, h.acked.clone()),
            _ => branch.chain.append(draft, h.time_ns, h.commit, h.acked.clone()),
        };
        branch.left -= 1;
        let bytes: Frame = (Rc::from(&*twin.bytes), payload.into());
        branch.made.insert(twin.header.seq, bytes.clone());
        self.note(|| format!("{liar} signs another {}", twin.header.seq));
        let added = self.model.add(twin.head(), twin.header.parent, effect, h.time_ns, false);
        added.expect("invariant: a twin follows what the liar has signed");
        Some(bytes)
    }
}

fn draft_of(update: &Update) -> Draft {
    let h = &update.header;
    Draft { op: h.op.clone(), start: h.start, count: h.count, digests: h.digests.clone(), flags: h.flags }
}

/// The owner's end of the chain as it was after update `upto`.
fn chain_to(t: &Tenure, upto: Seq) -> Option<OwnerChain> {
    let (first, _) = t.updates.first()?;
    let (h, secret) = (&first.header, EpochSecret::from_bytes(t.secret));
    let Op::EpochStart(start) = &h.op else { return None };
    let head = Head { seq: h.seq.prev(), digest: h.parent, ..Head::default() };
    let parent = Tip { head, time_ns: h.time_ns, flags: h.flags & FLAG_DEGRADED, ..Tip::default() };
    let (mut chain, again) = OwnerChain::begin(secret, &parent, (**start).clone(), h.time_ns);
    if again.digest != first.digest {
        return None;
    }
    for (update, _) in t.updates.iter().skip(1).take_while(|(u, _)| u.header.seq <= upto) {
        let h = &update.header;
        if chain.append(draft_of(update), h.time_ns, h.commit, h.acked.clone()).digest != update.digest {
            return None;
        }
    }
    (chain.tip().head.seq == upto).then_some(chain)
}
