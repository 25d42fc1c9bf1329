//! The control API's requests, answered by the engine.

mod forks;
mod metrics;
mod scrub;
mod status;
mod verify;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vmfs_common::policy::{ImagePolicy, Member, MemberRole};
use vmfs_common::{HostId, op::PATH_MAX_BYTES};
use vmfs_proto::{Input, OpError, OpOutcome};

use crate::api::{
    AbandonReport, AbandonRequest, Answer, ApiError, Control, FailReport, ForkDropRequest, ForkExportReport,
    ForkExportRequest, ForkInfo, ForkList, HandoverReport, HandoverRequest, HostInfo, HostList,
    HostRemoveRequest, ImageInfo, ImageRequest, InviteReport, InviteRequest, Loss, PolicyReport,
    PolicySetRequest, Progress, PromoteReport, PromoteRequest, ReplicaAddRequest, ReplicaRemoveRequest,
    ReplicaReport, ScrubReport, ScrubRequest, StatusReport, Unit, VerifyReport, VerifyRequest, WaitReport,
    WaitRequest,
};
use crate::node::{Ask, Image, Node, Pending, Told};

/// How often a waiting request looks again.
const POLL: Duration = Duration::from_millis(20);
/// How long a hand-over waits for the successor's mount.
const SETTLE_MAX: Duration = Duration::from_secs(2);
/// An invitation is good for this long unless asked otherwise.
const INVITE_TTL: Duration = Duration::from_secs(3600);

/// The engine as the control API sees it.
pub struct NodeControl {
    node: Node,
    mount: Option<PathBuf>,
}

impl NodeControl {
    /// For a daemon whose images are mounted at `mount`, if they are.
    #[must_use]
    pub const fn new(node: Node, mount: Option<PathBuf>) -> Self {
        Self { node, mount }
    }

    fn image(&self, path: &str) -> Result<Arc<Image>, ApiError> {
        let not_found =
            || ApiError::not_found(format!("no image {path:?} on host {}", self.node.config.host));
        if path.len() > PATH_MAX_BYTES {
            return Err(not_found());
        }
        if let Some(image) = self.node.image_claiming(path) {
            return Ok(image);
        }
        // A name that lost to another image's is shown with the first digits of its id.
        let (name, digits) = path.rsplit_once('~').ok_or_else(not_found)?;
        let is_it = |i: &Arc<Image>| {
            i.state().path.as_deref() == Some(name) && i.id.to_string().get(..8) == Some(digits)
        };
        self.node.images().into_iter().find(is_it).ok_or_else(not_found)
    }

    fn host(&self, name: &str) -> Result<vmfs_net::HostEntry, ApiError> {
        let entry = self.node.network().directory().by_name(name);
        entry.ok_or_else(|| ApiError::not_found(format!("no host {name:?} in this datastore")))
    }

    /// Asks the machine and waits for its answer. Runs to its end even when the client goes away.
    async fn operate(
        &self,
        image: &Arc<Image>,
        progress: &Progress,
        stage: &str,
        make: impl FnOnce(u64) -> Input,
    ) -> Result<OpOutcome, ApiError> {
        let (answer, mut answered) = tokio::sync::oneshot::channel();
        let token = image.token(Pending::Operator(answer));
        image.input(make(token));
        let mut look = tokio::time::interval(Duration::from_millis(200));
        loop {
            tokio::select! {
                result = &mut answered => {
                    let result = result.map_err(|_| ApiError::failed("the daemon is stopping"))?;
                    return result.map_err(|e| self.refusal(image, &e));
                }
                _ = look.tick() => {
                    let (done, total) = image.progress();
                    progress.report(stage, done, total, Unit::Updates);
                }
            }
        }
    }

    fn refusal(&self, image: &Image, e: &OpError) -> ApiError {
        let path = image.state().path.clone().unwrap_or_default();
        match e {
            OpError::NoQuorum { answers, .. } => {
                let said: Vec<_> =
                    answers.iter().map(|(h, a)| format!("{}: {a}", self.node.host_name(*h))).collect();
                ApiError::no_quorum(format!("{path}: {e} ({})", said.join(", ")))
            }
            OpError::DataMissing { .. } | OpError::BelowCommit { .. } | OpError::Timeout => {
                ApiError::no_quorum(format!("{path}: {e}"))
            }
            OpError::NotOwner => {
                let owner = image.owner().map_or_else(|| "nobody".to_owned(), |h| self.node.host_name(h));
                ApiError::failed(format!("{path}: {e}; the owner is {owner}"))
            }
            _ => ApiError::failed(format!("{path}: {e}")),
        }
    }

