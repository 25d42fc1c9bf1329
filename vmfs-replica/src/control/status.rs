//! What the engine tells about itself.

use std::collections::BTreeMap;
use std::sync::Arc;

use vmfs_common::Seq;
use vmfs_common::policy::MemberRole;
use vmfs_common::state::ImageState as State;
use vmfs_proto::{Health, Role, Shortage, Status};

use super::NodeControl;
use super::scrub::damage;
use crate::api::{
    ApiError, ForkInfo, ImageInfo, ImageRole, ImageState, ImageStatus, MemberName, MemberState, MemberStatus,
    PeerStatus, PolicyReport, StatusReport, Unopened,
};
use crate::node::Image;

const fn role(role: Role) -> ImageRole {
    match role {
        Role::Owner => ImageRole::Owner,
        Role::Replica => ImageRole::Replica,
        Role::Witness => ImageRole::Witness,
    }
}

const fn member_role(role: MemberRole, is_owner: bool) -> ImageRole {
    match role {
        _ if is_owner => ImageRole::Owner,
        MemberRole::Replica => ImageRole::Replica,
        MemberRole::Witness => ImageRole::Witness,
    }
}

const fn state(health: Health) -> ImageState {
    match health {
        Health::Ok => ImageState::Ok,
        Health::CatchingUp => ImageState::CatchingUp,
        Health::Degraded => ImageState::Degraded,
        Health::Stalled => ImageState::Stalled,
        Health::Fenced => ImageState::Fenced,
        Health::Failed => ImageState::Failed,
    }
}

impl NodeControl {
    pub(super) fn status_report(&self) -> StatusReport {
        let node = &self.node;
        let network = node.network();
        let mut peers: Vec<_> = network
            .peers()
            .into_iter()
            .map(|p| PeerStatus {
                connected: p.connection.is_some(),
                rtt_us: p.connection.as_ref().and_then(|c| u64::try_from(c.rtt.as_micros()).ok()),
                error: if p.connection.is_some() { None } else { p.last_error },
                host: p.entry.name,
                host_id: p.entry.host,
                address: Some(p.entry.address),
            })
            .collect();
        peers.sort_by(|a, b| a.host.cmp(&b.host));
        let mut images: Vec<_> =
            node.images().iter().filter(|i| !i.state().unlinked).map(|i| self.image_status(i)).collect();
        images.sort_by(|a, b| (&a.path, a.id).cmp(&(&b.path, b.id)));
        let mut refusals: BTreeMap<String, u64> =
            network.counters().into_iter().map(|(k, v)| (k.to_owned(), v)).collect();
        for (why, n) in images.iter().flat_map(|i| &i.refusals) {
            *refusals.entry(why.clone()).or_default() += n;
        }
        for (why, n) in node.refusals() {
            *refusals.entry(why.to_owned()).or_default() += n;
        }
        StatusReport {
            host: node.config.host.as_str().to_owned(),
            host_id: node.identity.host,
            store_id: node.identity.store,
            datastore: node.identity.datastore,
            mount: self.mount.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            peers,
            images,
            refusals,
            damage: damage(node.store.rot()),
            unopened: node.store.damaged().into_iter().map(|(id, reason)| Unopened { id, reason }).collect(),
        }
    }

    pub(super) fn image_status(&self, image: &Arc<Image>) -> ImageStatus {
        let status = image.status();
        let of = image.state();
        let damage = damage(image.rot());
        let space = image.space_use();
        ImageStatus {
            path: of.path.clone().unwrap_or_else(|| format!("({})", image.id.short())),
            id: image.id,
            size: of.size_bytes,
            stored_bytes: space.live_bytes,
            segment_bytes: space.segment_bytes,
            compacted_bytes: space.compacted_bytes,
            role: role(status.role),
            owner: status.owner.map(|h| self.node.host_name(h)),
            epoch: status.epoch.number,
            seq: status.head.seq.0,
            flushed_seq: status.flushed_seq.0,
            state: match state(status.health) {
                // A copy with a hole is not the copy that the policy asks for.
                ImageState::Ok if !damage.open.is_empty() => ImageState::Degraded,
                state => state,
            },
            reason: self.reason(image, &status),
            forced: status.forced,
            members: self.members(image, &status),
            refusals: status.refusals.iter().map(|(why, n)| (refusal_word(*why), *n)).collect(),
            forks: image.fork_infos().len() as u64,
            damage,
            scrub: self.scrub_status(image),
        }
    }

