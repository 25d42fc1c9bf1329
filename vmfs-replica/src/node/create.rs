//! New images: those made here, and copies offered by other hosts.

use std::sync::Arc;
use std::time::{Duration, Instant};

use vmfs_common::config::Replicas;
use vmfs_common::election::Genesis;
use vmfs_common::header::{FORMAT_LEVEL, Update};
use vmfs_common::msg::ImageMsg;
use vmfs_common::op::{Attrs, Op};
use vmfs_common::policy::{Member, MemberList, MemberRole};
use vmfs_common::state::ImageState;
use vmfs_common::{HostId, ImageId, Seq};
use vmfs_net::HostRole;
use vmfs_proto::{Input, Machine};
use vmfs_store::StoreError;

use super::image::Image;
use super::io::IoError;
use super::{NodeInner, fill_random};

/// Copies that one host has offered and sent nothing of.
const BLANK_MAX: usize = 256;
/// They are kept this long while that host is away.
const OFFERED_KEPT: Duration = Duration::from_secs(60);

/// Why an image was not made.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// A host of the datastore has an image of that path already.
    #[error("the path is taken")]
    Exists,
    /// The policy of this host does not make a valid member list.
    #[error("the policy for this path does not make a valid member list")]
    Policy,
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Its first updates could not be appended.
    #[error(transparent)]
    Io(#[from] IoError),
}

impl NodeInner {
    /// The image on this host, not unlinked, whose chain claims `path`.
    pub fn image_claiming(&self, path: &str) -> Option<Arc<Image>> {
        let claims = |i: &Arc<Image>| {
            let state = i.state();
            !state.unlinked && state.path.as_deref() == Some(path)
        };
        let mut found: Vec<_> = self.images().into_iter().filter(claims).collect();
        // A locally owned image wins a name, else the lowest id.
        found.sort_by_key(|i| (!i.is_owner_here(), i.id));
        found.into_iter().next()
    }

    /// Makes an image that this host owns. Its name and attributes are in its chain on return, on this
    /// host's stable storage, and on its members' with its first flush.
    ///
    /// # Errors
    /// See [`CreateError`]; nothing is left behind.
    pub fn create_image(
        self: &Arc<Self>,
        path: &str,
        attrs: &Attrs,
        xattrs: &[(String, Vec<u8>)],
    ) -> Result<Arc<Image>, CreateError> {
        if self.image_claiming(path).is_some() || self.is_claimed_elsewhere(path) {
            return Err(CreateError::Exists);
        }
        let rule = self.config.policy_for(path);
        let (members, missing) = self.members_for(&rule.replicas, &rule.witnesses)?;
        let mut id = [0; ImageId::LEN];
        fill_random(&mut id);
        let id = ImageId::from_bytes(id);
        let store = self.store.create_image(id, MemberRole::Replica)?;
        let genesis = Genesis { members, policy: rule.image_policy(), attrs: *attrs, level: FORMAT_LEVEL };
        let image = self.admit(store, |image_env, identity, timing, out| {
            Machine::genesis(image_env, identity, timing, id, genesis, out)
        });
        *image.missing.lock() = missing;
        let named = image.control(|_| Some(Op::Name { path: path.to_owned() })).and_then(|()| {
            xattrs.iter().try_for_each(|(name, value)| {
                image.control(|_| Some(Op::Xattr { name: name.clone(), value: Some(value.clone()) }))
            })
        });
        // Durable here before anybody is told of the name: a catalog never names what a power cut took.
        let durable = named.and_then(|()| image.store.sync().map_err(IoError::from));
        if let Err(e) = durable {
            self.forget(&image)?;
            return Err(e.into());
        }
        self.claims_changed();
        Ok(image)
    }

    /// Members by the policy: this host, and the named or the first so many others. Hosts whose store
    /// was never met are returned apart.
    fn members_for(
        &self,
        replicas: &Replicas,
        witnesses: &[vmfs_common::config::HostName],
    ) -> Result<(MemberList, Vec<HostId>), CreateError> {
        let me = self.identity.host;
        let hosts = self.network().hosts();
        let is_witness = |name: &str| witnesses.iter().any(|w| w.as_str() == name);
        let mut others: Vec<_> = hosts.iter().filter(|h| h.host != me).collect();
        others.sort_by_key(|h| h.name.clone());
        let data: Vec<_> = others
            .iter()
            .filter(|h| !is_witness(&h.name) && h.roles.iter().any(|r| *r != HostRole::Witness))
            .copied()
            .collect();
        let chosen: Vec<_> = match replicas {
            Replicas::All(_) => data,
            Replicas::Count(n) => {
                let mut ready = data;
                ready.sort_by_key(|h| (self.session(h.host).is_none(), h.name.clone()));
                ready.into_iter().take(usize::from(*n)).collect()
            }
            Replicas::Named(names) => {
                data.into_iter().filter(|h| names.iter().any(|n| n.as_str() == h.name)).collect()
            }
        };
        let own = Member {
            host: me,
            store: self.identity.store,
            key: self.identity.key.public(),
            role: MemberRole::Replica,
        };
        let (mut members, mut missing) = (vec![own], Vec::new());
        let with_role = chosen
            .into_iter()
            .map(|h| (h, MemberRole::Replica))
            .chain(others.iter().filter(|h| is_witness(&h.name)).map(|h| (*h, MemberRole::Witness)));
        for (entry, role) in with_role {
            match self.known_store(entry.host) {
                Some(store) => {
                    members.push(Member { host: entry.host, store, key: entry.public_key, role });
                }
                None => missing.push(entry.host),
            }
        }
        let list = MemberList::new(members).map_err(|_| CreateError::Policy)?;
        Ok((list, missing))
    }