    async fn promote(&self, request: PromoteRequest, progress: Progress) -> Result<PromoteReport, ApiError> {
        let image = self.image(&request.image)?;
        let others = request.members.iter().map(|m| self.host(m)).collect::<Result<Vec<_>, _>>()?;
        let begun = Instant::now();
        let force = request.force;
        let outcome = self
            .operate(&image, &progress, "collecting votes", |token| Input::Promote { force, token })
            .await?;
        let OpOutcome::Promoted { epoch, loss, forced } = outcome else {
            return Err(ApiError::failed("the election ended without an epoch"));
        };
        self.node.settle_mount().await;
        for entry in others.into_iter().filter(|_| forced) {
            self.add_member(&image, &progress, &entry, MemberRole::Replica).await?;
        }
        let state = image.state();
        Ok(PromoteReport {
            image: request.image,
            id: image.id,
            epoch: epoch.number,
            seq: state.epoch_start().map_or(0, |e| e.start.seq.0),
            loss: loss_report(&loss),
            forced,
            warning: self.reason(&image, &image.status()),
            elapsed_ms: ms(begun),
        })
    }

    async fn handover(
        &self,
        request: HandoverRequest,
        progress: Progress,
    ) -> Result<HandoverReport, ApiError> {
        let image = self.image(&request.image)?;
        let to = self.host(&request.to)?;
        let begun = Instant::now();
        let host = to.host;
        let outcome = self
            .operate(&image, &progress, "handing over", |token| Input::Handover { to: host, token })
            .await?;
        let pause_ms = ms(begun);
        let OpOutcome::HandedOver { epoch } = outcome else {
            return Err(ApiError::failed("the hand-over ended without an epoch"));
        };
        self.node.settle_mount().await;
        self.settle_successor(host).await;
        Ok(HandoverReport {
            image: request.image,
            id: image.id,
            owner: to.name,
            epoch: epoch.number,
            pause_ms,
        })
    }