    pub(super) fn reason(&self, image: &Image, status: &Status) -> Option<String> {
        if let Some(why) = image.latched() {
            return Some(why);
        }
        if let [first, more @ ..] = image.rot().open.as_slice() {
            let more = if more.is_empty() { String::new() } else { format!(" and {} more", more.len()) };
            return Some(format!("damaged here, no good copy reached yet: {first}{more}"));
        }
        if let Some(done) = image.pulling() {
            return Some(format!("copying blocks: {done} so far"));
        }
        let missing: Vec<_> =
            status.members.iter().filter(|m| !m.connected).map(|m| self.node.host_name(m.host)).collect();
        let waits = waits_for(status.shortage);
        let stranger = |m: &&vmfs_proto::MemberStatus| m.connected && m.health == Health::Fenced;
        let strangers: Vec<_> =
            status.members.iter().filter(stranger).map(|m| self.node.host_name(m.host)).collect();
        match status.health {
            Health::Ok => None,
            _ if status.role == Role::Owner && !strangers.is_empty() => Some(format!(
                "{}: another store than the one that was admitted, or another lineage",
                strangers.join(", ")
            )),
            Health::Stalled if waits.is_some() && !missing.is_empty() => {
                waits.map(|w| format!("{w}; not connected: {}", missing.join(", ")))
            }
            Health::Degraded | Health::Stalled if !missing.is_empty() => {
                Some(format!("not connected: {}", missing.join(", ")))
            }
            Health::Fenced => Some("ownership is elsewhere".to_owned()),
            Health::Failed => Some("the store could not be written; see the log".to_owned()),
            Health::Stalled if status.role == Role::Replica => {
                let owner = status.owner.map_or_else(|| "nobody".to_owned(), |h| self.node.host_name(h));
                Some(format!("no owner; {owner} was the last one known here"))
            }
            _ => None,
        }
    }

    fn members(&self, image: &Image, status: &Status) -> Vec<MemberStatus> {
        let me = self.node.identity.host;
        let head = status.head.seq;
        let member = |m: &vmfs_proto::MemberStatus| MemberStatus {
            host: self.node.host_name(m.host),
            role: member_role(m.role, status.owner == Some(m.host)),
            state: match m.health {
                Health::Failed => MemberState::Parked,
                _ if m.host == me && image.pulling().is_some() => MemberState::Syncing,
                _ if status.role != Role::Owner && m.host != me => MemberState::Unknown,
                _ if !m.connected => MemberState::Offline,
                Health::Fenced => MemberState::Stranger,
                _ if m.host == me || m.durable_seq >= head || m.health == Health::Ok => MemberState::InSync,
                _ => MemberState::CatchingUp,
            },
            seq: m.seq.0,
            durable_seq: m.durable_seq.0,
            lag_bytes: m.lag_bytes,
        };
        status.members.iter().map(member).collect()
    }

    /// The owner: every member has everything up to `wanted` on stable storage, which is set to the head at
    /// the first call: while a guest writes, somebody always lacks the newest update. Another member: it
    /// has all that it knows of.
    pub(super) fn in_sync(&self, image: &Image, wanted: &mut Option<Seq>) -> bool {
        let status = image.status();
        match status.role {
            Role::Owner => {
                // A change of owner may have cut off what was wanted.
                let wanted = status.head.seq.min(*wanted.get_or_insert(status.head.seq));
                status.commit.0 > 0 && status.members.iter().all(|m| m.admitted && m.durable_seq >= wanted)
            }
            _ => status.health == Health::Ok && image.pulling().is_none(),
        }
    }

    pub(super) fn member_names(&self, of: &State) -> Vec<MemberName> {
        let owner = of.head().epoch.host;
        let name = |m: &vmfs_common::policy::Member| MemberName {
            host: self.node.host_name(m.host),
            role: member_role(m.role, m.host == owner),
        };
        of.members.all().iter().map(name).collect()
    }

    pub(super) fn policy_report(&self, path: String, image: &Image) -> PolicyReport {
        let of = image.state();
        PolicyReport {
            image: path,
            acks: of.policy.acks,
            on_quorum_loss: of.policy.on_quorum_loss,
            members: self.member_names(&of),
            quorum: of.members.quorum() as u64,
            data_copies: of.members.data_copies() as u64,
        }
    }

    pub(super) fn image_info(&self, image: &Arc<Image>) -> Result<ImageInfo, ApiError> {
        let status = self.image_status(image);
        let of = image.state();
        Ok(ImageInfo {
            policy: self.policy_report(status.path.clone(), image),
            fork_list: image.fork_infos(),
            head_digest: of.head().digest.to_string(),
            log_start_seq: image.log_start().0,
            last_update_ms: of.tip.time_ns / 1_000_000,
            status,
        })
    }
}

/// What flushes wait for, in words.
fn waits_for(shortage: Shortage) -> Option<String> {
    let more = |n: usize, one: &str, many: &str| {
        if n == 1 { format!("one more {one}") } else { format!("{n} more {many}") }
    };
    match shortage {
        Shortage { votes: 0, copies: 0 } => None,
        Shortage { votes: 0, copies: n } => {
            Some(format!("flushes wait for {}", more(n, "copy of the data", "copies of the data")))
        }
        Shortage { votes: n, .. } => Some(format!("flushes wait for {}", more(n, "member", "members"))),
    }
}

/// A refusal's name as the API spells it.
fn refusal_word(why: vmfs_common::chain::Refusal) -> String {
    serde_json::to_value(why).ok().and_then(|v| v.as_str().map(str::to_owned)).unwrap_or_default()
}

impl Image {
    pub(super) fn fork_infos(&self) -> Vec<ForkInfo> {
        let of = self.state();
        let info = |f: vmfs_store::ForkInfo| ForkInfo {
            fork: self.fork_public_name(&f.name),
            image: of.path.clone().unwrap_or_default(),
            image_id: self.id,
            epoch: f.head.epoch.number,
            first_seq: f.ancestor.seq.next().0,
            last_seq: f.head.seq.0,
            bytes: f.bytes,
            created_ms: f.time_ns / 1_000_000,
            reason: format!("not part of the chain that epoch {} adopted", of.head().epoch.number),
        };
        self.store_forks().into_iter().map(info).collect()
    }
}