    /// Begins a copy of an image not known here when `message` offers it or asks for a vote on it. `None`
    /// when it does neither as an honest host would.
    ///
    /// # Errors
    /// The store's, or too many such copies of this host have not received anything yet.
    pub(super) fn take_offer(
        self: &Arc<Self>,
        from: HostId,
        id: ImageId,
        message: &ImageMsg,
    ) -> Result<Option<Arc<Image>>, StoreError> {
        let Some(role) = self.role_offered(from, id, message) else { return Ok(None) };
        let mut introduced = self.introduced.lock();
        if let Some(image) = self.image(id) {
            return Ok(Some(image));
        }
        introduced.retain(|id, _| self.image(*id).is_some_and(|i| i.store.head().seq == Seq::ZERO));
        if introduced.values().filter(|(host, _)| *host == from).count() >= BLANK_MAX {
            self.refused("flood", from, &"offers of images that it sends nothing of");
            return Err(StoreError::Full);
        }
        // Where the copy was lost its promises may still be here: they bind the next one, too.
        let meta = self.store.get_meta(id);
        let store = self.store.create_image(id, role)?;
        let image = self.admit(store, |env, identity, timing, out| {
            let Some(meta) = &meta else { return Machine::blank(env, identity, timing, id, role, out) };
            let state = ImageState::new(id);
            let (id2, timing2) = (identity.clone(), timing.clone());
            Machine::recover(env, id2, timing2, role, state, None, Some(meta), out).unwrap_or_else(|e| {
                tracing::error!(image = %id, "its promises cannot be read, so it takes no part: {e}");
                let mut machine = Machine::blank(env, identity, timing, id, role, &mut Vec::new());
                machine.handle(env, Input::StoreFailed, &mut Vec::new());
                machine
            })
        });
        introduced.insert(id, (from, Instant::now()));
        tracing::info!(image = %id, ?role, "keeping a copy");
        Ok(Some(image))
    }

    /// What this host is to keep of an image that `message` is the first word of: nothing is made for
    /// what is not signed by the host it comes from.
    fn role_offered(&self, from: HostId, id: ImageId, message: &ImageMsg) -> Option<MemberRole> {
        let datastore = self.identity.datastore;
        let (role, good) = match message {
            ImageMsg::Propose { proposal: p, role, .. } => {
                (*role, p.image == id && p.ballot.host == from && p.datastore == datastore)
            }
            ImageMsg::Offer { start, certificate, role, .. } => {
                let key = self.network().public_key(from);
                let signed = |u: &Update| match &u.header.op {
                    Op::EpochStart(args) => {
                        let h = &u.header;
                        u.head() == *start
                            && h.epoch.host == from
                            && args.is_for(id, h.epoch, &h.public)
                            && args.proposal.datastore == datastore
                            && key.is_some_and(|k| args.is_signed_by(h.seq, &h.parent, &k))
                    }
                    _ => false,
                };
                (*role, Update::decode(certificate).is_ok_and(|u| u.header.image == id && signed(&u)))
            }
            _ => return None,
        };
        if !good {
            self.refused("bad-certificate", from, &"an offer of an image that is not known here");
        }
        good.then_some(role)
    }

    /// Forgets copies that were offered, have received nothing and promised nothing, and whose offering
    /// host is gone.
    pub(super) fn sweep_offered(self: &Arc<Self>) {
        let old: Vec<_> = {
            let introduced = self.introduced.lock();
            let gone =
                |(host, at): &(HostId, Instant)| at.elapsed() > OFFERED_KEPT && self.session(*host).is_none();
            introduced.iter().filter(|(_, v)| gone(v)).map(|(id, _)| *id).collect()
        };
        for id in old {
            self.introduced.lock().remove(&id);
            let Some(image) = self.image(id).filter(|i| i.pulling().is_none() && i.retire_untouched()) else {
                continue;
            };
            tracing::info!(image = %id, "offered, and nothing came of it: forgotten");
            if let Err(e) = self.forget(&image) {
                tracing::warn!(image = %id, "cannot remove an image that nothing came of: {e}");
            }
        }
    }

    /// Drops this host's copy of an image on an operator's word: another lineage of it is to be kept.
    ///
    /// # Errors
    /// The store.
    pub(crate) fn discard(&self, image: &Arc<Image>) -> Result<(), StoreError> {
        tracing::warn!(image = %image.id, "the copy of this host is dropped, as ordered");
        self.forget(image)
    }

    /// Drops an image from this host: its copy, its forks, its promises.
    pub(super) fn forget(&self, image: &Arc<Image>) -> Result<(), StoreError> {
        self.images.write().remove(&image.id);
        let lines = std::mem::take(&mut *image.lines.lock());
        lines.values().for_each(|l| l.close());
        self.claims_changed();
        self.store.remove_image(image.id)?;
        self.store.remove_meta(image.id)
    }

    /// Tells a new machine who is connected.
    pub(super) fn introduce(&self, image: &Arc<Image>) {
        self.connected().into_iter().for_each(|host| image.input(Input::PeerUp { host }));
    }
}