    /// Waits until the new owner's mount shows the image as its own: a page its kernel read before must not
    /// be read again.
    async fn settle_successor(&self, host: HostId) {
        let (begun, mut version) = (Instant::now(), 0);
        while begun.elapsed() < SETTLE_MAX {
            match self.node.ask(host, &Ask::Settle { version }).await {
                Ok((Told::Settling { version: at }, _)) => version = at,
                // Done, or gone: then there is nothing to wait for.
                _ => return,
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        tracing::warn!("the mount of {} is slow to show a change of ownership", self.node.host_name(host));
    }

    async fn add_member(
        &self,
        image: &Arc<Image>,
        progress: &Progress,
        entry: &vmfs_net::HostEntry,
        role: MemberRole,
    ) -> Result<(), ApiError> {
        let store = self.node.met_store(entry.host).ok_or_else(|| {
            ApiError::failed(format!("host {} has not been met yet: its store is not known", entry.name))
        })?;
        let member = Member { host: entry.host, store, key: entry.public_key, role };
        self.operate(image, progress, "catching up", |token| Input::AddMember { member, token }).await?;
        Ok(())
    }

    async fn replica_add(
        &self,
        request: ReplicaAddRequest,
        progress: Progress,
    ) -> Result<ReplicaReport, ApiError> {
        let image = self.image(&request.image)?;
        let entry = self.host(&request.host)?;
        let role = if request.witness { MemberRole::Witness } else { MemberRole::Replica };
        self.add_member(&image, &progress, &entry, role).await?;
        Ok(self.replica_report(request.image, &image))
    }

    async fn replica_remove(
        &self,
        request: ReplicaRemoveRequest,
        progress: Progress,
    ) -> Result<ReplicaReport, ApiError> {
        let image = self.image(&request.image)?;
        // Also a host that is no longer in the directory can be removed from an image, by its id.
        let host = match self.host(&request.host) {
            Ok(entry) => entry.host,
            Err(e) => request.host.parse::<HostId>().map_err(|_| e)?,
        };
        self.operate(&image, &progress, "removing", |token| Input::RemoveMember { host, token }).await?;
        Ok(self.replica_report(request.image, &image))
    }

    fn replica_report(&self, path: String, image: &Image) -> ReplicaReport {
        let state = image.state();
        ReplicaReport { image: path, seq: state.config_seq.0, members: self.member_names(&state) }
    }

    async fn policy_set(&self, request: PolicySetRequest) -> Result<PolicyReport, ApiError> {
        let image = self.image(&request.image)?;
        let old = image.state().policy;
        let policy = ImagePolicy {
            acks: request.acks.unwrap_or(old.acks),
            on_quorum_loss: request.on_quorum_loss.unwrap_or(old.on_quorum_loss),
        };
        if policy != old {
            let make = |token| Input::SetPolicy { policy, token };
            self.operate(&image, &Progress::ignored(), "changing the policy", make).await?;
        }
        Ok(self.policy_report(request.image, &image))
    }

    async fn fail(&self, request: ImageRequest) -> Result<FailReport, ApiError> {
        let image = self.image(&request.image)?;
        let failed_requests = image.waiting();
        self.operate(&image, &Progress::ignored(), "failing", |token| Input::Fail { token }).await?;
        Ok(FailReport { image: request.image, failed_requests })
    }

    async fn abandon(&self, request: AbandonRequest) -> Result<AbandonReport, ApiError> {
        let image = self.image(&request.image)?;
        if request.discard {
            let node = self.node.clone();
            let discarded = tokio::task::spawn_blocking(move || node.discard(&image)).await;
            discarded.map_err(ApiError::failed)?.map_err(ApiError::failed)?;
        } else {
            let make = |token| Input::AbandonForced { token };
            self.operate(&image, &Progress::ignored(), "giving up", make).await?;
        }
        self.node.settle_mount().await;
        Ok(AbandonReport { image: request.image, discarded: request.discard })
    }

    async fn wait(&self, request: WaitRequest, progress: Progress) -> Result<WaitReport, ApiError> {
        let begun = Instant::now();
        let limit = request.timeout_ms.map(Duration::from_millis);
        let mut wanted = None;
        loop {
            let found = self.image(&request.image);
            if let Ok(image) = &found {
                let (done, total) = image.progress();
                progress.report("catching up", done, total, Unit::Updates);
                if !request.in_sync || self.in_sync(image, &mut wanted) {
                    let status = self.image_status(image);
                    return Ok(WaitReport { status, waited_ms: ms(begun) });
                }
            }
            if limit.is_some_and(|l| begun.elapsed() >= l) {
                found?;
                return Err(ApiError::failed(format!("{}: not in sync in time", request.image)));
            }
            tokio::time::sleep(POLL).await;
        }
    }

    fn hosts(&self) -> HostList {
        let network = self.node.network();
        let me = network.local_host();
        let mut hosts: Vec<_> = network
            .hosts()
            .into_iter()
            .map(|e| HostInfo {
                this: e.host == me,
                connected: network.is_connected(e.host),
                host: e.name,
                host_id: e.host,
                address: Some(e.address),
            })
            .collect();
        hosts.sort_by(|a, b| a.host.cmp(&b.host));
        HostList { hosts }
    }

    async fn host_invite(&self, request: InviteRequest) -> Result<InviteReport, ApiError> {
        let ttl = request.valid_ms.map_or(INVITE_TTL, Duration::from_millis);
        let (network, name) = (self.node.network().clone(), request.name.clone());
        let made = tokio::task::spawn_blocking(move || network.invite(&name, ttl)).await;
        let invitation = made.map_err(ApiError::failed)?.map_err(ApiError::failed)?;
        Ok(InviteReport {
            name: request.name,
            expires_ms: invitation.expires_s().saturating_mul(1000),
            token: invitation.to_string(),
        })
    }

    async fn host_remove(&self, request: HostRemoveRequest) -> Result<HostList, ApiError> {
        let entry = self.host(&request.name)?;
        let holds = |i: &&Arc<Image>| i.is_owner_here() && i.state().members.get(entry.host).is_some();
        if let Some(image) = self.node.images().iter().find(holds) {
            let path = image.state().path.clone().unwrap_or_default();
            return Err(ApiError::failed(format!(
                "host {} is a member of {path}: remove it there first (vmfs replica remove)",
                request.name
            )));
        }
        let network = self.node.network().clone();
        let done = tokio::task::spawn_blocking(move || network.remove_host(entry.host)).await;
        done.map_err(ApiError::failed)?.map_err(ApiError::failed)?;
        Ok(self.hosts())
    }
}

fn ms(begun: Instant) -> u64 {
    u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX)
}

fn loss_report(loss: &vmfs_proto::Loss) -> Loss {
    use vmfs_proto::Loss as L;
    match *loss {
        L::Nothing => Loss::Nothing,
        L::EndsAt { seq, time_ns, later_updates } => {
            Loss::EndsAt { seq: seq.0, time_ms: time_ns / 1_000_000, later_updates }
        }
        L::UnknownAfter { seq, time_ns } => Loss::UnknownAfter { seq: seq.0, time_ms: time_ns / 1_000_000 },
    }
}

impl Control for NodeControl {
    fn status(&self) -> Answer<'_, StatusReport> {
        Box::pin(async move { Ok(self.status_report()) })
    }
    fn info(&self, image: String) -> Answer<'_, ImageInfo> {
        Box::pin(async move { self.image_info(&self.image(&image)?) })
    }
    fn promote(&self, request: PromoteRequest, progress: Progress) -> Answer<'_, PromoteReport> {
        Box::pin(self.promote(request, progress))
    }
    fn handover(&self, request: HandoverRequest, progress: Progress) -> Answer<'_, HandoverReport> {
        Box::pin(self.handover(request, progress))
    }
    fn replica_add(&self, request: ReplicaAddRequest, progress: Progress) -> Answer<'_, ReplicaReport> {
        Box::pin(self.replica_add(request, progress))
    }
    fn replica_remove(&self, request: ReplicaRemoveRequest, progress: Progress) -> Answer<'_, ReplicaReport> {
        Box::pin(self.replica_remove(request, progress))
    }
    fn verify(&self, request: VerifyRequest, progress: Progress) -> Answer<'_, VerifyReport> {
        Box::pin(self.verify(request, progress))
    }
    fn scrub(&self, request: ScrubRequest, progress: Progress) -> Answer<'_, ScrubReport> {
        Box::pin(self.scrub(request, progress))
    }
    fn forks(&self, image: Option<String>) -> Answer<'_, ForkList> {
        Box::pin(async move {
            let images = match image {
                Some(path) => vec![self.image(&path)?],
                None => self.node.images(),
            };
            Ok(ForkList { forks: self.fork_list(&images) })
        })
    }
    fn fork_drop(&self, request: ForkDropRequest) -> Answer<'_, ForkInfo> {
        Box::pin(async move { tokio::task::block_in_place(|| self.fork_drop(&request)) })
    }
    fn fork_export(&self, request: ForkExportRequest, progress: Progress) -> Answer<'_, ForkExportReport> {
        Box::pin(self.fork_export(request, progress))
    }
    fn policy(&self, image: String) -> Answer<'_, PolicyReport> {
        Box::pin(async move {
            let found = self.image(&image)?;
            Ok(self.policy_report(image, &found))
        })
    }
    fn policy_set(&self, request: PolicySetRequest) -> Answer<'_, PolicyReport> {
        Box::pin(self.policy_set(request))
    }
    fn fail(&self, request: ImageRequest) -> Answer<'_, FailReport> {
        Box::pin(self.fail(request))
    }
    fn abandon(&self, request: AbandonRequest) -> Answer<'_, AbandonReport> {
        Box::pin(self.abandon(request))
    }
    fn wait(&self, request: WaitRequest, progress: Progress) -> Answer<'_, WaitReport> {
        Box::pin(self.wait(request, progress))
    }
    fn hosts(&self) -> Answer<'_, HostList> {
        Box::pin(async move { Ok(self.hosts()) })
    }
    fn host_invite(&self, request: InviteRequest) -> Answer<'_, InviteReport> {
        Box::pin(self.host_invite(request))
    }
    fn host_remove(&self, request: HostRemoveRequest) -> Answer<'_, HostList> {
        Box::pin(self.host_remove(request))
    }
    fn metrics(&self) -> Answer<'_, String> {
        Box::pin(async move { Ok(self.metrics_text()) })
    }
}
